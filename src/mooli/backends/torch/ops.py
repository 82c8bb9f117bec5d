"""The operations of the seam on torch tensors.

Owns the arithmetic between linear weights and attention. Sums of squares, angles and rotations are in float32, whatever
the type of the activations. Never loads a weight and never plans a step.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from mooli.backends.base import AttentionSpec, RopeSpec, check_attention
from mooli.backends.torch.attention import PagedAttention
from mooli.backends.torch.parallel import PartTable
from mooli.backends.torch.step_plan import ForwardBatch
from mooli.backends.torch.weights import GatedLinear, LinearWeight
from mooli.errors import ConfigError

POSITIONS_AT_A_TIME = 1 << 14
"""Rows of a rotary table computed at one time, in float64 on the host."""


class TorchOps:
    """`Ops` on one device. A device with fused kernels overrides single operations."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.attention: PagedAttention | None = None
        self.num_positions = 0
        """Positions that rotary tables are made for; a step beyond makes them longer."""
        self._rotary: dict[bytes, tuple[Tensor, Tensor]] = {}

    def embed(self, batch: ForwardBatch, table: Tensor | PartTable, scale: float = 1.0) -> Tensor:
        ids = batch.token_ids
        rows = table.look_up(ids) if isinstance(table, PartTable) else F.embedding(ids, table)
        return rows if scale == 1.0 else rows * scale

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight
        return (normed if residual is None else normed + residual).to(x.dtype)

    def linear(self, batch: ForwardBatch, x: Tensor, weight: LinearWeight, residual: Tensor | None = None) -> Tensor:
        product = weight.matmul(x)
        return product if residual is None else product.add_(residual)

    def gated_linear(self, batch: ForwardBatch, x: Tensor, weight: GatedLinear) -> Tensor:
        gate, up = weight.stacked.matmul(x).chunk(2, dim=-1)
        return (F.silu(gate) if weight.activation == "silu" else F.gelu(gate, approximate="tanh")) * up

    def head_norm(self, qkv: Tensor, spec: AttentionSpec, q_weight: Tensor, k_weight: Tensor, eps: float) -> Tensor:
        q, k, v = split_heads(qkv, spec)
        normed = [self.rms_norm(q, q_weight, eps), self.rms_norm(k, k_weight, eps), v]
        return torch.cat(normed, dim=1).flatten(1)

    def rope(self, batch: ForwardBatch, qkv: Tensor, spec: AttentionSpec, rope: RopeSpec) -> Tensor:
        cos, sin = self.rotations(batch, rope)
        turning = spec.num_heads + spec.num_kv_heads
        heads = qkv.view(len(qkv), -1, spec.head_dim)
        first, second = heads[:, :turning].float().chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return torch.cat([turned.to(qkv.dtype), heads[:, turning:]], dim=1).flatten(1)

    def attend(self, batch: ForwardBatch, layer: int, qkv: Tensor, spec: AttentionSpec) -> Tensor:
        if self.attention is None:
            raise ConfigError("allocate the KV pool before running a step")
        check_attention(self.attention.pool.layers, layer, spec)
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        q, k, v = torch.split(qkv, [q_size, kv_size, kv_size], dim=-1)
        # Everything is stored first, so a row may read what another row of this step computes.
        self.attention.pool.store(layer, batch.slots, k, v)
        return self.attention.attend(batch, layer, q, spec)

    def asked_rows(self, batch: ForwardBatch, x: Tensor) -> Tensor:
        """All rows: shapes stay those of the step, which graphs have captured."""
        return x

    def rotations(self, batch: ForwardBatch, rope: RopeSpec) -> tuple[Tensor, Tensor]:
        """Cosines and sines at the step's rotary positions, float32 (T, 1, head_dim / 2) each."""
        name = rope.inv_freq.tobytes()
        key = ("rotations", name)
        if key not in batch.memo:
            table = self._rotary.get(name)
            if table is None or len(table[0]) <= batch.max_rope_position:
                self.num_positions = max(self.num_positions, batch.max_rope_position + 1)
                table = self._rotary[name] = rotary_table(rope, self.num_positions, self.device)
            batch.memo[key] = tuple(part.index_select(0, batch.rope_positions)[:, None, :] for part in table)
        cos, sin = batch.memo[key]
        return cos, sin

    def close(self) -> None:
        """Give the pool and the tables back."""
        self.attention = None
        self._rotary.clear()


def split_heads(qkv: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Views (T, heads, head_dim) of the query, key and value parts of packed rows."""
    heads = qkv.view(len(qkv), -1, spec.head_dim)
    q, k, v = torch.split(heads, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
    return q, k, v


def rotary_table(rope: RopeSpec, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 .. num_positions, float32 (num_positions, head_dim / 2) each.

    Angles are float64: positions in the tens of thousands leave float32 too few digits.
    """
    shape = (num_positions, len(rope.inv_freq))
    cos, sin = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    for begin in range(0, num_positions, POSITIONS_AT_A_TIME):
        positions = np.arange(begin, min(begin + POSITIONS_AT_A_TIME, num_positions))
        angles = positions[:, None] * rope.inv_freq
        where = slice(begin, begin + len(positions))
        cos[where].copy_(torch.from_numpy(np.cos(angles).astype(np.float32)))
        sin[where].copy_(torch.from_numpy(np.sin(angles).astype(np.float32)))
    return cos, sin
