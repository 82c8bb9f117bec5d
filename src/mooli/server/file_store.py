"""Files that clients send and batches write: on disk, each found by its owner alone, within limits.

Owns the folder that `--batch-dir` names, the lock on it, and what of a file outlives the process: its bytes, and beside
them a description. A file is there when its description is, which is written last; what a killed process has left
without one goes at the next start. Ids are drawn here, and looked up in a table: no path is made of what a client says.
Never knows HTTP, and never what is in a file.

The table belongs to the server's event loop. Whatever touches a file's bytes may take long, and runs on other threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from mooli.errors import ConfigError, StorageError

logger = logging.getLogger(__name__)

FILE_ID = re.compile(r"file-[0-9a-f]{24}")

FULL_DISK = "the disk of this server is full, or does not take what is written: try again later"

Clock = Callable[[], float]
"""Seconds since the epoch."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FileLimits:
    """max_file_bytes: of one file that a client sends. max_files, max_bytes: of all that one owner has, what batches
    have written for it included; more is not taken from clients then, but the results of a batch always are."""

    max_file_bytes: int
    max_files: int
    max_bytes: int


class StoredFile(msgspec.Struct, kw_only=True, frozen=True):
    """What is known of a file. created_at, expires_at: seconds since the epoch."""

    id: str
    owner: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: float
    expires_at: float | None = None


class Folder:
    """The folder of all files and batches, locked until it is closed. As a context manager: closed on the way out.

    What is in it is for this user alone. Raises ConfigError for a folder that cannot be used, or is in use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise ConfigError(f"batch_dir={str(path)!r} cannot be used: {exc.strerror or exc}") from exc
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ConfigError(f"batch_dir={str(path)!r} is in use by another server: give each its own") from None
        except OSError as exc:
            os.close(self._lock)
            raise ConfigError(
                f"batch_dir={str(path)!r} cannot be locked: {exc.strerror or exc}. Give a folder on a disk of this"
                " machine"
            ) from exc

    def room(self, name: str) -> Path:
        """A folder in it. Raises ConfigError."""
        path = self.path / name
        try:
            path.mkdir(mode=0o700, exist_ok=True)
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                raise ConfigError(f"{path} is no folder of this user: move it away, or give another batch_dir")
            path.chmod(0o700)
        except OSError as exc:
            raise ConfigError(f"{path} cannot be used: {exc.strerror or exc}") from exc
        return path

    def close(self) -> None:
        os.close(self._lock)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FileStore:
    """See the module docstring. folder: is the store's from now on, and closed with it. clock: the time, for what
    expires.

    Raises ConfigError where the folder cannot be read.
    """

    def __init__(self, folder: Folder, limits: FileLimits, clock: Clock = time.time) -> None:
        self.folder = folder
        self.limits = limits
        self.clock = clock
        self._path = folder.room("files")
        self._incoming = folder.room("incoming")
        self._files: dict[str, StoredFile] = {}
        self._num_bytes: Counter[str] = Counter()
        self._num_files: Counter[str] = Counter()
        """By owner, what is being sent counted."""
        _clear(self._incoming)
        described = {path.stem for path in self._path.glob("*.json")}
        for path in self._path.iterdir():
            if path.suffix != ".json" and path.stem not in described:
                path.unlink(missing_ok=True)
        for stored in sorted(read_all(self._path, StoredFile), key=lambda item: (item.created_at, item.id)):
            if FILE_ID.fullmatch(stored.id) and self.path_of(stored.id).is_file():
                self._add(stored)
            else:
                logger.warning("the bytes of %s are gone: it is left out", self._path / f"{stored.id}.json")

    def close(self) -> None:
        """Another server may have the folder."""
        self.folder.close()

    # -- what is there ------------------------------------------------------------------------------------------------
    def get(self, owner: str, file_id: str) -> StoredFile | None:
        """None for what is not there, has expired, or is somebody else's."""
        stored = self._files.get(file_id)
        return stored if stored is not None and stored.owner == owner and not self._has_expired(stored) else None

    def of(self, owner: str) -> list[StoredFile]:
        """All of them, the oldest first."""
        return [item for item in self._files.values() if item.owner == owner and not self._has_expired(item)]

    def path_of(self, file_id: str) -> Path:
        """Where the bytes are of a file that is there."""
        return self._path / f"{file_id}.data"

    def delete(self, owner: str, file_id: str) -> bool:
        """Whether there was one. Who is reading it reads on."""
        if self.get(owner, file_id) is None:
            return False
        self._remove(file_id)
        return True

    def sweep(self) -> None:
        """Remove what has expired."""
        for stored in list(self._files.values()):
            if self._has_expired(stored):
                self._remove(stored.id)

    def _has_expired(self, stored: StoredFile) -> bool:
        return stored.expires_at is not None and stored.expires_at <= self.clock()

    # -- what comes ----------------------------------------------------------------------------------------------------
    def begin(self, owner: str) -> Upload:
        """A file that a client begins to send. Raises StorageError where it may have no more."""
        if self._num_files[owner] >= self.limits.max_files:
            self.sweep()
        if self._num_files[owner] >= self.limits.max_files:
            raise StorageError(
                f"there are {self.limits.max_files} files already, the most that are kept here: delete some first",
                status_code=507,
            )
        return Upload(self, owner, self._incoming / secrets.token_hex(12))

    async def keep(
        self, path: Path, *, owner: str, filename: str, purpose: str, expires_after_s: float | None, file_id: str
    ) -> StoredFile:
        """Make a file of this one, whose bytes the disk has, and which goes then. One of that id is replaced. Raises
        OSError."""
        now = self.clock()
        stored = StoredFile(
            id=file_id,
            owner=owner,
            filename=filename,
            purpose=purpose,
            num_bytes=path.stat().st_size,
            created_at=now,
            expires_at=None if expires_after_s is None else now + expires_after_s,
        )
        await asyncio.to_thread(self._settle, path, stored)
        if file_id in self._files:
            self._forget(file_id)
        self._add(stored)
        return stored

    def _settle(self, path: Path, stored: StoredFile) -> None:
        """Killed at any moment, it leaves a file or `path`."""
        target = self.path_of(stored.id)
        target.unlink(missing_ok=True)
        put_beside(path, target)
        try:
            write_whole(self._path / f"{stored.id}.json", stored)
        except OSError:
            target.unlink(missing_ok=True)
            raise
        path.unlink(missing_ok=True)

    def reserve(self, owner: str, num_bytes: int) -> None:
        """Of an owner's room. Raises StorageError where there is not that much."""
        if self._num_bytes[owner] + num_bytes > self.limits.max_bytes:
            self.sweep()
        if self._num_bytes[owner] + num_bytes > self.limits.max_bytes:
            raise StorageError(
                f"there would be more than the {self.limits.max_bytes} bytes of files that are kept here: delete some"
                " first",
                status_code=507,
            )
        self._num_bytes[owner] += num_bytes

    def count(self, owner: str, num_files: int, num_bytes: int) -> None:
        """Something begins or ends that is counted beside the files that are there."""
        self._num_files[owner] += num_files
        self._num_bytes[owner] += num_bytes

    def _add(self, stored: StoredFile) -> None:
        self._files[stored.id] = stored
        self.count(stored.owner, 1, stored.num_bytes)

    def _forget(self, file_id: str) -> None:
        stored = self._files.pop(file_id)
        self.count(stored.owner, -1, -stored.num_bytes)

    def _remove(self, file_id: str) -> None:
        (self._path / f"{file_id}.json").unlink(missing_ok=True)
        self.path_of(file_id).unlink(missing_ok=True)
        self._forget(file_id)


