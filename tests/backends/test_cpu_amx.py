"""The AMX level: what its tiles compute, bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cpu_ops import BLOCK, LEVELS, Floats, Inputs, assert_same_bits, cpu_backend, random, random_tensor, to_bfloat16

from mooli.backends.dequant import dequantize
from mooli.tensor import RawTensor, TensorType

if "amx" not in LEVELS:
    pytest.skip("this processor has no AMX", allow_module_level=True)

K = 608  # two chunks and a part of one
INTEGERS = [TensorType.Q8_0, TensorType.Q4_0, TensorType.Q4_1, TensorType.IQ4_NL, TensorType.MXFP4, TensorType.Q6_K]


def rounded(values: Floats) -> Floats:
    """To bfloat16 and back."""
    return (to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)


def product(x: Floats, weight: Floats) -> Floats:
    """x @ weight.T as TDPBF16PS adds it up: of every 32 of K the even ones and the odd ones, each from 0, then both.

    The product of two bfloat16 numbers is exact in float32, so that float32 sums are those of fused multiply-adds.
    """
    terms = rounded(x)[:, None, :] * weight[None, :, :]
    sums = np.zeros(terms.shape[:2], np.float32)
    for begin in range(0, terms.shape[2], 32):
        even, odd = np.zeros_like(sums), np.zeros_like(sums)
        for k in range(begin, min(begin + 32, terms.shape[2]), 2):
            even += terms[:, :, k]
            odd += terms[:, :, k + 1]
        sums += even + odd
    return sums


def through_linear(level: str, tensor: RawTensor, x: Floats, rows: range) -> Floats:
    with cpu_backend(level, dtype="auto") as backend:
        weight = backend.load_linear([tensor])
        captured = backend.capture(lambda batch, hidden: backend.ops.linear(batch, hidden, weight))
        return Inputs(backend, x).through(captured, rows)


@pytest.mark.parametrize("count", [1, 16, 17, 40])
def test_a_linear_of_bfloat16_is_the_sum_of_its_products(count: int) -> None:
    tensor = random_tensor(TensorType.BF16, 48, K, seed=1)
    x = random(2, count, K, scale=3)
    actual = through_linear("amx", tensor, x, range(count))
    assert_same_bits(actual, product(x, np.asarray(dequantize(tensor), np.float32)))


@pytest.mark.parametrize("storage", INTEGERS, ids=str)
def test_integers_are_multiplied_as_without_tiles(storage: TensorType) -> None:
    columns = -(-K // BLOCK[storage][0]) * BLOCK[storage][0]
    tensor = random_tensor(storage, 80, columns, seed=1)
    x = random(2, 70, columns, scale=3)
    x[:, 32:64] *= 1e-30
    x[3, 100] = np.inf
    x[20, 200] = np.nan
    expected = through_linear("avx512", tensor, x, range(70))
    assert np.isnan(expected[[3, 20]]).all() and np.isfinite(np.delete(expected, [3, 20], 0)).all()
    for count in (1, 6, 7, 15, 16, 17, 31, 32, 33, 70):
        assert_same_bits_but_nan(through_linear("amx", tensor, x, range(count)), expected[:count])


def assert_same_bits_but_nan(actual: Floats, expected: Floats) -> None:
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    assert_same_bits(np.nan_to_num(actual), np.nan_to_num(expected))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("count", [1, 40])
def test_what_is_not_finite_stays_visible_and_in_its_row(count: int, value: Any) -> None:
    x = random(5, count, K)
    x[count // 2, 300] = value
    actual = through_linear("amx", random_tensor(TensorType.Q8_0, 48, K, seed=6), x, range(count))
    finite = np.isfinite(actual).all(axis=1)
    assert finite.sum() == count - 1 and not finite[count // 2]
