"""Calls as bare JSON objects: Llama 3.1, 3.2 and 3.3.

```text
{"name": "get_weather", "parameters": {"city": "Oslo"}}; {"name": "now", "parameters": {}}
```

`<|python_tag|>` may stand before them, which makes any object behind it a call. Without it one is a call that has the
name of a function: where a message begins, or anywhere if it begins as models write it. Source: Meta's prompt formats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mooli.frontend.tools import ToolSet
from mooli.frontend.wire_formats.calls import CallParser, Waiting, calls_rules, object_call

_TAG = "<|python_tag|>"
_HEAD = '{"name": '


@dataclass(frozen=True, slots=True)
class Llama3:
    name: str = "llama3"

    marker_tokens = (_TAG,)

    def parser(self, tools: ToolSet) -> Llama3Parser:
        return Llama3Parser(tools)

    def calls_grammar(self, tools: ToolSet) -> str:
        """Without the tag: so do templates write them in histories."""
        return calls_rules(tools, object_call("parameters", behind=_HEAD), trigger=_HEAD, between=f"; {_HEAD}")

    def triggers(self) -> tuple[str, ...]:
        return (_HEAD,)


class Llama3Parser(CallParser):
    """See `CallParser`."""

    def _read(self) -> Waiting[None]:
        yield from self._calls(self._is_function)  # a message may begin with one, however it is spaced
        while trigger := (yield from self._text_until(_TAG, _HEAD)):
            end_of_trigger = self._at
            if trigger == _HEAD:
                self._at -= len(_HEAD)
            if not (yield from self._calls(bool if trigger == _TAG else self._is_function)):
                self._tell_text(end_of_trigger)

    def _calls(self, is_function: Callable[[str], bool]) -> Waiting[bool]:
        start = self._at
        has_calls = yield from self._object_calls(is_function, separators=";,")
        if not has_calls:
            self._at = start
        return has_calls
