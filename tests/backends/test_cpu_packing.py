"""Packed weights hold what the file holds: to the bit where the format allows it, else within half a step."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from cpu_ops import (
    BLOCK,
    HALF_OFFSETS,
    Floats,
    allocate,
    assert_same_bits,
    cpu_backend,
    native,
    random,
    random_tensor,
    stored,
    to_bfloat16,
)
from numpy.typing import NDArray

from mooli.backends.cpu.packing import Kind
from mooli.backends.dequant import FP4_VALUES, IQ4_VALUES, dequantize
from mooli.tensor import GGUF_TYPES, RawTensor, TensorType
from steps import Row, step

COLUMNS = 512
ROWS = 45
FLOATS = (TensorType.F32, TensorType.F16, TensorType.BF16)
INTEGERS_KEPT = {
    (TensorType.Q8_0, Kind.Q8),
    (TensorType.Q5_0, Kind.Q8),
    (TensorType.Q4_0, Kind.Q8),
    (TensorType.Q4_0, Kind.Q4),
    (TensorType.Q4_1, Kind.Q4M),
    (TensorType.Q3_K, Kind.Q8),
    (TensorType.IQ4_NL, Kind.Q8),
    (TensorType.MXFP4, Kind.Q8),
    (TensorType.IQ4_NL, Kind.IQ4),
    (TensorType.MXFP4, Kind.FP4),
}
NOT_ALL_KEPT = {TensorType.Q3_K, TensorType.MXFP4}
"""Signs of zeros may change, or scales may be out of float16's range: an embedding stays as it is in the file."""
CODE_VALUES = {Kind.IQ4: IQ4_VALUES, Kind.FP4: FP4_VALUES}
HALF_ROUNDING = 2.0**-11
SMALLEST_HALF = 2.0**-24

every_type = pytest.mark.parametrize("storage", GGUF_TYPES, ids=lambda storage: storage.name)
every_kind = pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name)
every_integer_kind = pytest.mark.parametrize(
    "kind", [kind for kind in Kind if kind < Kind.BF16], ids=lambda kind: kind.name
)


@pytest.fixture(scope="module")
def device() -> Any:
    return native.Device(2, [], "")


@every_type
@pytest.mark.parametrize("quantization", [None, "int8", "int4"], ids=str)
def test_a_tied_embedding_is_that_of_the_file_and_kept_once_where_the_head_holds_its_values(
    storage: TensorType, quantization: str | None
) -> None:
    table = random_tensor(storage, ROWS, COLUMNS)
    ids = [44, 0, 31, 32, 44, 7]
    with cpu_backend(dtype="auto", quantization=quantization) as backend:
        embedding, head = backend.load_tied(table)
        alone = backend.load_embedding(table)
        allocate(backend)
        batch = step([Row(ids, 0, [0])], 32)
        rows = []
        for each in (embedding, alone):
            embed = backend.capture(lambda planned, each=each: backend.ops.embed(planned, each))
            rows.append(np.array(backend.to_host(embed(backend.plan(batch)))))
        assert_same_bits(rows[0], rows[1])
        kind = Kind(head.native.kind)
        is_kept = ((storage, kind) in INTEGERS_KEPT and storage not in NOT_ALL_KEPT) or storage.name == kind.name
        assert (embedding.native.num_bytes == 0) == is_kept
        assert backend.weight_bytes() == head.native.num_bytes + (1 if is_kept else 2) * alone.native.num_bytes


def unpacked(linear: Any, part: int = 0) -> Floats:
    out = np.empty((linear.n, linear.k), np.float32)
    linear.unpack(part, out)
    return out


def packed(device: Any, kind: Kind, *tensors: RawTensor) -> Floats:
    """The values of tensors stacked in a packed weight, as the kernels see them."""
    linear = native.Linear(native.Slabs(), int(kind), sum(t.num_rows for t in tensors), tensors[0].num_columns)
    row = 0
    for tensor in tensors:
        device.wait_packed(device.pack(linear, 0, row, int(tensor.type), tensor.data))
        row += tensor.num_rows
    return unpacked(linear)


def groups(values: NDArray[Any]) -> NDArray[np.float64]:
    """Runs of 32 columns, which share a scale."""
    return values.astype(np.float64).reshape(len(values), -1, 32)


