"""Phi-3 and Phi-4: Llama's layers, of which files have queries, keys and values as one tensor, and gate and up too.

Owns their configuration. Of a head, only the first values may be rotated; long contexts have LongRoPE's factors.

Source: Phi-3 technical report, arXiv 2404.14219; Phi-4-Mini, arXiv 2503.01743.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mooli.errors import UnsupportedModelError
from mooli.models import llama, rope
from mooli.models.family import Family
from mooli.models.fields import GGUFSource, HFSource, equal_heads, short
from mooli.models.layers import Tensors, in_one
from mooli.models.longrope import NAMES, gguf_longrope, hf_longrope

_CONTEXT = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class PhiConfig(llama.LlamaConfig):
    """Of a decoder of the family."""

    def mixer_tensors(self, layer: int, name: str, gguf: str) -> Tensors:
        tensors = llama.LlamaConfig.mixer_tensors(self, layer, name, gguf)
        qkv = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
        return in_one(tensors, f"{name}.self_attn.qkv_proj", f"{gguf}.attn_qkv", *qkv)

    def mlp_tensors(self, layer: int, name: str, gguf: str) -> Tensors:
        tensors = llama.LlamaConfig.mlp_tensors(self, layer, name, gguf)
        gated = [f"{name}.mlp.{part}_proj" for part in ("gate", "up")]
        return in_one(tensors, f"{name}.mlp.gate_up_proj", f"{gguf}.ffn_up", *gated)


def _hf(source: HFSource) -> PhiConfig:
    fields = source.fields
    common = source.common(max_position_embeddings=_CONTEXT, bos_id=1, eos_id=32000)
    num_heads = fields.integer("num_attention_heads")
    head_dim = fields.optional_integer("head_dim") or equal_heads(common["hidden_size"], num_heads)
    partial, values = rope.without_partial(source.values)
    parameters = rope.hf_parameters(values)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    scaling = None
    if kind in NAMES:
        scaling = hf_longrope(parameters, values, default_context=_CONTEXT, context=source.context)
    elif kind != "default":
        raise UnsupportedModelError(f"rope scaling {short(kind)} is not implemented for Phi-3; implemented: longrope")
    # What is left to be read of them is the base.
    values |= {"rope_parameters": None, "rope_theta": parameters.get("rope_theta") or values.get("rope_theta")}
    own: dict[str, Any] = {
        "head_dim": head_dim,
        "rotary_dim": rope.rotary_dim(head_dim, partial),
        "rope_scaling": scaling,
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-5),
        "sliding_window": fields.optional_integer("sliding_window"),
    }
    return PhiConfig(**llama.read_hf(dataclasses.replace(source, values=values), common, **own))


def _gguf(source: GGUFSource) -> PhiConfig:
    source, scaling = gguf_longrope(source)
    alike = llama.read_gguf(source, has_window=True, is_partial=True)
    return PhiConfig(**alike if scaling is None else {**alike, "rope_scaling": scaling})


PHI3 = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    gguf=("phi3",),
    hf_keys=llama.HF_KEYS | {"original_max_position_embeddings", "sliding_window"},
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf,
    read_gguf=_gguf,
)
