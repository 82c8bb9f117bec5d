"""Multi-head latent attention of the torch backends: queries brought into the space of the latents, and back.

Owns the arithmetic around the attention itself, which `PagedAttention` computes with one key for all heads. Sums of
norms and rotations are in float32, whatever the type of the activations.
Source: DeepSeek-V2, arXiv 2405.04434, appendix C of which says how U and V are absorbed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mooli.backends.base import AttentionSpec
from mooli.backends.latent import LatentSpec


@dataclass(frozen=True, slots=True)
class LatentWeight:
    """keys (heads, rank, nope_dim), values (heads, value_dim, rank), in the type of the computation."""

    keys: Tensor
    values: Tensor


def shared_key(spec: LatentSpec) -> AttentionSpec:
    """The attention that all heads compute in the space of the latents."""
    return AttentionSpec(spec.num_heads, 1, spec.width, spec.scale)


def absorbed_queries(q: Tensor, weight: LatentWeight, spec: LatentSpec, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """Queries as `shared_key` takes them: (T, heads * (rank + rope_dim)). turn: rotates (T, heads, rope_dim)."""
    heads = q.view(len(q), spec.num_heads, -1)
    plain, turning = torch.split(heads, [spec.nope_dim, spec.rope_dim], dim=-1)
    mapped = torch.matmul(weight.keys, plain.permute(1, 2, 0)).permute(2, 0, 1)
    return torch.cat([mapped, turn(turning)], dim=-1).flatten(1)


def kept_rows(latent: Tensor, norm: Tensor, eps: float, spec: LatentSpec, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """What is kept of tokens (T, rank + rope_dim), from the rows that the projection gives."""
    plain, turning = torch.split(latent, [spec.rank, spec.rope_dim], dim=-1)
    wide = plain.float()
    normed = (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * norm).to(latent.dtype)
    return torch.cat([normed, turn(turning[:, None])[:, 0]], dim=-1)


def values_of(mixed: Tensor, weight: LatentWeight, spec: LatentSpec) -> Tensor:
    """Sums of latents (T, heads * rank) to values (T, heads * value_dim)."""
    heads = mixed.view(len(mixed), spec.num_heads, spec.rank).permute(1, 2, 0)
    return torch.matmul(weight.values, heads).permute(2, 0, 1).flatten(1)
