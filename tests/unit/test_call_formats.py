"""Calls of tools in every format: whatever the cut into tokens, the same parts; what a grammar allows is read back."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence

import numpy as np
import pytest
from fake_engine import EOS, byte_tokenizer

from mooli.config import TOOL_CALL_PARSERS, EngineConfig
from mooli.errors import ConfigError
from mooli.frontend.generation import Generation
from mooli.frontend.parts import PLAIN_TEXT, Part, PartReader
from mooli.frontend.tools import Tool, ToolSet
from mooli.frontend.wire_formats.choice import CALL_FORMATS, MessageFormat, open_wire_format
from mooli.frontend.wire_formats.reasoning import REASONING_FORMATS
from mooli.types import FinishReason, Request, RequestOutput, SamplingParams

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS = ToolSet((Tool("get_weather", parameters=WEATHER), Tool("now")))


def read(parser, text: str, cuts: Sequence[int] = ()) -> list[Part]:
    """What it tells of a text that comes cut in front of the characters `cuts`: tokens, each pushed alone."""
    parts: list[Part] = []
    edges = [0, *cuts, len(text)]
    for start, end in itertools.pairwise(edges):
        parts += parser.push(text[start:end], [end - start])
    return parts + parser.flush()


def joined(parts: Sequence[Part]) -> list[tuple[str, str]]:
    """Kinds and texts; pieces of one part as one."""
    found: list[tuple[str, int, str]] = []
    for part in parts:
        if found and found[-1][:2] == (part.kind, part.call):
            found[-1] = (part.kind, part.call, found[-1][2] + part.text)
        elif part.text or part.kind == "call_end":
            found.append((part.kind, part.call, part.text))
    return [(kind, text) for kind, _, text in found]


def call(name: str, arguments: str) -> list[tuple[str, str]]:
    return [("call_begin", name), ("arguments", arguments), ("call_end", "")]


def test_every_name_that_an_engine_takes_has_a_format():
    assert sorted(TOOL_CALL_PARSERS) == sorted(CALL_FORMATS)
    assert all(call_format.name == name for name, call_format in CALL_FORMATS.items())
    with pytest.raises(
        ConfigError, match=r"tool_call_parser='qwen9' is not possible; choose one of auto, none, .*qwen"
    ):
        EngineConfig.from_kwargs(model_path="m", tool_call_parser="qwen9")
    assert EngineConfig.from_kwargs(model_path="m", tool_call_parser=None).tool_call_parser == "none"


# -- reasoning and calls -----------------------------------------------------------------------------------------------
OSLO = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def message(text: str, cuts: Sequence[int] = (), reasoning: str = "qwen3", tail: str = "") -> list[tuple[str, str]]:
    wire_format = MessageFormat(REASONING_FORMATS[reasoning], CALL_FORMATS["qwen"]).with_tools(TOOLS)
    parts = read(wire_format.parser(tail), text, cuts)
    assert sum(part.num_tokens for part in parts) <= len(cuts) + 1
    return joined(parts)


@pytest.mark.parametrize(
    ("text", "tail", "expected"),
    [
        (f"<think>\nm\n</think>\n\nt\n{OSLO}", "", [("reasoning", "m"), ("text", "t")]),
        (f"m\n</think>\n\n{OSLO}", "<think>\n", [("reasoning", "m")]),
        (f"m\n{OSLO}", "<think>\n", [("reasoning", "m")]),
        (f"{OSLO}", "<think>\n", []),
        (f"{OSLO}", "", []),
    ],
)
def test_calls_behind_reasoning_and_in_reasoning_that_is_open(text, tail, expected):
    expected = [*expected, *call("get_weather", '{"city": "Oslo"}')]
    for cut in range(1, len(text)):
        assert message(text, [cut], tail=tail) == expected, cut
    assert message(text, range(1, len(text)), tail=tail) == expected


def test_a_call_ends_open_reasoning_only_where_the_models_write_so():
    assert message(f"m\n{OSLO}", reasoning="deepseek-r1") == [("reasoning", f"m\n{OSLO}")]


def test_tokens_of_a_marker_that_ends_reasoning_are_no_reasoning():
    wire_format = MessageFormat(REASONING_FORMATS["qwen3"], CALL_FORMATS["qwen"]).with_tools(TOOLS)
    text = f"m\n{OSLO}"
    parts = read(wire_format.parser("<think>"), text, range(1, len(text)))
    assert sum(part.num_tokens for part in parts if part.kind == "reasoning") == 1
    assert sum(part.num_tokens for part in parts) == len(text)


def test_without_tools_calls_are_text():
    wire_format = MessageFormat(PLAIN_TEXT, CALL_FORMATS["qwen"], CALL_FORMATS["json_list"])
    none = wire_format.with_tools(ToolSet(TOOLS.tools, choice="none"))
    for made in (wire_format, none, wire_format.with_tools(ToolSet(()))):
        assert joined(read(made.parser(""), OSLO)) == [("text", OSLO)]
        assert made.marker_tokens == ()
    assert wire_format.with_tools(TOOLS).marker_tokens == ("<tool_call>", "</tool_call>")


def test_a_model_without_a_format_has_the_list_for_calls_that_are_forced():
    wire_format = MessageFormat(PLAIN_TEXT, None, CALL_FORMATS["json_list"])
    text = '[{"name": "now", "parameters": {}}]'
    assert joined(read(wire_format.with_tools(TOOLS).parser(""), text)) == [("text", text)]
    forced = wire_format.with_tools(ToolSet(TOOLS.tools, choice="required"))
    assert joined(read(forced.parser(""), text)) == call("now", "{}")


def test_a_call_has_an_id():
    request = Request(rid="r", prompt_ids=np.array([33], np.int32), sampling=SamplingParams())
    generation = Generation(request, byte_tokenizer())
    wire_format = MessageFormat(PLAIN_TEXT, CALL_FORMATS["qwen"]).with_tools(TOOLS)
    generation.update(RequestOutput("r", [*f"{OSLO}\n{OSLO}".encode(), EOS], FinishReason("stop", matched=EOS)))
    parts = PartReader(generation, wire_format.parser("")).take()
    ids = [part.call_id for part in parts if part.kind == "call_begin"]
    assert len(set(ids)) == 2 and all(re.fullmatch("call_[0-9a-f]{24}", call_id) for call_id in ids)
    assert [token_id for part in parts for token_id in part.token_ids] == generation.output_ids
    assert [json.loads(part.text) for part in parts if part.kind == "arguments"] == [{"city": "Oslo"}] * 2


# -- which one a model has ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ messages }}", "hermes"),  # told of tools in that form
        ("{{ messages }}{{ tools }}", None),
        ("{{ tools }}<tool_call>", "qwen"),
    ],
)
def test_the_format_is_found_in_the_template(template, name):
    tokenizer = byte_tokenizer(template)
    wire_format = open_wire_format(EngineConfig.from_kwargs(model_path="m"), tokenizer)
    assert (None if wire_format.calls is None else wire_format.calls.name) == name


def test_a_format_that_is_named_is_taken_and_none_finds_nothing():
    tokenizer = byte_tokenizer("{{ tools }}")
    forced = ToolSet(TOOLS.tools, choice="required")
    for given, auto, found in (("qwen25", "qwen25", "qwen25"), ("auto", None, "json_list"), ("none", None, None)):
        config = EngineConfig.from_kwargs(model_path="m", tool_call_parser=given)
        wire_format = open_wire_format(config, tokenizer)
        for made, expected in ((wire_format, auto), (wire_format.with_tools(forced), found)):
            assert (None if made.calls is None else made.calls.name) == expected