@every_type
@every_kind
def test_packing_keeps_the_values_of_every_storage_type(device: Any, storage: TensorType, kind: Kind) -> None:
    tensor = random_tensor(storage, ROWS, COLUMNS)
    actual, exact = packed(device, kind, tensor), dequantize(tensor)
    if kind == Kind.F32 or (storage, kind) in INTEGERS_KEPT:
        np.testing.assert_array_equal(actual, exact)
    elif kind == Kind.F16:
        assert_same_bits(actual, exact.astype(np.float16).astype(np.float32))
    elif kind == Kind.BF16:
        assert_same_bits(actual, (to_bfloat16(exact).astype(np.uint32) << 16).view(np.float32))
    else:
        assert_within_a_step(groups(actual), groups(exact), kind, tensor)


def assert_within_a_step(
    actual: NDArray[np.float64], exact: NDArray[np.float64], kind: Kind, tensor: RawTensor
) -> None:
    error = np.abs(actual - exact)
    if kind == Kind.Q8:
        step = np.abs(exact).max(-1, keepdims=True) / 127
        assert (error <= step * (0.5 + 128 * HALF_ROUNDING) + 128 * SMALLEST_HALF).all()
    elif tensor.type == TensorType.IQ4_XS and kind == Kind.IQ4:
        # the same codes; scales, products of two numbers, are rounded to float16
        assert (error <= np.abs(exact) * HALF_ROUNDING + 127 * SMALLEST_HALF).all()
    elif kind in CODE_VALUES:
        values = CODE_VALUES[kind].astype(np.float64)
        extreme = np.take_along_axis(exact, np.abs(exact).argmax(-1)[..., None], -1)
        scale = (extreme / values[np.abs(values).argmax()]).astype(np.float32).astype(np.float16).astype(np.float64)
        nearest = np.abs(exact[..., None] - scale[..., None] * values).min(-1)
        assert (error <= nearest + 1e-6 * np.abs(extreme)).all()
    elif kind == Kind.Q6:
        halves = exact.reshape(*exact.shape[:-1], 2, 16)
        step = np.repeat(np.abs(halves).max(-1) / 31, 16, -1)
        if tensor.type == TensorType.Q6_K:
            # the same codes; scales, products of two numbers, are rounded to float16
            assert (error <= np.abs(exact) * HALF_ROUNDING + 32 * SMALLEST_HALF).all()
        else:
            assert (error <= step * (0.5 + 32 * HALF_ROUNDING) + 32 * SMALLEST_HALF).all()
    elif kind == Kind.Q4M and tensor.type == TensorType.Q4_K:
        # the same codes; scale and minimum, products of two numbers, are rounded to float16
        assert (error <= q4_k_rounding(tensor)).all()
    elif kind == Kind.Q4M:
        low, high = exact.min(-1, keepdims=True), exact.max(-1, keepdims=True)
        step = (high - low) / 15
        assert (error <= step * (0.5 + 16 * HALF_ROUNDING) + np.abs(low) * HALF_ROUNDING + 16 * SMALLEST_HALF).all()
    else:
        # four bits without a minimum: no worse, by errors weighted with |x|, than the extreme value at code -8
        extreme = np.take_along_axis(exact, np.abs(exact).argmax(-1)[..., None], -1)
        step = (extreme / -8).astype(np.float16).astype(np.float64)
        plain = np.clip(np.rint(exact / np.where(step == 0, 1, step)), -8, 7) * step
        weight = np.abs(exact)
        assert ((weight * error**2).sum(-1) <= (weight * (plain - exact) ** 2).sum(-1) * 1.001).all()


def q4_k_rounding(tensor: RawTensor) -> NDArray[np.float64]:
    """How far a value may be off when scale and minimum of its group are rounded: (rows, groups, 1)."""
    blocks = tensor.data.reshape(-1, 144)
    scales, minima = (x.reshape(-1, 8).astype(np.float64) for x in gguf.quants.Q4_K.get_scale_min(blocks[:, 4:16]))
    halves = np.abs(np.ascontiguousarray(blocks[:, :4]).view(np.float16).astype(np.float64))
    scales, minima = scales * halves[:, :1], minima * halves[:, 1:]
    bound = 15 * (scales * HALF_ROUNDING + SMALLEST_HALF) + minima * HALF_ROUNDING + SMALLEST_HALF
    return bound.reshape(tensor.num_rows, -1, 1) * 1.001


