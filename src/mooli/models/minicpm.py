"""MiniCPM: Granite's multipliers under other names, of which two are made of others.

Owns their names and how they are made. Source: MiniCPM, arXiv 2404.06395; MiniCPM4, arXiv 2506.07900.
"""

from __future__ import annotations

from typing import Any

from mooli.models import llama
from mooli.models.family import Family
from mooli.models.fields import GGUFSource, HFSource, check_range
from mooli.models.layers import PAIRS_IN_GGUF
from mooli.models.llama import LlamaConfig
from mooli.models.longrope import gguf_longrope, without_longrope

_CONTEXT = 2048


def _hf(source: HFSource) -> LlamaConfig:
    source, scaling = without_longrope(source, _CONTEXT)
    fields = source.fields
    common = source.common(max_position_embeddings=_CONTEXT, bos_id=1, eos_id=2)
    bias, base = fields.flag("attention_bias"), fields.number("dim_model_base", 1)
    check_range("dim_model_base", base, 1e-6, 1e9)
    own: dict[str, Any] = {
        "tie_word_embeddings": fields.flag("tie_word_embeddings", True),
        "embedding_multiplier": fields.number("scale_emb", 1),
        "residual_multiplier": fields.number("scale_depth", 1) / max(1, common["num_layers"]) ** 0.5,
        "logits_scaling": common["hidden_size"] / base,
        "pairs": PAIRS_IN_GGUF,
    }
    if scaling is not None:
        own["rope_scaling"] = scaling
    return LlamaConfig(**llama.read_hf(source, common, qkv_bias=bias, o_bias=bias, **own))


def _gguf(source: GGUFSource) -> LlamaConfig:
    source, scaling = gguf_longrope(source)
    fields, alike = source.fields, llama.read_gguf(source)
    return LlamaConfig(
        **alike if scaling is None else {**alike, "rope_scaling": scaling},
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
