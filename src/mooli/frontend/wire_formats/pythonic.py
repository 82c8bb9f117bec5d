"""Calls as a list of Python calls: Llama 4, LFM2.

```text
[get_weather(city="Oslo"), now()]
<|tool_call_start|>[get_weather(city="Oslo"), now()]<|tool_call_end|>
```

Between its markers a list of JSON objects is read as well. Without them, a list is one of calls if it begins with a
function of the tools. Arguments become JSON as they come: `mooli.frontend.wire_formats.python_text`.

In a grammar a value is JSON, which Python reads too but for `true`, `false` and `null`; where a schema says just that
it is one of these, it is Python's word. What a schema says of its object alone (keys that exclude each other, say)
cannot be told key by key: then the arguments are written as `**{…}`. Sources: Meta's prompt formats; LFM2's template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mooli.frontend.tools import Tool, ToolSet
from mooli.frontend.wire_formats.calls import (
    CallParser,
    Waiting,
    arguments_schema,
    call_rules,
    literal,
    several,
)
from mooli.frontend.wire_formats.python_text import PythonScanner
from mooli.lark import json_of

_NAME = re.compile(r"[\w.\-]{0,256}")
_KEYWORD = re.compile(r"[^\W\d]\w*")
_TOLD_KEY_BY_KEY = frozenset(
    (
        "type",
        "properties",
        "required",
        "additionalProperties",
        "title",
        "description",
        "$schema",
        "$defs",
        "definitions",
    )
)
_ANY = (
    r'any_keyword: /[A-Za-z_][A-Za-z0-9_]*/ "=" any_value',
    r'any_value: "True" | "False" | "None" | ANY_TEXT | any_json',
    r"ANY_TEXT: /'([^'\\\x00-\x1f]|\\['\\nrt])*'/",
    f"any_json: {json_of({})}",
)
"""Arguments of which a schema says nothing."""


@dataclass(frozen=True, slots=True)
class Pythonic:
    """opening, closing: what stands around the list. is_bare: or nothing does."""

    name: str
    opening: str
    closing: str
    is_bare: bool = False

    @property
    def marker_tokens(self) -> tuple[str, ...]:
        return (self.opening, self.closing)

    def parser(self, tools: ToolSet) -> PythonicParser:
        return PythonicParser(tools, self)

    def calls_grammar(self, tools: ToolSet) -> str:
        bare = " | list" if self.is_bare else ""
        return "\n".join(
            [
                f"calls: {literal(self.opening)} calls_after_trigger{bare}",
                f"calls_after_trigger: list {literal(self.closing)}",
                f'list: "[" {several(tools, "call", ", ")} "]"',
                *call_rules(tools, "call", lambda tool, arguments: f'{literal(f"{tool.name}(")} {arguments} ")"'),
                *(
                    rule
                    for index, tool in enumerate(tools.tools)
                    for rule in _arguments_rules(tool, f"arguments_{index}")
                ),
                *_ANY,
            ]
        )

    def triggers(self) -> tuple[str, ...]:
        return (self.opening,)


def _arguments_rules(tool: Tool, rule: str) -> list[str]:
    """Rules for what stands between the brackets of a call: keys in the order of the schema, optional ones or not."""
    schema = arguments_schema(tool)
    properties = schema.get("properties", {})
    required = schema.get("required", [])
    if schema.keys() <= {"type", "title", "description", "$schema"}:
        return [f'{rule}: "" | any_keyword (", " any_keyword)*']
    is_plain = (
        schema.keys() <= _TOLD_KEY_BY_KEY
        and isinstance(properties, Mapping)
        and isinstance(required, Sequence)
        and all(_KEYWORD.fullmatch(key) and value is not False for key, value in properties.items())
        and all(key in tuple(properties) for key in required)
    )
    if not is_plain:  # or no schema: that is said where it is compiled
        return [f'{rule}: "**" {rule}_object', f"{rule}_object: {json_of(schema)}"]
    rules = [f"{rule}: {rule}_first_0"]
    for index, (key, value) in enumerate(properties.items()):
        item, following = f"{rule}_item_{index}", f"{rule}_next_{index + 1}"
        optional = "" if key in required else " | {}"
        rules += [
            f"{rule}_first_{index}: {item} {following}{optional.format(f'{rule}_first_{index + 1}')}",
            f'{rule}_next_{index}: ", " {item} {following}{optional.format(following)}',
            f"{item}: {literal(f'{key}=')} {item}_value",
            f"{item}_value: {_value(value, schema)}",
        ]
    end = len(properties)
    return [*rules, f'{rule}_first_{end}: ""', f'{rule}_next_{end}: ""']


def _value(schema: Any, root: Mapping[str, Any]) -> str:
    """Lark for one argument. root: what `schema` may refer to."""
    if isinstance(schema, Mapping) and schema.keys() <= {"type", "description", "title", "default"}:
        if schema.get("type") == "boolean":
            return '"True" | "False"'
        if schema.get("type") == "null":
            return '"None"'
    named = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return json_of({**named, **schema} if isinstance(schema, Mapping) else named)


class PythonicParser(CallParser):
    """See `CallParser`."""

    def __init__(self, tools: ToolSet, wire_format: Pythonic) -> None:
        self._format = wire_format
        super().__init__(tools)

    def _read(self) -> Waiting[None]:
        opening, closing = self._format.opening, self._format.closing
        while trigger := (yield from self._text_until(opening, "[")):
            end_of_trigger = self._at
            if trigger == "[":
                self._at -= len(trigger)
            elif (yield from self._object_calls(separators=",;", ends=(closing,))):
                yield from self._skip_spaces()
                yield from self._skip(closing)
                continue
            else:
                self._at = end_of_trigger
            if not (yield from self._python_calls(bool if trigger == opening else self._is_function, closing)):
                self._tell_text(end_of_trigger)

    def _python_calls(self, is_function: Callable[[str], bool], closing: str) -> Waiting[bool]:
        """A list of calls, and the marker behind it. Whether there was one; if not, nothing is told. is_function:
        whether the name of the first makes it one."""
        yield from self._skip_spaces()
        yield from self._skip("[")
        has_calls = False
        while True:
            yield from self._skip_spaces()
            start = self._at
            name = yield from self._run_of(_NAME)
            if not name or not (has_calls or is_function(name)) or not (yield from self._skip("(")):
                self._at = start
                break
            has_calls = True
            self._tell_call(name)
            if (yield from self._stream(PythonScanner())) == "broken":
                yield from self._stream_broken(closing)
                return True
            self._tell_end()
            yield from self._skip_spaces()
            if not (yield from self._skip(",", ";")):
                break
        if has_calls:
            yield from self._skip_spaces()
            yield from self._skip("]")
            yield from self._skip_spaces()
            yield from self._skip(closing)
        return has_calls
