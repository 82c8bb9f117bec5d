"""MiniCPM3: a dense decoder with latent attention, and multipliers on embedding, residual branches and logits.

Owns its configuration and model. As in Granite's, what runs through the layers is h / m for a residual multiplier m:
branches are added as they are, the embedding is scaled by (scale_emb) / m, and every norm of h is that of h / m with
eps / m^2. Logits are divided by scaling the gains of the last norm.

Source: MiniCPM, arXiv 2404.06395, and the MiniCPM3 model's configuration and code in Transformers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mooli.backends.base import Array, CacheLayer, Ops, Weight
from mooli.models import llama, mla, rope
from mooli.models.config import ModelConfig, TensorSpec
from mooli.models.family import Family
from mooli.models.fields import HFSource, check_range
from mooli.models.layers import NO_PAIRS, GatedMLP, norm_tensors, vocabulary_tensors
from mooli.models.mla import LatentAttention, LatentHeads
from mooli.models.packer import Packer
from mooli.models.rope import RopeScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniCPM3Config(ModelConfig):
    """Of a decoder of the family. CheckpointError for a number out of its bounds."""

    intermediate_size: int
    heads: LatentHeads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = True
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        check_range("intermediate_size", self.intermediate_size, 1, 2**20)
        check_range("rms_norm_eps", self.rms_norm_eps, 1e-30, 1.0)
        check_range("rope_theta", self.rope_theta, 1e-3, 1e15)
        for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
            check_range(name, getattr(self, name), 1e-6, 1e6)
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.heads.rope_dim)

    def tensors(self) -> dict[str, TensorSpec]:
        hidden = self.hidden_size
        tensors = vocabulary_tensors("model.embed_tokens", "token_embd", self.vocab_size, hidden)
        for layer in range(self.num_layers):
            name, gguf = f"model.layers.{layer}", f"blk.{layer}"
            tensors |= norm_tensors(f"{name}.input_layernorm", f"{gguf}.attn_norm", hidden)
            tensors |= LatentAttention.tensors(f"{name}.self_attn", gguf, hidden, self.heads)
            tensors |= norm_tensors(f"{name}.post_attention_layernorm", f"{gguf}.ffn_norm", hidden)
            tensors |= GatedMLP.tensors(
                f"{name}.mlp", gguf, hidden_size=hidden, width=self.intermediate_size, bias=False
            )
        last = TensorSpec((hidden,), "output_norm.weight", factor=1.0 / self.logits_scaling)
        tensors["model.norm.weight"] = last
        if not self.tie_word_embeddings:
            tensors |= vocabulary_tensors("lm_head", "output", self.vocab_size, hidden)
        return tensors

    def may_ignore(self, name: str) -> bool:
        return (name == "lm_head.weight" and self.tie_word_embeddings) or name.endswith(
            ("rotary_emb.inv_freq", "embed_tokens.embed_scale")
        )

    def cache_layers(self) -> tuple[CacheLayer, ...]:
        return (self.heads.layer,) * self.num_layers

    def part(self, size: int) -> MiniCPM3Config:
        return dataclasses.replace(self, heads=self.heads.part(size), intermediate_size=self.intermediate_size // size)


@dataclass(frozen=True, slots=True)
class MiniCPM3Layer:
    """One decoder layer."""

    input_norm: Weight
    attention: LatentAttention
    post_attention_norm: Weight
    mlp: GatedMLP


class MiniCPM3Model:
    """T tokens in a step, H hidden size."""

    def __init__(self, config: MiniCPM3Config, ops: Ops, packer: Packer) -> None:
        self.config = config
        self._ops = ops
        self._eps = config.rms_norm_eps / config.residual_multiplier**2
        spec = config.heads.spec(config.rope_scaling)
        rotary = rope.rope_spec(config.heads.rope_dim, config.rope_theta, config.rope_scaling)
        if config.tie_word_embeddings:
            self._embedding, self._head = packer.tied("model.embed_tokens")
        else:
            self._embedding, self._head = packer.embedding("model.embed_tokens"), packer.head("lm_head")
        self._layers = []
        for index in range(config.num_layers):
            name = f"model.layers.{index}"
            self._layers.append(
                MiniCPM3Layer(
                    packer.vector(f"{name}.input_layernorm.weight"),
                    LatentAttention.load(packer, f"{name}.self_attn", ops, config.heads, spec, rotary),
                    packer.vector(f"{name}.post_attention_layernorm.weight"),
                    GatedMLP.load(packer, f"{name}.mlp", ops),
                )
            )
        self._norm = packer.vector("model.norm.weight")

    def forward(self, batch: Any) -> Array:
        """The hidden states (T, H) of a planned step over the residual multiplier, before the final norm, of asked
        tokens. Stores the latents of all."""
        ops, config = self._ops, self.config
        hidden = ops.embed(batch, self._embedding, config.embedding_multiplier / config.residual_multiplier)
        for index, layer in enumerate(self._layers):
            mixed = layer.attention.mix(batch, index, ops.rms_norm(hidden, layer.input_norm, self._eps))
            if index + 1 == len(self._layers):
                mixed, hidden = ops.asked_rows(batch, mixed), ops.asked_rows(batch, hidden)
            hidden = layer.attention.output(batch, mixed, residual=hidden)
            hidden = layer.mlp.output(batch, ops.rms_norm(hidden, layer.post_attention_norm, self._eps), hidden)
        return hidden

    def logits(self, batch: Any, hidden: Array) -> Array:
        """The logits (S, vocab_size) of rows of hidden states (S, H), as `forward` returned them, and their batch."""
        return self._ops.linear(batch, self._ops.rms_norm(hidden, self._norm, self._eps), self._head)


def _hf(source: HFSource) -> MiniCPM3Config:
    fields, values = source.fields, source.values
    llama.check_silu(source)
    common = source.common(max_position_embeddings=32768, bos_id=1, eos_id=2)
    hidden, num_layers = common["hidden_size"], common["num_layers"]
    check_range("num_hidden_layers", num_layers, 1, 1024)
    own: dict[str, Any] = {
        "q_rank": fields.optional_integer("q_lora_rank", 768),
        "rank": fields.integer("kv_lora_rank", 256),
        "nope_dim": fields.integer("qk_nope_head_dim", 64),
        "rope_dim": fields.integer("qk_rope_head_dim", 32),
        "value_dim": fields.optional_integer("v_head_dim") or hidden // max(1, fields.integer("num_attention_heads")),
    }
    theta, scaling = rope.hf_rope(values)
    depth = values.get("scale_depth", 1.4)  # null: branches are added as they are
    base = fields.optional_integer("dim_model_base", 256) or hidden
    check_range("dim_model_base", base, 1, 2**24)
    return MiniCPM3Config(
        **common,
        intermediate_size=fields.integer("intermediate_size"),
        heads=mla.hf_heads(fields, NO_PAIRS, **own),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-5),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        embedding_multiplier=fields.number("scale_emb", 12.0),
        residual_multiplier=1.0 if depth is None else fields.number("scale_depth", 1.4) / num_layers**0.5,
        logits_scaling=hidden / base,
    )


MINICPM3 = Family(
    name="minicpm3",
    architectures=("MiniCPM3ForCausalLM",),
    hf_keys=rope.HF_KEYS
    | mla.HF_KEYS
    | frozenset(
        (
            *("intermediate_size", "num_attention_heads", "hidden_act", "rms_norm_eps", "tie_word_embeddings"),
            *("attention_bias", "scale_emb", "scale_depth", "dim_model_base"),
        )
    ),
    read_hf=_hf,
    model=MiniCPM3Model,
)
