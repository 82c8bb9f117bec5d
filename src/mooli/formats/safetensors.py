"""Safetensors files and sharded folders: a JSON header and memory-mapped tensors.

Owns the checking of the header against the size of the file and of the shard index against the folder. Never knows what
a tensor is for. Layout: the format description of the safetensors project.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mooli.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from mooli.formats.files import MappedFile, TensorFile, parse_json, read_json
from mooli.tensor import RawTensor, TensorType, row_bytes

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_MAX_HEADER_BYTES = 1 << 25
_MAX_DIMS = 32
_READABLE = {"F32": TensorType.F32, "F16": TensorType.F16, "BF16": TensorType.BF16}
_OTHER_BYTES = {
    1: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"),
    2: ("U16", "I16"),
    4: ("U32", "I32"),
    8: ("U64", "I64", "F64"),
}
_NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "U8": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8"}
_OTHER_SIZES = {name: num_bytes for num_bytes, names in _OTHER_BYTES.items() for name in names}


@dataclass(frozen=True, slots=True)
class SafetensorInfo:
    """Where a tensor lies: `offset` from the start of the file, in bytes; `dtype` as the header spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Of matrices stacked in a third dimension the rows of all, one behind the other."""
        return (self.shape[0] * self.shape[1], self.shape[2]) if len(self.shape) == 3 else self.shape

    def readable_type(self) -> TensorType:
        """UnsupportedModelError for a dtype or a number of dimensions that is not read."""
        kind = _READABLE.get(self.dtype)
        if kind is None:
            raise UnsupportedModelError(
                f"tensor {self.name} has dtype {self.dtype[:40]}, which is not read; read are {', '.join(_READABLE)}"
            )
        if len(self.matrix_shape) not in (1, 2) or 0 in self.shape:
            raise UnsupportedModelError(f"tensor {self.name} has shape {list(self.shape)}; 1 to 3 dimensions are read")
        return kind


class SafetensorsFile(TensorFile[SafetensorInfo]):
    """One open safetensors file."""

    def _read_header(self, file: MappedFile) -> None:
        self.metadata, self.tensors = _read_header(file)

    def tensor(self, name: str) -> RawTensor:
        """A view of the mapped bytes. UnsupportedModelError for a dtype other than F32, F16 and BF16."""
        info = self._place(name)
        kind = info.readable_type()
        shape = info.matrix_shape
        rows = 1 if len(shape) == 1 else shape[0]
        data = self._view(info).reshape(rows, row_bytes(kind, shape[-1]))
        return RawTensor(name, kind, shape, data)

    def array(self, name: str) -> NDArray[Any]:
        """The numbers of a tensor as NumPy has them, bfloat16 as float32. UnsupportedModelError for other dtypes."""
        info = self._place(name)
        data = self._view(info)
        if info.dtype == "BF16":
            return (data.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(info.shape)
        if info.dtype not in _NUMPY_TYPES:
            raise UnsupportedModelError(
                f"tensor {name} has dtype {info.dtype[:40]}; here BF16, {', '.join(_NUMPY_TYPES)} are read"
            )
        return data.view(_NUMPY_TYPES[info.dtype]).reshape(info.shape)

    def codes(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor of numbers of one byte, in its shape. UnsupportedModelError for other dtypes."""
        info = self._place(name)
        if info.dtype not in _OTHER_BYTES[1]:
            raise UnsupportedModelError(f"tensor {name} has dtype {info.dtype[:40]}, not one of one byte")
        return self._view(info).reshape(info.shape)


