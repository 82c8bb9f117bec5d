"""What every operation of the seam means, in NumPy and float32.

Owns clear arithmetic, and what weights and a step are to it. Never fast on purpose: attention gathers its keys row by
row. Whatever another backend computes is compared with this. Never loads, and never allocates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mooli.backends.base import (
    Activation,
    AttentionSpec,
    CacheLayer,
    DeltaSpec,
    RopeSpec,
    check_attention,
    check_conv,
    check_delta,
)
from mooli.backends.latent import LatentSpec, check_latent, check_rows
from mooli.backends.reference_latent import LatentWeight, attend_row
from mooli.backends.routing import RouteSpec, chosen

Floats = NDArray[np.float32]

QUERY_BLOCK = 256
"""Query tokens whose scores exist at one time: bounds memory for long prompts."""


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """values (outputs, inputs); bias (outputs,) or None."""

    values: Floats
    bias: Floats | None


@dataclass(frozen=True, slots=True)
class GatedWeight:
    """Gate and up projections, each (outputs, inputs), with their biases."""

    gate: LinearWeight
    up: LinearWeight
    activation: Activation


@dataclass(frozen=True, slots=True)
class ConvWeight:
    """values (channels, columns); bias (channels,), zeros where there is none."""

    values: Floats
    bias: Floats


@dataclass(frozen=True, slots=True)
class DeltaWeight:
    """decay, dt_bias: (heads,)."""

    decay: Floats
    dt_bias: Floats


@dataclass(frozen=True, slots=True)
class ScanWeight:
    """decay, dt_bias, skip: (heads,)."""

    decay: Floats
    dt_bias: Floats
    skip: Floats


@dataclass(frozen=True, slots=True)
class RouterWeight:
    """linear (experts, H); correction (experts,) or None."""

    linear: LinearWeight
    correction: Floats | None


@dataclass(frozen=True, slots=True)
class ExpertsWeight:
    """One entry for each expert."""

    gated: tuple[GatedWeight, ...]
    down: tuple[LinearWeight, ...]


@dataclass(frozen=True, slots=True)
class RowPlan:
    """One row of a step: its tokens are `first_token` .. `first_token + length` of the step.

    slots: int64 (start + length,), where the KV of each position of the sequence lies. state: the slot of its recurrent
    state, -1 without one. kept: after how many tokens of the row the state is to be in which slot, ascending; the last
    one after all.
    """

    first_token: int
    start: int
    length: int
    slots: NDArray[np.int64]
    state: int = -1
    kept: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """A step as the operations take it. token_ids, rope_positions, slots: int64 (T,).

    tokens: int32, those of the step that an operation's rows stand for; None for all of them.
    """

    token_ids: NDArray[np.int64]
    rope_positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    rows: tuple[RowPlan, ...]
    tokens: NDArray[np.int32] | None = None


def round_to(dtype: str, values: Floats) -> Floats:
    """`values` rounded to the nearest value (ties to even) that `dtype` can hold, still float32."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(values), values, rounded.astype(np.uint32).view(np.float32))


def kept_keys(dtype: str, keys: Floats) -> Floats:
    """Keys (T, heads, head_dim) as a pool of `dtype` gives them back."""
    if dtype != "int8":
        return round_to(dtype, keys)
    # Turned, a few large values become many that one scale fits better (QuaRot, arXiv 2404.00456).
    size = keys.shape[-1] & -keys.shape[-1]
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= np.sqrt(size)
    blocks = keys.reshape(*keys.shape[:-1], -1, size) @ matrix
    turned = to_eight_bits(blocks.reshape(keys.shape).astype(np.float32)).reshape(blocks.shape) @ matrix.T
    kept: Floats = turned.reshape(keys.shape).astype(np.float32)
    return kept


def kept_values(dtype: str, values: Floats) -> Floats:
    """Values (T, heads, head_dim) as a pool of `dtype` gives them back."""
    return to_eight_bits(values) if dtype == "int8" else round_to(dtype, values)


