"""A model family that the package does not know, declared as a module of it would be: tests register it.

Owns a decoder whose blocks read one norm for attention and MLP side by side, with configuration keys, tensor names and
GGUF keys of its own; and `logits_of`, what it means, in NumPy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mooli.backends.base import Array, AttentionSpec, Ops, PagedLayer, RopeSpec
from mooli.models.config import COLUMNS, ROWS, ModelConfig, Split, TensorSpec
from mooli.models.family import Family
from mooli.models.fields import GGUFSource, HFSource, check_range
from mooli.models.layers import PAIRS_IN_GGUF, linear_tensors, norm_tensors, vocabulary_tensors
from mooli.models.packer import Packer
from mooli.models.rope import inv_freq

EPS = 1e-5
THETA = 10000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyConfig(ModelConfig):
    num_queries: int
    num_kv_heads: int
    width: int
    has_bias: bool = False

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        check_range("queries", self.num_queries, 1, 64)

    @property
    def head_dim(self) -> int:
        return 16

    def tensors(self) -> dict[str, TensorSpec]:
        hidden = self.hidden_size
        tensors = vocabulary_tensors("tok", "token_embd", self.vocab_size, hidden)
        queries = Split(ROWS, self.num_queries, "queries")
        keys = Split(ROWS, self.num_kv_heads, "keys", "shared")
        wide, narrow = Split(ROWS, self.width, "wide columns"), Split(COLUMNS, self.width, "wide columns")
        rows, kv_rows = self.num_queries * self.head_dim, self.num_kv_heads * self.head_dim
        for layer in range(self.num_layers):
            name, gguf = f"h.{layer}", f"blk.{layer}"
            tensors |= norm_tensors(f"{name}.norm", f"{gguf}.norm", hidden)
            tensors |= linear_tensors(
                f"{name}.wq", f"{gguf}.q", (rows, hidden), queries, pairs=PAIRS_IN_GGUF, bias=self.has_bias
            )
            tensors |= linear_tensors(
                f"{name}.wk", f"{gguf}.k", (kv_rows, hidden), keys, pairs=PAIRS_IN_GGUF, bias=self.has_bias
            )
            tensors |= linear_tensors(f"{name}.wv", f"{gguf}.v", (kv_rows, hidden), keys, bias=self.has_bias)
            summed = dataclasses.replace(queries, axis=COLUMNS)
            tensors |= linear_tensors(f"{name}.wo", f"{gguf}.o", (hidden, rows), summed, bias=self.has_bias)
            tensors |= linear_tensors(f"{name}.w1", f"{gguf}.up", (self.width, hidden), wide)
            tensors |= linear_tensors(f"{name}.w3", f"{gguf}.gate", (self.width, hidden), wide)
            tensors |= linear_tensors(f"{name}.w2", f"{gguf}.down", (hidden, self.width), narrow)
        return tensors | norm_tensors("out_norm", "output_norm", hidden)

    def may_ignore(self, name: str) -> bool:
        return name.startswith("vision.")

    def cache_layers(self) -> tuple[PagedLayer, ...]:
        return (PagedLayer(self.num_kv_heads, self.head_dim),) * self.num_layers

    def part(self, size: int) -> ToyConfig:
        return dataclasses.replace(
            self,
            num_queries=self.num_queries // size,
            num_kv_heads=max(1, self.num_kv_heads // size),
            width=self.width // size,
        )


class ToyModel:
    def __init__(self, config: ToyConfig, ops: Ops, packer: Packer) -> None:
        self.config = config
        self._ops = ops
        self._spec = AttentionSpec(config.num_queries, config.num_kv_heads, config.head_dim, config.head_dim**-0.5)
        self._rope = RopeSpec(inv_freq(config.head_dim, THETA))
        self._embedding, self._head = packer.tied("tok")
        self._layers = [
            (
                packer.vector(f"{name}.norm.weight"),
                packer.linear(f"{name}.wq", f"{name}.wk", f"{name}.wv"),
                packer.linear(f"{name}.wo"),
                packer.gated(f"{name}.w3", f"{name}.w1"),
                packer.linear(f"{name}.w2"),
            )
            for name in (f"h.{index}" for index in range(config.num_layers))
        ]
        self._norm = packer.vector("out_norm.weight")

    def forward(self, batch: Any) -> Array:
        ops = self._ops
        hidden = ops.embed(batch, self._embedding)
        for index, (norm, qkv, o, gate_up, down) in enumerate(self._layers):
            x = ops.rms_norm(hidden, norm, EPS)
            rotated = ops.rope(batch, ops.linear(batch, x, qkv), self._spec, self._rope)
            mixed = ops.attend(batch, index, rotated, self._spec)
            hidden = ops.linear(batch, mixed, o, residual=hidden)
            hidden = ops.linear(batch, ops.gated_linear(batch, x, gate_up), down, residual=hidden)
        return ops.asked_rows(batch, hidden)

    def logits(self, batch: Any, hidden: Array) -> Array:
        return self._ops.linear(batch, self._ops.rms_norm(hidden, self._norm, EPS), self._head)


def _read_hf(source: HFSource) -> ToyConfig:
    fields = source.fields
    return ToyConfig(
        family=source.family,
        architecture=source.architecture,
        vocab_size=fields.integer("vocab"),
        hidden_size=fields.integer("dim"),
        num_layers=fields.integer("depth"),
        max_position_embeddings=fields.integer("longest", 256),
        eos_ids=source.eos_ids(),
        num_queries=fields.integer("queries"),
        num_kv_heads=fields.integer("keys"),
        width=fields.integer("wide"),
        has_bias=fields.flag("bias"),
    )


def _read_gguf(source: GGUFSource) -> ToyConfig:
    fields = source.fields
    return ToyConfig(
        **source.common(),
        num_queries=fields.integer("queries"),
        num_kv_heads=fields.integer("keys"),
        width=source.overridden({"wide": fields.integer("wide")}).integer("wide"),
        has_bias="blk.0.q.bias" in source.shapes,
    )


TOY = Family(
    name="toy",
    architectures=("ToyLM",),
    gguf=("toy",),
    hf_keys=frozenset(("vocab", "dim", "depth", "longest", "queries", "keys", "wide", "bias")),
    gguf_keys=frozenset(("wide",)),
    read_hf=_read_hf,
    read_gguf=_read_gguf,
    model=ToyModel,
)

Floats = NDArray[np.float64]


def logits_of(config: ToyConfig, weights: Mapping[str, NDArray[Any]], token_ids: Sequence[int]) -> Floats:
    """float64 (T, vocab_size): what the family means."""
    count, dim = len(token_ids), config.head_dim
    w = {name: values.astype(np.float64) for name, values in weights.items()}
    angles = np.arange(count)[:, None] * inv_freq(dim, THETA)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def norm(x: Floats, gain: Floats) -> Floats:
        return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * gain)

    def linear(x: Floats, name: str) -> Floats:
        return np.asarray(x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0))

    def heads(x: Floats, num_heads: int, *, is_rotated: bool) -> Floats:
        x = x.reshape(count, num_heads, dim)
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        x = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1) if is_rotated else x
        return np.repeat(x, config.num_queries // num_heads, axis=1)

    hidden = w["tok.weight"][np.asarray(token_ids)]
    for layer in range(config.num_layers):
        name = f"h.{layer}"
        x = norm(hidden, w[f"{name}.norm.weight"])
        q = heads(linear(x, f"{name}.wq"), config.num_queries, is_rotated=True)
        k = heads(linear(x, f"{name}.wk"), config.num_kv_heads, is_rotated=True)
        v = heads(linear(x, f"{name}.wv"), config.num_kv_heads, is_rotated=False)
        scores = np.einsum("qhd,khd->hqk", q, k) * dim**-0.5
        scores = np.where(np.tri(count, dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", shares, v).reshape(count, -1)
        gate = linear(x, f"{name}.w3")
        gated = gate / (1 + np.exp(-gate)) * linear(x, f"{name}.w1")
        hidden = hidden + linear(mixed, f"{name}.wo") + linear(gated, f"{name}.w2")
    return np.asarray(norm(hidden, w["out_norm.weight"]) @ w["tok.weight"].T)
