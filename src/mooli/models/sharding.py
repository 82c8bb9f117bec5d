"""The part of each weight that a rank holds under tensor parallelism, and how it is read.

Owns the rule which numbers of ranks fit a model, and the cutting, of stored bytes where blocks allow it; what is cut
along what, families declare (`mooli.models.config.Split`). Never talks to another rank: a part says of itself what it
is (`RawTensor.part`), and the backend knows what to do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from mooli.backends.base import StateLayer
from mooli.backends.dequant import dequantize
from mooli.errors import ConfigError
from mooli.models.checkpoint import Checkpoint
from mooli.models.config import COLUMNS, ROWS, ModelConfig, Split
from mooli.tensor import BLOCK, RawTensor, TensorPart, TensorType, row_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Rank `rank` of `size` that compute one model together."""

    rank: int
    size: int


def check_size(config: ModelConfig, size: int) -> None:
    """Raise ConfigError, naming the numbers that are possible, if `size` ranks cannot share the model: each has as many
    of everything, and whole ones."""
    if size == 1:
        return
    if any(isinstance(layer, StateLayer) for layer in config.cache_layers()):
        raise ConfigError(
            f"tp_size={size} does not fit this model: layers of {config.family} keep a recurrent state, which no rank"
            " has a part of yet; use tp_size=1"
        )
    splits = list(dict.fromkeys(spec.split for spec in config.tensors().values() if spec.split is not None))
    if all(_fits(split, size) for split in splits):
        return
    equal = {split.what: split.units for split in splits if split.rule == "even"}
    shared = {split.what: split.units for split in splits if split.rule == "shared"}
    words = ["divide its " + " and its ".join(f"{units} {what}" for what, units in equal.items())]
    words += [f"divide its {units} {what} or be a multiple of them" for what, units in shared.items()]
    most = min((*equal.values(), config.vocab_size))
    possible = [str(n) for n in range(1, most + 1) if all(_fits(split, n) for split in splits)]
    raise ConfigError(
        f"tp_size={size} does not fit this model: it must {', and '.join(words)}."
        f" Possible: tp_size={', '.join(possible)}"
    )


def _fits(split: Split, size: int) -> bool:
    shares = split.rule == "shared" and size % split.units == 0
    return split.rule == "padded" or split.units % size == 0 or shares


def part_checkpoint(config: ModelConfig, checkpoint: Checkpoint, place: Place) -> Checkpoint:
    """What one rank reads of the checkpoint of a model of this (whole) configuration. Closing it closes the other."""
    return checkpoint if place.size == 1 else PartCheckpoint(config, checkpoint, place)


class PartCheckpoint:
    """A checkpoint of which every tensor is cut to one rank's part."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, place: Place) -> None:
        """Raises ConfigError for a number of ranks that does not fit the model."""
        check_size(config, place.size)
        self._tensors = config.tensors()
        self._checkpoint = checkpoint
        self._place = place

    def names(self) -> Iterable[str]:
        return self._checkpoint.names()

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint

    def shape(self, name: str) -> tuple[int, ...]:
        shape, split = self._checkpoint.shape(name), self._split(name)
        if split is None or (len(shape) == 1 and split.axis == COLUMNS):
            return shape
        begin, end = _bounds(split, shape[split.axis], self._place)
        return (end - begin, *shape[1:]) if split.axis == ROWS else (shape[0], end - begin)

    def tensor(self, name: str) -> RawTensor:
        raw, split, place = self._checkpoint.tensor(name), self._split(name), self._place
        if split is None:
            return raw
        if len(raw.shape) == 1 and split.axis == COLUMNS:
            return raw if place.rank == 0 else zeros(raw)
        whole = raw.shape[split.axis]
        cut = cut_tensor(raw, split.axis, *_bounds(split, whole, place))
        return dataclasses.replace(cut, part=TensorPart(split.axis, place.rank, place.size, whole))

    def release(self, name: str) -> None:
        self._checkpoint.release(name)

    def close(self) -> None:
        self._checkpoint.close()

    def _split(self, name: str) -> Split | None:
        return self._tensors[name].split if name in self._tensors else None


def _bounds(split: Split, whole: int, place: Place) -> tuple[int, int]:
    """The rows or columns of a rank, of `whole`. Those of a padded split may end beyond, so that all are equal."""
    unit, rank, size = whole // split.units, place.rank, place.size
    if split.rule == "shared" and split.units < size:  # several ranks have what reads the same one, and a copy each
        first = rank * split.units // size
        return first * unit, (first + 1) * unit
    each = -(-split.units // size) * unit
    return rank * each, (rank + 1) * each


def cut_tensor(raw: RawTensor, axis: int, begin: int, end: int) -> RawTensor:
    """Rows or columns `begin` .. `end` of a matrix, or values of a vector; zeros beyond its end.

    A view where that is possible. Quantised columns that do not begin and end at blocks become float32.
    """
    if len(raw.shape) == 1:
        cut = _cut_columns(raw, begin, min(end, raw.num_columns))
        return cut if end <= raw.num_columns else _padded_vector(cut, end - begin)
    if axis == COLUMNS:
        return _cut_columns(raw, begin, end)
    rows = slice(min(begin, raw.num_rows), min(end, raw.num_rows))
    data, scales = raw.data[rows], None if raw.scales is None else raw.scales[rows]
    missing = end - begin - len(data)
    if missing:
        data = np.concatenate([data, np.zeros((missing, data.shape[1]), np.uint8)])
        scales = None if scales is None else np.concatenate([scales, np.zeros(missing, np.float32)])
    return dataclasses.replace(raw, shape=(end - begin, raw.num_columns), data=data, scales=scales)


def _cut_columns(raw: RawTensor, begin: int, end: int) -> RawTensor:
    per_block = BLOCK[raw.type][0]
    first, last = begin // per_block, -(-end // per_block)
    covering = slice(row_bytes(raw.type, first * per_block), row_bytes(raw.type, last * per_block))
    shape = (end - begin,) if len(raw.shape) == 1 else (raw.num_rows, end - begin)
    if begin % per_block == 0 and end % per_block == 0:
        return dataclasses.replace(raw, shape=shape, data=raw.data[:, covering])
    blocks = RawTensor(
        raw.name, raw.type, (raw.num_rows, (last - first) * per_block), np.ascontiguousarray(raw.data[:, covering])
    )
    values: NDArray[np.float32] = dequantize(blocks)
    kept = np.ascontiguousarray(values[:, begin - first * per_block : end - first * per_block])
    return RawTensor(raw.name, TensorType.F32, shape, kept.view(np.uint8))


def _padded_vector(raw: RawTensor, length: int) -> RawTensor:
    data = np.zeros((1, row_bytes(raw.type, length)), np.uint8)
    data[:, : raw.data.shape[1]] = raw.data
    return dataclasses.replace(raw, shape=(length,), data=data)


def zeros(raw: RawTensor) -> RawTensor:
    """A vector of as many zeros."""
    return RawTensor(raw.name, TensorType.F32, raw.shape, np.zeros((1, 4 * raw.num_columns), np.uint8))
