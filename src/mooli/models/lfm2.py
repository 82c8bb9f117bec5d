"""LFM2: gated short convolutions in most layers, grouped-query attention in the others; with experts or without.

Owns its configuration and names. With experts, all layers but the first have a mixture in the place of their MLP. A
convolution keeps the last two columns of its inputs of each sequence and nothing of its tokens, so that most layers
have no cache that grows.

Source: LFM2 technical report, arXiv 2511.23404, and the model's code in Transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mooli.backends.base import Array, CacheLayer, Ops, RopeSpec, StateLayer, Weight
from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models import llama, rope
from mooli.models.config import TensorSpec
from mooli.models.decoder import Names
from mooli.models.experts import Experts, SparseMLP
from mooli.models.family import Family
from mooli.models.fields import Fields, GGUFSource, HFSource, check_range, equal_heads, short
from mooli.models.layer_kinds import check_attends, first_layers, gguf_attends, gguf_kv_heads, hf_attends
from mooli.models.layers import Attention, GatedMLP, Mixer, Tensors
from mooli.models.packer import Packer

_SIGMOID = 2
"""How experts are chosen, in GGUF files."""


@dataclass(frozen=True, slots=True)
class LFM2Attention(Attention):
    """Norms of queries and keys, and other names."""

    norm_names: ClassVar[tuple[str, str]] = ("q_layernorm", "k_layernorm")
    output_name: ClassVar[str] = "out_proj"


@dataclass(frozen=True, slots=True)
class LFM2MLP(GatedMLP):
    """Other names."""

    module: ClassVar[str] = "feed_forward"
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


class LFM2Experts(SparseMLP):
    """Other names. A sigmoid chooses, with a correction that only chooses."""

    __slots__ = ()
    module: ClassVar[str] = "feed_forward"
    names: ClassVar[tuple[str, str, str]] = ("w1", "w3", "w2")
    correction_name: ClassVar[str] = "expert_bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class LFM2Config(llama.LlamaConfig):
    """Of a decoder of the family. attends: of each layer, whether it is attention. num_columns: of convolutions.
    CheckpointError for a number out of its bounds."""

    mlp: ClassVar[type[GatedMLP]] = LFM2MLP
    last_norm: ClassVar[Names] = ("embedding_norm", "token_embd_norm")

    norm_names: tuple[Names, ...] = (("operator_norm", "attn_norm"), ("ffn_norm", "ffn_norm"))
    attention: type[Attention] = LFM2Attention
    attends: tuple[bool, ...] = ()
    num_columns: int = 3
    conv_bias: bool = False

    def __post_init__(self) -> None:
        llama.LlamaConfig.__post_init__(self)
        check_range("conv_L_cache", self.num_columns, 2, 16)
        check_attends(self.attends, self.num_layers)

    def mixer_tensors(self, layer: int, name: str, gguf: str) -> Tensors:
        if self.attends[layer]:
            return llama.LlamaConfig.mixer_tensors(self, layer, name, gguf)
        return ShortConv.tensors(f"{name}.conv", gguf, self.hidden_size, self.num_columns, bias=self.conv_bias)

    def load_mixer(self, packer: Packer, ops: Ops, layer: int, name: str, rotation: RopeSpec | None) -> Mixer:
        if self.attends[layer]:
            return llama.LlamaConfig.load_mixer(self, packer, ops, layer, name, rotation)
        return ShortConv.load(packer, f"{name}.conv", ops)

    def cache_layers(self) -> tuple[CacheLayer, ...]:
        state, paged = StateLayer((self.num_columns - 1, self.hidden_size)), llama.LlamaConfig.cache_layers(self)
        return tuple(paged[layer] if attends else state for layer, attends in enumerate(self.attends))


def _hf(source: HFSource) -> LFM2Config:
    return LFM2Config(**_read_hf(source), intermediate_size=_width(source.fields))


def _hf_moe(source: HFSource) -> LFM2Config:
    fields, alike = source.fields, _read_hf(source)
    experts = _experts(
        num_experts=fields.integer("num_experts", 32),
        top_k=fields.integer("num_experts_per_tok", 4),
        width=fields.integer("moe_intermediate_size", 1792),
        dense_layers=first_layers(fields.integer("num_dense_layers", 2), alike["num_layers"]),
        correction=fields.flag("use_expert_bias", True),
        normalise=fields.flag("norm_topk_prob", True),
        factor=fields.number("routed_scaling_factor", 1.0),
    )
    return LFM2Config(**alike, intermediate_size=fields.integer("intermediate_size", 7168), experts=experts)


def _experts(**numbers: Any) -> Experts:
    return Experts(kind=LFM2Experts, score="sigmoid", eps=1e-6, **numbers)


def _read_hf(source: HFSource) -> dict[str, Any]:
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
    if kinds is not None:
        return hf_attends(kinds, ("full_attention",), ("conv",))
    if indices is not None and not isinstance(indices, list):
        raise CheckpointError(f"config.json: full_attn_idxs must be a list of numbers, got {short(indices)}")
    return tuple(indices is None or layer in indices for layer in first_layers(num_layers, num_layers))


def _gguf(source: GGUFSource) -> LFM2Config:
    return LFM2Config(**_read_gguf(source))


def _gguf_moe(source: GGUFSource) -> LFM2Config:
    fields, alike = source.fields, _read_gguf(source)
    gating = fields.integer("expert_gating_func", _SIGMOID)
    if gating != _SIGMOID:
        raise UnsupportedModelError(f"{source.name}.expert_gating_func {gating} is not implemented; {_SIGMOID} is")
    experts = _experts(
        num_experts=fields.integer("expert_count"),
        top_k=fields.integer("expert_used_count"),
        width=fields.integer("expert_feed_forward_length"),
        dense_layers=first_layers(fields.integer("leading_dense_block_count", 0), alike["num_layers"]),
        correction=any(name.endswith("exp_probs_b.bias") for name in source.shapes),
        normalise=True,
        factor=fields.number("expert_weights_scale", 1.0),
    )
    return LFM2Config(**alike, experts=experts)


def _read_gguf(source: GGUFSource) -> dict[str, Any]:
    """The same of GGUF metadata."""
    fields, shapes = source.fields, source.shapes
    common = source.common()
    num_heads = fields.per_layer("attention.head_count")
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
        "num_kv_heads": gguf_kv_heads(fields, num_heads),
        "head_dim": fields.optional_integer("attention.key_length") or equal_heads(common["hidden_size"], num_heads),
        "rms_norm_eps": changed.number("norm_eps"),
        "rope_theta": changed.number("rope_theta"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "qk_norm": True,
        "attends": gguf_attends(source, common["num_layers"]),
        "num_columns": fields.integer("shortconv.l_cache"),
    }


_HF_KEYS = rope.HF_KEYS | frozenset(
    (
        *("num_attention_heads", "num_key_value_heads", "head_dim", "norm_eps", "intermediate_size"),
        *("tie_embedding", "tie_word_embeddings", "layer_types", "full_attn_idxs", "conv_L_cache", "conv_bias"),
    )
)
_GGUF_KEYS = frozenset(("rope_theta", "norm_eps"))

LFM2 = Family(
    name="lfm2",
    architectures=("Lfm2ForCausalLM",),
    gguf=("lfm2",),
    hf_keys=_HF_KEYS | {"block_ff_dim", "block_auto_adjust_ff_dim", "block_multiple_of", "block_ffn_dim_multiplier"},
    gguf_keys=_GGUF_KEYS,
    read_hf=_hf,
    read_gguf=_gguf,
)
LFM2_MOE = Family(
    name="lfm2_moe",
    architectures=("Lfm2MoeForCausalLM",),
    gguf=("lfm2moe",),
    hf_keys=_HF_KEYS
    | {
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_dense_layers", "use_expert_bias"),
        *("norm_topk_prob", "routed_scaling_factor"),
    },
    gguf_keys=_GGUF_KEYS,
    read_hf=_hf_moe,
    read_gguf=_gguf_moe,
)
