"""Models that describe their own messages: the same parts whatever the cut, as transformers reads them."""

from __future__ import annotations

import itertools
import json
import logging
import random
import re
from collections.abc import Iterator, Sequence

import pytest
from fake_engine import byte_tokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from mooli.config import EngineConfig
from mooli.errors import ConfigError, RequestError, TokenizerError
from mooli.frontend.chat_template import ChatTemplate
from mooli.frontend.parts import PLAIN_TEXT, Part
from mooli.frontend.tokenizer import Tokenizer, load_tokenizer
from mooli.frontend.tool_forcing import tool_grammar
from mooli.frontend.tools import Tool, ToolSet
from mooli.frontend.wire_formats.choice import MessageFormat, open_wire_format
from mooli.frontend.wire_formats.growing_pattern import MAX_REPEAT, GrowingPattern
from mooli.frontend.wire_formats.region_content import content_of
from mooli.frontend.wire_formats.response_template import TemplateFormat, read_response_template

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = ToolSet((Tool("get_weather", parameters=PARAMETERS), Tool("now")))

HERMES = {
    "version": 1,
    "start_anchor": "<|im_start|>assistant",
    "defaults": {"role": "assistant"},
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "content": {"close": ["<|im_end|>", "<|im_end|>\n"], "repeats": True, "join": ""},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}
HARMONY = {
    "start_anchor": "<|start|>assistant",
    "fields": {
        "thinking": {"open": "<|channel|>analysis<|message|>", "close": ["<|end|>", "<|start|>"]},
        "content": {
            "open_pattern": r"<\|channel\|>(?:final|commentary)<\|message\|>",
            "close": ["<|end|>", "<|return|>"],
        },
        "tool_calls": {
            "open_pattern": r"<\|channel\|>commentary to=functions\.(?P<name>[\w.-]+)"
            r"[^<]*?(?:<\|constrain\|>json)?<\|message\|>",
            "close": "<|call|>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
    },
}
GEMMA = {
    "start_anchor_pattern": r"<start_of_turn>model\n|<\|turn>model\n",
    "fields": {
        "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>"},
        "content": {},
        "tool_calls": {
            "open_pattern": r"<\|tool_call>\s*call:(?P<name>\w+)",
            "close": "<tool_call|>",
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
            "repeats": True,
            "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
        },
    },
}
GLM = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "thinking": {"open_pattern": r"\n*<think>", "close_pattern": r"</think>\n{0,2}"},
        "content": {"close_pattern": r"<\|user\|>|<\|observation\|>"},
        "tool_calls": {
            "open_pattern": r"<tool_call>(?P<name>[^\n<]+)",
            "close": "</tool_call>",
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"},
            "repeats": True,
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
    },
}
LIST = {
    "start_anchor": "[/INST]",
    "fields": {
        "thinking": {"open": "[THINK]", "close": "[/THINK]", "repeats": True, "join": "\n--\n"},
        "content": {"content_args": {"strip": False}},
        "tool_calls": {
            "open_pattern": r"\[TOOL_CALLS\](?=\[)",
            "close_pattern": r"(?=\[END\])|$",
            "content": "json",
            "transform": {"id": "{id}", "function": {"name": "{name}", "arguments": "{arguments}"}},
            "transform_each": True,
        },
        "end": {"open": "[END]"},
    },
}


def call(name: str, arguments: str) -> list[tuple[str, str]]:
    return [("call_begin", name), ("arguments", arguments), ("call_end", "")]


