"""Which experts compute a token, and how much each counts: the plain description, and its meaning in NumPy.

Owns `RouteSpec`, and `chosen`, which the other backends are tested against. Never multiplies a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mooli.errors import ConfigError

Score = Literal["softmax", "sigmoid", "chosen_softmax"]

MAX_EXPERTS = 4096
MAX_TOP_K = 64

_LEFT_OUT = np.float32(-np.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteSpec:
    """A router's choice of `top_k` experts of `num_experts`, by logits of one number for each expert.

    score: "softmax" over all experts, "sigmoid" of each logit, or "chosen_softmax": logits choose, and the softmax is
    over the chosen ones alone. What chooses is the score plus the router's correction, if it has one; what weighs is
    the score without it. Of equal ones the lower expert comes first.
    groups: experts are in so many groups, one behind the other, of which `kept_groups` may be chosen from: those whose
    best `group_top` experts sum to the most. normalise: weights are divided by max(their sum + eps, minimum). factor:
    what they are multiplied by at last.

    Sources: Shazeer et al., arXiv 1701.06538; groups, DeepSeek-V2, arXiv 2405.04434; sigmoid and correction,
    DeepSeek-V3, arXiv 2412.19437.
    """

    num_experts: int
    top_k: int
    score: Score = "softmax"
    groups: int = 1
    kept_groups: int = 1
    group_top: int = 1
    normalise: bool = False
    eps: float = 0.0
    minimum: float = 0.0
    factor: float = 1.0

    def __post_init__(self) -> None:
        """Raises ConfigError for numbers that do not fit each other."""
        if not 1 <= self.num_experts <= MAX_EXPERTS or not 1 <= self.top_k <= min(self.num_experts, MAX_TOP_K):
            raise ConfigError(
                f"{self.top_k} of {self.num_experts} experts: there may be up to {MAX_EXPERTS}, of which up to"
                f" {MAX_TOP_K} compute a token"
            )
        size = self.num_experts // self.groups if self.groups > 0 else 0
        if size * self.groups != self.num_experts or not 1 <= self.kept_groups <= self.groups:
            raise ConfigError(
                f"{self.num_experts} experts are not {self.groups} equal groups, of which {self.kept_groups} are kept"
            )
        if not 1 <= self.group_top <= size or self.top_k > self.kept_groups * size:
            raise ConfigError(
                f"{self.top_k} experts, and the best {self.group_top} of each group, of {self.kept_groups} groups of"
                f" {size}"
            )


def chosen(
    logits: NDArray[np.float32], correction: NDArray[np.float32] | None, spec: RouteSpec
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The experts of each row of logits (T, num_experts), best first, and their weights: (T, top_k) each.

    correction: (num_experts,) or None. A row with NaN has experts all the same, and weights of NaN.
    """
    scores = _scores(logits, spec)
    order = scores if correction is None else scores + correction
    ids = _largest(_of_kept_groups(order, spec), spec.top_k)
    weights = np.take_along_axis(scores, ids, axis=1)
    if spec.score == "chosen_softmax":
        weights = _softmax(weights)
    if spec.normalise:
        total = weights.sum(axis=1, keepdims=True) + np.float32(spec.eps)
        weights = weights / np.maximum(total, np.float32(spec.minimum))
    weights = weights * np.float32(spec.factor)
    return ids, np.where(np.isnan(logits).any(axis=1, keepdims=True), np.float32(np.nan), weights)


def _scores(logits: NDArray[np.float32], spec: RouteSpec) -> NDArray[np.float32]:
    if spec.score == "softmax":
        return _softmax(logits)
    if spec.score == "sigmoid":
        with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
            result: NDArray[np.float32] = np.float32(1) / (1 + np.exp(-logits))
        return result
    return logits


def _softmax(x: NDArray[np.float32]) -> NDArray[np.float32]:
    weights = np.exp(x - x.max(axis=1, keepdims=True))
    result: NDArray[np.float32] = weights / weights.sum(axis=1, keepdims=True)
    return result


def _of_kept_groups(order: NDArray[np.float32], spec: RouteSpec) -> NDArray[np.float32]:
    """What chooses, minus infinity in groups that are left out."""
    if spec.kept_groups == spec.groups:
        return order
    grouped = order.reshape(len(order), spec.groups, -1)
    best = np.sort(grouped, axis=2)[:, :, -spec.group_top :].sum(axis=2)
    is_kept = np.zeros(best.shape, bool)
    np.put_along_axis(is_kept, _largest(best, spec.kept_groups), True, axis=1)
    return np.where(is_kept[:, :, None], grouped, _LEFT_OUT).reshape(order.shape)


def _largest(x: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest of each row, descending; the lower one first where they are equal."""
    ids: NDArray[np.int64] = np.argsort(-x, axis=1, kind="stable")[:, :count]
    return ids
