"""Opening what a model folder holds: regular files only, read up to a bound.

Owns which files of a model are opened at all. A model is somebody else's: a pipe or a device in its folder would hang
who reads it or never end, and a link could hand out any file of this machine. Knows no format.

Two rules for links, by what is done with the contents:

- text (configurations, tokenizers, templates) must lie in the model's own folder, links followed. A template may be
  shown to clients and its words are in every prompt, so `chat_template.jinja -> /proc/self/environ` would give keys
  away. The snapshots of a hub's cache are links to `blobs` beside `snapshots`; that folder counts as the model's own.
  The folder itself may be a link: that one is the user's.
- weights (safetensors, GGUF) may be links to regular files anywhere, as they are large and often kept on another disk.
  They are parsed strictly, and what does not parse is not shown.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from mooli.errors import CheckpointError, ModelNotFoundError

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK  # a pipe without a writer must not be waited for


def open_weights(path: Path) -> BinaryIO:
    """The regular file at `path`, wherever links lead. ModelNotFoundError if there is none, CheckpointError if it is
    no regular file or cannot be opened."""
    return _open(path, path, _FLAGS)


def read_text_file(path: Path, max_bytes: int, *, root: Path | None = None) -> bytes:
    """The contents of a file of at most `max_bytes` that lies in the model folder `root`, by default its own folder.

    Raises ModelNotFoundError if there is no such file, CheckpointError if it is larger, no regular file, a link that
    leads out of the folder, or cannot be read.
    """
    place = _inside(path, path.parent if root is None else root)
    return _read(path, _open(path, place, _FLAGS | os.O_NOFOLLOW), max_bytes)


def read_given_file(path: Path, max_bytes: int) -> bytes:
    """`read_text_file` of a file that the user has named: its links are the user's, and may lead anywhere."""
    return _read(path, _open(path, path, _FLAGS), max_bytes)


def _read(path: Path, file: BinaryIO, max_bytes: int) -> bytes:
    with file:
        try:
            data = file.read(max_bytes + 1)
        except OSError as exc:
            raise CheckpointError(f"cannot read {path.name}: {exc}") from exc
    if len(data) > max_bytes:
        raise CheckpointError(f"{path.name} has more than {max_bytes} bytes; so much is not read of such a file")
    return data


def _open(path: Path, place: Path, flags: int) -> BinaryIO:
    """`place`: where the file named `path` is."""
    descriptor = None
    try:
        # Looked at before it is opened too: opening some devices already does something.
        if stat.S_ISREG(os.stat(place).st_mode):
            descriptor = os.open(place, flags)
    except FileNotFoundError as exc:
        raise ModelNotFoundError(f"there is no file {path}") from exc
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"cannot open {path.name}: {exc}") from exc
    if descriptor is not None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    raise CheckpointError(
        f"{path} is not a regular file but a folder, a pipe or a device, which are not read; remove it, or fetch the"
        " model again"
    )


def _inside(path: Path, root: Path) -> Path:
    """Where `path` is with all links followed. CheckpointError if that is not in the model folder `root`."""
    real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    if not any(home in real.parents for home in homes):
        raise CheckpointError(
            f"{path.name} in {root} is a link that leads out of the model's folder, to {real}: a model could hand out"
            " any file of this machine that way. If it is what you want, put a copy of the file in its place"
        )
    return real
