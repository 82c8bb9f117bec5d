"""Reuse within a batch: a prefix that several requests need and that is being computed now is computed once.

Owns which waiting request waits for which running one (its leader). Never admits or ends a request.

A running request computes, page by page, what follows its pages in the tree. A waiting request whose cached prefix ends
in the same place and goes on with the same page would compute that page too; instead it waits until the leader has put
the whole prefix they share into the tree, or has stopped running.
"""

from __future__ import annotations

from collections.abc import Iterable

from mooli.cache.kv_cache import KVCache
from mooli.cache.radix_tree import token_key
from mooli.scheduler.request_state import RequestState


class PrefixWaits:
    """One per scheduler. `begin_step` before the first `is_waiting` of a step."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._leaders: dict[tuple[str, int, bytes], list[RequestState]] = {}

    def begin_step(self, running: Iterable[RequestState]) -> None:
        """`running` will compute in this step."""
        self._leaders.clear()
        for state in running:
            self.add_leader(state)

    def add_leader(self, state: RequestState) -> None:
        """A request runs from now on. The page it computes next must be known to the end to be shared."""
        if state.pages is None or state.pages.node is None:
            return
        page_size = self._cache.page_size
        first = state.pages.num_shared * page_size
        if first + page_size <= state.num_tokens:
            page = token_key(state.tokens[first : first + page_size])
            self._leaders.setdefault((state.request.namespace, state.pages.num_shared, page), []).append(state)

    def is_waiting(self, state: RequestState) -> bool:
        """True if `state` should not begin in this step, because a running request computes its prefix."""
        leader = state.leader
        if leader is not None:
            if leader.pages is not None and leader.pages.num_shared < state.leader_pages:
                return True
            state.leader = None
        if not self._leaders:
            return False
        page_size = self._cache.page_size
        match = self._cache.match(state.request.namespace, state.key, state.match_limit)
        num_pages = len(match.pages)
        first, last = num_pages * page_size, (num_pages + 1) * page_size
        if last > state.match_limit:  # would have to compute that page in any case
            return False
        page = token_key(state.tokens[first:last])
        for leader in self._leaders.get((state.request.namespace, num_pages, page), ()):
            common = _common_tokens(leader, state) // page_size
            if common > num_pages:
                state.leader = leader
                state.leader_pages = min(common, state.match_limit // page_size)
                return True
        return False


def _common_tokens(a: RequestState, b: RequestState) -> int:
    count = min(a.num_tokens, b.num_tokens)
    differs = a.tokens[:count] != b.tokens[:count]
    return int(differs.argmax()) if differs.any() else count
