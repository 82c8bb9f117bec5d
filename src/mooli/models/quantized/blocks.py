"""Codes with scales, and perhaps zeros, as tensors of stored types that backends know.

Owns the choice of type for integers: it is the smallest that keeps the codes. Never reads a file.

    value = scale * (code - zero), one scale and one zero for each group of columns of a row

What is exact, where scales are numbers of float16 (of bfloat16: all from 6.1e-5 to 65504):
Q4_0 for a zero of 8; Q8_0 always. Q4_1 has scale * zero rounded to float16, which is at most 0.4 % of a step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mooli.errors import CheckpointError
from mooli.tensor import BLOCK, RawTensor, TensorType

GROUP = 32
"""Columns that share a scale in the stored types."""

_MIDDLE = 8
_LARGEST_HALF = 65504.0
_VALUES_AT_A_TIME = 1 << 24


def type_of_codes(bits: int, columns: int, groups: int, is_symmetric: bool) -> TensorType:
    """What `from_codes` makes of codes of 2, 4 or 8 bits whose zeros are all in the middle, or are not."""
    if columns % GROUP or (columns // groups) % GROUP:
        return TensorType.BF16
    if bits == 8:
        if not is_symmetric:
            return TensorType.BF16
        return TensorType.I8 if groups == 1 else TensorType.Q8_0
    return TensorType.Q4_0 if is_symmetric or bits == 2 else TensorType.Q4_1


def from_codes(
    name: str,
    bits: int,
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zeros: NDArray[np.int16],
    *,
    is_symmetric: bool,
) -> RawTensor:
    """codes: uint8 (rows, columns). scales: float32, zeros: int16, both (rows, groups), groups of equal length.

    is_symmetric: what the checkpoint says of its zeros. CheckpointError if it is not so, or for scales that are
    infinite in float16.
    """
    rows, columns = codes.shape
    groups = scales.shape[1]
    kind = type_of_codes(bits, columns, groups, is_symmetric)
    middle = 1 << (bits - 1)
    if is_symmetric and (zeros != middle).any():
        raise CheckpointError(f"{name} is said to be symmetric, and has zeros that are not {middle}")
    if kind == TensorType.BF16:
        return _dequantized(name, codes, scales, zeros)
    if kind == TensorType.I8:
        return RawTensor(name, kind, (rows, columns), codes ^ np.uint8(128), np.ascontiguousarray(scales[:, 0]))
    if np.abs(scales).max(initial=0.0) > _LARGEST_HALF:
        raise CheckpointError(f"{name} has a scale beyond {_LARGEST_HALF:.0f}: it is damaged")
    if kind == TensorType.Q8_0:
        return _blocks(name, kind, codes ^ np.uint8(128), scales)
    if bits == 2:  # with the zero in the code
        moved = np.repeat(zeros - _MIDDLE, columns // groups, axis=1)
        return _blocks(name, TensorType.Q4_0, _nibbles((codes - moved).astype(np.uint8)), scales)
    return _blocks(name, kind, _nibbles(codes), scales, None if kind == TensorType.Q4_0 else -scales * zeros)


def bfloat16(name: str, shape: tuple[int, int], data: NDArray[np.uint16]) -> RawTensor:
    """A tensor of bits of bfloat16 numbers."""
    return RawTensor(name, TensorType.BF16, shape, data.reshape(shape).view(np.uint8))


def rounded_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded


def _nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes (rows, columns) to bytes (rows, columns / 2): of every 32 the first 16 are low, the others high."""
    halves = codes.reshape(len(codes), -1, 2, GROUP // 2)
    packed: NDArray[np.uint8] = halves[:, :, 0] | halves[:, :, 1] << np.uint8(4)
    return packed.reshape(len(codes), -1)


def _blocks(
    name: str,
    kind: TensorType,
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    minima: NDArray[np.float32] | None = None,
) -> RawTensor:
    """codes: uint8 (rows, bytes), those of each block behind each other."""
    rows, block_bytes = len(codes), BLOCK[kind][1]
    header = 2 if minima is None else 4
    blocks = np.empty((rows, codes.shape[1] // (block_bytes - header), block_bytes), np.uint8)
    repeats = blocks.shape[1] // scales.shape[1]
    for at, numbers in enumerate((scales,) if minima is None else (scales, minima)):
        halves = np.repeat(numbers.astype("<f2"), repeats, axis=1)
        blocks[:, :, 2 * at : 2 * at + 2] = halves.view(np.uint8).reshape(rows, -1, 2)
    blocks[:, :, header:] = codes.reshape(rows, blocks.shape[1], -1)
    columns = blocks.shape[1] * BLOCK[kind][0]
    return RawTensor(name, kind, (rows, columns), blocks.reshape(rows, -1))


def _dequantized(
    name: str, codes: NDArray[np.uint8], scales: NDArray[np.float32], zeros: NDArray[np.int16]
) -> RawTensor:
    rows, columns = codes.shape
    group = columns // scales.shape[1]
    data = np.empty((rows, columns), np.uint16)
    step = max(1, _VALUES_AT_A_TIME // columns)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        steps = codes[part].astype(np.float32) - np.repeat(zeros[part], group, axis=1)
        data[part] = rounded_to_bfloat16(steps * np.repeat(scales[part], group, axis=1))
    return bfloat16(name, (rows, columns), data)
