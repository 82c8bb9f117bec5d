"""GLM-4, its dense models: norms on both sides of attention and MLP, and the first half of a head rotated.

Owns their configuration and the names of their norms. Files have the rows that are rotated in pairs, and gate and up as
one tensor.

Source: GLM-4 report, arXiv 2406.12793; the configuration and code of GLM-4-0414 in Transformers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mooli.backends.base import Array, Ops
from mooli.models import llama, rope
from mooli.models.config import TensorSpec
from mooli.models.family import Family
from mooli.models.fields import GGUFSource, HFSource
from mooli.models.layers import Attention, GatedMLP, Pairs, in_one, norm_tensors
from mooli.models.packer import Packer
from mooli.models.sandwich import SandwichLayer, run_layers

_EOS = (151329, 151336, 151338)
"""Of a config.json that says nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GlmConfig(llama.LlamaConfig):
    """Of a decoder of the family."""

    def tensors(self) -> dict[str, TensorSpec]:
        tensors = llama.LlamaConfig.tensors(self)
        for layer in range(self.num_layers):
            name, gguf = f"model.layers.{layer}", f"blk.{layer}"
            gated = [f"{name}.mlp.{part}_proj" for part in ("gate", "up")]
            tensors = in_one(tensors, f"{name}.mlp.gate_up_proj", f"{gguf}.ffn_up", *gated)
            tensors |= norm_tensors(f"{name}.post_self_attn_layernorm", f"{gguf}.post_attention_norm", self.hidden_size)
            tensors |= norm_tensors(f"{name}.post_mlp_layernorm", f"{gguf}.post_ffw_norm", self.hidden_size)
        return tensors


class GlmModel:
    """T tokens in a step, H hidden size."""

    def __init__(self, config: GlmConfig, ops: Ops, packer: Packer) -> None:
        self.config = config
        self._ops = ops
        eps = config.rms_norm_eps
        spec = llama.attention_spec(config, scale=config.head_dim**-0.5)
        rotary = config.rotation()
        self._embedding, self._head = llama.load_vocabulary(config, packer)
        self._layers = []
        for index in range(config.num_layers):
            name = f"model.layers.{index}"
            layer = SandwichLayer(
                input_norm=packer.vector(f"{name}.input_layernorm.weight"),
                attention=Attention.load(packer, f"{name}.self_attn", ops, spec, rotary, eps, qk_norm=False),
                post_attention_norm=packer.vector(f"{name}.post_self_attn_layernorm.weight"),
                pre_mlp_norm=packer.vector(f"{name}.post_attention_layernorm.weight"),
                mlp=GatedMLP.load(packer, f"{name}.mlp", ops),
                post_mlp_norm=packer.vector(f"{name}.post_mlp_layernorm.weight"),
            )
            self._layers.append(layer)
        self._norm = packer.vector("model.norm.weight")

    def forward(self, batch: Any) -> Array:
        """The hidden states (T, H) of a planned step, before the final norm, of asked tokens. Stores the KV of all."""
        hidden = self._ops.embed(batch, self._embedding)
        return run_layers(self._ops, batch, self._layers, hidden, self.config.rms_norm_eps)

    def logits(self, batch: Any, hidden: Array) -> Array:
        """The logits (S, vocab_size) of rows of hidden states (S, H), as `forward` returned them, and their batch."""
        return self._ops.linear(batch, self._ops.rms_norm(hidden, self._norm, self.config.rms_norm_eps), self._head)


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
    model=GlmModel,
)
