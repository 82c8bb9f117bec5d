"""Segments as files: made, appended to, closed with an index, found again, and read in large pieces.

Owns the order in which bytes reach a disk. A record's head is written behind its payload, so that a process that is
killed leaves no head without one. A segment is synced before the index that names its records. Never decides which
pages are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mooli.cache.store import layout
from mooli.cache.store.files import Buffer, Files, opened, read_all, write_all
from mooli.cache.store.folder import INDEX, NEW, is_ours
from mooli.cache.store.index import PageEntry, SegmentEntry
from mooli.cache.store.layout import HEAD_BYTES, Header, Listed, PageShape

_LEAST_BYTES = 64 << 20
_MOST_BYTES = 256 << 20
_LEAST_SEGMENTS = 16
"""Of a small budget, so that what goes at once is not much of it."""

_PIECE_BYTES = 8 << 20
_GAP_BYTES = 256 << 10
"""Read and not looked at, as this is cheaper than a second call."""

_READ_AHEAD_BYTES = 1 << 20


def slots_of(shape: PageShape, start: int, max_bytes: int) -> int:
    """How many records a segment has room for where all segments together may take `max_bytes`. May be 0.

    start: bytes before the first record.
    """
    most = min(max_bytes // _LEAST_SEGMENTS, max(_LEAST_BYTES, min(max_bytes // 64, _MOST_BYTES)))
    wanted = (most - start) // (shape.record_bytes + 2 * shape.index_bytes(1))
    return max(wanted, 1) if full_bytes(shape, start, 1) <= max_bytes else 0


def full_bytes(shape: PageShape, start: int, slots: int) -> int:
    """What a full segment takes, with its index and one that replaces it."""
    return start + slots * shape.record_bytes + 2 * shape.index_bytes(slots)


class SegmentWriter:
    """The segment that is written to. Its file is as long as it may become, without taking room on the disk: what it
    may grow to is counted from the start. All methods raise OSError."""

    def __init__(self, files: Files, shape: PageShape, entry: SegmentEntry, slots: int, descriptor: int) -> None:
        self._files = files
        self._shape = shape
        self._descriptor = descriptor
        self.entry = entry
        self.slots = slots

    @classmethod
    def create(
        cls, files: Files, path: Path, shape: PageShape, slots: int, created: float, ingredients: Mapping[str, Any]
    ) -> SegmentWriter:
        """A new one. The caller has made room for `full_bytes`."""
        header = layout.header_bytes(shape, slots, created, ingredients)
        descriptor = files.create(path)
        try:
            files.truncate(descriptor, full_bytes(shape, len(header), slots))
            write_all(files, descriptor, header, 0)
        except BaseException:
            with contextlib.suppress(OSError):
                files.close(descriptor)
                files.unlink(path)
            raise
        return cls(files, shape, SegmentEntry(path, len(header), 0, False), slots, descriptor)

    @classmethod
    def reopen(cls, files: Files, shape: PageShape, entry: SegmentEntry, slots: int) -> SegmentWriter:
        """One that is there. It has no index from now on. `extend` it before anything is added."""
        with contextlib.suppress(FileNotFoundError):
            files.unlink(entry.path.with_suffix(INDEX))
        entry.is_rolled = False
        return cls(files, shape, entry, slots, files.open_to_write(entry.path))

    def extend(self) -> None:
        """To all that it may become. The caller has made room for `full_bytes`."""
        self._files.truncate(self._descriptor, full_bytes(self._shape, self.entry.start, self.slots))

    @property
    def num_left(self) -> int:
        return self.slots - self.entry.num_used

    def write(self, page: PageEntry, tokens: Buffer, payload: Buffer) -> int:
        """The slot of the page. One that fails part of the way is lost."""
        slot = self.entry.num_used
        offset = self.entry.start + slot * self._shape.record_bytes
        head = layout.head_bytes(page.digest, page.parent_digest, page.position, page.written, tokens, payload)
        self.entry.num_used += 1
        write_all(self._files, self._descriptor, payload, offset + HEAD_BYTES + self._shape.token_bytes)
        write_all(self._files, self._descriptor, head + bytes(tokens), offset)
        return slot

    def sync(self) -> None:
        self._files.sync(self._descriptor)

    def roll(self) -> None:
        """No more is written to it: cut to what is there, synced, then named by an index."""
        self._files.truncate(self._descriptor, self.entry.start + self.entry.num_used * self._shape.record_bytes)
        self.sync()
        write_index(self._files, self._shape, self.entry, sync=True)
        self.entry.is_rolled = True
        self.close()

    def close(self) -> None:
        """Leave it as it is. May be called again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                self._files.close(descriptor)


# -- indexes -----------------------------------------------------------------------------------------------------------
def write_index(files: Files, shape: PageShape, segment: SegmentEntry, *, sync: bool) -> None:
    """Name what counts of a segment. Raises OSError; there is the old index then, or none."""
    listed = [
        Listed(slot, entry.digest, entry.parent_digest, entry.position, entry.written, entry.used)
        for slot, entry in sorted(segment.entries.items())
    ]
    path = segment.path.with_suffix(NEW)
    with contextlib.suppress(FileNotFoundError):
        files.unlink(path)
    with opened(files, files.create(path)) as descriptor:
        write_all(files, descriptor, layout.index_bytes(shape, segment.start, listed), 0)
        if sync:
            files.sync(descriptor)
    files.rename(path, segment.path.with_suffix(INDEX))
    if sync:
        files.sync_folder(path.parent)
    segment.was_used = False


