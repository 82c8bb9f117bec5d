"""HunYuan, dense and with experts: Llama's layers, but queries and keys are normed after they are rotated.

Owns that order and the names of norms and experts. A long context is reached by a larger rotary base, which `alpha`
gives. Beside the experts of each layer stands an MLP of the same width.

Source: the HunYuan models' configuration and code in Transformers; NTK-aware scaling; Hunyuan-Large, arXiv 2411.02265.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mooli.backends.base import Array
from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models import llama
from mooli.models.experts import Experts, SparseMLP
from mooli.models.family import Family
from mooli.models.fields import Fields, GGUFSource, HFSource, check_range, equal_heads, short
from mooli.models.layers import Attention
from mooli.models.llama import LlamaConfig


@dataclass(frozen=True, slots=True)
class HunyuanAttention(Attention):
    """Rotates first: a norm has a gain for each dimension, so the order matters."""

    norm_names: ClassVar[tuple[str, str]] = ("query_layernorm", "key_layernorm")

    def mix(self, batch: Any, layer: int, x: Array) -> Array:
        qkv = self._normed(self._rotated(batch, self.ops.linear(batch, x, self.qkv)))
        return self.ops.attend(batch, layer, qkv, self.spec)


class HunyuanExperts(SparseMLP):
    """Other names, and an MLP of every token without a gate."""

    __slots__ = ()
    router_name: ClassVar[str] = "gate.wg"
    shared_name: ClassVar[str] = "mlp.shared_mlp"
    shared_has_gate: ClassVar[bool] = False


def _hf(source: HFSource) -> LlamaConfig:
    return LlamaConfig(**_read_hf(source))


def _hf_moe(source: HFSource) -> LlamaConfig:
    fields, values = source.fields, source.values
    width = fields.integer("intermediate_size")
    for name, expected in (("moe_intermediate_size", width), ("num_shared_expert", 1)):
        if _of_all_layers(values.get(name), name, expected) != expected:
            raise UnsupportedModelError(f"{name} {short(values[name])} is not implemented for HunYuan: {expected} is")
    if not fields.flag("norm_topk_prob", True):
        raise UnsupportedModelError("norm_topk_prob=false is not implemented for HunYuan")
    experts = Experts(
        kind=HunyuanExperts,
        num_experts=_of_all_layers(values.get("num_experts"), "num_experts", 1),
        top_k=_of_all_layers(values.get("moe_topk", values.get("num_experts_per_tok")), "moe_topk", 1),
        width=width,
        shared_width=width,
        normalise=True,
    )
    return LlamaConfig(**_read_hf(source), experts=experts)


def _of_all_layers(value: Any, name: str, default: int) -> int:
    """A number, or a list of one for each layer, which must agree. UnsupportedModelError where they do not."""
    entries = value if isinstance(value, list) and value else [value]
    if any(entry != entries[0] for entry in entries):
        raise UnsupportedModelError(f"layers with different {name} are not implemented")
    return Fields({name: entries[0]}, "config.json").integer(name, default) if entries[0] is not None else default


def _read_hf(source: HFSource) -> dict[str, Any]:
    fields, bias = source.fields, source.fields.flag("attention_bias")
    common = source.common(max_position_embeddings=2048, bos_id=1, eos_id=2)
    num_heads = fields.integer("num_attention_heads")
    head_dim = fields.optional_integer("head_dim") or equal_heads(common["hidden_size"], num_heads)
    source = dataclasses.replace(source, values=_with_stretched_base(source.values, head_dim))
    own: dict[str, Any] = {
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-5),
        "head_dim": head_dim,
        "attention": HunyuanAttention,
        "qk_norm": True,
    }
    return llama.read_hf(source, common, qkv_bias=bias, o_bias=bias, **own)


def _with_stretched_base(values: Mapping[str, Any], head_dim: int) -> Mapping[str, Any]:
    """Rope parameters of type "dynamic" with a fixed `alpha` as a base alone, which is what they amount to."""
    for key in ("rope_parameters", "rope_scaling"):
        given = values.get(key)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise CheckpointError(f"config.json: {key} must be an object, got {short(given)}")
        if given.get("rope_type", given.get("type")) == "dynamic" and given.get("alpha"):
            check_range("head_dim", head_dim, 3, 1024)
            alpha = Fields(given, f"config.json: {key}").number("alpha")
            check_range("alpha", alpha, 1e-3, 1e9)
            theta = given.get("rope_theta") or values.get("rope_theta") or 10000.0
            base = Fields({"rope_theta": theta}, "config.json").number("rope_theta") * alpha ** (
                head_dim / (head_dim - 2)
            )
            return {**values, "rope_parameters": None, "rope_scaling": None, "rope_theta": base}
    return values


def _gguf(source: GGUFSource) -> LlamaConfig:
    return LlamaConfig(**llama.read_gguf(source), attention=HunyuanAttention)


def _gguf_moe(source: GGUFSource) -> LlamaConfig:
    fields = source.fields
    alike = llama.read_gguf(source, has_experts=True)
    experts = Experts(
        kind=HunyuanExperts,
        num_experts=fields.integer("expert_count"),
        top_k=fields.integer("expert_used_count"),
        width=fields.optional_integer("expert_feed_forward_length") or alike["intermediate_size"],
        shared_width=fields.integer("expert_shared_feed_forward_length", alike["intermediate_size"]),
        normalise=True,
    )
    return LlamaConfig(**alike, attention=HunyuanAttention, experts=experts)


HUNYUAN = Family(
    name="hunyuan_v1_dense",
    architectures=("HunYuanDenseV1ForCausalLM",),
    gguf=("hunyuan-dense",),
    hf_keys=llama.HF_KEYS | {"attention_bias"},
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf,
    read_gguf=_gguf,
)
HUNYUAN_MOE = Family(
    name="hunyuan_v1_moe",
    architectures=("HunYuanMoEV1ForCausalLM",),
    gguf=("hunyuan-moe",),
    hf_keys=llama.HF_KEYS
    | {
        *("attention_bias", "num_experts", "moe_topk", "num_experts_per_tok", "moe_intermediate_size"),
        *("num_shared_expert", "norm_topk_prob"),
    },
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf_moe,
    read_gguf=_gguf_moe,
)
