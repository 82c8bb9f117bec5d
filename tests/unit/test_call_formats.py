"""Calls of tools in every format: whatever the cut into tokens, the same parts; what a grammar allows is read back."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from call_forms import FORMS, VARIANTS
from fake_engine import EOS, byte_tokenizer

from mooli.config import TOOL_CALL_PARSERS, EngineConfig
from mooli.errors import ConfigError
from mooli.frontend.generation import Generation
from mooli.frontend.parts import PLAIN_TEXT, Part, PartReader, WireFormat, parser_for
from mooli.frontend.tokenizer import Tokenizer
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


# -- every format, all cuts --------------------------------------------------------------------------------------------
NAMES = sorted(set(FORMS) - {"hermes", "qwen25", "trinity"})  # what differs of these is their name

ARGUMENTS = [
    '{"city": "Oslo", "a": {"b": [1, {"c": "}"}], "d": {}}, "e": []}',
    '{"city": "\\"é\\\\ \\n{[\\u00e9 \\ud83d\\ude00 \U0001f600"}',
    '{"n": 123456789012345678901234567890, "s": "0012", "x": -1.5e-7, "t": true, "z": null}',
]


def cuts_of(text: str, seed: int = 0) -> Iterator[Sequence[int]]:
    """Each cut alone, a character alone, every character alone, and some of the many others."""
    places = range(1, len(text))
    yield from ([place] for place in places)
    yield from ([place, place + 1] for place in places[::3])
    yield places
    chance = random.Random(seed)
    for _ in range(10 if text else 0):
        yield sorted(chance.sample(places, chance.randrange(len(text))))


def read_whole(call_format, text: str, tools: ToolSet = TOOLS) -> list[tuple[str, str]]:
    """What it tells, which must be the same whatever the cut."""
    expected = joined(read(call_format.parser(tools), text))
    for cuts in cuts_of(text):
        parts = read(call_format.parser(tools), text, cuts)
        assert joined(parts) == expected, cuts
        assert sum(part.num_tokens for part in parts) <= len(cuts) + 1
    return expected


def calls_in(told: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Names and arguments of the calls that are whole."""
    found: list[tuple[str, str]] = []
    for (kind, text), (_, arguments), (end, _) in zip(told, told[1:], told[2:], strict=False):
        if (kind, end) == ("call_begin", "call_end"):
            found.append((text, arguments))
    return found


def texts_in(told: Sequence[tuple[str, str]]) -> str:
    return "".join(text for kind, text in told if kind == "text")


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_read_whatever_the_cut(name):
    form, call_format = FORMS[name], CALL_FORMATS[name]
    for arguments in ARGUMENTS:
        end = f'{{"city": "{form.ends}</parameter>"}}'
        three = [("get_weather", arguments), ("now", "{}"), ("get_weather", end)]
        for calls in ([one] for one in three) if form.has_one else [three]:
            told = read_whole(call_format, form.write(calls))
            assert [kind for kind, _ in told] == ["call_begin", "arguments", "call_end"] * len(calls)
            assert [(one, json.loads(text)) for one, text in calls_in(told)] == [
                (one, json.loads(text)) for one, text in calls
            ]
            if form.keeps_text:
                assert calls_in(told) == calls


@pytest.mark.parametrize("name", NAMES)
def test_text_around_calls_is_told_without_the_white_space_between(name):
    form, call_format = FORMS[name], CALL_FORMATS[name]
    call = form.write([("get_weather", '{"city": "Oslo"}')])
    if not form.is_first:
        told = read_whole(call_format, f"I see:\n\n{call}")
        assert told[0] == ("text", "I see:") and len(calls_in(told)) == 1 and len(told) == 4
    told = read_whole(call_format, f"{call}\n\nThat is <all>. ")
    assert told[-1] == ("text", "That is <all>. ") and len(calls_in(told)) == 1 and len(told) == 4
    assert read_whole(call_format, " Just text, with [a] {list} <b>.\n") == [
        ("text", " Just text, with [a] {list} <b>.\n")
    ]
    assert read_whole(call_format, "") == []


