"""Calls behind `[TOOL_CALLS]`: Mistral's two forms.

```text
[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Oslo"}}]
[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]now[ARGS]{}
```

A grammar lets the model write either. Ids of calls are nine letters and digits, as these models' templates will have
them. Source: mistral-common.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from mooli.frontend.tools import Tool, ToolSet
from mooli.frontend.wire_formats.calls import (
    CallParser,
    Waiting,
    arguments_rules,
    call_rules,
    literal,
    object_call,
    several,
)

_CALLS, _ARGUMENTS, _ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAME = re.compile(r"[\w.\-]{0,256}")


@dataclass(frozen=True, slots=True)
class Mistral:
    name: str = "mistral"

    marker_tokens = (_CALLS, _ARGUMENTS, _ID)

    def parser(self, tools: ToolSet) -> MistralParser:
        return MistralParser(tools)

    def calls_grammar(self, tools: ToolSet) -> str:
        def named(tool: Tool, arguments: str) -> str:
            return f"{literal(tool.name + _ARGUMENTS)} {arguments}"

        return "\n".join(
            [
                f"calls: {literal(_CALLS)} calls_after_trigger",
                f'calls_after_trigger: " "? "[" {several(tools, "call", ", ")} "]" | {several(tools, "named", _CALLS)}',
                *call_rules(tools, "call", object_call()),
                *call_rules(tools, "named", named),
                *arguments_rules(tools),
            ]
        )

    def triggers(self) -> tuple[str, ...]:
        return (_CALLS,)


class MistralParser(CallParser):
    """See `CallParser`."""

    def _new_id(self) -> str:
        return secrets.token_hex(5)[:9]

    def _read(self) -> Waiting[None]:
        while (yield from self._text_until(_CALLS)):
            end_of_trigger = self._at
            char = yield from self._skip_spaces()
            read = self._object_calls(separators=",") if char and char in "[{" else self._named_call()
            if not (yield from read):
                self._tell_text(end_of_trigger)

    def _named_call(self) -> Waiting[bool]:
        """`name[ARGS]{…}`, and between the two maybe an id, which is given back as it is."""
        name = yield from self._run_of(_NAME)
        call_id = ""
        if name and (yield from self._skip(_ID)):
            call_id = yield from self._run_of(_NAME)
        has_marker = bool((yield from self._skip(_ARGUMENTS)))
        char = yield from self._skip_spaces()
        if not name or not (has_marker or char == "{"):
            return False
        self._tell_call(name, call_id)
        if (yield from self._skip(_CALLS)):
            self._at -= len(_CALLS)
            self._tell_arguments("{}")
        elif char != "{" or (yield from self._stream_json()) == "broken":
            yield from self._stream_broken()
            return True
        self._tell_end()
        return True