OSLO = '{"city": "Oslo", "days": 2}'
CASES = {
    "hermes": (
        HERMES,
        "<|im_start|>assistant\n",
        '<think>\nHmm <thin é\n</think>\n\nLook.\n<tool_call>\n{"name": "get_weather", "arguments": '
        + OSLO
        + '}\n</tool_call>\n<tool_call>{"name": "now", "arguments": {}}</tool_call><|im_end|>',
        [("reasoning", "Hmm <thin é"), ("text", "Look."), *call("get_weather", OSLO), *call("now", "{}")],
    ),
    "hermes, begun": (
        HERMES,
        "<|im_start|>assistant\n<think>\n",
        "m </thin </think> a <",
        [("reasoning", "m </thin"), ("text", "a <")],
    ),
    "harmony": (
        HARMONY,
        "<|start|>user<|message|>x<|end|><|start|>assistant",
        "<|channel|>analysis<|message|>m é<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        "<|constrain|>json<|message|>" + OSLO + "<|call|>",
        [("reasoning", "m é"), *call("get_weather", OSLO)],
    ),
    "harmony, words": (
        HARMONY,
        "<|start|>assistant",
        "<|channel|>analysis<|message|>m<|end|><|start|>assistant<|channel|>final<|message|> t <|x<|return|>",
        [("reasoning", "m"), ("text", "t <|x")],
    ),
    "gemma4": (
        GEMMA,
        "<start_of_turn>model\n",
        '<|channel>thought\nm<channel|>t <|tool_call>call:get_weather{city:<|"|>O "s": {k:1}<|"|>,days:2}<tool_call|>',
        [("reasoning", "m"), ("text", "t"), *call("get_weather", '{"city": "O \\"s\\": {k:1}", "days": 2}')],
    ),
    "glm": (
        GLM,
        "<|assistant|>",
        "\n<think>m\n</think>\n\nt\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo\n3</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
        [("reasoning", "m"), ("text", "t"), *call("get_weather", '{"city": "Oslo\\n3", "days": 2}')],
    ),
    "list": (
        LIST,
        "[INST]x[/INST]",
        '[THINK]a[/THINK][THINK] b[/THINK] t \n[TOOL_CALLS][{"id": "q1", "name": "now", "arguments": {}}, {"id": "q2", '
        '"name": "get_weather", "arguments": ' + OSLO + "}][END]x",
        [("reasoning", "a\n--\nb"), ("text", " t \n"), *call("now", "{}"), *call("get_weather", OSLO)],
    ),
}


def message_format(template, tools: ToolSet | None = TOOLS, **options):
    wire_format = open_wire_format(
        EngineConfig.from_kwargs(model_path="m", **options), byte_tokenizer_with(response_template=template)
    )
    return wire_format if tools is None else wire_format.with_tools(tools)


def byte_tokenizer_with(*, special: Sequence[str] = (), chat: str | None = "{{ messages }}{{ tools }}", **options):
    backend = Backend.from_str(byte_tokenizer()._backend.to_str())
    backend.add_special_tokens([AddedToken(text, special=True) for text in special])
    template = None if chat is None else ChatTemplate(chat, special_tokens={})
    return Tokenizer(backend, chat_template=template, **options)


def read(parser, text: str, cuts: Sequence[int] = ()) -> list[Part]:
    parts: list[Part] = []
    for start, end in itertools.pairwise([0, *cuts, len(text)]):
        parts += parser.push(text[start:end], [end - start])
    return parts + parser.flush()


