"""A file mapped read-only into memory, with bounds checked views.

Owns the mapping and its lifetime. Knows no format.
"""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from mooli.errors import CheckpointError, ModelError
from mooli.formats.regular_file import open_weights


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

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
