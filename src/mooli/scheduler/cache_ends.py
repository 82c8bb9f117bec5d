"""Where a request that begins to run ended in the cache: what only the running requests can say of it, and its account.

Owns when another request that runs is why nothing more was there, and what is said of it to whoever asked. Never
changes anything: by then it is decided what a request begins on.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mooli.cache.kv_cache import KVCache
from mooli.cache.match_end import MatchEnd, MissReason
from mooli.cache.radix_tree import TOKEN_BYTES
from mooli.scheduler.request_state import RequestState
from mooli.types import CacheEnd

SHOWN_TOKENS = 16
"""That were there instead of a request's own."""

_CAN_BE_RUNNING = (MissReason.NEW, MissReason.DIVERGED, MissReason.NAMESPACE, MissReason.EVICTED)


def with_running(end: MatchEnd, state: RequestState, running: Iterable[RequestState], page_size: int) -> MatchEnd:
    """`end` of a request that begins, or IN_FLIGHT where one of `running` has more tokens in common with it: those that
    are not computed yet, or fill no page so far."""
    held = state.pages
    if end.reason not in _CAN_BE_RUNNING or held is None or held.node is None:
        return end
    start, most = held.num_shared * page_size, 0
    own = state.key_ids[start : state.match_limit]
    for other in running:
        # What it has computed is in the tree to the last full page, so that both stand at the same node.
        if other is not state and other.pages is not None and other.pages.node is held.node:
            most = max(most, _num_common(own, other.key_ids[start:]))
    num_lost = start + most - end.num_tokens
    if num_lost <= max(0, end.num_lost):
        return end
    return replace(end, reason=MissReason.IN_FLIGHT, found=None, num_lost=num_lost, eviction=None)


def _num_common(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """Length of the longest common beginning of two arrays of ids."""
    count = min(len(a), len(b))
    differs = a[:count] != b[:count]
    return int(differs.argmax()) if differs.any() else count


def account_of(end: MatchEnd, state: RequestState, cache: KVCache) -> CacheEnd:
    """What is said of a request that has just begun to run; what was there instead, and when it went, if it asks."""
    held = state.pages
    had: tuple[int, ...] = ()
    asks = state.request.wants_cache_end
    if asks and end.reason is MissReason.DIVERGED and held is not None:
        first = held.num_shared * cache.page_size
        key = state.key[first * TOKEN_BYTES : end.num_tokens * TOKEN_BYTES]
        had = tuple(cache.following(held, key, SHOWN_TOKENS))
    evicted_s = unused_s = None
    if asks and end.eviction is not None:
        evicted_s = (time.monotonic_ns() - end.eviction.dropped_ns) / 1e9
        unused_s = (end.eviction.dropped_ns - end.eviction.used_ns) / 1e9
    return CacheEnd(
        reason=None if end.reason is None else end.reason.value,
        num_tokens=end.num_tokens,
        num_matched=state.num_found,
        num_lost=end.num_lost,
        had=had,
        evicted_s=evicted_s,
        unused_s=unused_s,
    )
