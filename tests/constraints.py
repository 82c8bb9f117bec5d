"""Constraints for tests: rules that are functions of the output alone, and the constraint that each of them makes.

Owns what a rule allows. A test that decodes token by token asks the rule; what is tested asks the constraint, which
proves on the way that nobody tells it of a token that did not count.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Rule(Protocol):
    """What may follow an output."""

    def allowed(self, output: Sequence[int]) -> NDArray[np.bool_]:
        """Whether each id may follow, bool (vocab,)."""
        ...

    def has_ended(self, output: Sequence[int]) -> bool: ...


class Even:
    """Only even ids, for ever."""

    def __init__(self, vocab_size: int) -> None:
        self._allowed = np.arange(vocab_size) % 2 == 0

    def allowed(self, output: Sequence[int]) -> NDArray[np.bool_]:
        return self._allowed

    def has_ended(self, output: Sequence[int]) -> bool:
        return False


class NotTwice:
    """No id twice in a row."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def allowed(self, output: Sequence[int]) -> NDArray[np.bool_]:
        allowed = np.ones(self._vocab_size, np.bool_)
        if output:
            allowed[output[-1]] = False
        return allowed

    def has_ended(self, output: Sequence[int]) -> bool:
        return False


class Automaton:
    """A random automaton of a few states: each has its own ids, and a token leads to a state that depends on it.

    Some states leave a single id. num_ends: how many of the states end the output.
    """

    NUM_STATES = 6

    def __init__(self, vocab_size: int, seed: int, num_ends: int = 0) -> None:
        rng = random.Random(seed)
        self._num_ends = num_ends
        self._salt = rng.randrange(1, 1000)
        self._of_state = []
        for _ in range(self.NUM_STATES):
            some = rng.sample(range(vocab_size), min(vocab_size, rng.choice([1, 2, 5, max(1, vocab_size // 2)])))
            self._of_state.append(np.isin(np.arange(vocab_size), some))

    def allowed(self, output: Sequence[int]) -> NDArray[np.bool_]:
        return self._of_state[self._state(output)]

    def has_ended(self, output: Sequence[int]) -> bool:
        return len(output) > 0 and self._state(output) < self._num_ends

    def _state(self, output: Sequence[int]) -> int:
        state = self.NUM_STATES - 1
        for token_id in output:
            state = (7 * state + (token_id + 1) * self._salt) % self.NUM_STATES
        return state


class Spelled:
    """One id of half the vocabulary, then a run of ids that follows from it; and again, for `length` ids or so."""

    def __init__(self, vocab_size: int, seed: int, length: int = 30) -> None:
        self._vocab_size = vocab_size
        self._seed = seed
        self._length = length

    def allowed(self, output: Sequence[int]) -> NDArray[np.bool_]:
        ids = np.arange(self._vocab_size)
        place = self._place(output)
        if place == 0:
            return ids % 2 == self._seed % 2
        return ids == (output[-1] * 5 + place + self._seed) % self._vocab_size

    def has_ended(self, output: Sequence[int]) -> bool:
        return len(output) >= self._length and self._place(output) == 0

    def _place(self, output: Sequence[int]) -> int:
        """In a run, 0 between two. Runs have 3, 5 and 7 ids in turn."""
        place = len(output) % 18
        return next(place - first for first in (10, 4, 0) if place >= first)


class RuleConstraint:
    """A rule as a `Constraint`, with its output so far in `output`."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.output: list[int] = []

    @property
    def is_ready(self) -> bool:
        return True

    @property
    def has_ended(self) -> bool:
        return self.rule.has_ended(self.output)

    def num_allowed(self, draft_ids: Sequence[int]) -> int:
        output = list(self.output)
        for index, draft in enumerate(draft_ids):
            if not self.rule.allowed(output)[draft]:
                return index
            output.append(draft)
            if self.rule.has_ended(output):
                return index
        return len(draft_ids)

    def forced(self, most: int) -> list[int]:
        run: list[int] = []
        while len(run) < most:
            only = np.flatnonzero(self.rule.allowed([*self.output, *run]))
            if len(only) != 1 or self.rule.has_ended([*self.output, *run, int(only[0])]):
                break
            run.append(int(only[0]))
        return run

    def mask(self, draft_ids: Sequence[int], allowed: NDArray[np.uint32]) -> None:
        assert self.num_allowed(draft_ids) == len(draft_ids), "a guess that cannot come is asked about"
        assert len(allowed) == 1 + len(draft_ids) and not allowed.any()
        assert not self.has_ended, "what may follow is asked after the end"
        for row in range(len(allowed)):
            bits = self.rule.allowed([*self.output, *draft_ids[:row]])
            allowed[row] = words_of(bits, allowed.shape[1])

    def advance(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            assert not self.has_ended and self.rule.allowed(self.output)[token_id], "a token that was not allowed"
            self.output.append(token_id)


class Bold(RuleConstraint):
    """Takes for forced what is only possible, too."""

    def forced(self, most: int) -> list[int]:
        run = super().forced(most)
        for token_id in np.flatnonzero(self.rule.allowed([*self.output, *run]))[:1].tolist():
            if len(run) < most and not self.rule.has_ended([*self.output, *run, token_id]):
                run.append(token_id)
        return run


def words_of(allowed: NDArray[np.bool_], num_words: int) -> NDArray[np.uint32]:
    """The bits as words, with ones after the last id: nobody may look there."""
    padded = np.ones(32 * num_words, np.bool_)
    padded[: len(allowed)] = allowed
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32)
