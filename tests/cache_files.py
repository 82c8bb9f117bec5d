"""Chains of pages for a store, and files that fail, are slow, or end with their process.

For all tests of the KV cache on disk."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mooli.cache.store.files import Buffer, Files
from mooli.cache.store.page_store import PageStore, StoredPage

NAMESPACE = hashlib.sha256(b"namespace").digest()
PAGE_TOKENS = 4
PAGE_BYTES = 300

ROOT = hashlib.sha256(b"root").digest()


def page_after(parent: bytes, position: int, words: str, page_bytes: int = PAGE_BYTES) -> StoredPage:
    """A page whose payload follows from its digest, so that what is read can be checked by itself."""
    tokens = hashlib.sha256(words.encode()).digest()[: PAGE_TOKENS * 4]
    digest = hashlib.sha256(parent + tokens).digest()
    return StoredPage(digest, parent, position, tokens, payload_of(digest, page_bytes))


def payload_of(digest: bytes, page_bytes: int = PAGE_BYTES) -> bytes:
    return (digest * (page_bytes // len(digest) + 1))[:page_bytes]


def chain(name: object, length: int, *, after: list[StoredPage] | None = None, root: bytes = ROOT) -> list[StoredPage]:
    """`length` pages; those of `after` come first."""
    pages = list(after or [])
    while len(pages) < length + len(after or []):
        parent = pages[-1].digest if pages else root
        pages.append(page_after(parent, len(pages), f"{name} {len(pages)}"))
    return pages


def digests(pages: list[StoredPage]) -> list[bytes]:
    return [page.digest for page in pages]


def found(store: PageStore, pages: list[StoredPage]) -> int:
    """How many leading pages are read. Each must be what was written, whatever happened to the files."""
    read = store.read(digests(pages), [page.tokens for page in pages])
    for page, payload in zip(pages, read, strict=False):
        assert bytes(payload) == page.payload
    return len(read)


def total_bytes(folder: Path) -> int:
    """Of all files but locks: a lock file has who holds it."""
    total = 0
    for entry in os.scandir(folder):
        if entry.is_dir():
            total += total_bytes(Path(entry.path))
        elif entry.name != "lock":
            total += entry.stat().st_size
    return total


_ticks = itertools.count(1_700_000_000)


def tick() -> float:
    """A clock on which every look takes a second."""
    return float(next(_ticks))


def open_store(folder: Path, **changes: Any) -> PageStore:
    given: dict[str, Any] = {"page_tokens": PAGE_TOKENS, "page_bytes": PAGE_BYTES, "max_bytes": 1 << 20}
    given |= {"files": QuickFiles(), "clock": tick}
    return PageStore.open(folder, changes.pop("namespace", NAMESPACE), **{**given, **changes})


class QuickFiles(Files):
    """Does not wait for the disk. Whoever reads these files, after a kill too, sees the same."""

    def sync(self, descriptor: int) -> None:
        pass

    def sync_folder(self, folder: Path) -> None:
        pass


class FaultyFiles(QuickFiles):
    """Fails at call number `at` of those that write (from 0), and with `for_good` at all from there on.

    error: what is raised. part: so many bytes of the data are written first, where it is a write. calls: how many there
    were so far.
    """

    def __init__(self, at: int | None, error: int = errno.ENOSPC, *, part: int = 0, for_good: bool = True) -> None:
        self.at = at
        self.error = error
        self.part = part
        self.for_good = for_good
        self.calls = 0
        self.failed = 0

    def _fails(self) -> bool:
        number, self.calls = self.calls, self.calls + 1
        fails = self.at is not None and (number == self.at or (self.for_good and number > self.at))
        self.failed += fails
        return fails

    def _pass(self) -> None:
        if self._fails():
            raise OSError(self.error, os.strerror(self.error))

    def write(self, descriptor: int, data: Buffer, offset: int) -> int:
        if self._fails():
            if self.part:
                super().write(descriptor, memoryview(data)[: self.part], offset)
            raise OSError(self.error, os.strerror(self.error))
        return super().write(descriptor, data, offset)

    def create(self, path: Path) -> int:
        self._pass()
        return super().create(path)

    def truncate(self, descriptor: int, num_bytes: int) -> None:
        self._pass()
        super().truncate(descriptor, num_bytes)

    def sync(self, descriptor: int) -> None:
        self._pass()
        super().sync(descriptor)

    def sync_folder(self, folder: Path) -> None:
        self._pass()
        super().sync_folder(folder)

    def rename(self, path: Path, target: Path) -> None:
        self._pass()
        super().rename(path, target)

    def unlink(self, path: Path) -> None:
        self._pass()
        super().unlink(path)


class BadReads(QuickFiles):
    """Fails at call number `at` of those that read or look (from 0); with `for_good` at all from there on."""

    def __init__(self, at: int | None, *, for_good: bool) -> None:
        self.at = at
        self.for_good = for_good
        self.calls = 0

    def _pass(self) -> None:
        number, self.calls = self.calls, self.calls + 1
        if self.at is not None and (number == self.at or (self.for_good and number > self.at)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def open_to_read(self, path: Path) -> int:
        self._pass()
        return super().open_to_read(path)

    def read(self, descriptor: int, num_bytes: int, offset: int) -> bytes:
        self._pass()
        return super().read(descriptor, num_bytes, offset)

    def status(self, path: Path) -> os.stat_result:
        self._pass()
        return super().status(path)

    def names(self, folder: Path) -> list[str]:
        self._pass()
        return super().names(folder)


class ShortWrites(QuickFiles):
    """Takes few bytes a call."""

    def __init__(self, most: int) -> None:
        self._most = most

    def write(self, descriptor: int, data: Buffer, offset: int) -> int:
        return super().write(descriptor, memoryview(data)[: self._most], offset)


class Died(BaseException):
    """The process that used these files is no more."""


class DyingFiles(Files):
    """The files of a process that ends at call number `at` of those that change something (from 0).

    part: so many bytes of that call are written, where it is a write. lost: draws whether a write that was never synced
    is lost with the machine; None where only the process ends. Nothing can be done with them afterwards; `bury` closes
    what was open.
    """

    def __init__(self, at: int | None, *, part: int = 0, lost: random.Random | None = None) -> None:
        self.at = at
        self.part = part
        self.lost = lost
        self.calls = 0
        self.is_dead = False
        self._open: set[int] = set()
        self._locks: set[int] = set()
        self._unsynced: list[tuple[int, int, bytes, int]] = []
        """Descriptor, offset, what was there, and how long the file was."""

    def _live(self) -> None:
        if self.is_dead:
            raise Died

    def _change(self) -> None:
        self._live()
        number, self.calls = self.calls, self.calls + 1
        if number == self.at:
            self.is_dead = True
            raise Died

    def bury(self) -> None:
        """The process has ended, now if not before."""
        self.is_dead = True
        for descriptor, offset, before, size in reversed(self._unsynced):
            if self.lost is not None and self.lost.random() < 0.5 and os.fstat(descriptor).st_size >= size:
                os.pwrite(descriptor, before, offset)
        for descriptor in self._open:
            os.close(descriptor)
        self._open.clear()

    def _opened(self, descriptor: int) -> int:
        self._open.add(descriptor)
        return descriptor

    def open_to_read(self, path: Path) -> int:
        self._live()
        return self._opened(super().open_to_read(path))

    def open_to_write(self, path: Path) -> int:
        self._live()
        return self._opened(super().open_to_write(path))

    def open_lock(self, path: Path) -> int:
        self._live()
        descriptor = self._opened(super().open_lock(path))
        self._locks.add(descriptor)
        return descriptor

    def create(self, path: Path) -> int:
        self._change()
        return self._opened(super().create(path))

    def close(self, descriptor: int) -> None:
        self._live()
        # What was not synced may be taken back later.
        if all(descriptor != one[0] for one in self._unsynced):
            self._open.discard(descriptor)
            self._locks.discard(descriptor)
            super().close(descriptor)

    def write(self, descriptor: int, data: Buffer, offset: int) -> int:
        view = memoryview(data)
        if not self.is_dead and self.calls == self.at and self.part:
            self._write(descriptor, view[: self.part], offset)
        self._change()
        return self._write(descriptor, view, offset)

    def _write(self, descriptor: int, data: memoryview, offset: int) -> int:
        if self.lost is not None and descriptor not in self._locks:
            before = os.pread(descriptor, len(data), offset).ljust(len(data), b"\0")
            self._unsynced.append((descriptor, offset, before, os.fstat(descriptor).st_size))
        return super().write(descriptor, data, offset)

    def truncate(self, descriptor: int, num_bytes: int) -> None:
        self._change()
        super().truncate(descriptor, num_bytes)

    def sync(self, descriptor: int) -> None:
        self._change()
        self._unsynced = [one for one in self._unsynced if one[0] != descriptor]

    def sync_folder(self, folder: Path) -> None:
        self._change()

    def rename(self, path: Path, target: Path) -> None:
        self._change()
        super().rename(path, target)

    def unlink(self, path: Path) -> None:
        self._change()
        super().unlink(path)

    def lock(self, descriptor: int) -> bool:
        self._live()
        return super().lock(descriptor)


class SlowFiles(QuickFiles):
    """A disk of so many bytes a second in both directions. wait: is told how long each call takes, and sleeps, or
    counts."""

    def __init__(self, bytes_per_s: float, wait: Callable[[float], object]) -> None:
        self._bytes_per_s = bytes_per_s
        self._wait = wait

    def read(self, descriptor: int, num_bytes: int, offset: int) -> bytes:
        data = super().read(descriptor, num_bytes, offset)
        self._wait(len(data) / self._bytes_per_s)
        return data

    def write(self, descriptor: int, data: Buffer, offset: int) -> int:
        written = super().write(descriptor, data, offset)
        self._wait(written / self._bytes_per_s)
        return written
