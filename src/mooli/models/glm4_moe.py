"""GLM-4.5 to 4.7: experts that a sigmoid chooses, with a correction that only chooses.

Owns their configuration and names. The first layers are dense; in the others an MLP stands beside the experts. The
first half of each head is rotated. Layers that guess tokens ahead stand behind the others in files, and are left out.

Source: GLM-4.5, arXiv 2508.06471, and the model's code in Transformers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mooli.models import llama, rope
from mooli.models.deepseek import SUM_EPS, DeepseekExperts
from mooli.models.experts import Experts
from mooli.models.family import Family
from mooli.models.fields import GGUFSource, HFSource, check_range, equal_heads
from mooli.models.layer_kinds import first_layers
from mooli.models.llama import LlamaConfig

_ROTATED = 0.5
"""Which part of a head, where a config.json says nothing."""

_NORMS = (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "post_attention_norm"))


def _experts(**numbers: Any) -> Experts:
    return Experts(kind=DeepseekExperts, correction=True, score="sigmoid", eps=SUM_EPS, **numbers)


def _hf(source: HFSource) -> LlamaConfig:
    fields = source.fields
    common = source.common(max_position_embeddings=131072)
    partial, values = rope.without_partial(source.values, _ROTATED)
    heads = fields.integer("num_attention_heads")
    head_dim = fields.optional_integer("head_dim") or equal_heads(common["hidden_size"], heads)
    width = fields.integer("moe_intermediate_size", 1408)
    experts = _experts(
        num_experts=fields.integer("n_routed_experts", 128),
        top_k=fields.integer("num_experts_per_tok", 8),
        width=width,
        shared_width=width * fields.integer("n_shared_experts", 1),
        dense_layers=first_layers(fields.integer("first_k_dense_replace", 1), common["num_layers"]),
        normalise=fields.flag("norm_topk_prob", True),
        groups=fields.integer("n_group", 1),
        kept_groups=fields.integer("topk_group", 1),
        factor=fields.number("routed_scaling_factor", 1.0),
    )
    own: dict[str, Any] = {
        "head_dim": head_dim,
        "num_kv_heads": fields.optional_integer("num_key_value_heads", 8) or heads,
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-5),
        "rotary_dim": rope.rotary_dim(head_dim, partial),
        "qkv_bias": fields.flag("attention_bias"),
        "qk_norm": fields.flag("use_qk_norm"),
        "experts": experts,
        "norm_names": _NORMS,
        "num_extra_blocks": fields.integer("num_nextn_predict_layers", 1),
    }
    return LlamaConfig(**llama.read_hf(dataclasses.replace(source, values=values), common, **own))


def _gguf(source: GGUFSource) -> LlamaConfig:
    fields = source.fields
    alike = llama.read_gguf(source, has_experts=True, is_partial=True)
    extra = fields.integer("nextn_predict_layers", 0)
    check_range("layers that guess ahead", extra, 0, alike["num_layers"] - 1)
    num_layers, width = alike["num_layers"] - extra, fields.integer("expert_feed_forward_length")
    experts = _experts(
        num_experts=fields.integer("expert_count"),
        top_k=fields.integer("expert_used_count"),
        width=width,
        shared_width=width * fields.integer("expert_shared_count", 0),
        dense_layers=first_layers(fields.integer("leading_dense_block_count", 0), num_layers),
        normalise=fields.flag("expert_weights_norm", True),
        groups=fields.integer("expert_group_count", 1),
        kept_groups=fields.integer("expert_group_used_count", 1),
        factor=fields.number("expert_weights_scale", 1.0),
    )
    own = {"num_layers": num_layers, "num_extra_blocks": extra, "norm_names": _NORMS, "experts": experts}
    return LlamaConfig(**alike | own)


GLM4_MOE = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    gguf=("glm4moe",),
    hf_keys=llama.HF_KEYS
    | {
        *("attention_bias", "use_qk_norm", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
        *("n_shared_experts", "first_k_dense_replace", "norm_topk_prob", "n_group", "topk_group"),
        *("routed_scaling_factor", "num_nextn_predict_layers"),
    },
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf,
    read_gguf=_gguf,
)
