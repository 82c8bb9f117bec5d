"""Which pages a store has, in memory: where each is, what it continues, and when it was last used.

Owns entries and their chains: a page counts only while every page before it in its chain does. Never touches a file.
Looking up takes no lock, as it is a look into a dict; who changes anything holds the store's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple


class SegmentEntry:
    """One segment as the index knows it. path: of its file. start: bytes before its first record. num_used: slots that
    something was written to. entries: what counts of it, by slot."""

    __slots__ = ("entries", "is_rolled", "num_used", "path", "start", "was_used")

    def __init__(self, path: Path, start: int, num_used: int, is_rolled: bool) -> None:
        self.path = path
        self.start = start
        self.num_used = num_used
        self.is_rolled = is_rolled
        self.was_used = False
        """Since its index was written."""
        self.entries: dict[int, PageEntry] = {}


class PageEntry:
    """One page. root: what the digest of its chain's first page begins from. segment: None while it is on its way from
    one segment to another. was_reused: since it was written, or found at the start."""

    __slots__ = (
        "children",
        "digest",
        "parent",
        "parent_digest",
        "position",
        "root",
        "segment",
        "slot",
        "used",
        "was_reused",
        "written",
    )

    def __init__(self, digest: bytes, parent_digest: bytes, position: int, written: float, used: float) -> None:
        self.digest = digest
        self.parent_digest = parent_digest
        self.position = position
        self.root = parent_digest
        self.written = written
        self.used = used
        self.was_reused = False
        self.parent: PageEntry | None = None
        self.children: list[PageEntry] = []
        self.segment: SegmentEntry | None = None
        self.slot = 0


class Place(NamedTuple):
    """Where a page was, and when it was last used, seconds since the epoch."""

    segment: SegmentEntry
    slot: int
    used: float


class PageIndex:
    """See the module docstring."""

    def __init__(self) -> None:
        self._entries: dict[bytes, PageEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[PageEntry]:
        return iter(list(self._entries.values()))

    def get(self, digest: bytes) -> PageEntry | None:
        return self._entries.get(digest)

    def leading(self, digests: Iterable[bytes], used_after: float) -> list[PageEntry]:
        """The entries of the leading run of `digests` that can be read, and were used after that time."""
        found = []
        get = self._entries.get
        for digest in digests:
            entry = get(digest)
            if entry is None or entry.segment is None or entry.used < used_after:
                break
            found.append(entry)
        return found

    def can_follow(self, parent: bytes, position: int) -> bool:
        """Whether a page of that place in its chain would have all before it."""
        if position == 0:
            return True
        entry = self._entries.get(parent)
        return entry is not None and entry.position == position - 1

    def root_of(self, parent: bytes, position: int) -> bytes:
        """Of a page that can follow."""
        return self._entries[parent].root if position else parent

    def add(self, entry: PageEntry, segment: SegmentEntry, slot: int) -> bool:
        """Whether it counts now: no page of its digest does, and the one before it does."""
        if entry.digest in self._entries or not self.can_follow(entry.parent_digest, entry.position):
            return False
        if entry.position:
            entry.parent = self._entries[entry.parent_digest]
            entry.parent.children.append(entry)
            entry.root = entry.parent.root
        self.place(entry, segment, slot)
        self._entries[entry.digest] = entry
        return True

    def add_all(self, found: Sequence[tuple[PageEntry, SegmentEntry, int]]) -> None:
        """What counts of all that was found, in whatever order. Of pages with one digest it is the last."""
        last = {entry.digest: (entry, segment, slot) for entry, segment, slot in found}
        for entry, segment, slot in sorted(last.values(), key=lambda item: item[0].position):
            self.add(entry, segment, slot)

    def place(self, entry: PageEntry, segment: SegmentEntry, slot: int) -> None:
        """The page is there now."""
        self.lift(entry)
        entry.segment, entry.slot = segment, slot
        segment.entries[slot] = entry

    def lift(self, entry: PageEntry) -> None:
        """The page is nowhere for now."""
        if entry.segment is not None:
            del entry.segment.entries[entry.slot]
            entry.segment = None

    def drop(self, entries: Iterable[PageEntry]) -> list[Place]:
        """These count no more, nor do those that continue them. Where they were, each behind the page before it."""
        places = []
        waiting = [entry for entry in entries if self._entries.get(entry.digest) is entry]
        waiting.sort(key=lambda entry: -entry.position)
        parents = {entry.parent.digest: entry.parent for entry in waiting if entry.parent is not None}
        while waiting:
            entry = waiting.pop()
            if self._entries.get(entry.digest) is not entry:
                continue
            del self._entries[entry.digest]
            if entry.segment is not None:
                places.append(Place(entry.segment, entry.slot, entry.used))
            self.lift(entry)
            waiting.extend(entry.children)
            entry.children = []
            entry.parent = None
        for parent in parents.values():
            parent.children = [child for child in parent.children if self._entries.get(child.digest) is child]
        return places

    def check(self) -> None:
        """Raise AssertionError where an entry is not where it says, or has lost the page before it. For tests."""
        for digest, entry in self._entries.items():
            assert entry.digest == digest
            assert entry.segment is None or entry.segment.entries[entry.slot] is entry
            assert (entry.parent is None) == (entry.position == 0)
            if entry.parent is not None:
                assert self._entries[entry.parent.digest] is entry.parent
                assert entry in entry.parent.children and entry.parent.position == entry.position - 1
