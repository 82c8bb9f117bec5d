"""The store of pages as the scheduler sees it: what of a waiting request is loaded, and what of others is written.

Owns the loads: which request waits for one, what comes of it, and when it is not waited for any more. A load never
holds a page: what has come is the tree's at once (`mooli.cache.page_moves`), and may be evicted from there like all
else, so that no load stands in the way of a request that needs pages. Never touches files or a device: `StoreIO` has
the threads, and pages move as bytes.

A request waits for its own pages only, and no longer than computing them would take. Then it begins on what has come,
and computes the rest: on an exact backend both ways give the same bits. Several that need the same pages wait for one
load.

Of models with recurrent layers a load ends at the deepest snapshot on disk, which comes last: one state, and the pages
before it that the pool has not. Where it cannot be had, the one before it is tried.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from mooli.cache.kv_cache import KVCache
from mooli.cache.match_end import MissReason
from mooli.cache.page_hash import PageChain, root_of
from mooli.cache.page_moves import pages_there, put_pages
from mooli.cache.store_io import Piece, StoreIO
from mooli.scheduler.host_tier import NOT_BROUGHT
from mooli.scheduler.request_state import RequestState
from mooli.scheduler.speed import BreakEven
from mooli.scheduler.stats import StepStats
from mooli.scheduler.write_behind import LEAST_TOKENS, HostBytes, PageBytes, WriteBehind

logger = logging.getLogger(__name__)

ALARM_S = 0.001
"""How long after a request is late it is looked at again."""


@dataclass(slots=True, eq=False)
class _Found:
    """What there is of one open request. chain: its pages by name. num_on_disk: leading pages that the store had when
    it was looked at.

    number: of the load that goes on; 0 for none. first, last: the pages that are loaded; come: up to which they are
    there, num_put: so many of them through the load. late_s: of the clock, from when on it is not waited for. reason:
    why not all that is on disk was used.
    behind: it waits for another's load. has_begun: it runs, or has run.

    Of models with recurrent layers all ends at a state. most_pages: after so many pages at most, None before one could
    not be had; again: one could not, and it is to be looked at again. num_before: tokens that the request could have
    gone on from without the load. has_state: the state has come.
    """

    chain: PageChain
    num_on_disk: int = 0
    number: int = 0
    first: int = 0
    last: int = 0
    come: int = 0
    num_put: int = 0
    late_s: float = 0.0
    reason: MissReason | None = None
    behind: _Found | None = None
    has_begun: bool = False
    most_pages: int | None = None
    again: bool = False
    num_before: int = 0
    has_state: bool = False

    @property
    def is_waited_for(self) -> bool:
        return self.number > 0 or self.behind is not None


class DiskTier:
    """A `Tier`. Everything is called on the thread that steps.

    io: the store's threads. pages: of the pool, page_bytes each. root: of the engine (`CacheNamespace.root`).
    even: the speeds that decide what is loaded. clock: seconds, for tests. state_bytes: of a recurrent state; 0 for
    models that have none. host: where pages are between pool and disk.
    """

    reason = "loading"

    def __init__(
        self,
        cache: KVCache,
        io: StoreIO,
        pages: PageBytes,
        page_bytes: int,
        root: bytes,
        even: BreakEven,
        clock: Callable[[], float] = time.monotonic,
        state_bytes: int = 0,
        host: HostBytes | None = None,
    ) -> None:
        self.even = even
        self.behind = WriteBehind(cache, io, pages, page_bytes, self._is_worth, state_bytes, host)
        self.num_loaded = self.num_states_loaded = self.num_failed = self.num_slower = 0
        """Pages and states that were loaded; requests that began without what is on disk, as it came not or too late,
        or as loading was judged slower."""
        self._cache = cache
        self._io = io
        self._pages = pages
        self._page_bytes = page_bytes
        self._state_bytes = state_bytes
        self._root = root
        self._clock = clock
        self._open: dict[str, _Found] = {}
        self._loads: dict[int, tuple[RequestState, _Found]] = {}
        self._loading: dict[bytes, _Found] = {}
        """By each page that is loaded."""
        self._num_loads = 0
        self._is_broken = False
        self._waited_for: list[_Found] = []

    def _is_worth(self, num_tokens: int) -> bool:
        return num_tokens >= max(LEAST_TOKENS, self._least_tokens)

    @property
    def _least_tokens(self) -> float:
        """That are sooner loaded than computed, with the state after them."""
        least = self.even.least_tokens
        return least + self.even.tokens_for(self._state_bytes) if self._state_bytes else least

    # -- a Hold --
    def begin_step(self, running: Iterable[RequestState]) -> None:
        pass

    def holds(self, state: RequestState) -> bool:
        """Pages of it are on their way. While a step is planned the answer stays what it was."""
        found = self._open.get(state.rid)
        if found is None or found.has_begun or found.again:
            found = self._look(state)
        elif found.behind is not None and not found.behind.number:
            found = self._look(state)  # what another has loaded may be a part of it
        return found.is_waited_for

    def began(self, state: RequestState) -> None:
        found = self._open.get(state.rid)
        if found is None:
            return
        found.has_begun = True
        page_size = self._cache.page_size
        if state.loaded_tokens < 0:
            num_loaded = min(found.num_put * page_size, state.num_found - found.first * page_size)
            if self._state_bytes:
                num_loaded = state.num_found - found.num_before if found.has_state else 0
            state.loaded_tokens = max(0, num_loaded)
        end = state.match_end
        num_on_disk = max(found.num_on_disk, 0 if found.most_pages is None else found.most_pages + 1)
        is_less = end is not None and end.reason in NOT_BROUGHT and end.num_tokens < num_on_disk * page_size
        if end is not None and is_less and found.reason is not None:
            num_lost = min(num_on_disk * page_size, state.match_limit) - end.num_tokens
            state.match_end = replace(end, reason=found.reason, num_lost=max(num_lost, end.num_lost))
            self.num_failed += found.reason is MissReason.LOAD_FAILED
            self.num_slower += found.reason is MissReason.JUDGED_SLOWER
        num_found = state.num_found // page_size
        if num_found:
            self._io.touch(found.chain.digests[:num_found])

    def _look(self, state: RequestState) -> _Found:
        """What is on disk of a request that could begin now, and have it loaded if that is the shorter way."""
        before = self._open.get(state.rid)
        chain = before.chain if before is not None else self._chain_of(state)
        found = self._open[state.rid] = _Found(chain)
        if before is not None and not before.has_begun:  # it goes on waiting
            found.late_s, before.behind = before.late_s, None
            found.most_pages, found.reason = before.most_pages, before.reason if before.again else None
        page_size, namespace = self._cache.page_size, state.request.namespace
        most = state.match_limit // page_size
        chain.extend(state.key, most)
        found.num_on_disk = self._io.on_disk(chain.digests[:most])
        if not found.num_on_disk:
            return found
        found.first = found.come = found.last = len(pages_there(self._cache, namespace, state.key, most))
        found.num_before = found.first * page_size
        if self._state_bytes:
            self._end_at_a_state(state, found)
        num_tokens = found.num_on_disk * page_size - found.num_before
        if num_tokens <= 0:
            return found
        if num_tokens < self._least_tokens:
            found.reason = MissReason.JUDGED_SLOWER
            return found
        is_late = 0 < found.late_s <= self._clock()
        if self._io.is_stuck or self._is_broken or is_late:
            found.reason = MissReason.LOAD_FAILED
            return found
        found.late_s = found.late_s or self._clock() + self.even.patience_s(num_tokens)
        other = self._loading.get(chain.digests[min(found.first, found.num_on_disk - 1)])
        if other is not None:
            found.behind = other
            self._set_alarm(found)
            return found
        room = self._cache.num_available - sum(load.last - load.come for _, load in self._loads.values())
        found.last = min(found.num_on_disk, found.first + max(0, room))
        if self._state_bytes:
            found.last = self._io.deepest_state(chain.digests[: found.last])
            found.first = found.come = min(found.first, found.last)
        if found.last * page_size > found.num_before:
            self._load(state, found)
        return found

    def _end_at_a_state(self, state: RequestState, found: _Found) -> None:
        """What is on disk ends where a state is, after pages that are there or on disk."""
        most = max(found.num_on_disk, found.first)
        if found.most_pages is not None:
            most = min(most, found.most_pages)
        states = self._cache.states
        can_come = states is not None and states.room.num_snapshots > 0
        found.num_on_disk = self._io.deepest_state(found.chain.digests[:most]) if can_come else 0
        match = self._cache.match(state.request.namespace, state.key, state.match_limit)
        found.num_before = len(match.pages) * self._cache.page_size + match.head_tokens

    def _chain_of(self, state: RequestState) -> PageChain:
        return PageChain(root_of(self._root, state.request.namespace), self._cache.page_size)

    def _load(self, state: RequestState, found: _Found) -> None:
        self._num_loads += 1
        found.number = self._num_loads
        first, last = found.first, found.last
        chain = found.chain
        self._loads[found.number] = (state, found)
        self._loading.update(dict.fromkeys(self._names(found), found))
        after = (chain.digests[last - 1], chain.tokens[last - 1]) if self._state_bytes else None
        self._io.load(found.number, first, chain.digests[first:last], chain.tokens[first:last], after)
        self._set_alarm(found)

    def _names(self, found: _Found) -> list[bytes]:
        """Of the pages that are loaded; where it is a state alone, of the page before it."""
        return found.chain.digests[min(found.first, found.last - 1) : found.last]

    def _set_alarm(self, found: _Found) -> None:
        """All may be waiting by then, and no step comes by itself."""
        self._waited_for.append(found)
        self._io.alarm(max(0.0, found.late_s - self._clock()) + ALARM_S)

    def _give_up(self, found: _Found) -> None:
        """It is not waited for any more: what has come stays."""
        found.behind, found.reason = None, MissReason.LOAD_FAILED
        if found.number:
            self._io.cancel(found.number)
            self._end_load(found)

    def _end_load(self, found: _Found) -> None:
        del self._loads[found.number]
        for digest in self._names(found):
            if self._loading.get(digest) is found:
                del self._loading[digest]
        found.number = 0

    # -- between steps --
    @property
    def has_work(self) -> bool:
        """`move` would do something."""
        return self._io.has_arrived or self.behind.has_work

    def move(self) -> None:
        """Put what has arrived into the pool and the tree, give up what is late, and hand a piece of what is to be
        written to the store."""
        for piece in self._io.take():
            self._take_in(piece)
        if self._waited_for:
            now_s = self._clock()
            for found in self._waited_for:
                if found.is_waited_for and now_s >= found.late_s:
                    self._give_up(found)
            self._waited_for = [found for found in self._waited_for if found.is_waited_for]
        self.behind.move()

    def _take_in(self, piece: Piece) -> None:
        if piece.num_bytes:
            self.even.learn_load(piece.num_bytes, piece.seconds)
        load = self._loads.get(piece.number)
        if load is None:
            return
        state, found = load
        last = piece.first + piece.num_pages
        if piece.num_pages:
            num_before = self.num_loaded
            found.come = self._put(state, piece, last)
            found.num_put += self.num_loaded - num_before
        if found.come < last or (piece.is_last and found.come < found.last):
            self._give_up(found)
            if self._state_bytes and found.come == last:  # the disk has less than it seemed
                found.most_pages, found.again = found.come, True
        elif piece.is_last:
            if self._state_bytes and not self._put_state(state, found, piece.state):
                found.reason = MissReason.LOAD_FAILED
                if piece.state is None:
                    found.most_pages, found.again = found.last - 1, True
            self._end_load(found)

    def _put_state(self, state: RequestState, found: _Found, data: bytes | memoryview | None) -> bool:
        """Whether the request can go on from it."""

        def write(slot: int) -> None:
            self._pages.write_state(slot, data)
            self.num_states_loaded += 1

        if data is None:
            return False
        namespace = state.request.namespace
        try:
            found.has_state = self._cache.put_state(namespace, state.key, found.last, write, state.given)
        except Exception as exc:
            self._break(exc)
        return found.has_state

    def _break(self, exc: Exception) -> None:
        """Of the device: the next step will tell who waits for it."""
        if not self._is_broken:
            logger.warning("pages from disk cannot be put into the pool, and none are loaded from now on: %s", exc)
        self._is_broken = True

    def _put(self, state: RequestState, piece: Piece, last: int) -> int:
        data = memoryview(piece.data)

        def write(pages: list[int], num_before: int) -> None:
            self._pages.write_pages(pages, data[num_before * self._page_bytes :])
            self.num_loaded += len(pages)

        try:
            namespace = state.request.namespace
            return put_pages(self._cache, namespace, state.key, piece.first, last, write, state.given)
        except Exception as exc:
            self._break(exc)
            return piece.first

    def learn(self, step: StepStats, seconds: float) -> None:
        """A step has taken `seconds`."""
        self.even.learn_step(step, seconds)

    # -- what becomes of requests --
    def computed(self, state: RequestState) -> None:
        """What it has computed so far gave numbers, and its full pages are in the tree or come there now."""
        if state.request.no_store or math.isinf(self._least_tokens):
            return
        page_size = self._cache.page_size
        num_pages = state.num_computed // page_size
        found = self._open.setdefault(state.rid, _Found(self._chain_of(state), has_begun=True))
        found.chain.extend(state.key, num_pages)
        namespace, num_found = state.request.namespace, min(num_pages, state.num_found // page_size)
        self.behind.offer(namespace, state.key, found.chain, num_pages, num_found)

    def on_disk(self, digests: Sequence[bytes]) -> int:
        """How many leading pages of a chain can be read."""
        return self._io.on_disk(digests)

    def distrusted(self, state: RequestState) -> None:
        """What it computed on may hold NaN: that on disk is not to be found again."""
        found = self._open.get(state.rid)
        if found is not None:
            self._io.forget(list(found.chain.digests))

    def ended(self, state: RequestState) -> None:
        """Nothing is loaded for it any more."""
        found = self._open.pop(state.rid, None)
        if found is not None and found.is_waited_for:
            self._give_up(found)

    def on_change(self, wake: Callable[[], None]) -> None:
        """See `StoreIO.on_change`."""
        self._io.on_change(wake)

    def close(self, timeout_s: float) -> None:
        """Write what is warm, and end the threads. Nothing steps any more."""
        end_s = time.monotonic() + timeout_s
        for _, found in list(self._loads.values()):
            self._give_up(found)
        self.behind.finish(end_s)
        if not self._io.close(end_s - time.monotonic()):
            logger.warning("not all of the KV cache could be written to disk in %.0f s", timeout_s)

    def stats(self) -> dict[str, int]:
        """Since the start, in tokens and requests."""
        page_size = self._cache.page_size
        return {
            "loaded_tokens": self.num_loaded * page_size,
            "stored_tokens": self.behind.num_written * page_size,
            "loaded_states": self.num_states_loaded,
            "stored_states": self.behind.num_states_written,
            "failed_loads": self.num_failed,
            "slower_loads": self.num_slower,
        }
