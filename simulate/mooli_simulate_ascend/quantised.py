"""int8: rounding activations by token, products of int8, weights alone in int8."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mooli_simulate_ascend.elementwise import check_sum, normed
from mooli_simulate_ascend.errors import check, check_simulated
from mooli_simulate_ascend.formats import FRACTAL_NZ, format_of
from mooli_simulate_ascend.paging import HALF_TYPES, check_contiguous
from mooli_simulate_ascend.profiles import Profile
from mooli_simulate_ascend.tasks import Task, operation

MAX_WIDTH = 65535


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values of float32 rows, and each row's scale."""
    scales = x.abs().amax(dim=-1) / 127
    return (x / scales.clamp(min=1e-30)[..., None]).round().clamp(-128, 127).to(torch.int8), scales


@operation("npu_dynamic_quant")
def dynamic_quant(
    profile: Profile,
    x: Tensor,
    smooth_scales: Tensor | None,
    group_index: Tensor | None,
    dst_type: torch.dtype | None,
) -> Task:
    name = "npu_dynamic_quant"
    check(x.dtype in HALF_TYPES, name, f"input is {x.dtype}: float16 or bfloat16 only")
    check(x.dim() > 1, name, f"input has {x.dim()} dimension: at least 2")
    check(x.numel() > 0, name, "empty tensors are not taken")
    check_simulated(group_index is None, name, "group_index")
    check_simulated(dst_type in (None, torch.int8), name, f"dst_type {dst_type}")
    if smooth_scales is not None:
        check(tuple(smooth_scales.shape) == (x.shape[-1],), name, f"smooth_scales are {tuple(smooth_scales.shape)}")
        check(smooth_scales.dtype == x.dtype, name, f"smooth_scales are {smooth_scales.dtype}, but input is {x.dtype}")
    check_contiguous(name, input=x, smooth_scales=smooth_scales)

    def run(new: Sequence[Tensor]) -> None:
        wide = x.float() if smooth_scales is None else x.float() * smooth_scales.float()
        for target, values in zip(new, rounded_rows(wide), strict=True):
            target.copy_(values)

    return Task(run=run, new=[(tuple(x.shape), torch.int8), (tuple(x.shape[:-1]), torch.float32)])


@operation("npu_add_rms_norm_dynamic_quant")
def add_rms_norm_dynamic_quant(
    profile: Profile,
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    smooth_scale1: Tensor | None,
    smooth_scale2: Tensor | None,
    beta: Tensor | None,
    epsilon: float,
    output_mask: list[bool],
) -> Task:
    name = "npu_add_rms_norm_dynamic_quant"
    check(x1.dtype in HALF_TYPES, name, f"x1 is {x1.dtype}: float16 or bfloat16 only")
    check_sum(name, x1, x2, gamma)
    for argument, given in (("smooth_scale2", smooth_scale2), ("beta", beta)):
        check_simulated(given is None, name, argument)
    check_simulated(not list(output_mask), name, "output_mask")
    if smooth_scale1 is not None:
        fits = smooth_scale1.shape == gamma.shape and smooth_scale1.dtype == x1.dtype
        check(fits, name, f"smooth_scale1 is {tuple(smooth_scale1.shape)} {smooth_scale1.dtype}")

    def run(new: Sequence[Tensor]) -> None:
        total = x1.float() + x2.float()
        y, _ = normed(total, gamma, epsilon)
        rounded, scales = rounded_rows(y if smooth_scale1 is None else y * smooth_scale1.float())
        new[0].copy_(rounded)
        new[2].copy_(total)
        new[3].copy_(scales)

    rows = tuple(x1.shape[:-1])
    rounded_like = (tuple(x1.shape), torch.int8)
    # The second result is computed only with a second scale.
    return Task(
        run=run,
        new=[
            rounded_like,
            ((1,), torch.int8),
            (tuple(x1.shape), x1.dtype),
            (rows, torch.float32),
            ((1,), torch.float32),
        ],
    )


