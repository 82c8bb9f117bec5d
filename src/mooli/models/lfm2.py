"""LFM2: gated short convolutions in most layers, grouped-query attention in the others.

Owns its configuration and names. A convolution keeps the last two columns of its inputs of each sequence and nothing of
its tokens, so that most layers have no cache that grows.

Source: LFM2 technical report, arXiv 2511.23404, and the model's code in Transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mooli.backends.base import Array, CacheLayer, Ops, PagedLayer, StateLayer, Weight
from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models import llama, rope
from mooli.models.config import TensorSpec
from mooli.models.family import Family
from mooli.models.fields import Fields, GGUFSource, HFSource, check_range, equal_heads, short
from mooli.models.layers import MLP, Attention, GatedMLP, Tensors, norm_tensors, vocabulary_tensors
from mooli.models.packer import Packer

ATTENTION, CONVOLUTION = "full_attention", "conv"


@dataclass(frozen=True, slots=True)
class LFM2Attention(Attention):
    """Norms of queries and keys, and other names."""

    norm_names: ClassVar[tuple[str, str]] = ("q_layernorm", "k_layernorm")
    output_name: ClassVar[str] = "out_proj"


@dataclass(frozen=True, slots=True)
class LFM2MLP(GatedMLP):
    """Other names."""

    names: ClassVar[tuple[str, str, str]] = ("w1", "w3", "w2")


@dataclass(frozen=True, slots=True)
class ShortConv:
    """W_out (c * conv(b * u)), where [b | c | u] = W_in x."""

    ops: Ops
    into: Weight
    conv: Weight
    out: Weight

    @staticmethod
    def tensors(name: str, gguf: str, hidden_size: int, num_columns: int, *, bias: bool) -> Tensors:
        tensors: Tensors = {}
        for part, shape in (
            ("conv", (hidden_size, num_columns)),
            ("in_proj", (3 * hidden_size, hidden_size)),
            ("out_proj", (hidden_size, hidden_size)),
        ):
            tensors[f"{name}.{part}.weight"] = TensorSpec(shape, f"{gguf}.shortconv.{part}.weight")
            if bias:
                tensors[f"{name}.{part}.bias"] = TensorSpec(shape[:1], f"{gguf}.shortconv.{part}.bias")
        return tensors

    @classmethod
    def load(cls, packer: Packer, name: str, ops: Ops) -> ShortConv:
        into = packer.linear(f"{name}.in_proj")
        return cls(ops, into, packer.conv(f"{name}.conv"), packer.linear(f"{name}.out_proj"))

    def mix(self, batch: Any, layer: int, x: Array) -> Array:
        """What each token takes from itself and the few before it: (T, H)."""
        return self.ops.short_conv(batch, layer, self.ops.linear(batch, x, self.into), self.conv)

    def output(self, batch: Any, mixed: Array, residual: Array | None = None) -> Array:
        return self.ops.linear(batch, mixed, self.out, residual=residual)


@dataclass(frozen=True, slots=True, kw_only=True)
class LFM2Config(llama.LlamaConfig):
    """Of a decoder of the family. attends: of each layer, whether it is attention. num_columns: of convolutions.
    CheckpointError for a number out of its bounds."""

    attends: tuple[bool, ...] = ()
    num_columns: int = 3
    conv_bias: bool = False

    def __post_init__(self) -> None:
        llama.LlamaConfig.__post_init__(self)
        check_range("conv_L_cache", self.num_columns, 2, 16)
        if len(self.attends) != self.num_layers or not any(self.attends):
            raise CheckpointError(
                f"{sum(self.attends)} of {len(self.attends)} layers are attention; there must be {self.num_layers}"
                " layers, and one with attention"
            )

    def tensors(self) -> dict[str, TensorSpec]:
        hidden = self.hidden_size
        tensors = vocabulary_tensors("model.embed_tokens", "token_embd", self.vocab_size, hidden)
        for layer, attends in enumerate(self.attends):
            name, gguf = f"model.layers.{layer}", f"blk.{layer}"
            tensors |= norm_tensors(f"{name}.operator_norm", f"{gguf}.attn_norm", hidden)
            if attends:
                tensors |= LFM2Attention.tensors(
                    f"{name}.self_attn",
                    gguf,
                    hidden_size=hidden,
                    num_heads=self.num_heads,
                    num_kv_heads=self.num_kv_heads,
                    head_dim=self.head_dim,
                    qkv_bias=False,
                    o_bias=False,
                    qk_norm=True,
                    pairs=self.pairs,
                )
            else:
                tensors |= ShortConv.tensors(f"{name}.conv", gguf, hidden, self.num_columns, bias=self.conv_bias)
            tensors |= norm_tensors(f"{name}.ffn_norm", f"{gguf}.ffn_norm", hidden)
            tensors |= self.mlp_tensors(layer, name, gguf)
        tensors |= norm_tensors("model.embedding_norm", "token_embd_norm", hidden)
        if not self.tie_word_embeddings:
            tensors |= vocabulary_tensors("lm_head", "output", self.vocab_size, hidden)
        return tensors

    def mlp_tensors(self, layer: int, name: str, gguf: str) -> Tensors:
        return LFM2MLP.tensors(
            f"{name}.feed_forward", gguf, hidden_size=self.hidden_size, width=self.intermediate_size, bias=False
        )

    def cache_layers(self) -> tuple[CacheLayer, ...]:
        paged = PagedLayer(self.num_kv_heads, self.head_dim)
        state = StateLayer((self.num_columns - 1, self.hidden_size))
        return tuple(paged if attends else state for attends in self.attends)


@dataclass(frozen=True, slots=True)
class LFM2Layer:
    """One decoder layer."""

    operator_norm: Weight
    operator: LFM2Attention | ShortConv
    ffn_norm: Weight
    mlp: MLP


class LFM2Model:
    """T tokens in a step, H hidden size."""

    def __init__(self, config: LFM2Config, ops: Ops, packer: Packer) -> None:
        self.config = config
        self._ops = ops
        spec = llama.attention_spec(config, scale=config.head_dim**-0.5)
        rotary = rope.rope_spec(config.head_dim, config.rope_theta, config.rope_scaling)
        self._embedding, self._head = llama.load_vocabulary(config, packer)
        self._layers = []
        for index, attends in enumerate(config.attends):
            name = f"model.layers.{index}"
            operator_norm = packer.vector(f"{name}.operator_norm.weight")
            operator: LFM2Attention | ShortConv
            if attends:
                operator = LFM2Attention.load(
                    packer, f"{name}.self_attn", ops, spec, rotary, config.rms_norm_eps, qk_norm=True
                )
            else:
                operator = ShortConv.load(packer, f"{name}.conv", ops)
            ffn_norm = packer.vector(f"{name}.ffn_norm.weight")
            mlp = self.load_mlp(packer, index, f"{name}.feed_forward")
            self._layers.append(LFM2Layer(operator_norm, operator, ffn_norm, mlp))
        self._norm = packer.vector("model.embedding_norm.weight")

    def load_mlp(self, packer: Packer, layer: int, name: str) -> MLP:
        """Of layer `layer`; name: its own."""
        return LFM2MLP.load(packer, name, self._ops)

    def forward(self, batch: Any) -> Array:
        """The hidden states (T, H) of a planned step, before the final norm, of asked tokens. Stores the KV of all, and
        the states."""
        ops, eps = self._ops, self.config.rms_norm_eps
        hidden = ops.embed(batch, self._embedding)
        for index, layer in enumerate(self._layers):
            mixed = layer.operator.mix(batch, index, ops.rms_norm(hidden, layer.operator_norm, eps))
            if index + 1 == len(self._layers):
                mixed, hidden = ops.asked_rows(batch, mixed), ops.asked_rows(batch, hidden)
            hidden = layer.operator.output(batch, mixed, residual=hidden)
            hidden = layer.mlp.output(batch, ops.rms_norm(hidden, layer.ffn_norm, eps), residual=hidden)
        return hidden

    def logits(self, batch: Any, hidden: Array) -> Array:
        """The logits (S, vocab_size) of rows of hidden states (S, H), as `forward` returned them, and their batch."""
        return self._ops.linear(batch, self._ops.rms_norm(hidden, self._norm, self.config.rms_norm_eps), self._head)


def _hf(source: HFSource) -> LFM2Config:
    return LFM2Config(**read_hf(source), intermediate_size=_width(source.fields))


def read_hf(source: HFSource) -> dict[str, Any]:
    """What dense models and those with experts read alike."""
    fields, values = source.fields, source.values
    common = source.common(max_position_embeddings=128_000, bos_id=1, eos_id=2)
    num_layers, num_heads = common["num_layers"], fields.integer("num_attention_heads")
    theta, scaling = rope.hf_rope({"rope_theta": 1e6, **values})
    return {
        **common,
        "num_heads": num_heads,
        "num_kv_heads": fields.optional_integer("num_key_value_heads") or num_heads,
        "head_dim": fields.optional_integer("head_dim") or equal_heads(common["hidden_size"], num_heads),
        "rms_norm_eps": fields.number("norm_eps", 1e-5),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": fields.flag("tie_embedding", fields.flag("tie_word_embeddings", True)),
        "qk_norm": True,
        "attends": _attends(fields, num_layers),
        "num_columns": fields.integer("conv_L_cache", 3),
        "conv_bias": fields.flag("conv_bias"),
    }


def _width(fields: Fields) -> int:
    """Of the MLP: the files of the first models say what to compute it of."""
    width = fields.optional_integer("block_ff_dim") or fields.integer("intermediate_size", 12288)
    if not fields.flag("block_auto_adjust_ff_dim", True):
        return width
    multiple = fields.integer("block_multiple_of", 256)
    check_range("block_multiple_of", multiple, 1, 2**20)
    check_range("intermediate_size", width, 1, 2**22)
    wanted = int(fields.number("block_ffn_dim_multiplier", 1.0) * (2 * width // 3))
    return -(-wanted // multiple) * multiple


def _attends(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    kinds, indices = fields.values.get("layer_types"), fields.values.get("full_attn_idxs")
    if kinds is None:
        if indices is not None and not isinstance(indices, list):
            raise CheckpointError(f"config.json: full_attn_idxs must be a list of numbers, got {short(indices)}")
        check_range("num_layers", num_layers, 1, 1024)
        return tuple(indices is None or index in indices for index in range(num_layers))
    if not isinstance(kinds, list) or any(kind not in (ATTENTION, CONVOLUTION) for kind in kinds):
        raise CheckpointError(
            f"config.json: layer_types must be a list of {ATTENTION} and {CONVOLUTION}, got {short(kinds)}"
        )
    return tuple(kind == ATTENTION for kind in kinds)


def _gguf(source: GGUFSource) -> LFM2Config:
    return LFM2Config(**read_gguf(source))


def read_gguf(source: GGUFSource) -> dict[str, Any]:
    """The same of GGUF metadata."""
    fields, shapes = source.fields, source.shapes
    common = source.common()
    num_heads = fields.per_layer("attention.head_count")
    kv_heads = fields.values.get(f"{fields.prefix}attention.head_count_kv", num_heads)
    counts = set(np.atleast_1d(np.asarray(kv_heads)).tolist()) - {0}  # of a convolution
    if len(counts) != 1 or not all(isinstance(count, int) for count in counts):
        raise UnsupportedModelError(f"layers with different numbers of key and value heads: {short(kv_heads)}")
    if fields.values.get(f"{fields.prefix}rope.scaling.type", "none") not in ("none", "linear"):
        raise UnsupportedModelError("rope scaling is not implemented for lfm2 GGUF files")
    changed = source.overridden(
        {
            "rope_theta": fields.number("rope.freq_base", 1e6),
            "norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        }
    )
    return {
        **common,
        "intermediate_size": fields.per_layer("feed_forward_length"),
        "num_heads": num_heads,
        "num_kv_heads": counts.pop(),
        "head_dim": fields.optional_integer("attention.key_length") or equal_heads(common["hidden_size"], num_heads),
        "rms_norm_eps": changed.number("norm_eps"),
        "rope_theta": changed.number("rope_theta"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "qk_norm": True,
        "attends": tuple(f"blk.{index}.attn_q.weight" in shapes for index in range(min(common["num_layers"], 1024))),
        "num_columns": fields.integer("shortconv.l_cache"),
    }


HF_KEYS = rope.HF_KEYS | frozenset(
    (
        *("num_attention_heads", "num_key_value_heads", "head_dim", "norm_eps", "intermediate_size"),
        *("tie_embedding", "tie_word_embeddings", "layer_types", "full_attn_idxs", "conv_L_cache", "conv_bias"),
    )
)
GGUF_KEYS = frozenset(("rope_theta", "norm_eps"))

LFM2 = Family(
    name="lfm2",
    architectures=("Lfm2ForCausalLM",),
    gguf=("lfm2",),
    hf_keys=HF_KEYS | {"block_ff_dim", "block_auto_adjust_ff_dim", "block_multiple_of", "block_ffn_dim_multiplier"},
    gguf_keys=GGUF_KEYS,
    read_hf=_hf,
    read_gguf=_gguf,
    model=LFM2Model,
)
