"""In which order waiting requests are tried.

Owns the policies. Never admits anything and never changes a request.

- `fcfs`: first come, first served.
- `lpm`: longest prefix match first, so that what is cached is used before it is evicted. A match of M tokens is worth
  as much as having waited while M tokens of others were computed: however many hits keep arriving, a cold request's
  turn comes.

Both put larger priorities first and, within one priority, preempted requests before those that never ran.
"""

from __future__ import annotations

from collections.abc import Sequence

from mooli.cache.kv_cache import KVCache
from mooli.errors import ConfigError
from mooli.scheduler.request_state import RequestState

POLICIES = ("fcfs", "lpm")

LPM_WINDOW = 128
"""`lpm` looks at this many of the waiting requests, oldest first: matching thousands would cost more than it saves."""


def check_policy(policy: str) -> str:
    """Return `policy`, or raise ConfigError with the names there are."""
    if policy not in POLICIES:
        raise ConfigError(f"schedule_policy={policy!r} is not known; use one of {', '.join(POLICIES)}")
    return policy


def fcfs_key(state: RequestState) -> tuple[int, bool, int]:
    """Sort key of first come, first served."""
    return (-state.request.priority, state.num_preemptions == 0, state.arrival)


def order_lpm(waiting: Sequence[RequestState], cache: KVCache, tokens_scheduled: int) -> list[RequestState]:
    """The head of `waiting` (in fcfs order) by cached tokens plus age. tokens_scheduled: computed by anybody so far."""

    def key(state: RequestState) -> tuple[int, bool, int, int]:
        match = cache.match(state.request.namespace, state.key, state.match_limit)
        matched_tokens = len(match.pages) * cache.page_size + match.head_tokens
        waited_tokens = tokens_scheduled - state.enqueued_at
        return (-state.request.priority, state.num_preemptions == 0, -(matched_tokens + waited_tokens), state.arrival)

    return sorted(waiting[:LPM_WINDOW], key=key)