def to_eight_bits(x: Floats) -> Floats:
    """Rows along the last axis rounded to eight bits under a scale each; NaN where one value of a row is not finite."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    scale = np.where(np.isfinite(largest), largest / np.float32(127), np.float32(np.nan))
    with np.errstate(divide="ignore", invalid="ignore"):
        rounded: Floats = np.rint(np.where(scale == 0, 0, x / scale)) * scale
    return rounded


class ReferenceOps:
    """`Ops` in NumPy. Arrays are float32 (T, features)."""

    def __init__(self) -> None:
        self.layers: tuple[CacheLayer, ...] = ()
        self.numbers: tuple[int, ...] = ()
        self.kv: list[Floats] = []
        """Of each layer with pages: keys and values (2, slots, kv heads, head_dim), or latents (1, slots, 1, width)."""
        self.states: list[list[Floats]] = []
        """Of each layer with a recurrence, and of each of its shapes: (slots, *shape)."""
        self.kv_dtype = "float32"

    def embed(self, batch: ForwardBatch, table: Floats, scale: float = 1.0) -> Floats:
        rows: Floats = table[batch.token_ids] * np.float32(scale)
        return rows

    def rms_norm(self, x: Floats, weight: Floats, eps: float, residual: Floats | None = None) -> Floats:
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        normed: Floats = x / np.sqrt(mean_square + np.float32(eps)) * weight
        return normed if residual is None else normed + residual

    def linear(self, batch: ForwardBatch, x: Floats, weight: LinearWeight, residual: Floats | None = None) -> Floats:
        product: Floats = x @ weight.values.T
        if weight.bias is not None:
            product += weight.bias
        if residual is not None:
            product += residual
        return product

    def gated_linear(self, batch: ForwardBatch, x: Floats, weight: GatedWeight) -> Floats:
        gate = self.linear(batch, x, weight.gate)
        if weight.activation == "clamped_swiglu":
            gate = np.minimum(gate, np.float32(7))
            up = np.clip(self.linear(batch, x, weight.up), np.float32(-7), np.float32(7))
            clamped: Floats = gate * sigmoid(np.float32(1.702) * gate) * (up + 1)
            return clamped
        if weight.activation == "gelu_tanh":
            bend = np.float32(np.sqrt(2 / np.pi)) * (gate + np.float32(0.044715) * gate**3)
            active: Floats = np.float32(0.5) * gate * (1 + np.tanh(bend))
        else:
            active = silu(gate)
        gated: Floats = active * self.linear(batch, x, weight.up)
        return gated

    def head_norm(self, qkv: Floats, spec: AttentionSpec, q_weight: Floats, k_weight: Floats, eps: float) -> Floats:
        q, k, v = split_heads(qkv, spec)
        return merge_heads(self.rms_norm(q, q_weight, eps), self.rms_norm(k, k_weight, eps), v)

    def projection_norm(
        self, qkv: Floats, spec: AttentionSpec, q_weight: Floats, k_weight: Floats, eps: float
    ) -> Floats:
        q, k, v = (part.reshape(len(qkv), -1) for part in split_heads(qkv, spec))
        return np.concatenate([self.rms_norm(q, q_weight, eps), self.rms_norm(k, k_weight, eps), v], axis=1)

    def rope(self, batch: ForwardBatch, qkv: Floats, spec: AttentionSpec, rope: RopeSpec) -> Floats:
        cos, sin = rotations(batch, rope)
        q, k, v = split_heads(qkv, spec)
        count = 2 * len(rope.inv_freq)
        q, k = (np.concatenate([rotate_half(x[..., :count], cos, sin), x[..., count:]], axis=-1) for x in (q, k))
        if rope.growth:
            q = q * rope.temperatures(batch.rope_positions)[:, None, None].astype(np.float32)
        return merge_heads(q, k, v)

    def attend(
        self, batch: ForwardBatch, layer: int, qkv: Floats, spec: AttentionSpec, sinks: Floats | None = None
    ) -> Floats:
        check_attention(self.layers, layer, spec)
        q, k, v = split_heads(qkv, spec)
        keys, values = self.kv[self.numbers[layer]]
        # Everything is stored first, so a row may read what another row of this step computes.
        keys[batch.slots] = kept_keys(self.kv_dtype, k)
        values[batch.slots] = kept_values(self.kv_dtype, v)
        out = np.empty((len(qkv), spec.num_heads, spec.head_dim), dtype=np.float32)
        for row in batch.rows:
            for begin in range(0, row.length, QUERY_BLOCK):
                count = min(QUERY_BLOCK, row.length - begin)
                first_query = row.start + begin
                first_key = max(0, first_query - spec.window + 1) if spec.window > 0 else 0
                slots = row.slots[first_key : first_query + count]
                tokens = slice(row.first_token + begin, row.first_token + begin + count)
                out[tokens] = attention(q[tokens], keys[slots], values[slots], first_query - first_key, spec, sinks)
        return out.reshape(len(qkv), -1)

    def attend_latent(
        self,
        batch: ForwardBatch,
        layer: int,
        q: Floats,
        latent: Floats,
        norm: Floats,
        eps: float,
        up: LatentWeight,
        rope: RopeSpec,
        spec: LatentSpec,
    ) -> Floats:
        check_latent(self.layers, layer, spec)
        check_rows(spec, q.shape[1], latent.shape[1])
        cos, sin = rotations(batch, rope)
        heads = q.reshape(len(q), spec.num_heads, -1)
        turned = rotate_half(heads[..., spec.nope_dim :], cos, sin)
        heads = np.concatenate([heads[..., : spec.nope_dim], turned], axis=2)
        normed = self.rms_norm(latent[:, : spec.rank], norm, eps)
        key = rotate_half(latent[:, None, spec.rank :], cos, sin)[:, 0]
        pool = self.kv[self.numbers[layer]][0, :, 0]
        pool[batch.slots] = round_to(self.kv_dtype, np.concatenate([normed, key], axis=1))
        out = np.empty((len(q), spec.num_heads, spec.value_dim), np.float32)
        for row in batch.rows:
            tokens = slice(row.first_token, row.first_token + row.length)
            out[tokens] = attend_row(heads[tokens], pool[row.slots], up, spec)
        return out.reshape(len(q), -1)

    def short_conv(self, batch: ForwardBatch, layer: int, x: Floats, weight: ConvWeight) -> Floats:
        before, after, u = np.split(x, 3, axis=1)
        return after * self._conv(batch, layer, before * u, weight)

    def causal_conv(self, batch: ForwardBatch, layer: int, x: Floats, weight: ConvWeight) -> Floats:
        return silu(self._conv(batch, layer, x, weight))

    def _conv(self, batch: ForwardBatch, layer: int, x: Floats, weight: ConvWeight) -> Floats:
        num_columns = weight.values.shape[1]
        check_conv(self.layers, layer, num_columns, x.shape[1])
        out = np.empty_like(x)

        def go_on(tokens: slice, last: Floats) -> Floats:
            inputs = np.concatenate([last, x[tokens]])
            num_tokens = len(inputs) - len(last)
            out[tokens] = weight.bias
            for column in range(num_columns):
                out[tokens] += weight.values[:, column] * inputs[column : column + num_tokens]
            return inputs[num_tokens:]

        self._carry(batch, self.states[self.numbers[layer]][0], go_on)
        return out

    def delta_rule(
        self, batch: ForwardBatch, layer: int, qkv: Floats, gates: Floats, weight: DeltaWeight, spec: DeltaSpec
    ) -> Floats:
        check_delta(self.layers, layer, spec)
        keys_end = spec.num_key_heads * spec.key_dim
        q, k, v = np.split(qkv, [keys_end, 2 * keys_end], axis=1)
        q, k = (unit(part.reshape(len(qkv), -1, spec.key_dim))[:, list(spec.key_heads)] for part in (q, k))
        q = q * np.float32(spec.key_dim**-0.5)
        v = v.reshape(len(qkv), -1, spec.value_dim)
        b, a = np.split(gates, 2, axis=1)
        beta = sigmoid(b)
        kept: Floats = np.exp(weight.decay * np.logaddexp(np.float32(0), a + weight.dt_bias))
        out = np.empty_like(v)

        def go_on(tokens: slice, state: Floats) -> Floats:
            for t in range(tokens.start, tokens.stop):
                state = state * kept[t, :, None, None]
                error = v[t] - np.einsum("hkv,hk->hv", state, k[t])
                state = state + k[t, :, :, None] * (beta[t, :, None] * error)[:, None]
                out[t] = np.einsum("hkv,hk->hv", state, q[t])
            return state

        self._carry(batch, self.states[self.numbers[layer]][1], go_on)
        return out.reshape(len(qkv), -1)

    def scan(
        self, batch: ForwardBatch, layer: int, qkv: Floats, steps: Floats, weight: ScanWeight, spec: DeltaSpec
    ) -> Floats:
        check_delta(self.layers, layer, spec)
        keys_end = spec.num_key_heads * spec.key_dim
        q, k, v = np.split(qkv, [keys_end, 2 * keys_end], axis=1)
        q, k = (part.reshape(len(qkv), -1, spec.key_dim)[:, list(spec.key_heads)] for part in (q, k))
        v = v.reshape(len(qkv), -1, spec.value_dim)
        share: Floats = np.logaddexp(np.float32(0), steps + weight.dt_bias)
        kept: Floats = np.exp(weight.decay * share)
        out = np.empty_like(v)

        def go_on(tokens: slice, state: Floats) -> Floats:
            for t in range(tokens.start, tokens.stop):
                state = state * kept[t, :, None, None] + k[t, :, :, None] * (share[t, :, None] * v[t])[:, None]
                out[t] = np.einsum("hkv,hk->hv", state, q[t]) + weight.skip[:, None] * v[t]
            return state

        self._carry(batch, self.states[self.numbers[layer]][1], go_on)
        return out.reshape(len(qkv), -1)

    def _carry(self, batch: ForwardBatch, states: Floats, go_on: Callable[[slice, Floats], Floats]) -> None:
        """`go_on(tokens, state)` gives the state after some tokens: for every row, from each kept state to the next."""
        for row in batch.rows:
            state = states[row.state].copy() if row.start else np.zeros_like(states[0])
            at = 0
            for num_tokens, slot in row.kept:
                state = go_on(slice(row.first_token + at, row.first_token + num_tokens), state)
                states[slot] = state
                at = num_tokens

    def gated_norm(self, x: Floats, gate: Floats, weight: Floats, eps: float) -> Floats:
        heads = x.reshape(len(x), -1, len(weight))
        return self.rms_norm(heads, weight, eps).reshape(x.shape) * silu(gate)

    def sigmoid_mul(self, x: Floats, gate: Floats) -> Floats:
        return x * sigmoid(gate)

    def silu_mul(self, x: Floats, gate: Floats) -> Floats:
        return x * silu(gate)

    def route(
        self, batch: ForwardBatch, x: Floats, router: RouterWeight, spec: RouteSpec
    ) -> tuple[NDArray[np.int64], Floats]:
        return chosen(self.linear(batch, x, router.linear), router.correction, spec)

    def experts(
        self,
        batch: ForwardBatch,
        x: Floats,
        routing: tuple[NDArray[np.int64], Floats],
        weight: ExpertsWeight,
        residual: Floats | None = None,
    ) -> Floats:
        ids, weights = routing
        out = np.zeros_like(x) if residual is None else np.zeros_like(residual)
        results = np.empty((*ids.shape, out.shape[1]), np.float32)
        for expert, (gated, down) in enumerate(zip(weight.gated, weight.down, strict=True)):
            tokens, slots = np.nonzero(ids == expert)
            results[tokens, slots] = self.linear(batch, self.gated_linear(batch, x[tokens], gated), down)
        for slot in range(ids.shape[1]):
            out += weights[:, slot, None] * results[:, slot]
        return out if residual is None else out + residual

    def soft_cap(self, x: Floats, cap: float) -> Floats:
        return capped(x, cap)

    def asked_rows(self, batch: ForwardBatch, x: Floats) -> Floats:
        return x


def sigmoid(x: Floats) -> Floats:
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
        result: Floats = np.float32(1) / (1 + np.exp(-x))
    return result


def silu(x: Floats) -> Floats:
    with np.errstate(over="ignore"):
        result: Floats = x / (1 + np.exp(-x))
    return result


def capped(x: Floats, cap: float) -> Floats:
    bent: Floats = np.float32(cap) * np.tanh(x / np.float32(cap))
    return bent


def unit(x: Floats) -> Floats:
    """x over its length, along the last axis."""
    scaled: Floats = x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + np.float32(1e-6))
    return scaled


def split_heads(qkv: Floats, spec: AttentionSpec) -> tuple[Floats, Floats, Floats]:
    """Views (T, heads, head_dim) of the query, key and value parts of packed rows."""
    heads = qkv.reshape(len(qkv), -1, spec.head_dim)
    first_value = spec.num_heads + spec.num_kv_heads
    return heads[:, : spec.num_heads], heads[:, spec.num_heads : first_value], heads[:, first_value:]


def merge_heads(q: Floats, k: Floats, v: Floats) -> Floats:
    """Packed rows (T, features) from the parts of `split_heads`."""
    return np.concatenate([q, k, v], axis=1).reshape(len(q), -1)


def rotations(batch: ForwardBatch, rope: RopeSpec) -> tuple[Floats, Floats]:
    """Cosines and sines at the step's rotary positions: (T, 1, number of pairs)."""
    # Angles in float64: positions in the tens of thousands leave float32 too few digits.
    angles = batch.rope_positions[:, None, None] * rope.inv_freq
    cos, sin = ((turn(angles) * rope.factor).astype(np.float32) for turn in (np.cos, np.sin))
    return cos, sin


