"""Llama's decoder with a mixture of experts in the place of its MLP: Qwen3-MoE, Qwen2-MoE, Mixtral.

Owns how their configuration is read: how many experts, how they are chosen, which layers have none, and what is shared.

Sources: Qwen3, arXiv 2505.09388; Qwen2, arXiv 2407.10671; Mixtral, arXiv 2401.04088.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models import llama
from mooli.models.experts import Experts, SparseMLP
from mooli.models.family import Family
from mooli.models.fields import Fields, GGUFSource, HFSource, check_range, short
from mooli.models.layer_kinds import MAX_LAYERS
from mooli.models.layers import PAIRS_IN_GGUF
from mooli.models.llama import LlamaConfig


class MixtralExperts(SparseMLP):
    """Other names."""

    __slots__ = ()
    module: ClassVar[str] = "block_sparse_moe"
    names: ClassVar[tuple[str, str, str]] = ("w1", "w3", "w2")


def dense_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Of Qwen's: those listed, and those that are no multiple of the step."""
    check_range("num_layers", num_layers, 1, 1024)
    step = fields.integer("decoder_sparse_step", 1)
    check_range("decoder_sparse_step", step, 1, 1024)
    listed = fields.values.get("mlp_only_layers") or []
    if not isinstance(listed, list) or any(type(layer) is not int for layer in listed):
        raise CheckpointError(f"config.json: mlp_only_layers must be a list of layers, got {short(listed)}")
    return tuple(layer for layer in range(num_layers) if layer in listed or (layer + 1) % step)


def _hf_qwen(
    source: HFSource, *, num_experts: int, top_k: int, width: int, shared_width: int, **own: Any
) -> LlamaConfig:
    """What both versions of Qwen read alike. num_experts .. width: where nothing is said."""
    fields = source.fields
    if fields.flag("use_sliding_window"):
        raise UnsupportedModelError(f"a sliding window is not implemented for {source.family} models")
    common = source.common(max_position_embeddings=32768)
    experts = Experts(
        num_experts=fields.optional_integer("num_experts") or fields.integer("num_local_experts", num_experts),
        top_k=fields.integer("num_experts_per_tok", top_k),
        width=fields.integer("moe_intermediate_size", width),
        shared_width=shared_width,
        dense_layers=dense_layers(fields, common["num_layers"]),
        normalise=fields.flag("norm_topk_prob"),
    )
    return LlamaConfig(**llama.read_hf(source, common, experts=experts, **own))


def _hf_qwen3(source: HFSource) -> LlamaConfig:
    fields, bias = source.fields, source.fields.flag("attention_bias")
    kv_heads = fields.optional_integer("num_key_value_heads", 4) or fields.integer("num_attention_heads")
    own: dict[str, Any] = {"num_kv_heads": kv_heads, "qkv_bias": bias, "o_bias": bias, "qk_norm": True}
    return _hf_qwen(source, num_experts=128, top_k=8, width=768, shared_width=0, **own)


def _hf_qwen2(source: HFSource) -> LlamaConfig:
    fields = source.fields
    kv_heads = fields.optional_integer("num_key_value_heads", 16) or fields.integer("num_attention_heads")
    shared_width = fields.integer("shared_expert_intermediate_size", 5632)
    own: dict[str, Any] = {"num_kv_heads": kv_heads, "qkv_bias": fields.flag("qkv_bias", True)}
    return _hf_qwen(source, num_experts=60, top_k=4, width=1408, shared_width=shared_width, **own)


def _hf_mixtral(source: HFSource) -> LlamaConfig:
    fields = source.fields
    common = source.common(max_position_embeddings=131072, bos_id=1, eos_id=2)
    experts = Experts(
        kind=MixtralExperts,
        num_experts=fields.optional_integer("num_experts") or fields.integer("num_local_experts", 8),
        top_k=fields.integer("num_experts_per_tok", 2),
        width=fields.integer("intermediate_size"),
        normalise=True,
    )
    own: dict[str, Any] = {
        "num_kv_heads": fields.optional_integer("num_key_value_heads", 8) or fields.integer("num_attention_heads"),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-5),
        "sliding_window": fields.optional_integer("sliding_window"),
        "experts": experts,
        "pairs": PAIRS_IN_GGUF,
    }
    return LlamaConfig(**llama.read_hf(source, common, **own))


def _gguf_qwen3(source: GGUFSource) -> LlamaConfig:
    return LlamaConfig(**read_gguf(source, normalise=True))


def _gguf_qwen2(source: GGUFSource) -> LlamaConfig:
    shared = source.shapes.get("blk.0.ffn_up_shexp.weight", (0,))[0]
    return LlamaConfig(**read_gguf(source, normalise=False, shared_width=int(shared)))


def _gguf_mixtral(source: GGUFSource) -> LlamaConfig:
    return LlamaConfig(**read_gguf(source, normalise=True, kind=MixtralExperts), pairs=PAIRS_IN_GGUF)


def read_gguf(source: GGUFSource, *, normalise: bool, **own: Any) -> dict[str, Any]:
    """Most files do not say whether weights are normalised; which layers have no experts is seen by their tensors. own:
    of the experts."""
    fields, shapes = source.fields, source.shapes
    alike = llama.read_gguf(source, has_experts=True)
    layers = range(min(alike["num_layers"], MAX_LAYERS))
    experts = Experts(
        num_experts=fields.integer("expert_count"),
        top_k=fields.integer("expert_used_count"),
        width=fields.integer("expert_feed_forward_length", alike["intermediate_size"]),
        dense_layers=tuple(layer for layer in layers if f"blk.{layer}.ffn_gate_inp.weight" not in shapes),
        normalise=fields.flag("expert_weights_norm", normalise),
        **own,
    )
    return {**alike, "experts": experts}


_ROUTER_KEYS = frozenset(("num_experts", "num_local_experts", "num_experts_per_tok"))
_QWEN_KEYS = _ROUTER_KEYS | {
    *("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "use_sliding_window"),
}

QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    gguf=("qwen3moe",),
    hf_keys=llama.HF_KEYS | _QWEN_KEYS | {"attention_bias"},
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf_qwen3,
    read_gguf=_gguf_qwen3,
)
QWEN2_MOE = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    gguf=("qwen2moe",),
    hf_keys=llama.HF_KEYS | _QWEN_KEYS | {"qkv_bias", "shared_expert_intermediate_size"},
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf_qwen2,
    read_gguf=_gguf_qwen2,
)
MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    gguf=("llama",),  # with experts
    gguf_with="expert_count",
    hf_keys=llama.HF_KEYS | _ROUTER_KEYS | {"sliding_window"},
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf_mixtral,
    read_gguf=_gguf_mixtral,
)
