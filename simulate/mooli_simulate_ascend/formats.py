"""Memory formats: which tensors are said to lie as FRACTAL_NZ. Values are kept as they are; only the claim is recorded.

Owns the record and npu_format_cast. A view of such a tensor is refused by the device, as its elements are not in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mooli_simulate_ascend.errors import check, check_simulated
from mooli_simulate_ascend.profiles import Profile
from mooli_simulate_ascend.tasks import Task, operation

ND = 2
FRACTAL_NZ = 29

_formats: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Config:
    """`torch.npu.config`: what a process allows."""

    allow_internal_format = False


config = Config()


def format_of(tensor: Tensor) -> int:
    """The format a tensor was cast to: ND unless it was."""
    if tensor not in _formats:
        return ND
    found: int = _formats[tensor]
    return found


def mark(tensor: Tensor, acl_format: int) -> None:
    _formats[tensor] = acl_format


def check_cast(name: str, x: Tensor, acl_format: int) -> None:
    check_simulated(acl_format in (ND, FRACTAL_NZ), name, f"format {acl_format}")
    if acl_format == ND:
        return
    check(config.allow_internal_format, name, "set torch.npu.config.allow_internal_format, or the cast does nothing")
    check(x.dtype in (torch.float16, torch.bfloat16, torch.int8), name, f"{x.dtype} cannot be FRACTAL_NZ")
    check(x.dim() >= 2, name, f"{x.dim()} dimension: at least 2")
    check(x.is_contiguous(), name, "the tensor is not contiguous")
    columns = 32 if x.dtype == torch.int8 else 16
    check(
        x.shape[-2] % 16 == 0 and x.shape[-1] % columns == 0,
        name,
        f"a matrix of {tuple(x.shape[-2:])}: multiples of 16 and {columns} are wanted for {x.dtype}",
    )


@operation("npu_format_cast")
def format_cast(profile: Profile, x: Tensor, acl_format: int, customize_dtype: int | None = None) -> Task:
    check_cast("npu_format_cast", x, acl_format)

    def run(new: Sequence[Tensor]) -> None:
        new[0].copy_(x)
        mark(new[0], acl_format)

    return Task(run=run, new=[(tuple(x.shape), x.dtype)], returns_one=True)


@operation("npu_format_cast_.acl_format")
def format_cast_in_place(profile: Profile, x: Tensor, acl_format: int, customize_dtype: int | None = None) -> Task:
    check_cast("npu_format_cast_", x, acl_format)
    return Task(run=lambda _: mark(x, acl_format), result=(x,), returns_one=True, out_form=True)
