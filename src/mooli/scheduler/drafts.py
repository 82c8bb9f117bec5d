"""Guesses at the tokens a request will sample next, so that one step can verify several of them.

Owns where the guesses come from and when a request is better left without. Never touches pages, and never decides what
a token is: a wrong guess costs the time of its row, and no guess changes an answer.

Two sources, and no model. What other requests had after the same tokens from the start on is in the radix tree: an
answer that is asked for again is there whole. Otherwise, what the request's own tokens had after the longest run like
the one at their end (prompt lookup: Saxena, github.com/apoorvumang/prompt-lookup-decoding; Yang et al., LLMA, arXiv
2304.04487): code that is given to be changed is mostly given back. Verification: Leviathan et al., arXiv 2211.17192; as
each sampled token is a function of the tokens before it, a draft is right if it is that very token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mooli.cache.kv_cache import KVCache
from mooli.cache.radix_tree import token_key
from mooli.cache.request_pages import RequestPages
from mooli.errors import ConfigError
from mooli.types import DraftCounts

MEMORY = 0.8
"""Weight of what was so far in the average of right drafts a step, against the newest step."""

WORTH = 0.3
"""A request with fewer right drafts a step on average than this pauses: a step of four rows may cost a fifth more."""

FIRST_PAUSE, LONGEST_PAUSE = 8, 128
"""Steps without drafts. Doubled each time a request tries again for nothing."""


@dataclass(frozen=True, slots=True)
class DraftSettings:
    """tokens_per_request: computed for one request in a step at most, its known token and the drafts after it.

    tokens_per_step: a step has drafts only as far as it then computes no more tokens than this.
    shortest_match, longest_match: how many tokens at the end must have come before in the request, and how many are
    compared to find the place that is most like it.

    Raises ConfigError for values that guess nothing.
    """

    tokens_per_request: int
    tokens_per_step: int
    shortest_match: int
    longest_match: int

    def __post_init__(self) -> None:
        if self.tokens_per_request < 2 or self.tokens_per_step < 2:
            raise ConfigError(f"{self} leaves no token for a draft: use 2 or more")
        if not 1 <= self.shortest_match <= self.longest_match:
            raise ConfigError(f"{self}: shortest_match must be at least 1 and at most longest_match")


@dataclass(frozen=True, slots=True)
class ForcedSettings:
    """How much a step computes of what constraints force (see `Constraint.forced`).

    tokens_per_request: forced tokens of one request at most. tokens_per_step: of all requests. Each of them has logits
    and a mask of its own, so this bounds memory; where they come is where a prompt of as many tokens would.

    Raises ConfigError for values that compute nothing.
    """

    tokens_per_request: int = 24
    tokens_per_step: int = 64

    def __post_init__(self) -> None:
        if self.tokens_per_request < 1 or self.tokens_per_step < 1:
            raise ConfigError(f"{self} computes no forced token: use 1 or more")


@dataclass(slots=True)
class DraftRecord:
    """How the drafts of one request have fared.

    num_proposed, histogram: see `DraftCounts`.
    average: right drafts a step with drafts, of late. pause: steps still to go without; next_pause: length of the next.
    """

    num_proposed: int = 0
    histogram: list[int] = field(default_factory=list)
    average: float = 1.0
    pause: int = 0
    next_pause: int = FIRST_PAUSE

    @property
    def counts(self) -> DraftCounts:
        return DraftCounts(self.num_proposed, tuple(self.histogram))

    def learn(self, num_proposed: int, num_right: int) -> None:
        """A step has continued the output: `num_right` of `num_proposed` drafts were what was sampled."""
        self.num_proposed += num_proposed
        self.histogram += [0] * (num_right + 1 - len(self.histogram))
        self.histogram[num_right] += 1
        if not num_proposed:
            return
        self.average = MEMORY * self.average + (1 - MEMORY) * num_right
        if self.average < WORTH:
            self.pause, self.next_pause = self.next_pause, min(2 * self.next_pause, LONGEST_PAUSE)
            self.average = WORTH
        elif num_right:
            self.next_pause = FIRST_PAUSE


class Drafts:
    """Proposes drafts. One per scheduler; it keeps nothing of a request."""

    def __init__(self, settings: DraftSettings, cache: KVCache) -> None:
        self.settings = settings
        self._cache = cache

    def propose(
        self,
        tokens: NDArray[np.int32],
        key_ids: NDArray[np.int32],
        held: RequestPages,
        record: DraftRecord,
        most: int,
    ) -> list[int]:
        """Up to `most` ids that may follow `tokens` (all of a running request's); none where no guess is worth it.

        key_ids: what the cache knows `tokens` by.
        """
        most = min(most, self.settings.tokens_per_request - 1)
        if record.pause:
            record.pause -= 1
            return []
        if most < 1:
            return []
        unshared = token_key(key_ids[held.num_shared * self._cache.page_size :])
        return self._cache.following(held, unshared, most) or what_followed(
            tokens, most, self.settings.shortest_match, self.settings.longest_match
        )


def what_followed(tokens: NDArray[np.int32], most: int, shortest: int, longest: int) -> list[int]:
    """Up to `most` tokens after the latest of those earlier places where most tokens are as at the end.

    At least `shortest` tokens must agree, and `longest` are compared. No index is kept: comparing all tokens with one
    takes microseconds per ten thousand, and the step that follows attends to each of them in every layer.
    """
    last = len(tokens) - 1
    ends = np.flatnonzero(tokens[:last] == tokens[last])
    for length in range(1, longest):
        longer = ends[ends >= length]
        longer = longer[tokens[longer - length] == tokens[last - length]]
        if not len(longer):
            if length < shortest:
                return []
            break
        ends = longer
    if not len(ends):
        return []
    first = int(ends[-1]) + 1
    followed: list[int] = tokens[first : first + most].tolist()
    return followed
