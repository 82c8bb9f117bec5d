"""Agents on the real 135M model: the loop of the example, and second turns that compute only what is new."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from server_process import needs_demo

import mooli

pytestmark = [needs_demo, pytest.mark.slow]

EXAMPLE = Path(__file__).parents[2] / "examples/agent.py"
LOOK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Says what is known of a topic.",
        "parameters": {
            "type": "object",
            "properties": {"topic": {"enum": ["radix tree", "token"]}, "depth": {"type": "integer", "maximum": 9}},
            "required": ["topic", "depth"],
            "additionalProperties": False,
        },
    },
}
OTHER: dict[str, Any] = {"type": "function", "function": {**LOOK["function"], "name": "look_at"}}


@pytest.fixture(scope="module")
def engine():
    with mooli.Engine(model_path="demo", backend="cpu", max_total_tokens=8192, random_seed=1) as engine:
        yield engine


def second_turn(engine: mooli.Engine, seed: int, **asked: Any) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """How many tokens of the first turn were computed again in the second, and both answers."""
    messages: list[Any] = [{"role": "user", "content": f"Question {seed}: what is a radix tree?"}]
    params = {"temperature": 1.0, "max_new_tokens": 60, "sampling_seed": seed}
    first = engine.chat(messages, params, **asked)
    messages.append(first["message"])
    for call in first["message"].get("tool_calls", ()):
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": "It keeps prefixes once."})
    messages.append({"role": "user", "content": "Go on."})
    asked.pop("tool_choice", None)
    second = engine.chat(messages, {"temperature": 0, "max_new_tokens": 1}, **asked)
    # The last token that a sequence samples is never computed in it.
    done = first["meta_info"]["prompt_tokens"] + first["meta_info"]["completion_tokens"] - 1
    return done - second["meta_info"]["cached_tokens"], first, second


def test_behind_a_forced_call_a_turn_computes_only_what_is_new(engine, monkeypatch):
    asked: dict[str, Any] = {"tools": [LOOK, OTHER], "tool_choice": "required", "parallel_tool_calls": False}
    for seed in range(3):
        again, first, _ = second_turn(engine, seed, **asked)
        (call,) = first["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert arguments["topic"] in ("radix tree", "token") and arguments["depth"] <= 9
        assert call["function"]["name"] in ("look_up", "look_at")
        assert again <= 0, (seed, first["text"])
    # What it saves: a model that is held to a grammar seldom writes the tokens that its text is read in.
    monkeypatch.setattr(engine, "_own_answers", None)
    engine.flush_cache()
    lost = [second_turn(engine, seed, **asked)[0] for seed in range(3)]
    assert sum(lost) > 10, lost


def test_behind_words_a_turn_computes_only_what_is_new(engine):
    for seed in range(4):
        again, first, second = second_turn(engine, seed)
        assert again <= 0, (seed, first["text"])
        assert second["meta_info"]["prompt_tokens"] - second["meta_info"]["cached_tokens"] < 30


def test_the_example_calls_its_functions():
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Turn 1: 0 of ") and "\nAnswer: " in done.stdout
    assert re.match(r"  (calculate|look_up)\(\{.*\}\) = ", lines[1]), done.stdout
    cached, length = map(int, re.findall(r"\d+", next(line for line in lines if line.startswith("Turn 2")))[1:])
    before = int(re.findall(r"\d+", lines[0])[2])
    assert length > cached > before, "the first turn's prompt, and its call"