def joined(parts: Sequence[Part]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for part in parts:
        if found and found[-1][0] == part.kind and part.kind in ("reasoning", "text", "arguments"):
            found[-1] = (part.kind, found[-1][1] + part.text)
        elif part.text or part.kind == "call_end":
            found.append((part.kind, part.text))
    return found


def cuts_of(text: str) -> Iterator[Sequence[int]]:
    places = range(1, len(text))
    yield from ([place] for place in places)
    yield places
    chance = random.Random(len(text))
    for _ in range(10):
        yield sorted(chance.sample(places, chance.randrange(len(text))))


def read_whole(wire_format, text: str, prompt: str) -> list[tuple[str, str]]:
    """What it tells, which must be the same whatever the cut."""
    expected = joined(read(wire_format.parser(prompt), text))
    for cuts in cuts_of(text):
        parts = read(wire_format.parser(prompt), text, cuts)
        assert joined(parts) == expected, cuts
        assert sum(part.num_tokens for part in parts) <= len(cuts) + 1
    return expected


@pytest.mark.parametrize("name", CASES)
def test_a_message_is_read_by_the_models_template_whatever_the_cut(name):
    template, prompt, text, expected = CASES[name]
    assert read_whole(message_format(template), text, prompt) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_message_is_read_as_transformers_reads_it(name):
    from transformers.utils.chat_parsing import parse_response

    template, prompt, text, told = CASES[name]
    tools = [tool.for_template() for tool in TOOLS.tools]
    theirs = parse_response(text, template, prefix=prompt, tools=tools)
    ours: dict = {}
    for kind, words in told:
        if kind == "call_begin":
            ours.setdefault("tool_calls", []).append([words])
        elif kind == "arguments":
            ours["tool_calls"][-1].append(json.loads(words))
        elif kind != "call_end":
            ours[kind] = words
    found = {
        "reasoning": theirs.get("thinking") or theirs.get("reasoning_content"),
        "text": theirs.get("content"),
        "tool_calls": [
            [one["function"]["name"], one["function"]["arguments"]] for one in theirs.get("tool_calls") or []
        ],
    }
    assert ours == {key: value for key, value in found.items() if value}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hermes", "harmony", "glm"])
def test_all_kinds_of_messages_are_read_as_transformers_reads_them(name):
    """Pieces of a message in any order. What transformers refuses has a test of its own."""
    from transformers.utils.chat_parsing import parse_response

    template, prompt, text, _ = CASES[name]
    fields = {key: {"repeats": True, "join": "", **value} for key, value in template["fields"].items()}
    fields["tool_calls"] = template["fields"]["tool_calls"]
    template = {**template, "fields": fields}
    tools = [tool.for_template() for tool in TOOLS.tools]
    pieces = [piece for piece in re.split(r"(<[^>]*>|\s+)", text) if piece]
    chance, num_read, num_calls = random.Random(7), 0, 0
    for _ in range(300):
        start = chance.randrange(len(pieces))
        shuffled = [*pieces[start : start + chance.randrange(30)], *chance.sample(pieces, chance.randrange(4))]
        message = "".join(shuffled)
        try:
            theirs = parse_response(message, template, prefix=prompt, tools=tools)
        except (ValueError, KeyError):
            continue
        num_read += 1
        told = joined(read(message_format(template).parser(prompt), message, range(1, len(message))))
        calls = [
            [one["function"].get("name"), one["function"].get("arguments", {})] for one in theirs.get("tool_calls", ())
        ]
        if name == "glm" and message.rfind("<tool_call>") > message.rfind("</tool_call>"):
            continue  # one that is cut short
        ours = [
            [one, json.loads(arguments)]
            for (kind, one), (_, arguments) in itertools.pairwise(told)
            if kind == "call_begin"
        ]
        assert ours == calls, message
        for kind, key in (("reasoning", "thinking"), ("text", "content")):
            assert "".join(words for one, words in told if one == kind) == theirs.get(key, ""), message
        num_calls += len(calls)
    assert num_read > 50 and num_calls > 5


def test_words_come_as_soon_as_they_can_be_nothing_else():
    parser = message_format(HERMES).parser("<|im_start|>assistant\n")
    told = [joined(parser.push(piece, [len(piece)])) for piece in ("<thi", "nk> a", " b", " <", "/think>", "t<t", "?")]
    assert told == [[], [("reasoning", "a")], [("reasoning", " b")], [], [], [("text", "t")], [("text", "<t?")]]


def test_ids_of_calls_are_the_models_where_it_gives_some():
    _, prompt, text, _ = CASES["list"]
    parts = read(message_format(LIST).parser(prompt), text)
    assert [part.call_id for part in parts if part.kind == "call_begin"] == ["q1", "q2"]
    assert [part.call for part in parts if part.kind == "call_begin"] == [0, 1]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "now", "arguments": {"a": [1</tool_call>',
        '<tool_call>{"name": "now", "argum',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"a": 1e999}}</tool_call>',
        "<tool_call>" + "[" * 3000 + "</tool_call>",
        "<tool_call></tool_call>",
    ],
    ids=len,
)
def test_what_is_no_call_is_text_as_it_is_written(text):
    parser = message_format(HERMES).parser
    assert joined(read(parser(""), text, range(1, len(text), 7))) == [("text", text)]
    written = f"a \n{text} \n b"
    if text.endswith("</tool_call>"):
        assert joined(read(parser(""), written, range(1, len(text), 7))) == [("text", written)]


