"""GLM-4, its dense models: norms on both sides of attention and MLP, and the first half of a head rotated.

Owns their configuration and the names of their norms. Files have the rows that are rotated in pairs, and gate and up as
one tensor.

Source: GLM-4 report, arXiv 2406.12793; the configuration and code of GLM-4-0414 in Transformers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from mooli.models import llama, rope
from mooli.models.decoder import DecoderLayer, Names, SandwichLayer
from mooli.models.family import Family
from mooli.models.fields import GGUFSource, HFSource
from mooli.models.layers import Pairs, Tensors, in_one

_EOS = (151329, 151336, 151338)
"""Of a config.json that says nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GlmConfig(llama.LlamaConfig):
    """Of a decoder of the family."""

    layer: ClassVar[type[DecoderLayer]] = SandwichLayer

    norm_names: tuple[Names, ...] = (
        ("input_layernorm", "attn_norm"),
        ("post_self_attn_layernorm", "post_attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("post_mlp_layernorm", "post_ffw_norm"),
    )

    def mlp_tensors(self, layer: int, name: str, gguf: str) -> Tensors:
        tensors = llama.LlamaConfig.mlp_tensors(self, layer, name, gguf)
        gated = [f"{name}.mlp.{part}_proj" for part in ("gate", "up")]
        return in_one(tensors, f"{name}.mlp.gate_up_proj", f"{gguf}.ffn_up", *gated)


def _hf(source: HFSource) -> GlmConfig:
    fields = source.fields
    common = source.common(max_position_embeddings=131072)
    partial, values = rope.without_partial(source.values, default=0.5)
    head_dim = fields.integer("head_dim", 128)
    rotary_dim = rope.rotary_dim(head_dim, partial)
    own: dict[str, Any] = {
        "eos_ids": common["eos_ids"] or _EOS,
        "head_dim": head_dim,
        "num_kv_heads": fields.integer("num_key_value_heads", 2),
        "rotary_dim": rotary_dim,
        "rms_norm_eps": fields.number("rms_norm_eps", 1.5625e-7),
        "qkv_bias": fields.flag("attention_bias", True),
        "pairs": Pairs(in_gguf=True, in_hf=True, rows=rotary_dim),
    }
    return GlmConfig(**llama.read_hf(dataclasses.replace(source, values=values), common, **own))


def _gguf(source: GGUFSource) -> GlmConfig:
    alike = llama.read_gguf(source, is_partial=True)
    return GlmConfig(**alike, pairs=Pairs(in_gguf=True, in_hf=True, rows=alike["rotary_dim"]))


GLM4 = Family(
    name="glm4",
    architectures=("Glm4ForCausalLM",),
    gguf=("glm4",),
    hf_keys=llama.HF_KEYS | {"attention_bias"},
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf,
    read_gguf=_gguf,
)
