"""Grammars of calls: what they allow is what models write, the parser of the format reads it, and arguments fit."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
from call_forms import FORMS, Calls, Form
from fake_engine import EOS, VOCAB_SIZE, byte_tokenizer

from mooli.errors import GrammarError
from mooli.frontend.parts import Part
from mooli.frontend.tools import Tool, ToolSet
from mooli.frontend.wire_formats.choice import CALL_FORMATS
from mooli.grammar.language import compiled
from mooli.grammar.vocabulary import open_vocabulary
from mooli.types import Grammar

NAMES = sorted(set(FORMS) - {"hermes", "qwen25", "trinity"})  # what differs of these is their name
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "exact": {"type": "boolean"},
    },
    "required": ["city"],
    "additionalProperties": False,
    "x-guidance": {"lenient": True},
}
TOOLS = ToolSet((Tool("get_weather", parameters=WEATHER), Tool("now")))


@pytest.fixture(scope="module")
def vocabulary():
    return open_vocabulary(byte_tokenizer().grammar_tokens(VOCAB_SIZE, (EOS,)), VOCAB_SIZE)


def matcher_of(name: str, tools: ToolSet, vocabulary, rule: str = "calls"):
    text = f"start: {rule}\n{CALL_FORMATS[name].calls_grammar(tools)}"
    return compiled(Grammar("ebnf", text), vocabulary)


def accepts(matcher, text: str) -> bool:
    """Whether it allows all of `text` and then an end."""
    made = matcher.deep_copy()
    data = [*text.encode()]
    return made.try_consume_tokens(data) == len(data) and (made.is_stopped() or made.is_accepting())


def walk(matcher, chance: random.Random) -> str:
    """A text that it allows, by chance; what closes things is preferred."""
    made = matcher.deep_copy()
    said = bytearray()
    while not made.is_stopped():
        allowed = np.flatnonzero(
            np.unpackbits(np.frombuffer(made.compute_bitmask(), np.uint8), bitorder="little")
        ).tolist()
        assert allowed and not made.is_error(), bytes(said)
        if EOS in allowed:
            if len(allowed) == 1 or chance.random() < 0.5:
                break
            allowed.remove(EOS)
        usual = [byte for byte in allowed if 32 < byte < 127] or allowed
        closing = [byte for byte in usual if chr(byte) in '"}])']
        byte = chance.choice(closing if closing and chance.random() < 0.4 else usual)
        if chance.random() < 0.02:
            byte = chance.choice(allowed)
        made.consume_token(byte)
        said.append(byte)
        assert len(said) < 5000
    return said.decode("utf-8", "replace")


def read(name: str, tools: ToolSet, text: str) -> list[tuple[str, Any]]:
    """Names and arguments of the calls in it; nothing else may be told."""
    parser = CALL_FORMATS[name].parser(tools)
    parts = [part for char in text for part in parser.push(char, [1])] + parser.flush()
    assert not [part for part in parts if part.kind == "text" and part.text], text
    calls: dict[int, tuple[str, list[str]]] = {}
    for part in parts:
        if part.kind == "call_begin":
            calls[part.call] = (part.text, [])
        elif part.kind == "arguments":
            calls[part.call][1].append(part.text)
    assert ends(parts) == len(calls), text
    return [(function, json.loads("".join(pieces))) for function, pieces in calls.values()]


def ends(parts: Sequence[Part]) -> int:
    return sum(part.kind == "call_end" for part in parts)


def written(form: Form, calls: Calls) -> str:
    """Without what ends an answer. Grammars write Python with JSON's quotes."""
    text = form.write(calls).removesuffix("<|call|>")
    return text if form.keeps_text else text.replace("'", '"')


