"""MiniCPM3: a dense decoder with latent attention, and multipliers on embedding, residual branches and logits.

Owns how its configuration is read.

Source: MiniCPM, arXiv 2404.06395, and the MiniCPM3 model's configuration and code in Transformers.
"""

from __future__ import annotations

from typing import Any

from mooli.models import llama, mla, rope
from mooli.models.deepseek import GGUF_KEYS, DeepseekConfig, read_gguf
from mooli.models.family import Family
from mooli.models.fields import GGUFSource, HFSource, check_range
from mooli.models.layer_kinds import MAX_LAYERS
from mooli.models.layers import NO_PAIRS
from mooli.models.longrope import gguf_longrope, without_longrope

_CONTEXT = 32768
_EMBEDDING, _DEPTH, _BASE = 12.0, 1.4, 256
"""What makes the multipliers, where a config.json does not say. GGUF files never do."""


def _hf(source: HFSource) -> DeepseekConfig:
    source, longrope = without_longrope(source, _CONTEXT)
    fields, values = source.fields, source.values
    llama.check_silu(source)
    common = source.common(max_position_embeddings=_CONTEXT, bos_id=1, eos_id=2)
    hidden, num_layers = common["hidden_size"], common["num_layers"]
    check_range("num_hidden_layers", num_layers, 1, MAX_LAYERS)
    own: dict[str, Any] = {
        "q_rank": fields.optional_integer("q_lora_rank", 768),
        "rank": fields.integer("kv_lora_rank", 256),
        "nope_dim": fields.integer("qk_nope_head_dim", 64),
        "rope_dim": fields.integer("qk_rope_head_dim", 32),
        "value_dim": fields.optional_integer("v_head_dim") or hidden // max(1, fields.integer("num_attention_heads")),
    }
    theta, scaling = rope.hf_rope(values)
    depth = values.get("scale_depth", _DEPTH)  # null: branches are added as they are
    base = fields.optional_integer("dim_model_base", _BASE) or hidden
    check_range("dim_model_base", base, 1, 2**24)
    return DeepseekConfig(
        **common,
        intermediate_size=fields.integer("intermediate_size"),
        heads=mla.hf_heads(fields, NO_PAIRS, **own),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-5),
        rope_theta=theta,
        rope_scaling=longrope or scaling,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        embedding_multiplier=fields.number("scale_emb", _EMBEDDING),
        residual_multiplier=1.0 if depth is None else fields.number("scale_depth", _DEPTH) / num_layers**0.5,
        logits_scaling=hidden / base,
    )


def _gguf(source: GGUFSource) -> DeepseekConfig:
    source, longrope = gguf_longrope(source)
    common = source.common()
    check_range("block_count", common["num_layers"], 1, MAX_LAYERS)
    alike = read_gguf(source, NO_PAIRS)
    return DeepseekConfig(
        **common,
        **alike if longrope is None else {**alike, "rope_scaling": longrope},
        embedding_multiplier=_EMBEDDING,
        residual_multiplier=_DEPTH / common["num_layers"] ** 0.5,
        logits_scaling=common["hidden_size"] / _BASE,
    )


MINICPM3 = Family(
    name="minicpm3",
    architectures=("MiniCPM3ForCausalLM",),
    gguf=("minicpm3",),
    hf_keys=rope.HF_KEYS
    | mla.HF_KEYS
    | frozenset(
        (
            *("intermediate_size", "num_attention_heads", "hidden_act", "rms_norm_eps", "tie_word_embeddings"),
            *("attention_bias", "scale_emb", "scale_depth", "dim_model_base"),
        )
    ),
    gguf_keys=GGUF_KEYS,
    read_hf=_hf,
    read_gguf=_gguf,
)
