"""gpt-oss's harmony: an answer of several messages, each with a header.

```text
<|channel|>analysis<|message|>Let me look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather
<|constrain|>json<|message|>{"city": "Oslo"}<|call|>
```

Owns which messages are reasoning, which are told, and which are calls. The channel `analysis` is reasoning. A message
to a function is a call, on any channel, whether its header says so before the channel or behind it. `<|call|>` ends an
answer, so that it has one call. Source: OpenAI's harmony format.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mooli.frontend.parts import PLAIN_TEXT, Part, PartKind, WireFormat
from mooli.frontend.tools import Tool, ToolSet
from mooli.frontend.wire_formats.calls import (
    TAIL_TOKENS,
    CallParser,
    Waiting,
    arguments_rules,
    call_rules,
    length_of_beginning,
    literal,
    pieces_of,
)
from mooli.types import Reasoning

_CHANNEL, _MESSAGE, _START, _CONSTRAIN = "<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>", _START)
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.\-]+)")
_NOT_CALLED = re.compile(r"(?:user|assistant|python|browser)(?:\.|$)")
"""Recipients that are no functions of the tools: people, and what gpt-oss was trained with."""


def _function(header: str) -> str | None:
    """The one that a message calls, by its header."""
    found = _RECIPIENT.search(header)
    return None if found is None or _NOT_CALLED.match(found[1]) else found[1]


@dataclass(frozen=True, slots=True)
class Harmony:
    """An answer of several messages: a header with a channel, `<|message|>`, the words, `<|end|>`. Those of the channel
    `analysis` are reasoning; all others are told, each on lines of its own. passes_calls: messages to a function are
    text as they are written, header and all."""

    name: str = "gpt-oss"
    passes_calls: bool = False

    prompt_tail_tokens = TAIL_TOKENS
    marker_tokens = (_CHANNEL, _MESSAGE, *_ENDS)
    calls = None

    @property
    def continued(self) -> Harmony:
        return self

    @property
    def without_reasoning(self) -> WireFormat:
        return PLAIN_TEXT

    def with_tools(self, tools: ToolSet) -> Harmony:
        return self

    def parser(self, prompt_tail: str) -> HarmonyParser:
        header, message, _ = prompt_tail.rpartition(_MESSAGE)
        open_kind = _kind(header) if message and prompt_tail.endswith(_MESSAGE) else None
        return HarmonyParser(open_kind, passes_calls=self.passes_calls)

    def reasoning_ahead(self, prompt_tail: str) -> Reasoning | None:
        header, message, _ = prompt_tail.rpartition(_MESSAGE)
        is_open = bool(message) and prompt_tail.endswith(_MESSAGE)
        if is_open and _kind(header) == "text":
            return None
        return Reasoning(
            f"{_CHANNEL}analysis{_MESSAGE}",
            _ENDS[0],
            is_open=is_open,
            again=f"{_START}assistant",
            words=f"{_CHANNEL}final{_MESSAGE}",
        )


def _kind(header: str) -> PartKind:
    """Whose words follow it."""
    return "reasoning" if header.rpartition(_CHANNEL)[2].lstrip().startswith("analysis") else "text"


class HarmonyParser:
    """One sequence. open_kind: of the message that the prompt has opened, None if the answer begins with a header."""

    def __init__(self, open_kind: PartKind | None, *, passes_calls: bool) -> None:
        self._passes_calls = passes_calls
        self._is_call = False
        self._kind = open_kind
        """Of the words that come; None in a header."""
        self._told: set[PartKind] = set()
        self._needs_line = False
        self._held = ""
        self._num_held = 0

    def push(self, text: str, lengths: Sequence[int]) -> list[Part]:
        parts: list[Part] = []
        for piece, num_tokens in pieces_of(text, lengths):
            self._held += piece
            self._num_held += num_tokens
            while self._read(parts):
                pass
        return parts

    def flush(self) -> list[Part]:
        parts: list[Part] = []
        is_header = self._kind is None and self._held.lstrip().startswith((_CHANNEL, _MESSAGE, _START))
        self._tell(parts, self._kind or "text", "" if is_header else self._held)
        return parts

    def _read(self, parts: list[Part]) -> bool:
        """Go on by one marker. Whether there may be another."""
        if self._kind is None:
            header, message, rest = self._held.partition(_MESSAGE)
            if not _is_header(self._held.lstrip()):
                self._kind = "text"  # a model that was tuned to write plain text
            elif message:
                self._is_call = self._passes_calls and _function(header) is not None
                self._kind = "text" if self._is_call else _kind(header)
                self._needs_line = not self._is_call and self._kind in self._told
                self._tell(parts, self._kind, header.lstrip() + message if self._is_call else "", rest=rest)
            return self._kind is not None
        at, end = min(((at, end) for end in _ENDS if (at := self._held.find(end)) >= 0), default=(-1, ""))
        if at >= 0:
            behind = at if end == _START else at + len(end)
            self._tell(parts, self._kind, self._held[: behind if self._is_call else at], rest=self._held[behind:])
            self._kind, self._is_call = None, False
            return True
        end_of_words = len(self._held) - length_of_beginning(self._held, _ENDS)
        if end_of_words or not self._held:
            self._tell(parts, self._kind, self._held[:end_of_words], rest=self._held[end_of_words:])
        return False

    def _tell(self, parts: list[Part], kind: PartKind, words: str, rest: str = "") -> None:
        if words:
            words = "\n" + words if self._needs_line else words
            self._needs_line = False
            if not self._is_call:
                self._told.add(kind)
        if words or self._num_held:
            parts.append(Part(kind, words, self._num_held))
        self._held, self._num_held = rest, 0


def _is_header(text: str) -> bool:
    """Whether `text` may be the beginning of one. The prompt may have begun it, up to whom it is from."""
    return any(text.startswith(mark) or mark.startswith(text) for mark in (_CHANNEL, _START, _MESSAGE, "to="))


# -- calls -------------------------------------------------------------------------------------------------------------
_TRIGGER = f"{_CHANNEL}commentary to=functions."


@dataclass(frozen=True, slots=True)
class HarmonyCalls:
    """Messages to functions, as `Harmony` passes them on."""

    name: str = "gpt-oss"

    marker_tokens = (_CHANNEL, _MESSAGE, _CONSTRAIN, *_ENDS)

    def parser(self, tools: ToolSet) -> HarmonyCallParser:
        return HarmonyCallParser(tools)

    def calls_grammar(self, tools: ToolSet) -> str:
        """One call, up to where the model ends its answer."""

        def call(tool: Tool, arguments: str) -> str:
            return f"{literal(f'{tool.name} {_CONSTRAIN}json{_MESSAGE}')} {arguments}"

        return "\n".join(
            [
                f"calls: {literal(f'{_START}assistant')}? {literal(_TRIGGER)} calls_after_trigger",
                "calls_after_trigger: call",
                *call_rules(tools, "call", call),
                *arguments_rules(tools),
            ]
        )

    def triggers(self) -> tuple[str, ...]:
        return (_TRIGGER,)


class HarmonyCallParser(CallParser):
    """See `CallParser`."""

    def _read(self) -> Waiting[None]:
        yield from self._skip_spaces()  # a message may begin inside its header
        begins_inside = bool((yield from self._skip("to=")))
        self._at = 0
        while begins_inside or (yield from self._text_until(_START, _CHANNEL)):
            begins_inside = False
            end_of_trigger = self._at
            header = yield from self._until(_MESSAGE)
            name = None if header is None else _function(header)
            if name is None:
                self._tell_text(end_of_trigger)
                continue
            self._tell_call(name)
            char = yield from self._skip_spaces()
            if char == "<" and (yield from self._skip(*_ENDS[:-1])):
                self._tell_arguments("{}")
            elif char != "{" or (yield from self._stream_json()) == "broken":
                yield from self._stream_broken(*_ENDS)
                continue
            self._tell_end()
            yield from self._skip_spaces()
            yield from self._skip(*_ENDS[:-1])
