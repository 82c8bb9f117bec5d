"""The weights of a model under one set of names, wherever they come from.

Owns the check that a source has what a configuration demands, and the translation from each kind of source: a
safetensors folder, a GGUF file, or random numbers. Never packs or converts a weight; the backend does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mooli.backends.dequant import dequantize
from mooli.errors import CheckpointError
from mooli.formats.gguf import GGUFFile
from mooli.formats.gguf_parts import GGUFParts
from mooli.models.config import ModelConfig, TensorSpec
from mooli.models.stacks import Places
from mooli.tensor import RawTensor, TensorType, row_bytes


class Checkpoint(Protocol):
    """Where weights come from. Names are those of `ModelConfig.tensors`."""

    def names(self) -> Iterable[str]: ...

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """(rows, columns) or (columns,) without touching the data. UnsupportedModelError for an unread type."""
        ...

    def tensor(self, name: str) -> RawTensor:
        """The stored bytes, as a view where the source allows. CheckpointError if there is no such tensor."""
        ...

    def release(self, name: str) -> None:
        """This tensor has been packed: its pages may leave memory."""
        ...

    def close(self) -> None: ...


def check_tensors(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the checkpoint has exactly the tensors the configuration needs, in their shapes.

    A tensor too many is an error as well: a bias or norm left out would change every answer without a word.
    """
    expected = config.tensors()
    wrong = [f"{name} is missing" for name in expected if name not in checkpoint]
    for name in checkpoint.names():
        if name in expected:
            shape = checkpoint.shape(name)
            # A GGUF file may have a matrix of one row as a vector.
            if shape != expected[name].shape and (1, *shape) != expected[name].shape:
                wrong.append(f"{name} has shape {list(shape)} instead of {list(expected[name].shape)}")
        elif not config.may_ignore(name):
            wrong.append(f"{name} has no place in a {config.family} model of {config.num_layers} layers")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"the weights do not fit the configuration: {'; '.join(wrong[:5])}{more}")


class TensorHeader(Protocol):
    """What a folder says of a tensor without touching its data; see `SafetensorInfo`."""

    @property
    def matrix_shape(self) -> tuple[int, ...]: ...

    def readable_type(self) -> TensorType: ...


class TensorFolder(Protocol):
    """An open folder of tensors; see `SafetensorsFolder`."""

    def names(self) -> Iterable[str]: ...

    def info(self, name: str) -> TensorHeader: ...

    def tensor(self, name: str) -> RawTensor: ...

    def release(self, name: str) -> None: ...

    def close(self) -> None: ...


class SafetensorsCheckpoint:
    """A Hugging Face folder of safetensors. Takes over the folder and closes it."""

    def __init__(self, folder: TensorFolder, tensors: Mapping[str, TensorSpec]) -> None:
        self._tensors = tensors
        self._folder = folder
        stacks = {name: spec.hf_stacks for name, spec in tensors.items()}
        self._places = Places({name: name for name in tensors}, stacks, self._folder.names())

    def names(self) -> Iterable[str]:
        return self._places.files.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._places.files

    def shape(self, name: str) -> tuple[int, ...]:
        info = self._folder.info(self._places.files.get(name, name))
        info.readable_type()
        place = self._places.stacked.get(name)
        return info.matrix_shape if place is None else place.shape(info.matrix_shape, len(self._tensors[name].shape))

    def tensor(self, name: str) -> RawTensor:
        place = self._places.stacked.get(name)
        if place is not None:
            return place.cut(self._folder.tensor(place.name), name, len(self._tensors[name].shape))
        return as_declared(self._folder.tensor(name), self._tensors.get(name))

    def release(self, name: str) -> None:
        file_name = self._places.released(name)
        if file_name is not None:
            self._folder.release(file_name)

    def close(self) -> None:
        self._folder.close()


