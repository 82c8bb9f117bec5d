"""Numbers about what the scheduler did, for logs and metrics.

Owns plain counts. Never influences a decision.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class Counters:
    """Since the start; none ever goes down.

    prompt_tokens: of requests at their first admission, cached_tokens: those of them found in the cache.
    computed_tokens: all tokens of all steps, what preemption made necessary again and wrong drafts included.
    proposed_drafts: draft tokens verified, correct_drafts: those of them that were sampled and so saved a step.
    verify_steps: how often a row continued an output while drafts were on, with drafts or without.
    forced_tokens: those of the generated that a constraint forced and that so needed no step of their own; no drafts.
    """

    requests: int = 0
    finished: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    preemptions: int = 0
    proposed_drafts: int = 0
    correct_drafts: int = 0
    verify_steps: int = 0
    forced_tokens: int = 0

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _COUNTERS}


_COUNTERS = tuple(field.name for field in fields(Counters))


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step. decode_rows: rows that continue an output; prefill_rows, prefill_tokens: all others, and their tokens.
    draft_tokens: verified by rows that sample, besides their own: guessed or forced.

    cached_tokens: taken from the cache by requests admitted in this step. used_pages: in use by running requests.
    """

    step: int = 0
    decode_rows: int = 0
    prefill_rows: int = 0
    prefill_tokens: int = 0
    draft_tokens: int = 0
    cached_tokens: int = 0
    preempted: int = 0
    running: int = 0
    waiting: int = 0
    used_pages: int = 0