@operation("npu_quant_matmul")
def quant_matmul(
    profile: Profile,
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    output_dtype: torch.dtype | None,
    group_sizes: Sequence[int] | None,
) -> Task:
    name = "npu_quant_matmul"
    check_simulated(not group_sizes, name, "group_sizes")
    out_type = output_dtype or torch.int8
    check(x1.dtype == torch.int8 and x2.dtype == torch.int8, name, f"x1 is {x1.dtype} and x2 {x2.dtype}: int8 both")
    check(x1.dim() == 2 and x2.dim() == 2, name, f"x1 has {x1.dim()} and x2 {x2.dim()} dimensions: 2 both")
    check(x1.shape[1] == x2.shape[0], name, f"x1 is {tuple(x1.shape)}, x2 {tuple(x2.shape)}: (m, k) and (k, n)")
    for argument, tensor in (("x1", x1), ("x2", x2)):
        check(
            tensor.shape[-1] <= MAX_WIDTH, name, f"{argument}'s last dimension {tensor.shape[-1]} is over {MAX_WIDTH}"
        )
    check_contiguous(name, x1=x1, scale=scale)
    # Rows by columns may come as a transposed view; in blocks there are no views.
    if format_of(x2) == FRACTAL_NZ or not x2.T.is_contiguous():
        check_contiguous(name, x2=x2)
    rows, columns = x1.shape[0], x2.shape[1]
    check(scale.dtype != torch.float16, name, "161002: the scale is float16: float32, bfloat16 or int64")
    check(scale.dtype in (torch.float32, torch.bfloat16, torch.int64), name, f"the scale is {scale.dtype}")
    check(tuple(scale.shape) in ((1,), (columns,)), name, f"the scale is {tuple(scale.shape)}: (1,) or ({columns},)")
    if pertoken_scale is not None:
        check(pertoken_scale.dtype == torch.float32, name, f"pertoken_scale is {pertoken_scale.dtype}, not float32")
        check(
            tuple(pertoken_scale.shape) == (rows,),
            name,
            f"pertoken_scale is {tuple(pertoken_scale.shape)}, not ({rows},)",
        )
    check_quant_types(name, scale, pertoken_scale, out_type)
    if offset is not None:
        fits = out_type == torch.int8 and offset.dtype == torch.float32 and tuple(offset.shape) in ((1,), (columns,))
        check(fits, name, "an offset is for int8 results: float32, of the scale's shape")
    if bias is not None:
        check(tuple(bias.shape) == (columns,), name, f"the bias is {tuple(bias.shape)}, not ({columns},)")
        taken = {
            torch.int8: (torch.int32,),
            torch.bfloat16: (torch.int32, torch.bfloat16, torch.float32),
            torch.float16: (torch.int32, torch.float16, torch.float32)
            if pertoken_scale is not None
            else (torch.int32,),
        }[out_type]
        check(bias.dtype in taken, name, f"the bias is {bias.dtype} for {out_type} results: one of {taken}")

    def run(new: Sequence[Tensor]) -> None:
        # Products of int8 add up exactly in float64, whatever the length of a row.
        total = x1.double() @ x2.double()
        if bias is not None and bias.dtype == torch.int32:
            total = total + bias
        result = total.float() * unpacked_scale(scale)
        if pertoken_scale is not None:
            result = result * pertoken_scale[:, None]
        if bias is not None and bias.dtype != torch.int32:
            result = result + bias.float()
        if out_type == torch.int8:
            result = (result if offset is None else result + offset).round().clamp(-128, 127)
        new[0].copy_(result)

    return Task(run=run, new=[((rows, columns), out_type)], returns_one=True)


def check_quant_types(name: str, scale: Tensor, pertoken_scale: Tensor | None, out_type: torch.dtype) -> None:
    """The pairs of scale and result that there are kernels for."""
    if pertoken_scale is not None:
        taken = {torch.bfloat16: (torch.float32, torch.bfloat16), torch.float16: (torch.float32,)}
    else:
        taken = {
            torch.bfloat16: (torch.float32, torch.bfloat16, torch.int64),
            torch.float16: (torch.int64,),
            torch.int8: (torch.int64,),
        }
    note = "output_dtype None means int8; " if out_type == torch.int8 else ""
    with_scale = "with" if pertoken_scale is not None else "without"
    check(
        scale.dtype in taken.get(out_type, ()),
        name,
        f"{note}a {scale.dtype} scale {with_scale} pertoken_scale does not give {out_type}",
    )


def unpacked_scale(scale: Tensor) -> Tensor:
    """Float32 scales; an int64 holds the bits of one in its lower half, as npu_trans_quant_param packs it."""
    if scale.dtype != torch.int64:
        return scale.float()
    return (scale & 0xFFFFFFFF).to(torch.uint32).view(torch.float32)


