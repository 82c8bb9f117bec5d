"""Formats that tell reasoning from the answer: pairs of markers, and beside them channels, of gpt-oss and Kimi K3.

Owns the pairs and SGLang's names for them. Parsers are pure functions of the text, token by token, so that their
parts never depend on the cut. Knows no calls of tools but the texts that they begin with, which may end reasoning.

Whether an answer begins inside its reasoning is read from the end of its prompt: many templates open it there.
Reasoning is told without the white space around it, and the answer without that between the two, which templates write
again. Markers count as reasoning.

Sources: the chat templates of the models; SGLang's `--reasoning-parser`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mooli.frontend.parts import PLAIN_TEXT, Parser, Part, PartKind, WireFormat
from mooli.frontend.tools import ToolSet
from mooli.frontend.wire_formats.calls import TAIL_TOKENS, CallParser, Waiting, length_of_beginning, pieces_of
from mooli.frontend.wire_formats.harmony import Harmony
from mooli.types import Reasoning


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

    prompt_tail_tokens = TAIL_TOKENS
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

    def parser(self, prompt_tail: str) -> Parser:
        return PairParser(self, is_inside=self._is_inside(prompt_tail.rstrip()))

    def reasoning_ahead(self, prompt_tail: str) -> Reasoning | None:
        tail = prompt_tail.rstrip()
        if tail.endswith(self.closing):
            return None
        return Reasoning(self.opening, self.closing, is_open=self._is_inside(tail))

    def _is_inside(self, tail: str) -> bool:
        return tail.endswith(self.opening) or (self.starts_inside and not tail.endswith(self.closing))


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


class PassedOn:
    """One sequence that two parsers read: what `reasoning` says is text, `rest` reads, token by token."""

    def __init__(self, reasoning: Parser, rest: Parser) -> None:
        self._reasoning = reasoning
        self._rest = rest

    def push(self, text: str, lengths: Sequence[int]) -> list[Part]:
        parts: list[Part] = []
        for piece, num_tokens in pieces_of(text, lengths):
            self._pass_on(self._reasoning.push(piece, [len(piece)] * num_tokens), parts)
        return parts

    def flush(self) -> list[Part]:
        parts: list[Part] = []
        self._pass_on(self._reasoning.flush(), parts)
        return [*parts, *self._rest.flush()]

    def _pass_on(self, found: Sequence[Part], parts: list[Part]) -> None:
        for part in found:
            if part.kind != "text":
                parts.append(part)
            elif part.num_tokens:
                # All but the last were held back until the text was certain.
                parts += self._rest.push(part.text, [0] * (part.num_tokens - 1) + [len(part.text)])
            else:
                parts += self._rest.push(part.text, [])


# -- channels of Kimi K3 -----------------------------------------------------------------------------------------------
_TOOLS, _TOOLS_END = "<|open|>tools<|sep|>", "<|close|>tools<|sep|>"
_RESPONSE = "<|open|>response<|sep|>"
_NO_WORDS = (_RESPONSE, "<|close|>response<|sep|>", "<|close|>message<|sep|>")


@dataclass(frozen=True, slots=True)
class KimiK3(ReasoningPair):
    """Reasoning, answer and calls stand in channels. The marks around the answer are left out, but not those in calls,
    which are read on as they are."""

    name: str = "kimi_k3"
    opening: str = "<|open|>think<|sep|>"
    closing: str = "<|close|>think<|sep|>"

    @property
    def marker_tokens(self) -> tuple[str, ...]:
        return ("<|open|>", "<|close|>", "<|sep|>")

    def parser(self, prompt_tail: str) -> Parser:
        return PassedOn(super(KimiK3, self).parser(prompt_tail), KimiK3Answer(ToolSet(())))

    def reasoning_ahead(self, prompt_tail: str) -> Reasoning | None:
        found = super(KimiK3, self).reasoning_ahead(prompt_tail)
        is_begun = prompt_tail.rstrip().endswith(_RESPONSE)
        return None if found is None or is_begun else replace(found, words=_RESPONSE)


class KimiK3Answer(CallParser):
    """One sequence behind its reasoning. It finds no calls, and only knows where they are."""

    def _read(self) -> Waiting[None]:
        while mark := (yield from self._text_until(*_NO_WORDS, _TOOLS)):
            if mark != _TOOLS:
                self._tell_text(self._at - len(mark))
                self._at = len(mark)
                continue
            self._tell_text(self._at)
            if (yield from self._text_until(_TOOLS_END)):
                self._tell_text(self._at)


# -- by name ----------------------------------------------------------------------------------------------------------
_THINK = ReasoningPair("qwen3", "<think>", "</think>")
PANGU = ReasoningPair("openpangu", "[unused16]", "[unused17]")
TOLD_BY_MARKERS: tuple[Harmony | ReasoningPair, ...] = (
    Harmony(),
    KimiK3(),
    ReasoningPair("gemma4", "<|channel>thought", "<channel|>"),
    ReasoningPair("minimax-m3", "<mm:think>", "</mm:think>"),
    ReasoningPair("kimi", "◁think▷", "◁/think▷"),
    ReasoningPair("cohere_command4", "<|START_THINKING|>", "<|END_THINKING|>"),
    ReasoningPair("apertus2509", "<|inner_prefix|>", "<|inner_suffix|>"),
    ReasoningPair("mistral", "[THINK]", "[/THINK]"),
    _THINK,
)
"""Those that a model's template or vocabulary says it has: the first whose last marker is there, of Kimi K3 all."""

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
