"""Mixtures of experts on torch tensors: the choice, and the products of each expert with the rows that chose it.

Owns the order: rows are sorted by expert, and a row's results are added up in the order of its choice, so that nothing
depends on which thread was first. Never loads a tensor of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from mooli.backends.base import Activation
from mooli.backends.routing import RouteSpec
from mooli.backends.torch.communicator import Communicator
from mooli.backends.torch.parallel import SummedLinear
from mooli.backends.torch.weights import GatedLinear, LinearWeight


@dataclass(frozen=True, slots=True)
class RouterWeight:
    """values float32 (experts, H); bias and correction (experts,) or None."""

    values: Tensor
    bias: Tensor | None
    correction: Tensor | None


@dataclass(frozen=True, slots=True)
class ExpertsWeight:
    """One entry for each expert. communicator: of the ranks whose results are summed, None where one computes all."""

    gated: tuple[GatedLinear, ...]
    down: tuple[LinearWeight, ...]
    communicator: Communicator | None


@dataclass(frozen=True, slots=True)
class Routing:
    """ids int64 and weights float32 (T, top_k), best first."""

    ids: Tensor
    weights: Tensor


def experts_weight(gated: Sequence[GatedLinear], down: Sequence[LinearWeight]) -> ExpertsWeight:
    """Of what each expert's tensors became. Sums over ranks are of all experts together, not of each."""
    communicator = down[0].communicator if isinstance(down[0], SummedLinear) else None
    parts = tuple(each.part if isinstance(each, SummedLinear) else each for each in down)
    return ExpertsWeight(tuple(gated), parts, communicator)


def choose(x: Tensor, router: RouterWeight, spec: RouteSpec) -> Routing:
    """As `mooli.backends.routing.chosen` of the logits of x (T, H)."""
    logits = F.linear(x.float(), router.values, router.bias)
    scores = logits
    if spec.score == "softmax":
        scores = torch.softmax(logits, dim=-1)
    elif spec.score == "sigmoid":
        scores = torch.sigmoid(logits)
    order = scores if router.correction is None else scores + router.correction
    ids = _largest(_of_kept_groups(order, spec), spec.top_k)
    weights = scores.gather(1, ids)
    if spec.score == "chosen_softmax":
        weights = torch.softmax(weights, dim=-1)
    if spec.normalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + spec.eps).clamp(min=spec.minimum)
    # A row with NaN is NaN whatever it has chosen.
    is_unfit = torch.isnan(logits).any(dim=-1, keepdim=True)
    return Routing(ids, torch.where(is_unfit, torch.full_like(weights, torch.nan), weights * spec.factor))


def _of_kept_groups(order: Tensor, spec: RouteSpec) -> Tensor:
    if spec.kept_groups == spec.groups:
        return order
    grouped = order.view(len(order), spec.groups, -1)
    best = grouped.sort(dim=-1, descending=True)[0][..., : spec.group_top].sum(dim=-1)
    is_kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, _largest(best, spec.kept_groups), True)
    return torch.where(is_kept[..., None], grouped, torch.full_like(grouped, -torch.inf)).flatten(1)


def _largest(x: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of each row; the lower one first where they are equal, as topk does not promise.
    NaN is below all."""
    order = torch.where(torch.isnan(x), torch.full_like(x, -torch.inf), x)
    return order.sort(dim=-1, descending=True, stable=True)[1][:, :count]


def mixed(
    x: Tensor,
    routing: Routing,
    weight: ExpertsWeight,
    gate: Callable[[Tensor, GatedLinear], Tensor],
) -> Tensor:
    """The sum of the experts of each row of x (T, H), float32. gate: computes a gated linear."""
    num_slots = routing.ids.shape[1]
    chosen = routing.ids.flatten()
    order = chosen.sort(stable=True)[1]
    results: Tensor | None = None
    begin = 0
    for expert, count in enumerate(torch.bincount(chosen, minlength=len(weight.gated)).tolist()):
        if count == 0:
            continue
        places = order[begin : begin + count]
        rows = x.index_select(0, places.div(num_slots, rounding_mode="floor"))
        result = weight.down[expert].matmul(gate(rows, weight.gated[expert])).float()
        if results is None:
            results = result.new_empty((len(chosen), result.shape[1]))
        results.index_copy_(0, places, result)
        begin += count
    assert results is not None, "a step has at least one row"
    return summed(results.view(len(x), num_slots, -1), routing, weight)


def summed(results: Tensor, routing: Routing, weight: ExpertsWeight) -> Tensor:
    """Results of experts (T, top_k, H) times their weights, slot by slot, and over ranks: (T, H)."""
    total = results[:, 0] * routing.weights[:, :1]
    for slot in range(1, results.shape[1]):
        total = total + results[:, slot] * routing.weights[:, slot : slot + 1]
    return total if weight.communicator is None else weight.communicator.all_reduce(total)


def activate(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """What a gated linear makes of its two products."""
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    gate = gate.clamp(max=7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up.clamp(min=-7.0, max=7.0) + 1)
