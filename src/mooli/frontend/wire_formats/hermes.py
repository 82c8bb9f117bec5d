"""Calls as JSON objects between `<tool_call>` and `</tool_call>`: Qwen2.5, Qwen3, Hermes, SmolLM3, Granite 4, Trinity.

```text
<tool_call>
{"name": "get_weather", "arguments": {"city": "Oslo"}}
</tool_call>
```

Read with or without line breaks, and also with several objects or a list of them in one pair of markers. An end marker
that is missing is not missed. Trinity's calls stand in its reasoning or behind, whose markers are no words of a text.
Source: the chat templates of the models.
"""

from __future__ import annotations

from dataclasses import dataclass

from mooli.frontend.tools import ToolSet
from mooli.frontend.wire_formats.calls import CallParser, Waiting, calls_rules, object_call

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Hermes:
    """ignored: markers that are left out of texts; in calls they are what they are."""

    name: str
    ignored: tuple[str, ...] = ()

    @property
    def marker_tokens(self) -> tuple[str, ...]:
        return (_OPENING, _CLOSING, *self.ignored)

    def parser(self, tools: ToolSet) -> HermesParser:
        return HermesParser(tools, self.ignored)

    def calls_grammar(self, tools: ToolSet) -> str:
        return calls_rules(
            tools,
            object_call(),
            trigger=_OPENING,
            opening="\n",
            between=f"\n{_CLOSING}\n{_OPENING}\n",
            closing=f"\n{_CLOSING}",
        )

    def triggers(self) -> tuple[str, ...]:
        return (_OPENING,)


class HermesParser(CallParser):
    """See `CallParser`."""

    def __init__(self, tools: ToolSet, ignored: tuple[str, ...]) -> None:
        self._ignored = ignored
        super().__init__(tools)

    def _read(self) -> Waiting[None]:
        while mark := (yield from self._text_until(_OPENING, *self._ignored)):
            if mark != _OPENING:
                self._tell_text(self._at - len(mark))
                self._at = len(mark)
                continue
            end_of_trigger = self._at
            if (yield from self._object_calls(separators=",", ends=(_CLOSING,))):
                yield from self._skip_spaces()
                yield from self._skip(_CLOSING)
            else:
                self._tell_text(end_of_trigger)
