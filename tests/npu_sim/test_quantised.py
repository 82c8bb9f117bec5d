"""int8 operations and memory formats against their formulas, and every argument they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paged import close
from refusals import refused

import mooli_simulate_ascend as sim

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape).to(torch.int8).npu()


def made(wrong: dict[str, Any]) -> dict[str, Any]:
    return {name: value() if callable(value) else value for name, value in wrong.items()}


def zeros(*shape: int, dtype: torch.dtype = FLOAT32) -> Any:
    return lambda: torch.zeros(shape, dtype=dtype).npu()


@pytest.mark.parametrize("shape", [(1, 16), (5, 64), (2, 3, 32)])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_dynamic_quant_rounds_each_token_by_its_largest(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    rounded, scales = torch.ops.npu.npu_dynamic_quant(x.npu())
    assert rounded.dtype == torch.int8
    assert torch.allclose(scales.cpu(), x.float().abs().amax(-1) / 127)
    assert torch.allclose(rounded.cpu() * scales.cpu()[..., None], x.float(), atol=float(scales.max()) / 2 + 1e-6)


def test_a_row_of_zeros_stays_zero() -> None:
    rounded, _ = torch.ops.npu.npu_dynamic_quant(torch.zeros(2, 16, dtype=BFLOAT16).npu())
    assert not rounded.cpu().any()


def test_smooth_scales_come_before_rounding() -> None:
    x, smooth = torch.randn(3, 16).to(BFLOAT16), torch.rand(16).to(BFLOAT16)
    _, scales = torch.ops.npu.npu_dynamic_quant(x.npu(), smooth_scales=smooth.npu())
    assert torch.allclose(scales.cpu(), (x.float() * smooth.float()).abs().amax(-1) / 127)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": zeros(2, 16)}, "float16 or bfloat16"),
        ({"x": zeros(16, dtype=BFLOAT16)}, "1 dimension"),
        ({"x": zeros(0, 16, dtype=BFLOAT16)}, "empty"),
        ({"x": lambda: torch.zeros(16, 2, dtype=BFLOAT16).npu().T}, "not contiguous"),
        ({"smooth_scales": zeros(16)}, "smooth_scales are torch.float32"),
        ({"smooth_scales": zeros(8, dtype=BFLOAT16)}, r"\(8,\)"),
        ({"dst_type": torch.quint4x2}, "not simulated"),
        ({"group_index": zeros(1, dtype=torch.int32)}, "not simulated"),
    ],
)
def test_a_wrong_rounding_is_refused(wrong: dict[str, Any], message: str) -> None:
    def call(x: Any, **others: Any) -> None:
        torch.ops.npu.npu_dynamic_quant(x, **others)

    refused(call, {"x": torch.ones(2, 16, dtype=BFLOAT16).npu()}, made(wrong), message)


# ---------------------------------------------------------------------- products


def product(x1: torch.Tensor, x2: torch.Tensor, scale: torch.Tensor, **others: Any) -> torch.Tensor:
    return torch.ops.npu.npu_quant_matmul(x1, x2, scale, **others)


def product_call(rows: int = 5, depth: int = 64, columns: int = 32, **others: Any) -> dict[str, Any]:
    return {
        "x1": int8(rows, depth),
        "x2": int8(depth, columns),
        "scale": torch.rand(columns).npu(),
        "pertoken_scale": torch.rand(rows).npu(),
        "output_dtype": BFLOAT16,
        **others,
    }


def exact(call: dict[str, Any]) -> torch.Tensor:
    sums = call["x1"].cpu().double() @ call["x2"].cpu().double()
    return (sums * call["scale"].cpu().double() * call["pertoken_scale"].cpu().double()[:, None]).float()


@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 16, 32), (5, 64, 96), (130, 256, 32)])
@pytest.mark.parametrize(("scale_type", "out_type"), [(FLOAT32, BFLOAT16), (BFLOAT16, BFLOAT16), (FLOAT32, FLOAT16)])
def test_quant_matmul(rows: int, depth: int, columns: int, scale_type: torch.dtype, out_type: torch.dtype) -> None:
    call = product_call(
        rows, depth, columns, scale=(torch.rand(columns) / 1000).to(scale_type).npu(), output_dtype=out_type
    )
    out = product(**call)
    assert out.dtype == out_type
    assert close(out, exact(call))


def test_the_weight_may_be_a_transposed_view_or_blocked() -> None:
    call = product_call(x2=int8(32, 64).T)
    assert close(product(**call), exact(call))
    blocked = torch.ops.npu.npu_format_cast(call["x2"].contiguous(), 29)
    assert torch.ops.npu.get_npu_format(blocked) == 29
    assert close(product(**{**call, "x2": blocked}), exact(call))


def test_a_bias_is_added() -> None:
    call = product_call()
    whole = torch.randint(-1000, 1000, (32,)).to(torch.int32)
    sums = call["x1"].cpu().double() @ call["x2"].cpu().double() + whole
    wanted = sums * call["scale"].cpu() * call["pertoken_scale"].cpu()[:, None]
    assert close(product(**call, bias=whole.npu()), wanted.float())
    half = torch.randn(32).to(BFLOAT16)
    assert close(product(**call, bias=half.npu()), exact(call) + half.float())


def test_packed_scales_give_float16_and_int8_without_a_scale_by_token() -> None:
    call = product_call()
    scale = torch.rand(32) / 100
    packed = torch.ops.npu.npu_trans_quant_param(scale.npu())
    assert packed.dtype == torch.int64
    wanted = (call["x1"].cpu().double() @ call["x2"].cpu().double() * scale).float()
    assert close(product(call["x1"], call["x2"], packed, output_dtype=FLOAT16), wanted)
    rounded = product(call["x1"], call["x2"], packed)
    assert torch.equal(rounded.cpu(), wanted.round().clamp(-128, 127).to(torch.int8))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": zeros(32, dtype=FLOAT16)}, "161002"),
        ({"scale": zeros(31)}, r"\(1,\) or \(32,\)"),
        ({"scale": zeros(1, 32)}, r"\(1,\) or \(32,\)"),
        ({"scale": zeros(32, dtype=torch.int32)}, "the scale is torch.int32"),
        ({"scale": zeros(32, dtype=torch.int64)}, "does not give"),
        ({"scale": zeros(32, dtype=BFLOAT16), "output_dtype": FLOAT16}, "does not give torch.float16"),
        ({"output_dtype": None}, "None means int8"),
        ({"output_dtype": FLOAT32}, "does not give torch.float32"),
        ({"pertoken_scale": None, "output_dtype": FLOAT16}, "without pertoken_scale"),
        ({"pertoken_scale": zeros(5, dtype=BFLOAT16)}, "not float32"),
        ({"pertoken_scale": zeros(5, 1)}, r"not \(5,\)"),
        ({"x1": zeros(5, 64, dtype=BFLOAT16)}, "int8 both"),
        ({"x1": lambda: int8(5, 32)}, r"\(m, k\) and \(k, n\)"),
        ({"x1": lambda: int8(5, 1, 64)}, "2 both"),
        ({"x1": lambda: int8(64, 5).T}, "x1 .* not contiguous"),
        ({"x2": lambda: int8(64, 64)[:, ::2]}, "x2 .* not contiguous"),
        ({"x1": lambda: int8(1, 65536), "x2": lambda: int8(65536, 32), "pertoken_scale": zeros(1)}, "over 65535"),
        ({"bias": zeros(31)}, "the bias is"),
        ({"bias": zeros(32, dtype=FLOAT16)}, "the bias is torch.float16"),
        ({"offset": zeros(32)}, "for int8 results"),
        ({"group_sizes": [1, 1, 32]}, "group_sizes is not simulated"),
    ],
)
def test_a_wrong_product_is_refused(wrong: dict[str, Any], message: str) -> None:
    refused(product, product_call(), made(wrong), message)


@pytest.mark.parametrize("by_division", [True, False])
def test_static_rounding(by_division: bool) -> None:
    x, scale, zero = torch.randn(3, 16).to(BFLOAT16), torch.rand(16) + 0.01, torch.randint(-9, 9, (16,)).float()
    factor = scale if by_division else 1 / scale
    out = torch.ops.npu.npu_quantize(x.npu(), factor.npu(), zero.npu(), torch.qint8, -1, by_division)
    wanted = (x.float() / factor if by_division else x.float() * factor) + zero
    assert torch.equal(out.cpu(), wanted.round().clamp(-128, 127).to(torch.int8))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scales": zeros(8)}, r"\(8,\)"),
        ({"axis": 2}, "axis 2"),
        ({"axis": 0, "scales": zeros(3)}, "the last one"),
        ({"dtype": torch.quint8}, "not simulated"),
        ({"zero": zeros(1)}, "zero_points are"),
        ({"x": zeros(3, 16, dtype=torch.int32)}, "input is torch.int32"),
    ],
)
def test_a_wrong_static_rounding_is_refused(wrong: dict[str, Any], message: str) -> None:
    def call(x: Any, scales: Any, zero: Any = None, dtype: Any = torch.qint8, axis: int = -1) -> None:
        torch.ops.npu.npu_quantize(x, scales, zero, dtype, axis, False)

    refused(call, {"x": torch.ones(3, 16, dtype=BFLOAT16).npu(), "scales": torch.ones(16).npu()}, made(wrong), message)


@pytest.mark.parametrize("group", [0, 32])
def test_weights_alone_in_int8(group: int) -> None:
    x, weight = torch.randn(3, 64).to(FLOAT16), torch.randint(-128, 128, (64, 16)).to(torch.int8)
    scale = (torch.rand(16) / 100 if group == 0 else torch.rand(2, 16) / 100).to(FLOAT16)
    out = torch.ops.npu.npu_weight_quant_batchmatmul(x.npu(), weight.npu(), scale.npu(), antiquant_group_size=group)
    by_row = scale.float() if group == 0 else scale.float().repeat_interleave(32, dim=0)
    assert close(out, x.float() @ (weight.float() * by_row))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": zeros(16)}, "antiquant_scale is torch.float32"),
        ({"scale": zeros(8, dtype=FLOAT16)}, r"\(8,\)"),
        ({"x": zeros(3, 64)}, "float16 or bfloat16"),
        ({"x": zeros(3, 32, dtype=FLOAT16)}, r"weight \(k, n\)"),
        ({"weight": zeros(64, 2, dtype=torch.int32)}, "not simulated"),
        ({"quant_scale": zeros(16)}, "not simulated"),
        ({"antiquant_group_size": 48}, "antiquant_group_size 48 of 64"),
        ({"bias": zeros(16)}, "the bias is torch.float32"),
        ({"bias": zeros(8, dtype=FLOAT16)}, "the bias is"),
    ],
)
def test_a_wrong_weight_product_is_refused(wrong: dict[str, Any], message: str) -> None:
    def call(x: Any, weight: Any, scale: Any, **others: Any) -> None:
        torch.ops.npu.npu_weight_quant_batchmatmul(x, weight, scale, **others)

    half = {"x": torch.ones(3, 64, dtype=FLOAT16).npu(), "scale": torch.ones(16, dtype=FLOAT16).npu()}
    refused(call, {**half, "weight": int8(64, 16)}, made(wrong), message)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": zeros(4, dtype=FLOAT16)}, "not float32"),
        ({"scale": zeros(1, 2, 2)}, "3 dimensions"),
        ({"offset": zeros(4)}, "offset is not simulated"),
        ({"round_mode": 1}, "round_mode 1 is not simulated"),
    ],
)
def test_wrong_scales_are_not_packed(wrong: dict[str, Any], message: str) -> None:
    refused(torch.ops.npu.npu_trans_quant_param, {"scale": torch.ones(4).npu()}, made(wrong), message)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x1": zeros(3, 32), "x2": zeros(3, 32), "gamma": zeros(32)}, "float16 or bfloat16"),
        ({"smooth_scale1": zeros(32)}, "smooth_scale1 is"),
        ({"smooth_scale2": zeros(32, dtype=BFLOAT16)}, "not simulated"),
        ({"beta": zeros(32, dtype=BFLOAT16)}, "not simulated"),
        ({"output_mask": [True, False]}, "not simulated"),
    ],
)
def test_a_wrong_sum_norm_and_rounding_is_refused(wrong: dict[str, Any], message: str, cann: Any) -> None:
    cann("8.3")
    right = {
        name: torch.ones(shape, dtype=BFLOAT16).npu()
        for name, shape in (("x1", (3, 32)), ("x2", (3, 32)), ("gamma", 32))
    }
    refused(torch.ops.npu.npu_add_rms_norm_dynamic_quant, right, made(wrong), message)


def test_sum_norm_and_rounding_in_one(cann: Any) -> None:
    assert not hasattr(torch.ops.npu, "npu_add_rms_norm_dynamic_quant")
    cann("8.5")
    x1, x2, gamma = (torch.randn(shape).to(BFLOAT16) for shape in ((3, 32), (3, 32), (32,)))
    rounded, _, total, scales, _ = torch.ops.npu.npu_add_rms_norm_dynamic_quant(x1.npu(), x2.npu(), gamma.npu())
    wide = x1.float() + x2.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * gamma.float()
    assert close(total, wide)
    assert torch.allclose(rounded.cpu() * scales.cpu()[:, None], y, atol=float(scales.max()) * 0.51)


# ---------------------------------------------------------------------- formats


def cast(x: torch.Tensor, acl_format: int = 29) -> torch.Tensor:
    return torch.ops.npu.npu_format_cast(x, acl_format)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: int8(16, 16), "multiples of 16 and 32"),
        (lambda: int8(8, 32), "multiples of 16 and 32"),
        (zeros(32, 32), "cannot be FRACTAL_NZ"),
        (lambda: int8(32), "at least 2"),
        (lambda: int8(32, 32).T, "not contiguous"),
    ],
)
def test_a_wrong_cast_is_refused(wrong: Any, message: str) -> None:
    refused(cast, {"x": int8(16, 32)}, {"x": wrong()}, message)


def test_only_blocks_and_rows_are_simulated_formats() -> None:
    refused(cast, {"x": int8(16, 32)}, {"acl_format": 3}, "format 3 is not simulated")


def test_blocks_must_be_allowed() -> None:
    torch.npu.config.allow_internal_format = False
    with pytest.raises(sim.SimulationError, match="allow_internal_format"):
        cast(int8(16, 32))


@pytest.mark.parametrize("view", [lambda x: x[:8], lambda x: x.T, lambda x: x.view(-1), lambda x: x[:, 1:]])
def test_blocks_have_no_views(view: Any) -> None:
    x = int8(16, 32)
    view(x)
    with pytest.raises(sim.SimulationError, match="FRACTAL_NZ"):
        view(cast(x))


def test_a_cast_in_place_and_back() -> None:
    x = int8(16, 32)
    torch.ops.npu.npu_format_cast_.acl_format(x, 29)
    assert torch.ops.npu.get_npu_format(x) == 29
    assert torch.ops.npu.get_npu_format(cast(x, 2)) == 2
