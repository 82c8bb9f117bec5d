"""How models write calls, for the tests of all formats: a writer for each, which knows none of the parsers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Calls = list[tuple[str, str]]
"""Names, and arguments as JSON."""


@dataclass(frozen=True)
class Form:
    """write: calls as the model writes them. is_marked: a marker says that something is a call, whatever its name.
    has_one: of one message never more. keeps_text: arguments are told as they are written. ends: the end marker, in
    texts of which it must not end a call. is_first: calls begin the message."""

    write: Callable[[Calls], str]
    is_marked: bool = True
    has_one: bool = False
    keeps_text: bool = True
    ends: str = ""
    is_first: bool = False


def _objects(opening: str, between: str, closing: str, key: str = "arguments") -> Callable[[Calls], str]:
    def write(calls: Calls) -> str:
        bodies = [f'{{"name": "{name}", "{key}": {arguments}}}' for name, arguments in calls]
        return opening + between.join(bodies) + closing

    return write


def _python(opening: str = "", closing: str = "") -> Callable[[Calls], str]:
    def call(name: str, arguments: str) -> str:
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in json.loads(arguments).items())})"

    return lambda calls: f"{opening}[{', '.join(call(*one) for one in calls)}]{closing}"


def _mistral(calls: Calls) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)


def _harmony(calls: Calls) -> str:
    ((name, arguments),) = calls
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>"


_HERMES = Form(_objects("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"), ends="</tool_call>")

FORMS: Mapping[str, Form] = {
    "gpt-oss": Form(_harmony, has_one=True, ends="<|call|>"),
    "granite": Form(_objects("<|tool_call|>[", ", ", "]")),
    "hermes": _HERMES,
    "json_list": Form(_objects("[", ", ", "]", "parameters"), is_marked=False, is_first=True),
    "lfm2": Form(_python("<|tool_call_start|>", "<|tool_call_end|>"), keeps_text=False, ends="<|tool_call_end|>"),
    "llama3": Form(_objects("", "; ", "", "parameters"), is_marked=False),
    "mistral": Form(_mistral, ends="[TOOL_CALLS]"),
    "openpangu": Form(_objects("<|tool_call_start|>[", ", ", "]<|tool_call_end|>"), ends="<|tool_call_end|>"),
    "pangu": Form(_objects("[unused11][", ", ", "][unused12]"), ends="[unused12]"),
    "pythonic": Form(_python(), is_marked=False, keeps_text=False),
    "qwen": _HERMES,
    "qwen25": _HERMES,
    "trinity": _HERMES,
}

VARIANTS: Mapping[str, tuple[str, str]] = {
    "a list in hermes's markers": (
        "qwen",
        '<tool_call>[{"name": "now", "arguments": {}}, {"name": "now"}]</tool_call>',
    ),
    "two objects in one pair of markers": ("qwen", '<tool_call>\n{"name": "now"}\n{"name": "now"}\n</tool_call>'),
    "no end marker between calls": ("qwen", '<tool_call>{"name": "now"}\n<tool_call>{"name": "now"}</tool_call>'),
    "a brace too few": (
        "qwen",
        '<tool_call>\n{"name": "now", "arguments": {}\n</tool_call>\n<tool_call>\n{"name": "now"}\n</tool_call>',
    ),
    "a brace too many": (
        "qwen",
        '<tool_call>\n{"name": "now", "arguments": {}}}\n</tool_call><tool_call>{"name": "now"}',
    ),
    "arguments first": (
        "granite",
        '<tool_call> [{"arguments": {}, "name": "now"}, {"type": "function", "arguments": null, "name": "now"}]',
    ),
    "arguments as a text": (
        "granite",
        '<|tool_call|> [{"name": "now", "arguments": "{}"}, {"name": "now", "arguments": " {}\\n"}]',
    ),
    "the tag of Llama": (
        "llama3",
        '<|python_tag|>{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}',
    ),
    "objects of Llama in lines": ("llama3", '{ "type": "function", "name": "now" }\n{"name": "now", "parameters": {}}'),
    "Mistral's list": (
        "mistral",
        '[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "now", "id": "123456789"}]',
    ),
    "Mistral's ids": ("mistral", "[TOOL_CALLS]now[CALL_ID]abc123456[ARGS] [TOOL_CALLS]now[ARGS] {}"),
    "JSON in LFM2's markers": ("lfm2", '<|tool_call_start|>[{"name": "now"}, {"name": "now"}]<|tool_call_end|>'),
    "no brackets in LFM2's markers": ("lfm2", "<|tool_call_start|>now(), now()<|tool_call_end|>"),
    "markers of Llama 4": ("pythonic", "<|python_start|>[now(), now()]<|python_end|>"),
    "a list in openPangu's markers": (
        "openpangu",
        '<|tool_call_start|>{"name": "now"}, {"name": "now"}<|tool_call_end|>',
    ),
}
"""Other ways to write two calls of `now`, without arguments."""
