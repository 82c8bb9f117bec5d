"""One output held to a grammar: the scheduler's `Constraint` over an llguidance matcher.

Owns a matcher from when its grammar is compiled. Never compiles. What llguidance keeps silent about is an error here: a
matcher in trouble stays in it and then allows nothing but the end, which would cut answers short without a word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from mooli.errors import GrammarError, GrammarTooLargeError

if TYPE_CHECKING:
    import llguidance


_LIMITS = re.compile(r"[Tt]oo many (states|items|expressions)|fuel exhausted")
"""Of llguidance's messages, those that say that a limit was met."""


class Compiled(Protocol):
    """matcher: at the start of the language, never moved; None while it is being made. is_spoilt: an output found what
    was built of the language too large. It is shared and only grows, so others must have it made anew."""

    matcher: llguidance.LLMatcher | None
    is_spoilt: bool


class GrammarConstraint:
    """See `mooli.scheduler.constraint.Constraint`."""

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled
        self._own: llguidance.LLMatcher | None = None
        self._num_tokens = 0

    @property
    def is_ready(self) -> bool:
        return self._compiled.matcher is not None

    @property
    def has_ended(self) -> bool:
        return self._matcher.is_stopped()

    def num_allowed(self, draft_ids: Sequence[int]) -> int:
        if not draft_ids:
            return 0
        probe = self._matcher.deep_copy()  # a rollback may take a token too many where the language ends
        count = probe.try_consume_tokens(list(draft_ids))
        if count and probe.is_stopped():
            count -= 1
        return count

    def forced(self, most: int) -> Sequence[int]:
        """How forced bytes are cut into tokens is the vocabulary's rule (`mooli.grammar.vocabulary`), in masks too."""
        matcher = self._matcher
        run = matcher.compute_ff_tokens()[:most]
        self._check(matcher)
        return run[: self.num_allowed(run)]

    def mask(self, draft_ids: Sequence[int], allowed: NDArray[np.uint32]) -> None:
        address, row_bytes = allowed.ctypes.data, allowed.shape[1] * allowed.itemsize
        self._fill(self._matcher, address, row_bytes)
        if not draft_ids:
            return
        probe = self._matcher.deep_copy()
        for token_id in draft_ids:
            address += row_bytes
            probe.consume_token(token_id)
            self._fill(probe, address, row_bytes)

    def advance(self, token_ids: Sequence[int]) -> None:
        matcher = self._matcher
        matcher.consume_tokens(list(token_ids))
        self._check(matcher)
        self._num_tokens += len(token_ids)

    def _fill(self, matcher: llguidance.LLMatcher, address: int, num_bytes: int) -> None:
        matcher.unsafe_compute_mask_ptr(address, num_bytes)
        self._check(matcher)

    def _check(self, matcher: llguidance.LLMatcher) -> None:
        if matcher.is_error():
            self._compiled.is_spoilt = True
            message = error_text(matcher.get_error())
            if matcher.stop_reason() in ("ParserTooComplex", "LexerTooComplex") or _LIMITS.search(message):
                raise GrammarTooLargeError(
                    f"what the output is held to became too large {self._num_tokens} tokens into the answer:"
                    f" use a simpler one ({message.splitlines()[0]})"
                )
            raise GrammarError(message)

    @property
    def _matcher(self) -> llguidance.LLMatcher:
        if self._own is None:
            if self._compiled.matcher is None:
                raise GrammarError("the grammar is not compiled yet")
            self._own = self._compiled.matcher.deep_copy()
        return self._own


def error_text(message: str) -> str:
    """What llguidance says, without its note that it says no more, and of a panic its words alone."""
    return message.split("<backtrace>")[0].replace("<non-verbose/>", "").strip()
