"""Which pages of the tree are written to the store, and when: behind the steps, in small pieces, heads before tails.

Owns the list of sequences that have pages to be written. It holds no page and no lock: what has left the tree when its
turn comes is not written. Never decides when a request runs.

Written are pages that were found by a later request, and sequences that are long enough that loading them pays. Of
others it is noted that they are in the tree, and they are written at the end of the engine, if there is time. A
sequence is only offered when its logits were numbers: what may hold NaN is never written.

Of models with recurrent layers the snapshots at the ends of its pages follow a sequence's pages, the deepest first: one
that is larger than all pages before it only when it was found, or at the end.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from mooli.cache.kv_cache import KVCache
from mooli.cache.page_hash import PageChain
from mooli.cache.page_moves import pages_there
from mooli.cache.store.page_store import StoredPage
from mooli.cache.store_io import StoreIO

logger = logging.getLogger(__name__)

PIECE_BYTES = 2 << 20
"""Copied out of the pool between two steps, so that no step begins a millisecond later than it would have."""

LEAST_TOKENS = 128
"""Shorter sequences are not written while the engine works: there are many of them, and little to gain."""

MOST_SAVES = 1024
"""Sequences with pages to be written; when there are more, they wait for the end with the short ones."""


class PageBytes(Protocol):
    """What of a backend moves pages: see `mooli.backends.base.Backend`."""

    def read_pages(self, pages: Sequence[int]) -> Any: ...

    def write_pages(self, pages: Sequence[int], data: Any) -> None: ...

    def read_state(self, slot: int) -> Any: ...

    def write_state(self, slot: int, data: Any) -> None: ...


class HostBytes(Protocol):
    """What of the host's memory below the pool has pages too: see `mooli.scheduler.host_tier.HostTier`."""

    @property
    def num_pages(self) -> int: ...

    def bytes_of(self, digests: Sequence[bytes], tokens: Sequence[bytes]) -> list[bytes]: ...


@dataclass(slots=True, eq=False)
class _Save:
    """The first `num_pages` pages of a sequence. num_found: of them, that were found. is_final: all its snapshots are
    written. at: those before it are written or on their way; None before its turn. states: after how many pages
    snapshots are still to be written, the next one last; None before their turn."""

    namespace: str
    key: bytes
    chain: PageChain
    num_pages: int
    num_found: int
    is_final: bool = False
    at: int | None = None
    states: list[int] | None = None


