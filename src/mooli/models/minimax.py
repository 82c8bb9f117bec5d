"""MiniMax-M2: experts that a sigmoid chooses, and norms of queries and keys over all heads together.

Owns its configuration and names. Only a part of each head is rotated. The correction of the choice stands beside the
router, not in it.

Source: MiniMax-M2's configuration and code in Transformers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from mooli.errors import UnsupportedModelError
from mooli.models import llama, rope
from mooli.models.experts import Experts, SparseMLP
from mooli.models.family import Family
from mooli.models.fields import GGUFSource, HFSource, check_range, short
from mooli.models.llama import LlamaConfig
from mooli.models.olmo import OlmoAttention


class MiniMaxExperts(SparseMLP):
    """Other names."""

    __slots__ = ()
    module: ClassVar[str] = "block_sparse_moe"
    names: ClassVar[tuple[str, str, str]] = ("w1", "w3", "w2")
    correction_name: ClassVar[str] = "e_score_correction_bias"


def _experts(**numbers: Any) -> Experts:
    return Experts(kind=MiniMaxExperts, correction=True, score="sigmoid", normalise=True, **numbers)


def _hf(source: HFSource) -> LlamaConfig:
    fields, values = source.fields, source.values
    for name, usual in (("use_qk_norm", True), ("use_routing_bias", True)):
        if fields.flag(name, usual) is not usual:
            raise UnsupportedModelError(f"{name}=false is not implemented for {source.family} models")
    for name, only in (("qk_norm_type", "per_layer"), ("scoring_func", "sigmoid")):
        if values.get(name, only) != only:
            raise UnsupportedModelError(
                f"{name} {short(values[name])} is not implemented for {source.family}: {only} is"
            )
    common = source.common(max_position_embeddings=196608, bos_id=200034, eos_id=200020)
    head_dim = fields.integer("head_dim", 128)
    check_range("head_dim", head_dim, 2, 1024)
    partial, plain = rope.without_partial(values, fields.integer("rotary_dim", head_dim) / head_dim)
    experts = _experts(
        num_experts=fields.optional_integer("num_experts") or fields.integer("num_local_experts", 256),
        top_k=fields.integer("num_experts_per_tok", 8),
        width=fields.integer("intermediate_size"),
    )
    own: dict[str, Any] = {
        "head_dim": head_dim,
        "num_kv_heads": fields.optional_integer("num_key_value_heads", 8) or fields.integer("num_attention_heads"),
        "qk_norm": True,
        "rope_theta": rope.hf_rope({"rope_theta": 5e6, **plain})[0],
        "rotary_dim": rope.rotary_dim(head_dim, partial),
        "attention": OlmoAttention,
        "experts": experts,
    }
    return LlamaConfig(**llama.read_hf(dataclasses.replace(source, values=plain), common, **own))


def _gguf(source: GGUFSource) -> LlamaConfig:
    fields = source.fields
    experts = _experts(
        num_experts=fields.integer("expert_count"),
        top_k=fields.integer("expert_used_count"),
        width=fields.integer("expert_feed_forward_length"),
    )
    alike = llama.read_gguf(source, has_experts=True, is_partial=True)
    return LlamaConfig(**alike, attention=OlmoAttention, experts=experts)


MINIMAX_M2 = Family(
    name="minimax_m2",
    architectures=("MiniMaxM2ForCausalLM",),
    gguf=("minimax-m2",),
    hf_keys=llama.HF_KEYS
    | {
        *("use_qk_norm", "use_routing_bias", "qk_norm_type", "scoring_func", "rotary_dim", "num_experts"),
        *("num_local_experts", "num_experts_per_tok"),
    },
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf,
    read_gguf=_gguf,
)
