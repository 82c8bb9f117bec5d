"""gpt-oss: experts in every layer, windows in every other, and a sink in each head.

Owns its configuration and names. Experts have biases and a clamped gate; folders have those of a layer in two tensors,
the rows of gate and up projection in turn. The router's softmax is over the chosen experts alone.

Sources: gpt-oss model card, arXiv 2508.10925, and the model's code in Transformers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from mooli.backends.base import Activation, Array, AttentionSpec, Ops, RopeSpec, Weight
from mooli.errors import UnsupportedModelError
from mooli.models import llama, rope
from mooli.models.config import ROWS, Split, TensorSpec
from mooli.models.experts import Experts, SparseMLP
from mooli.models.family import Family
from mooli.models.fields import GGUFSource, HFSource, short
from mooli.models.layer_kinds import named_windows, windows_but_every
from mooli.models.layers import Attention, Tensors
from mooli.models.llama import LlamaConfig
from mooli.models.packer import Packer
from mooli.models.stacks import Stacked

_NORMS = (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "post_attention_norm"))

_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""Of a config.json that says nothing."""

_LIMIT, _ALPHA = 7.0, 1.702
"""The numbers of `clamped_swiglu`."""


@dataclass(frozen=True, slots=True)
class SinkAttention(Attention):
    """Attention in which each head sees something first that has a score of its own, and no value."""

    sinks: Weight = None

    @classmethod
    def tensors(cls, name: str, gguf: str, *, num_heads: int, **sizes: Any) -> Tensors:
        heads = Split(ROWS, num_heads, "attention heads")
        sinks = {f"{name}.sinks": TensorSpec((num_heads,), f"{gguf}.attn_sinks.weight", heads)}
        return Attention.tensors(name, gguf, num_heads=num_heads, **sizes) | sinks

    @classmethod
    def load(
        cls,
        packer: Packer,
        name: str,
        ops: Ops,
        spec: AttentionSpec,
        rope: RopeSpec | None,
        eps: float,
        *,
        qk_norm: bool,
    ) -> SinkAttention:
        plain = Attention.load(packer, name, ops, spec, rope, eps, qk_norm=qk_norm)
        parts = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        return cls(**parts, sinks=packer.vector(f"{name}.sinks"))

    def mix(self, batch: Any, layer: int, x: Array) -> Array:
        qkv = self._rotated(batch, self._normed(self.ops.linear(batch, x, self.qkv)))
        return self.ops.attend(batch, layer, qkv, self.spec, self.sinks)


class GptOssExperts(SparseMLP):
    """Other names, and stacks of another order."""

    __slots__ = ()
    router_name: ClassVar[str] = "router"
    has_bias: ClassVar[bool] = True
    activation: ClassVar[Activation] = "clamped_swiglu"

    @classmethod
    def hf_stacks(cls, name: str, kind: str, part: int, expert: int, num_experts: int) -> tuple[Stacked, ...]:
        if part == 2:
            whole, where = f"{name}.down_proj", Stacked("", expert, num_experts)
        else:
            whole, where = f"{name}.gate_up_proj", Stacked("", expert, num_experts, part, 2, interleaved=True)
        if kind == "bias":
            return (dataclasses.replace(where, name=f"{whole}_bias"),)
        # In MXFP4 they are (outputs, inputs), otherwise the other way about.
        in_four_bits = dataclasses.replace(where, name=f"{whole}_blocks")
        return dataclasses.replace(where, name=whole, is_transposed=True), in_four_bits


def _experts(**numbers: Any) -> Experts:
    return Experts(kind=GptOssExperts, score="chosen_softmax", **numbers)


def _hf(source: HFSource) -> LlamaConfig:
    fields, values = source.fields, source.values
    common = source.common(max_position_embeddings=131072)
    for name, expected in (("swiglu_limit", _LIMIT), ("swiglu_alpha", _ALPHA)):
        if fields.number(name, expected) != expected:
            raise UnsupportedModelError(f"{name} {short(values[name])} is not implemented; gpt-oss has {expected}")
    if not values.get("rope_parameters") and not values.get("rope_scaling"):
        values = {**values, "rope_parameters": _ROPE}
    theta, scaling = rope.hf_rope({"rope_theta": 150000.0, **values})
    bias, kinds = fields.flag("attention_bias", True), source.values.get("layer_types")
    window = fields.optional_integer("sliding_window", 128) or 0  # null: layers that have one see all
    own: dict[str, Any] = {
        "head_dim": fields.integer("head_dim", 64),
        "num_kv_heads": fields.optional_integer("num_key_value_heads", 8) or fields.integer("num_attention_heads"),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-5),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "qkv_bias": bias,
        "o_bias": bias,
        "windows": windows_but_every(2, window, common["num_layers"])
        if kinds is None
        else named_windows(kinds, window),
        "experts": _experts(
            num_experts=fields.optional_integer("num_experts") or fields.integer("num_local_experts", 128),
            top_k=fields.optional_integer("num_experts_per_tok") or fields.integer("experts_per_token", 4),
            width=fields.integer("intermediate_size"),
        ),
    }
    return LlamaConfig(**llama.read_hf(source, common, **own), attention=SinkAttention, norm_names=_NORMS)


def _gguf(source: GGUFSource) -> LlamaConfig:
    fields = source.fields
    alike = llama.read_gguf(source, has_experts=True, has_window=True)
    window, scaling = alike["sliding_window"] or 0, alike["rope_scaling"]
    if scaling is not None and scaling.type == "yarn":
        scaling = dataclasses.replace(scaling, truncate=False)  # which files cannot say
    experts = _experts(
        num_experts=fields.integer("expert_count"),
        top_k=fields.integer("expert_used_count"),
        width=fields.integer("expert_feed_forward_length"),
    )
    own: dict[str, Any] = {
        "sliding_window": None,
        "windows": windows_but_every(2, window, alike["num_layers"]),
        "rope_scaling": scaling,
    }
    return LlamaConfig(**alike | own, attention=SinkAttention, experts=experts, norm_names=_NORMS)


GPT_OSS = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    gguf=("gpt-oss",),
    hf_keys=llama.HF_KEYS
    | {
        *("swiglu_limit", "swiglu_alpha", "attention_bias", "layer_types", "sliding_window", "num_experts"),
        *("num_local_experts", "num_experts_per_tok", "experts_per_token"),
    },
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf,
    read_gguf=_gguf,
)