def as_declared(raw: RawTensor, spec: TensorSpec | None) -> RawTensor:
    """A tensor of a folder, as the model takes it."""
    if spec is None:
        return raw
    if spec.hf_is_log:
        return _floats(raw, -np.exp(dequantize(raw)))
    return _scaled(_in_halves(raw, spec.hf_paired_heads, spec), spec.hf_offset, spec.factor)


def _scaled(raw: RawTensor, offset: float, factor: float) -> RawTensor:
    if not offset and factor == 1.0:
        return raw
    return _floats(raw, (dequantize(raw) + np.float32(offset)) * np.float32(factor))


def _floats(raw: RawTensor, values: NDArray[np.float32]) -> RawTensor:
    """The same tensor with other values."""
    return RawTensor(raw.name, TensorType.F32, raw.shape, values.reshape(raw.num_rows, -1).view(np.uint8))


def _in_halves(raw: RawTensor, num_heads: int, spec: TensorSpec) -> RawTensor:
    """Of heads of which all rows, or so many first or last ones, are in pairs. 0 heads: as it is."""
    if not num_heads:
        return raw
    order = _halves_from_pairs(raw.shape[0], num_heads, spec.paired_rows, are_first=spec.pairs_begin)
    if len(raw.shape) == 2:
        return raw.take_rows(order)
    item_bytes = row_bytes(raw.type, 1)
    return dataclasses.replace(raw, data=raw.data.reshape(-1, item_bytes)[order].reshape(1, -1))


