"""What restricts the tokens of one request, and what becomes of the request where that fails.

Owns the contract between the scheduler and whoever knows a language (a grammar, a schema, a list of choices): token ids
and bits, no text and no device. Never decides what runs, and never looks at logits: `TokenMasks` carry what is allowed
to the device.

A constraint stands after the last token of its request's output. It moves only with tokens that count: guesses are
asked about and leave no trace, and a request that gives way takes its constraint along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mooli.errors import GrammarError, GrammarTooLargeError
from mooli.types import FinishReason, Request


class Constraint(Protocol):
    """Which ids may follow the output of one request. Whatever it raises ends that request alone, with `error`."""

    @property
    def is_ready(self) -> bool:
        """False while it is being made, aside: its request waits, and nothing else is asked."""
        ...

    @property
    def has_ended(self) -> bool:
        """Nothing may follow: the output is complete."""
        ...

    def num_allowed(self, draft_ids: Sequence[int]) -> int:
        """How many of these guesses may follow, from the first on, each leaving something to follow it."""
        ...

    def forced(self, most: int) -> Sequence[int]:
        """Up to `most` ids, one after the other, that must come next, as far as that is known at once; each leaves
        something to follow it. They are verified like guesses, so that one that need not come costs time alone."""
        ...

    def mask(self, draft_ids: Sequence[int], allowed: NDArray[np.uint32]) -> None:
        """Set in row i of `allowed` the bits of the ids that may follow the first i of `draft_ids`.

        allowed: (1 + len(draft_ids), W), all zero, as in `TokenMasks`. All of `draft_ids` are allowed, as
        `num_allowed` says.
        """
        ...

    def advance(self, token_ids: Sequence[int]) -> None:
        """These were sampled, each from what was allowed."""
        ...


ConstraintMaker = Callable[[Request], Constraint | None]
"""A new constraint for a request, for each sample its own; None for a request that has none. May raise RequestError."""


class Constrained:
    """The constraint of one request, asked so that no failure of it reaches another request.

    failure: why the request must end; None while all is well. Nothing is asked after a failure.
    """

    def __init__(self, constraint: Constraint, vocab_size: int) -> None:
        self.failure: FinishReason | None = None
        self._constraint = constraint
        self._vocab_size = vocab_size

    @property
    def is_ready(self) -> bool:
        return self._constraint.is_ready

    def forced(self, most: int) -> list[int]:
        """Up to `most` ids that the output must go on with."""
        if self.failure is not None:
            return []
        try:
            return list(self._constraint.forced(most))
        except Exception as exc:
            self._fail(exc)
            return []

    def cut(self, draft_ids: list[int]) -> list[int]:
        """The guesses before the first that cannot come, or after which nothing could."""
        if self.failure is not None:
            return []
        try:
            return draft_ids[: self._constraint.num_allowed(draft_ids)]
        except Exception as exc:
            self._fail(exc)
            return []

    @property
    def num_words(self) -> int:
        """Of a row of `masks`."""
        return -(-self._vocab_size // 32)

    def masks(self, draft_ids: Sequence[int], allowed: NDArray[np.uint32]) -> bool:
        """Fill `allowed`, (1 + len(draft_ids), num_words) and all zero: a row for what may follow the output, and one
        for what may follow each draft. False on failure, and then what is in it means nothing."""
        if self.failure is not None:
            return False
        try:
            self._constraint.mask(draft_ids, allowed)
        except Exception as exc:
            self._fail(exc)
            return False
        if self._vocab_size % 32:
            allowed[:, -1] &= np.uint32((1 << self._vocab_size % 32) - 1)
        if all(row.max() for row in allowed):
            return True
        self.failure = _failure(
            "the constraint of the output allows no token of the vocabulary here, and has not ended"
        )
        return False

    def advance(self, token_ids: Sequence[int]) -> FinishReason | None:
        """The output has got these. Why the request ends with them: the constraint has ended or failed; None if not."""
        try:
            self._constraint.advance(token_ids)
            return FinishReason("stop", matched=token_ids[-1]) if self._constraint.has_ended else None
        except Exception as exc:
            self._fail(exc)
            return self.failure

    def _fail(self, exc: Exception) -> None:
        if isinstance(exc, GrammarTooLargeError):  # its sender's fault, told as a grammar that was refused
            self.failure = FinishReason("error", message=str(exc), status_code=400, err_type=GrammarError.__name__)
            return
        self.failure = _failure(f"the constraint of the output failed: {type(exc).__name__}: {exc}")


def _failure(message: str) -> FinishReason:
    return FinishReason("error", message=message, status_code=500, err_type="ConstraintError")


def holds_no_other(words: NDArray[np.uint32], token_ids: frozenset[int]) -> bool:
    """Whether a mask allows nothing but some of `token_ids`. words: uint32 (W,)."""
    rest = words.copy()
    for token_id in token_ids:
        if token_id < 32 * len(rest):
            rest[token_id // 32] &= ~np.uint32(1 << token_id % 32)
    return not rest.any()
