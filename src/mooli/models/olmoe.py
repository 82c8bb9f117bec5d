"""OLMoE: Llama's order with experts in every layer, and norms of queries and keys over all heads together.

Owns how its configuration is read. Experts are as wide as an MLP would be.

Source: OLMoE, arXiv 2409.02060.
"""

from __future__ import annotations

from mooli.errors import UnsupportedModelError
from mooli.models import llama
from mooli.models.experts import Experts
from mooli.models.family import Family
from mooli.models.fields import GGUFSource, HFSource
from mooli.models.llama import LlamaConfig
from mooli.models.olmo import OlmoAttention
from mooli.models.qwen_moe import read_gguf


def _hf(source: HFSource) -> LlamaConfig:
    fields, bias = source.fields, source.fields.flag("attention_bias")
    if source.values.get("clip_qkv") is not None:
        raise UnsupportedModelError(
            f"clipped queries, keys and values (clip_qkv) are not implemented for {source.family}"
        )
    common = source.common(max_position_embeddings=4096, eos_id=50279)
    experts = Experts(
        num_experts=fields.optional_integer("num_experts") or fields.integer("num_local_experts", 64),
        top_k=fields.integer("num_experts_per_tok", 8),
        width=fields.integer("intermediate_size"),
        normalise=fields.flag("norm_topk_prob"),
    )
    alike = llama.read_hf(source, common, qkv_bias=bias, o_bias=bias, rms_norm_eps=fields.number("rms_norm_eps", 1e-5))
    return LlamaConfig(**alike, attention=OlmoAttention, qk_norm=True, experts=experts)


def _gguf(source: GGUFSource) -> LlamaConfig:
    return LlamaConfig(**read_gguf(source, normalise=False), attention=OlmoAttention)


OLMOE = Family(
    name="olmoe",
    architectures=("OlmoeForCausalLM",),
    gguf=("olmoe",),
    hf_keys=llama.HF_KEYS
    | {"attention_bias", "clip_qkv", "num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob"},
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf,
    read_gguf=_gguf,
)
