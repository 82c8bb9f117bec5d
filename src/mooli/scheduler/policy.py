"""In which order the waiting requests of one client are tried.

Owns the policies. Never admits anything and never changes a request.

- `fcfs`: first come, first served.
- `lpm`: longest prefix match first, so that what is cached is used before it is evicted. A match of M tokens is worth
  as much as having waited while M tokens of others were computed: however many hits keep arriving, a cold request's
  turn comes.

Where priorities count, a larger one is a head start in the same measure: see `head_start`. Both policies try preempted
requests before those that never ran and have the same place otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2

from mooli.cache.kv_cache import KVCache
from mooli.errors import ConfigError
from mooli.scheduler.request_state import RequestState

POLICIES = ("fcfs", "lpm")

LPM_WINDOW = 128
"""`lpm` looks at this many of the waiting requests, oldest first: matching thousands would cost more than it saves."""

PRIORITY_TOKENS = 8192
"""The head start of priority 1."""


def check_policy(policy: str) -> str:
    """Return `policy`, or raise ConfigError with the names there are."""
    if policy not in POLICIES:
        raise ConfigError(f"schedule_policy={policy!r} is not known; use one of {', '.join(POLICIES)}")
    return policy


def head_start(priority: int) -> int:
    """How many tokens computed by others a priority is worth: as if the request had come so much earlier.

    It grows with the logarithm: none is worth more than 31 times that of 1. A request of priority p is overtaken by
    those of q only if they come before head_start(q) - head_start(p) tokens are computed after it has come.
    """
    worth = int(PRIORITY_TOKENS * log2(1 + abs(priority)))
    return worth if priority >= 0 else -worth


def fcfs_key(state: RequestState) -> tuple[int, bool, int]:
    """Sort key of first come, first served."""
    return (state.due, state.num_preemptions == 0, state.arrival)


def order_lpm(waiting: Sequence[RequestState], cache: KVCache, tokens_computed: int) -> list[RequestState]:
    """The head of `waiting` (in fcfs order) by cached tokens plus age. tokens_computed: by anybody so far."""

    def key(state: RequestState) -> tuple[int, bool, int, int]:
        match = cache.match(state.request.namespace, state.key, state.match_limit)
        matched_tokens = len(match.pages) * cache.page_size + match.head_tokens
        is_new = state.num_preemptions == 0
        if state.head_start is not None:
            return (state.due - matched_tokens, is_new, 0, state.arrival)
        waited_tokens = tokens_computed - state.enqueued_at
        return (0, is_new, -(matched_tokens + waited_tokens), state.arrival)

    return sorted(waiting[:LPM_WINDOW], key=key)