def rotate_half(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotate pairs (i, i + head_dim / 2) of x (T, heads, head_dim) by angles (T, 1, head_dim / 2)."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(
    q: Floats, k: Floats, v: Floats, first_query: int, spec: AttentionSpec, sinks: Floats | None = None
) -> Floats:
    """Causal attention of one row: q (Q, num_heads, head_dim), k and v (N, num_kv_heads, head_dim) -> q's shape.

    Query i sits at key index `first_query + i` and sees the keys up to itself, the last `spec.window` of them if set.
    """
    num_queries, num_keys = len(q), len(k)
    query_index = first_query + np.arange(num_queries)[:, None]
    key_index = np.arange(num_keys)[None, :]
    hidden = key_index > query_index
    if spec.window > 0:
        hidden |= key_index <= query_index - spec.window
    # (kv_heads, group * Q, head_dim) @ (kv_heads, head_dim, N): the query heads of a group share their keys.
    grouped = q.reshape(num_queries, spec.num_kv_heads, -1, spec.head_dim).transpose(1, 2, 0, 3)
    group = grouped.shape[1]
    scores = grouped.reshape(spec.num_kv_heads, -1, spec.head_dim) @ k.transpose(1, 2, 0) * np.float32(spec.scale)
    scores = scores.reshape(spec.num_kv_heads, group, num_queries, num_keys)
    if spec.softcap > 0:
        scores = capped(scores, spec.softcap)
    scores = np.where(hidden, np.float32(-np.inf), scores)
    largest = scores.max(axis=-1, keepdims=True)
    unseen = 0.0  # what the sinks weigh
    if sinks is not None:
        logits = sinks.reshape(spec.num_kv_heads, group, 1, 1)
        largest = np.maximum(largest, logits)
        unseen = np.exp(logits - largest)
    weights = np.exp(scores - largest)
    weights /= weights.sum(axis=-1, keepdims=True) + unseen
    mixed = weights.reshape(spec.num_kv_heads, -1, num_keys) @ v.transpose(1, 0, 2)
    mixed = mixed.reshape(spec.num_kv_heads, group, num_queries, spec.head_dim)
    out: Floats = mixed.transpose(2, 0, 1, 3).reshape(q.shape)
    return out
