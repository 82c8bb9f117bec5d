"""The segments of one namespace: found at the start, opened and closed for writing, and gone when room is needed.

Owns which segment is written to, and which goes: the coldest first, by what its pages were last used. Pages of it that
are used still are carried over to the next segment. Knows the index, and changes it under the lock it is given. Never
decides which pages come.

One thread at a time calls any of this, with the store's lock for the disk. All methods raise OSError.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from mooli.cache.store import layout, segments
from mooli.cache.store.files import Files
from mooli.cache.store.folder import (
    NEW,
    NUMBERED,
    PAGES,
    Limits,
    evict_others,
    making_room,
    missing_bytes,
    remove_segment,
)
from mooli.cache.store.index import PageEntry, PageIndex, SegmentEntry
from mooli.cache.store.layout import Listed, PageShape
from mooli.cache.store.segments import SegmentWriter, full_bytes

logger = logging.getLogger(__name__)

_CHECK_BYTES = 4 << 20
"""Between two looks at how much of the disk is free, of a segment that is not smaller."""

_CARRIED_SHARE = 0.75
"""Of a new segment may be pages that come from others: what is left must be worth writing one."""


class Carried(NamedTuple):
    """A page on its way to another segment."""

    entry: PageEntry
    tokens: memoryview
    payload: memoryview


class SegmentSet:
    """See the module docstring. room: the namespace's folder, in `folder`. evicted: told how many pages have gone."""

    def __init__(
        self,
        folder: Path,
        room: Path,
        shape: PageShape,
        limits: Limits,
        *,
        index: PageIndex,
        index_lock: threading.Lock,
        ingredients: Mapping[str, Any],
        files: Files,
        clock: Callable[[], float],
        evicted: Callable[[int], object],
    ) -> None:
        self._folder = folder
        self._room = room
        self._shape = shape
        self._limits = limits
        self._index = index
        self._index_lock = index_lock
        self._ingredients = ingredients
        self._files = files
        self._clock = clock
        self._evicted = evicted
        self._start = len(layout.header_bytes(shape, 0, 0.0, ingredients))
        self.slots = segments.slots_of(shape, self._start, limits.max_bytes)
        """Records that a new segment has room for; 0 where the limits allow none."""
        self.check_bytes = min(_CHECK_BYTES, full_bytes(shape, self._start, self.slots))
        """Between two looks at how much of the disk is free."""
        self._by_name: dict[str, SegmentEntry] = {}
        self._writer: SegmentWriter | None = None
        self._unrolled: dict[str, int] = {}
        """Segments without an index that are not written to, and how many records each has room for."""
        self._dead: list[tuple[SegmentEntry, int, float]] = []
        """Records that do not count but are still in a file, and when they were last used: of pages that are kept for
        a time alone."""

    def __len__(self) -> int:
        return len(self._by_name)

    def num_bytes(self) -> int:
        """Of all segments, what the one that is written to has reserved included. May be called by any thread."""
        held = [segment.start + segment.num_used * self._shape.record_bytes for segment in [*self._by_name.values()]]
        writer = self._writer
        return sum(held) + (writer.num_left * self._shape.record_bytes if writer is not None else 0)

    # -- finding -------------------------------------------------------------------------------------------------------
    def load(self, *, is_writer: bool) -> None:
        """Know all segments that are there and not known yet; who may only read knows those that have an index.

        A writer removes what is no segment. One that cannot be read is left out, with a line in the log.
        """
        names = sorted(self._files.names(self._room))
        there = {name for name in names if name.endswith(PAGES) and NUMBERED.fullmatch(name)}
        for name in [name for name in list(self._by_name) if name not in there]:
            self.lost(self._by_name[name])
        found = []
        for name in sorted(there):
            try:
                found += self._load(self._room / name, is_writer=is_writer)
            except FileNotFoundError:
                continue
            except OSError as exc:
                logger.warning("%s cannot be read, and is left out: %s", self._room / name, exc)
        with self._index_lock:
            self._index.add_all(found)
        if is_writer:
            self._note_dead((segment, slot, entry.used) for entry, segment, slot in found)
            strays = [name for name in names if NUMBERED.fullmatch(name) and Path(name).stem + PAGES not in there]
            for name in {*strays, *(name for name in names if name.endswith(NEW) and NUMBERED.fullmatch(name))}:
                with contextlib.suppress(OSError):
                    self._files.unlink(self._room / name)

    def _load(self, path: Path, *, is_writer: bool) -> list[tuple[PageEntry, SegmentEntry, int]]:
        known = self._by_name.get(path.name)
        found = segments.load_index(self._files, self._shape, path)
        if found is None and is_writer:
            found = segments.scan(self._files, self._shape, path)
            if found is None:
                logger.warning("%s is no segment of the KV cache, or its header is damaged: it is removed", path)
                remove_segment(self._files, path)
                return []
            self._unrolled[path.name] = found.slots
        if found is None:
            return []
        segment = known or found.segment
        segment.is_rolled, segment.num_used = found.segment.is_rolled, found.segment.num_used
        self._by_name[path.name] = segment
        return [(_entry(one), segment, one.slot) for one in found.listed]

    def lost(self, segment: SegmentEntry) -> None:
        """Its file has gone: somebody needed room, or has removed it."""
        self._forget(segment, segment.entries.values())

    def _forget(self, segment: SegmentEntry, entries: Iterable[PageEntry]) -> None:
        with self._index_lock:
            gone = list(entries)
            if self._by_name.get(segment.path.name) is segment:
                del self._by_name[segment.path.name]
            self._unrolled.pop(segment.path.name, None)
        self._drop(gone)

    def _drop(self, entries: Iterable[PageEntry]) -> None:
        """These count no more, nor do those that continue them."""
        with self._index_lock:
            gone = self._index.drop(entries)
        self._evicted(len(gone))
        self._note_dead((place.segment, place.slot, place.used) for place in gone)

    def _note_dead(self, places: Iterable[tuple[SegmentEntry, int, float]]) -> None:
        if self._limits.ttl_s is not None:
            self._dead += [
                (segment, slot, used)
                for segment, slot, used in places
                if slot not in segment.entries and self._by_name.get(segment.path.name) is segment
            ]

    def _is_written(self, segment: SegmentEntry) -> bool:
        return self._writer is not None and self._writer.entry is segment

    # -- writing -------------------------------------------------------------------------------------------------------
    def writer(self) -> SegmentWriter | None:
        """A segment with room for a page, and a disk with room for some; None where there is none now."""
        if self._writer is not None and not self._writer.num_left:
            self.roll()
        if self._writer is None:
            return self._next_writer()
        # What the segment may become is counted already: only the disk can be short.
        if self._files.free_bytes(self._folder) < self._limits.min_free_bytes + self.check_bytes:
            with making_room(self._files, self._folder) as is_alone:
                if not is_alone or not self._make_room(self.check_bytes, None):
                    return None
        return self._writer

    def _next_writer(self) -> SegmentWriter | None:
        carried: list[Carried] = []
        try:
            with making_room(self._files, self._folder) as is_alone:
                if is_alone:
                    self._writer = self._reopened() or self._created(carried)
            if self._writer is not None:
                self._carry_on(self._writer, carried)
        finally:
            # What has found no place is nowhere.
            self._drop([one.entry for one in carried if one.entry.segment is None])
        return self._writer

    def _reopened(self) -> SegmentWriter | None:
        """The newest segment, where it has much room left: else each start would leave a small one."""
        name = max(self._by_name, default=None)
        segment = self._by_name[name] if name is not None else None
        if segment is None or name is None:
            return None
        try:
            size = self._files.status(segment.path).st_size
            slots = self._unrolled.get(name)
            if slots is None:
                header = segments.header_of(self._files, segment.path)
                slots = header.slots if header is not None and header.shape == self._shape else 0
                if segment.num_used > slots // 2:
                    return None
        except FileNotFoundError:
            self.lost(segment)
            return None
        grows = full_bytes(self._shape, segment.start, slots) - size
        if segment.num_used >= slots or missing_bytes(self._files, self._folder, self._limits, grows) > 0:
            return None
        writer = SegmentWriter.reopen(self._files, self._shape, segment, slots)
        try:
            writer.extend()
        except OSError:
            writer.close()
            self._unrolled[name] = slots
            raise
        self._unrolled.pop(name, None)
        return writer

    def _created(self, carried: list[Carried]) -> SegmentWriter | None:
        self._roll_others()
        if not self._make_room(full_bytes(self._shape, self._start, self.slots), carried):
            return None
        now = self._clock()
        newest = int(max(self._by_name, default="0" * 16)[:16], 16)
        path = self._room / f"{max(int(now * 1e6), newest + 1):016x}{PAGES}"
        writer = SegmentWriter.create(self._files, path, self._shape, self.slots, now, self._ingredients)
        self._by_name[path.name] = writer.entry
        return writer

    def _carry_on(self, writer: SegmentWriter, carried: Sequence[Carried]) -> None:
        for one in sorted(carried, key=lambda one: one.entry.position):
            if self._index.get(one.entry.digest) is one.entry and writer.num_left > 1:
                slot = writer.write(one.entry, one.tokens, one.payload)
                with self._index_lock:
                    if self._index.get(one.entry.digest) is one.entry:
                        self._index.place(one.entry, writer.entry, slot)

    def roll(self) -> None:
        """No more is added to the segment that is written to. Where the disk does not take it, it is gone."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.roll()
        except OSError:
            # Pages that a disk has not taken may be lost without a word when it is asked again: none of it is used.
            writer.close()
            self._remove(writer.entry)
            raise

    def _roll_others(self) -> None:
        """Segments that a process has left without an index."""
        for name, slots in list(self._unrolled.items()):
            segment = self._by_name[name]
            writer = SegmentWriter.reopen(self._files, self._shape, segment, slots)
            del self._unrolled[name]
            try:
                writer.roll()
            except OSError:
                writer.close()
                self._remove(segment)
                raise

    def sync(self) -> None:
        """Have the disk take what is written. Where it does not, that segment is gone."""
        writer = self._writer
        if writer is not None:
            try:
                writer.sync()
            except OSError:
                self.abandon()
                self._remove(writer.entry)
                raise

    def abandon(self) -> None:
        """Leave the segment that is written to as it is; what it has can still be read."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self._unrolled[writer.entry.path.name] = writer.slots
            writer.close()

    def close(self) -> None:
        """Everything has an index, with when its pages were last used."""
        if self._writer is not None and not self._writer.entry.entries:
            writer, self._writer = self._writer, None
            writer.close()
            self._remove(writer.entry)
        self.roll()
        self._roll_others()
        self.save_uses()

    def save_uses(self) -> None:
        """Write when pages were last used into the indexes where that has changed."""
        for segment in [one for one in self._by_name.values() if one.is_rolled and one.was_used]:
            segments.write_index(self._files, self._shape, segment, sync=False)

    def bury(self, places: Sequence[tuple[SegmentEntry, int]]) -> None:
        """Overwrite what must not be found again, the last first: none is left that could continue a page that comes
        again."""
        changed: list[SegmentEntry] = []
        for segment, group in itertools.groupby(reversed(places), key=lambda place: place[0]):
            if segment in self._by_name.values():
                with contextlib.suppress(FileNotFoundError):
                    segments.bury(self._files, self._shape, segment, [slot for _, slot in group])
                    changed.append(segment)
        for segment in dict.fromkeys(changed):
            if segment.is_rolled:
                segments.write_index(self._files, self._shape, segment, sync=False)

    # -- going ---------------------------------------------------------------------------------------------------------
    def expire(self) -> None:
        """Pages that nobody has used for as long as they are kept: these count no more."""
        ttl = self._limits.ttl_s
        if ttl is not None:
            oldest = self._clock() - ttl
            self._drop([entry for entry in self._index if entry.used < oldest])

    def tidy(self) -> None:
        """Bytes of what has expired, here and of other namespaces, and what a disk that is full asks for.

        A segment goes when none of its pages counts. In others, records are overwritten.
        """
        for segment in [one for one in self._by_name.values() if not self._is_written(one) and not one.entries]:
            self._remove(segment)
        if self._limits.ttl_s is not None:
            oldest = self._clock() - self._limits.ttl_s
            old = [(segment, slot) for segment, slot, used in self._dead if used < oldest]
            self._dead = [one for one in self._dead if one[2] >= oldest]
            self.bury(old)
        with making_room(self._files, self._folder) as is_alone:
            if is_alone:
                self._make_room(0, None)

    def _make_room(self, num_bytes: int, carried: list[Carried] | None) -> bool:
        """Whether so much more may come now. The caller has the folder alone. carried: takes the pages that are used
        still of segments that go; None: they go too."""
        own = self._room
        missing = evict_others(self._files, self._folder, own, self._limits, num_bytes, self._clock())
        while missing > 0:
            others = [one for one in self._by_name.values() if not self._is_written(one)]
            if not others:
                return False
            self._evict(self._coldest(others), carried)
            missing = missing_bytes(self._files, self._folder, self._limits, num_bytes)
        return True

    def _coldest(self, among: Sequence[SegmentEntry]) -> SegmentEntry:
        """By the mean of when its pages were last used, where those that do not count are as old as the oldest."""
        oldest = min((entry.used for entry in self._index), default=0.0)

        def heat(segment: SegmentEntry) -> float:
            used = sum(entry.used - oldest for entry in list(segment.entries.values()))
            return used / max(segment.num_used, 1)

        return min(among, key=heat)

    def _evict(self, segment: SegmentEntry, carried: list[Carried] | None) -> None:
        hot: list[PageEntry] = []
        if carried is not None:
            middle = median(entry.used for entry in self._index) if len(self._index) else 0.0
            hot = [one for one in list(segment.entries.values()) if one.was_reused and one.used >= middle]
            hot.sort(key=lambda entry: entry.position)
            del hot[max(int(self.slots * _CARRIED_SHARE) - len(carried), 0) :]
            carried += self._taken(segment, sorted(hot, key=lambda entry: entry.slot))
        self._remove(segment)

    def _taken(self, segment: SegmentEntry, hot: Sequence[PageEntry]) -> list[Carried]:
        """Pages of a segment, read, and lifted out of it."""
        places = [(segment, entry.slot) for entry in hot]
        by_slot = {entry.slot: entry for entry in hot}
        taken = []
        with contextlib.suppress(OSError):  # these are not carried then
            for piece in segments.pieces(self._shape, places):
                bodies = segments.read_piece(self._files, self._shape, piece)
                for slot, body in zip(piece.wanted, bodies, strict=True):
                    if body is not None and body.head.digest == by_slot[slot].digest:
                        taken.append(Carried(by_slot[slot], body.tokens, body.payload))
        with self._index_lock:
            for one in taken:
                self._index.lift(one.entry)
        return taken

    def _remove(self, segment: SegmentEntry) -> None:
        """The segment, its pages, and those that continue them."""
        self._forget(segment, segment.entries.values())
        remove_segment(self._files, segment.path)


def _entry(one: Listed) -> PageEntry:
    return PageEntry(one.digest, one.parent, one.position, one.written, one.used)
