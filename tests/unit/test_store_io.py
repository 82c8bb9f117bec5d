"""The threads of the store: nobody waits for them, what they hold is bounded, and faults end nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import pytest

from disk_fakes import MemoryStore
from mooli.cache import store_io
from mooli.cache.store.page_store import StoredPage
from mooli.cache.store_io import Piece, StoreIO

PAGE_BYTES = 64
WAIT_S = 60.0


def page(number: int) -> StoredPage:
    name = number.to_bytes(32, "big")
    return StoredPage(name, (number - 1).to_bytes(32, "big"), number, bytes(4), bytes([number % 256]) * PAGE_BYTES)


def names(count: int) -> list[bytes]:
    return [page(number + 1).digest for number in range(count)]


class GatedStore(MemoryStore):
    """Reads and writes when it is let, and raises when it is told to. hangs: a read that does not come back."""

    def __init__(self) -> None:
        super().__init__(1)
        self.may_read, self.may_write = threading.Event(), threading.Event()
        self.may_read.set()
        self.may_write.set()
        self.reads: list[int] = []
        self.raises: Exception | None = None
        self.has_come = threading.Event()
        """A page was written."""

    def read(self, digests: Sequence[bytes], tokens: Sequence[bytes]) -> list[bytes]:
        assert self.may_read.wait(WAIT_S)
        self.reads.append(len(digests))
        if self.raises is not None:
            raise self.raises
        return super().read(digests, tokens)

    def append(self, pages: Sequence[StoredPage]) -> int:
        assert self.may_write.wait(WAIT_S)
        if self.raises is not None:
            raise self.raises
        count = super().append(pages)
        self.has_come.set()
        return count


class Opened:
    """A store with pages 1 … count, its threads, and what wakes."""

    def __init__(self, count: int = 0) -> None:
        self.store = GatedStore()
        self.store.append([page(number + 1) for number in range(count)])
        self.store.has_come.clear()
        self.states = MemoryStore(1)
        self.io = StoreIO(self.store, PAGE_BYTES, self.states)
        self.woken = threading.Semaphore(0)
        self.io.on_change(self.woken.release)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.may_read.set()
        self.store.may_write.set()
        self.io.close(WAIT_S)

    def pieces_until(self, is_enough: Callable[[list[Piece]], bool]) -> list[Piece]:
        pieces: list[Piece] = []
        while not is_enough(pieces):
            assert self.woken.acquire(timeout=WAIT_S), "nobody was woken"
            pieces += self.io.take()
        return pieces


def is_whole(pieces: list[Piece]) -> bool:
    return bool(pieces) and pieces[-1].is_last


def test_a_load_comes_in_pieces_and_wakes_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_io, "PIECE_BYTES", 3 * PAGE_BYTES)
    with Opened(8) as opened:
        assert opened.io.on_disk(names(9)) == 8 and opened.io.take() == []
        opened.io.load(1, 4, names(8), [bytes(4)] * 8)
        pieces = opened.pieces_until(is_whole)
        assert [(piece.first, piece.num_pages) for piece in pieces] == [(4, 3), (7, 3), (10, 2)]
        assert b"".join(piece.data for piece in pieces) == b"".join(page(n + 1).payload for n in range(8))
        assert not opened.io.has_arrived and opened.store.reads == [3, 3, 2]


def test_what_cannot_be_read_ends_a_load_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with Opened(2) as opened, caplog.at_level(logging.WARNING):
        opened.io.load(1, 0, names(3), [bytes(4)] * 3)
        (piece,) = opened.pieces_until(is_whole)
        assert (piece.num_pages, piece.is_last) == (2, True)
        opened.store.raises = OSError("a disk that breaks")
        for number in (2, 3):
            opened.io.load(number, 0, names(2), [bytes(4)] * 2)
            (piece,) = opened.pieces_until(is_whole)
            assert (piece.number, piece.num_pages, piece.is_last) == (number, 0, True)
        opened.io.append([page(1)])
    assert [record.message for record in caplog.records if "disk that breaks" in record.message] == [
        "the store of pages cannot be read: OSError: a disk that breaks"
    ]


def test_a_state_comes_last_and_is_used_and_forgotten_with_its_page() -> None:
    with Opened(5) as opened:
        io, states = opened.io, opened.states
        for number in (2, 4):
            io.append_state(page(number)._replace(position=0))
            assert io.knows_state(page(number).digest), "on its way, or there"
        io.append([page(6)])  # behind these
        assert opened.store.has_come.wait(WAIT_S)
        assert [io.deepest_state(names(count)) for count in (1, 3, 5)] == [0, 2, 4]
        io.load(1, 2, names(4)[2:], [bytes(4)] * 2, (page(4).digest, bytes(4)))
        first, last = opened.pieces_until(is_whole)
        assert (first.num_pages, first.is_last, last.first, last.state) == (2, False, 4, page(4).payload)
        io.load(2, 9, [], [], (page(9).digest, bytes(4)))
        (last,) = opened.pieces_until(is_whole)
        assert (last.num_pages, last.num_bytes, last.state) == (0, 0, None)
        io.touch(names(4))
        io.forget([page(2).digest])
    assert (opened.store.num_touched, states.num_touched, len(states.pages)) == (4, 1, 1)
    assert states.is_closed and opened.store.is_closed


def test_pages_that_nobody_takes_stop_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_io, "PIECE_BYTES", PAGE_BYTES)
    monkeypatch.setattr(store_io, "MOST_STAGED_BYTES", 3 * PAGE_BYTES)
    with Opened(20) as opened:
        opened.io.load(1, 0, names(20), [bytes(4)] * 20)
        opened.io.load(2, 0, names(20), [bytes(4)] * 20)
        pieces: list[Piece] = []
        while not any(piece.number == 1 and piece.is_last for piece in pieces):
            assert opened.woken.acquire(timeout=WAIT_S)
            taken = opened.io.take()
            assert sum(len(piece.data) for piece in taken) <= 3 * PAGE_BYTES
            pieces += taken
        opened.io.cancel(2)
    assert opened.store.is_closed and sum(opened.store.reads) < 30


def test_a_queue_that_is_full_refuses_and_says_when_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_io, "MOST_QUEUED_BYTES", 2 * PAGE_BYTES)
    with Opened() as opened:
        opened.store.may_write.clear()
        assert opened.io.has_room
        opened.io.append([page(1), page(2)])
        assert not opened.io.has_room and not opened.io.wait_for_room(0.0)
        assert opened.io.known(names(3)) == 2 and opened.io.on_disk(names(3)) == 0
        opened.store.may_write.set()
        assert opened.woken.acquire(timeout=WAIT_S)
        assert opened.io.has_room and opened.io.known(names(3)) == opened.io.on_disk(names(3)) == 2
        opened.io.append([page(3)])
        opened.io.touch(names(2))
        opened.io.forget(names(3)[2:])
    assert list(opened.store.pages) == names(2) and opened.store.num_touched == 2


def test_a_disk_that_hangs_is_known_and_its_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_io, "STUCK_S", 0.0)
    with Opened(2) as opened:
        opened.store.may_read.clear()
        opened.store.may_write.clear()
        opened.io.load(1, 0, names(2), [bytes(4)] * 2)
        opened.io.append([page(3)])
        opened.io.alarm(0.0)
        assert opened.woken.acquire(timeout=WAIT_S)
        while opened.io._reading == (0, 0.0):
            threading.Event().wait(0.001)
        assert not opened.io.is_stuck
        opened.io.cancel(1)
        assert opened.io.is_stuck
        assert not opened.io.close(0.0)


def test_whoever_has_gone_is_not_woken(caplog: pytest.LogCaptureFixture) -> None:
    with Opened(1) as opened, caplog.at_level(logging.WARNING):

        def gone() -> None:
            opened.woken.release()
            raise OSError("a closed pipe")

        opened.io.on_change(gone)
        opened.io.load(1, 0, names(1), [bytes(4)])
        assert is_whole(opened.pieces_until(is_whole))
        opened.io.alarm(1000.0)  # which the end does not wait for
    assert not caplog.records