@pytest.mark.parametrize("name", NAMES)
def test_a_function_that_is_not_there_is_called_where_a_marker_says_so(name):
    form, call_format = FORMS[name], CALL_FORMATS[name]
    text = form.write([("fly", '{"to": "Oslo"}')])
    told = read_whole(call_format, text)
    assert told == (call("fly", '{"to": "Oslo"}') if form.is_marked else [("text", text)])


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_that_is_cut_short_loses_nothing_and_makes_nothing_up(name):
    form, call_format = FORMS[name], CALL_FORMATS[name]
    calls = [("get_weather", '{"city": "Oslo", "days": 3}'), ("now", "{}")][: 1 if form.has_one else 2]
    text = form.write(calls)
    seen = 0
    for length in range(len(text)):
        told = joined(read(call_format.parser(TOOLS), text[:length]))
        assert told == joined(read(call_format.parser(TOOLS), text[:length], range(1, length)))
        whole = [(one, json.loads(arguments)) for one, arguments in calls_in(told)]
        assert whole == [(one, json.loads(arguments)) for one, arguments in calls[: len(whole)]]
        begun = [one for kind, one in told if kind == "call_begin"]
        assert begun == [one for one, _ in calls[: len(begun)]] and len(whole) <= len(begun) <= len(whole) + 1
        if len(begun) > len(whole):
            arguments = "".join(said for kind, said in told[3 * len(whole) :] if kind == "arguments")
            if form.keeps_text:
                assert calls[len(whole)][1].startswith(arguments)
            with pytest.raises(ValueError):
                json.loads(arguments)
        elif not begun and form.ends != "<|call|>":  # of harmony headers are no text
            assert texts_in(told) == text[:length]
        assert len(begun) >= seen
        seen = len(begun)
    assert seen == len(calls)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpt-oss"])
def test_a_marker_without_a_call_is_text(name):
    call_format = CALL_FORMATS[name]
    for marker in (*call_format.marker_tokens, *call_format.triggers(), "[get_weather(", '{"name": "get_weather'):
        for text in (f"a {marker} b", f"{marker} {{", f" {marker}", f"{marker}\n{{1: 2}}", f"{marker}[{{}}]"):
            assert texts_in(read_whole(call_format, text)) == text or "get_weather(" in marker


@pytest.mark.parametrize("name", [name for name in NAMES if FORMS[name].keeps_text])
def test_arguments_that_are_no_json_are_told_as_they_are_written_and_have_no_end(name):
    form, call_format = FORMS[name], CALL_FORMATS[name]
    for arguments in ('{"city": Oslo}', "{'city': 1}", '{"a": 01}', '{"a": [1}'):
        told = read_whole(call_format, form.write([("get_weather", arguments)]))
        assert told[0] == ("call_begin", "get_weather") and not calls_in(told)
        assert told[1][0] == "arguments" and told[1][1].startswith(arguments)