@every_type
def test_tensors_are_stacked_at_any_row(device: Any, storage: TensorType) -> None:
    tensors = [random_tensor(storage, rows, 256, seed=rows) for rows in (1, 37, 5, 64, 3)]
    expected = np.concatenate([dequantize(tensor) for tensor in tensors])
    np.testing.assert_array_equal(packed(device, Kind.F32, *tensors), expected)


@every_integer_kind
def test_a_stacked_row_is_packed_as_it_is_alone(device: Any, kind: Kind) -> None:
    tensors = [random_tensor(TensorType.F32, rows, 96, seed=rows) for rows in (7, 1, 33)]
    alone = np.concatenate([packed(device, kind, tensor) for tensor in tensors])
    assert_same_bits(packed(device, kind, *tensors), alone)


@every_kind
@pytest.mark.parametrize("columns", [1, 31, 33, 100])
@pytest.mark.parametrize("storage", FLOATS, ids=lambda storage: storage.name)
def test_columns_past_the_last_group_are_zero(device: Any, kind: Kind, columns: int, storage: TensorType) -> None:
    tensor = random_tensor(storage, 35, columns)
    padded = np.zeros((35, -(-columns // 32) * 32), np.float32)
    padded[:, :columns] = dequantize(tensor)
    expected = packed(device, kind, stored(padded))[:, :columns]
    assert_same_bits(packed(device, kind, tensor), expected)


@every_kind
def test_rows_that_nothing_was_packed_to_are_zero(device: Any, kind: Kind) -> None:
    tensor = random_tensor(TensorType.F32, 3, 64)
    linear = native.Linear(native.Slabs(), int(kind), 40, 64)
    device.wait_packed(device.pack(linear, 0, 20, int(tensor.type), tensor.data))
    values = unpacked(linear)
    np.testing.assert_array_equal(values[20:23], packed(device, kind, tensor))
    if kind in (Kind.BF16, Kind.F16, Kind.F32, Kind.Q4M):
        assert not values[:20].any() and not values[23:].any()
    else:
        np.testing.assert_array_equal(np.abs(np.delete(values, [20, 21, 22], 0)), 0)


@every_kind
@pytest.mark.parametrize("rows", [1, 16, 50])
def test_gate_and_up_rows_lie_interleaved_and_apart(device: Any, kind: Kind, rows: int) -> None:
    gate, up = (random_tensor(TensorType.F32, rows, 96, seed=seed) for seed in (1, 2))
    linear = native.Linear(native.Slabs(), int(kind), rows, 96, True)
    device.wait_packed(device.pack(linear, 1, 0, int(up.type), up.data))
    device.wait_packed(device.pack(linear, 0, 0, int(gate.type), gate.data))
    assert_same_bits(unpacked(linear, 0), packed(device, kind, gate))
    assert_same_bits(unpacked(linear, 1), packed(device, kind, up))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38], ids=str)
@every_integer_kind
def test_what_no_code_can_hold_makes_its_group_nan_and_no_other(device: Any, kind: Kind, bad: float) -> None:
    values = random(3, 40, 96)
    clean = packed(device, kind, stored(values))
    values[7, 40] = bad
    actual = packed(device, kind, stored(values))
    group = slice(32, 48 if kind == Kind.Q6 else 64)  # what shares a scale
    assert np.isnan(actual[7, group]).all()
    actual[7, group] = clean[7, group]
    assert_same_bits(actual, clean)


@pytest.mark.parametrize("tiny", [1e-30, 1e-42, 0.0], ids=str)
@every_integer_kind
def test_groups_too_small_for_a_scale_are_zero(device: Any, kind: Kind, tiny: float) -> None:
    np.testing.assert_array_equal(packed(device, kind, stored(np.full((2, 32), tiny, np.float32))), 0)


def decoded(tensor: RawTensor) -> Floats:
    out = np.full(tensor.shape, 7, np.float32)
    native.decode_rows(int(tensor.type), tensor.data, tensor.num_columns, out)
    return out


def assert_same_bits_but_nan(actual: Floats, expected: Floats) -> None:
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    assert_same_bits(np.where(nan, np.float32(0), actual), np.where(nan, np.float32(0), expected))


@every_type
def test_native_decoding_equals_numpy_to_the_bit(storage: TensorType) -> None:
    tensor = random_tensor(storage, 9, 1024)
    assert_same_bits(decoded(tensor), dequantize(tensor))


@every_type
def test_native_decoding_equals_numpy_on_random_bytes(storage: TensorType) -> None:
    """Scales of any bits: subnormal, infinite and NaN ones too."""
    block, block_bytes = BLOCK[storage]
    data = np.random.default_rng(5).integers(0, 256, (64, 1024 // block * block_bytes), dtype=np.uint8)
    blocks = data.reshape(-1, block_bytes)
    for offset in HALF_OFFSETS.get(storage, ()):
        blocks[::7, offset : offset + 2] = [1, 128]  # a negative subnormal
        blocks[3::7, offset : offset + 2] = [0, 252]  # minus infinity
    tensor = RawTensor("t", storage, (64, 1024), data)
    with np.errstate(all="ignore"):
        assert_same_bits_but_nan(decoded(tensor), dequantize(tensor))


def test_rows_may_be_a_view_with_gaps_or_in_reverse() -> None:
    tensor = random_tensor(TensorType.Q4_0, 12, 64)
    view = RawTensor("t", tensor.type, (4, 64), tensor.data[::-3])
    assert_same_bits(decoded(view), dequantize(tensor)[::-3])


def test_every_float16_decodes_as_numpy_has_it() -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    tensor = RawTensor("t", TensorType.F16, (256, 256), halves.view(np.uint8).reshape(256, -1))
    with np.errstate(all="ignore"):
        assert_same_bits_but_nan(decoded(tensor), halves.astype(np.float32).reshape(256, 256))


def corner_cases() -> Floats:
    """Random bits, neighbours of float16 numbers and of the ties between, zeros, infinities, NaN: (n, 32)"""
    halves = np.arange(0, 31 * 1024, 7, dtype=np.uint16).view(np.float16).astype(np.float32)
    bits = halves.view(np.uint32)
    near = np.concatenate([bits + offset for offset in (0, 1, 0xFFF, 0x1000, 0x1001)])
    fixed = np.array([0, 65504, 65519.996, 65520, 1e38, np.inf, np.nan, 2**-24, 2**-25, 2**-26, 1e-45], np.float32)
    anything = np.random.default_rng(8).integers(0, 2**32, 40000, dtype=np.uint32)
    every = np.concatenate([near, fixed.view(np.uint32), (fixed * -1).view(np.uint32), anything]).view(np.float32)
    return every[: len(every) // 32 * 32].reshape(-1, 32)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16], ids=lambda kind: kind.name)
def test_float32_is_rounded_to_sixteen_bits_as_torch_does(device: Any, kind: Kind) -> None:
    values = corner_cases()
    dtype = torch.float16 if kind == Kind.F16 else torch.bfloat16
    expected = torch.from_numpy(values).to(dtype).to(torch.float32).numpy()
    assert_same_bits_but_nan(packed(device, kind, stored(values)), expected)


@pytest.mark.parametrize(
    ("part", "first_row", "rows", "columns"),
    [(0, 38, 3, 64), (0, -1, 3, 64), (1, 0, 3, 64), (-1, 0, 3, 64), (0, 2**31 - 1, 3, 64), (0, 0, 3, 32)],
    ids=str,
)
def test_rows_that_do_not_fit_the_weight_are_refused(
    device: Any, part: int, first_row: int, rows: int, columns: int
) -> None:
    tensor = random_tensor(TensorType.F32, rows, columns)
    linear = native.Linear(native.Slabs(), int(Kind.Q8), 40, 64)
    with pytest.raises(ValueError, match=r"outside the linear weight|does not fit"):
        device.wait_packed(device.pack(linear, part, first_row, int(tensor.type), tensor.data))
    assert not np.abs(unpacked(linear)).any()


def test_a_storage_format_that_is_not_known_is_refused(device: Any) -> None:
    with pytest.raises(ValueError, match="unknown storage format"):
        native.decode_rows(5, np.zeros((1, 64), np.uint8), 32, np.zeros((1, 32), np.float32))
    with pytest.raises(ValueError, match="does not fit"):
        native.decode_rows(2, np.zeros((1, 17), np.uint8), 32, np.zeros((1, 32), np.float32))
