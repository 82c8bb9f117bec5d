"""Layers that families share: their tensors, how they are loaded, and what they compute.

Owns grouped-query attention with rotary embedding, and the gated MLP, as most decoders have them. Never names a device,
sees a request or touches an array: every computation is an operation of the backend seam. T tokens in a step, H hidden
size.

Splits are those of Shoeybi et al., Megatron-LM, arXiv 1909.08053: what makes the heads and the wide layer is cut along
its outputs, what reads them along its inputs, so that a layer needs two sums over the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

from mooli.backends.base import Activation, Array, AttentionSpec, Ops, RopeSpec, Weight
from mooli.models.config import COLUMNS, ROWS, Split, TensorSpec
from mooli.models.packer import Packer
from mooli.models.stacks import Rows

Tensors = dict[str, TensorSpec]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Which kinds of files have the rows of queries and keys in pairs, for interleaved rotation. rows: of each head, so
    many first ones; 0 for all."""

    in_gguf: bool = False
    in_hf: bool = False
    rows: int = 0


NO_PAIRS = Pairs()
PAIRS_IN_GGUF = Pairs(in_gguf=True)
ALWAYS_PAIRS = Pairs(in_gguf=True, in_hf=True)

AnyAttention = TypeVar("AnyAttention", bound="Attention")


def vocabulary_tensors(name: str, gguf: str, vocab_size: int, hidden_size: int) -> Tensors:
    """An embedding or an output head. Each rank has as many ids, the last ones beyond the vocabulary."""
    return linear_tensors(name, gguf, (vocab_size, hidden_size), Split(ROWS, vocab_size, "ids", "padded"))


def linear_tensors(
    name: str, gguf: str, shape: tuple[int, int], split: Split, *, bias: bool = False, pairs: Pairs = NO_PAIRS
) -> Tensors:
    """A linear layer of shape (outputs, inputs)."""
    heads = (split.units if pairs.in_gguf else 0, split.units if pairs.in_hf else 0)
    weight = TensorSpec(shape, f"{gguf}.weight", split, *heads, paired_rows=pairs.rows, pairs_begin=True)
    tensors = {f"{name}.weight": weight}
    if bias:
        tensors[f"{name}.bias"] = replace(weight, shape=shape[:1], gguf=f"{gguf}.bias")
    return tensors


def in_one(tensors: Tensors, whole: str, gguf: str, *modules: str) -> Tensors:
    """The same tensors, of which files have those of `modules` as those of the module `whole`, in this order of rows.

    gguf: what GGUF files call that module, as `blk.0.attn_qkv`. Folders may have the modules apart as well.
    """
    result = dict(tensors)
    for kind in ("weight", "bias"):
        parts = [f"{module}.{kind}" for module in modules if f"{module}.{kind}" in tensors]
        num_rows, first = sum(tensors[name].shape[0] for name in parts), 0
        for part in parts:
            size = tensors[part].shape[0]
            result[part] = replace(
                tensors[part],
                # A name that no file has: that of the whole may be one that a part has elsewhere.
                gguf=f"{gguf}:{part.split('.')[-2]}.{kind}",
                hf_stacks=(Rows(f"{whole}.{kind}", first, size, num_rows),),
                gguf_stacks=(Rows(f"{gguf}.{kind}", first, size, num_rows),),
            )
            first += size
    return result


