"""Opening what a model folder holds: regular files only, read up to a bound, parsed strictly, or mapped into memory.

Owns which files of a model are opened at all, the wording of what is wrong with a JSON file, and the mapping of files
of tensors with its lifetime. A model is somebody else's: a pipe or a device in its folder would hang who reads it or
never end, and a link could hand out any file of this machine. Knows no format of weights and no schema.

Two rules for links, by what is done with the contents:

- text (configurations, tokenizers, templates) must lie in the model's own folder, links followed. A template may be
  shown to clients and its words are in every prompt, so `chat_template.jinja -> /proc/self/environ` would give keys
  away. The snapshots of a hub's cache are links to `blobs` beside `snapshots`; that folder counts as the model's own.
  The folder itself may be a link: that one is the user's.
- weights (safetensors, GGUF) may be links to regular files anywhere, as they are large and often kept on another disk.
  They are parsed strictly, and what does not parse is not shown.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mooli.errors import CheckpointError, ModelError, ModelNotFoundError

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


# -- JSON objects: no duplicate keys, no NaN ---------------------------------------------------------------------------


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object in UTF-8 `text`. CheckpointError naming `what` for anything else."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply") from None
    except ValueError as exc:
        raise CheckpointError(f"{what} is not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must hold a JSON object, not a {type(value).__name__}")
    return value


def read_json(path: Path, max_bytes: int = 1 << 26) -> dict[str, Any]:
    """The JSON object in a file of at most `max_bytes` of a model folder (`read_text_file`)."""
    return parse_json(read_text_file(path, max_bytes), path.name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"duplicate key {twice[:80]!r}")
    return result


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


# -- mapped into memory ------------------------------------------------------------------------------------------------


class MappedFile:
    """Bytes of a file without reading them: pages come in when touched and may leave again after `release`.

    Raises ModelNotFoundError if the file is not there, CheckpointError if it is empty, no regular file (`open_weights`)
    or cannot be mapped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_weights(path) as file:
                self.size = file.seek(0, 2)
                if self.size == 0:
                    raise CheckpointError(f"{path.name} is empty")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as exc:
            if isinstance(exc, ModelError):
                raise
            raise CheckpointError(f"cannot map {path.name}: {exc}") from exc

    @property
    def buffer(self) -> mmap.mmap:
        """The whole file; slices are copies (bytes)."""
        return self._map

    def view(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        """uint8 (num_bytes,), read-only, no copy. CheckpointError if it does not lie inside the file."""
        if offset < 0 or num_bytes < 0 or offset + num_bytes > self.size:
            raise CheckpointError(
                f"{self.path.name}: bytes {offset} to {offset + num_bytes} lie outside of its {self.size} bytes"
            )
        return np.frombuffer(self._map, np.uint8, num_bytes, offset)

    def release(self, offset: int, num_bytes: int) -> None:
        """Let the kernel drop these pages from our memory. Views stay valid: a later read maps them again."""
        if not hasattr(mmap, "MADV_DONTNEED") or num_bytes <= 0:
            return
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, min(offset + num_bytes, self.size) - start)

    def close(self) -> None:
        """Unmap. If views are still alive the mapping goes with the last of them."""
        with contextlib.suppress(BufferError):  # NumPy views keep the mapping
            self._map.close()


class TensorPlace(Protocol):
    """What a header says of a tensor, as far as all formats have it: bytes from the start of the file."""

    @property
    def offset(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...


Place = TypeVar("Place", bound=TensorPlace)
Opened = TypeVar("Opened", bound="TensorFile[Any]")


class TensorFile(Generic[Place]):
    """An open file of tensors, by name, its header checked. Use as a context manager or call `close`.

    Raises CheckpointError for a header that is malformed or does not agree with the file, and as `MappedFile`.
    """

    tensors: dict[str, Place]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = MappedFile(self.path)
        try:
            self._read_header(self._file)
        except BaseException:
            self._file.close()
            raise

    def _read_header(self, file: MappedFile) -> None:
        """Set `tensors`, and what else the format's header tells."""
        raise NotImplementedError

    def release(self, name: str) -> None:
        """The pages of this tensor are not needed for now."""
        place = self._place(name)
        self._file.release(place.offset, place.num_bytes)

    def close(self) -> None:
        self._file.close()

    def _place(self, name: str) -> Place:
        place = self.tensors.get(name)
        if place is None:
            raise CheckpointError(f"{self.path.name} has no tensor {name}")
        return place

    def _view(self, place: Place) -> NDArray[np.uint8]:
        return self._file.view(place.offset, place.num_bytes)

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
