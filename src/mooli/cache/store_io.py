"""The two threads between a store of pages and the engine: one reads, one writes, and nobody waits for either.

Owns the threads and what lies between them and the thread that steps: pages that were read and not taken, and pages to
be written, both bounded in bytes. What does not fit is not asked for, or not written. Knows digests and bytes; never a
request, the tree or a device.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    more will come, be it that all has or that the next could not be read."""

    number: int
    first: int
    num_pages: int
    data: bytes
    is_last: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class _Load:
    number: int
    first: int
    digests: list[bytes]
    tokens: list[bytes]


def _nothing() -> None:
    pass


class StoreIO:
    """Reads and writes pages of `page_bytes`. All methods are called on one thread, and none of them waits but
    `close`."""

    def __init__(self, store: Store, page_bytes: int) -> None:
        self._store = store
        self._page_bytes = page_bytes
        self._lock = threading.Condition()
        self._wake: Callable[[], None] = _nothing
        self._loads: queue.SimpleQueue[_Load | None] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        # Under the lock:
        self._arrived: deque[Piece] = deque()
        self._cancelled: set[int] = set()
        self._queued: set[bytes] = set()
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

    def load(self, number: int, first: int, digests: list[bytes], tokens: list[bytes]) -> None:
        """Read pages of a chain, the first of which is its page `first`: their pieces come by `take`."""
        self._loads.put(_Load(number, first, digests, tokens))

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
        num_bytes = sum(len(page.payload) for page in pages)
        names = [page.digest for page in pages]
        with self._lock:
            self._queued.update(names)
            self._queued_bytes += num_bytes

        def write() -> None:
            try:
                self._store.append(pages)
            finally:
                with self._lock:
                    self._queued.difference_update(names)
                    self._queued_bytes -= num_bytes
                    wakes, self._wants_room = self._wants_room, False
                    self._lock.notify_all()
                if wakes:
                    self._tell()

        self._orders.put(write)

    def touch(self, digests: Sequence[bytes]) -> None:
        """These pages were used."""
        self._orders.put(lambda: self._store.touch(digests))

    def forget(self, digests: Sequence[bytes]) -> None:
        """These pages are not to be found any more."""
        self._orders.put(lambda: self._store.forget(digests))

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
            with self._lock:
                self._lock.wait_for(lambda: self._staged_bytes < MOST_STAGED_BYTES or self._is_over(load))
                if self._is_over(load):
                    self._cancelled.discard(load.number)
                    return
            end = min(num_pages, count + step)
            started_s = time.perf_counter()
            self._reading = (load.number, time.monotonic())
            try:
                payloads = self._store.read(load.digests[count:end], load.tokens[count:end])
            except Exception as exc:
                self._fail("read", exc)
                payloads = []
            data = b"".join(payloads)
            seconds = time.perf_counter() - started_s
            self._reading = (0, 0.0)
            is_last = end == num_pages or len(payloads) < end - count
            with self._lock:
                self._staged_bytes += len(data)
                self._arrived.append(Piece(load.number, load.first + count, len(payloads), data, is_last, seconds))
            self._tell()
            if is_last:
                return
            count = end

    def _is_over(self, load: _Load) -> bool:
        return self._is_closed or load.number in self._cancelled

    def _write_all(self) -> None:
        flush_at_s = time.monotonic() + FLUSH_S
        order: Callable[[], object] | None
        while True:
            try:
                order = self._orders.get(timeout=max(0.0, flush_at_s - time.monotonic()))
            except queue.Empty:
                order, flush_at_s = self._store.flush, time.monotonic() + FLUSH_S
            if order is None:
                break
            try:
                order()
            except Exception as exc:
                self._fail("written", exc)
        try:
            self._store.close()
        except Exception as exc:
            self._fail("closed", exc)

    def _fail(self, what: str, exc: Exception) -> None:
        if not self._has_failed:
            self._has_failed = True
            logger.warning("the store of pages cannot be %s: %s: %s", what, type(exc).__name__, exc)
