"""GGUF files, versions 2 and 3, little endian: metadata and memory-mapped tensors.

Owns the checking of every count, length and offset against the size of the file before anything is allocated. Never
knows what a key or a tensor is for. Layout: the GGUF specification of the ggml project (docs/gguf.md).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.formats.files import MappedFile, TensorFile, open_weights
from mooli.tensor import BLOCK, GGUF_TYPES, RawTensor, TensorType, row_bytes

_MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_MAX_DEPTH = 4
_MAX_TENSORS = 1 << 18
_MAX_PAIRS = 1 << 16
_MAX_NESTED = 1 << 16
_MAX_NAME_BYTES = 1 << 16
_MAX_STRING_BYTES = 1 << 26
_STRING, _ARRAY, _BOOL, _FLOAT32 = 8, 9, 7, 6
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_TYPES = {int(kind): kind for kind in GGUF_TYPES}
_OTHER_TYPE_NAMES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
}
"""Types that exist and are not read, for the message."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `shape` (rows, columns) or (columns,), `offset` from the start of the file, in bytes. Of
    matrices stacked in a third dimension `shape` has the rows of all."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class StringArray(Sequence[str]):
    """Strings as a GGUF file has them, checked, each made when it is asked for: who loads weights needs few of 300,000.

    data: the strings, each after its length in eight bytes. ends: int64 (count,), where each ends in `data`.
    """

    def __init__(self, data: bytes, ends: NDArray[np.int64]) -> None:
        self._data = data
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return self.tolist()[index]
        at = range(len(self))[index]
        start = int(self._ends[at - 1]) if at else 0
        return self._data[start + 8 : self._ends[at]].decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def tolist(self) -> list[str]:
        """All of them, at once."""
        from mooli._gguf import read_strings

        strings: list[str] = read_strings(np.frombuffer(self._data, np.uint8), 0, len(self))
        return strings

    def pairs(self) -> list[tuple[str, str]]:
        """Each cut in two at the first space that is not its first character; ends before the first that has none."""
        from mooli._gguf import read_pairs

        pairs: list[tuple[str, str]] = read_pairs(np.frombuffer(self._data, np.uint8), 0, len(self))
        return pairs


class GGUFFile(TensorFile[TensorInfo]):
    """An open GGUF file.

    metadata: Python values by key, but 32-bit floats are np.float32, arrays of numbers NumPy arrays and arrays of
        strings a StringArray.
    tensors: name to TensorInfo, all checked: inside the file, aligned, not overlapping, of a supported type.
    Raises as `TensorFile`, and UnsupportedModelError for a version, byte order or tensor type that is not read.
    """

    def _read_header(self, file: MappedFile) -> None:
        reader = _Reader(file)
        self.version = reader.version
        self.metadata: dict[str, Any] = reader.metadata()
        self.tensors = reader.tensor_infos(self.metadata)

    def tensor(self, name: str) -> RawTensor:
        """A view of the mapped bytes. CheckpointError if there is no tensor of that name."""
        info = self._place(name)
        rows = 1 if len(info.shape) == 1 else info.shape[0]
        return RawTensor(name, info.type, info.shape, self._view(info).reshape(rows, -1))


def read_gguf(path: str | Path) -> GGUFFile:
    """Open and check a GGUF file."""
    return GGUFFile(path)


def is_gguf(path: Path) -> bool:
    """Whether the file begins as a GGUF file does, whatever it is called."""
    try:
        with open_weights(path) as file:
            return file.read(4) == _MAGIC
    except (OSError, CheckpointError):
        return False


