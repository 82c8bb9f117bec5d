"""Chains of pages for a store, and files that fail, are slow, or end with their process.

For all tests of the KV cache on disk."""

from __future__ import annotations

import errno
import hashlib
import os
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


def chain(name: object, length: int, *, after: list[StoredPage] | None = None) -> list[StoredPage]:
    """`length` pages; those of `after` come first."""
    pages = list(after or [])
    while len(pages) < length + len(after or []):
        parent = pages[-1].digest if pages else ROOT
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
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "lock")


def open_store(folder: Path, **changes: Any) -> PageStore:
    given: dict[str, Any] = {
        "page_tokens": PAGE_TOKENS,
        "page_bytes": PAGE_BYTES,
        "max_bytes": 1 << 20,
        "files": QuickFiles(),
    }
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
