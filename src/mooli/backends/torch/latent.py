"""Multi-head latent attention of the torch backends, in the form with less arithmetic for each row.

Owns the arithmetic around the attention itself, which `PagedAttention` computes. Absorbed, queries are brought into the
space of the latents, which are one key for all heads: decode steps, and few tokens behind many. Expanded, keys and
values of each head are made of the latents: prompts. The forms agree but for roundings, so that how a scheduler cuts a
prompt shows in them. Sums of norms and rotations are in float32, whatever the type of the activations.
Source: DeepSeek-V2, arXiv 2405.04434, appendix C of which says how U and V are absorbed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from mooli.backends.base import AttentionSpec
from mooli.backends.latent import LatentSpec
from mooli.backends.torch.attention import PagedAttention
from mooli.backends.torch.step_plan import ChunkRow, ForwardBatch

EXPANDED_AT_A_TIME = 1 << 26
"""Numbers of keys and values that are made of latents at one time: 256 MiB in float32."""


@dataclass(frozen=True, slots=True)
class LatentWeight:
    """keys (heads, rank, nope_dim), values (heads, value_dim, rank), in the type of the computation."""

    keys: Tensor
    values: Tensor


def shared_key(spec: LatentSpec) -> AttentionSpec:
    """The attention that all heads compute in the space of the latents."""
    return AttentionSpec(spec.num_heads, 1, spec.width, spec.scale)


def takes_less_expanded(row: ChunkRow, spec: LatentSpec) -> bool:
    """Whether the expanded form of a row multiplies less."""
    pairs = row.length * (row.start + row.length / 2)
    mapped = spec.rank * (spec.nope_dim + spec.value_dim)
    absorbed = pairs * (spec.width + spec.rank) + row.length * mapped
    return pairs * 2 * key_dim(spec) + (row.start + row.length) * mapped < absorbed


def key_dim(spec: LatentSpec) -> int:
    """Numbers of an expanded key and, so that fused kernels take them, of an expanded value."""
    return max(spec.nope_dim + spec.rope_dim, spec.value_dim)


def attend(
    attention: PagedAttention,
    batch: ForwardBatch,
    layer: int,
    queries: tuple[Tensor, Tensor],
    weight: LatentWeight,
    spec: LatentSpec,
) -> Tensor:
    """queries: (T, heads, nope_dim), and rotated (T, heads, rope_dim). To (T, heads * value_dim)."""
    plain, turned = queries
    long = [takes_less_expanded(row, spec) for row in batch.chunks]
    if not any(long):
        mixed = attention.attend(batch, layer, absorbed_queries(plain, turned, weight), shared_key(spec))
        return values_of(mixed, weight, spec)
    out = plain.new_empty(len(plain), spec.num_heads * spec.value_dim)
    for index, group in enumerate(batch.decode):
        if group.tokens is not None:
            of_group = plain.index_select(0, group.tokens), turned.index_select(0, group.tokens)
            q = absorbed_queries(*of_group, weight)
            mixed = attention.attend_group(batch, layer, index, q, shared_key(spec))
            out.index_copy_(0, group.tokens, values_of(mixed, weight, spec))
    for index, row in enumerate(batch.chunks):
        tokens = slice(row.first_token, row.first_token + row.length)
        if long[index]:
            out[tokens] = expanded_chunk(attention, batch, layer, index, (plain[tokens], turned[tokens]), weight, spec)
        else:
            q = absorbed_queries(plain[tokens], turned[tokens], weight)
            out[tokens] = values_of(attention.attend_chunk(batch, layer, index, q, shared_key(spec)), weight, spec)
    return out


def expanded_chunk(
    attention: PagedAttention,
    batch: ForwardBatch,
    layer: int,
    index: int,
    queries: tuple[Tensor, Tensor],
    weight: LatentWeight,
    spec: LatentSpec,
) -> Tensor:
    """One row of several tokens, whose keys and values are made of all its latents, of some heads at a time: queries as
    in `attend`, of the row's tokens alone."""
    size, row = key_dim(spec), batch.chunks[index]
    kept, latents = (part[:, 0].to(weight.keys.dtype) for part in attention.gather_chunk(batch, layer, index, 0))
    rotated, padding = kept[:, spec.rank :], size - spec.nope_dim - spec.rope_dim
    q = F.pad(torch.cat(queries, dim=-1), (0, padding))
    at_a_time = max(1, EXPANDED_AT_A_TIME // (2 * size * len(latents)))
    mixed = []
    for first in range(0, spec.num_heads, at_a_time):
        heads = slice(first, first + at_a_time)
        keys = torch.matmul(latents, weight.keys[heads])
        keys = F.pad(torch.cat([keys, rotated.expand(len(keys), -1, -1)], dim=-1), (0, padding))
        values = torch.matmul(latents, weight.values[heads].transpose(-1, -2))
        values = F.pad(values, (0, size - spec.value_dim))
        each = AttentionSpec(len(keys), len(keys), size, spec.scale)
        made = attention.attend_gathered(batch, row, q[:, heads].flatten(1), keys[:, None], values[:, None], each)
        mixed.append(made.view(row.length, -1, size)[..., : spec.value_dim])
    return torch.cat(mixed, dim=1).flatten(1)


def absorbed_queries(plain: Tensor, turned: Tensor, weight: LatentWeight) -> Tensor:
    """Queries as `shared_key` takes them: (T, heads * (rank + rope_dim)), of those that `attend` takes."""
    mapped = torch.matmul(weight.keys, plain.permute(1, 2, 0)).permute(2, 0, 1)
    return torch.cat([mapped, turned], dim=-1).flatten(1)


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
