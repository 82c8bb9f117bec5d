"""The host's memory below a pool on a device, as the scheduler sees it: what is kept there, and what comes back.

Owns what of a request is to be copied back and when, and which pages are copied out (`HostPolicy`). Never touches
bytes: the backend has them, in rows that `HostPool` gives out. Everything is done between steps on the thread that
steps, in pieces, so that no step begins much later than it would have.

    device only ── copied out ──> device and host ── evicted there ──> host only ── copied back ──> device and host
                                                                          └─ gone for others, least recently used first

A page that was copied back stays on the host, so that evicting it again costs nothing. Pages on disk are another
matter: they are read and written by names (`mooli.scheduler.disk_tier`), and those of the host need no second copy out
of the device.

A request waits for its own pages while others go on. It begins as soon as they are in the tree, from where they may be
evicted like all else.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from mooli.cache.host_pool import HostPool, PageName
from mooli.cache.kv_cache import KVCache
from mooli.cache.match_end import MissReason
from mooli.cache.page_hash import PageChain, root_of
from mooli.cache.page_moves import pages_there, put_pages, room_behind
from mooli.scheduler.request_state import RequestState
from mooli.scheduler.speed import BreakEven
from mooli.scheduler.stats import StepStats

logger = logging.getLogger(__name__)

OUT_BYTES = 16 << 20
"""Copied out between two steps where nothing waits for it: a millisecond of the slowest bus of today."""

BACK_BYTES = 128 << 20
"""Copied back between two steps, for requests that wait."""

MOST_SAVES = 1024
"""Sequences with pages to be copied out. Where there are more, the oldest are not: they come again with their next
use."""

LEAST_COPY_S = 1e-3
"""What it takes to bring pages back besides their bytes: the end of the step that runs, and of others' copies."""

SUPPOSED_COPY_BYTES_PER_S = 5e9
"""Before a copy has been measured."""

NOT_BROUGHT = (
    MissReason.NEW, MissReason.NAMESPACE, MissReason.DIVERGED, MissReason.EVICTED, MissReason.NO_STATE,
)  # fmt: skip
"""Of the tree alone; where a tier below it has more, why that was not used says more."""


class HostPolicy(Enum):
    """What is copied out, and when: names and meanings are SGLang's."""

    WRITE_THROUGH = "write_through"
    """All full pages, as soon as they gave numbers."""
    WRITE_THROUGH_SELECTIVE = "write_through_selective"
    """Those that a later request has found."""
    WRITE_BACK = "write_back"
    """Those that leave the device for want of room, when they do."""


class HostPages(Protocol):
    """What of a backend moves pages: see `mooli.backends.base.OffloadingBackend`."""

    def back_up(self, pages: Sequence[int], rows: Sequence[int]) -> None: ...

    def load_back(self, pages: Sequence[int], rows: Sequence[int]) -> None: ...

    def host_bytes(self, row: int) -> bytes: ...


@dataclass(slots=True, eq=False)
class _Found:
    """What there is of one open request. chain: its pages by name.

    first, last: the pages that come back; come: up to which they are there, num_put: so many of them through the copy.
    is_loading: they are on their way. is_open: it could not be decided yet, for want of room. num_there: leading pages
    that the device and the host had. reason: why not all of them were used. has_begun: it runs, or has run.
    """

    chain: PageChain
    first: int = 0
    last: int = 0
    come: int = 0
    num_put: int = 0
    num_there: int = 0
    is_loading: bool = False
    is_open: bool = False
    reason: MissReason | None = None
    has_begun: bool = False


@dataclass(slots=True, eq=False)
class _Save:
    """The first `num_pages` pages of a sequence; those before `at` are on the host."""

    namespace: str
    key: bytes
    chain: PageChain
    num_pages: int
    at: int = 0