class _Reader:
    """A cursor over the header. Every read is checked against the end of the file first."""

    def __init__(self, file: MappedFile) -> None:
        self.buffer, self.size, self.name = file.buffer, file.size, file.path.name
        self.bytes = file.view(0, file.size)
        self.position = 0
        if self._take(4, "magic") != _MAGIC:
            raise CheckpointError(f"{self.name} is not a GGUF file: it does not begin with 'GGUF'")
        self.version = self._u32("version")
        if self.version & 0xFFFF == 0 and self.version:
            raise UnsupportedModelError(f"{self.name} is a big-endian GGUF file; convert it to little endian")
        if self.version not in (2, 3):
            raise UnsupportedModelError(f"{self.name} has GGUF version {self.version}; versions 2 and 3 are read")
        self.num_tensors = self._count("number of tensors", 32)
        self.num_pairs = self._count("number of metadata pairs", 13)
        if self.num_tensors > _MAX_TENSORS or self.num_pairs > _MAX_PAIRS:
            raise self._wrong(
                f"{self.num_tensors} tensors and {self.num_pairs} metadata pairs; at most {_MAX_TENSORS} and"
                f" {_MAX_PAIRS} are read"
            )

    # -- parts of the header, in the order of the file --
    def metadata(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for _ in range(self.num_pairs):
            key = self._string("metadata key", _MAX_NAME_BYTES)
            if key in result:
                raise self._wrong(f"metadata key {key[:80]!r} appears twice")
            result[key] = self._value(self._u32("value type"), key, 0)
        return result

    def tensor_infos(self, metadata: dict[str, Any]) -> dict[str, TensorInfo]:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment & (alignment - 1):
            raise self._wrong(f"general.alignment {str(alignment)[:80]} is not a power of two")
        if not 1 <= alignment <= 1 << 20:
            raise self._wrong(f"general.alignment {alignment} is not between 1 and {1 << 20}")
        relative: dict[str, TensorInfo] = {}
        for _ in range(self.num_tensors):
            info = self._tensor_info(alignment)
            if info.name in relative:
                raise self._wrong(f"tensor {info.name[:80]!r} appears twice")
            relative[info.name] = info
        data_start = -(-self.position // alignment) * alignment
        end, previous = data_start, ""
        result: dict[str, TensorInfo] = dict(relative)  # keeps the order of the file
        for info in sorted(relative.values(), key=lambda info: info.offset):
            start = data_start + info.offset
            if start < end:
                raise self._wrong(f"tensors {previous} and {info.name} overlap")
            end, previous = start + info.num_bytes, info.name
            if end > self.size:
                raise self._wrong(f"tensor {info.name} ends at byte {end}, after the end of the file: it is truncated")
            result[info.name] = TensorInfo(info.name, info.type, info.shape, start, info.num_bytes)
        return result

    def _tensor_info(self, alignment: int) -> TensorInfo:
        """One entry, its offset still relative to the tensor data."""
        name = self._string("tensor name", _MAX_NAME_BYTES)
        label = name[:80]
        num_dims = self._u32("number of dimensions")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self._wrong(f"tensor {label} has {num_dims} dimensions, not 1 to {_MAX_DIMS}")
        dims = [self._u64("dimension") for _ in range(num_dims)]
        number, offset = self._u32("tensor type"), self._u64("tensor offset")
        if not all(1 <= dim < 1 << 40 for dim in dims):
            raise self._wrong(f"tensor {label} has dimensions {dims}")
        while len(dims) > 2 and dims[-1] == 1:
            dims.pop()
        if len(dims) > 3:
            raise UnsupportedModelError(f"tensor {label} has {len(dims)} dimensions; at most 3 are read")
        if len(dims) == 3:
            dims = [dims[0], dims[1] * dims[2]]
        try:
            kind = _TYPES[number]
        except KeyError:
            known = _OTHER_TYPE_NAMES.get(number, f"number {number}")
            names = ", ".join(t.name for t in _TYPES.values())
            raise UnsupportedModelError(
                f"tensor {label} has type {known}, which is not read; read are {names}"
            ) from None
        # GGUF writes the fastest dimension first.
        columns, rows = dims[0], dims[1] if len(dims) == 2 else 1
        if columns % BLOCK[kind][0]:
            raise self._wrong(
                f"tensor {label}: {columns} columns are not whole blocks of {BLOCK[kind][0]} ({kind.name})"
            )
        if offset % alignment:
            raise self._wrong(f"tensor {label}: offset {offset} is not a multiple of the alignment {alignment}")
        num_bytes = rows * row_bytes(kind, columns)
        if num_bytes > self.size or offset > self.size:
            raise self._wrong(f"tensor {label} of {num_bytes} bytes at {offset} does not fit the file: it is truncated")
        return TensorInfo(name, kind, tuple(reversed(dims)), offset, num_bytes)

    # -- values --
    def _value(self, kind: int, key: str, depth: int) -> Any:
        if kind == _STRING:
            return self._string(key, _MAX_STRING_BYTES)
        if kind == _ARRAY:
            return self._array(key, depth)
        if kind not in _NUMBERS:
            raise self._wrong(f"metadata {key[:80]!r} has unknown value type {kind}")
        dtype = _NUMBERS[kind]
        value = np.frombuffer(self._take(dtype.itemsize, key), dtype)[0]
        if kind == _BOOL:
            return self._bools(value, key)
        return value if kind == _FLOAT32 else value.item()

    def _array(self, key: str, depth: int) -> Any:
        if depth >= _MAX_DEPTH:
            raise self._wrong(f"metadata {key[:80]!r}: arrays are nested more than {_MAX_DEPTH} deep")
        kind = self._u32("array type")
        if kind == _STRING:
            return self._strings(self._count(key, 8), key)
        if kind == _ARRAY:
            count = self._count(key, 12)
            if count > _MAX_NESTED:
                raise self._wrong(
                    f"metadata {key[:80]!r} is an array of {count} arrays; at most {_MAX_NESTED} are read"
                )
            return [self._array(key, depth + 1) for _ in range(count)]
        if kind not in _NUMBERS:
            raise self._wrong(f"metadata {key[:80]!r} is an array of unknown value type {kind}")
        dtype = _NUMBERS[kind]
        count = self._count(key, dtype.itemsize)
        # `_take` copies, so that metadata does not keep the file mapped.
        values = np.frombuffer(self._take(count * dtype.itemsize, key), dtype)
        return self._bools(values, key) if kind == _BOOL else values

    def _bools(self, values: Any, key: str) -> Any:
        if np.any(values > 1):
            raise self._wrong(f"metadata {key[:80]!r}: a truth value is neither 0 nor 1")
        return values.astype(bool) if isinstance(values, np.ndarray) else bool(values)

    def _strings(self, count: int, key: str) -> StringArray:
        # Imported here: all else works where native modules do not load, and the doctor looks at such machines.
        from mooli._gguf import string_ends

        ends = np.empty(count, np.int64)
        start, num_good = self.position, string_ends(self.bytes, self.position, ends)
        if num_good:
            self.position = int(ends[num_good - 1])
        if num_good < count:
            # Reading it again says what is wrong with it.
            self._string(f"string {num_good} of {key[:60]!r}", 1 << 64)
            raise self._wrong(f"string {num_good} of {key[:60]!r} cannot be read")
        return StringArray(self.buffer[start : self.position], ends - start)

    def _string(self, what: str, max_bytes: int) -> str:
        length = self._u64(what)
        if length > max_bytes:
            raise self._wrong(f"{what[:80]} has {length} bytes, more than {max_bytes}")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self._wrong(f"{what[:80]} is not valid UTF-8") from None

    def _count(self, what: str, least_bytes: int) -> int:
        """A 64-bit count of things of at least `least_bytes` each, so it cannot exceed what is left of the file."""
        count = self._u64(what)
        if count > (self.size - self.position) // least_bytes:
            raise self._wrong(f"{what[:80]}: {count} entries do not fit the file: it is truncated or not valid")
        return count

    def _u32(self, what: str) -> int:
        return int(_U32.unpack(self._take(4, what))[0])

    def _u64(self, what: str) -> int:
        return int(_U64.unpack(self._take(8, what))[0])

    def _take(self, num_bytes: int, what: str) -> bytes:
        end = self.position + num_bytes
        if end > self.size:
            raise self._wrong(f"the file ends inside {what[:80]!r}: it is truncated")
        taken = self.buffer[self.position : end]
        self.position = end
        return taken

    def _wrong(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {message}")
