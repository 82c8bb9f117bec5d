"""Which servers of this user run on this machine.

Owns a file for each, in a folder of the user's in shared memory, which its server holds as long as it lives. Never
talks to a server. Where the folder cannot be had, no server is known.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mooli.shared_folder import is_ours, shared_folder

_MOST_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class RunningServer:
    """pid: of the process to signal. url: where it listens. model: as it is served, several with ", " between.
    started_s: since 1970."""

    pid: int
    url: str
    model: str
    started_s: float

    @property
    def models(self) -> list[str]:
        return self.model.split(", ")


def servers_folder() -> Path:
    """The same for all processes of this user, whatever their environment."""
    return shared_folder() / "servers"


@contextlib.contextmanager
def announced(server: RunningServer, folder: Path) -> Iterator[None]:
    """Others may know of `server` inside of this."""
    descriptor, path = -1, folder / f"{server.pid}-{os.urandom(4).hex()}"
    try:
        for place in (folder.parent, folder):
            place.mkdir(mode=0o700, exist_ok=True)
        if is_ours(folder.parent) and is_ours(folder):
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            fcntl.flock(
                descriptor, fcntl.LOCK_EX
            )  # before it says anything: who reads a file that nobody holds, drops it
            os.write(descriptor, json.dumps(asdict(server)).encode())
    except OSError:
        pass  # nothing hangs on it
    try:
        yield
    finally:
        if descriptor >= 0:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def running_servers(folder: Path) -> list[RunningServer]:
    """All that run, the oldest first. Files of servers that are gone are removed."""
    found = []
    try:
        paths = list(folder.iterdir()) if is_ours(folder) else []
    except OSError:
        return []
    for path in paths:
        with contextlib.suppress(OSError, ValueError, TypeError):
            found += _held(path)
    return sorted(found, key=lambda server: server.started_s)


def _held(path: Path) -> list[RunningServer]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        data = os.read(descriptor, _MOST_BYTES)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:  # its server holds it
            return [RunningServer(**json.loads(data))] if data else []
        if time.time() - os.fstat(descriptor).st_mtime > 1:  # else it may just be coming
            path.unlink(missing_ok=True)
        return []
    finally:
        os.close(descriptor)