class HostTier:
    """A `Tier`. pages: of the pool and of the host, page_bytes each. root: of the engine (`CacheNamespace.root`). even:
    the speeds that decide what is copied back."""

    reason = "loading"

    def __init__(
        self,
        cache: KVCache,
        host: HostPool,
        pages: HostPages,
        page_bytes: int,
        root: bytes,
        policy: HostPolicy,
        even: BreakEven,
    ) -> None:
        self.even = even
        self.policy = policy
        self.num_loaded = self.num_saved = self.num_failed = self.num_slower = 0
        """Pages that came back, and that were copied out; requests that began without what is on the host, as it could
        not be brought, or as that was judged slower."""
        self._cache = cache
        self._host = host
        self._pages = pages
        self._root = root
        self._out_pages = max(1, OUT_BYTES // page_bytes)
        self._back_pages = max(1, BACK_BYTES // page_bytes)
        self._page_bytes = page_bytes
        self._open: dict[str, _Found] = {}
        self._loads: dict[str, tuple[RequestState, _Found]] = {}
        self._saves: deque[_Save] = deque(maxlen=MOST_SAVES)
        self._kept_use: int | None = None
        """Pages that were used then or later are being copied back."""
        self._is_broken = False
        if policy is HostPolicy.WRITE_BACK:
            cache.keep_evicted = self._keep_evicted

    @property
    def num_pages(self) -> int:
        return self._host.num_pages

    # -- a Hold --
    def begin_step(self, running: Iterable[RequestState]) -> None:
        pass

    def holds(self, state: RequestState) -> bool:
        """Pages of it are to be copied back before the next step."""
        found = self._open.get(state.rid)
        if found is None or found.has_begun or (found.is_open and not self._loads):
            found = self._look(state)
        return found.is_loading or (found.is_open and bool(self._loads))

    def _look(self, state: RequestState) -> _Found:
        before = self._open.get(state.rid)
        chain = before.chain if before is not None else self._chain_of(state)
        found = self._open[state.rid] = _Found(chain)
        namespace, page_size = state.request.namespace, self._cache.page_size
        # Of a full page that ends behind what may be found, the head can be copied.
        most = min(state.num_tokens // page_size, -(-state.match_limit // page_size))
        chain.extend(state.key, most)
        first = found.first = found.come = found.last = len(pages_there(self._cache, namespace, state.key, most))
        count = self._host.leading(chain.digests[first:most], chain.tokens[first:most])
        found.num_there = first + count
        if not count:
            return found
        if count * page_size < self.even.least_tokens:
            found.reason = MissReason.JUDGED_SLOWER
            return found
        # Until it can be brought: it may begin without, where others give way to it.
        found.reason = MissReason.LOAD_FAILED
        if self._is_broken:
            return found
        if room_behind(self._cache, namespace, state.key, first) - self._num_coming < count:
            found.is_open = True
            return found
        found.last, found.is_loading = found.num_there, True
        self._loads[state.rid] = (state, found)
        return found

    @property
    def _num_coming(self) -> int:
        return sum(found.last - found.come for _, found in self._loads.values())

    def _chain_of(self, state: RequestState) -> PageChain:
        return PageChain(root_of(self._root, state.request.namespace), self._cache.page_size)

    def began(self, state: RequestState) -> None:
        found = self._open.get(state.rid)
        if found is None:
            return
        found.has_begun = True
        page_size = self._cache.page_size
        if state.host_tokens < 0:
            state.host_tokens = max(0, min(found.num_put * page_size, state.num_found - found.first * page_size))
        end = state.match_end
        is_less = end is not None and end.reason in NOT_BROUGHT and end.num_tokens < found.num_there * page_size
        if end is not None and is_less and found.reason is not None:
            num_lost = min(found.num_there * page_size, state.match_limit) - end.num_tokens
            state.match_end = replace(end, reason=found.reason, num_lost=max(num_lost, end.num_lost))
            self.num_failed += found.reason is MissReason.LOAD_FAILED
            self.num_slower += found.reason is MissReason.JUDGED_SLOWER
        self._host.use(found.chain.digests[: state.num_found // page_size])

    # -- between steps --
    @property
    def has_work(self) -> bool:
        """`move` would do something."""
        return bool(self._loads or self._saves)

    def move(self) -> None:
        """Copy back what requests wait for, as far as a pause between two steps allows, and a piece of what is to be
        copied out."""
        pages_left = self._back_pages
        for rid, (state, found) in list(self._loads.items()):
            if pages_left <= 0:
                break
            last = min(found.last, found.come + pages_left)
            pages_left -= last - found.come
            num_before = self.num_loaded
            come = found.come = self._bring(state, found, last)
            found.num_put += self.num_loaded - num_before
            if come < last or last == found.last:
                if come == found.last:
                    found.reason = None
                found.is_loading = False
                del self._loads[rid]
        self._save_piece()

    def _bring(self, state: RequestState, found: _Found, last: int) -> int:
        """Have pages up to `last` copied into the pool and the tree; how many leading ones are there now."""
        chain, first = found.chain, found.come
        last = first + self._host.leading(chain.digests[first:last], chain.tokens[first:last])
        if last == first:
            return first
        self._kept_use = self._host.use(chain.digests[first:last])

        def write(pages: list[int], num_before: int) -> None:
            rows = self._host.rows(chain.digests[first + num_before : last])
            started_s = time.perf_counter()
            self._pages.load_back(pages, rows)
            self.even.learn_load(len(pages) * self._page_bytes, time.perf_counter() - started_s)
            self.num_loaded += len(pages)

        try:
            return put_pages(self._cache, state.request.namespace, state.key, first, last, write, state.given)
        except Exception as exc:  # of the device: the next step will tell who waits for it
            self._break_down("be copied back from", exc)
            return first
        finally:
            self._kept_use = None

    @property
    def _is_worth(self) -> bool:
        """Something may come back."""
        return not (self._is_broken or math.isinf(self.even.least_tokens))

    def _break_down(self, what: str, exc: Exception) -> None:
        if not self._is_broken:
            logger.warning("pages cannot %s the host's memory, which is not used from now on: %s", what, exc)
        self._is_broken = True
        self._saves.clear()

    def _save_piece(self) -> None:
        while self._saves:
            save = self._saves[0]
            digests, tokens = save.chain.digests, save.chain.tokens
            save.at += self._host.leading(digests[save.at : save.num_pages], tokens[save.at : save.num_pages])
            first, last = save.at, min(save.num_pages, save.at + self._out_pages)
            pages = pages_there(self._cache, save.namespace, save.key, last)[first:] if first < last else []
            save.at += self._save(save.chain, first, pages)
            if save.at > first:
                return
            if self._saves:  # none where the copy has failed
                self._saves.popleft()

    def _save(self, chain: PageChain, first: int, pages: Sequence[int]) -> int:
        """Copy out `pages`, which are those of the chain from `first` on; how many found room."""
        names = [
            PageName(chain.digests[at], chain.parent_of(at), chain.tokens[at])
            for at in range(first, first + len(pages))
        ]
        return self._copy_out(names, pages)

    def _copy_out(self, names: Sequence[PageName], pages: Sequence[int]) -> int:
        rows = [] if self._is_broken else self._host.add(names, self._kept_use)
        if not rows:
            return 0
        try:
            self._pages.back_up(pages[: len(rows)], rows)
        except Exception as exc:
            self._host.drop([name.digest for name in names[: len(rows)]])
            self._break_down("be copied to", exc)
            return 0
        self.num_saved += len(rows)
        return len(rows)

    def _keep_evicted(self, names: Sequence[PageName], pages: Sequence[int]) -> None:
        """These pages, which follow each other, are leaving the device."""
        if not self._is_worth:
            return
        new = [at for at, name in enumerate(names) if not self._host.leading([name.digest], [name.tokens])]
        first = new[0] if new else len(names)
        if len(new) == len(names) - first:  # as nearly always: in one copy
            self._copy_out(names[first:], pages[first:])
            return
        for at in reversed(new):
            self._copy_out(names[at : at + 1], pages[at : at + 1])

    def learn(self, step: StepStats, seconds: float) -> None:
        """A step has taken `seconds`."""
        self.even.learn_step(step, seconds)

    # -- what becomes of requests --
    def computed(self, state: RequestState) -> None:
        """What it has computed so far gave numbers, and its full pages are in the tree or come there now."""
        if self.policy is HostPolicy.WRITE_BACK or not self._is_worth:
            return
        page_size = self._cache.page_size
        num_pages = state.num_computed // page_size
        if self.policy is HostPolicy.WRITE_THROUGH_SELECTIVE:
            num_pages = min(num_pages, state.num_found // page_size)
        if num_pages:
            found = self._open.setdefault(state.rid, _Found(self._chain_of(state), has_begun=True))
            found.chain.extend(state.key, num_pages)
            self._saves.append(_Save(state.request.namespace, state.key, found.chain, num_pages))

    def distrusted(self, state: RequestState) -> None:
        """What it computed on may hold NaN: that on the host is not to be found again."""
        found = self._open.get(state.rid)
        chain = found.chain if found is not None else self._chain_of(state)
        chain.extend(state.key, state.num_tokens // self._cache.page_size)
        self._host.drop(chain.digests)
        kept = [save for save in self._saves if save.chain is not chain]
        self._saves.clear()
        self._saves.extend(kept)

    def ended(self, state: RequestState) -> None:
        """Nothing is copied back for it any more."""
        self._open.pop(state.rid, None)
        self._loads.pop(state.rid, None)

    # -- for others --
    def bytes_of(self, digests: Sequence[bytes], tokens: Sequence[bytes]) -> list[bytes]:
        """Copies of the first of these pages, up to one that is not on the host."""
        count = self._host.leading(digests, tokens)
        return [self._pages.host_bytes(row) for row in self._host.rows(digests[:count])]

    def clear(self) -> None:
        """Forget all pages, where no request is open."""
        self._saves.clear()
        self._host.clear()

    def close(self, timeout_s: float) -> None:
        """Nothing steps any more, and no page is copied."""
        self.clear()

    def stats(self) -> dict[str, int]:
        """Tokens that there is room for and that are there; since the start, in tokens and requests."""
        page_size = self._cache.page_size
        return {
            "host_total_tokens": self._host.num_pages * page_size,
            "host_used_tokens": self._host.num_used * page_size,
            "host_loaded_tokens": self.num_loaded * page_size,
            "host_saved_tokens": self.num_saved * page_size,
            "host_dropped_tokens": self._host.num_dropped * page_size,
            "host_failed_loads": self.num_failed,
            "host_slower_loads": self.num_slower,
        }

    def check(self) -> None:
        """Prove that every row of the host has one owner; raises EngineError otherwise. For tests."""
        self._host.check()