def gguf_names(tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
    """The name of every tensor in a GGUF file, to the name that the model has for it. Stacks are left out."""
    return {spec.gguf: name for name, spec in tensors.items()}


def gguf_places(tensors: Mapping[str, TensorSpec], in_file: Iterable[str]) -> Places:
    """Of the tensors of a GGUF file."""
    stacks = {name: spec.gguf_stacks for name, spec in tensors.items()}
    return Places({name: spec.gguf for name, spec in tensors.items()}, stacks, in_file)


class GGUFCheckpoint:
    """An open GGUF model. Takes over the file and closes it. A tensor that has no name in the model keeps its own."""

    def __init__(self, file: GGUFFile | GGUFParts, config: ModelConfig) -> None:
        self._file = file
        self._tensors = config.tensors()
        self._places = gguf_places(self._tensors, file.tensors)

    def names(self) -> Iterable[str]:
        return self._places.files.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._places.files

    def shape(self, name: str) -> tuple[int, ...]:
        shape, place = self._file.tensors[self._gguf_name(name)].shape, self._places.stacked.get(name)
        if place is not None:
            return place.shape(shape, len(self._tensors[name].shape))
        return (math.prod(shape),) if self._is_vector(name, shape) else shape

    def _is_vector(self, name: str, shape: tuple[int, ...]) -> bool:
        """Some converters write vectors as a matrix of one row or of one column."""
        spec = self._tensors.get(name)
        return spec is not None and len(spec.shape) == 1 and len(shape) == 2 and 1 in shape

    def tensor(self, name: str) -> RawTensor:
        raw = dataclasses.replace(self._file.tensor(self._gguf_name(name)), name=name)
        spec, place = self._tensors.get(name), self._places.stacked.get(name)
        if spec is not None and place is not None:
            return place.cut(raw, name, len(spec.shape))
        if self._is_vector(name, raw.shape):
            raw = dataclasses.replace(raw, shape=(math.prod(raw.shape),), data=raw.data.reshape(1, -1))
        return raw if spec is None else _scaled(_in_halves(raw, spec.gguf_paired_heads, spec), 0.0, spec.factor)

    def release(self, name: str) -> None:
        self._gguf_name(name)
        file_name = self._places.released(name)
        if file_name is not None:
            self._file.release(file_name)

    def close(self) -> None:
        self._file.close()

    def _gguf_name(self, name: str) -> str:
        if name not in self._places.files:
            raise CheckpointError(f"{self._file.path.name} has no tensor for {name}")
        return self._places.files[name]


def _halves_from_pairs(num_rows: int, num_heads: int, num_paired: int, *, are_first: bool = False) -> NDArray[np.int64]:
    """Where row t * d / 2 + i of the d paired rows of each head is found: at 2i + t. int64 (num_rows,)."""
    length = num_rows // num_heads
    each = num_paired or length
    if num_rows % num_heads or each % 2 or each > length:
        raise CheckpointError(f"{num_rows} query or key rows are not {num_heads} heads of even length")
    order: NDArray[np.int64] = np.arange(num_rows, dtype=np.int64).reshape(num_heads, -1)
    begin = 0 if are_first else length - each
    paired = order[:, begin : begin + each].reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(num_heads, -1)
    return np.concatenate([order[:, :begin], paired, order[:, begin + each :]], axis=1).reshape(-1)


_STORED_AS = {"float32": TensorType.F32, "float16": TensorType.F16, "bfloat16": TensorType.BF16}
_DUMMY_VALUES_AT_A_TIME = 1 << 22


class DummyCheckpoint:
    """Random weights of the right shapes in the configuration's dtype, made when asked for.

    A tensor is a function of its name and the seed. Linear weights and the embedding are uniform with standard
    deviation 1 / sqrt(columns), biases 0.02 wide, norms within 0.1 of one: activations stay near one in every layer.
    What files have the logarithm of is within 0.1 of minus one: a decay, without which a recurrence would grow.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self._shapes = {name: spec.shape for name, spec in config.tensors().items()}
        self._decays = {name for name, spec in config.tensors().items() if spec.hf_is_log}
        self._type = _STORED_AS[config.dtype]
        self._seed = seed

    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise CheckpointError(f"the configuration has no tensor {name}")
        return self._shapes[name]

    def tensor(self, name: str) -> RawTensor:
        shape = self.shape(name)
        rows, columns = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
        centre, half_width = 0.0, (3.0 / columns) ** 0.5
        if len(shape) == 1:
            centre, half_width = (0.0, 0.02) if name.endswith(".bias") else (1.0, 0.1)
            centre = -centre if name in self._decays else centre
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        random = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        data = np.empty((rows, row_bytes(self._type, columns)), np.uint8)
        step = max(1, _DUMMY_VALUES_AT_A_TIME // columns)
        for start in range(0, rows, step):
            values = random.random((min(step, rows - start), columns), np.float32)
            values *= 2 * half_width
            values += centre - half_width
            data[start : start + step] = _stored(values, self._type)
        return RawTensor(name, self._type, shape, data)

    def release(self, name: str) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is open."""


class ShapesCheckpoint:
    """The tensors of a configuration by type and shape: their bytes are all one zero, which takes no memory."""

    def __init__(self, config: ModelConfig, types: Mapping[str, TensorType]) -> None:
        """types: by name; the others have the configuration's dtype."""
        self._shapes = {name: spec.shape for name, spec in config.tensors().items()}
        self._types = types
        self._type = _STORED_AS[config.dtype]

    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def tensor(self, name: str) -> RawTensor:
        shape = self._shapes[name]
        kind = self._types.get(name, self._type)
        rows, columns = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
        data = np.broadcast_to(np.zeros(1, np.uint8), (rows, row_bytes(kind, columns)))
        scales = np.broadcast_to(np.zeros(1, np.float32), (rows,)) if kind == TensorType.I8 else None
        return RawTensor(name, kind, shape, data, scales)

    def release(self, name: str) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is open."""


def _stored(values: NDArray[np.float32], kind: TensorType) -> NDArray[np.uint8]:
    """float32 (rows, columns) rounded to `kind`, as bytes (rows, row_bytes)."""
    if kind == TensorType.F32:
        return values.view(np.uint8)
    if kind == TensorType.F16:
        return values.astype(np.float16).view(np.uint8)
    bits = values.view(np.uint32)
    to_even = ((bits >> 16) & 1) + 0x7FFF
    return ((bits + to_even) >> 16).astype(np.uint16).view(np.uint8)
