"""What a format of quantised weights is: which tensors of a folder make one, and what they become.

Owns the form that every format has, and the reading of its parts with their shapes checked. Knows no format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mooli.errors import CheckpointError
from mooli.formats.safetensors import SafetensorInfo
from mooli.tensor import RawTensor, TensorType


class Tensors(Protocol):
    """A folder of safetensors, as formats read it."""

    def names(self) -> Iterable[str]: ...

    def info(self, name: str) -> SafetensorInfo: ...

    def array(self, name: str) -> NDArray[Any]: ...

    def codes(self, name: str) -> NDArray[np.uint8]: ...


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight as it lies in a folder. name: what a folder that is not quantised would call it. parts: names of the
    tensors that make it, by what each is. shape: (rows, columns). type: what it is given out as. is_stack: it is
    several matrices one behind the other, each of which is asked for by itself."""

    name: str
    parts: Mapping[str, str]
    shape: tuple[int, int]
    type: TensorType
    is_stack: bool = False


class WeightFormat(ABC):
    """One format, with what config.json says of it."""

    label: str
    """How people call it, for messages."""

    unused: tuple[str, ...] = ()
    """Ends of names of tensors that are there for other engines: scales of activations and of caches."""

    @abstractmethod
    def find(self, tensors: Tensors) -> Iterable[QuantizedWeight]:
        """All quantised weights of a folder, from its headers. Raises CheckpointError where parts are missing or do not
        fit each other, UnsupportedModelError for what is not read."""

    @abstractmethod
    def read(self, tensors: Tensors, weight: QuantizedWeight) -> RawTensor:
        """Its values in the type that `find` named. Raises as `find`, for what only the data shows."""

    @abstractmethod
    def expected(self, module: str, columns: int) -> TensorType | None:
        """What the weight of a linear layer becomes, from config.json alone; None for one that is not quantised."""


def part(label: str, stored: frozenset[str], module: str, suffix: str) -> str:
    """The name of a part that has to be there."""
    name = f"{module}.{suffix}"
    if name not in stored:
        raise CheckpointError(f"{label}: {name} is missing beside the rest of {module}; download the model again")
    return name


def checked(tensors: Tensors, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The numbers of a tensor. CheckpointError unless it has this shape."""
    found = tensors.info(name).shape
    if found != shape:
        raise CheckpointError(f"{name} has shape {list(found)} instead of {list(shape)}")
    return tensors.array(name)


def scales_of(tensors: Tensors, name: str) -> NDArray[np.float32]:
    """float32, in the tensor's shape. CheckpointError for numbers that cannot be scales."""
    values = np.asarray(tensors.array(name), np.float32)
    if not np.isfinite(values).all():
        raise CheckpointError(f"{name} has numbers that are no scales: infinite or NaN")
    return values


def per_row(values: NDArray[Any]) -> NDArray[Any]:
    """(groups, rows) to (rows, groups), contiguous."""
    return np.ascontiguousarray(values.T)


def unpacked(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """int32 (n, m) to codes uint8 (n, m * 32 / bits): of each word the lowest bits first."""
    data = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 8:
        return data
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes: NDArray[np.uint8] = data[:, :, None] >> shifts & np.uint8((1 << bits) - 1)
    return codes.reshape(len(data), -1)
