"""The operations of the seam on torch tensors.

Owns the arithmetic between linear weights and attention. Sums of squares, angles and rotations are in float32, whatever
the type of the activations. Never loads a weight and never plans a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from mooli.backends.base import (
    AttentionSpec,
    CacheLayer,
    CacheSpec,
    DeltaSpec,
    RopeSpec,
    check_attention,
    check_conv,
    check_delta,
)
from mooli.backends.latent import LatentSpec, check_latent, check_rows
from mooli.backends.page_bytes import Bytes, check_slot, state_of
from mooli.backends.routing import RouteSpec
from mooli.backends.torch import recurrence
from mooli.backends.torch.attention import PagedAttention
from mooli.backends.torch.experts import ExpertsWeight, RouterWeight, Routing, activate, choose, mixed
from mooli.backends.torch.latent import LatentWeight, kept_rows
from mooli.backends.torch.latent import attend as attend_latents
from mooli.backends.torch.parallel import PartTable
from mooli.backends.torch.recurrence import Tokens, states_before
from mooli.backends.torch.step_plan import ForwardBatch, StateRows
from mooli.backends.torch.weights import GatedLinear, LinearWeight
from mooli.batch import StateCopy
from mooli.errors import ConfigError, OutOfMemoryError

POSITIONS_AT_A_TIME = 1 << 14
"""Rows of a rotary table computed at one time, in float64 on the host."""


@dataclass(frozen=True, slots=True)
class ConvWeight:
    """values float32 (channels, columns); bias (channels,)."""

    values: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class DeltaWeight:
    """decay, dt_bias: float32 (heads,)."""

    decay: Tensor
    dt_bias: Tensor


@dataclass(frozen=True, slots=True)
class ScanWeight:
    """decay, dt_bias, skip: float32 (heads,)."""

    decay: Tensor
    dt_bias: Tensor
    skip: Tensor


class TorchOps:
    """`Ops` on one device. A device with fused kernels overrides single operations."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.attention: PagedAttention | None = None
        self.num_positions = 0
        """Positions that rotary tables are made for; a step beyond makes them longer."""
        self._rotary: dict[tuple[bytes, float], tuple[Tensor, Tensor]] = {}
        self.layers: tuple[CacheLayer, ...] = ()
        self.numbers: tuple[int, ...] = ()
        """Of each layer, among those of its kind: `CacheSpec.numbers`."""
        self.states: list[list[Tensor]] = []
        """Of each layer with a recurrence, and of each of its shapes: float32 (slots, *shape)."""
        self._heads: dict[tuple[int, ...], Tensor] = {}

    def keep_states(self, spec: CacheSpec, num_states: int) -> None:
        """Memory for states, and what each layer keeps. Raises OutOfMemoryError if the device does not hold it."""
        self.layers, self.numbers = spec.layers, spec.numbers
        try:
            self.states = [
                [torch.zeros((num_states, *shape), device=self.device) for shape in layer.shapes]
                for layer in spec.state_layers
            ]
        except RuntimeError as exc:  # of which torch's own out-of-memory error is one
            raise OutOfMemoryError(
                f"no memory on {self.device} for {num_states} recurrent states of {spec.state_bytes / 2**20:.1f} MiB"
                f" ({str(exc).splitlines()[0]}): lower max_running_requests or state_cache_fraction"
            ) from exc

    def copy_states(self, copies: Sequence[StateCopy]) -> None:
        for copy in copies:
            for tensors in self.states:
                for tensor in tensors:
                    tensor[copy.target].copy_(tensor[copy.source])

    def read_state(self, slot: int) -> Bytes:
        """To the host, as uint8: of each layer all that it keeps, one behind the other."""
        tensors = self._of_states(slot)
        return np.concatenate([tensor[slot].cpu().numpy().ravel() for tensor in tensors]).view(np.uint8)

    def write_state(self, slot: int, data: Any) -> None:
        """The inverse of `read_state`."""
        tensors = self._of_states(slot)
        values = state_of(data, 4 * sum(tensor[slot].numel() for tensor in tensors)).view(np.float32).copy()
        host = torch.from_numpy(values)
        for tensor in tensors:
            count = tensor[slot].numel()
            tensor[slot].copy_(host[:count].view(tensor[slot].shape))
            host = host[count:]

    def _of_states(self, slot: int) -> list[Tensor]:
        tensors = [tensor for layer in self.states for tensor in layer]
        check_slot(slot, len(tensors[0]) if tensors else 0)
        return tensors

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
        return activate(gate, up, weight.activation)

    def head_norm(self, qkv: Tensor, spec: AttentionSpec, q_weight: Tensor, k_weight: Tensor, eps: float) -> Tensor:
        q, k, v = split_heads(qkv, spec)
        normed = [self.rms_norm(q, q_weight, eps), self.rms_norm(k, k_weight, eps), v]
        return torch.cat(normed, dim=1).flatten(1)

    def projection_norm(
        self, qkv: Tensor, spec: AttentionSpec, q_weight: Tensor, k_weight: Tensor, eps: float
    ) -> Tensor:
        sizes = [heads * spec.head_dim for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)]
        q, k, v = torch.split(qkv, sizes, dim=-1)
        return torch.cat([self.rms_norm(q, q_weight, eps), self.rms_norm(k, k_weight, eps), v], dim=-1)

    def rope(self, batch: ForwardBatch, qkv: Tensor, spec: AttentionSpec, rope: RopeSpec) -> Tensor:
        turning = spec.num_heads + spec.num_kv_heads
        heads = qkv.view(len(qkv), -1, spec.head_dim)
        turned = torch.cat([self.turned(batch, heads[:, :turning], rope), heads[:, turning:]], dim=1).flatten(1)
        return self.warmed(batch, turned, spec, rope)

    def warmed(self, batch: ForwardBatch, qkv: Tensor, spec: AttentionSpec, rope: RopeSpec) -> Tensor:
        """Rows whose queries are multiplied as `rope` says, by their positions."""
        if not rope.growth:
            return qkv
        key = ("temperatures", rope.growth, rope.period)
        if key not in batch.memo:
            periods = torch.div(batch.rope_positions, rope.period, rounding_mode="floor")
            batch.memo[key] = 1 + rope.growth * torch.log1p(periods.float())[:, None]
        num_queries = spec.num_heads * spec.head_dim
        queries = (qkv[:, :num_queries].float() * batch.memo[key]).to(qkv.dtype)
        return torch.cat([queries, qkv[:, num_queries:]], dim=1)

    def turned(self, batch: ForwardBatch, heads: Tensor, rope: RopeSpec) -> Tensor:
        """Heads (T, heads, head_dim), of which all or the first values are rotated."""
        cos, sin = self.rotations(batch, rope)
        count = 2 * len(rope.inv_freq)
        first, second = heads[..., :count].float().chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(heads.dtype)
        return turned if count == heads.shape[-1] else torch.cat([turned, heads[..., count:]], dim=-1)

    def attend(
        self, batch: ForwardBatch, layer: int, qkv: Tensor, spec: AttentionSpec, sinks: Tensor | None = None
    ) -> Tensor:
        if self.attention is None:
            raise ConfigError("allocate the KV pool before running a step")
        check_attention(self.layers, layer, spec)
        number = self.numbers[layer]
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        q, k, v = torch.split(qkv, [q_size, kv_size, kv_size], dim=-1)
        # Everything is stored first, so a row may read what another row of this step computes.
        self.attention.pool.store(number, batch.slots, k, v)
        return self.attention.attend(batch, number, q, spec, sinks)

    def attend_latent(
        self,
        batch: ForwardBatch,
        layer: int,
        q: Tensor,
        latent: Tensor,
        norm: Tensor,
        eps: float,
        up: LatentWeight,
        rope: RopeSpec,
        spec: LatentSpec,
    ) -> Tensor:
        if self.attention is None:
            raise ConfigError("allocate the KV pool before running a step")
        check_latent(self.layers, layer, spec)
        check_rows(spec, q.shape[1], latent.shape[1])
        number = self.numbers[layer]

        def turn(heads: Tensor) -> Tensor:
            return self.turned(batch, heads, rope)

        self.attention.pool.store_latents(number, batch.slots, kept_rows(latent, norm, eps, spec, turn))
        heads = q.view(len(q), spec.num_heads, -1)
        queries = heads[..., : spec.nope_dim], turn(heads[..., spec.nope_dim :])
        return attend_latents(self.attention, batch, number, queries, up, spec)

    def short_conv(self, batch: ForwardBatch, layer: int, x: Tensor, weight: ConvWeight) -> Tensor:
        before, after, u = x.float().chunk(3, dim=-1)
        return (after * self._conv(batch, layer, before * u, weight)).to(x.dtype)

    def causal_conv(self, batch: ForwardBatch, layer: int, x: Tensor, weight: ConvWeight) -> Tensor:
        return F.silu(self._conv(batch, layer, x.float(), weight)).to(x.dtype)

    def _conv(self, batch: ForwardBatch, layer: int, x: Tensor, weight: ConvWeight) -> Tensor:
        num_columns = weight.values.shape[1]
        check_conv(self.layers, layer, num_columns, x.shape[1])
        out = torch.empty_like(x)

        def go_on(tokens: Tensor | slice | None, last: Tensor) -> Tensor:
            """Of rows (G, columns - 1, channels), or of one row, the inputs that are the last now."""
            new = x if tokens is None else x[tokens]
            inputs = torch.cat([last, new[:, None] if last.dim() == 3 else new], dim=-2)
            count = inputs.shape[-2] - last.shape[-2]
            sums = weight.bias
            for column in range(num_columns):
                sums = sums + weight.values[:, column] * inputs[..., column : column + count, :]
            _put(out, tokens, sums[:, 0] if last.dim() == 3 else sums)
            return inputs[..., count:, :]

        self._carry(batch, self.states[self.numbers[layer]][0], go_on)
        return out

    def delta_rule(
        self, batch: ForwardBatch, layer: int, qkv: Tensor, gates: Tensor, weight: DeltaWeight, spec: DeltaSpec
    ) -> Tensor:
        """Rows of several tokens in chunks, which end at multiples of 64 and where a state is kept: how a scheduler
        cuts a prompt shows in the last bits."""
        check_delta(self.layers, layer, spec)
        q, k, v = self._split_rows(qkv, spec)
        b, a = gates.float().chunk(2, dim=-1)
        log_kept = weight.decay * F.softplus(a + weight.dt_bias)
        heads = self._key_heads(spec)
        tokens = Tokens(unit(q) * spec.key_dim**-0.5, unit(k), v, torch.sigmoid(b), log_kept, heads)
        out = recurrence.run(recurrence.delta_rule, tokens, state_rows_of(batch), self.states[self.numbers[layer]][1])
        return out.flatten(1).to(qkv.dtype)

    def scan(
        self, batch: ForwardBatch, layer: int, qkv: Tensor, steps: Tensor, weight: ScanWeight, spec: DeltaSpec
    ) -> Tensor:
        """In chunks, as `delta_rule`."""
        check_delta(self.layers, layer, spec)
        q, k, v = self._split_rows(qkv, spec)
        share = F.softplus(steps.float() + weight.dt_bias)
        tokens = Tokens(q, k, v, share, weight.decay * share, self._key_heads(spec))
        out = recurrence.run(
            recurrence.selective_scan, tokens, state_rows_of(batch), self.states[self.numbers[layer]][1]
        )
        return (out + weight.skip[:, None] * v).flatten(1).to(qkv.dtype)

    def _split_rows(self, qkv: Tensor, spec: DeltaSpec) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of packed rows by their heads, in float32."""
        keys = spec.num_key_heads * spec.key_dim
        q, k, v = torch.split(qkv.float(), [keys, keys, spec.num_heads * spec.value_dim], dim=-1)
        return (
            q.view(len(q), -1, spec.key_dim),
            k.view(len(k), -1, spec.key_dim),
            v.view(len(v), -1, spec.value_dim),
        )

    def _key_heads(self, spec: DeltaSpec) -> Tensor | None:
        """`DeltaSpec.key_heads` on the device, None where each head has its own."""
        if spec.key_heads == tuple(range(spec.num_key_heads)):
            return None
        if spec.key_heads not in self._heads:
            self._heads[spec.key_heads] = torch.tensor(spec.key_heads, device=self.device)
        return self._heads[spec.key_heads]

    def _carry(
        self, batch: ForwardBatch, states: Tensor, go_on: Callable[[Tensor | slice | None, Tensor], Tensor]
    ) -> None:
        """`go_on(tokens, states)` gives the states after some tokens: of all rows of one token together, of any other
        from each kept state to the next."""
        rows = state_rows_of(batch)
        single = rows.single
        if single is not None:
            before = states_before(states, single.slots, single.goes_on)
            states.index_copy_(0, single.slots, go_on(single.tokens, before))
        for row in rows.rows:
            state = torch.zeros_like(states[0]) if row.begins else states[row.slot]
            at = 0
            for num_tokens, slot in row.kept:
                if num_tokens > at:
                    state = go_on(slice(row.first_token + at, row.first_token + num_tokens), state)
                states[slot].copy_(state)
                at = num_tokens

    def gated_norm(self, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float().view(len(x), -1, len(weight))
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight
        return (normed.flatten(1) * F.silu(gate.float())).to(x.dtype)

    def sigmoid_mul(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * torch.sigmoid(gate)

    def silu_mul(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * F.silu(gate)

    def route(self, batch: ForwardBatch, x: Tensor, router: RouterWeight, spec: RouteSpec) -> Routing:
        return choose(x, router, spec)

    def experts(
        self, batch: ForwardBatch, x: Tensor, routing: Routing, weight: ExpertsWeight, residual: Tensor | None = None
    ) -> Tensor:
        total = mixed(x, routing, weight, lambda rows, gated: self.gated_linear(batch, rows, gated))
        return (total if residual is None else total + residual).to(x.dtype)

    def soft_cap(self, x: Tensor, cap: float) -> Tensor:
        return (cap * torch.tanh(x.float() / cap)).to(x.dtype)

    def asked_rows(self, batch: ForwardBatch, x: Tensor) -> Tensor:
        """All rows: shapes stay those of the step, which graphs have captured."""
        return x

    def rotations(self, batch: ForwardBatch, rope: RopeSpec) -> tuple[Tensor, Tensor]:
        """Cosines and sines at the step's rotary positions, float32 (T, 1, head_dim / 2) each."""
        name = rope.name
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
        self.states = []
        self._rotary.clear()
        self._heads.clear()


