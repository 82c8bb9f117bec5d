"""The running requests: their order, their places in the tables of a step, and their pages.

Owns which request has which req_index, and the moves of pages that both planning and landing make. Never decides who
runs.
"""

from __future__ import annotations

from bisect import insort

from mooli.cache.kv_cache import KVCache
from mooli.cache.radix_tree import token_key
from mooli.cache.request_pages import Admission, RequestPages
from mooli.errors import EngineError
from mooli.scheduler.batch_builder import BatchBuilder
from mooli.scheduler.request_state import RequestState


class Running:
    """states: in the order of rank. free_indices: each req_index that nobody has."""

    def __init__(self, cache: KVCache, tables: BatchBuilder, max_requests: int) -> None:
        self.states: list[RequestState] = []
        self.free_indices = list(range(max_requests - 1, -1, -1))
        self._max_requests = max_requests
        self._cache = cache
        self._tables = tables

    def of_class(self, is_background: bool) -> list[RequestState]:
        """Those that run in the background, or all others, in the order of rank."""
        states = self.states
        if not states or not states[-1].is_background:
            return [] if is_background else states
        return [state for state in states if state.is_background == is_background]

    @property
    def last_in_background(self) -> RequestState | None:
        """The first to give way to whoever is not in the background."""
        return self.states[-1] if self.states and self.states[-1].is_background else None

    def begin(self, state: RequestState, admission: Admission) -> None:
        """A waiting request runs from now on; there must be a free req_index."""
        insort(self.states, state, key=_rank)
        state.pages, state.match_end = admission.held, admission.end
        state.num_computed = state.num_found = admission.num_matched
        state.req_index = self.free_indices.pop()
        self._tables.enter(state)
        self._tables.grow_pages(state.req_index, admission.held.pages)

    def grow(self, state: RequestState, held: RequestPages, num_tokens: int) -> None:
        """Get the pages for the first `num_tokens` tokens. Raises EngineError if they are not available."""
        if not self._cache.grow(held, num_tokens):
            raise EngineError("pages counted as available could not be allocated")
        self._tables.grow_pages(state.req_index, held.pages)

    def share_computed(self, state: RequestState) -> None:
        """Put full computed pages into the tree while the request goes on, so that others can use them at once."""
        held, page_size = state.pages, self._cache.page_size
        if held is None or held.node is None:
            return
        first, last = held.num_shared, state.num_computed // page_size
        if last > first:
            self._cache.insert(held, token_key(state.key_ids[first * page_size : last * page_size]))
            self._tables.set_pages(state.req_index, held.pages, first)

    def leave(self, state: RequestState, *, keep: bool) -> None:
        """Stop running: give back pages and req_index. `keep` what was computed, in the tree."""
        held = state.pages
        if held is None:
            raise EngineError(f"request {state.rid!r} is not running")
        if keep:
            first = held.num_shared * self._cache.page_size
            self._cache.release(held, token_key(state.key_ids[first : state.num_computed]), state.turn)
        else:
            self._cache.discard(held)
        self.states.remove(state)
        self._tables.leave(state.req_index)
        self.free_indices.append(state.req_index)
        state.pages, state.req_index = None, -1

    def check(self) -> None:
        """Prove that pages and places balance; raises EngineError otherwise. For tests."""
        self._cache.check([state.pages for state in self.states if state.pages is not None])
        indices = sorted([*self.free_indices, *(state.req_index for state in self.states)])
        if indices != list(range(self._max_requests)):
            raise EngineError("a req_index is lost or used twice")


def _rank(state: RequestState) -> tuple[bool, int, int]:
    return state.rank
