"""The folder in which processes of one user tell each other what they are.

Owns where it is, and whether it may be believed. Never reads or writes anything in it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def shared_folder() -> Path:
    """In shared memory, the same for all processes of this user, whatever their environment. It may not be there."""
    shared = Path("/dev/shm")
    return (shared if shared.is_dir() else Path("/tmp")) / f"mooli-{os.getuid()}"


def is_ours(folder: Path) -> bool:
    """Whether a folder is this user's, and nobody else can write into it. Raises OSError where there is none."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
