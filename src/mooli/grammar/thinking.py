"""A bound on reasoning: after so many tokens its closing text comes, whatever the model would say.

Owns where an output stands in its reasoning, byte by byte, so that closing text is found however it is cut into tokens.
What else holds for the output is another constraint, asked as well. Never compiles, and works without a grammar.

A character that is half written is finished first, and closing text that is half written is only completed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mooli.errors import GrammarError
from mooli.types import ThinkingBudget, TokenBytes

_SPACES = b" \t\r\n"
_ALL = np.uint32(0xFFFFFFFF)


class Held(Protocol):
    """The part of `mooli.scheduler.constraint.Constraint` that is asked here."""

    @property
    def is_ready(self) -> bool: ...

    @property
    def has_ended(self) -> bool: ...

    def num_allowed(self, draft_ids: Sequence[int]) -> int: ...

    def forced(self, most: int) -> Sequence[int]: ...

    def mask(self, draft_ids: Sequence[int], allowed: NDArray[np.uint32]) -> None: ...

    def advance(self, token_ids: Sequence[int]) -> None: ...


class Place(NamedTuple):
    """Where an output is. phase: reasoning may begin here, goes on, or is over. matched: bytes of the text that would
    change that. num_tokens: of reasoning by now. num_missing: bytes that the last character still needs."""

    phase: Literal["before", "inside", "over"]
    matched: int = 0
    num_tokens: int = 0
    num_missing: int = 0


class Markers:
    """The texts around one kind of reasoning, and the tokens that write its closing one. Shared, never changed.

    Raises GrammarError where no tokens write it.
    """

    def __init__(self, budget: ThinkingBudget, vocabulary: TokenBytes) -> None:
        reasoning = budget.reasoning
        if reasoning is None:
            raise GrammarError("max_thinking_tokens: it is not known how this model's answers begin to reason")
        self.start = Place("inside" if reasoning.is_open else "before")
        self._tokens = vocabulary.tokens
        self._opening = reasoning.opening.encode()
        self._again = (reasoning.again + reasoning.opening).encode() if reasoning.again else b""
        self._closing = reasoning.closing.encode()
        self._failures = _failures(self._closing)
        special = frozenset(vocabulary.special_ids)
        ids: dict[bytes, int] = {}
        for token_id, token in enumerate(vocabulary.tokens):
            if token and token in self._closing and token_id not in special:
                ids.setdefault(token, token_id)
        self._next_ids = [self._longest(ids, start) for start in range(len(self._closing))]

    def _longest(self, ids: dict[bytes, int], start: int) -> int:
        """The token that writes most of the rest of the closing text."""
        rest = self._closing[start:]
        for length in range(len(rest), 0, -1):
            if rest[:length] in ids:
                return ids[rest[:length]]
        raise GrammarError(f"max_thinking_tokens: no token of this model writes {rest!r}, which ends its reasoning")

    def after(self, place: Place, token_id: int) -> Place:
        """Where an output is with one token more."""
        if place.phase == "over":
            return place
        was_inside = place.phase == "inside"
        for byte in self._tokens[token_id] if token_id < len(self._tokens) else b"":
            place = self._after_byte(place, byte)
            if place.phase == "over":
                return place
        return place._replace(num_tokens=place.num_tokens + 1) if was_inside else place

    def _after_byte(self, place: Place, byte: int) -> Place:
        if place.phase == "before":
            # Tokens of reasoning there was before: only then is it another one that begins.
            opening = self._again if place.num_tokens else self._opening
            if byte == opening[place.matched]:
                matched = place.matched + 1
                return place._replace(phase="inside", matched=0) if matched == len(opening) else _at(place, matched)
            return place if place.matched == 0 and byte in _SPACES else Place("over")
        matched = place.matched
        while matched and byte != self._closing[matched]:
            matched = self._failures[matched - 1]
        matched += byte == self._closing[matched]
        if matched == len(self._closing):
            if not self._again:
                return Place("over")
            return Place("before", num_tokens=max(1, place.num_tokens))
        return place._replace(matched=matched, num_missing=_num_missing(place.num_missing, byte))

    def must_follow(self, place: Place, max_tokens: int) -> int | None:
        """The id that the closing text goes on with, where it is due."""
        if place.phase != "inside" or place.num_missing or place.num_tokens < max_tokens:
            return None
        return self._next_ids[place.matched]


def _at(place: Place, matched: int) -> Place:
    return place._replace(matched=matched)


def _failures(text: bytes) -> list[int]:
    """For each prefix, how much of its end begins the text again (Knuth, Morris, Pratt 1977)."""
    found = [0] * len(text)
    length = 0
    for i in range(1, len(text)):
        while length and text[i] != text[length]:
            length = found[length - 1]
        length += text[i] == text[length]
        found[i] = length
    return found


def _num_missing(before: int, byte: int) -> int:
    """Bytes of UTF-8 that must follow `byte`; what is no UTF-8 needs none."""
    if byte & 0xC0 == 0x80:
        return max(0, before - 1)
    return 3 if byte >= 0xF0 else 2 if byte >= 0xE0 else 1 if byte >= 0xC0 else 0


class ThinkingConstraint:
    """See `mooli.scheduler.constraint.Constraint`. held: what else the output is held to."""

    def __init__(self, max_tokens: int, markers: Markers, held: Held | None) -> None:
        self._max_tokens = max_tokens
        self._markers = markers
        self._held = held
        self._place = markers.start

    @property
    def is_ready(self) -> bool:
        return self._held is None or self._held.is_ready

    @property
    def has_ended(self) -> bool:
        return self._held is not None and self._held.has_ended

    def num_allowed(self, draft_ids: Sequence[int]) -> int:
        place, count = self._place, 0
        for token_id in draft_ids:
            must = self._markers.must_follow(place, self._max_tokens)
            if must is not None and token_id != must:
                break
            place, count = self._markers.after(place, token_id), count + 1
        return count if self._held is None else self._held.num_allowed(draft_ids[:count])

    def forced(self, most: int) -> Sequence[int]:
        run: list[int] = []
        place = self._place
        while len(run) < most and (must := self._markers.must_follow(place, self._max_tokens)) is not None:
            run.append(must)
            place = self._markers.after(place, must)
        if run or self._held is None:
            return run[: self.num_allowed(run)]
        run = list(self._held.forced(most))
        return run[: self.num_allowed(run)]

    def mask(self, draft_ids: Sequence[int], allowed: NDArray[np.uint32]) -> None:
        if self._held is None:
            allowed[:] = _ALL
        else:
            self._held.mask(draft_ids, allowed)
        place = self._place
        for i, row in enumerate(allowed):
            must = self._markers.must_follow(place, self._max_tokens)
            if must is not None:
                word, bit = must // 32, np.uint32(1 << must % 32)
                is_allowed = row[word] & bit
                row[:] = 0
                row[word] = is_allowed
            if i < len(draft_ids):
                place = self._markers.after(place, draft_ids[i])

    def advance(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            self._place = self._markers.after(self._place, token_id)
        if self._held is not None:
            self._held.advance(token_ids)
