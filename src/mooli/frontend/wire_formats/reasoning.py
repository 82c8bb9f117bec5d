"""Formats that tell reasoning from the answer: pairs of markers, and the channels of gpt-oss.

Owns the formats and SGLang's names for them. Parsers are pure functions of the text, token by token, so that their
parts never depend on the cut. Knows no calls of tools but the texts that they begin with, which may end reasoning.

Whether an answer begins inside its reasoning is read from the end of its prompt: many templates open it there.
Reasoning is told without the white space around it, and the answer without that between the two, which templates write
again. Markers count as reasoning.

Sources: the chat templates of the models; SGLang's `--reasoning-parser`; OpenAI's harmony format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mooli.frontend.parts import PLAIN_TEXT, Part, PartKind, WireFormat
from mooli.frontend.tools import ToolSet
from mooli.frontend.wire_formats.calls import length_of_beginning, pieces_of

_TAIL_TOKENS = 32
"""Enough for a marker that is no token of its own, and the white space behind it."""


# -- pairs of markers --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class ReasoningPair:
    """Reasoning stands between two markers, at the beginning of an answer. A marker later on is a word of the answer.

    name: SGLang's, of one that has this pair. starts_inside: where the prompt has neither marker at its end, the answer
    is taken to begin with reasoning. marker_tokens: markers or what begins them, as tokens that may be special ones.
    ended_by: texts that end reasoning which is open, and are no part of it.
    """

    name: str
    opening: str
    closing: str
    starts_inside: bool = False
    ended_by: tuple[str, ...] = ()

    prompt_tail_tokens = _TAIL_TOKENS
    calls = None

    @property
    def marker_tokens(self) -> tuple[str, ...]:
        return (self.opening.removesuffix("thought"), self.closing)  # "<|channel>thought" is a token and a word

    @property
    def continued(self) -> ReasoningPair:
        return replace(self, starts_inside=False)

    @property
    def without_reasoning(self) -> WireFormat:
        return PLAIN_TEXT

    def with_tools(self, tools: ToolSet) -> ReasoningPair:
        return self

    def parser(self, prompt_tail: str) -> PairParser:
        tail = prompt_tail.rstrip()
        is_inside = tail.endswith(self.opening) or (self.starts_inside and not tail.endswith(self.closing))
        return PairParser(self, is_inside=is_inside)


class PairParser:
    """One sequence. is_inside: it begins with reasoning, whether or not it opens it once more."""

    def __init__(self, pair: ReasoningPair, *, is_inside: bool) -> None:
        self._opening, self._closing = pair.opening, pair.closing
        self._ends = (pair.closing, *pair.ended_by)
        self._is_inside = is_inside
        self._state: Literal["start", "reasoning", "between", "text"] = "start"
        self._has_words = False
        """Of reasoning: then white space may be part of it."""
        self._held = ""
        self._num_held = 0

    def push(self, text: str, lengths: Sequence[int]) -> list[Part]:
        if self._state == "text":  # no work a token
            return [Part("text", text, len(lengths))] if text or lengths else []
        parts: list[Part] = []
        for piece, num_tokens in pieces_of(text, lengths):
            self._held += piece
            self._num_held += num_tokens
            self._read(parts)
        return parts

    def flush(self) -> list[Part]:
        parts: list[Part] = []
        if self._state == "reasoning" or (self._state == "start" and self._is_inside):
            self._tell(parts, "reasoning", self._held.rstrip() if self._has_words else self._held.strip())
        else:
            self._tell(parts, "text", self._held)
        return parts

    def _read(self, parts: list[Part]) -> None:
        if self._state == "start":
            begun = self._held.lstrip()
            if begun.startswith(self._opening):
                self._state = "reasoning"
                self._tell(parts, "reasoning", "", rest=begun[len(self._opening) :])
            elif self._opening.startswith(begun):
                return
            else:
                self._state = "reasoning" if self._is_inside else "text"
        if self._state == "reasoning":
            at, end = min(((at, end) for end in self._ends if (at := self._held.find(end)) >= 0), default=(-1, ""))
            if at < 0:
                at = len(self._held) - length_of_beginning(self._held, self._ends)
            words = self._held[:at].rstrip()
            rest = self._held[at + len(end) :] if end == self._closing else self._held[at if end else len(words) :]
            words = words if self._has_words else words.lstrip()
            self._has_words |= bool(words)
            if end and end != self._closing:
                # The tokens that wait are those of the text that ends it.
                parts += [Part("reasoning", words)] if words else []
                self._held, self._state = rest, "text"
            elif words or end:
                self._tell(parts, "reasoning", words, rest=rest)
                self._state = "between" if end else "reasoning"
        if self._state == "between":
            self._held = self._held.lstrip()
            self._state = "text" if self._held else "between"
        if self._state == "text":
            self._tell(parts, "text", self._held)

    def _tell(self, parts: list[Part], kind: PartKind, words: str, rest: str = "") -> None:
        if words or self._num_held:
            parts.append(Part(kind, words, self._num_held))
        self._held, self._num_held = rest, 0


# -- gpt-oss -----------------------------------------------------------------------------------------------------------
_CHANNEL, _MESSAGE, _START = "<|channel|>", "<|message|>", "<|start|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>", _START)


@dataclass(frozen=True, slots=True)
class Harmony:
    """An answer of several messages: a header with a channel, `<|message|>`, the words, `<|end|>`. Those of the channel
    `analysis` are reasoning; all others are told, each on lines of its own."""

    name: str = "gpt-oss"

    prompt_tail_tokens = _TAIL_TOKENS
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
        return HarmonyParser(_kind(header) if message and prompt_tail.endswith(_MESSAGE) else None)


def _kind(header: str) -> PartKind:
    """Whose words follow it."""
    return "reasoning" if header.rpartition(_CHANNEL)[2].lstrip().startswith("analysis") else "text"


class HarmonyParser:
    """One sequence. open_kind: of the message that the prompt has opened, None if the answer begins with a header."""

    def __init__(self, open_kind: PartKind | None) -> None:
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
            if message:
                self._kind = _kind(header)
                self._needs_line = self._kind in self._told
                self._tell(parts, self._kind, "", rest=rest)
            elif not _is_header(self._held.lstrip()):
                self._kind = "text"  # a model that was tuned to write plain text
            return self._kind is not None
        at, end = min(((at, end) for end in _ENDS if (at := self._held.find(end)) >= 0), default=(-1, ""))
        if at >= 0:
            rest = self._held[at:] if end == _START else self._held[at + len(end) :]
            self._tell(parts, self._kind, self._held[:at], rest=rest)
            self._kind = None
            return True
        end_of_words = len(self._held) - length_of_beginning(self._held, _ENDS)
        if end_of_words or not self._held:
            self._tell(parts, self._kind, self._held[:end_of_words], rest=self._held[end_of_words:])
        return False

    def _tell(self, parts: list[Part], kind: PartKind, words: str, rest: str = "") -> None:
        if words:
            words = "\n" + words if self._needs_line else words
            self._needs_line = False
            self._told.add(kind)
        if words or self._num_held:
            parts.append(Part(kind, words, self._num_held))
        self._held, self._num_held = rest, 0


def _is_header(text: str) -> bool:
    """Whether `text` may be the beginning of one."""
    return any(text.startswith(mark) or mark.startswith(text) for mark in (_CHANNEL, _START, _MESSAGE))


# -- by name ----------------------------------------------------------------------------------------------------------
_THINK = ReasoningPair("qwen3", "<think>", "</think>")
PANGU = ReasoningPair("openpangu", "[unused16]", "[unused17]")
TOLD_BY_MARKERS: tuple[Harmony | ReasoningPair, ...] = (
    Harmony(),
    ReasoningPair("gemma4", "<|channel>thought", "<channel|>"),
    ReasoningPair("minimax-m3", "<mm:think>", "</mm:think>"),
    ReasoningPair("kimi", "◁think▷", "◁/think▷"),
    ReasoningPair("cohere_command4", "<|START_THINKING|>", "<|END_THINKING|>"),
    ReasoningPair("apertus2509", "<|inner_prefix|>", "<|inner_suffix|>"),
    ReasoningPair("mistral", "[THINK]", "[/THINK]"),
    _THINK,
)
"""Those that a model's template or vocabulary says it has: the first whose last marker is there."""

_HYBRID = (
    "qwen3", "glm45", "kimi_k2", "hunyuan", "deepseek-v3", "deepseek-v4", "deepseek-v41", "dots",
    "granite_thinking_parser", "interns1", "ling3", "mimo", "nanbeige", "nemotron_3", "poolside_v1",
)  # fmt: skip
"""Whether one of these reasons is said by its template and seen in its answer."""

_ALWAYS = ("deepseek-r1", "qwen3-thinking", "minimax", "step3", "step3p5", "gigachat35")

REASONING_FORMATS: Mapping[str, WireFormat] = {
    **{wire_format.name: wire_format for wire_format in (*TOLD_BY_MARKERS, PANGU)},
    **{name: replace(_THINK, name=name) for name in _HYBRID},
    **{name: replace(_THINK, name=name, starts_inside=True) for name in _ALWAYS},
}
"""By the names that `reasoning_parser` takes: SGLang's, and vLLM's for openPangu."""