def test_a_call_that_is_whole_needs_no_end_if_its_content_says_where_it_ends():
    assert joined(read(message_format(HERMES).parser(""), '<tool_call>{"name": "now"}')) == call("now", "{}")
    begun = "<tool_call>f\n<arg_key>a</arg_key><arg_value>1</arg_value>"
    assert joined(read(message_format(GLM).parser(""), begun)) == [("text", begun)]


@pytest.mark.parametrize("tools", [None, ToolSet(TOOLS.tools, "none")])
def test_without_tools_calls_are_text_as_they_are_written(tools):
    text = 'a \n<tool_call> {"name": "now"}\n</tool_call> b'
    told = read_whole(message_format(HERMES, tools), f"<think>m</think>\n{text}\n", "")
    assert told == [("reasoning", "m"), ("text", text)]


def test_reasoning_that_is_not_to_be_told_apart_is_text_with_its_markers():
    text = '<think>m</think>a<tool_call>{"name": "now"}</tool_call>'
    told = joined(read(message_format(HERMES, reasoning_parser="none").parser(""), text))
    assert told == [("text", "<think>m</think>a"), *call("now", "{}")]
    told = joined(read(message_format(HERMES).without_reasoning.parser(""), text))
    assert told == [("text", "<think>m</think>a"), *call("now", "{}")]


def test_an_answer_that_goes_on_with_words_keeps_its_first_space():
    wire_format = message_format(HERMES).continued
    assert joined(read(wire_format.parser("<|im_start|>assistant\nHello"), " world")) == [("text", " world")]
    assert joined(read(wire_format.parser("<|im_start|>assistant\n<think>a"), " b</think>c")) == [
        ("reasoning", " b"),
        ("text", "c"),
    ]


# -- forced calls, grammars --------------------------------------------------------------------------------------------
FORCED = ToolSet(TOOLS.tools, "required")


@pytest.mark.parametrize(
    ("template", "prompt", "before"),
    [(HERMES, "", "<think>m</think>\n\n"), (HARMONY, "<|start|>assistant", "<|channel|>analysis<|message|>m<|end|>")],
)
def test_forced_calls_are_a_list_behind_the_reasoning(template, prompt, before):
    wire_format = message_format(template)
    assert wire_format.with_tools(FORCED).calls.name == "json_list"
    assert tool_grammar(wire_format, FORCED, {})["calls"].is_forced
    text = before + '[{"name": "now", "parameters": {}}, {"name": "get_weather", "parameters": ' + OSLO + "}]"
    told = read_whole(message_format(template, FORCED), text, prompt)
    assert told == [("reasoning", "m"), *call("now", "{}"), *call("get_weather", OSLO)]


def test_free_calls_are_held_to_nothing_and_refused_beside_a_grammar():
    wire_format = message_format(HERMES)
    assert tool_grammar(wire_format, TOOLS, {}) == {}
    with pytest.raises(RequestError, match="response_template says how calls are read, and not how they are written"):
        tool_grammar(wire_format, TOOLS, {"json_schema": "{}"})


def test_the_reasoning_that_an_answer_begins_with_is_seen_in_its_prompt():
    ahead = message_format(HERMES).reasoning_ahead
    assert ahead("<|im_start|>assistant\n").is_open is False
    assert ahead("<|im_start|>assistant\n<think>\n").is_open is True
    assert ahead("<|im_start|>assistant\n<think>\n\n</think>\n\n") is None
    assert (ahead("").opening, ahead("").closing, ahead("").words) == ("<think>", "</think>", "")
    assert message_format(GLM).reasoning_ahead("") is None  # only patterns say how it is written


