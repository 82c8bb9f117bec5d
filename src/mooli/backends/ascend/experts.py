"""Mixtures of experts by the NPU's grouped product: rows sorted by expert, and one call for all experts.

Owns the stacking of their weights and the order of operations. Nothing of a step is brought to the host. Not tried on
hardware. Source: the document of npu_grouped_matmul: one tensor of rows, one of matrices, one of results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mooli.backends.base import Activation
from mooli.backends.torch.experts import ExpertsWeight, Routing, summed
from mooli.backends.torch.weights import FloatLinear

MAX_EXPERTS = 1024
MAX_WIDTH = 65536


@dataclass(frozen=True, slots=True)
class GroupedExperts:
    """gate_up (experts, H, 2 width) and down (experts, width, H), with biases (experts, …) or None.

    each: where the ranks are that sums go over; its weights are these.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: Activation
    each: ExpertsWeight


def grouped(weight: ExpertsWeight, dtype: torch.dtype) -> GroupedExperts | None:
    """The same experts in stacks; None where the operation does not take them: float32, other weights than floats."""
    gated = [each.stacked for each in weight.gated]
    if dtype == torch.float32 or len(gated) > MAX_EXPERTS:
        return None
    floats = [each for each in (*gated, *weight.down) if isinstance(each, FloatLinear)]
    if len(floats) != 2 * len(gated) or max(max(each.values.shape) for each in floats) >= MAX_WIDTH:
        return None
    first, second = floats[: len(gated)], floats[len(gated) :]
    rest = ExpertsWeight((), (), weight.communicator)
    return GroupedExperts(
        _stacked(first),
        _stacked(second),
        _stacked_biases(first),
        _stacked_biases(second),
        weight.gated[0].activation,
        rest,
    )


def _stacked(linears: Sequence[FloatLinear]) -> Tensor:
    """(experts, inputs, outputs)"""
    return torch.stack([each.values.t() for each in linears]).contiguous()


def _stacked_biases(linears: Sequence[FloatLinear]) -> Tensor | None:
    biases = [each.bias for each in linears if each.bias is not None]
    return torch.stack(biases) if biases else None


def mixed_in_groups(
    x: Tensor, routing: Routing, weight: GroupedExperts, gate: Callable[[Tensor, Activation], Tensor]
) -> Tensor:
    """The sum of the experts of each row of x (T, H), float32. gate: of gate and up products side by side."""
    num_slots, count = routing.ids.shape[1], len(weight.down)
    chosen, order = routing.ids.flatten().sort(stable=True)
    experts = torch.arange(count, device=x.device)
    ends = (chosen[:, None] <= experts).sum(dim=0, dtype=torch.int64)
    rows = x.index_select(0, order.div(num_slots, rounding_mode="floor"))
    products = _product(rows, weight.gate_up, weight.gate_up_bias, ends, chosen)
    results = _product(gate(products, weight.activation), weight.down, weight.down_bias, ends, chosen).float()
    placed = torch.empty_like(results).index_copy_(0, order, results)
    return summed(placed.view(len(x), num_slots, -1), routing, weight.each)


def _product(rows: Tensor, matrices: Tensor, biases: Tensor | None, ends: Tensor, chosen: Tensor) -> Tensor:
    product: Tensor = torch.ops.npu.npu_grouped_matmul(
        [rows.contiguous()], [matrices], group_list=ends, split_item=2, group_type=0, group_list_type=0
    )[0]
    return product if biases is None else product + biases.index_select(0, chosen)
