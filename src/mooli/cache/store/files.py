"""What the store asks of the operating system, in one place, so that tests can make any of it fail.

Owns no decision: each method is one call. All raise OSError.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

Buffer = bytes | bytearray | memoryview

_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


class Files:
    """Files and folders of this machine. Files that are made are for their user alone; links are not followed."""

    def make_folder(self, path: Path) -> None:
        """With the folders above it, where they are missing. One that is there stays as it is."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def status(self, path: Path) -> os.stat_result:
        """Of the entry itself, also where it is a link."""
        return os.lstat(path)

    def names(self, folder: Path) -> list[str]:
        return os.listdir(folder)

    def free_bytes(self, folder: Path) -> int:
        """What this user may still write to the disk of `folder`."""
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize

    def open_to_read(self, path: Path) -> int:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)

    def open_to_write(self, path: Path) -> int:
        """Of a file that is there."""
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)

    def create(self, path: Path) -> int:
        """A file that is not there."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)

    def open_lock(self, path: Path) -> int:
        """A file that may or may not be there."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def status_of(self, descriptor: int) -> os.stat_result:
        return os.fstat(descriptor)

    def read(self, descriptor: int, num_bytes: int, offset: int) -> bytes:
        """Fewer bytes only where the file ends, or as the system likes."""
        return os.pread(descriptor, num_bytes, offset)

    def write(self, descriptor: int, data: Buffer, offset: int) -> int:
        """How many bytes were written, from the front."""
        return os.pwrite(descriptor, data, offset)

    def truncate(self, descriptor: int, num_bytes: int) -> None:
        """Cut, or made longer without taking room on the disk."""
        os.ftruncate(descriptor, num_bytes)

    def sync(self, descriptor: int) -> None:
        """Have the disk take what was written."""
        _sync_data(descriptor)

    def sync_folder(self, folder: Path) -> None:
        """Have the disk take the names in it."""
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, path: Path, target: Path) -> None:
        os.replace(path, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        """An empty one."""
        os.rmdir(path)

    def lock(self, descriptor: int) -> bool:
        """Whether this opening of the file has it alone now: until it is closed, or its process ends."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextlib.contextmanager
def opened(files: Files, descriptor: int) -> Iterator[int]:
    """`descriptor`, closed on the way out."""
    try:
        yield descriptor
    finally:
        files.close(descriptor)


def read_all(files: Files, descriptor: int, num_bytes: int, offset: int) -> bytes:
    """As many bytes as there are of `num_bytes`."""
    data = files.read(descriptor, num_bytes, offset)
    if not data or len(data) == num_bytes:
        return data
    pieces = [data]
    got = len(data)
    while got < num_bytes and (data := files.read(descriptor, num_bytes - got, offset + got)):
        pieces.append(data)
        got += len(data)
    return b"".join(pieces)


def write_all(files: Files, descriptor: int, data: Buffer, offset: int) -> None:
    """All of it, in as many calls as it takes."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        written = files.write(descriptor, view[done:], offset + done)
        if written <= 0:
            raise OSError(5, "the disk takes nothing")
        done += written