@pytest.mark.parametrize("name", [name for name in NAMES if FORMS[name].keeps_text])
def test_slips_that_can_mean_one_thing_are_written_right(name):
    form, call_format = FORMS[name], CALL_FORMATS[name]
    told = read_whole(call_format, form.write([("get_weather", '{"a": "b\n\\d\tc", "d": [True, None, False]}')]))
    ((_, arguments),) = calls_in(told)
    assert json.loads(arguments) == {"a": "b\n\\d\tc", "d": [True, None, False]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_ways_to_write_two_calls(variant):
    name, text = VARIANTS[variant]
    told = read_whole(CALL_FORMATS[name], text)
    assert calls_in(told) == [("now", "{}")] * 2 and len(told) == 6


def test_arguments_come_as_they_are_written():
    """Not at their end: one character in, and all but one before it are told."""
    for name in NAMES:
        parser = CALL_FORMATS[name].parser(TOOLS)
        text = FORMS[name].write([("get_weather", '{"city": "Oslo, the capital"}')])
        head, _, _ = text.partition(" capital")
        told = "".join(part.text for char in head for part in parser.push(char, [1]) if part.kind == "arguments")
        assert told == '{"city": "Oslo, the', name


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("a='it\\'s \"x\"'", {"a": 'it\'s "x"'}),
        ("a=r'\\d', b='''two\nlines's''', c=''", {"a": "\\d", "b": "two\nlines's", "c": ""}),
        ("a='\\x41\\u00e9\\U0001f600\\101\\ud83d\\ude00\\q'", {"a": "Aé\U0001f600A\U0001f600\\q"}),
        ("a = [1, 2.0, ], b=(1,), c={'d': {}, \"e\": [[]]}, ", {"a": [1, 2.0], "b": [1], "c": {"d": {}, "e": [[]]}}),
        ("a=1_000, b=-.5, c=5., d=0x1F, e=+7, f=1e3", {"a": 1000, "b": -0.5, "c": 5.0, "d": 31, "e": 7, "f": 1000.0}),
        ("a=True, b=None, c=false", {"a": True, "b": None, "c": False}),
        ("**{'a b': 1}", {"a b": 1}),
        ("**{}", {}),
        ("", {}),
        (" ", {}),
    ],
)
def test_literals_of_python_become_json(written, expected):
    told = read_whole(CALL_FORMATS["pythonic"], f"[get_weather({written})]")
    ((_, arguments),) = calls_in(told)
    assert json.loads(arguments) == expected


@pytest.mark.parametrize(
    "written", ["a=b", "a=f(1)", "1", "a=1+2", "a={1: 2}", "a='\\xg0000000'", "a==1", "a=1 b=2", "**a", "a=f'x'"]
)
def test_what_is_no_literal_of_python_ends_no_call(written):
    told = read_whole(CALL_FORMATS["pythonic"], f"[get_weather({written})]")
    assert told[0] == ("call_begin", "get_weather") and not calls_in(told)


def test_big_numbers_of_python_stay_as_they_are():
    told = read_whole(CALL_FORMATS["pythonic"], "[get_weather(n=123456789012345678901234567890, x=0.1000)]")
    assert calls_in(told) == [("get_weather", '{"n": 123456789012345678901234567890, "x": 0.1000}')]


def test_calls_of_trinity_stand_in_reasoning_whose_markers_are_no_text():
    form, call_text = (
        CALL_FORMATS["trinity"],
        '<tool_call>\n{"name": "now", "arguments": {"a": "<think>"}}\n</tool_call>',
    )
    text = f"<think>a <thin</think> b\n{call_text}\n</think>\nc"
    told = [("text", "a <thin b"), *call("now", '{"a": "<think>"}'), ("text", "c")]
    assert read_whole(form, text) == told
    assert read_whole(form, "<think>a<tool_call></think>") == [("text", "a<tool_call>")]
    for name in ("qwen3", "deepseek-r1"):
        wire_format = MessageFormat(REASONING_FORMATS[name], form).with_tools(TOOLS)
        found = joined(read(wire_format.parser("<think>"), text.removeprefix("<think>").replace("</think>", "", 1)))
        assert found == [("reasoning", "a <thin b"), *told[1:]]


# -- by chance ---------------------------------------------------------------------------------------------------------
SCRAPS = [
    "get_weather", "now", "(", ")", "[", "]", "{", "}", "\"name\"", "\"arguments\"", "\"parameters\"", ":", ",", ";",
    "\"", "\\", "\\u00", "e9", " ", "\n", "a", "é", "1", "-", ".", "true", "None", "=", "**", "'", "\"city\": \"Oslo\"",
    "{\"name\": \"now\"", "to=functions.now", "<", "|", ">", "{}",
]  # fmt: skip


