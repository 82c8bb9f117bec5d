"""Gemma 3, its text models: norms on both sides of attention and MLP, and windows in most layers. Gemma 2 has the same.

Owns their configuration, the names of their tensors in every kind of file, and the order of operations. Layers with a
window and layers without have a rotary base each; only that of the latter is scaled for long contexts. The embedding is
scaled by the root of its width, and is the head too.

Source: Gemma 3 technical report, arXiv 2503.19786.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mooli.backends.base import Array, AttentionSpec, Ops, PagedLayer
from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models import rope
from mooli.models.config import ModelConfig, TensorSpec
from mooli.models.family import Family
from mooli.models.fields import Fields, GGUFSource, HFSource, check_range, short
from mooli.models.layers import NO_PAIRS, Attention, GatedMLP, norm_tensors, vocabulary_tensors
from mooli.models.packer import Packer
from mooli.models.rope import RopeScaling
from mooli.models.sandwich import SandwichLayer, run_layers
from mooli.models.windows import check_windows, hf_windows, windows_but_every

GAIN_OFFSET = 1.0
"""Folders keep the gains of norms less one; GGUF files have them whole."""

FULL_EVERY = 6
"""Of so many layers, the last attends to all positions, where nothing else is said."""

_27B_LAYERS = 62
"""GGUF files do not say that this one divides scores by another number than the root of a head's length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaConfig(ModelConfig):
    """Hyper-parameters of a decoder of the family. CheckpointError if any is out of its bounds.

    windows: for each layer how many last positions a token attends to, itself included; 0 for all. scale: of scores.
    rope_theta, rope_scaling: of layers without a window; local_rope_theta: of those with one. attention_cap, logit_cap:
    what scores and logits stay below; 0 for no cap.
    """

    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    embedding_scale: float
    windows: tuple[int, ...]
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float = 1e4
    qk_norm: bool = True
    attention_cap: float = 0.0
    logit_cap: float = 0.0

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        check_range("intermediate_size", self.intermediate_size, 1, 2**20)
        check_range("num_heads", self.num_heads, 1, 4096)
        check_range("num_kv_heads", self.num_kv_heads, 1, self.num_heads)
        check_range("head_dim", self.head_dim, 2, 1024)
        check_range("rms_norm_eps", self.rms_norm_eps, 1e-30, 1.0)
        check_range("rope_theta", self.rope_theta, 1e-3, 1e15)
        check_range("local_rope_theta", self.local_rope_theta, 1e-3, 1e15)
        check_range("scale of scores", self.scale, 1e-6, 1e3)
        check_range("attn_logit_softcapping", self.attention_cap, 0.0, 1e9)
        check_range("final_logit_softcapping", self.logit_cap, 0.0, 1e9)
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim {self.head_dim} is odd: rotary embedding needs pairs")
        check_windows(self.windows, self.num_layers)
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.head_dim)

    def tensors(self) -> dict[str, TensorSpec]:
        hidden = self.hidden_size
        tensors = vocabulary_tensors("model.embed_tokens", "token_embd", self.vocab_size, hidden)
        for layer in range(self.num_layers):
            name, gguf = f"model.layers.{layer}", f"blk.{layer}"
            tensors |= Attention.tensors(
                f"{name}.self_attn",
                gguf,
                hidden_size=hidden,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                qkv_bias=False,
                o_bias=False,
                qk_norm=self.qk_norm,
                pairs=NO_PAIRS,
            )
            tensors |= GatedMLP.tensors(
                f"{name}.mlp", gguf, hidden_size=hidden, width=self.intermediate_size, bias=False
            )
            for norm, gguf_norm in _LAYER_NORMS.items():
                tensors |= norm_tensors(f"{name}.{norm}", f"{gguf}.{gguf_norm}", hidden)
        tensors |= norm_tensors("model.norm", "output_norm", hidden)
        return {
            name: dataclasses.replace(spec, hf_offset=GAIN_OFFSET) if len(spec.shape) == 1 else spec
            for name, spec in tensors.items()
        }

    def may_ignore(self, name: str) -> bool:
        return name == "lm_head.weight"  # the embedding again, which some tools store beside it

    def cache_layers(self) -> tuple[PagedLayer, ...]:
        return tuple(PagedLayer(self.num_kv_heads, self.head_dim, window) for window in self.windows)

    def part(self, size: int) -> GemmaConfig:
        return dataclasses.replace(
            self,
            num_heads=self.num_heads // size,
            num_kv_heads=max(1, self.num_kv_heads // size),
            intermediate_size=self.intermediate_size // size,
        )


_LAYER_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""Of a layer: their names in folders and in GGUF files."""


class GemmaModel:
    """A decoder whose branches are normed before and after. T tokens in a step, H hidden size."""

    def __init__(self, config: GemmaConfig, ops: Ops, packer: Packer) -> None:
        self.config = config
        self._ops = ops
        eps = config.rms_norm_eps
        full_rope = rope.rope_spec(config.head_dim, config.rope_theta, config.rope_scaling)
        local_rope = rope.rope_spec(config.head_dim, config.local_rope_theta)
        self._embedding, self._head = packer.tied("model.embed_tokens")
        self._layers = []
        for index, window in enumerate(config.windows):
            name = f"model.layers.{index}"
            spec = AttentionSpec(
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                scale=config.scale,
                window=window,
                softcap=config.attention_cap,
            )
            rotary = local_rope if window else full_rope
            layer = SandwichLayer(
                input_norm=packer.vector(f"{name}.input_layernorm.weight"),
                attention=Attention.load(packer, f"{name}.self_attn", ops, spec, rotary, eps, qk_norm=config.qk_norm),
                post_attention_norm=packer.vector(f"{name}.post_attention_layernorm.weight"),
                pre_mlp_norm=packer.vector(f"{name}.pre_feedforward_layernorm.weight"),
                mlp=GatedMLP.load(packer, f"{name}.mlp", ops, "gelu_tanh"),
                post_mlp_norm=packer.vector(f"{name}.post_feedforward_layernorm.weight"),
            )
            self._layers.append(layer)
        self._norm = packer.vector("model.norm.weight")

    def forward(self, batch: Any) -> Array:
        """The hidden states (T, H) of a planned step, before the final norm, of asked tokens. Stores the KV of all."""
        hidden = self._ops.embed(batch, self._embedding, self.config.embedding_scale)
        return run_layers(self._ops, batch, self._layers, hidden, self.config.rms_norm_eps)

    def logits(self, batch: Any, hidden: Array) -> Array:
        """The logits (S, vocab_size) of rows of hidden states (S, H), as `forward` returned them, and their batch."""
        ops, config = self._ops, self.config
        logits = ops.linear(batch, ops.rms_norm(hidden, self._norm, config.rms_norm_eps), self._head)
        return ops.soft_cap(logits, config.logit_cap) if config.logit_cap else logits


def _hf(source: HFSource) -> GemmaConfig:
    fields, values = source.fields, source.values
    common = source.common(max_position_embeddings=131072, bos_id=2, eos_id=1)
    activation = values.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise UnsupportedModelError(f"activation {short(activation)} is not implemented; Gemma uses gelu_pytorch_tanh")
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention", "attention_bias"):
        if values.get(name):
            raise UnsupportedModelError(f"{name}={short(values[name])} is not implemented for Gemma 3")
    if not fields.flag("tie_word_embeddings", True):
        raise UnsupportedModelError("tie_word_embeddings=false is not implemented for Gemma 3")
    theta, scaling, local_theta = _hf_ropes(values)
    divisor = fields.number("query_pre_attn_scalar", 256)
    check_range("query_pre_attn_scalar", divisor, 1e-6, 1e9)
    return GemmaConfig(
        **common,
        intermediate_size=fields.integer("intermediate_size", 9216),
        num_heads=fields.integer("num_attention_heads", 8),
        num_kv_heads=fields.integer("num_key_value_heads", 4),
        head_dim=fields.integer("head_dim", 256),
        scale=divisor**-0.5,
        embedding_scale=rounded(common["hidden_size"] ** 0.5, common["dtype"]),
        windows=hf_windows(source, fields.integer("sliding_window", 4096), FULL_EVERY),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        local_rope_theta=local_theta,
    )


def _hf_ropes(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None, float]:
    """The base and scaling of layers without a window, and the base of those with one. Newer files have an object for
    each kind of layer."""
    named = values.get("rope_parameters")
    if isinstance(named, Mapping) and ("full_attention" in named or "sliding_attention" in named):
        full = {"rope_theta": 1e6, **_rope_object(named, "full_attention")}
        local = {"rope_theta": 1e4, **_rope_object(named, "sliding_attention")}
        theta, scaling = rope.hf_rope({"rope_parameters": full})
        local_theta, local_scaling = rope.hf_rope({"rope_parameters": local})
        if local_scaling is not None:
            raise UnsupportedModelError("rope scaling of layers with a window is not implemented for Gemma 3")
        return theta, scaling, local_theta
    theta, scaling = rope.hf_rope({"rope_theta": 1e6, **values})
    return theta, scaling, Fields(values, "config.json").number("rope_local_base_freq", 1e4)


def _rope_object(named: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    value = named.get(kind) or {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json: rope_parameters.{kind} must be an object, got {short(value)}")
    return value


def rounded(value: float, dtype: str) -> float:
    """As the embedding's type holds it, which is how Transformers scales."""
    if dtype == "float16":
        return float(np.float16(value))
    if dtype != "bfloat16":
        return value
    bits = int(np.float32(value).view(np.uint32))
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return float(np.uint32(bits).view(np.float32))


def _gguf(source: GGUFSource) -> GemmaConfig:
    fields = source.fields
    common = source.common()
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if fields.number(name, 0.0):
            raise UnsupportedModelError(f"{source.name}.{name} is not implemented for Gemma 3")
    num_heads, num_layers = fields.per_layer("attention.head_count"), common["num_layers"]
    head_dim = fields.integer("attention.key_length")
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError("key and value heads of different length are not implemented")
    if "output.weight" in source.shapes:
        raise UnsupportedModelError("a head apart from the embedding is not implemented for Gemma 3")
    changed = source.overridden(
        {
            "rope_theta": fields.number("rope.freq_base", 1e6),
            "rope_scaling": rope.gguf_scaling(fields, source.freq_factors),
            "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
            "sliding_window": fields.integer("attention.sliding_window"),
        }
    )
    scaling = changed.values["rope_scaling"]
    return GemmaConfig(
        **common,
        intermediate_size=fields.per_layer("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=fields.per_layer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        scale=(common["hidden_size"] / num_heads if num_layers == _27B_LAYERS else head_dim) ** -0.5,
        embedding_scale=common["hidden_size"] ** 0.5,
        windows=windows_but_every(FULL_EVERY, changed.integer("sliding_window"), num_layers),
        rms_norm_eps=changed.number("rms_norm_eps"),
        rope_theta=changed.number("rope_theta"),
        rope_scaling=scaling
        if isinstance(scaling, RopeScaling)
        else rope.read_scaling(scaling, common["max_position_embeddings"]),
    )


GEMMA3 = Family(
    name="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    gguf=("gemma3",),
    hf_keys=frozenset(
        (
            *("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
            *("hidden_activation", "query_pre_attn_scalar", "tie_word_embeddings", "attention_bias"),
            *("sliding_window", "sliding_window_pattern", "layer_types", "rope_local_base_freq"),
            *("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"),
        )
    )
    | rope.HF_KEYS,
    gguf_keys=frozenset(("rope_theta", "rope_scaling", "rms_norm_eps", "sliding_window")),
    read_hf=_hf,
    read_gguf=_gguf,
    model=GemmaModel,
)
