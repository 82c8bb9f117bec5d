"""Calls as each model writes them: whatever the cut, the same parts; what a grammar allows is read back, and valid."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from call_forms import FORMS
from fake_engine import byte_tokenizer
from written_calls import WRITTEN, Calls

from mooli.config import EngineConfig
from mooli.errors import GrammarError
from mooli.frontend.parts import Part
from mooli.frontend.tools import Tool, ToolSet
from mooli.frontend.wire_formats.calls import CallFormat
from mooli.frontend.wire_formats.choice import CALL_FORMATS, open_wire_format

PROPERTIES = {
    "text": {"type": "string"},
    "n": {"type": "integer"},
    "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "list": {"type": "array", "items": {"$ref": "#/$defs/item"}},
}
TOOLS = ToolSet(
    (
        Tool(
            "write_it",
            parameters={
                "type": "object",
                "properties": PROPERTIES,
                "required": ["text"],
                "$defs": {"item": {"type": ["object", "number", "string"]}},
            },
        ),
        Tool("now"),
    )
)


def read(form: CallFormat, text: str, cuts: Sequence[int] = (), tools: ToolSet = TOOLS) -> list[Part]:
    """Its parts, where the text comes cut in front of the characters `cuts`."""
    parser = form.parser(tools)
    parts: list[Part] = []
    for start, end in itertools.pairwise([0, *cuts, len(text)]):
        parts += parser.push(text[start:end], [end - start])
    parts += parser.flush()
    assert sum(part.num_tokens for part in parts) <= len(cuts) + 1
    return parts


def joined(parts: Sequence[Part]) -> list[tuple[str, str]]:
    found: list[tuple[str, int, str]] = []
    for part in parts:
        if found and found[-1][:2] == (part.kind, part.call):
            found[-1] = (part.kind, part.call, found[-1][2] + part.text)
        elif part.text or part.kind == "call_end":
            found.append((part.kind, part.call, part.text))
    return [(kind, text) for kind, _, text in found]


def called(form: CallFormat, text: str, cuts: Sequence[int] = (), tools: ToolSet = TOOLS) -> list[Any]:
    """Words, and calls that are whole as a name and arguments."""
    found: list[Any] = []
    parts = joined(read(form, text, cuts, tools))
    for (kind, said), (next_kind, _) in itertools.pairwise([*parts, ("end", "")]):
        if kind == "text":
            found.append(said)
        elif kind == "call_begin":
            found.append((said, None))
        elif kind == "arguments" and next_kind == "call_end":
            found[-1] = (found[-1][0], json.loads(said))
    return found


ALIKE = (
    "dots",
    "gigachat35",
    "iquest_q1",
    "spark25",
    "deepseekv4",
    "functiongemma",
    "step3p5",
    "glm",
    "ling3",
    "poolside_v1",
)
"""Declared as another is, with other words."""
RAW = tuple(
    name for name in WRITTEN if WRITTEN[name].__qualname__.startswith(("tagged", "nested")) and name not in ALIKE
)
"""Formats whose values are raw text."""
NAMES = pytest.mark.parametrize("name", [name for name in WRITTEN if name not in ALIKE])

ONE = [("write_it", {"text": "Oslo"})]
CASES: Mapping[str, Calls] = {
    "one": ONE,
    "two": [("write_it", {"text": "Oslo", "n": 3}), ("now", {})],
    "the same twice": [*ONE, *ONE],
    "no arguments": [("now", {})],
    "nested": [("write_it", {"text": "", "list": [{"a": [1, {"b": "}]\"'"}]}, -2.5, "x"]})],
    "escapes": [("write_it", {"text": 'a "b" \\n \\ é 中 🚀 <b>&amp;</b> {x: 1}, [2]\n\tend '})],
    "numbers": [("write_it", {"text": "007", "n": 123456789012345678901234567890, "maybe": "1e5"})],
    "words": [("write_it", {"text": "null", "maybe": None}), ("write_it", {"text": "true", "maybe": "nul"})],
}


# -- all cuts ----------------------------------------------------------------------------------------------------------
@NAMES
@pytest.mark.parametrize("case", CASES)
def test_calls_are_read_as_they_were_meant(name, case):
    form, text = CALL_FORMATS[name], WRITTEN[name](CASES[case])
    expected = [(function, dict(arguments)) for function, arguments in CASES[case]]
    whole = joined(read(form, text))
    assert called(form, text) == expected
    assert joined(read(form, text, range(1, len(text)))) == whole
    for cut in range(1, len(text)):
        assert joined(read(form, text, [cut])) == whole, cut


def test_every_format_is_written_in_a_test():
    assert set(FORMS) | set(WRITTEN) == set(CALL_FORMATS)


@pytest.mark.parametrize("name", ALIKE)
def test_formats_that_are_alike_are_read_and_written(name, vocabulary):
    form = CALL_FORMATS[name]
    calls = [("write_it", {"n": 3, "text": 'a "b"'}), ("now", {})]
    calls = calls if "gemma" in name else [("write_it", {"text": 'a "b"', "n": 3}), ("now", {})]
    text = WRITTEN[name](calls)
    assert called(form, text) == called(form, text, range(1, len(text))) == calls
    assert allows(matcher(vocabulary, form, TOOLS), text)


@NAMES
@pytest.mark.parametrize("between", ["", "\n\n"])
def test_text_around_calls_is_told_and_no_white_space_beside_them(name, between):
    form = CALL_FORMATS[name]
    call = WRITTEN[name](ONE)
    text = f"Let me\n look.{between}{call}{between}Then < {between}{call}{between}"
    expected = ["Let me\n look.", *ONE, "Then <", *ONE]
    assert called(form, text) == expected
    whole = joined(read(form, text))
    for first in range(1, len(text), 3):  # what a reading leaves behind is one state of the parser
        for second in (first + 1, *range(first + 2, len(text), 17)):
            if second < len(text):
                assert joined(read(form, text, [first, second])) == whole, (first, second)
    assert joined(read(form, text, range(1, len(text)))) == whole


@NAMES
def test_a_text_that_ends_anywhere_in_a_call_loses_nothing_and_makes_nothing_up(name):
    form, calls = CALL_FORMATS[name], CASES["two"]
    text = "Hm. " + WRITTEN[name](calls)
    for end in range(4, len(text)):
        parts = read(form, text[:end])
        assert joined(read(form, text[:end], range(1, end))) == joined(parts), end
        told = dict.fromkeys(range(2), "")
        for part in parts:
            if part.kind == "arguments":
                told[part.call] += part.text
        begun = [part.text for part in parts if part.kind == "call_begin"]
        assert begun == [function for function, _ in calls][: len(begun)]
        for part in parts:
            if part.kind == "call_end":
                assert json.loads(told[part.call]).items() <= dict(calls[part.call][1]).items()
        if not begun:  # all of it is text
            assert "".join(part.text for part in parts) == text[:end]


@NAMES
def test_markers_alone_are_text(name):
    form = CALL_FORMATS[name]
    for trigger in form.triggers():
        for text in (f"a {trigger} b", f"{trigger}", f"{trigger}{trigger} {trigger[:-1]}", f"x\n\n{trigger}\n "):
            assert joined(read(form, text)) == [("text", text)], text
            assert joined(read(form, text, range(1, len(text)))) == [("text", text)]
        behind = trigger + " " + WRITTEN[name](ONE)
        assert called(form, behind) in ([trigger, *ONE], ONE)


@NAMES
def test_a_function_that_is_not_there_is_told(name):
    form = CALL_FORMATS[name]
    assert called(form, WRITTEN[name]([("not_there", {"a": "b"}), ("now", {})])) == [
        ("not_there", {"a": "b"}),
        ("now", {}),
    ]


# -- raw values --------------------------------------------------------------------------------------------------------
M3 = "]<]minimax[>["


@pytest.mark.parametrize(
    ("schema", "raw", "value"),
    [
        ({"type": "array"}, "", []),
        ({"type": ["array", "string"]}, "", ""),
        ({"type": ["object", "null"]}, "", {}),
        ({"type": "array", "items": {"type": "string"}}, "\n@<item>1@</item>\n@<item>@</item>\n", ["1", ""]),
        ({"type": "object"}, "@<item>1@</item>", {"item": 1}),
        ({}, "@<item>@<a>x@</a>@</item>", [{"a": "x"}]),
        ({"type": "object", "properties": {"a": {"type": "string"}}}, "@<a>1@</b>", {"a": "1"}),
        (
            {"anyOf": [{"$ref": "#/$defs/s"}, {"type": "array", "items": {"$ref": "#/$defs/s"}}]},
            "@<item>1@</item>",
            ["1"],
        ),
        ({"type": "array"}, "[1, 2]", [1, 2]),
        ({"type": "string"}, "a <b> </x> @<c>", f"a <b> </x> {M3}<c>"),
    ],
)
def test_lists_and_objects_of_minimax_m3_are_tags(schema, raw, value):
    parameters = {"type": "object", "properties": {"x": schema}, "$defs": {"s": {"type": "string"}}}
    tools = ToolSet((Tool("f", parameters=parameters),))
    form, text = CALL_FORMATS["minimax-m3"], WRITTEN["minimax-m3"]([("f", {"x": raw.replace("@", M3)})])
    assert called(form, text, tools=tools) == called(form, text, range(1, len(text)), tools) == [("f", {"x": value})]


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "array", "items": {"type": "integer"}, "minItems": 1}, [[1], [1, 2]], [[], ["a"], "[1]", 1]),
        ({"type": ["array", "string"]}, ["", "a", ["a"], [{"a": [1]}]], ["[]"]),
        ({"type": ["object", "null"]}, [{}, None, {"a": {"b": 1}}, {"item": [1]}], [1]),
        ({"$ref": "#/$defs/node"}, [{"v": 1}, {"v": 1, "next": {"v": 2}}], [{}, {"v": "a"}, {"next": {"v": 1}}]),
        ({"anyOf": [{"$ref": "#/$defs/node"}, {"type": "string"}]}, ["", {"v": 1}], ["{}"]),
        ({}, [1, "a", [], ["a", [1]], {"a": {"b": 2}}], [f"{M3}x"]),
        (
            {"anyOf": [{"type": "object", "properties": {"a": {}, "b": {}}}, {"type": "string"}]},
            ["", {"a": 1}, {"b": 1}, {"a": 1, "b": 2}],
            [{"c": 1}],
        ),
    ],
)
def test_lists_and_objects_of_minimax_m3_are_forced_as_tags(schema, right, wrong, vocabulary):
    node = {"properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}, "required": ["v"]}
    definitions = {"node": {"type": "object", "additionalProperties": False, **node}}
    parameters = {"properties": {"x": schema}, "required": ["x"], "$defs": definitions}
    tools = ToolSet((Tool("f", parameters=parameters),))
    made = matcher(vocabulary, CALL_FORMATS["minimax-m3"], tools)
    for value in right:
        text = WRITTEN["minimax-m3"]([("f", {"x": value})])
        assert allows(made, text), value
        expected = value if value != [] or schema else ""
        assert called(CALL_FORMATS["minimax-m3"], text, tools=tools) == [("f", {"x": expected})]
    for value in wrong:
        assert not allows(made, WRITTEN["minimax-m3"]([("f", {"x": value})])), value


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array", "uniqueItems": True}, "tool f, parameter x: uniqueItems of an array"),
        ({"anyOf": [{"type": "object"}, {"type": "object", "properties": {"a": {}}}]}, "more than one object"),
        ({"type": ["object", "array"]}, "cannot be told from an array"),
        ({"type": "object", "properties": {"a b": {}}}, "parameter a b: this model cannot write the name"),
        ({"$ref": "#/$defs/none"}, "names nothing"),
        ({"minimum": 3}, "needs a type"),
        (False, "no value is possible"),
    ],
)
def test_what_minimax_m3_cannot_be_held_to_is_an_error_with_its_place(schema, message):
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    with pytest.raises(GrammarError, match=message):
        CALL_FORMATS["minimax-m3"].calls_grammar(ToolSet((Tool("f", parameters=parameters),)))


def test_strings_come_as_they_are_written():
    for name in RAW:
        form, text = CALL_FORMATS[name], WRITTEN[name]([("write_it", {"text": "a" * 30})])
        pieces = [part.text for part in read(form, text, range(1, len(text))) if part.kind == "arguments"]
        assert pieces.count("a") >= 29, name


@pytest.mark.parametrize("name", RAW)
def test_a_marker_in_a_value_is_part_of_it(name):
    form = CALL_FORMATS[name]
    shown = WRITTEN[name]([("write_it", {"text": "§"})])
    close = shown.partition("§")[2].split(">")[0].strip() + ">"
    for value in (f"a{close}b", f"{close} x", close[:-1], f"a{close}{close}"):
        text = WRITTEN[name]([("write_it", {"text": value})])
        assert called(form, text) == [("write_it", {"text": value})], value
        assert called(form, text, range(1, len(text))) == [("write_it", {"text": value})], value


@pytest.mark.parametrize(
    ("schema", "raw", "value"),
    [
        ({"type": "integer"}, "12", 12),
        ({"type": "integer"}, "twelve", "twelve"),
        ({"type": "integer"}, "007", "007"),
        ({"type": "number"}, " 1.50 ", 1.5),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "yes", "yes"),
        ({"type": "array"}, '["a", None]', ["a", None]),
        ({"type": "array"}, "['a']", "['a']"),
        ({"type": "object"}, '{"a": {"b": [1]}}', {"a": {"b": [1]}}),
        ({"type": "object"}, "{a: 1}", "{a: 1}"),
        ({"type": "string"}, "12", "12"),
        ({"type": "string"}, '{"a": 1}', '{"a": 1}'),
        ({"type": "string", "nullable": True}, "null", None),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "nullify", "nullify"),
        ({"type": ["string", "integer"]}, "5", 5),
        ({"type": ["string", "integer"]}, "5.5", "5.5"),
        ({"type": ["string", "integer"]}, "5 apples", "5 apples"),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, "[1]", [1]),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, "[1", "[1"),
        ({"anyOf": [{"$ref": "#/$defs/s"}, {"type": "null"}]}, "7", "7"),
        ({"$ref": "#/$defs/missing"}, "7", 7),
        ({"allOf": [{"$ref": "#/$defs/s"}]}, "7", "7"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": "1"}, "1", "1"),
        ({"type": "varchar"}, "1", "1"),
        ({"type": "int32"}, "1", 1),
        ({"type": "dict"}, '{"a": 1}', {"a": 1}),
        ({}, "true", True),
        ({}, "truely", "truely"),
        ({}, "-", "-"),
        (None, "12", 12),
        (None, "some text", "some text"),
    ],
)
def test_what_a_raw_value_is_says_the_schema(schema, raw, value):
    properties = {} if schema is None else {"x": schema}
    parameters = {"type": "object", "properties": properties, "$defs": {"s": {"type": "string"}}}
    tools = ToolSet((Tool("f", parameters=parameters),))
    for name in ("qwen3_coder", "glm47"):
        text = WRITTEN[name]([("f", {"x": raw})])
        whole = called(CALL_FORMATS[name], text, tools=tools)
        assert whole == [("f", {"x": value})] and type(whole[0][1]["x"]) is type(value)
        assert called(CALL_FORMATS[name], text, range(1, len(text)), tools) == whole


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("qwen3_coder", "<function=now>\n</function>\n</tool_call>", [("now", {})]),
        ("mimo", "<tool_call><function=write_it><parameter=text>a</parameter></tool_call>",
         [("write_it", {"text": "a"})]),
        ("qwen3_coder", "<function=write_it>\n<parameter=text>\n\n a\n\n</parameter></function>",
         [("write_it", {"text": "\n a\n"})]),
        ("qwen3_coder", "so: <function=x> y", ["so: <function=x> y"]),
        ("qwen3_coder", "<tool_call>\n<function=now>\n</function>\n<function=now>\n</function>", [("now", {})] * 2),
        ("glm45", "<tool_call>now\n</tool_call>", [("now", {})]),
        ("glm45", "<tool_call>write_it<arg_key>n</arg_key><arg_value>1</arg_value>", [("write_it", None)]),
        ("glm45", "<tool_call>write_it<arg_key>n</arg_key>1</tool_call>", [("write_it", None)]),
        ("glm45", "<tool_call>write_it<arg_key>n</arg_key><arg_value>1</arg_value><tool_call>now</tool_call>",
         [("write_it", {"n": 1}), ("now", {})]),
        ("glm47", '<tool_call>{"name": "now"}</tool_call>', ['<tool_call>{"name": "now"}</tool_call>']),
        ("minimax-m2", '<invoke name="now">\n</invoke>', [("now", {})]),
        ("hunyuan", '<tool_calls>[{"name": "now", "arguments": {}}]</tool_calls>', [("now", {})]),
        ("hunyuan_a13b", "<tool_calls><tool_call>now<tool_sep></tool_call></tool_calls>", [("now", {})]),
        ("deepseekv3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n{}", [("now", {})]),
        ("deepseekv31", "<｜tool▁call▁begin｜>now<｜tool▁sep｜><｜tool▁call▁end｜>", [("now", {})]),
        ("kimi_k2", "<|tool_call_begin|>now:12<|tool_call_argument_begin|>{}", [("now", {})]),
        ("gemma4", '<|tool_call>call:write_it{"text": "a", list: [ True,{x:<|"|>}<|"|>}]}',
         [("write_it", {"text": "a", "list": [True, {"x": "}"}]})]),
        ("gemma4", "<|tool_call>call:now{x:}<tool_call|>", [("now", None)]),
        ("deepseekv32", '<｜DSML｜invoke name="write_it"><｜DSML｜parameter name="n">3</｜DSML｜parameter>'
         "</｜DSML｜invoke>",
         [("write_it", {"n": 3})]),
    ],
)  # fmt: skip
def test_what_models_write_beside_their_templates(name, text, expected):
    assert called(CALL_FORMATS[name], text) == expected
    assert called(CALL_FORMATS[name], text, range(1, len(text))) == expected


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("qwen3_coder", ("<tool_call>", "</tool_call>")),
        ("glm47", ("<tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>")),
        ("hunyuan", ("<tool_calls>", "<tool_call>", "<tool_sep>", "</arg_value>")),
        ("deepseekv32", ("｜DSML｜",)),
        ("deepseekv3", ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")),
        ("step3", ("<｜tool_calls_begin｜>", "<｜tool_sep｜>", "<｜tool_call_end｜>")),
        ("kimi_k2", ("<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>", "<|tool_calls_section_end|>")),
        ("gemma4", ("<|tool_call>", '<|"|>', "<tool_call|>")),
    ],
)
def test_what_is_one_special_token_is_shown_to_the_parser(name, tokens):
    assert set(tokens) <= set(CALL_FORMATS[name].marker_tokens)


def test_ids_of_kimi_are_kept():
    parts = read(CALL_FORMATS["kimi_k2"], WRITTEN["kimi_k2"](CASES["two"]))
    ids = [part.call_id for part in parts if part.kind == "call_begin"]
    assert ids == ["functions.write_it:3", "functions.now:4"]


# -- which one a model has ---------------------------------------------------------------------------------------------
GLM_TEMPLATE = "[gMASK]<sop>{{ tools }}<tool_call>name%s<arg_key>k</arg_key>%s<arg_value>v</arg_value>"


@pytest.mark.parametrize(
    ("name", "template", "markers"),
    [
        ("qwen3_coder", "{{ tools }}<tool_call>\n<function=f>\n<parameter=p>", ()),
        ("minimax-m2", "{{ tools }}<minimax:tool_call><invoke name=", ()),
        ("minimax-m3", "{{ tools }}{{ ']<]minimax[>[' }}<tool_call>", ()),
        ("glm45", GLM_TEMPLATE % ("\n", "\n"), ()),
        ("glm47", GLM_TEMPLATE % ("", ""), ()),
        ("glm45", "{{ tools }}", ("<arg_key>", "<arg_value>")),
        ("hunyuan", "{{ tools }}<tool_calls><tool_call>f<tool_sep>", ()),
        ("hunyuan_a13b", "{{ tools }}<tool_calls>[", ()),
        ("deepseekv3", "{{ tools }}<｜tool▁calls▁begin｜><｜tool▁sep｜>f\n```json", ()),
        ("deepseekv31", "{{ tools }}<｜tool▁calls▁begin｜><｜tool▁sep｜>", ()),
        ("deepseekv32", "{{ tools }}<｜DSML｜function_calls>", ()),
        ("deepseekv4", "{{ tools }}<｜DSML｜tool_calls>", ()),
        ("deepseekv41", "{{ tools }}<｜DSML｜ calls>", ()),
        ("gigachat35", "{{ tools }}<｜GCML｜tool_calls>", ()),
        ("kimi_k2", "{{ tools }}", ("<|tool_calls_section_begin|>",)),
        ("kimi_k3", "{{ tools }}", ("<|open|>", "<|close|>", "<|sep|>")),
        ("gemma4", "{{ tools }}<|channel>thought<|tool_call>call:", ()),
        ("functiongemma", "{{ tools }}<start_function_call>call:", ()),
        ("step3", "{{ tools }}<steptml:invoke name=", ()),
        ("dots", "{{ tools }}<dots_function_call>", ()),
        ("iquest_q1", "{{ tools }}<iquest_tool_call>", ()),
    ],
)
def test_the_format_is_found_in_template_or_vocabulary(name, template, markers):
    wire_format = open_wire_format(EngineConfig.from_kwargs(model_path="m"), byte_tokenizer(template, markers))
    assert wire_format.calls is not None and wire_format.calls.name == name


@pytest.mark.parametrize("name", ["auto", "hunyuan", "hunyuan_a13b"])
def test_markers_of_hunyuan_have_the_suffix_that_the_vocabulary_has(name, vocabulary):
    names = ("think", "tool_calls", "tool_call", "tool_sep", "arg_key", "arg_value")
    markers = [f"<{slash}{word}:opensource>" for word in names for slash in ("", "/")]
    tokenizer = byte_tokenizer("{{ tools }}{{ '<tool_calls{}>'.format(suffix) }}", markers)
    config = EngineConfig.from_kwargs(model_path="m", tool_call_parser=name, reasoning_parser=name.partition("_")[0])
    wire_format = open_wire_format(config, tokenizer)
    form = wire_format.calls
    assert form is not None and form.name == name.replace("auto", "hunyuan")
    text = WRITTEN[form.name](CASES["two"])
    for word in names:
        text = text.replace(f"{word}>", f"{word}:opensource>")
    assert called(form, text) == called(form, text, range(1, len(text))) == CASES["two"]
    assert allows(matcher(vocabulary, form, TOOLS), text)
    told = wire_format.with_tools(TOOLS)
    assert set(told.marker_tokens) <= {*markers, "<tool_sep:opensource>"} and len(told.marker_tokens) > 3
    parts = told.parser("").push("<think:opensource>m</think:opensource>t", [39])
    assert [(part.kind, part.text) for part in parts if part.text] == [("reasoning", "m"), ("text", "t")]


# -- grammars ----------------------------------------------------------------------------------------------------------
llguidance = pytest.importorskip("llguidance")
EOS = 256


class Bytes:
    eos_token_id, bos_token_id = EOS, None
    tokens = (*(bytes([i]) for i in range(256)), b"<eos>")
    special_token_ids = (EOS,)

    def __call__(self, text: str) -> list[int]:
        return [*text.encode()]


@pytest.fixture(scope="module")
def vocabulary():
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))


def matcher(vocabulary, form: CallFormat, tools: ToolSet, rule: str = "calls"):
    grammar = f"start: {rule}\n{form.calls_grammar(tools)}"
    limits = llguidance.LLParserLimits(initial_lexer_fuel=200_000, max_lexer_states=50_000)
    made = llguidance.LLMatcher(vocabulary, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0, limits=limits)
    assert not made.get_error(), grammar
    return made


def allows(made, text: str) -> bool:
    ids = [*text.encode()]
    return made.validate_tokens([*ids, EOS]) == len(ids) + 1


@NAMES
def test_a_grammar_allows_what_the_model_writes_and_nothing_beside_the_schema(name, vocabulary):
    form, write = CALL_FORMATS[name], WRITTEN[name]
    (trigger,) = form.triggers()
    properties = {
        "text": {"type": "string"},
        "n": {"type": "integer", "maximum": 9},
        "p": {"type": "string", "pattern": "^[ab]+$"},
        "u": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "w": {"enum": ["x", "y"]},
        "s": {"type": "string", "maxLength": 3},
    }
    parameters = {"type": "object", "properties": properties, "required": ["text"], "additionalProperties": False}
    names = sorted(properties) if "gemma" in name else [*properties]
    tools = ToolSet((Tool("write_it", parameters=parameters), Tool("now")), "required")

    def has(*calls: tuple[str, Mapping[str, Any]], tools: ToolSet = tools) -> bool:
        text = write([(each, {key: given[key] for key in names if key in given}) for each, given in calls])
        found = allows(matcher(vocabulary, form, tools), text)
        assert text.startswith(trigger)
        behind = matcher(vocabulary, form, tools, "calls_after_trigger")
        assert allows(behind, text.removeprefix(trigger)) == found
        return found

    assert has(("write_it", {"text": 'a <b> "c" \\ é'}))
    assert has(("now", {})) and has(("now", {}), ("write_it", {"text": "x"}), ("now", {}))
    assert has(("write_it", {"text": "x", "n": 9, "p": "ab", "u": -1.5, "w": "y"}))
    assert has(("write_it", {"text": " ", "s": " 1"}))
    assert has(("write_it", {"text": "x", "u": None})) and has(("write_it", {"text": "x", "w": "x"}))
    assert not has(("write_it", {}))
    assert not has(("write_it", {"text": "x", "n": 10}))
    assert not has(("write_it", {"text": "x", "n": "9"})) or name in RAW
    assert not has(("write_it", {"text": "x", "p": "abc"}))
    assert not has(("write_it", {"text": "x", "u": True}))
    assert not has(("write_it", {"text": "x", "w": "z"}))
    assert not has(("not_there", {}))
    assert not has(("now", {}), ("now", {}), tools=ToolSet(tools.tools, "required", parallel=False))
    assert has(("now", {}), tools=ToolSet(tools.tools, "required", parallel=False))


@pytest.mark.parametrize("name", ["qwen3_coder", "deepseekv32", "gemma4"])
@pytest.mark.parametrize("schema", [{"maxLength": 2000}, {"minLength": 3, "maxLength": 90, "pattern": "^[^é]*$"}])
@pytest.mark.parametrize("kinds", ["string", ["string", "null", "number"], ["string", "boolean", "object", "array"]])
def test_texts_that_are_nearly_their_end_do_not_exhaust_a_grammar(name, schema, kinds, vocabulary):
    """Where a state cannot be told from one that leads nowhere, the compiler gives up."""
    tools = ToolSet((Tool("f", parameters={"properties": {"x": {"type": kinds, **schema}}, "required": ["x"]}),))
    (end,) = _ends(name)
    for value in (f"a{end[:-1]}", f"a{end[:-1]}b{end[:-1]}", "nulll", "1234x", " {}", "[[", f"{end[:-1]}{end}"):
        text = WRITTEN[name]([("f", {"x": value})])
        made = matcher(vocabulary, CALL_FORMATS[name], tools)
        for byte in text.encode():
            made.compute_bitmask()
            if made.validate_tokens([byte]) != 1:
                break
            assert made.consume_token(byte)
        assert not made.get_error(), value


@NAMES
@pytest.mark.parametrize(
    ("parameters", "takes_any"),
    [
        (None, False),
        ({"type": "object"}, True),
        ({"type": "object", "additionalProperties": {"type": ["string", "integer"]}}, True),
        ({"type": "object", "additionalProperties": False}, False),
    ],
)
def test_an_object_of_which_nothing_is_said_may_have_any_parameters(name, parameters, takes_any, vocabulary):
    tools = ToolSet((Tool("f", parameters=parameters),), "required")
    form, write = CALL_FORMATS[name], WRITTEN[name]
    made = matcher(vocabulary, form, tools)
    assert allows(made, write([("f", {})]))
    assert allows(made, write([("f", {"a": "b", "c_d": 3})])) == takes_any


@pytest.mark.parametrize("name", ["qwen3_coder", "gemma4"])
def test_schemas_that_refer_to_themselves_are_no_work_without_end(name, vocabulary):
    many = {
        f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}", "title": "t"}]}
        for i in range(25)
    }
    node = {
        "type": "object", "additionalProperties": False,
        "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    }  # fmt: skip
    definitions = {
        **many,
        "d25": {"type": "integer"},
        "node": node,
        "self": {"anyOf": [{"$ref": "#/$defs/self"}, node]},
    }
    for ref, value in (("d0", 3), ("node", {"next": {"next": None}}), ("self", {"next": {}})):
        parameters = {"properties": {"x": {"$ref": f"#/$defs/{ref}"}}, "required": ["x"], "$defs": definitions}
        tools = ToolSet((Tool("f", parameters=parameters),))
        text = WRITTEN[name]([("f", {"x": value})])
        assert called(CALL_FORMATS[name], text, tools=tools) == [("f", {"x": value})]
        if ref != "self":  # which llguidance refuses
            assert allows(matcher(vocabulary, CALL_FORMATS[name], tools), text)


SCHEMAS: Sequence[Any] = (
    {"type": "string"},
    {"type": "string", "enum": ["a", "b<c", 'q"x', "é", "5", "null"]},
    {"type": "integer", "minimum": -5, "maximum": 700},
    {"type": "number"},
    {"type": "boolean"},
    {"type": ["string", "null"]},
    {"anyOf": [{"type": "integer", "minimum": 3}, {"type": "string", "maxLength": 5}, {"type": "null"}]},
    {"type": "string", "minLength": 2, "maxLength": 9},
    {"type": "string", "maxLength": 80},
    {"type": ["string", "null", "number"], "maxLength": 80},
    {"type": "string", "pattern": "^[a-z]{1,4}$"},
    {"type": "string", "pattern": "x+y|^/tmp"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": ["string", "integer"]},
    {"type": ["string", "boolean"], "description": "d"},
    {"enum": [1, "a", None]},
    {"const": "k"},
    {"type": "string", "nullable": True},
    {"$ref": "#/$defs/tree"},
    {"type": "array", "items": {"$ref": "#/$defs/tree"}, "minItems": 1, "maxItems": 2},
    {"type": "array", "items": {"enum": ["x", 1, None]}, "maxItems": 3},
    {
        "type": "object", "properties": {"x": {"type": "string"}, "y": {"type": "null"}}, "required": ["x"],
        "additionalProperties": False,
    },
    {
        "anyOf": [
            {"type": "object", "properties": {"k": {"type": "boolean"}}, "additionalProperties": False},
            {"type": "string"},
        ]
    },
)  # fmt: skip
TREE = {
    "type": "object",
    "properties": {"child": {"$ref": "#/$defs/tree"}, "v": {"type": "integer"}},
    "required": ["v"],
    "additionalProperties": False,
}


def some_tools(rng: random.Random) -> ToolSet:
    def tool(name: str) -> Tool:
        names = rng.sample(["city", "a_b", "x-y", "ünit", "n"], rng.randrange(4))
        properties = {key: rng.choice(SCHEMAS) for key in names}
        required = [key for key in names if rng.random() < 0.6]
        return Tool(
            name,
            parameters={
                "type": "object", "properties": properties, "required": required, "$defs": {"tree": TREE},
                "additionalProperties": False,
            },
        )  # fmt: skip

    return ToolSet(tuple(map(tool, rng.sample(["f", "f_2", "get-it", "ns.g"], rng.randint(1, 3)))), "required")


def written_at_random(made, rng: random.Random, ends: Sequence[str]) -> str:
    """A text of the grammar, byte by byte; texts that end something come often, for it to end."""
    told = bytearray()
    marks = [end.encode() for end in ends]
    while True:
        bits = np.unpackbits(np.frombuffer(made.compute_bitmask(), np.uint8), bitorder="little")[: EOS + 1]
        ids = np.flatnonzero(bits).tolist()
        assert ids and not made.get_error(), bytes(told)
        if EOS in ids and (len(ids) == 1 or rng.random() < 0.7):
            return told.decode()
        going_on = [mark[n] for mark in marks for n in range(len(mark) - 1, 0, -1) if told.endswith(mark[:n])]
        if not going_on and (len(told) > 200 or rng.random() < 0.1):
            going_on = [mark[0] for mark in marks]
        likely = [byte for byte in going_on if byte in ids]
        if not likely or rng.random() < 0.03:
            likely = [byte for byte in ids if 32 <= byte < 127] if rng.random() < 0.9 else ids
        byte = rng.choice([byte for byte in likely or ids if byte != EOS] or ids)
        assert made.consume_token(byte)
        told.append(byte)
        assert len(told) < 20_000


@pytest.mark.slow
@NAMES
@pytest.mark.parametrize("seed", range(6))
def test_whatever_a_grammar_allows_is_read_back_and_valid(name, seed, vocabulary):
    jsonschema = pytest.importorskip("jsonschema")
    rng = random.Random(f"{name} {seed}")
    form, tools = CALL_FORMATS[name], some_tools(rng)
    ends = [*_ends(name), '"', "}", "]", "xy"]
    for _ in range(4):
        text = written_at_random(matcher(vocabulary, form, tools), rng, ends)
        found = called(form, text, tools=tools)
        assert found, text
        assert found == called(form, text, range(1, len(text)), tools)
        for each, arguments in found:
            tool = tools.named(each)
            assert tool is not None and arguments is not None, text
            jsonschema.validate(arguments, dict(tool.parameters or {}))


def _ends(name: str) -> Iterator[str]:
    """What stands behind a string in this format."""
    text = WRITTEN[name]([("write_it", {"text": "§"})])
    stop = {"kimi_k3": "t<|sep|>", "minimax-m3": "[>["}.get(name, ">")
    yield text.partition("§")[2].partition(stop)[0] + stop


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "format": "color"}, "tool f, parameter x: format 'color' cannot be enforced"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength 3 is more than maxLength 2"),
        ({"type": "string", "not": {"const": "a"}}, "not beside a string cannot be enforced"),
        ({"minimum": 3}, "a schema with minimum needs a type"),
        (False, "no value is possible"),
        ({"$ref": "#/$defs/none"}, "no value is possible|names nothing"),
        ({"type": "array", "items": {"$ref": "#/$defs/none"}}, "'#/\\$defs/none' names nothing"),
        ({"enum": ["a</parameter>"]}, "none of its strings can be written"),
    ],
)
def test_what_a_grammar_of_raw_values_cannot_enforce_is_an_error_with_its_place(schema, message):
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    with pytest.raises(GrammarError, match=message):
        CALL_FORMATS["qwen3_coder"].calls_grammar(ToolSet((Tool("f", parameters=parameters),)))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"type": "array"}, "tool f: its parameters are no object"),
        ({"anyOf": [{"type": "object"}, {"type": "object"}]}, "tool f: its parameters are no object"),
        ({"type": "object", "minProperties": 1}, "tool f: minProperties of all parameters cannot be enforced"),
        ({"type": "object", "properties": {"a>b": {"type": "string"}}}, "this model cannot write the name 'a>b'"),
        ({"type": "object", "required": ["x"], "additionalProperties": False}, "no value is possible"),
    ],
)
def test_parameters_that_are_no_plain_object_are_an_error(parameters, message):
    with pytest.raises(GrammarError, match=message):
        CALL_FORMATS["qwen3_coder"].calls_grammar(ToolSet((Tool("f", parameters=parameters),)))
