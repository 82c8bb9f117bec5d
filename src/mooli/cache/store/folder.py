"""The folder of a cache on disk: who may use it, who writes to which part of it, and how much may be in it.

Owns the rules on owners and permissions, the locks, names, and the byte budget over all namespaces. Never reads a page.

    DIR/lock                      held while room is made, for milliseconds
    DIR/<namespace>-<format>/     a room: the pages of one namespace, with one writer
        lock                      held by its writer: "pid boot-id"
        <number>.pages            a segment
        <number>.index            what is in it, written when it has all its pages
        <number>.new              an index that is being written
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mooli.cache.store.files import Files
from mooli.cache.store.layout import FORMAT
from mooli.errors import StoreError

PAGES = ".pages"
INDEX = ".index"
NEW = ".new"
LOCK = "lock"

_ROOM = re.compile(r"[0-9a-f]{32}-\d+")
NUMBERED = re.compile(r"([0-9a-f]{16})(\.pages|\.index|\.new)")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


FOLDER_VARIABLE = "MOOLI_KV_CACHE_DIR"
"""Of the environment: the folder where nothing else is said, or "none"."""


def default_folder() -> Path:
    """Where servers keep pages unless told: in this user's cache folder, if the environment names no other."""
    given = os.environ.get(FOLDER_VARIABLE, "")
    if given not in ("", "none"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "mooli" / "kv"


def open_folder(files: Files, path: Path) -> None:
    """Have the folder there. Raises StoreError where it cannot be used, or others can write to it."""
    try:
        files.make_folder(path)
    except OSError as exc:
        raise StoreError(f"the KV cache cannot be kept in {path}: {exc.strerror or exc}") from exc
    check_folder(files, path)


def check_folder(files: Files, path: Path) -> None:
    """Raise StoreError where a folder cannot be used, or others can write to it."""
    try:
        found = files.status(path)
    except OSError as exc:
        raise StoreError(f"the KV cache cannot be kept in {path}: {exc.strerror or exc}") from exc
    if stat.S_ISLNK(found.st_mode):
        raise StoreError(f"the KV cache cannot be kept in {path}, which is a symbolic link: give the folder itself")
    if not stat.S_ISDIR(found.st_mode):
        raise StoreError(f"the KV cache cannot be kept in {path}, which is no folder")
    if found.st_uid != os.geteuid():
        raise StoreError(f"the KV cache cannot be kept in {path}, which is of user {found.st_uid}: give one of yours")
    if found.st_mode & 0o022:
        raise StoreError(
            f"the KV cache cannot be kept in {path}, to which others can write (mode {found.st_mode & 0o777:o}): what"
            " they put there would be answered from. Run `chmod go-w` on it, or give another folder"
        )


def room_name(namespace: bytes) -> str:
    return f"{namespace[:16].hex()}-{FORMAT}"


def is_ours(found: os.stat_result) -> bool:
    """Whether a file is a plain one of this user that nobody else can write to."""
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


class Lock:
    """A lock file that this process holds, until `release`."""

    def __init__(self, files: Files, descriptor: int) -> None:
        self._files = files
        self._descriptor = descriptor

    @classmethod
    def take(cls, files: Files, path: Path) -> Lock | None:
        """None where another has it. Raises OSError."""
        descriptor = files.open_lock(path)
        try:
            found = files.status_of(descriptor)
            # Another file has that name where somebody has removed the one that was opened.
            if not is_ours(found) or not files.lock(descriptor) or files.status(path).st_ino != found.st_ino:
                files.close(descriptor)
                return None
            words = f"{os.getpid()} {_boot_id()}\n".encode()
            files.truncate(descriptor, 0)
            files.write(descriptor, words, 0)
        except BaseException:
            with contextlib.suppress(OSError):
                files.close(descriptor)
            raise
        return cls(files, descriptor)

    def release(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                self._files.close(descriptor)


def writer_of(files: Files, room: Path) -> int | None:
    """The process that writes to a room, by what it has said; None where nobody does. Raises OSError."""
    try:
        descriptor = files.open_to_write(room / LOCK)
    except FileNotFoundError:
        return None
    try:
        if files.lock(descriptor):
            return None
        pid = files.read(descriptor, 64, 0).split(b" ")[0]
        return int(pid) if pid.isdigit() else -1
    finally:
        files.close(descriptor)


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return "-"


# -- what is there -----------------------------------------------------------------------------------------------------
class SegmentFile(NamedTuple):
    """path: of its pages. num_bytes: of pages and index. changed: when one of them was last written, seconds since the
    epoch. is_rolled: has an index."""

    path: Path
    num_bytes: int
    changed: float
    is_rolled: bool


@dataclass(frozen=True, slots=True)
class Room:
    """The files of one namespace. num_bytes: all of them."""

    path: Path
    segments: list[SegmentFile]
    num_bytes: int


def rooms(files: Files, folder: Path) -> list[Room]:
    """All rooms of a folder. What is no room, or no file of ours, is not looked at. Raises OSError."""
    found = []
    for name in sorted(files.names(folder)):
        if _ROOM.fullmatch(name) and stat.S_ISDIR(files.status(folder / name).st_mode):
            found.append(_room(files, folder / name))
    return found


def _room(files: Files, path: Path) -> Room:
    sizes: dict[str, dict[str, os.stat_result]] = {}
    for name in files.names(path):
        match = NUMBERED.fullmatch(name)
        if match is not None:
            with contextlib.suppress(FileNotFoundError):  # it may have gone since
                sizes.setdefault(match[1], {})[match[2]] = files.status(path / name)
    segments = []
    for number, kinds in sorted(sizes.items()):
        if PAGES in kinds:
            num_bytes = sum(found.st_size for found in kinds.values())
            changed = max(found.st_mtime for found in kinds.values())
            segments.append(SegmentFile(path / (number + PAGES), num_bytes, changed, INDEX in kinds))
    total = sum(found.st_size for kinds in sizes.values() for found in kinds.values())
    return Room(path, segments, total)


def remove_segment(files: Files, pages: Path) -> None:
    """The pages first: what is left when this stops in between is no segment. Raises OSError."""
    for path in (pages, pages.with_suffix(INDEX), pages.with_suffix(NEW)):
        with contextlib.suppress(FileNotFoundError):
            files.unlink(path)


# -- how much may be there ---------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Limits:
    """max_bytes: of all rooms together. min_free_bytes: of the disk, for others. ttl_s: how long a page is kept that
    nobody uses; None: for ever."""

    max_bytes: int
    min_free_bytes: int
    ttl_s: float | None


@contextlib.contextmanager
def making_room(files: Files, folder: Path) -> Iterator[bool]:
    """Whether nobody else makes or takes room inside of this. Raises OSError."""
    lock = Lock.take(files, folder / LOCK)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def evict_others(files: Files, folder: Path, own: Path, limits: Limits, num_bytes: int, now: float) -> int:
    """Remove segments of other rooms: what has expired, then until `num_bytes` more fit, or none is left that may go.

    Those of namespaces that nobody writes go first, the coldest before others. Of one that another server writes, a
    segment may go while that one has more than this. Returns how many bytes are missing then. Raises OSError.
    """
    others = [room for room in rooms(files, folder) if room.path != own and room.segments]
    idle = [room for room in others if writer_of(files, room.path) is None]
    for segment in sorted((one for room in idle for one in room.segments), key=lambda one: one.changed):
        has_expired = limits.ttl_s is not None and segment.changed + limits.ttl_s < now
        if has_expired or missing_bytes(files, folder, limits, num_bytes) > 0:
            remove_segment(files, segment.path)
    while (missing := missing_bytes(files, folder, limits, num_bytes)) > 0:
        there = rooms(files, folder)
        mine = sum(room.num_bytes for room in there if room.path == own)
        larger = [room for room in there if room.path != own and room.num_bytes > mine + num_bytes]
        rolled = [one for room in larger for one in room.segments if one.is_rolled]
        if not rolled:
            return missing
        remove_segment(files, min(rolled, key=lambda one: one.changed).path)
    return 0


def missing_bytes(files: Files, folder: Path, limits: Limits, num_bytes: int) -> int:
    """How many bytes must go before `num_bytes` more may come; 0 or less where they may. Raises OSError."""
    there = sum(room.num_bytes for room in rooms(files, folder))
    over = there + num_bytes - limits.max_bytes
    return max(over, limits.min_free_bytes + num_bytes - files.free_bytes(folder))