@pytest.mark.parametrize("name", NAMES)
def test_what_models_write_is_allowed(name, vocabulary):
    form = FORMS[name]
    matcher = matcher_of(name, TOOLS, vocabulary)
    one = [("get_weather", '{"city": "Oslo", "days": 3, "exact": true}')]
    two = [*one, ("now", "{}")]
    assert accepts(matcher, written(form, one))
    if form.has_one:
        return
    assert accepts(matcher, written(form, two))
    single = matcher_of(name, ToolSet(TOOLS.tools, parallel=False), vocabulary)
    assert accepts(single, written(form, two[1:])) and not accepts(single, written(form, two))


@pytest.mark.parametrize("name", NAMES)
def test_what_the_tools_do_not_have_is_not_allowed(name, vocabulary):
    form = FORMS[name]
    matcher = matcher_of(name, TOOLS, vocabulary)
    for calls in (
        [("fly", "{}")],
        [("get_weather", "{}")],
        [("get_weather", '{"city": 1}')],
        [("get_weather", '{"city": "Oslo", "x": 1}')],
        [("now", '{"x": 1}')],
        [("get_weather", '{"city": "' + "x" * 7 + '"}')],
    ):
        assert not accepts(matcher, written(form, calls)), calls
    spaces = written(form, [("get_weather", '{"city":%s"Oslo"}')]) if form.keeps_text else None
    if spaces is not None:
        # As a template writes the call in the next turn, and in no other way.
        assert [accepts(matcher, spaces.replace("%s", " " * n)) for n in range(3)] == [False, True, False]


@pytest.mark.parametrize("name", NAMES)
def test_arguments_of_which_nothing_is_said_may_be_any(name, vocabulary):
    form = FORMS[name]
    matcher = matcher_of(name, ToolSet((Tool("f", parameters=ANY),)), vocabulary)
    for arguments in ("{}", '{"a": 1}', '{"a": "it", "b": [true, {"c": null}]}'):
        assert accepts(matcher, written(form, [("f", arguments)]).replace('[True, {"c": None}]', '[true, {"c": null}]'))
    if not form.keeps_text:
        assert accepts(matcher, form.write([("f", '{"a": "it", "b": true}')]))


@pytest.mark.parametrize("name", [name for name in NAMES if FORMS[name].keeps_text])
def test_no_arguments_are_written_without_white_space(name, vocabulary):
    tools = ToolSet(
        (Tool("f", parameters={"type": "object", "properties": {}, "title": "f"}), Tool("g")), parallel=False
    )
    matcher = matcher_of(name, tools, vocabulary)
    for function in ("f", "g"):
        assert accepts(matcher, written(FORMS[name], [(function, "{}")]))
        assert not accepts(matcher, written(FORMS[name], [(function, "{ }")]))


@pytest.mark.parametrize("name", NAMES)
def test_only_arguments_that_a_schema_lists_are_written_unless_it_says_there_may_be_others(name, vocabulary):
    form = FORMS[name]
    listed = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for parameters, arguments, is_right in (
        (listed, '{"a": 1}', True),
        (listed, '{"b": 1}', False),
        ({"properties": {}}, '{"b": 1}', False),
        ({}, '{"b": 1}', True),
    ):
        matcher = matcher_of(name, ToolSet((Tool("f", parameters=parameters),)), vocabulary)
        assert accepts(matcher, written(form, [("f", arguments)])) == is_right, parameters


