"""A tensor as it lies in a checkpoint file: a type, a shape and bytes.

Owns the names and block layouts of storage types, so that loaders and backends speak of the same thing. Never converts
values: NumPy dequantisation is `mooli.backends.dequant`, native packing is in the CPU backend.
Block layouts follow the GGUF specification (ggml block quantisation).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class TensorType(IntEnum):
    """Storage types, numbered as in GGUF. I8 is int8 codes beside which `RawTensor.scales` has a number for every row:
    GGUF files cannot say that, and those with it are refused."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 20
    IQ4_XS = 23
    I8 = 24
    BF16 = 30
    MXFP4 = 39


BLOCK: dict[TensorType, tuple[int, int]] = {
    TensorType.F32: (1, 4),
    TensorType.F16: (1, 2),
    TensorType.BF16: (1, 2),
    TensorType.I8: (1, 1),
    TensorType.Q4_0: (32, 18),
    TensorType.Q4_1: (32, 20),
    TensorType.Q5_0: (32, 22),
    TensorType.Q5_1: (32, 24),
    TensorType.Q8_0: (32, 34),
    TensorType.IQ4_NL: (32, 18),
    TensorType.MXFP4: (32, 17),
    TensorType.Q2_K: (256, 84),
    TensorType.Q3_K: (256, 110),
    TensorType.Q4_K: (256, 144),
    TensorType.Q5_K: (256, 176),
    TensorType.Q6_K: (256, 210),
    TensorType.IQ4_XS: (256, 136),
}
"""(values per block, bytes per block)."""


GGUF_TYPES = tuple(kind for kind in TensorType if kind != TensorType.I8)
"""Types whose bytes say everything: those of GGUF files."""


def row_bytes(tensor_type: TensorType, num_columns: int) -> int:
    """Bytes of one row of `num_columns` values, a multiple of the block's length."""
    per_block, block_bytes = BLOCK[tensor_type]
    return num_columns // per_block * block_bytes


@dataclass(frozen=True, slots=True)
class TensorPart:
    """A tensor is part `index` of `count` equal ones, cut along `axis` (0 rows, 1 columns) of a matrix that has `whole`
    rows or columns. The last parts may be padded with zeros beyond that."""

    axis: int
    index: int
    count: int
    whole: int


@dataclass(frozen=True, slots=True)
class RawTensor:
    """`shape` (rows, columns) or (columns,); `data` uint8 (rows, row_bytes), rows = 1 for a vector.

    `data` may be a view of a memory-mapped file: read-only, and only valid while its checkpoint is open.
    scales: float32 (rows,) of a matrix of type I8, whose values are code * scale; None for every other type.
    part: set where this is not a whole matrix of the model but what one rank holds of it.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    scales: NDArray[np.float32] | None = None
    part: TensorPart | None = None

    @property
    def num_rows(self) -> int:
        return 1 if len(self.shape) == 1 else self.shape[0]

    @property
    def num_columns(self) -> int:
        return self.shape[-1]

    def take_rows(self, rows: NDArray[np.int64]) -> RawTensor:
        """A copy with the given rows in the given order (used to undo a file format's permutation of heads)."""
        scales = None if self.scales is None else self.scales[rows]
        return RawTensor(self.name, self.type, (len(rows), self.num_columns), self.data[rows], scales)
