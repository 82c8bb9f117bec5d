"""Campaigns of constrained output: what a model samples under a grammar is what the grammar says, or is cut short.

Owns the asking and the judging. Judges are others than who made the grammar: `jsonschema` for schemas, the parser of a
wire format for calls. Shared by a test with few and a benchmark with many.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jsonschema

from mooli import Engine
from mooli.errors import GrammarError
from mooli.frontend.tools import Tool, ToolSet
from mooli.frontend.wire_formats.calls import CallFormat
from schemas import Schema, random_schema, refused_schema

TEMPERATURE = 1.5
MAX_TOOLS = 4


@dataclass
class Campaign:
    """faults: what should not have been. refusals: why, of the grammars that were refused. num_right: finished, and of
    its grammar. num_cut: not finished."""

    num_right: int = 0
    num_cut: int = 0
    num_calls: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def check(schema: Any, value: Any) -> None:
    """Raises ValidationError. Formats are checked as far as the judge knows them."""
    validator = jsonschema.Draft202012Validator
    validator(schema, format_checker=validator.FORMAT_CHECKER).validate(value)


def judge_schemas(engine: Engine, schemas: Sequence[Schema], max_new_tokens: int, seed: int = 0) -> Campaign:
    campaign = Campaign()
    asked = [{"json_schema": schema} for schema in schemas]
    for schema, answer in zip(schemas, _answers(engine, asked, max_new_tokens, seed), strict=True):
        if _has_ended(answer, campaign, json.dumps(schema)):
            try:
                check(schema, json.loads(answer["text"]))
                campaign.num_right += 1
            except (ValueError, jsonschema.ValidationError) as exc:
                campaign.faults.append(f"{json.dumps(schema)}\n{answer['text']}\n{str(exc)[:300]}")
    return campaign


def judge_refusals(engine: Engine, words: Sequence[str], schemas: Sequence[Schema]) -> Campaign:
    """Schemas that must be refused, each with the word that says why."""
    campaign = Campaign()
    for word, schema in zip(words, schemas, strict=True):
        try:
            engine.generate("x", {"json_schema": schema, "max_new_tokens": 1})
            why = "it is not refused"
        except GrammarError as exc:
            why = str(exc)
            campaign.refusals[why] += 1
        if word not in why:
            campaign.faults.append(f"{word}: {json.dumps(schema)}\n{why}")
    return campaign


def judge_tools(
    engine: Engine, formats: Sequence[CallFormat], sets: Sequence[ToolSet], max_new_tokens: int, seed: int = 0
) -> Campaign:
    """Each set of tools is called in one of the formats, in turn. A format whose values stand between tags may refuse a
    set, if it says which tool it cannot hold, and why."""
    campaign = Campaign()
    asked: list[tuple[CallFormat, ToolSet, dict[str, Any]]] = []
    for index, tools in enumerate(sets):
        call_format = formats[index % len(formats)]
        try:
            asked.append((call_format, tools, {"ebnf": f"start: calls\n{call_format.calls_grammar(tools)}"}))
        except GrammarError as exc:
            campaign.refusals[f"{call_format.name}: {exc}"] += 1
            if not re.match(r"tool [\w-]+(, parameter .+)?: ", str(exc)):
                campaign.faults.append(f"{call_format.name}: {tools}\n{exc}")
    answers = _answers(engine, [grammar for _, _, grammar in asked], max_new_tokens, seed)
    for (call_format, tools, _), answer in zip(asked, answers, strict=True):
        if not _has_ended(answer, campaign, f"{call_format.name}: {tools}"):
            continue
        try:
            num_calls = _check_calls(call_format, tools, answer["text"])
            campaign.num_right += 1
            campaign.num_calls += num_calls
        except (AssertionError, ValueError, jsonschema.ValidationError) as exc:
            campaign.faults.append(f"{call_format.name}: {tools}\n{answer['text']}\n{str(exc)[:300]}")
    return campaign


def _check_calls(call_format: CallFormat, tools: ToolSet, text: str) -> int:
    parser = call_format.parser(tools)
    parts = [*parser.push(text, [len(text)]), *parser.flush()]
    said = "".join(part.text for part in parts if part.kind == "text")
    assert not said.strip(), f"text beside the calls: {said!r}"
    begun = [part for part in parts if part.kind == "call_begin"]
    assert len(begun) == sum(part.kind == "call_end" for part in parts) >= 1, "no call, or one that is not whole"
    assert tools.parallel or len(begun) == 1, "several calls"
    for part in begun:
        tool = tools.named(part.text)
        assert tool is not None, f"there is no function {part.text!r}"
        pieces = [piece.text for piece in parts if piece.kind == "arguments" and piece.call == part.call]
        check(dict(tool.parameters or {"type": "object"}), json.loads("".join(pieces)))
    return len(begun)


def _answers(engine: Engine, asked: Sequence[dict[str, Any]], max_new_tokens: int, seed: int) -> list[dict[str, Any]]:
    params = [
        {**grammar, "temperature": TEMPERATURE, "max_new_tokens": max_new_tokens, "sampling_seed": seed + index}
        for index, grammar in enumerate(asked)
    ]
    made = []
    for first in range(0, len(params), 100):  # no more grammars may wait at once than some
        some = params[first : first + 100]
        made += engine.generate(["As JSON: "] * len(some), some)
    return made


def _has_ended(answer: dict[str, Any], campaign: Campaign, what: str) -> bool:
    end = answer["meta_info"]["finish_reason"]
    if end["type"] == "length":
        campaign.num_cut += 1
    elif end["type"] == "error" and end["status_code"] == 400:
        campaign.refusals[end["message"]] += 1
    elif end["type"] != "stop":
        campaign.faults.append(f"{what}\n{end}")
    return bool(end["type"] == "stop")


# -- what is asked -----------------------------------------------------------------------------------------------------
def drawn_schemas(count: int, seed: int) -> list[Schema]:
    rng = random.Random(seed)
    return [random_schema(rng) for _ in range(count)]


def drawn_refusals(count: int, seed: int) -> tuple[list[str], list[Schema]]:
    rng = random.Random(seed)
    words, schemas = zip(*(refused_schema(rng) for _ in range(count)), strict=True)
    return list(words), list(schemas)


def drawn_tool_sets(count: int, seed: int) -> list[ToolSet]:
    rng = random.Random(seed)
    sets = []
    for _ in range(count):
        names = rng.sample(
            ["get_weather", "search", "add", "remove_user", "lookup-2", "f"], rng.randrange(1, MAX_TOOLS)
        )
        tools = tuple(Tool(name, parameters=_arguments(rng)) for name in names)
        sets.append(ToolSet(tools, "required", parallel=rng.random() < 0.5))
    return sets


def _arguments(rng: random.Random) -> Schema | None:
    """A schema of arguments; None for a function without any."""
    while rng.random() < 0.9:
        schema = random_schema(rng)
        if schema.get("type") == "object":
            return schema
    return None
