"""Which part of each weight a rank holds under tensor parallelism, and how that part is read.

Owns the table, the rule which numbers of ranks fit a model, and the cutting, of stored bytes where blocks allow it.
Never talks to another rank: a part says of itself what it is (`RawTensor.part`), and the backend knows what to do.

Source: Shoeybi et al., Megatron-LM, arXiv 1909.08053: what makes the heads and the wide layer is cut along its outputs,
what reads them along its inputs, so that a layer needs two sums over the ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from mooli.backends.dequant import dequantize
from mooli.errors import ConfigError
from mooli.models.checkpoint import Checkpoint
from mooli.models.config import ModelConfig
from mooli.tensor import BLOCK, RawTensor, TensorPart, TensorType, row_bytes

ROWS, COLUMNS = 0, 1

SPLITS: dict[str, tuple[int, str]] = {
    "model.embed_tokens": (ROWS, "vocabulary"),
    "lm_head": (ROWS, "vocabulary"),
    "self_attn.q_proj": (ROWS, "heads"),
    "self_attn.k_proj": (ROWS, "kv_heads"),
    "self_attn.v_proj": (ROWS, "kv_heads"),
    "self_attn.o_proj": (COLUMNS, "heads"),
    "mlp.gate_proj": (ROWS, "width"),
    "mlp.up_proj": (ROWS, "width"),
    "mlp.down_proj": (COLUMNS, "width"),
}
"""End of a module's name to the axis its weight is cut along, and what is counted there. Norms are in no table: every
rank has them whole. A bias goes with the rows; where columns are cut, only the first rank has it, so that the sum over
the ranks has it once."""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Rank `rank` of `size` that compute one model together."""

    rank: int
    size: int


def fits(config: ModelConfig, size: int) -> bool:
    """Whether `size` ranks can share the model: each has as many heads, and whole ones."""
    shares_kv = config.num_kv_heads % size == 0 or size % config.num_kv_heads == 0
    return config.num_heads % size == 0 and config.intermediate_size % size == 0 and shares_kv


def check_size(config: ModelConfig, size: int) -> None:
    """Raise ConfigError, naming the numbers that are possible, if `size` ranks cannot share the model."""
    if fits(config, size):
        return
    possible = [str(n) for n in range(1, config.num_heads + 1) if fits(config, n)]
    raise ConfigError(
        f"tp_size={size} does not fit this model: it must divide its {config.num_heads} attention heads and the"
        f" {config.intermediate_size} columns of its wide layers, and divide its {config.num_kv_heads} key and value"
        f" heads or be a multiple of them. Possible: tp_size={', '.join(possible)}"
    )


def part_config(config: ModelConfig, place: Place) -> ModelConfig:
    """The configuration of what one rank computes: its heads and its width, everything else as it is."""
    if place.size == 1:
        return config
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // place.size,
        num_kv_heads=max(1, config.num_kv_heads // place.size),
        intermediate_size=config.intermediate_size // place.size,
    )


def part_checkpoint(config: ModelConfig, checkpoint: Checkpoint, place: Place) -> Checkpoint:
    """What one rank reads of the checkpoint of a model of this (whole) configuration. Closing it closes the other."""
    return checkpoint if place.size == 1 else PartCheckpoint(config, checkpoint, place)


class PartCheckpoint:
    """A checkpoint of which every tensor is cut to one rank's part."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, place: Place) -> None:
        """Raises ConfigError for a number of ranks that does not fit the model."""
        check_size(config, place.size)
        self._config = config
        self._checkpoint = checkpoint
        self._place = place

    def names(self) -> Iterable[str]:
        return self._checkpoint.names()

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._checkpoint.shape(name)
        split = split_of(name)
        if split is None or (len(shape) == 1 and split[0] == COLUMNS):
            return shape
        axis, counted = split
        begin, end = self._bounds(counted)
        return (end - begin, *shape[1:]) if axis == ROWS else (shape[0], end - begin)

    def tensor(self, name: str) -> RawTensor:
        raw, split, place = self._checkpoint.tensor(name), split_of(name), self._place
        if split is None:
            return raw
        axis, counted = split
        if len(raw.shape) == 1 and axis == COLUMNS:
            return raw if place.rank == 0 else zeros(raw)
        cut = cut_tensor(raw, axis, *self._bounds(counted))
        return dataclasses.replace(cut, part=TensorPart(axis, place.rank, place.size, raw.shape[axis]))

    def release(self, name: str) -> None:
        self._checkpoint.release(name)

    def close(self) -> None:
        self._checkpoint.close()

    def _bounds(self, counted: str) -> tuple[int, int]:
        """The rows or columns of this rank. Those of a vocabulary may end beyond it, so that all parts are equal."""
        config, rank, size = self._config, self._place.rank, self._place.size
        if counted == "kv_heads":
            if config.num_kv_heads < size:  # several ranks have query heads of the same one, and a copy of it each
                first = rank * config.num_kv_heads // size
                return first * config.head_dim, (first + 1) * config.head_dim
            each = config.num_kv_heads // size * config.head_dim
        elif counted == "heads":
            each = config.num_heads // size * config.head_dim
        elif counted == "width":
            each = config.intermediate_size // size
        else:
            each = -(-config.vocab_size // size)
        return rank * each, (rank + 1) * each


def split_of(name: str) -> tuple[int, str] | None:
    """How a tensor of this name is cut: an entry of SPLITS; None for one that every rank has whole."""
    module = name.rpartition(".")[0]
    return SPLITS.get(module) or SPLITS.get(".".join(module.split(".")[-2:]))


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
