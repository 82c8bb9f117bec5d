"""How fast this machine computes prompts and loads pages, and which of the two is the shorter way to a prefix.

Owns measured speeds and the break-even between them. Never decides what runs.
"""

from __future__ import annotations

import math

from mooli.scheduler.stats import StepStats

SHORTEST_SAMPLE_TOKENS = 64
"""Steps with fewer prompt tokens say little about the speed of prompts: reading the weights dominates them."""

SLOWER_MEMORY, FASTER_MEMORY = 0.5, 0.9
"""Weight of the speed so far against a newest step that was slower, or faster. Tokens far back in a context take twice
as long as first ones: beside short prompts of others a long one must not look fast."""


class PromptSpeed:
    """Tokens of prompts computed in a second, from the steps that computed some. most: tokens of a step."""

    def __init__(self, most: int) -> None:
        self.tokens_per_s = 0.0
        """0 before a prompt has been measured."""
        self._least_sample = min(SHORTEST_SAMPLE_TOKENS, most)

    def learn(self, step: StepStats, seconds: float) -> None:
        """A step has taken `seconds`."""
        tokens = step.prefill_tokens
        if tokens < self._least_sample or seconds <= 0:
            return
        speed = tokens / seconds
        before = self.tokens_per_s or speed
        memory = SLOWER_MEMORY if speed < before else FASTER_MEMORY
        self.tokens_per_s = memory * before + (1 - memory) * speed


LOOKUP_S = 0.01
"""What a load takes besides its bytes: the way to the thread that reads and back, and the seeks of a disk."""

SUPPOSED_BYTES_PER_S = 5e8
"""Of loads, before one has been measured: a disk of today."""

LOAD_MEMORY = 0.7
"""Weight of the speed of loads so far against that of the newest."""

LEAST_WAIT_S, UNMEASURED_WAIT_S = 0.25, 10.0
"""How long a load is waited for at least, and where it is not known how long computing would take."""


class BreakEven:
    """Loading n tokens takes t0 + n k / B seconds, and computing them n / r: from L = t0 / (1 / r - k / B) tokens on
    loading is the shorter way, with k bytes a token, B bytes and r tokens a second. Where k / B is not below 1 / r it
    never is. lookup_s, supposed_bytes_per_s: t0, and B before it is measured."""

    def __init__(
        self,
        bytes_per_token: float,
        most_step_tokens: int,
        lookup_s: float = LOOKUP_S,
        supposed_bytes_per_s: float = SUPPOSED_BYTES_PER_S,
    ) -> None:
        self.bytes_per_s = 0.0
        """At which pages are read; 0 before any have been."""
        self._lookup_s = lookup_s
        self._supposed_bytes_per_s = supposed_bytes_per_s
        self._bytes_per_token = bytes_per_token
        self._prompts = PromptSpeed(most_step_tokens)

    def learn_step(self, step: StepStats, seconds: float) -> None:
        """A step has taken `seconds`."""
        self._prompts.learn(step, seconds)

    def learn_load(self, num_bytes: int, seconds: float) -> None:
        """Reading so many bytes has taken `seconds`."""
        speed = num_bytes / max(seconds, 1e-6)
        before = self.bytes_per_s or speed
        self.bytes_per_s = LOAD_MEMORY * before + (1 - LOAD_MEMORY) * speed

    @property
    def least_tokens(self) -> float:
        """From how many tokens on a prefix is loaded: infinite for never, 1 before a prompt has been measured."""
        return self._tokens_for(self._lookup_s) if self._prompts.tokens_per_s else 1.0

    def tokens_for(self, num_bytes: int) -> float:
        """How many more it must be where the load has so many bytes besides: 0 before a prompt has been measured."""
        return self._tokens_for(num_bytes / self._speed)

    @property
    def _speed(self) -> float:
        return self.bytes_per_s or self._supposed_bytes_per_s

    def _tokens_for(self, seconds: float) -> float:
        if not self._prompts.tokens_per_s:
            return 0.0
        gained_s = 1 / self._prompts.tokens_per_s - self._bytes_per_token / self._speed
        return seconds / gained_s if gained_s > 0 else math.inf

    def patience_s(self, num_tokens: int) -> float:
        """How long to wait for a load of so many tokens: as long as computing them would take."""
        if not self._prompts.tokens_per_s:
            return UNMEASURED_WAIT_S
        return max(LEAST_WAIT_S, num_tokens / self._prompts.tokens_per_s)
