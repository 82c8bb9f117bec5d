"""What an answer is held to beyond what its user wrote: calls of tools, and that reasoning comes first.

Owns which calls are enforced, and where in an answer a grammar or a budget begins. How a model writes calls and
reasoning is its wire format's (`mooli.frontend.wire_formats`), and what a grammar is made of them `mooli.grammar`'s.

- A forced call (choice "required", or a named tool, which is the one tool of its set) is in the model's own format, its
  arguments of the function's schema whatever `strict` says.
- Calls that are free are text like all other, but where a tool is strict: then whatever begins a call becomes one. In
  open reasoning only where the parser ends that with a call; else it is a word of it.
  Arguments are of the schema where the tool is strict, and else any object.
- A free call where the user has a grammar of his own: the answer is either a call or held to that grammar.
- No call with the choice "none": the prompt tells of no tools.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mooli.errors import RequestError
from mooli.frontend.inputs import Ids
from mooli.frontend.parts import WireFormat, prompt_tail
from mooli.frontend.sampling import CALLS, GRAMMARS, REASONING, reasoning_before
from mooli.frontend.tokenizer import Tokenizer
from mooli.frontend.tools import Tool, ToolSet
from mooli.frontend.wire_formats.calls import CallFormat
from mooli.types import Calls, Reasoning, Request

MAX_RULES_CHARS = 1 << 20
"""Of the rules for all tools of a request."""

_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def tool_grammar(
    wire_format: WireFormat, tools: ToolSet | None, sampling_params: Mapping[str, Any]
) -> dict[str, Calls]:
    """The sampling parameters that hold an answer to calls, to be laid over `sampling_params`; {} where calls are free.

    wire_format: by which the answer is read, `with_tools(tools)` already or not. sampling_params: what the request
    says, under native names: whether it has a grammar of its own. One beside a forced call is refused where the
    parameters are read (`mooli.frontend.sampling`).

    Raises RequestError for a forced call where there are no tools, or none that this model could call.
    """
    if tools is None or tools.choice == "none":
        return {}
    is_forced = tools.choice == "required"
    if is_forced and not tools.tools:
        raise RequestError("a tool must be called, and there are none", argument="tools")
    calls = wire_format.with_tools(tools).calls
    if calls is None:
        if is_forced:
            raise RequestError(
                "a tool must be called, and it is not known how this model writes calls",
                argument="tool_choice",
                advice="(start with tool_call_parser)",
            )
        return {}
    # Other triggers are words as well, and text would be cut short by them.
    triggers = tuple(text for text in calls.triggers() if text.startswith(calls.marker_tokens))
    if is_forced:
        return {CALLS: Calls(_rules(calls, tools), True, triggers)}
    has_grammar = any(sampling_params.get(name) not in (None, "") for name in GRAMMARS)
    if not tools.tools or not (has_grammar or (triggers and any(tool.strict for tool in tools.tools))):
        return {}
    loose = replace(tools, tools=tuple(map(_as_it_is_held, tools.tools)))
    return {CALLS: Calls(_rules(calls, loose), False, triggers)}


def _rules(calls: CallFormat, tools: ToolSet) -> str:
    try:
        rules = calls.calls_grammar(tools)
        rules.encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise RequestError(f"tools cannot be enforced: {exc}", argument="tools") from exc
    if len(rules) > MAX_RULES_CHARS:
        raise RequestError(
            f"tools have schemas of {len(rules)} characters; calls can be held to at most {MAX_RULES_CHARS}",
            argument="tools",
        )
    return rules


def _as_it_is_held(tool: Tool) -> Tool:
    """With the schema that its arguments are held to where it need not be called."""
    return tool if tool.strict else replace(tool, parameters=_ANY_OBJECT)


def reasoning_ahead(wire_format: WireFormat, prompt_ids: Ids, tokenizer: Tokenizer) -> dict[str, Reasoning | None]:
    """The sampling parameter by which grammars and budgets know of the reasoning that an answer begins with; {} where
    the model has none. Where the prompt shows that it does not think, grammars hold from the first token on.

    wire_format: of an answer that goes on with the assistant's words, `continued`.
    """
    if not wire_format.prompt_tail_tokens:
        return {}
    return {REASONING: wire_format.reasoning_ahead(prompt_tail(wire_format, prompt_ids, tokenizer))}


def begin_behind_reasoning(
    requests: Iterable[Request], wire_format: WireFormat, tokenizer: Tokenizer | None, *, grammars: bool
) -> None:
    """What `reasoning_ahead` is for prompts that came as texts or ids: the budgets of `requests` that nobody has looked
    at yet, and with `grammars` their grammars, begin to know of reasoning.

    Raises RequestError for a budget where nothing is known of reasoning.
    """
    for request in requests:
        grammar, thinking = request.sampling.grammar, request.sampling.thinking
        is_asked = thinking is not None and thinking.reasoning is None
        if not is_asked and (grammar is None or not grammars):
            continue
        found = {} if tokenizer is None else reasoning_ahead(wire_format, request.prompt_ids, tokenizer)
        if is_asked and not found:
            raise RequestError(
                "max_thinking_tokens is given, but nothing is known of reasoning in this model's answers: leave it out",
                argument="max_thinking_tokens",
                advice="(or start with reasoning_parser)",
            )
        reasoning = found.get(REASONING)
        if grammar is not None and grammars:
            calls = grammar.calls if grammar.kind == "calls" else None
            grammar = replace(grammar, reasoning=reasoning_before(calls, reasoning) if calls else reasoning)
        if thinking is not None and is_asked:
            thinking = None if reasoning is None else replace(thinking, reasoning=reasoning)
        request.sampling = replace(request.sampling, grammar=grammar, thinking=thinking)