def norm_tensors(name: str, gguf: str, length: int) -> Tensors:
    """The gain of a norm; every rank has it whole."""
    return {f"{name}.weight": TensorSpec((length,), f"{gguf}.weight")}


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query self-attention of one layer. rope is None where nothing is rotated, q_norm and k_norm where queries
    and keys have no norm.

    Sources: GQA, arXiv 2305.13245; RoFormer, arXiv 2104.09864; Qwen3's norms, arXiv 2505.09388.
    """

    norm_names: ClassVar[tuple[str, str]] = ("q_norm", "k_norm")
    """Of the modules, in folders."""

    output_name: ClassVar[str] = "o_proj"

    ops: Ops
    spec: AttentionSpec
    rope: RopeSpec | None
    eps: float
    qkv: Weight
    q_norm: Weight | None
    k_norm: Weight | None
    o: Weight

    @classmethod
    def tensors(
        cls,
        name: str,
        gguf: str,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        o_bias: bool,
        qk_norm: bool,
        pairs: Pairs,
    ) -> Tensors:
        """name: of the module, as `model.layers.0.self_attn`; gguf: of the block, as `blk.0`."""
        queries, keys = num_heads * head_dim, num_kv_heads * head_dim
        heads = Split(ROWS, num_heads, "attention heads")
        kv_heads = Split(ROWS, num_kv_heads, "key and value heads", "shared")
        tensors: Tensors = {}
        for part, rows, split in (("q", queries, heads), ("k", keys, kv_heads), ("v", keys, kv_heads)):
            tensors |= linear_tensors(
                f"{name}.{part}_proj",
                f"{gguf}.attn_{part}",
                (rows, hidden_size),
                split,
                bias=qkv_bias,
                pairs=NO_PAIRS if part == "v" else pairs,
            )
        if qk_norm:
            tensors |= cls.norm_tensors(name, gguf, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
        summed = Split(COLUMNS, num_heads, "attention heads")
        return tensors | linear_tensors(
            f"{name}.{cls.output_name}", f"{gguf}.attn_output", (hidden_size, queries), summed, bias=o_bias
        )

    @classmethod
    def norm_tensors(cls, name: str, gguf: str, *, num_heads: int, num_kv_heads: int, head_dim: int) -> Tensors:
        """The gains of queries' and keys' norms."""
        q, k = cls.norm_names
        return {
            **norm_tensors(f"{name}.{q}", f"{gguf}.attn_q_norm", head_dim),
            **norm_tensors(f"{name}.{k}", f"{gguf}.attn_k_norm", head_dim),
        }

    @classmethod
    def load(
        cls: type[AnyAttention],
        packer: Packer,
        name: str,
        ops: Ops,
        spec: AttentionSpec,
        rope: RopeSpec | None,
        eps: float,
        *,
        qk_norm: bool,
    ) -> AnyAttention:
        """The module of this name. All layers take the same `spec` and `rope` where theirs are equal."""
        return cls(
            ops,
            spec,
            rope,
            eps,
            qkv=packer.linear(f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj"),
            q_norm=packer.vector(f"{name}.{cls.norm_names[0]}.weight") if qk_norm else None,
            k_norm=packer.vector(f"{name}.{cls.norm_names[1]}.weight") if qk_norm else None,
            o=packer.linear(f"{name}.{cls.output_name}"),
        )

    def mix(self, batch: Any, layer: int, x: Array) -> Array:
        """What each token takes from those before it: (T, H) to (T, num_heads * head_dim). Stores keys and values."""
        qkv = self._rotated(batch, self._normed(self.ops.linear(batch, x, self.qkv)))
        return self.ops.attend(batch, layer, qkv, self.spec)

    def _normed(self, qkv: Array) -> Array:
        if self.q_norm is None:
            return qkv
        return self.ops.head_norm(qkv, self.spec, self.q_norm, self.k_norm, self.eps)

    def _rotated(self, batch: Any, qkv: Array) -> Array:
        return qkv if self.rope is None else self.ops.rope(batch, qkv, self.spec, self.rope)

    def output(self, batch: Any, mixed: Array, residual: Array | None = None) -> Array:
        """What `mix` returned, projected, and added where there is a residual: (T, H)."""
        return self.ops.linear(batch, mixed, self.o, residual=residual)


class Mixer(Protocol):
    """What gives each token something of those before it."""

    def mix(self, batch: Any, layer: int, x: Array) -> Array:
        """(T, H) to (T, F). Stores what the layer keeps."""
        ...

    def output(self, batch: Any, mixed: Array, residual: Array | None = None) -> Array:
        """What `mix` returned, projected, and added where there is a residual: (T, H)."""
        ...


class MLP(Protocol):
    """What computes each token on its own."""

    def output(self, batch: Any, x: Array, residual: Array | None = None) -> Array:
        """(T, H), the residual added where there is one."""
        ...


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(activation(gate x) * up x) of one layer.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.
    """

    module: ClassVar[str] = "mlp"
    """What a layer calls it, in folders."""

    names: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    """Of its own modules, in folders."""

    activation: ClassVar[Activation] = "silu"

    ops: Ops
    gate_up: Weight
    down: Weight

    @classmethod
    def tensors(cls, name: str, gguf: str, *, hidden_size: int, width: int, bias: bool) -> Tensors:
        """name: of the module, as `model.layers.0.mlp`; gguf: of the block, as `blk.0`."""
        gate, up, down = cls.names
        what = "columns of wide layers"
        made, summed = Split(ROWS, width, what), Split(COLUMNS, width, what)
        return {
            **linear_tensors(f"{name}.{gate}", f"{gguf}.ffn_gate", (width, hidden_size), made, bias=bias),
            **linear_tensors(f"{name}.{up}", f"{gguf}.ffn_up", (width, hidden_size), made, bias=bias),
            **linear_tensors(f"{name}.{down}", f"{gguf}.ffn_down", (hidden_size, width), summed, bias=bias),
        }

    @classmethod
    def load(cls, packer: Packer, name: str, ops: Ops) -> GatedMLP:
        gate, up, down = (f"{name}.{module}" for module in cls.names)
        return cls(ops, packer.gated(gate, up, cls.activation), packer.linear(down))

    def output(self, batch: Any, x: Array, residual: Array | None = None) -> Array:
        """(T, H), the residual added where there is one."""
        gated = self.ops.gated_linear(batch, x, self.gate_up)
        return self.ops.linear(batch, gated, self.down, residual=residual)
