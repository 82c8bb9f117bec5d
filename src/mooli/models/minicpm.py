"""MiniCPM: Granite's multipliers under other names, of which two are made of others.

Owns their names and how they are made. Source: MiniCPM, arXiv 2404.06395; MiniCPM4, arXiv 2506.07900.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mooli.models import llama, rope
from mooli.models.family import Family
from mooli.models.fields import GGUFSource, HFSource, check_range, equal_heads
from mooli.models.layers import PAIRS_IN_GGUF
from mooli.models.llama import LlamaConfig
from mooli.models.longrope import gguf_longrope, hf_longrope

_CONTEXT = 2048


def _hf(source: HFSource) -> LlamaConfig:
    fields = source.fields
    common = source.common(max_position_embeddings=_CONTEXT, bos_id=1, eos_id=2)
    num_heads, bias = fields.integer("num_attention_heads"), fields.flag("attention_bias")
    head_dim = fields.optional_integer("head_dim") or equal_heads(common["hidden_size"], num_heads)
    base = fields.number("dim_model_base", 1)
    check_range("dim_model_base", base, 1e-6, 1e9)
    values = dict(source.values)
    own: dict[str, Any] = {"tie_word_embeddings": fields.flag("tie_word_embeddings", True)}
    parameters: dict[str, Any] = rope.hf_parameters(values)
    if "longrope" in (parameters.get("rope_type"), parameters.get("type")):
        own["rope_scaling"] = hf_longrope(parameters, values, default_context=_CONTEXT, context=source.context)
        theta = parameters.get("rope_theta") or values.get("rope_theta")
        values |= {"rope_parameters": None, "rope_scaling": None, "rope_theta": theta}
    alike = llama.read_hf(
        dataclasses.replace(source, values=values), common, qkv_bias=bias, o_bias=bias, head_dim=head_dim, **own
    )
    return LlamaConfig(
        **alike,
        attention_multiplier=head_dim**-0.5,
        embedding_multiplier=fields.number("scale_emb", 1),
        residual_multiplier=fields.number("scale_depth", 1) / max(1, common["num_layers"]) ** 0.5,
        logits_scaling=common["hidden_size"] / base,
        pairs=PAIRS_IN_GGUF,
    )


def _gguf(source: GGUFSource) -> LlamaConfig:
    source, scaling = gguf_longrope(source)
    fields, alike = source.fields, llama.read_gguf(source)
    return LlamaConfig(
        **alike if scaling is None else {**alike, "rope_scaling": scaling},
        attention_multiplier=alike["head_dim"] ** -0.5,
        embedding_multiplier=fields.number("embedding_scale"),
        residual_multiplier=fields.number("residual_scale"),
        logits_scaling=fields.number("logit_scale"),
        pairs=PAIRS_IN_GGUF,
    )


MINICPM = Family(
    name="minicpm",
    architectures=("MiniCPMForCausalLM",),
    gguf=("minicpm",),
    hf_keys=llama.HF_KEYS
    | {"attention_bias", "scale_emb", "scale_depth", "dim_model_base", "original_max_position_embeddings"},
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf,
    read_gguf=_gguf,
)
