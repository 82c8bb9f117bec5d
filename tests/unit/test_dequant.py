"""Every storage type dequantises to what the gguf package computes."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as published

from mooli.backends.dequant import dequantize
from mooli.tensor import BLOCK, GGUF_TYPES, RawTensor, TensorType, row_bytes

HALF_OFFSETS = {
    TensorType.F16: range(0, 2, 2),
    TensorType.Q4_0: [0],
    TensorType.Q4_1: [0, 2],
    TensorType.Q5_0: [0],
    TensorType.Q5_1: [0, 2],
    TensorType.Q8_0: [0],
    TensorType.Q4_K: [0, 2],
    TensorType.Q5_K: [0, 2],
    TensorType.Q6_K: [208],
    TensorType.Q2_K: [80, 82],
    TensorType.Q3_K: [108],
    TensorType.IQ4_NL: [0],
    TensorType.IQ4_XS: [0],
    TensorType.MXFP4: [],
}
"""Where a block keeps its float16 numbers."""


def random_tensor(kind: TensorType, rows: int, columns: int, seed: int = 0) -> RawTensor:
    """Random bytes, with finite scales."""
    rng = np.random.default_rng(seed)
    if kind in (TensorType.F32, TensorType.BF16):
        values = rng.standard_normal((rows, columns)).astype(np.float32)
        words = values if kind == TensorType.F32 else (values.view(np.uint32) >> 16).astype(np.uint16)
        return RawTensor("t", kind, (rows, columns), words.view(np.uint8).reshape(rows, -1))
    blocks = rng.integers(0, 256, (rows * columns // BLOCK[kind][0], BLOCK[kind][1]), dtype=np.uint8)
    for offset in HALF_OFFSETS[kind]:
        scales = (rng.standard_normal(len(blocks)) * 0.01).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    if kind == TensorType.MXFP4:
        blocks[:, 0] = rng.integers(112, 126, len(blocks))  # an exponent, and 127 more
    return RawTensor("t", kind, (rows, columns), blocks.reshape(rows, row_bytes(kind, columns)))


@pytest.mark.parametrize("kind", GGUF_TYPES, ids=lambda kind: kind.name)
def test_random_blocks_equal_the_published_formula_to_the_bit(kind: TensorType) -> None:
    raw = random_tensor(kind, 7, 1024)
    expected = published(raw.data, GGMLQuantizationType[kind.name])
    actual = dequantize(raw)
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, expected.reshape(7, 1024))


def test_a_vector_keeps_its_one_dimension() -> None:
    values = np.arange(5, dtype=np.float32)
    raw = RawTensor("v", TensorType.F32, (5,), values.view(np.uint8).reshape(1, -1))
    np.testing.assert_array_equal(dequantize(raw), values)


def test_the_result_does_not_share_memory_with_the_checkpoint() -> None:
    raw = random_tensor(TensorType.F32, 2, 8)
    assert not np.shares_memory(dequantize(raw), raw.data)


def test_rows_beyond_one_chunk_are_all_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_tensor(TensorType.Q4_K, 9, 512)
    whole = dequantize(raw)
    monkeypatch.setattr("mooli.backends.dequant._VALUES_AT_A_TIME", 1024)
    np.testing.assert_array_equal(dequantize(raw), whole)


def test_rows_taken_out_of_order_dequantise_alike() -> None:
    raw = random_tensor(TensorType.Q5_0, 6, 64)
    order = np.array([4, 0, 5, 1, 2, 3])
    np.testing.assert_array_equal(dequantize(raw.take_rows(order)), dequantize(raw)[order])
