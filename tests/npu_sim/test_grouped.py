"""The grouped product against its formula, and every argument it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paged import close
from refusals import refused

FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32


def product(x: Any, weight: Any, group_list: Any, **others: Any) -> torch.Tensor:
    settings = {"split_item": 2, "group_type": 0, "group_list_type": 0, **others}
    result: torch.Tensor = torch.ops.npu.npu_grouped_matmul([x], [weight], group_list=group_list, **settings)[0]
    return result


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("counts", [(4, 0, 3), (0, 0, 7), (1, 5, 1)])
def test_each_group_of_rows_has_its_matrix(dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    x, weight = torch.randn(7, 32).to(dtype), torch.randn(3, 32, 48).to(dtype)
    expected = torch.cat(
        [rows.float() @ matrix.float() for rows, matrix in zip(x.split(list(counts)), weight, strict=True)]
    )
    groups = torch.tensor(counts)
    assert close(product(x.npu(), weight.npu(), groups.cumsum(0).npu()), expected)
    assert close(product(x.npu(), weight.npu(), groups.npu(), group_list_type=1), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.ones(7, 16, dtype=FLOAT16)}, "rows of 16 values, matrices of 32"),
        ({"x": torch.ones(7, 2, 16, dtype=FLOAT16)}, "3 and 3 dimensions"),
        ({"x": torch.ones(7, 32)}, "x of torch.float32 is not simulated"),
        ({"x": torch.ones(32, 7, dtype=FLOAT16).t()}, "contiguous"),
        ({"weight": torch.ones(3, 32, 48, dtype=BFLOAT16)}, "weight is torch.bfloat16, but x is torch.float16"),
        ({"weight": torch.ones(32, 48, dtype=FLOAT16)}, "2 and 2 dimensions"),
        ({"group_list": torch.tensor([4, 7])}, "2 groups, 3 matrices"),
        ({"group_list": torch.tensor([4, 7, 7], dtype=torch.int32)}, "group_list is torch.int32"),
        ({"group_list": torch.tensor([4, 3, 7])}, "groups end before they begin"),
        ({"group_list": torch.tensor([4, 4, 6])}, "groups of 6 rows, x has 7"),
        ({"group_list": None}, "no group_list"),
        ({"split_item": 0}, "split_item 0"),
        ({"group_type": -1}, "group_type -1 is not simulated"),
        ({"group_list_type": 2}, "group_list_type 2 is not simulated"),
        ({"act_type": 5}, "act_type 5 is not simulated"),
        ({"output_dtype": FLOAT32}, "output_dtype torch.float32"),
    ],
)
def test_a_wrong_grouped_product_is_refused(wrong: dict[str, Any], message: str) -> None:
    right = {
        "x": torch.ones(7, 32, dtype=FLOAT16).npu(),
        "weight": torch.ones(3, 32, 48, dtype=FLOAT16).npu(),
        "group_list": torch.tensor([4, 4, 7]).npu(),
    }
    there = {name: value.npu() if isinstance(value, torch.Tensor) else value for name, value in wrong.items()}
    refused(product, right, there, message)