class SafetensorsFolder:
    """All tensors of a folder: `model.safetensors`, else the shards its index names, else every `*.safetensors`."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self._files: list[SafetensorsFile] = []
        self._owners: dict[str, SafetensorsFile] = {}
        try:
            if not (self.path / SINGLE_NAME).is_file() and (self.path / INDEX_NAME).is_file():
                self._open_index()
            else:
                self._open_all()
        except BaseException:
            self.close()
            raise

    def names(self) -> Iterable[str]:
        return self._owners.keys()

    def info(self, name: str) -> SafetensorInfo:
        return self._owner(name).tensors[name]

    def tensor(self, name: str) -> RawTensor:
        return self._owner(name).tensor(name)

    def array(self, name: str) -> NDArray[Any]:
        return self._owner(name).array(name)

    def codes(self, name: str) -> NDArray[np.uint8]:
        return self._owner(name).codes(name)

    def release(self, name: str) -> None:
        self._owner(name).release(name)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _owner(self, name: str) -> SafetensorsFile:
        owner = self._owners.get(name)
        if owner is None:
            raise CheckpointError(f"{self.path.name} has no tensor {name}")
        return owner

    def _open(self, name: str) -> SafetensorsFile:
        self._files.append(SafetensorsFile(self.path / name))
        return self._files[-1]

    def _open_index(self) -> None:
        weight_map = read_json(self.path / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{INDEX_NAME} has no weight_map")
        shards: dict[str, SafetensorsFile] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not _is_plain_name(shard):
                raise CheckpointError(f"{INDEX_NAME}: {str(shard)[:80]!r} is not the name of a file in the folder")
            if shard not in shards:
                if not (self.path / shard).is_file():
                    raise CheckpointError(f"shard {shard} is missing from {self.path.name}; download it again")
                shards[shard] = self._open(shard)
            if name not in shards[shard].tensors:
                raise CheckpointError(f"{INDEX_NAME} says that {name[:80]} is in {shard}, where it is not")
            self._owners[name] = shards[shard]

    def _open_all(self) -> None:
        single = self.path / SINGLE_NAME
        names = [SINGLE_NAME] if single.is_file() else sorted(p.name for p in self.path.glob("*.safetensors"))
        if not names:
            raise ModelNotFoundError(f"there is no .safetensors file in {self.path}")
        for file in map(self._open, names):
            for name in file.tensors:
                if name in self._owners:
                    first = self._owners[name].path.name
                    raise CheckpointError(f"tensor {name[:80]} is both in {first} and in {file.path.name}")
                self._owners[name] = file


def _is_plain_name(name: str) -> bool:
    return name.endswith(".safetensors") and not any(part in name for part in ("/", "\\", "\0", ":"))


def _read_header(file: MappedFile) -> tuple[dict[str, str], dict[str, SafetensorInfo]]:
    label = file.path.name
    if file.size < 8:
        raise CheckpointError(f"{label} has {file.size} bytes: it is truncated")
    (length,) = struct.unpack("<Q", file.buffer[:8])
    if length > min(_MAX_HEADER_BYTES, file.size - 8):
        raise CheckpointError(
            f"{label}: a header of {length} bytes does not fit the file: truncated or not safetensors"
        )
    header = parse_json(file.buffer[8 : 8 + length], f"the header of {label}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{label}: __metadata__ must map names to strings")
    start = 8 + length
    tensors = {name: _tensor_info(label, name, entry, start) for name, entry in header.items()}
    end = start
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.num_bytes)):
        if info.offset != end:
            raise CheckpointError(f"{label}: tensor {info.name[:80]} overlaps another or leaves a hole before it")
        end += info.num_bytes
    if end != file.size:
        raise CheckpointError(
            f"{label}: tensors end at byte {end}, the file at {file.size}: it is truncated or damaged"
        )
    return metadata, tensors


def _tensor_info(label: str, name: str, entry: Any, start: int) -> SafetensorInfo:
    where = f"{label}: tensor {name[:80]}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise CheckpointError(f"{where}: dtype must be a string")
    if not _are_counts(shape) or len(shape) > _MAX_DIMS:
        raise CheckpointError(f"{where}: shape must be a list of at most {_MAX_DIMS} whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise CheckpointError(f"{where}: data_offsets must be a begin and an end")
    item_bytes = _OTHER_SIZES.get(dtype)
    if dtype in _READABLE:
        item_bytes = row_bytes(_READABLE[dtype], 1)
    num_bytes = offsets[1] - offsets[0]
    if item_bytes is not None and math.prod(shape) * item_bytes != num_bytes:
        raise CheckpointError(f"{where}: shape {shape} of {dtype} does not take {num_bytes} bytes")
    return SafetensorInfo(name, dtype, tuple(shape), start + offsets[0], num_bytes)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 60 for value in values)
