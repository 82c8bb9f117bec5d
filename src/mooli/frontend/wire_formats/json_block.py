"""Calls as a JSON list between two markers, or behind one: openPangu, Granite 3.

```text
[unused11][{"name": "get_weather", "arguments": {"city": "Oslo"}}][unused12]
<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Oslo"}}]
```

Read also as objects without a list. Sources: the chat templates of the models; vLLM's parsers of their names.
"""

from __future__ import annotations

from dataclasses import dataclass

from mooli.frontend.tools import ToolSet
from mooli.frontend.wire_formats.calls import CallParser, Waiting, calls_rules, object_call


@dataclass(frozen=True, slots=True)
class JsonBlock:
    """openings: markers of which one stands before the list; a grammar writes the first. closing: "" for a model that
    writes none."""

    name: str
    openings: tuple[str, ...]
    closing: str = ""

    @property
    def marker_tokens(self) -> tuple[str, ...]:
        return (*self.openings, self.closing) if self.closing else self.openings

    def parser(self, tools: ToolSet) -> JsonBlockParser:
        return JsonBlockParser(tools, self)

    def calls_grammar(self, tools: ToolSet) -> str:
        return calls_rules(
            tools, object_call(), trigger=self.openings[0], opening="[", between=", ", closing="]" + self.closing
        )

    def triggers(self) -> tuple[str, ...]:
        return self.openings[:1]


class JsonBlockParser(CallParser):
    """See `CallParser`."""

    def __init__(self, tools: ToolSet, block: JsonBlock) -> None:
        self._block = block
        super().__init__(tools)

    def _read(self) -> Waiting[None]:
        ends = (self._block.closing,) if self._block.closing else ()
        while (yield from self._text_until(*self._block.openings)):
            end_of_trigger = self._at
            if (yield from self._object_calls(separators=",;", ends=ends)):
                yield from self._skip_spaces()
                if ends:
                    yield from self._skip(*ends)
            else:
                self._tell_text(end_of_trigger)