def unit(x: Tensor) -> Tensor:
    """x over its length, along the last axis."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)


def state_rows_of(batch: ForwardBatch) -> StateRows:
    """Raises ConfigError for a step of a model without states."""
    if batch.states is None:
        raise ConfigError("a step without states of a model that has some")
    return batch.states


def _put(out: Tensor, tokens: Tensor | slice | None, values: Tensor) -> None:
    """What was computed of `tokens`, at their places."""
    if tokens is None:
        out.copy_(values)
    else:
        out[tokens] = values


def split_heads(qkv: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Views (T, heads, head_dim) of the query, key and value parts of packed rows."""
    heads = qkv.view(len(qkv), -1, spec.head_dim)
    q, k, v = torch.split(heads, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
    return q, k, v


def rotary_table(rope: RopeSpec, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 .. num_positions, times the factor, float32 (num_positions, head_dim / 2) each.

    Angles are float64: positions in the tens of thousands leave float32 too few digits.
    """
    shape = (num_positions, len(rope.inv_freq))
    cos, sin = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    for begin in range(0, num_positions, POSITIONS_AT_A_TIME):
        positions = np.arange(begin, min(begin + POSITIONS_AT_A_TIME, num_positions))
        angles = positions[:, None] * rope.inv_freq
        where = slice(begin, begin + len(positions))
        cos[where].copy_(torch.from_numpy((np.cos(angles) * rope.factor).astype(np.float32)))
        sin[where].copy_(torch.from_numpy((np.sin(angles) * rope.factor).astype(np.float32)))
    return cos, sin
