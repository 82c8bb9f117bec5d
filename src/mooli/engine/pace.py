"""How many prompt tokens a step may take while streams wait for it.

Owns the measured speed of prompts and the arithmetic. Never decides what runs: the scheduler keeps to the number.

A stream's gap is the length of the step beside it. Tokens are what a scheduler counts, milliseconds what a reader of a
stream feels, and between them lies the speed of this machine with this model, which is known after the first prompts.
"""

from __future__ import annotations

from mooli.scheduler.stats import StepStats

STEP_S = 0.15
"""How long a step may be that streams wait for: a slow reader's pace of seven tokens a second."""

SHORTEST_SAMPLE_TOKENS = 64
"""Steps with fewer prompt tokens say little about the speed of prompts: reading the weights dominates them."""

MEMORY = 0.5
"""Weight of the speed so far against the newest step."""


class Pace:
    """least, most: bounds of the number, in tokens. Until a prompt has been measured it is `least`."""

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._tokens_per_s = 0.0

    def learn(self, step: StepStats, seconds: float) -> None:
        """A step has taken `seconds`."""
        tokens = step.prefill_tokens
        if tokens < min(SHORTEST_SAMPLE_TOKENS, self._most) or seconds <= 0:
            return
        speed = tokens / seconds
        self._tokens_per_s = MEMORY * self._tokens_per_s + (1 - MEMORY) * speed if self._tokens_per_s else speed

    @property
    def prefill_tokens(self) -> int:
        return max(self._least, min(self._most, int(self._tokens_per_s * STEP_S)))