@operation("npu_trans_quant_param")
def trans_quant_param(profile: Profile, scale: Tensor, offset: Tensor | None, round_mode: int) -> Task:
    name = "npu_trans_quant_param"
    check(scale.dtype == torch.float32, name, f"the scale is {scale.dtype}, not float32")
    check(scale.dim() in (1, 2), name, f"the scale has {scale.dim()} dimensions")
    check_simulated(offset is None, name, "offset")
    check_simulated(round_mode == 0, name, f"round_mode {round_mode}")
    check_contiguous(name, scale=scale)

    def run(new: Sequence[Tensor]) -> None:
        new[0].copy_(scale.view(torch.int32).long() & 0xFFFFFFFF)

    return Task(run=run, new=[(tuple(scale.shape), torch.int64)], returns_one=True)


@operation("npu_quantize")
def quantize(
    profile: Profile,
    x: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    dtype: torch.dtype,
    axis: int,
    div_mode: bool,
) -> Task:
    """Static rounding: by the scale, or, `div_mode` False, times its reciprocal."""
    name = "npu_quantize"
    check(x.dtype in (*HALF_TYPES, torch.float32), name, f"input is {x.dtype}")
    check_simulated(dtype in (torch.qint8, torch.int8), name, f"dtype {dtype}")
    check(-x.dim() <= axis < x.dim(), name, f"axis {axis} of {x.dim()} dimensions")
    if not div_mode:
        check(axis in (-1, x.dim() - 1), name, f"axis {axis} with div_mode False: the last one")
    count = x.shape[axis]
    check(tuple(scales.shape) in ((1,), (count,)), name, f"scales are {tuple(scales.shape)}: (1,) or ({count},)")
    if zero_points is not None:
        check(zero_points.shape == scales.shape, name, f"zero_points are {tuple(zero_points.shape)}")
    check_contiguous(name, input=x, scales=scales, zero_points=zero_points)

    def run(new: Sequence[Tensor]) -> None:
        shape = [1] * x.dim()
        shape[axis] = -1
        factor = scales.float().reshape(shape)
        scaled = x.float() / factor if div_mode else x.float() * factor
        moved = scaled if zero_points is None else scaled + zero_points.float().reshape(shape)
        new[0].copy_(moved.round().clamp(-128, 127))

    return Task(run=run, new=[(tuple(x.shape), torch.int8)], returns_one=True)


@operation("npu_weight_quant_batchmatmul")
def weight_quant_matmul(
    profile: Profile,
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None,
    quant_scale: Tensor | None,
    quant_offset: Tensor | None,
    bias: Tensor | None,
    antiquant_group_size: int,
    inner_precise: int,
) -> Task:
    name = "npu_weight_quant_batchmatmul"
    check(x.dtype in HALF_TYPES, name, f"x is {x.dtype}: float16 or bfloat16 only")
    check_simulated(weight.dtype == torch.int8, name, f"a weight of {weight.dtype}")
    check_simulated(quant_scale is None and quant_offset is None, name, "quantising the result")
    check(x.dim() == 2 and weight.dim() == 2 and x.shape[1] == weight.shape[0], name, "x is (m, k), weight (k, n)")
    depth, columns = weight.shape
    group = antiquant_group_size
    check(group == 0 or (32 <= group < depth and group % 32 == 0), name, f"antiquant_group_size {group} of {depth}")
    shapes = [(1,), (columns,), (1, columns)] if group == 0 else [(-(-depth // group), columns)]
    for argument, tensor in (("antiquant_scale", antiquant_scale), ("antiquant_offset", antiquant_offset)):
        if tensor is not None:
            check(tuple(tensor.shape) in shapes, name, f"{argument} is {tuple(tensor.shape)}: one of {shapes}")
            check(tensor.dtype == x.dtype, name, f"{argument} is {tensor.dtype}, but x is {x.dtype}")
    if bias is not None:
        wanted = torch.float16 if x.dtype == torch.float16 else torch.float32
        check(bias.dtype == wanted, name, f"the bias is {bias.dtype}, not {wanted}")
        check(tuple(bias.shape) in ((columns,), (1, columns)), name, f"the bias is {tuple(bias.shape)}")
    check_contiguous(name, x=x, antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset)

    def run(new: Sequence[Tensor]) -> None:
        def by_row(values: Tensor) -> Tensor:
            return values.float().repeat_interleave(group, dim=0)[:depth] if group else values.float()

        wide = weight.float() if antiquant_offset is None else weight.float() + by_row(antiquant_offset)
        product = x.float() @ (wide * by_row(antiquant_scale))
        new[0].copy_(product if bias is None else product + bias.float())

    return Task(run=run, new=[((x.shape[0], columns), x.dtype)], returns_one=True)
