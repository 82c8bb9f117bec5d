"""Wire formats made for tests: small ones, with all that real ones have."""

from __future__ import annotations

from collections.abc import Sequence

from mooli.frontend.parts import Part, PartKind
from mooli.frontend.tools import ToolSet


class ThinkFormat:
    """Reasoning between <think> and </think>; an answer begins in it where the prompt ends so."""

    name = "think"
    prompt_tail_tokens = len("<think>")  # of the byte tokenizer
    marker_tokens = ()
    calls = None

    @property
    def without_reasoning(self) -> ThinkFormat:
        return self

    def with_tools(self, tools: ToolSet) -> ThinkFormat:
        return self

    def parser(self, prompt_tail: str) -> ThinkParser:
        return ThinkParser("reasoning" if prompt_tail.endswith("<think>") else "text")


class ThinkParser:
    def __init__(self, kind: PartKind) -> None:
        self._kind = kind
        self._held = ""
        self._num_held = 0

    def push(self, text: str, lengths: Sequence[int]) -> list[Part]:
        parts: list[Part] = []
        start = 0
        for length in lengths:
            parts += self._next(text[start : start + length], 1)
            start += length
        return parts + (self._next(text[start:], 0) if text[start:] else [])

    def flush(self) -> list[Part]:
        return [Part(self._kind, self._held, self._num_held)] if self._held else []

    def _next(self, piece: str, num_tokens: int) -> list[Part]:
        self._held += piece
        self._num_held += num_tokens
        parts: list[Part] = []
        while self._marker in self._held:
            before, self._held = self._held.split(self._marker, 1)
            # Both markers count as reasoning.
            parts += [Part(self._kind, before), Part("reasoning", "", self._num_held)]
            self._kind, self._num_held = "reasoning" if self._kind == "text" else "text", 0
        shown = len(self._held) - max(i for i in range(8) if self._held.endswith(self._marker[:i]))
        if shown or not self._held:
            parts.append(Part(self._kind, self._held[:shown], self._num_held))
            self._held, self._num_held = self._held[shown:], 0
        return parts

    @property
    def _marker(self) -> str:
        return "<think>" if self._kind == "text" else "</think>"


class BracketFormat:
    """A character each: (reasoning)text[function:arguments]."""

    name = "bracket"
    prompt_tail_tokens = 0
    marker_tokens = ()
    calls = None

    @property
    def without_reasoning(self) -> BracketFormat:
        return self

    def with_tools(self, tools: ToolSet) -> BracketFormat:
        return self

    def parser(self, prompt_tail: str) -> BracketParser:
        return BracketParser()


class BracketParser:
    def __init__(self) -> None:
        self._kind: PartKind = "text"
        self._name = ""
        self._num_held = 0
        self._num_calls = 0

    def push(self, text: str, lengths: Sequence[int]) -> list[Part]:
        pieces, start = [], 0
        for length in lengths:
            pieces.append((text[start : start + length], 1))
            start += length
        return [part for piece, num_tokens in [*pieces, (text[start:], 0)] for part in self._next(piece, num_tokens)]

    def flush(self) -> list[Part]:
        return []

    def _next(self, piece: str, num_tokens: int) -> list[Part]:
        self._num_held += num_tokens
        call = self._num_calls - 1
        if piece in ("(", ")"):
            self._kind = "reasoning" if piece == "(" else "text"
            return [self._part("reasoning", "")]
        if piece == "[":
            self._kind, self._name = "call_begin", ""
            return []
        if piece == ":" and self._kind == "call_begin":
            self._kind, self._num_calls = "arguments", self._num_calls + 1
            return [self._part("call_begin", self._name, self._num_calls - 1, call_id=f"call_{self._num_calls - 1}")]
        if piece == "]" and self._kind == "arguments":
            self._kind = "text"
            return [self._part("call_end", "", call)]
        if self._kind == "call_begin":
            self._name += piece
            return []
        return [self._part(self._kind, piece, call if self._kind == "arguments" else 0)]

    def _part(self, kind: PartKind, text: str, call: int = 0, call_id: str = "") -> Part:
        num_tokens, self._num_held = self._num_held, 0
        return Part(kind, text, num_tokens, call, call_id)