# -- which format a model has ------------------------------------------------------------------------------------------
def config(**options) -> EngineConfig:
    return EngineConfig.from_kwargs(model_path="m", **options)


def test_a_template_is_taken_before_all_rules_and_its_special_tokens_are_shown():
    tokenizer = byte_tokenizer_with(
        special=("<think>", "<|tool_call>", '<|"|>', "<channel|>", "<|channel>"),
        chat="<think></think><tool_call>{{ tools }}",
        response_template=GEMMA,
    )
    wire_format = open_wire_format(config(), tokenizer)
    assert (wire_format.name, wire_format.calls.name) == ("response_template", "response_template")
    assert set(wire_format.marker_tokens) == {"<|tool_call>", '<|"|>', "<channel|>", "<|channel>"}
    named = open_wire_format(config(reasoning_parser="qwen3", tool_call_parser="hermes"), tokenizer)
    assert (named.name, named.calls.name) == ("qwen3", "hermes")
    half = open_wire_format(config(tool_call_parser="none"), tokenizer)
    assert isinstance(half.without_calls, TemplateFormat) and half.calls is None
    half = open_wire_format(config(reasoning_parser="none"), tokenizer)
    assert half.without_calls is PLAIN_TEXT and half.calls.name == "response_template"


def test_calls_are_found_by_rules_where_the_template_has_none():
    fields = {key: value for key, value in HERMES["fields"].items() if key != "tool_calls"}
    tokenizer = byte_tokenizer_with(chat="<tool_call>{{ tools }}", response_template={**HERMES, "fields": fields})
    wire_format = open_wire_format(config(), tokenizer)
    assert isinstance(wire_format, MessageFormat) and wire_format.calls.name == "qwen"
    text = '<think>m</think>a\n<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    told = read_whole(wire_format.with_tools(TOOLS), text, "")
    assert told == [("reasoning", "m"), ("text", "a"), *call("now", "{}")]


def test_calls_are_those_that_the_prompt_tells_of_where_the_chat_template_knows_no_tools():
    tokenizer = byte_tokenizer_with(chat="{{ messages }}", response_template=GLM)
    wire_format = open_wire_format(config(), tokenizer)
    assert (wire_format.name, wire_format.calls.name) == ("response_template", "hermes")
    named = open_wire_format(config(tool_call_parser="response_template"), tokenizer)
    assert named.calls.name == "response_template"


@pytest.mark.parametrize("argument", ["reasoning_parser", "tool_call_parser"])
def test_a_template_that_is_named_must_be_there_and_be_read(argument):
    options = config(**{argument: "response_template"})
    with pytest.raises(ConfigError, match=f"{argument}='response_template' is not possible: .* has none"):
        open_wire_format(options, byte_tokenizer_with())
    with pytest.raises(TokenizerError, match=f"{argument}='response_template' is not possible: .* version 2"):
        open_wire_format(options, byte_tokenizer_with(response_template={**HERMES, "version": 2}))


def test_one_that_cannot_be_read_gives_way_to_the_rules_and_the_log_says_why(caplog):
    tokenizer = byte_tokenizer_with(
        chat="<think></think><tool_call>{{ tools }}", response_template={**HERMES, "version": 2}
    )
    with caplog.at_level(logging.WARNING):
        wire_format = open_wire_format(config(), tokenizer)
    assert (wire_format.name, wire_format.calls.name) == ("qwen3", "qwen")
    assert "response_template is left aside" in caplog.text and "version 2" in caplog.text


def test_a_folders_tokenizer_config_brings_it(tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer()._backend.to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"response_template": GLM}))
    assert open_wire_format(config(), load_tokenizer(tmp_path)).name == "response_template"


