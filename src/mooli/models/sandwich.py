"""A decoder layer whose branches are normed on both sides, as Gemma and GLM-4 have them.

Owns the order of operations: h = x + N2(attention(N1 x)), then h + N4(mlp(N3 h)). Families differ in the names of their
norms, in their attention and in what stands around the layers. T tokens in a step, H hidden size.

Source: Ding et al., CogView, arXiv 2105.13290, which calls it a sandwich.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mooli.backends.base import Array, Ops, Weight
from mooli.models.layers import Attention, GatedMLP


@dataclass(frozen=True, slots=True)
class SandwichLayer:
    """One decoder layer."""

    input_norm: Weight
    attention: Attention
    post_attention_norm: Weight
    pre_mlp_norm: Weight
    mlp: GatedMLP
    post_mlp_norm: Weight


def run_layers(ops: Ops, batch: Any, layers: Sequence[SandwichLayer], hidden: Array, eps: float) -> Array:
    """All layers, (T, H) to the rows of asked tokens. Stores the KV of all."""
    for index, layer in enumerate(layers):
        mixed = layer.attention.mix(batch, index, ops.rms_norm(hidden, layer.input_norm, eps))
        if index + 1 == len(layers):
            mixed, hidden = ops.asked_rows(batch, mixed), ops.asked_rows(batch, hidden)
        attended = layer.attention.output(batch, mixed)
        hidden = ops.rms_norm(attended, layer.post_attention_norm, eps, residual=hidden)
        wide = layer.mlp.output(batch, ops.rms_norm(hidden, layer.pre_mlp_norm, eps))
        hidden = ops.rms_norm(wide, layer.post_mlp_norm, eps, residual=hidden)
    return hidden