def test_what_cannot_be_told_key_by_key_is_one_object_in_python(vocabulary):
    for parameters in (
        {"properties": {"a b": {"type": "integer"}}},
        {"required": ["a"], "additionalProperties": {"type": "integer"}},
        {"anyOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}]},
    ):
        tools = ToolSet((Tool("f", parameters=parameters),))
        matcher = matcher_of("pythonic", tools, vocabulary)
        key = "a b" if "properties" in parameters else "a"
        text = f'[f(**{{"{key}": 1}})]'
        assert accepts(matcher, text) and read("pythonic", tools, text) == [("f", {key: 1})]


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_that_is_none_is_refused_where_it_is_compiled(name, vocabulary):
    for parameters in ({"properties": [1]}, {"properties": {"a": {"type": "number", "minimum": "x"}}}):
        with pytest.raises(GrammarError):
            matcher_of(name, ToolSet((Tool("f", parameters=parameters),)), vocabulary)


@pytest.mark.parametrize("name", NAMES)
def test_the_rest_of_a_grammar_follows_its_trigger(name, vocabulary):
    """What is constrained from a trigger on is what is forced from the beginning."""
    text = written(FORMS[name], [("now", "{}")])
    (trigger,) = CALL_FORMATS[name].triggers()
    rest = matcher_of(name, TOOLS, vocabulary, "calls_after_trigger")
    if name == "pythonic":  # without markers, which are the trigger
        text = f"<|python_start|>{text}<|python_end|>"
    assert text.startswith(trigger) and accepts(rest, text.removeprefix(trigger))


# -- by chance ---------------------------------------------------------------------------------------------------------
def a_schema(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = ["string", "integer", "boolean", "null", "enum", "number"] + (
        ["object", "array", "union"] if depth < 2 else []
    )
    kind = chance.choice(kinds)
    if kind == "string":
        return {"type": "string", "maxLength": chance.randint(0, 5)}
    if kind == "integer":
        return {"type": "integer", "minimum": -5, "maximum": chance.randint(0, 10**20)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": 10}
    if kind == "enum":
        return {"enum": chance.sample(["a", 'b"</tool_call>', 1, True, None, "é\n", [1]], 3)}
    if kind == "array":
        return {"type": "array", "items": a_schema(chance, depth + 1), "maxItems": 2}
    if kind == "union":
        return {"anyOf": [a_schema(chance, depth + 1), {"type": "string", "maxLength": 2}]}
    if kind == "object":
        return an_object(chance, depth + 1)
    return {"type": kind}


def an_object(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    keys = chance.sample(["city", "days", "a b", "é", "x_1", "from"], chance.randint(0, 4))
    if chance.random() < 0.7:
        keys = [key for key in keys if key != "a b"]
    made: dict[str, Any] = {
        "type": "object",
        "properties": {key: a_schema(chance, depth + 1) for key in keys},
        "required": [key for key in keys if chance.random() < 0.5],
        "additionalProperties": False,
    }
    if depth == 0 and keys and chance.random() < 0.3:
        made["$defs"] = {"it": {"type": "string", "maxLength": 3}}
        made["properties"][keys[0]] = {"$ref": "#/$defs/it"}
    return made


ANY = {"type": "object"}


def a_tool_set(chance: random.Random) -> ToolSet:
    names = chance.sample(["get_weather", "now", "a-b", "f", "get"], chance.randint(1, 3))
    tools = tuple(Tool(name, parameters=chance.choice([an_object(chance)] * 6 + [None, ANY])) for name in names)
    return ToolSet(tools, "required", parallel=chance.random() < 0.6)


def round_trip(name: str, seed: int, vocabulary, num_walks: int = 2) -> None:
    chance = random.Random(f"{name} {seed}")
    tools = a_tool_set(chance)
    matcher = matcher_of(name, tools, vocabulary)
    for _ in range(num_walks):
        text = walk(matcher, chance)
        calls = read(name, tools, text)
        assert calls and (tools.parallel or len(calls) == 1), text
        for function, arguments in calls:
            tool = tools.named(function)
            assert tool is not None, text
            jsonschema.validate(arguments, tool.parameters or {"type": "object", "maxProperties": 0})


@pytest.mark.parametrize("name", NAMES)
def test_what_is_allowed_is_read_back_and_fits(name, vocabulary):
    for seed in range(3):
        round_trip(name, seed, vocabulary)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_is_allowed_is_read_back_and_fits_for_many_tools(name, vocabulary):
    for seed in range(3, 23):
        round_trip(name, seed, vocabulary)
