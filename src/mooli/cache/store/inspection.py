"""A folder of stored pages as files: which namespaces are there, whether their pages are right, and away with them.

Owns what can be known without the namespace. Changes nothing but in `remove`, and never where a server writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mooli.cache.store import layout, segments
from mooli.cache.store.files import Files, opened, read_all
from mooli.cache.store.folder import INDEX, LOCK, NEW, NUMBERED, PAGES, Lock, Room, check_folder, rooms, writer_of
from mooli.cache.store.layout import Header
from mooli.errors import StoreError


@dataclass(frozen=True, slots=True)
class KeptPages:
    """One namespace's. name: of its folder. ingredients: what the namespace was made of, in words; empty where no
    segment can be read. num_bytes: of its files. changed: when one of them last was, seconds since the epoch. writer:
    the process that writes to it; None where none does. states_of: these are recurrent states, and the namespace of
    that name has the pages that they come after."""

    name: str
    ingredients: dict[str, Any]
    num_pages: int
    num_segments: int
    num_bytes: int
    changed: float | None
    writer: int | None

    @property
    def model(self) -> str:
        """Whatever it was called."""
        return str(self.ingredients.get("name") or self.ingredients.get("model") or "?")

    @property
    def states_of(self) -> str | None:
        of = self.ingredients.get("states_of")
        return None if of is None else str(of)


@dataclass(frozen=True, slots=True)
class Verdict:
    """num_wrong: records that are not what was once written, and segments that are none. where: the first of them.
    kind: what they are, pages or states."""

    num_pages: int
    num_wrong: int
    where: str | None
    kind: str = "pages"


def kept_pages(folder: Path, files: Files | None = None) -> list[KeptPages]:
    """What a folder has, by namespace; nothing where there is no folder. Raises StoreError where it cannot be read."""
    files = files or Files()
    return [_facts(files, room) for room in _rooms(files, folder)]


def verify(folder: Path, name: str, files: Files | None = None) -> Verdict:
    """Read every page of a namespace. Raises StoreError where there is none of that name, or it cannot be read."""
    files = files or Files()
    room = _room(files, folder, name)
    num_pages = num_wrong = 0
    where, kind = None, "pages"
    for segment in room.segments:
        try:
            header = segments.header_of(files, segment.path)
            kind = "states" if header is not None and "states_of" in header.ingredients else kind
            for is_right in _records(files, segment.path):
                num_pages += is_right
                num_wrong += not is_right
        except FileNotFoundError:  # it had to go since
            continue
        except OSError:
            num_wrong += 1
        if num_wrong and where is None:
            where = str(segment.path)
    return Verdict(num_pages, num_wrong, where, kind)


def remove(folder: Path, name: str, files: Files | None = None) -> int:
    """All pages of a namespace; how many bytes that were. Raises StoreError, also where a server writes to it."""
    files = files or Files()
    room = _room(files, folder, name)
    try:
        lock = Lock.take(files, room.path / LOCK)
        if lock is None:
            raise StoreError(f"process {writer_of(files, room.path)} writes to {room.path}: stop it first")
        try:
            # The pages of a segment before its index, as ever.
            for suffix in (PAGES, INDEX, NEW):
                for entry in files.names(room.path):
                    if NUMBERED.fullmatch(entry) and entry.endswith(suffix):
                        files.unlink(room.path / entry)
            files.unlink(room.path / LOCK)
            with contextlib.suppress(OSError):  # something of somebody else's is in it
                files.remove_folder(room.path)
        finally:
            lock.release()
    except OSError as exc:
        raise StoreError(f"{room.path} cannot be removed: {exc.strerror or exc}") from exc
    return room.num_bytes


def _rooms(files: Files, folder: Path) -> list[Room]:
    try:
        files.status(folder)
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise StoreError(f"{folder} cannot be read: {exc.strerror or exc}") from exc
    check_folder(files, folder)
    try:
        return rooms(files, folder)
    except OSError as exc:
        raise StoreError(f"{folder} cannot be read: {exc.strerror or exc}") from exc


def _room(files: Files, folder: Path, name: str) -> Room:
    found = [room for room in _rooms(files, folder) if room.path.name.startswith(name)]
    if len(found) != 1:
        what = "several namespaces begin" if found else "no namespace begins"
        raise StoreError(f"{what} with {name!r} in {folder}: `mooli cache ls` shows them")
    return found[0]


def _facts(files: Files, room: Room) -> KeptPages:
    header: Header | None = None
    num_pages = 0
    for segment in room.segments:
        with contextlib.suppress(OSError):
            header = segments.header_of(files, segment.path) or header
            if header is not None:
                found = segments.load_index(files, header.shape, segment.path)
                found = found or segments.scan(files, header.shape, segment.path)
                num_pages += len(found.listed) if found is not None else 0
    try:
        writer = writer_of(files, room.path)
    except OSError:
        writer = None
    changed = max((segment.changed for segment in room.segments), default=None)
    ingredients = header.ingredients if header is not None else {}
    return KeptPages(room.path.name, ingredients, num_pages, len(room.segments), room.num_bytes, changed, writer)


def _records(files: Files, path: Path) -> Iterator[bool]:
    """Whether each record is right that should be: those that the index names, or all with a head where there is none.
    A segment that is none is one that is not right."""
    header = segments.header_of(files, path)
    if header is None:
        yield False
        return
    found = segments.load_index(files, header.shape, path)
    if found is None:
        found = segments.scan(files, header.shape, path)
        if files.names(path.parent).count(path.with_suffix(INDEX).name):
            yield False  # there is an index, and it is not right
    if found is None:
        yield False
        return
    stride = header.shape.record_bytes
    with opened(files, files.open_to_read(path)) as descriptor:
        for one in found.listed:
            data = read_all(files, descriptor, stride, header.start + one.slot * stride)
            body = layout.read_record(header.shape, data)
            yield body is not None and body.head.digest == one.digest
