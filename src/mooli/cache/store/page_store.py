"""A store of KV pages in a folder: what is there, read it, add to it, and let the coldest go.

Owns the rules of what is kept and for how long, and what a fault means: a miss, one line in the log, and after a fault
of writing a rest before the next try, longer each time. Nothing that happens to a file raises, and no page is given
that is not the one asked for: each is checked by checksum, by digest and by its tokens. Never makes a digest, and never
knows what a payload is.

Any thread may call any method. `leading`, `touch` and `forget` look at memory alone and never wait for a disk; the
others may take as long as a disk does. Readers do not wait for a writer.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mooli.cache.store import segments
from mooli.cache.store.encryption import EXTRA_BYTES, PageKeys
from mooli.cache.store.files import Buffer, Files
from mooli.cache.store.folder import LOCK, Limits, Lock, open_folder, room_name, writer_of
from mooli.cache.store.index import PageEntry, PageIndex, Place
from mooli.cache.store.layout import DIGEST_BYTES, Body, PageShape
from mooli.cache.store.segment_set import SegmentSet
from mooli.cache.store.segments import SegmentWriter
from mooli.errors import StoreError

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 30.0
"""After which one that may only read looks what the writer has added, and whether it has ended."""

_SAVE_USES_S = 600.0
"""Between two times that the disk is told when pages were last used. A process that is killed forgets as much."""

_REST_S, _MOST_REST_S = 60.0, 3600.0
"""After a fault of writing, before it is tried again; twice as long after each that follows, up to the second."""

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What says nothing of the file: another time it may go well."""


class StoredPage(NamedTuple):
    """A page and what identifies it.

    digest: 32 bytes, of the tokens up to its end. parent: the digest of the page before it; of a first page, whatever
    32 bytes its digest begins from. position: in its chain, from 0. tokens: of the page, 4 bytes each, as they are
    compared. payload: the bytes of the page.
    """

    digest: bytes
    parent: bytes
    position: int
    tokens: bytes
    payload: bytes | memoryview


@dataclass(frozen=True, slots=True)
class StoreStats:
    """is_writer: may add pages. fault: why nothing is written now; None where nothing is wrong. num_bytes: of all
    segments of this namespace, what is reserved included. The others count since the store was opened. pages_wrong: not
    what was once written. pages_evicted: that counted, until room was made or they expired. pages_refused: without the
    page before them, or without room."""

    is_writer: bool
    fault: str | None
    num_pages: int
    num_segments: int
    num_bytes: int
    pages_written: int = 0
    bytes_written: int = 0
    pages_read: int = 0
    bytes_read: int = 0
    pages_wrong: int = 0
    pages_evicted: int = 0
    pages_refused: int = 0