def changed(field: str | None = None, **values) -> dict:
    if field is None:
        return {**HERMES, **values}
    return {**HERMES, "fields": {**HERMES["fields"], field: {**HERMES["fields"].get(field, {}), **values}}}


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("x", "response_template is no table but a str"),
        (changed(more=1), "response_template has more, which is not known"),
        (changed(fields={}), "fields is no table of 1 to 32"),
        ({"fields": HERMES["fields"]}, "neither start_anchor nor start_anchor_pattern"),
        (changed(start_anchor_pattern="x"), "both start_anchor and start_anchor_pattern"),
        (changed("thinking", closes="x"), "fields.thinking has closes, which is not known"),
        (changed("thinking", open=[]), "fields.thinking.open is neither a text nor a list"),
        (changed("thinking", close_pattern="x"), "fields.thinking has both close and close_pattern"),
        (changed("other", close="x"), "fields content, other have no open; only one may have none"),
        (changed("other", open_pattern="(a"), "fields.other.open_pattern: the pattern '.a' is not possible"),
        (changed("other", open_pattern="(a+)+"), "a repetition stands in a repetition"),
        (changed("other", open_pattern="(?<=a)b"), "is not read here"),
        (changed("other", open_pattern=r"\s*"), "fields.other.open_pattern matches where there is nothing"),
        (changed("other", open_pattern="x" * 401), "has 401 characters; at most 400 are taken"),
        (changed("other", open_pattern="a{300}"), "repeats something 300 times; at most 256"),
        (changed("other", open_pattern="(?:a|b)" * 40), "too many alternatives"),
        (changed("reasoning", open="x"), "fields thinking, reasoning are the same"),
        (changed("content", content="json"), "fields.content has content='json' or a transform"),
        (changed("thinking", join=", "), "fields.thinking.join=', ' is no text, or the field does not repeat"),
        (changed("tool_calls", content="python-call-list"), "content='python-call-list' is not read here"),
        (changed("tool_calls", content_args={"lax": 1}), "content_args of content='json' has lax"),
        (changed("tool_calls", content_args={"string_delims": "x"}), "string_delims='x' is no list of pairs"),
        (changed("tool_calls", content="xml-inline"), "fields.tool_calls: content_args has no tag_pattern"),
        (
            changed("tool_calls", content="xml-inline", content_args={"tag_pattern": "(?P<key>(a*)*)(?P<value>.*?)b"}),
            "a repetition stands in a repetition",
        ),
        (
            changed("tool_calls", content="xml-inline", content_args={"tag_pattern": "(?P<key>a)(?P<value>.*)"}),
            "has no (?P<value>.*?) with something behind it",
        ),
        (
            changed("tool_calls", content="xml-inline", content_args={"tag_pattern": "a(?P<value>.*?)b"}),
            "is not a tag with a group named key",
        ),
        (changed("other", open_pattern=r"a\s*\s*\s*\s*b"), "has 4 repetitions without an end"),
        (changed("tool_calls", transform={"function": "f {content}"}), "a placeholder with words beside it"),
        (changed("tool_calls", transform={"function": "{name}"}), "'{name}', which is none of content"),
        (changed("tool_calls", repeats="yes"), "fields.tool_calls.repeats='yes' is neither true nor false"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_its_name_before_any_answer(template, reason):
    with pytest.raises(TokenizerError, match=re.escape(reason).replace("'\\.a'", "'.a'")):
        read_response_template(template)


@pytest.mark.parametrize(
    ("kind", "arguments", "text", "expected"),
    [
        ("json", {"unquoted_keys": True}, '{a: "b: {c: 1}, d: ", e :2}', {"a": "b: {c: 1}, d: ", "e": 2}),
        (
            "json",
            {"string_delims": [["<<", ">>"]]},
            '{"a": <<x "y" {z: 1}>>, "b": "\\"<<"}',
            {"a": 'x "y" {z: 1}', "b": '"<<'},
        ),
        ("json", {"allow_non_json": True}, " [1 ", "[1"),
        ("kv-lines", {"value_parser": {"name": "int"}}, "a: 1\n\nx\nb:2", {"a": 1, "b": 2}),
        ("kv-lines", {"line_sep": ";", "kv_sep": "="}, "a=b=c; d = e", {"a": "b=c", "d": "e"}),
        (
            "xml-inline",
            {"tag_pattern": r"<p=(?P<key>\w+)>\s*(?P<value>.*?)\s*</p>"},
            "<p=a> <p=b>\n</p><p=c></p>x<p=d>",
            {"a": "<p=b>", "c": ""},
        ),
        (
            "xml-inline",
            {
                "tag_pattern": "<(?P<key>[^>]+)>(?P<value>.+?)</>",
                "merge_duplicates": True,
                "value_parser": {"name": "bool"},
            },
            "<a></></><a>true</><b>1</>",
            {"a": [False, True], "b": True},
        ),
        ("float", {}, " 1.5 ", 1.5),
        ("text", {"strip": False}, " a ", " a "),
    ],
)  # fmt: skip
def test_contents_are_values(kind, arguments, text, expected):
    assert content_of(kind, arguments)(text) == expected


@pytest.mark.slow
def test_no_text_makes_a_pattern_take_long():
    """Each would go on for minutes if a search began again at every place."""
    tags = content_of("xml-inline", {"tag_pattern": r"<k>(?P<key>.*?)</k>\s*<v>\s*(?P<value>.*?)\s*</v>"})
    assert tags("<k></k><v>" * 10_000) == {}
    assert tags("<k>a</k><v>" + " " * 100_000) == {}
    lax = content_of("json", {"string_delims": [["(", ")"]], "unquoted_keys": True, "allow_non_json": True})
    for text in ("(" * 100_000, '"' + '\\"' * 50_000, "{" * 100_000, "{" + "a" * 100_000):
        assert lax(text) == text


# -- patterns over text that grows -------------------------------------------------------------------------------------
PATTERNS = [
    "<a>", "ab|abc", r"a\w+>", r"\s*<t>", "<h>.*?<m>", "(?:ab)*c", "a(?P<n>b|bc)d?", "x$", "(?=ab)a", "a(?!b)",
    r"\n?b\n", "a{2,3}b", "[ab]+?c", "(?:ab|c)?d", r"\bab\b", "b[^c]*c",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_certain_of_a_growing_text_is_what_the_whole_text_has(pattern):
    growing, whole_pattern, chance = GrowingPattern(pattern), re.compile(pattern, re.DOTALL), random.Random(pattern)
    num_found = 0
    for _ in range(150):
        alphabet = "abc<>thmdx \n" if chance.random() < 0.5 else re.sub(r"[\\(?:=!P)]", "", pattern)
        text = "".join(chance.choice(alphabet) for _ in range(chance.randrange(9)))
        whole = whole_pattern.search(text)
        num_found += whole is not None
        for end in range(len(text) + 1):
            found = growing.search(text[:end], 0, is_last=False)
            if found is not None and found.match is not None:
                assert whole is not None and found.match.span() == whole.span(), (text, end)
                assert found.match.groupdict() == whole.groupdict()
            elif whole is not None:
                assert whole.start() >= (end if found is None else found.start), (text, end)
    assert num_found or pattern in ("<h>.*?<m>",)


def test_a_text_is_certain_at_its_last_character_and_a_lazy_pattern_at_its_first_end():
    assert GrowingPattern.of_texts(["<a>", "<ab>"]).search("x<a>", 0, is_last=False).match.span() == (1, 4)
    assert GrowingPattern.of_texts(["<a>", "<a>b"]).search("x<a>", 0, is_last=False).match is None
    assert GrowingPattern("<h>.*?<m>").search("<h>a<m>", 0, is_last=False).match.span() == (0, 7)
    assert GrowingPattern(r"<h>\w*").search("<h>a", 0, is_last=False).match is None


def test_a_repetition_without_an_end_ends_and_text_is_not_held_for_ever():
    parser = message_format(HARMONY).parser("<|start|>assistant<|channel|>final<|message|>")
    assert joined(parser.push("a", [1])) == [("text", "a")]
    found = GrowingPattern("<.*>").search("<" + "a" * (MAX_REPEAT + 1), 0, is_last=False)
    assert found.match is None and found.start > 0
