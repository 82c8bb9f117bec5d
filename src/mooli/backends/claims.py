"""What the engines of one user have claimed of the machine's memory and not touched yet.

Owns a file for each claim, in a folder of the user's in shared memory. Never allocates anything. The pages of a KV pool
that hold nothing yet count as free memory everywhere else; without this, engines on one machine would each take them
for theirs. Advisory: where the folder cannot be had, nothing is known of others.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

from mooli.shared_folder import is_ours

UNFINISHED = "new-"
"""How a file begins that is not a claim yet. A claim's begins with the number of its process."""


class Claim:
    """A number of bytes that this process will come to hold, until `release` or its end."""

    def __init__(self, num_bytes: int, folder: Path) -> None:
        """Of weights and KV pool together, touched or not."""
        self._file = -1
        self._path = ""
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            if not is_ours(folder):
                return
            self._file, self._path = tempfile.mkstemp(prefix=UNFINISHED, dir=folder)
            # Held as long as this process lives: a claim that nobody holds is void.
            fcntl.flock(self._file, fcntl.LOCK_EX)
            os.write(self._file, str(num_bytes).encode())
            finished = str(folder / f"{os.getpid()}-{self._path.rpartition(UNFINISHED)[2]}")
            os.rename(self._path, finished)
            self._path = finished
        except OSError:
            self.release()

    def release(self) -> None:
        """May be called again."""
        file, self._file = self._file, -1
        if file < 0:
            return
        os.close(file)
        Path(self._path).unlink(missing_ok=True)


def untouched_bytes(folder: Path, processes: Path = Path("/proc")) -> int:
    """Of all claims, what their processes do not hold yet. Removes claims whose process has ended."""
    claimed: dict[str, int] = {}
    try:
        paths = [path for path in folder.iterdir() if path.name[0].isdigit()] if is_ours(folder) else []
    except OSError:
        return 0
    for path in paths:
        pid = path.name.partition("-")[0]
        claimed[pid] = claimed.get(pid, 0) + _claimed(path)
    return sum(max(0, claim - _held(processes / pid / "status")) for pid, claim in claimed.items() if claim)


def _claimed(path: Path) -> int:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return 0
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # somebody holds it
        text = os.read(file, 32)
        return int(text) if text.isdigit() else 0
    else:
        path.unlink(missing_ok=True)
        return 0
    finally:
        os.close(file)


def _held(status: Path) -> int:
    """Bytes of its own that a process holds; 0 where the system does not tell."""
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return 0
    kib = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(kib[0]) * 1024 if kib else 0