class PageStore:
    """See the module docstring. Made by `open`."""

    def __init__(
        self,
        folder: Path,
        shape: PageShape,
        limits: Limits,
        *,
        ingredients: Mapping[str, Any],
        keys: PageKeys | None,
        files: Files,
        clock: Callable[[], float],
    ) -> None:
        """shape: of what is written, so that of encrypted pages where there are keys."""
        self.folder = folder
        self.room = folder / room_name(shape.namespace)
        self._shape = shape
        self._keys = keys
        self._page_bytes = shape.page_bytes - (EXTRA_BYTES if keys is not None else 0)
        self._limits = limits
        self._files = files
        self._clock = clock
        self._memory_lock = threading.Lock()
        """For what changes in memory; held for no file."""
        self._disk_lock = threading.Lock()
        """For what changes a file; taken before the other."""
        self._index = PageIndex()
        self._segments = SegmentSet(
            folder,
            self.room,
            shape,
            limits,
            index=self._index,
            index_lock=self._memory_lock,
            ingredients=ingredients,
            files=files,
            clock=clock,
            evicted=lambda count: self._count(pages_evicted=count),
        )
        self._lock: Lock | None = None
        self._to_bury: list[Place] = []
        self._looked = self._saved = clock()
        self._fault: str | None = None
        self._rest_s = 0.0
        """Of the last fault; 0 where something was written since."""
        self._rests_until = 0.0
        self._told: set[str] = set()
        self._is_closed = False
        self._counts = StoreStats(False, None, 0, 0, 0)

    @classmethod
    def open(
        cls,
        directory: Path,
        namespace: bytes,
        *,
        page_tokens: int,
        page_bytes: int,
        max_bytes: int,
        min_free_bytes: int = 0,
        ttl_s: float | None = None,
        ingredients: Mapping[str, Any] | None = None,
        keys: PageKeys | None = None,
        files: Files | None = None,
        clock: Callable[[], float] = time.time,
    ) -> PageStore:
        """The pages of one namespace (32 bytes) in a folder that may have those of others. Reads indexes, and no pages.

        max_bytes: of all namespaces in the folder together. min_free_bytes: of its disk, left for others. ttl_s: how
        long a page is kept after its last use; None: for ever. ingredients: what the namespace was made of, in words,
        for who looks at the files. keys: pages are encrypted, with a key for each root of chains, which is the parent
        of their first pages; those of other keys, or of none, are another namespace. One process writes to a
        namespace; another reads what that has finished, and takes over when it ends. Raises StoreError where the folder
        cannot be used.
        """
        if len(namespace) != DIGEST_BYTES:
            raise StoreError(f"a namespace has {DIGEST_BYTES} bytes, not {len(namespace)}")
        if page_tokens < 1 or page_bytes < 1:
            raise StoreError(f"pages of {page_tokens} tokens and {page_bytes} bytes cannot be stored")
        if ttl_s is not None and not ttl_s > 0:
            raise StoreError(f"pages cannot be kept for {ttl_s} s: give more than 0, or None for ever")
        files = files or Files()
        limits = Limits(max_bytes, min_free_bytes, ttl_s)
        ingredients = dict(ingredients or {})
        shape = PageShape(namespace, page_tokens, page_bytes)
        if keys is not None:
            namespace = hashlib.sha256(namespace + keys.fingerprint).digest()
            shape = PageShape(namespace, page_tokens, page_bytes + EXTRA_BYTES)
            ingredients["encryption"] = "AES-256-GCM"
        folder = directory.absolute()
        store = cls(folder, shape, limits, ingredients=ingredients, keys=keys, files=files, clock=clock)
        if not store._segments.slots:
            raise StoreError(
                f"a KV cache on disk of {max_bytes} bytes holds no page of {page_bytes} bytes. Allow more, or turn it"
                " off"
            )
        open_folder(files, folder)
        open_folder(files, store.room)
        try:
            store._begin()
        except OSError as exc:
            raise StoreError(f"the KV cache in {directory} cannot be used: {exc.strerror or exc}") from exc
        return store

    def _begin(self) -> None:
        try:
            self._lock = Lock.take(self._files, self.room / LOCK)
            if self._lock is None:
                pid = writer_of(self._files, self.room)
                logger.info("process %s writes to the KV cache in %s: it is only read here", pid, self.folder)
        except OSError as exc:
            if exc.errno not in _READ_ONLY:
                raise
            logger.warning("the KV cache in %s cannot be written, and is only read: %s", self.folder, exc)
        try:
            self._segments.load(is_writer=self._lock is not None)
            self._segments.expire()
        except BaseException:
            self._release()
            raise

    # -- memory alone --------------------------------------------------------------------------------------------------
    def leading(self, digests: Iterable[bytes]) -> int:
        """How many pages of a chain are there, from its first on."""
        return len(self._index.leading(digests, self._oldest_use()))

    def __contains__(self, digest: bytes) -> bool:
        entry = self._index.get(digest)
        return entry is not None and entry.used >= self._oldest_use()

    def touch(self, digests: Iterable[bytes]) -> None:
        """These were used now."""
        now = self._clock()
        for digest in digests:
            entry = self._index.get(digest)
            segment = entry.segment if entry is not None else None
            if entry is not None and segment is not None:
                entry.used = max(entry.used, now)
                entry.was_reused = segment.was_used = True

    def forget(self, digests: Iterable[bytes]) -> None:
        """These, and what continues them, are there no more. The next call that writes overwrites their bytes."""
        entries = [entry for digest in digests if (entry := self._index.get(digest)) is not None]
        self._drop(entries, is_bad=True)

    @property
    def stats(self) -> StoreStats:
        num_bytes = self._segments.num_bytes()
        with self._memory_lock:
            return replace(
                self._counts,
                is_writer=self._lock is not None and self._fault is None,
                fault=self._fault,
                num_pages=len(self._index),
                num_segments=len(self._segments),
                num_bytes=num_bytes,
            )

    def _oldest_use(self) -> float:
        return float("-inf") if self._limits.ttl_s is None else self._clock() - self._limits.ttl_s

    def _drop(self, entries: Iterable[PageEntry], *, is_bad: bool = False) -> None:
        """These count no more. is_bad: they are not to be found at the next start either."""
        with self._memory_lock:
            places = self._index.drop(entries)
            if is_bad:
                self._to_bury += places

    def _count(self, **more: int) -> None:
        with self._memory_lock:
            self._counts = replace(self._counts, **{k: getattr(self._counts, k) + v for k, v in more.items()})

    def _tell(self, kind: str, message: str, *args: object) -> None:
        """One line for each kind of what goes wrong."""
        if kind not in self._told:
            self._told.add(kind)
            logger.warning(message, *args)

    # -- reading -------------------------------------------------------------------------------------------------------
    def read(self, digests: Sequence[bytes], tokens: Sequence[bytes]) -> list[memoryview]:
        """The payloads of the leading run of a chain, up to the first that cannot be had as it was written.

        tokens: of each page, as they were stored. Takes memory for all of it: ask for a long chain in parts. A part
        need not begin with the first page of a chain.
        """
        with self._memory_lock:
            found = self._index.leading(digests[: len(tokens)], self._oldest_use())
            places = [(entry.segment, entry.slot) for entry in found if entry.segment is not None]
        payloads: list[memoryview] = []
        for piece in segments.pieces(self._shape, places):
            try:
                bodies = segments.read_piece(self._files, self._shape, piece)
            except FileNotFoundError:
                # Another server that needed room has removed it, or a user.
                self._drop(list(piece.segment.entries.values()))
                break
            except OSError as exc:
                self._tell("read", "pages of %s cannot be read, and are left out: %s", piece.segment.path, exc)
                if exc.errno not in _PASSING:
                    self._count(pages_wrong=len(piece.wanted))
                    self._drop(found[len(payloads) : len(payloads) + len(piece.wanted)])
                break
            good = self._check(found, len(payloads), piece, bodies, tokens)
            payloads += good
            if len(good) < len(bodies):
                break
        self._count(pages_read=len(payloads), bytes_read=len(payloads) * self._page_bytes)
        return payloads

    def _check(
        self,
        found: Sequence[PageEntry],
        at: int,
        piece: segments.Piece,
        bodies: Sequence[Body | None],
        tokens: Sequence[bytes],
    ) -> list[memoryview]:
        """The payloads up to the first that is not right."""
        good: list[memoryview] = []
        for number, (slot, body) in enumerate(zip(piece.wanted, bodies, strict=True), at):
            entry = found[number]
            if body is None or body.head.digest != entry.digest:
                if entry.segment is piece.segment and entry.slot == slot:
                    self._count(pages_wrong=1)
                    self._tell("wrong", "a page of %s is not what was written, and is left out", piece.segment.path)
                    self._drop([entry], is_bad=True)
                break
            found_tokens, payload = self._opened(body, entry.root)
            if found_tokens is None or bytes(found_tokens) != tokens[number]:
                self._tell("tokens", "a page of %s has other tokens than were asked for", piece.segment.path)
                break
            good.append(payload)
        return good

    def _opened(self, body: Body, root: bytes) -> tuple[memoryview | None, memoryview]:
        """Tokens and payload; no tokens where they were not encrypted for chains of this root."""
        if self._keys is None:
            return body.tokens, body.payload
        plain = self._keys.unseal(root, body.head.digest, b"".join((body.tokens, body.payload)))
        if plain is None:
            return None, memoryview(b"")
        cut = self._shape.token_bytes
        return memoryview(plain)[:cut], memoryview(plain)[cut:]

    def _closed(self, page: StoredPage, root: bytes) -> tuple[Buffer, Buffer]:
        """What is written of tokens and payload."""
        payload = memoryview(page.payload).cast("B")
        if self._keys is None:
            return page.tokens, payload
        sealed = memoryview(self._keys.seal(root, page.digest, b"".join((page.tokens, payload))))
        cut = self._shape.token_bytes
        return sealed[:cut], sealed[cut:]

    # -- adding --------------------------------------------------------------------------------------------------------
    def append(self, pages: Sequence[StoredPage]) -> int:
        """How many of these were written. They are in the order of their chains; what is there already is left out.

        Raises StoreError for what is no page of this store's kind.
        """
        for page in pages:
            self._require_kind(page)
        with self._disk_lock:
            if not self._may_write():
                return 0
            written = 0
            try:
                self._bury()
                waiting = [page for page in pages if self._index.get(page.digest) is None]
                while waiting and (writer := self._segments.writer()) is not None:
                    count = min(writer.num_left, max(self._segments.check_bytes // self._shape.record_bytes, 1))
                    written += self._write(writer, waiting[:count])
                    waiting = waiting[count:]
                self._count(pages_refused=len(waiting))
            except OSError as exc:
                self._stop_writing(exc)
            if written and self._fault is None and self._rest_s:
                self._rest_s = 0.0
                logger.info("the KV cache in %s is written again", self.folder)
            return written

    def _require_kind(self, page: StoredPage) -> None:
        num_bytes = memoryview(page.payload).nbytes
        if len(page.digest) != DIGEST_BYTES or len(page.parent) != DIGEST_BYTES or page.position < 0:
            raise StoreError("a page has a digest of 32 bytes, that of the page before it, and a place in its chain")
        if len(page.tokens) != self._shape.token_bytes or num_bytes != self._page_bytes:
            raise StoreError(
                f"a page of this store has {self._shape.token_bytes} bytes of tokens and {self._page_bytes} of"
                f" payload, not {len(page.tokens)} and {num_bytes}"
            )

    def _write(self, writer: SegmentWriter, pages: Sequence[StoredPage]) -> int:
        now = self._clock()
        written = 0
        for page in pages:
            if self._index.get(page.digest) is not None:
                continue
            if not self._index.can_follow(page.parent, page.position):
                self._count(pages_refused=1)
                continue
            entry = PageEntry(page.digest, page.parent, page.position, now, now)
            slot = writer.write(entry, *self._closed(page, self._index.root_of(page.parent, page.position)))
            with self._memory_lock:
                is_added = self._index.add(entry, writer.entry, slot)
            written += is_added
            self._count(pages_written=is_added, bytes_written=self._shape.record_bytes)
        return written

    def _may_write(self) -> bool:
        if self._is_closed or (self._fault is not None and not self._has_rested()):
            return False
        if self._lock is None and self._clock() - self._looked >= _LOOK_AGAIN_S:
            self._look_again()
        return self._lock is not None

    def _has_rested(self) -> bool:
        """It is time to try again: nothing is wrong until that fails."""
        now = self._clock()
        if self._rests_until - self._rest_s <= now < self._rests_until:
            return False
        self._fault = None
        return True

    def _look_again(self) -> None:
        """What the writer has added; or be the writer, where there is none any more."""
        self._looked = self._clock()
        try:
            self._lock = Lock.take(self._files, self.room / LOCK)
            self._segments.load(is_writer=self._lock is not None)
        except OSError as exc:
            self._release()
            self._tell("again", "the KV cache in %s cannot be looked at again: %s", self.folder, exc)

    def _bury(self) -> None:
        with self._memory_lock:
            places, self._to_bury = self._to_bury, []
        self._segments.bury([(place.segment, place.slot) for place in places])

    def _stop_writing(self, error: OSError) -> None:
        if error.errno in _PASSING:
            self._tell("passing", "pages were not written to the KV cache in %s: %s", self.folder, error)
            return
        self._fault = error.strerror or str(error)
        self._segments.abandon()
        if not self._rest_s:
            message = "the KV cache in %s cannot be written, and is only read until a later try goes well: %s"
            logger.error(message, self.folder, error)
        self._rest_s = min(max(2 * self._rest_s, _REST_S), _MOST_REST_S)
        self._rests_until = self._clock() + self._rest_s

    # -- upkeep --------------------------------------------------------------------------------------------------------
    def flush(self) -> None:
        """Have the disk take all that was appended; let go what has expired, and what a full disk asks for.

        Pages that were appended outlive their process without it. Call it now and then, from a thread that may wait.
        """
        with self._disk_lock:
            self._segments.expire()
            if self._may_write():
                try:
                    self._bury()
                    self._segments.sync()
                    self._segments.tidy()
                    if self._clock() - self._saved >= _SAVE_USES_S:
                        self._saved = self._clock()
                        self._segments.save_uses()
                except OSError as exc:
                    self._stop_writing(exc)

    def close(self) -> None:
        """Let another process write. Nothing is added or found afterwards. May be called again."""
        with self._disk_lock:
            if self._lock is not None and self._fault is None and not self._is_closed:
                try:
                    self._bury()
                    self._segments.close()
                except OSError as exc:
                    self._stop_writing(exc)
            self._is_closed = True
            self._drop(self._index)
            self._release()

    def _release(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def __enter__(self) -> PageStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
