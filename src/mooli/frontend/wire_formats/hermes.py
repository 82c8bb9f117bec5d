"""Calls as JSON objects between `<tool_call>` and `</tool_call>`: Qwen2.5, Qwen3, Hermes, SmolLM3, Granite 4.

```text
<tool_call>
{"name": "get_weather", "arguments": {"city": "Oslo"}}
</tool_call>
```

Read with or without line breaks, and also with several objects or a list of them in one pair of markers. An end marker
that is missing is not missed. Source: the chat templates of the models.
"""

from __future__ import annotations

from dataclasses import dataclass

from mooli.frontend.tools import ToolSet
from mooli.frontend.wire_formats.calls import CallParser, Waiting, calls_rules, object_call

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Hermes:
    """Its names differ, and nothing else."""

    name: str

    marker_tokens = (_OPENING, _CLOSING)

    def parser(self, tools: ToolSet) -> HermesParser:
        return HermesParser(tools)

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

    def _read(self) -> Waiting[None]:
        while (yield from self._text_until(_OPENING)):
            end_of_trigger = self._at
            if (yield from self._object_calls(separators=",", ends=(_CLOSING,))):
                yield from self._skip_spaces()
                yield from self._skip(_CLOSING)
            else:
                self._tell_text(end_of_trigger)