@pytest.mark.parametrize(
    ("reasoning", "name"),
    [(None, name) for name in NAMES]
    + [("qwen3", "qwen"), ("gpt-oss", "gpt-oss"), ("gpt-oss", "qwen"), ("openpangu", "pangu")],
)
def test_texts_by_chance_are_read_the_same_whatever_the_cut(reasoning, name):
    without_calls = PLAIN_TEXT if reasoning is None else REASONING_FORMATS[reasoning]
    wire_format = MessageFormat(without_calls, CALL_FORMATS[name]).with_tools(TOOLS)
    chance = random.Random(f"{reasoning} {name}")
    scraps = [*SCRAPS, *wire_format.marker_tokens, *CALL_FORMATS[name].triggers(), FORMS[name].write([("now", "{}")])]
    for _ in range(40):
        text = "".join(chance.choices(scraps, k=chance.randint(1, 25)))
        tail = chance.choice(["", "<think>\n", "[unused16]"])
        expected = joined(read(wire_format.parser(tail), text))
        places = range(1, len(text))
        for cuts in (places, sorted(chance.sample(places, chance.randrange(len(text))))):
            parts = read(wire_format.parser(tail), text, cuts)
            assert joined(parts) == expected, text
            at_once = wire_format.parser(tail)
            lengths = [end - start for start, end in itertools.pairwise([0, *cuts, len(text)])]
            whole = at_once.push(text, lengths) + at_once.flush()
            assert [vars_of(part) for part in whole] == [vars_of(part) for part in parts], text
        for _, arguments in calls_in(expected):
            assert isinstance(json.loads(arguments), dict), text
        if reasoning is None and not any(kind == "call_begin" for kind, _ in expected):
            assert texts_in(expected) == text


def vars_of(part: Part) -> tuple[str, str, int, int]:
    return (part.kind, part.text, part.call, part.num_tokens)


# -- gpt-oss -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "<|channel|>analysis<|message|>m<|end|><|start|>assistant<|channel|>commentary to=functions.now"
            " <|constrain|>json<|message|>{}<|call|>",
            [("reasoning", "m"), *call("now", "{}")],
        ),
        (
            "<|channel|>analysis<|message|>m<|end|><|start|>assistant<|channel|>commentary<|message|>t<|end|>"
            "<|start|>assistant to=functions.now<|channel|>commentary json<|message|> {}",
            [("reasoning", "m"), ("text", "t"), *call("now", "{}")],
        ),
        (
            "<|channel|>commentary to=functions.now<|message|><|end|><|start|>assistant<|channel|>commentary"
            " to=functions.now<|message|>{}<|call|><|start|>assistant<|channel|>final<|message|>t",
            [*call("now", "{}"), *call("now", "{}"), ("text", "t")],
        ),
        (" to=functions.now<|channel|>commentary json<|message|>{}<|call|>", call("now", "{}")),
        ("to=be", [("text", "to=be")]),
        ("<|channel|>analysis to=functions.now code<|message|>{}<|call|>", call("now", "{}")),
        ("<|channel|>analysis to=python code<|message|>1+1<|call|>", [("reasoning", "1+1")]),
        ("<|channel|>commentary to=functions.now", []),
        ("plain {}", [("text", "plain {}")]),
    ],
)
def test_messages_of_harmony_to_functions_are_calls(text, expected):
    wire_format = MessageFormat(REASONING_FORMATS["gpt-oss"], CALL_FORMATS["gpt-oss"]).with_tools(TOOLS)
    for cuts in ([], *cuts_of(text)):
        assert joined(read(wire_format.parser("<|start|>assistant"), text, cuts)) == expected, cuts


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


@pytest.mark.parametrize("name", NAMES)
def test_markers_that_are_special_tokens_are_seen_by_the_format_and_by_nobody_else(name):
    wire_format = MessageFormat(PLAIN_TEXT, CALL_FORMATS[name]).with_tools(TOOLS)
    tokenizer = byte_tokenizer(markers=wire_format.marker_tokens)
    text = FORMS[name].write([("get_weather", '{"city": "Oslo"}')])
    ids = [*tokenizer.encode(text, add_special_tokens=False), 257]  # a special token of no format
    parts = [part for part in parts_of(ids, wire_format, tokenizer) if part.text]
    assert [(part.kind, part.text) for part in parts] == call("get_weather", '{"city": "Oslo"}')[:2]


