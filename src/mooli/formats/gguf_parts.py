"""GGUF models in several files, opened as one.

Owns the check that parts belong together. Every part is a whole GGUF file; the first has the metadata. Never reads a
header itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mooli.errors import CheckpointError
from mooli.formats.gguf import GGUFFile, TensorInfo
from mooli.formats.gguf_names import part_paths
from mooli.tensor import RawTensor


def open_gguf(path: Path) -> GGUFFile | GGUFParts:
    """The GGUF model at `path`, whichever of its parts that is. Raises as `GGUFFile`, and CheckpointError for parts
    that are missing, renamed or not of one model."""
    paths = part_paths(path)
    if len(paths) > 1:
        return GGUFParts(paths)
    file = GGUFFile(path)
    count = _number(file, "split.count")
    if count > 1:
        file.close()
        raise CheckpointError(
            f"{path.name} is one of {count} parts, and its name does not say which: give the files the names they had,"
            f" such as name-00001-of-{count:05d}.gguf"
        )
    return file


class GGUFParts:
    """The open parts of a GGUF model, in the form of a `GGUFFile`: the first part's metadata, the tensors of all."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """paths: all parts in order. Raises as `open_gguf`."""
        self.path = paths[0]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise CheckpointError(
                f"of the {len(paths)} parts of {self.path.name}, {len(missing)} are missing in {self.path.parent}:"
                f" {shown}; put them beside the others, or fetch the model again"
            )
        self._files: list[GGUFFile] = []
        self._owners: dict[str, GGUFFile] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            for index, path in enumerate(paths):
                self._add(GGUFFile(path), index, len(paths))
            self.metadata: dict[str, Any] = self._files[0].metadata
            said = _number(self._files[0], "split.tensors.count", len(self.tensors))
            if said != len(self.tensors):
                raise CheckpointError(
                    f"{self.path.name} says that its parts have {said} tensors together, and they have"
                    f" {len(self.tensors)}: they are not of one model; fetch it again"
                )
        except BaseException:
            self.close()
            raise

    def _add(self, file: GGUFFile, index: int, count: int) -> None:
        self._files.append(file)
        said = _number(file, "split.no", index), _number(file, "split.count", count)
        if said != (index, count):
            raise CheckpointError(
                f"{file.path.name} says that it is part {said[0] + 1} of {said[1]}: it was renamed, or belongs to"
                " another model; fetch it again"
            )
        for name, info in file.tensors.items():
            if name in self._owners:
                raise CheckpointError(
                    f"tensor {name[:80]} is both in {self._owners[name].path.name} and in {file.path.name}"
                )
            self._owners[name] = file
            self.tensors[name] = info

    def tensor(self, name: str) -> RawTensor:
        """As `GGUFFile.tensor`."""
        return self._owner(name).tensor(name)

    def release(self, name: str) -> None:
        self._owner(name).release(name)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _owner(self, name: str) -> GGUFFile:
        if name not in self._owners:
            raise CheckpointError(f"{self.path.name} and its other parts have no tensor {name}")
        return self._owners[name]

    def __enter__(self) -> GGUFParts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _number(file: GGUFFile, key: str, default: int = 0) -> int:
    """A whole number of the metadata. CheckpointError for what is none."""
    value = file.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"{file.path.name}: {key} is {str(value)[:80]}, not a whole number")
    return value
