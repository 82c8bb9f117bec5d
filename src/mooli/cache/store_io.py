"""The two threads between a store of pages and the engine: one reads, one writes, and nobody waits for either.

Owns the threads and what lies between them and the thread that steps: pages that were read and not taken, and pages to
be written, both bounded in bytes. What does not fit is not asked for, or not written. Knows digests and bytes; never a
request, the tree or a device.

Recurrent states are in a store of their own, where each has the name of the page that it comes after and is a chain of
one: without its pages it is of no use, and with them it is found.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from mooli.cache.store.page_store import StoredPage

logger = logging.getLogger(__name__)

PIECE_BYTES = 4 << 20
"""Read at a time: a disk is fast in large pieces, and the first of them are in the pool while the next is read."""

MOST_STAGED_BYTES = 64 << 20
"""Read, and not taken yet."""

MOST_QUEUED_BYTES = 64 << 20
"""To be written."""

FLUSH_S = 30.0
"""How often what was written is made safe against the end of the machine, and what is too old goes."""

STUCK_S = 1.0
"""A read that takes so long, and for which nobody waits any more, hangs."""


class Store(Protocol):
    """What is needed of a `mooli.cache.store.PageStore`. Every method may be called from any thread."""

    def leading(self, digests: Sequence[bytes]) -> int:
        """How many of them are there, from the first on. Looks at memory alone."""
        ...

    def read(self, digests: Sequence[bytes], tokens: Sequence[bytes]) -> list[Any]:
        """The bytes of the first of these pages, up to one that is not there, or wrong."""
        ...

    def append(self, pages: Sequence[StoredPage]) -> int: ...

    def touch(self, digests: Sequence[bytes]) -> None: ...

    def forget(self, digests: Sequence[bytes]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """What has come of a load: pages first .. first + num_pages of its chain in `data`, read in `seconds`. is_last: no
    more will come, be it that all has or that the next could not be read. state: the one after the last page of the
    load, where it was asked for and all pages have come."""

    number: int
    first: int
    num_pages: int
    data: bytes
    is_last: bool
    seconds: float
    state: bytes | memoryview | None = None

    @property
    def num_bytes(self) -> int:
        return len(self.data) + (0 if self.state is None else len(self.state))


@dataclass(frozen=True, slots=True)
class _Load:
    """state: name and tokens of the page whose state comes last."""

    number: int
    first: int
    digests: list[bytes]
    tokens: list[bytes]
    state: tuple[bytes, bytes] | None


def _nothing() -> None:
    pass


class StoreIO:
    """Reads and writes pages of `page_bytes`. All methods are called on one thread, and none of them waits but
    `close`."""

    def __init__(self, store: Store, page_bytes: int, states: Store | None = None) -> None:
        """states: of the recurrent ones; None for a model that has none."""
        self._store = store
        self._states = states
        self._stores = [store] if states is None else [store, states]
        self._page_bytes = page_bytes
        self._lock = threading.Condition()
        self._wake: Callable[[], None] = _nothing
        self._loads: queue.SimpleQueue[_Load | None] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        # Under the lock:
        self._arrived: deque[Piece] = deque()
        self._cancelled: set[int] = set()
        self._queued: set[bytes] = set()
        self._queued_states: set[bytes] = set()
        self._staged_bytes = self._queued_bytes = 0
        self._is_told = self._wants_room = self._is_closed = False
        self._has_failed = False
        self._timers: list[threading.Timer] = []
        self._reading: tuple[int, float] = (0, 0.0)  # the load, and since when
        self._threads = [
            threading.Thread(target=self._read_all, name="mooli-store-reader", daemon=True),
            threading.Thread(target=self._write_all, name="mooli-store-writer", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def on_change(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, on another thread, when pages have arrived or there is room again for more to write."""
        self._wake = wake

    def alarm(self, seconds: float) -> None:
        """Have it called after a time too."""
        timer = threading.Timer(seconds, self._wake)
        timer.daemon = True
        timer.start()
        self._timers = [timer, *(other for other in self._timers if other.is_alive())]

    # -- reading --
    def on_disk(self, digests: Sequence[bytes]) -> int:
        """How many leading pages of a chain can be read."""
        return self._store.leading(digests)

    def deepest_state(self, digests: Sequence[bytes]) -> int:
        """After how many pages of a chain the last state comes that can be read; 0 where there is none."""
        if self._states is None:
            return 0
        count = len(digests)
        while count and not self._states.leading(digests[count - 1 : count]):
            count -= 1
        return count

    def load(
        self,
        number: int,
        first: int,
        digests: list[bytes],
        tokens: list[bytes],
        state: tuple[bytes, bytes] | None = None,
    ) -> None:
        """Read pages of a chain, the first of which is its page `first`: their pieces come by `take`. There may be none
        where a state is asked for, by the name and the tokens of the page before it."""
        self._loads.put(_Load(number, first, digests, tokens, state))

    def cancel(self, number: int) -> None:
        """Nobody waits for a load any more that has not had its last piece."""
        with self._lock:
            self._cancelled.add(number)
            self._lock.notify_all()

    @property
    def is_stuck(self) -> bool:
        """The disk does not answer: what is asked for now would come too late."""
        number, since_s = self._reading
        return number in self._cancelled and time.monotonic() - since_s > STUCK_S

    @property
    def has_arrived(self) -> bool:
        return bool(self._arrived)

    def take(self) -> list[Piece]:
        """What has arrived since this was last asked, of loads that were cancelled too."""
        if not self._arrived and not self._is_told:
            return []
        with self._lock:
            pieces = list(self._arrived)
            self._arrived.clear()
            self._cancelled.difference_update(piece.number for piece in pieces if piece.is_last)
            self._staged_bytes = 0
            self._is_told = False
            self._lock.notify_all()
        return pieces

    # -- writing --
    def known(self, digests: Sequence[bytes]) -> int:
        """How many leading pages of a chain are on disk, or on their way there."""
        count = 0
        while True:
            count += self._store.leading(digests[count:])
            before = count
            with self._lock:
                while count < len(digests) and digests[count] in self._queued:
                    count += 1
            if count == before:
                return count

    @property
    def has_room(self) -> bool:
        """More may be given to `append` now. Where not, the function of `on_change` is called once there is."""
        with self._lock:
            self._wants_room = self._queued_bytes >= MOST_QUEUED_BYTES or self._is_closed
            return not self._wants_room

    def append(self, pages: Sequence[StoredPage]) -> None:
        """Have pages written, those of a chain in their order."""
        self._append(self._store, pages, self._queued)

    def knows_state(self, digest: bytes) -> bool:
        """Whether the state after that page is on disk, or on its way there."""
        return digest in self._queued_states or (self._states is not None and self._states.leading((digest,)) > 0)

    def append_state(self, state: StoredPage) -> None:
        """Have a state written, named as the page that it comes after."""
        if self._states is not None:
            self._append(self._states, [state], self._queued_states)

    def _append(self, store: Store, pages: Sequence[StoredPage], queued: set[bytes]) -> None:
        num_bytes = sum(len(page.payload) for page in pages)
        names = [page.digest for page in pages]
        with self._lock:
            queued.update(names)
            self._queued_bytes += num_bytes

        def write() -> None:
            try:
                store.append(pages)
            finally:
                with self._lock:
                    queued.difference_update(names)
                    self._queued_bytes -= num_bytes
                    wakes, self._wants_room = self._wants_room, False
                    self._lock.notify_all()
                if wakes:
                    self._tell()

        self._orders.put(write)

    def touch(self, digests: Sequence[bytes]) -> None:
        """These pages were used, and the state after the last of them if there is one."""
        self._orders.put(lambda: self._store.touch(digests))
        if (states := self._states) is not None:
            self._orders.put(lambda: states.touch(digests[-1:]))

    def forget(self, digests: Sequence[bytes]) -> None:
        """These pages are not to be found any more, nor the states after them."""
        for store in self._stores:
            self._orders.put(partial(store.forget, digests))

    def wait_for_room(self, timeout_s: float) -> bool:
        """Only before `close`."""
        with self._lock:
            return self._lock.wait_for(lambda: self._queued_bytes < MOST_QUEUED_BYTES, max(0.0, timeout_s))

    def close(self, timeout_s: float) -> bool:
        """Write what was given, have the store closed and end the threads. False where that takes longer: it goes on
        then, as far as the process lives."""
        with self._lock:
            self._is_closed = True
            self._lock.notify_all()
        self._loads.put(None)
        self._orders.put(None)
        end_s = time.monotonic() + timeout_s
        for timer in self._timers:
            timer.cancel()
        for thread in [*self._threads, *self._timers]:
            thread.join(max(0.0, end_s - time.monotonic()))
        self._timers, self._wake = [], _nothing
        return not any(thread.is_alive() for thread in self._threads)

    # -- on the two threads --
    def _tell(self) -> None:
        with self._lock:
            if self._is_told or self._is_closed:
                return
            self._is_told = True
        try:
            self._wake()
        except Exception:  # whoever is to be woken has gone
            logger.debug("nobody hears of the store any more", exc_info=True)

    def _read_all(self) -> None:
        while (load := self._loads.get()) is not None:
            self._read(load)

    def _read(self, load: _Load) -> None:
        step = max(1, PIECE_BYTES // self._page_bytes)
        count, num_pages = 0, len(load.digests)
        while count < num_pages:
            end = min(num_pages, count + step)
            read = self._read_some(load, self._store, load.digests[count:end], load.tokens[count:end])
            if read is None:
                return
            payloads, seconds = read
            is_last = len(payloads) < end - count or (end == num_pages and load.state is None)
            data = b"".join(payloads)
            self._arrive(Piece(load.number, load.first + count, len(payloads), data, is_last, seconds))
            if is_last:
                return
            count = end
        if load.state is None or self._states is None:
            return
        digest, tokens = load.state
        read = self._read_some(load, self._states, [digest], [tokens])
        if read is not None:
            payloads, seconds = read
            state = payloads[0] if payloads else None
            self._arrive(Piece(load.number, load.first + num_pages, 0, b"", True, seconds, state))

    def _read_some(
        self, load: _Load, store: Store, digests: list[bytes], tokens: list[bytes]
    ) -> tuple[list[Any], float] | None:
        """What could be read, and in how many seconds; None where nobody wants it any more."""
        with self._lock:
            self._lock.wait_for(lambda: self._staged_bytes < MOST_STAGED_BYTES or self._is_over(load))
            if self._is_over(load):
                self._cancelled.discard(load.number)
                return None
        started_s = time.perf_counter()
        self._reading = (load.number, time.monotonic())
        try:
            payloads = store.read(digests, tokens)
        except Exception as exc:
            self._fail("read", exc)
            payloads = []
        self._reading = (0, 0.0)
        return payloads, time.perf_counter() - started_s

    def _arrive(self, piece: Piece) -> None:
        with self._lock:
            self._staged_bytes += piece.num_bytes
            self._arrived.append(piece)
        self._tell()

    def _is_over(self, load: _Load) -> bool:
        return self._is_closed or load.number in self._cancelled

    def _write_all(self) -> None:
        flush_at_s = time.monotonic() + FLUSH_S
        order: Callable[[], object] | None
        while True:
            try:
                order = self._orders.get(timeout=max(0.0, flush_at_s - time.monotonic()))
            except queue.Empty:
                order, flush_at_s = self._flush, time.monotonic() + FLUSH_S
            if order is None:
                break
            try:
                order()
            except Exception as exc:
                self._fail("written", exc)
        for store in self._stores:
            try:
                store.close()
            except Exception as exc:
                self._fail("closed", exc)

    def _flush(self) -> None:
        for store in self._stores:
            store.flush()

    def _fail(self, what: str, exc: Exception) -> None:
        if not self._has_failed:
            self._has_failed = True
            logger.warning("the store of pages cannot be %s: %s: %s", what, type(exc).__name__, exc)
