"""Stored tensors to float32 with NumPy: the meaning of every storage type.

Owns the block formulas. Never decides what a weight is packed to. Formulas: block quantisation of the ggml project, in
float32 and in its order of operations, so that results are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mooli.tensor import BLOCK, RawTensor, TensorType

_VALUES_AT_A_TIME = 1 << 22
"""Temporaries are several times a chunk; chunks keep them far below the result."""


def dequantize(raw: RawTensor) -> NDArray[np.float32]:
    """float32 (rows, columns), or (columns,) for a vector."""
    result = np.empty((raw.num_rows, raw.num_columns), np.float32)
    step = max(1, _VALUES_AT_A_TIME // raw.num_columns)
    for start in range(0, raw.num_rows, step):
        rows = raw.data[start : start + step]
        if raw.scales is not None:
            np.multiply(rows.view(np.int8), raw.scales[start : start + step, None], out=result[start : start + step])
            continue
        result[start : start + step] = _rows_to_float(raw.type, rows, raw.num_columns)
    return result.reshape(raw.shape)


def with_scales_in_groups(raw: RawTensor) -> RawTensor:
    """An I8 matrix, whose columns are whole groups of 32, as Q8_0: the same codes, a row's scale with each group.

    What changes is that the scale becomes a float16: by up to 2^-11 of itself, more below 6e-5.
    """
    if raw.scales is None:
        raise ValueError(f"tensor {raw.name} has no scales")
    per_group, group_bytes = BLOCK[TensorType.Q8_0]
    blocks = np.empty((raw.num_rows, raw.num_columns // per_group, group_bytes), np.uint8)
    with np.errstate(over="ignore"):
        blocks[:, :, :2] = raw.scales.astype("<f2").view(np.uint8).reshape(-1, 1, 2)
    blocks[:, :, 2:] = raw.data.reshape(raw.num_rows, -1, per_group)
    return RawTensor(raw.name, TensorType.Q8_0, raw.shape, blocks.reshape(raw.num_rows, -1))


def _rows_to_float(kind: TensorType, rows: NDArray[np.uint8], num_columns: int) -> NDArray[np.float32]:
    data = np.ascontiguousarray(rows)
    if kind == TensorType.F32:
        return data.view("<f4")
    if kind == TensorType.F16:
        return data.view("<f2").astype(np.float32)
    if kind == TensorType.BF16:
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = data.reshape(-1, BLOCK[kind][1])
    return _FORMULAS[kind](blocks).reshape(len(rows), num_columns)


def _half(blocks: NDArray[np.uint8], start: int) -> NDArray[np.float32]:
    """The float16 at byte `start` of every block: float32 (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(quants: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(..., n) bytes to (..., 2n): all low nibbles, then all high ones."""
    return np.concatenate([quants & 15, quants >> 4], axis=-1)


def _q4_0(b: NDArray[np.uint8]) -> NDArray[np.float32]:
    return _half(b, 0) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: NDArray[np.uint8]) -> NDArray[np.float32]:
    return _half(b, 0) * _nibbles(b[:, 4:]).astype(np.float32) + _half(b, 2)


def _fifth_bits(bits: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """32 bits in 4 bytes, lowest first, to (blocks, 32) values 0 or 16."""
    values: NDArray[np.uint8] = np.unpackbits(np.ascontiguousarray(bits), axis=-1, bitorder="little") * np.uint8(16)
    return values


def _q5_0(b: NDArray[np.uint8]) -> NDArray[np.float32]:
    return _half(b, 0) * ((_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])).astype(np.float32) - 16)


def _q5_1(b: NDArray[np.uint8]) -> NDArray[np.float32]:
    return _half(b, 0) * (_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])).astype(np.float32) + _half(b, 2)


def _q8_0(b: NDArray[np.uint8]) -> NDArray[np.float32]:
    return _half(b, 0) * np.ascontiguousarray(b[:, 2:]).view(np.int8).astype(np.float32)


def _k_scales(s: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """12 bytes to eight 6-bit scales and eight 6-bit minima, float32 (blocks, 8) each."""
    low, mid, high = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=1)
    minima = np.concatenate([mid & 63, (high >> 4) | (mid >> 6) << 4], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _k_values(b: NDArray[np.uint8], quants: NDArray[np.uint8]) -> NDArray[np.float32]:
    """d * scale * q - dmin * minimum over eight groups of 32; quants (blocks, 8, 32)."""
    scales, minima = _k_scales(b[:, 4:16])
    factors, offsets = _half(b, 0) * scales, _half(b, 2) * minima
    return factors[:, :, None] * quants.astype(np.float32) - offsets[:, :, None]


def _q4_k(b: NDArray[np.uint8]) -> NDArray[np.float32]:
    return _k_values(b, _nibbles(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(b: NDArray[np.uint8]) -> NDArray[np.float32]:
    low = _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None] & np.uint8(1)
    return _k_values(b, low | high * np.uint8(16))


def _q6_k(b: NDArray[np.uint8]) -> NDArray[np.float32]:
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    high = b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    quants = (low | high << 4).reshape(-1, 16, 16).astype(np.float32) - 32
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    return (_half(b, 208) * scales)[:, :, None] * quants


def _quarters(quants: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(blocks, 64) bytes to (blocks, 16, 16) codes of two bits."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    codes: NDArray[np.uint8] = (quants.reshape(-1, 2, 1, 32) >> shifts & np.uint8(3)).reshape(-1, 16, 16)
    return codes


def _q2_k(b: NDArray[np.uint8]) -> NDArray[np.float32]:
    factors = _half(b, 80) * (b[:, :16] & 15).astype(np.float32)
    offsets = _half(b, 82) * (b[:, :16] >> 4).astype(np.float32)
    return factors[:, :, None] * _quarters(b[:, 16:80]).astype(np.float32) - offsets[:, :, None]


def _q3_k(b: NDArray[np.uint8]) -> NDArray[np.float32]:
    low = _nibbles(b[:, 96:104])
    high = (b[:, None, 104:108] >> np.array([0, 2, 4, 6], np.uint8)[None, :, None]).reshape(-1, 16) & 3
    factors = _half(b, 108) * ((low | high << 4).astype(np.float32) - 32)
    third = b[:, None, :32] >> np.arange(8, dtype=np.uint8)[None, :, None] & 1
    codes = _quarters(b[:, 32:96]).astype(np.float32) - (4 - 4 * third.reshape(-1, 16, 16).astype(np.float32))
    return factors[:, :, None] * codes


IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
FP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
"""What codes of four bits choose among: those of IQ4 formats, and twice those of FP4 (E2M1)."""


def _iq4_nl(b: NDArray[np.uint8]) -> NDArray[np.float32]:
    return _half(b, 0) * IQ4_VALUES[_nibbles(b[:, 2:])]


def _iq4_xs(b: NDArray[np.uint8]) -> NDArray[np.float32]:
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    factors = _half(b, 0) * ((low | high << 4).astype(np.float32) - 32)
    values: NDArray[np.float32] = factors[:, :, None] * IQ4_VALUES[_nibbles(b[:, 8:].reshape(-1, 8, 16))]
    return values


def _mxfp4(b: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The scale is half of 2^(code - 127), as the values are doubled; subnormal for the two lowest codes."""
    exponent = b[:, :1].astype(np.uint32)
    bits = np.where(exponent < 2, np.uint32(0x00200000) << exponent, (np.maximum(exponent, 1) - 1) << 23)
    values: NDArray[np.float32] = bits.astype(np.uint32).view(np.float32) * FP4_VALUES[_nibbles(b[:, 1:])]
    return values


_FORMULAS: dict[TensorType, Callable[[NDArray[np.uint8]], NDArray[np.float32]]] = {
    TensorType.Q4_0: _q4_0,
    TensorType.Q4_1: _q4_1,
    TensorType.Q5_0: _q5_0,
    TensorType.Q5_1: _q5_1,
    TensorType.Q8_0: _q8_0,
    TensorType.Q2_K: _q2_k,
    TensorType.Q3_K: _q3_k,
    TensorType.Q4_K: _q4_k,
    TensorType.Q5_K: _q5_k,
    TensorType.Q6_K: _q6_k,
    TensorType.IQ4_NL: _iq4_nl,
    TensorType.IQ4_XS: _iq4_xs,
    TensorType.MXFP4: _mxfp4,
}