class Found(NamedTuple):
    """A segment and what it lists, in the order of its slots. slots: that it has room for; 0 where that was not
    looked up."""

    segment: SegmentEntry
    listed: list[Listed]
    slots: int


def load_index(files: Files, shape: PageShape, pages: Path) -> Found | None:
    """What the index of a segment says; None where there is none that is right. Raises OSError."""
    try:
        descriptor = files.open_to_read(pages.with_suffix(INDEX))
    except FileNotFoundError:
        return None
    with opened(files, descriptor):
        status = files.status_of(descriptor)
        if not is_ours(status):
            return None
        read = layout.read_index(shape, read_all(files, descriptor, status.st_size, 0))
    if read is None:
        return None
    start, listed = read
    there = (files.status(pages).st_size - start) // shape.record_bytes
    listed = [one for one in listed if one.slot < there]
    return Found(SegmentEntry(pages, start, max(there, 0), True), listed, 0)


def scan(files: Files, shape: PageShape, pages: Path) -> Found | None:
    """What a segment without an index has, by the heads of its records; None where it is no segment of such pages.

    What was being written when a process or a machine stopped is cut off its end, by checksum. Raises OSError.
    """
    with opened(files, files.open_to_read(pages)) as descriptor:
        header = _header(files, descriptor)
        if header is None or header.shape != shape:
            return None
        listed: list[Listed] = []
        for slot, data in _heads(files, descriptor, header):
            head = layout.read_head(data)
            if head is not None:
                listed.append(Listed(slot, head.digest, head.parent, head.position, head.written, head.written))
        while listed:
            offset = header.start + listed[-1].slot * shape.record_bytes
            if layout.read_record(shape, read_all(files, descriptor, shape.record_bytes, offset)) is not None:
                break
            listed.pop()
    num_used = listed[-1].slot + 1 if listed else 0
    return Found(SegmentEntry(pages, header.start, num_used, False), listed, header.slots)


def _heads(files: Files, descriptor: int, header: Header) -> Iterator[tuple[int, memoryview]]:
    """The first bytes of each record that the file has all of, by slot."""
    stride = header.shape.record_bytes
    count = min(header.slots, (files.status_of(descriptor).st_size - header.start) // stride)
    several = max(_READ_AHEAD_BYTES // stride, 1) if stride < _READ_AHEAD_BYTES // 64 else 1
    for slot in range(0, count, several):
        many = min(several, count - slot)
        num_bytes = (many - 1) * stride + HEAD_BYTES
        data = memoryview(read_all(files, descriptor, num_bytes, header.start + slot * stride))
        for at in range(many):
            yield slot + at, data[at * stride : at * stride + HEAD_BYTES]


def header_of(files: Files, pages: Path) -> Header | None:
    """Of a segment's file; None where that is none of this format. Raises OSError."""
    with opened(files, files.open_to_read(pages)) as descriptor:
        return _header(files, descriptor)


def _header(files: Files, descriptor: int) -> Header | None:
    if not is_ours(files.status_of(descriptor)):
        return None
    size = layout.header_size(read_all(files, descriptor, 4096, 0))
    return layout.read_header(read_all(files, descriptor, size, 0)) if size else None


# -- reading -----------------------------------------------------------------------------------------------------------
class Piece(NamedTuple):
    """Slots of one segment that are read in one call. wanted: of them, in order."""

    segment: SegmentEntry
    first: int
    wanted: list[int]

    @property
    def num_slots(self) -> int:
        return self.wanted[-1] + 1 - self.first


def pieces(shape: PageShape, places: Sequence[tuple[SegmentEntry, int]]) -> Iterator[Piece]:
    """Places of records, in the order given, joined where they lie together in a segment."""
    most = max(_PIECE_BYTES // shape.record_bytes, 1)
    gap = _GAP_BYTES // shape.record_bytes
    piece: Piece | None = None
    for segment, slot in places:
        if piece is not None and piece.segment is segment:
            step = slot - piece.wanted[-1]
            if 1 <= step <= gap + 1 and slot - piece.first < most:
                piece.wanted.append(slot)
                continue
        if piece is not None:
            yield piece
        piece = Piece(segment, slot, [slot])
    if piece is not None:
        yield piece


def read_piece(files: Files, shape: PageShape, piece: Piece) -> list[layout.Body | None]:
    """Each wanted record; None for one that is not what was once written. Raises OSError."""
    stride = shape.record_bytes
    with opened(files, files.open_to_read(piece.segment.path)) as descriptor:
        data = memoryview(
            read_all(files, descriptor, piece.num_slots * stride, piece.segment.start + piece.first * stride)
        )
    cuts = [(slot - piece.first) * stride for slot in piece.wanted]
    return [layout.read_record(shape, data[cut : cut + stride]) for cut in cuts]


def bury(files: Files, shape: PageShape, segment: SegmentEntry, slots: Sequence[int]) -> None:
    """Overwrite records, so that they are not found again. Raises OSError."""
    nothing = bytes(shape.record_bytes)
    with opened(files, files.open_to_write(segment.path)) as descriptor:
        for slot in slots:
            write_all(files, descriptor, nothing, segment.start + slot * shape.record_bytes)
