"""Products of groups of rows with a matrix each, as the experts of a mixture have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mooli_simulate_ascend.errors import check, check_simulated
from mooli_simulate_ascend.paging import HALF_TYPES, check_contiguous
from mooli_simulate_ascend.profiles import Profile
from mooli_simulate_ascend.tasks import Task, operation

MAX_GROUPS = 1024
MAX_WIDTH = 65536


@operation("npu_grouped_matmul")
def grouped_matmul(
    profile: Profile,
    x: list[Tensor],
    weight: list[Tensor],
    bias: list[Tensor] | None,
    group_list: Tensor | None,
    split_item: int | None,
    group_type: int | None,
    group_list_type: int | None,
    act_type: int | None,
    output_dtype: torch.dtype | None,
    **others: Any,
) -> Task:
    """One tensor of rows, one of matrices (groups, k, n), one of results: rows are grouped by where groups end."""
    name = "npu_grouped_matmul"
    for argument, given in {"bias": bias, **others}.items():
        check_simulated(given is None, name, argument)
    check_simulated(group_type == 0, name, f"group_type {group_type}")
    check_simulated(group_list_type in (0, 1), name, f"group_list_type {group_list_type}")
    check_simulated(act_type == 0, name, f"act_type {act_type}")
    check_simulated(len(x) == 1 and len(weight) == 1, name, f"{len(x)} and {len(weight)} tensors")
    check(split_item in (2, 3), name, f"split_item {split_item}: one result is 2 or 3")
    rows, matrices = x[0], weight[0]
    check(rows.dim() == 2 and matrices.dim() == 3, name, f"{rows.dim()} and {matrices.dim()} dimensions, not 2 and 3")
    check_simulated(rows.dtype in HALF_TYPES, name, f"x of {rows.dtype}")
    check(matrices.dtype == rows.dtype, name, f"weight is {matrices.dtype}, but x is {rows.dtype}")
    check(output_dtype in (None, rows.dtype), name, f"output_dtype {output_dtype} of {rows.dtype}")
    check(rows.shape[1] == matrices.shape[1], name, f"rows of {rows.shape[1]} values, matrices of {matrices.shape[1]}")
    check(max(rows.shape[1], matrices.shape[2]) < MAX_WIDTH, name, f"more than {MAX_WIDTH - 1} columns")
    check(rows.numel() > 0, name, "empty tensors are not taken")
    check_contiguous(name, x=rows, weight=matrices)
    check(group_list is not None, name, "no group_list")
    assert group_list is not None
    check(group_list.dtype == torch.int64 and group_list.dim() == 1, name, f"group_list is {group_list.dtype}")
    count = len(matrices)
    check(len(group_list) == count <= MAX_GROUPS, name, f"{len(group_list)} groups, {count} matrices")

    def run(new: Sequence[Tensor]) -> None:
        ends = group_list if group_list_type == 0 else group_list.cumsum(0)
        check(bool((ends.diff() >= 0).all()) and int(ends[0]) >= 0, name, "groups end before they begin")
        check(int(ends[-1]) == len(rows), name, f"groups of {int(ends[-1])} rows, x has {len(rows)}")
        begin = 0
        for matrix, end in zip(matrices, ends.tolist(), strict=True):
            new[0][begin:end] = (rows[begin:end].float() @ matrix.float()).to(rows.dtype)
            begin = end

    return Task(run=run, new=[((len(rows), matrices.shape[2]), rows.dtype)])
