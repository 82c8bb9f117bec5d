"""Calls as one JSON list, which is the whole message: so are forced calls written where a model has no format.

```text
[{"name": "get_weather", "parameters": {"city": "Oslo"}}]
```

Source: what SGLang forces such models to write.
"""

from __future__ import annotations

from dataclasses import dataclass

from mooli.frontend.tools import ToolSet
from mooli.frontend.wire_formats.calls import CallParser, Waiting, calls_rules, object_call


@dataclass(frozen=True, slots=True)
class JsonList:
    """Any text may begin with its trigger: it is for forced calls."""

    name: str = "json_list"

    marker_tokens = ()

    def parser(self, tools: ToolSet) -> JsonListParser:
        return JsonListParser(tools)

    def calls_grammar(self, tools: ToolSet) -> str:
        return calls_rules(tools, object_call("parameters"), trigger="[", between=", ", closing="]")

    def triggers(self) -> tuple[str, ...]:
        return ("[",)


class JsonListParser(CallParser):
    """See `CallParser`. Only the functions of the tools are called: nothing else marks a call."""

    def _read(self) -> Waiting[None]:
        if not (yield from self._object_calls(self._is_function)):
            self._at = 0
        yield from self._rest_is_text()
