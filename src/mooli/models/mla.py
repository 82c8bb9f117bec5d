"""Multi-head latent attention, as families share it: its sizes, its tensors, how it is loaded, and what it computes.

Owns the layer. Never names a device, sees a request or touches an array. T tokens in a step, H hidden size.

Queries may come through a small projection and its norm, keys and values always do: what is kept of a token is one
latent and one rotated key, for all heads. Heads are cut over ranks, and every rank keeps the latents whole.

Sources: DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mooli.backends.base import Array, Ops, RopeSpec, Weight
from mooli.backends.latent import LatentLayer, LatentSpec
from mooli.errors import CheckpointError
from mooli.models import rope
from mooli.models.config import COLUMNS, ROWS, Split, TensorSpec
from mooli.models.fields import Fields, check_range
from mooli.models.layers import NO_PAIRS, Pairs, Tensors, linear_tensors, norm_tensors
from mooli.models.packer import Packer
from mooli.models.rope import RopeScaling

INNER_EPS = 1e-6
"""Of the norms inside the attention, whatever a model's other norms have."""

HF_KEYS = frozenset(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentHeads:
    """Sizes of the attention. q_rank: of the projection that queries come through, None where there is none.

    bias: of the projections to latents, and of the output. is_split: the file has keys and values apart (GGUF). pairs:
    which kinds of files have the rotated rows in pairs. CheckpointError for a number out of its bounds.
    """

    num_heads: int
    q_rank: int | None
    rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    eps: float = INNER_EPS
    bias: bool = False
    is_split: bool = False
    pairs: Pairs = NO_PAIRS

    def __post_init__(self) -> None:
        check_range("num_attention_heads", self.num_heads, 1, 4096)
        if self.q_rank is not None:
            check_range("q_lora_rank", self.q_rank, 1, 2**16)
        check_range("kv_lora_rank", self.rank, 1, 2**14)
        check_range("qk_nope_head_dim", self.nope_dim, 1, 4096)
        check_range("qk_rope_head_dim", self.rope_dim, 2, 1024)
        check_range("v_head_dim", self.value_dim, 1, 4096)
        check_range("the eps of norms in attention", self.eps, 1e-30, 1.0)
        if self.rope_dim % 2:
            raise CheckpointError(f"qk_rope_head_dim {self.rope_dim} is odd: rotary embedding needs pairs")

    @property
    def layer(self) -> LatentLayer:
        """What is kept."""
        return LatentLayer(self.rank, self.rope_dim)

    def spec(self, scaling: RopeScaling | None) -> LatentSpec:
        """The attention. Where yarn stretches the context, scores may be sharpened too: V2's code squares that."""
        scale = (self.nope_dim + self.rope_dim) ** -0.5
        if scaling is not None and scaling.all_dim:
            scale *= rope.mscale(scaling.factor, scaling.all_dim) ** 2
        return LatentSpec(self.num_heads, self.rank, self.nope_dim, self.rope_dim, self.value_dim, scale)

    def part(self, size: int) -> LatentHeads:
        return dataclasses.replace(self, num_heads=self.num_heads // size)


def hf_heads(fields: Fields, pairs: Pairs, **own: Any) -> LatentHeads:
    """The sizes that a config.json gives. own: what a family reads otherwise."""
    read = {
        "num_heads": fields.integer("num_attention_heads"),
        "q_rank": fields.optional_integer("q_lora_rank"),
        "rank": fields.integer("kv_lora_rank"),
        "nope_dim": fields.integer("qk_nope_head_dim"),
        "rope_dim": fields.integer("qk_rope_head_dim"),
        "value_dim": fields.integer("v_head_dim"),
        "bias": fields.flag("attention_bias"),
    }
    return LatentHeads(**{**read, **own}, pairs=pairs)


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """One layer's. q_a and q_a_norm are None where queries come straight from the hidden states."""

    ops: Ops
    spec: LatentSpec
    rope: RopeSpec
    eps: float
    q_a: Weight | None
    q_a_norm: Weight | None
    q_b: Weight
    kv_a: Weight
    kv_a_norm: Weight
    up: Weight
    o: Weight

    @staticmethod
    def tensors(name: str, gguf: str, hidden_size: int, sizes: LatentHeads) -> Tensors:
        """name: of the module, as `model.layers.0.self_attn`; gguf: of the block, as `blk.0`."""
        heads = Split(ROWS, sizes.num_heads, "attention heads")
        query_rows = sizes.num_heads * (sizes.nope_dim + sizes.rope_dim)
        tensors: Tensors = {}
        if sizes.q_rank is None:
            tensors |= _paired(f"{name}.q_proj", f"{gguf}.attn_q", (query_rows, hidden_size), heads, sizes)
        else:
            tensors |= _whole(f"{name}.q_a_proj", f"{gguf}.attn_q_a", (sizes.q_rank, hidden_size), bias=sizes.bias)
            tensors |= norm_tensors(f"{name}.q_a_layernorm", f"{gguf}.attn_q_a_norm", sizes.q_rank)
            tensors |= _paired(f"{name}.q_b_proj", f"{gguf}.attn_q_b", (query_rows, sizes.q_rank), heads, sizes)
        latent = (sizes.layer.width, hidden_size)
        tensors |= _paired(f"{name}.kv_a_proj_with_mqa", f"{gguf}.attn_kv_a_mqa", latent, None, sizes, bias=sizes.bias)
        tensors |= norm_tensors(f"{name}.kv_a_layernorm", f"{gguf}.attn_kv_a_norm", sizes.rank)
        values = (sizes.num_heads * sizes.value_dim, sizes.rank)
        if sizes.is_split:
            keys = (sizes.num_heads * sizes.rank, sizes.nope_dim)
            tensors |= linear_tensors(f"{name}.k_b_proj", f"{gguf}.attn_k_b", keys, heads)
            tensors |= linear_tensors(f"{name}.v_b_proj", f"{gguf}.attn_v_b", values, heads)
        else:
            both = (sizes.num_heads * (sizes.nope_dim + sizes.value_dim), sizes.rank)
            tensors |= linear_tensors(f"{name}.kv_b_proj", f"{gguf}.attn_kv_b", both, heads)
        summed = Split(COLUMNS, sizes.num_heads, "attention heads")
        return tensors | linear_tensors(
            f"{name}.o_proj", f"{gguf}.attn_output", (hidden_size, values[0]), summed, bias=sizes.bias
        )

    @classmethod
    def load(
        cls, packer: Packer, name: str, ops: Ops, sizes: LatentHeads, spec: LatentSpec, rotary: RopeSpec
    ) -> LatentAttention:
        has_rank = sizes.q_rank is not None
        up = ("k_b_proj", "v_b_proj") if sizes.is_split else ("kv_b_proj",)
        return cls(
            ops,
            spec,
            rotary,
            sizes.eps,
            q_a=packer.linear(f"{name}.q_a_proj") if has_rank else None,
            q_a_norm=packer.vector(f"{name}.q_a_layernorm.weight") if has_rank else None,
            q_b=packer.linear(f"{name}.q_b_proj" if has_rank else f"{name}.q_proj"),
            kv_a=packer.linear(f"{name}.kv_a_proj_with_mqa"),
            kv_a_norm=packer.vector(f"{name}.kv_a_layernorm.weight"),
            up=packer.latent(*(f"{name}.{part}" for part in up), spec=spec),
            o=packer.linear(f"{name}.o_proj"),
        )

    def mix(self, batch: Any, layer: int, x: Array) -> Array:
        """What each token takes from those before it: (T, H) to (T, num_heads * value_dim). Stores latents."""
        ops, queries = self.ops, x
        if self.q_a is not None:
            queries = ops.rms_norm(ops.linear(batch, x, self.q_a), self.q_a_norm, self.eps)
        q = ops.linear(batch, queries, self.q_b)
        latent = ops.linear(batch, x, self.kv_a)
        return ops.attend_latent(batch, layer, q, latent, self.kv_a_norm, self.eps, self.up, self.rope, self.spec)

    def output(self, batch: Any, mixed: Array, residual: Array | None = None) -> Array:
        """What `mix` returned, projected, and added where there is a residual: (T, H)."""
        return self.ops.linear(batch, mixed, self.o, residual=residual)


def _whole(name: str, gguf: str, shape: tuple[int, int], *, bias: bool) -> Tensors:
    """A linear layer that every rank has whole."""
    tensors = {f"{name}.weight": TensorSpec(shape, f"{gguf}.weight")}
    return tensors | ({f"{name}.bias": TensorSpec(shape[:1], f"{gguf}.bias")} if bias else {})


def _paired(
    name: str, gguf: str, shape: tuple[int, int], split: Split | None, sizes: LatentHeads, *, bias: bool = False
) -> Tensors:
    """A linear layer of which the last rows of each head are rotated."""
    count = 1 if split is None else split.units
    in_gguf, in_hf = (count if is_paired else 0 for is_paired in (sizes.pairs.in_gguf, sizes.pairs.in_hf))

    def spec(shape: tuple[int, ...], ending: str) -> TensorSpec:
        return TensorSpec(shape, f"{gguf}.{ending}", split, in_gguf, in_hf, paired_rows=sizes.rope_dim)

    tensors = {f"{name}.weight": spec(shape, "weight")}
    return tensors | ({f"{name}.bias": spec(shape[:1], "bias")} if bias else {})