def parts_of(ids: Sequence[int], wire_format: WireFormat, tokenizer: Tokenizer) -> list[Part]:
    """Of a sequence that says `ids`, read once at its end."""
    request = Request(rid="r", prompt_ids=np.array([33], np.int32), sampling=SamplingParams())
    generation = Generation(request, tokenizer, shown_ids=tokenizer.special_ids_of(wire_format.marker_tokens))
    generation.update(RequestOutput("r", [*ids, EOS], FinishReason("stop", matched=EOS)))
    parts = PartReader(generation, parser_for(wire_format, request, tokenizer)).take()
    assert [token_id for part in parts for token_id in part.token_ids] == generation.output_ids
    return parts


def test_a_call_has_an_id():
    wire_format = MessageFormat(PLAIN_TEXT, CALL_FORMATS["qwen"]).with_tools(TOOLS)
    parts = parts_of([*f"{OSLO}\n{OSLO}".encode()], wire_format, byte_tokenizer())
    ids = [part.call_id for part in parts if part.kind == "call_begin"]
    assert len(set(ids)) == 2 and all(re.fullmatch("call_[0-9a-f]{24}", call_id) for call_id in ids)
    assert [json.loads(part.text) for part in parts if part.kind == "arguments"] == [{"city": "Oslo"}] * 2


def test_ids_of_mistral_are_those_it_writes_or_as_its_templates_have_them():
    parts = read(CALL_FORMATS["mistral"].parser(TOOLS), VARIANTS["Mistral's ids"][1])
    given, made = (part.call_id for part in parts if part.kind == "call_begin")
    assert given == "abc123456" and re.fullmatch("[a-z0-9]{9}", made)


# -- which one a model has ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("template", "markers", "name"),
    [
        ("{{ messages }}", ("<tool_calls>",), "hermes"),  # told of tools in that form
        ("{{ messages }}{{ tools }}", (), None),
        ("{{ tools }}<tool_call>", (), "qwen"),
        ("{{ tools }}", ("<tool_call>", "</tool_call>"), "qwen"),
        ("{{ tools }}<tool_call>", ("<|tool_call|>",), "qwen"),  # Granite 4 has the token of Granite 3
        ("{{ tools }}<|tool_call|>", (), "granite"),
        ("{{ tools }}<|python_tag|>", (), "llama3"),
        ("{{ tools }}", ("<|python_start|>", "<|python_end|>"), "pythonic"),
        ("{{ tools }}[TOOL_CALLS]", (), "mistral"),
        ("{{ tools }}<|channel|>", ("<tool_call>",), "gpt-oss"),
        ("{{ tools }}<|tool_call_start|>", (), "lfm2"),
        ("{{ tools }}[unused9]", ("<|tool_call_start|>", "[unused11]"), "openpangu"),
        ("{{ tools }}[unused9]", ("[unused11]", "[unused12]"), "pangu"),
        ({"default": "{{ messages }}", "tool_use": "{{ tools }}<tool_call>"}, (), "qwen"),
    ],
)
def test_the_format_is_found_in_the_template_or_in_the_vocabulary(template, markers, name):
    wire_format = open_wire_format(EngineConfig.from_kwargs(model_path="m"), byte_tokenizer(template, markers))
    assert (None if wire_format.calls is None else wire_format.calls.name) == name


def test_a_format_that_is_named_is_taken_and_none_finds_nothing():
    tokenizer = byte_tokenizer("{{ tools }}")
    forced = ToolSet(TOOLS.tools, choice="required")
    for given, auto, found in (("qwen25", "qwen25", "qwen25"), ("auto", None, "json_list"), ("none", None, None)):
        config = EngineConfig.from_kwargs(model_path="m", tool_call_parser=given)
        wire_format = open_wire_format(config, tokenizer)
        for made, expected in ((wire_format, auto), (wire_format.with_tools(forced), found)):
            assert (None if made.calls is None else made.calls.name) == expected