class WriteBehind:
    """pages: of the pool. is_worth: whether a sequence of so many tokens is written at once. state_bytes: of a
    snapshot; 0 for models that have none. host: where pages are besides, and are taken from if they are; None for
    nowhere."""

    def __init__(
        self,
        cache: KVCache,
        io: StoreIO,
        pages: PageBytes,
        page_bytes: int,
        is_worth: Callable[[int], bool],
        state_bytes: int = 0,
        host: HostBytes | None = None,
    ) -> None:
        self.num_written = self.num_states_written = 0
        """Pages and snapshots handed to the store."""
        self._state_bytes = state_bytes
        self._page_bytes = page_bytes
        self._cache = cache
        self._io = io
        self._pages = pages
        self._piece = max(1, PIECE_BYTES // page_bytes)
        self._is_worth = is_worth
        self._host = host
        self._most_warm = cache.num_pages + (0 if host is None else host.num_pages)
        self._saves: deque[_Save] = deque()
        self._warm: OrderedDict[bytes, _Save] = OrderedDict()
        """By the name of the last page, the latest last."""
        self._num_warm = 0
        self._is_broken = False

    @property
    def has_work(self) -> bool:
        return bool(self._saves) and self._io.has_room

    def offer(self, namespace: str, key: bytes, chain: PageChain, num_pages: int, num_found: int) -> None:
        """The tree has the first `num_pages` pages of `key`, of which `num_found` were there before."""
        if not num_pages or self._is_broken:
            return
        is_worth = self._is_worth(num_pages * self._cache.page_size)
        if not is_worth or self._state_bytes:
            self._keep_for_the_end(_Save(namespace, key, chain, num_pages, 0, is_final=True))
        if not is_worth and not num_found:
            return
        save = _Save(namespace, key, chain, num_pages if is_worth else num_found, num_found)
        if len(self._saves) < MOST_SAVES:
            self._saves.append(save)
        else:
            self._keep_for_the_end(_Save(namespace, key, chain, save.num_pages, 0, is_final=True))

    def _keep_for_the_end(self, save: _Save) -> None:
        """As many as memory could hold, were no two alike."""
        name = save.chain.digests[save.num_pages - 1]
        if name in self._warm:
            self._warm.move_to_end(name)
            return
        for head in save.chain.digests[: save.num_pages - 1]:  # the same sequence before it went on
            if (shorter := self._warm.pop(head, None)) is not None:
                self._num_warm -= shorter.num_pages
        self._warm[name] = save
        self._num_warm += save.num_pages
        while self._num_warm > self._most_warm:
            _, oldest = self._warm.popitem(last=False)
            self._num_warm -= oldest.num_pages

    def move(self) -> None:
        """Hand one piece to the store, if it has room."""
        while self._saves and self._io.has_room:
            save = self._saves[0]
            if self._send(save) or (self._state_bytes and self._send_state(save)):
                return
            self._saves.popleft()

    def _send(self, save: _Save) -> bool:
        """The next piece of a sequence; False where there is none."""
        if save.at is None:
            save.at = self._io.known(save.chain.digests[: save.num_pages])
        first, last = save.at, min(save.num_pages, save.at + self._piece)
        if first >= last:
            return False
        chain = save.chain
        data: Any = []
        if self._host is not None:
            data = self._host.bytes_of(chain.digests[first:last], chain.tokens[first:last])
        if not data:
            pages = pages_there(self._cache, save.namespace, save.key, last)[first:]
            if not pages:
                return False
            data = self._read(partial(self._pages.read_pages, pages))
            if data is None:
                return True
        self._io.append(
            [
                StoredPage(chain.digests[at], chain.parent_of(at), at, chain.tokens[at], memoryview(payload))
                for at, payload in enumerate(data, first)
            ]
        )
        self.num_written += len(data)
        save.at = first + len(data)
        return True

    def _send_state(self, save: _Save) -> bool:
        """The next snapshot of a sequence whose pages are sent; False where there is none."""
        there = self._cache.states_there(save.namespace, save.key, save.at or 0)
        if save.states is None:
            save.states = [count for count in reversed(there) if self._is_due(save, count)]
        while save.states:
            count = save.states.pop()
            digest = save.chain.digests[count - 1]
            if count not in there or self._io.knows_state(digest):
                continue
            data = self._read(partial(self._pages.read_state, there[count]))
            if data is not None:
                parent, tokens = save.chain.state_root, save.chain.tokens[count - 1]
                self._io.append_state(StoredPage(digest, parent, 0, tokens, memoryview(data)))
                self.num_states_written += 1
            return True
        return False

    def _is_due(self, save: _Save, num_pages: int) -> bool:
        is_found = num_pages == save.num_found
        return save.is_final or is_found or num_pages * self._page_bytes >= self._state_bytes

    def _read(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as exc:  # of the device: the next step will tell who waits for it
            logger.warning("pages cannot be read out of the pool, and none are written to disk from now on: %s", exc)
            self._is_broken = True
            self._saves.clear()
            return None

    def finish(self, end_s: float) -> None:
        """Write everything that is worth it and still there, what is retained first, then those used last, until
        `end_s` of the monotonic clock. Nothing steps any more."""
        if not self._is_broken:
            self._saves.extend(reversed(self._warm.values()))
        if self._cache.num_retained:
            retained = self._cache.is_retained
            self._saves = deque(sorted(self._saves, key=lambda save: not retained(save.namespace, save.key)))
        self._warm.clear()
        self._num_warm = 0
        while self._saves and time.monotonic() < end_s:
            if self._io.wait_for_room(end_s - time.monotonic()):
                self.move()