class Upload:
    """One file as it comes. As a context manager: what has not become a file on the way out is gone.

    `take` and `keep` are the event loop's; `write` and `sync` may run on another thread, one at a time.
    """

    def __init__(self, store: FileStore, owner: str, path: Path) -> None:
        self._store = store
        self._owner = owner
        self._path = path
        self._reserved = 0
        self.num_bytes = 0
        try:
            self._file = new_file(path)
        except OSError as exc:
            raise no_room(path, exc) from exc
        store.count(owner, 1, 0)

    def take(self, num_bytes: int) -> None:
        """So much more is coming. Raises StorageError where there is no room."""
        self._store.reserve(self._owner, num_bytes)
        self._reserved += num_bytes

    def write(self, data: bytes | memoryview) -> None:
        """Raises StorageError, also for more than one file may have."""
        self.num_bytes += len(data)
        most = self._store.limits.max_file_bytes
        if self.num_bytes > most:
            raise StorageError(f"the file is larger than the {most} bytes that are taken here", status_code=413)
        try:
            self._file.write(data)
        except OSError as exc:
            raise no_room(self._path, exc) from exc

    def sync(self) -> None:
        """Have the disk take all of it. Raises StorageError."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as exc:
            raise no_room(self._path, exc) from exc

    async def keep(self, *, filename: str, purpose: str, expires_after_s: float | None) -> StoredFile:
        """Make a file of what was written and synced. Raises StorageError."""
        try:
            return await self._store.keep(
                self._path,
                owner=self._owner,
                filename=filename,
                purpose=purpose,
                expires_after_s=expires_after_s,
                file_id=f"file-{secrets.token_hex(12)}",
            )
        except OSError as exc:
            raise no_room(self._path, exc) from exc

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of what could not be written anyway
            self._file.close()
        self._path.unlink(missing_ok=True)
        self._store.count(self._owner, -1, -self._reserved)


# -- on disk -----------------------------------------------------------------------------------------------------------
def new_file(path: Path) -> BinaryIO:
    """For this user alone. Raises OSError, also where there is one."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb")


def put_beside(path: Path, other: Path) -> None:
    """The bytes of `path` under another name too, which nobody writes any more. Raises OSError."""
    try:
        os.link(path, other)
    except PermissionError:  # a file system without links
        with path.open("rb") as source, new_file(other) as copy:
            shutil.copyfileobj(source, copy, 2**20)
            copy.flush()
            os.fsync(copy.fileno())


def write_whole(path: Path, value: Any) -> None:
    """`value` as JSON, whole or not at all, whenever the machine may stop. Raises OSError."""
    waiting = path.with_suffix(".writing")
    waiting.unlink(missing_ok=True)
    try:
        with new_file(waiting) as file:
            file.write(msgspec.json.encode(value))
            file.flush()
            os.fsync(file.fileno())
        waiting.replace(path)
    except OSError:
        waiting.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_all(folder: Path, kind: type[T]) -> Iterator[T]:
    """What `write_whole` has written there; what is no such thing is left out, and told in the log."""
    for path in folder.glob("*.json"):
        try:
            yield msgspec.json.decode(path.read_bytes(), type=kind)
        except (OSError, msgspec.DecodeError) as exc:
            logger.warning("%s cannot be read and is left out: %s", path, exc)


def no_room(path: Path, error: OSError) -> StorageError:
    """For the client, without the path, which the log has."""
    logger.error("%s cannot be written: %s", path, error)
    return StorageError(FULL_DISK, status_code=507)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
