"""Gemma 2 and 3, their text models: norms on both sides of attention and MLP, and windows in most layers.

Owns their configuration and names. Layers with a window and layers without have a rotary base each; only that of the
latter is scaled for long contexts. The embedding is scaled by the root of its width, and is the head too. Gemma 3 has
norms of queries and keys, Gemma 2 has caps on scores and logits instead, and rotates all layers alike.

Sources: Gemma 2, arXiv 2408.00118; Gemma 3, arXiv 2503.19786.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mooli.backends.base import Activation, Array, AttentionSpec, RopeSpec
from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models import llama, rope
from mooli.models.config import TensorSpec
from mooli.models.decoder import Decoder, DecoderLayer, Names, SandwichLayer
from mooli.models.family import Family
from mooli.models.fields import Fields, GGUFSource, HFSource, check_range, short
from mooli.models.layer_kinds import hf_windows, windows_but_every
from mooli.models.layers import GatedMLP
from mooli.models.rope import RopeScaling

GAIN_OFFSET = 1.0
"""Folders keep the gains of norms less one; GGUF files have them whole."""

_FULL_EVERY = {"gemma2": 2, "gemma3_text": 6}
"""Of so many layers, the last attends to all positions, where nothing else is said."""

_27B_LAYERS = {"gemma2": 46, "gemma3_text": 62}
"""GGUF files do not say that these divide scores by another number than the root of a head's length."""

_CAPS = (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))
"""Their names in both kinds of files, and what they are where a config.json of Gemma 2 does not say."""


class GemmaMLP(GatedMLP):
    """Another activation."""

    __slots__ = ()
    activation: ClassVar[Activation] = "gelu_tanh"


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaConfig(llama.LlamaConfig):
    """Of a decoder of the family. CheckpointError if any number is out of its bounds.

    rope_theta, rope_scaling: of layers without a window; local_rope_theta: of those with one. attention_cap, logit_cap:
    what scores and logits stay below; 0 for no cap.
    """

    layer: ClassVar[type[DecoderLayer]] = SandwichLayer
    mlp: ClassVar[type[GatedMLP]] = GemmaMLP

    norm_names: tuple[Names, ...] = (
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "post_attention_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
    )
    tie_word_embeddings: bool = True
    local_rope_theta: float = 1e4
    attention_cap: float = 0.0
    logit_cap: float = 0.0

    def __post_init__(self) -> None:
        llama.LlamaConfig.__post_init__(self)
        check_range("local_rope_theta", self.local_rope_theta, 1e-3, 1e15)
        check_range("attn_logit_softcapping", self.attention_cap, 0.0, 1e9)
        check_range("final_logit_softcapping", self.logit_cap, 0.0, 1e9)

    def attention_spec(self, layer: int) -> AttentionSpec:
        return dataclasses.replace(llama.LlamaConfig.attention_spec(self, layer), softcap=self.attention_cap)

    def rotations(self) -> tuple[RopeSpec, ...]:
        full, local = self.rotation(), rope.rope_spec(self.head_dim, self.local_rope_theta)
        return tuple(local if self.window(layer) else full for layer in range(self.num_layers))

    def tensors(self) -> dict[str, TensorSpec]:
        return {
            name: dataclasses.replace(spec, hf_offset=GAIN_OFFSET) if len(spec.shape) == 1 else spec
            for name, spec in llama.LlamaConfig.tensors(self).items()
        }


class GemmaModel(Decoder):
    """With a cap on logits."""

    config: GemmaConfig

    def logits(self, batch: Any, hidden: Array) -> Array:
        logits, cap = Decoder.logits(self, batch, hidden), self.config.logit_cap
        return self._ops.soft_cap(logits, cap) if cap else logits


def _read_hf(source: HFSource, max_position_embeddings: int, **own: Any) -> GemmaConfig:
    """What both read of a config.json alike. own: what they read otherwise."""
    fields, values = source.fields, source.values
    common = source.common(max_position_embeddings=max_position_embeddings, bos_id=2, eos_id=1)
    activation = values.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise UnsupportedModelError(f"activation {short(activation)} is not implemented; Gemma uses gelu_pytorch_tanh")
    for name in ("use_bidirectional_attention", "attention_bias"):
        if values.get(name):
            raise UnsupportedModelError(f"{name}={short(values[name])} is not implemented for {source.family}")
    if not fields.flag("tie_word_embeddings", True):
        raise UnsupportedModelError(f"tie_word_embeddings=false is not implemented for {source.family}")
    divisor = fields.number("query_pre_attn_scalar", 256)
    check_range("query_pre_attn_scalar", divisor, 1e-6, 1e9)
    return GemmaConfig(
        **common,
        intermediate_size=fields.integer("intermediate_size", 9216),
        num_heads=fields.integer("num_attention_heads", 8),
        num_kv_heads=fields.integer("num_key_value_heads", 4),
        head_dim=fields.integer("head_dim", 256),
        attention_multiplier=divisor**-0.5,
        embedding_multiplier=rounded(common["hidden_size"] ** 0.5, common["dtype"]),
        windows=hf_windows(source, fields.integer("sliding_window", 4096), _FULL_EVERY[source.family]),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        **own,
    )


def _hf_gemma2(source: HFSource) -> GemmaConfig:
    fields, values = source.fields, source.values
    theta, scaling = rope.hf_rope(values)
    if scaling is not None:
        raise UnsupportedModelError(f"rope scaling {scaling.type!r} is not implemented for Gemma 2")
    attention_cap, logit_cap = (
        0.0 if name in values and values[name] is None else fields.number(name, usual) for name, usual in _CAPS
    )
    return _read_hf(
        source, 8192, rope_theta=theta, local_rope_theta=theta, attention_cap=attention_cap, logit_cap=logit_cap
    )


def _hf_gemma3(source: HFSource) -> GemmaConfig:
    for name, _ in _CAPS:
        if source.values.get(name):
            raise UnsupportedModelError(f"{name}={short(source.values[name])} is not implemented for Gemma 3")
    theta, scaling, local_theta = _hf_ropes(source.values)
    return _read_hf(source, 131072, rope_theta=theta, rope_scaling=scaling, local_rope_theta=local_theta, qk_norm=True)


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


def _read_gguf(source: GGUFSource, theta: float) -> dict[str, Any]:
    """What both read of a GGUF file alike. theta: where it does not say."""
    alike = llama.read_gguf(source, has_window=True, theta=theta)
    if not alike["tie_word_embeddings"]:
        raise UnsupportedModelError(f"a head apart from the embedding is not implemented for {source.family}")
    hidden, num_layers, window = alike["hidden_size"], alike["num_layers"], alike["sliding_window"] or 4096
    of_heads = hidden / alike["num_heads"] if num_layers == _27B_LAYERS[source.family] else alike["head_dim"]
    return {
        **alike,
        "attention_multiplier": of_heads**-0.5,
        "embedding_multiplier": hidden**0.5,
        "sliding_window": None,
        "windows": windows_but_every(_FULL_EVERY[source.family], window, num_layers),
    }


def _gguf_gemma2(source: GGUFSource) -> GemmaConfig:
    fields, alike = source.fields, _read_gguf(source, theta=1e4)
    if alike["rope_scaling"] is not None:
        raise UnsupportedModelError("rope scaling is not implemented for Gemma 2")
    attention_cap, logit_cap = (fields.number(name, 0.0) for name, _ in _CAPS)
    return GemmaConfig(**alike, local_rope_theta=alike["rope_theta"], attention_cap=attention_cap, logit_cap=logit_cap)


def _gguf_gemma3(source: GGUFSource) -> GemmaConfig:
    for name, _ in _CAPS:
        if source.fields.number(name, 0.0):
            raise UnsupportedModelError(f"{source.name}.{name} is not implemented for Gemma 3")
    source.fields.integer("attention.sliding_window")  # of Gemma 2 alone is it always the same
    return GemmaConfig(**_read_gguf(source, theta=1e6) | {"qk_norm": True})


_HF_KEYS = rope.HF_KEYS | frozenset(
    (
        *("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
        *("hidden_activation", "query_pre_attn_scalar", "tie_word_embeddings", "attention_bias"),
        *("sliding_window", "sliding_window_pattern", "layer_types", "use_bidirectional_attention"),
        *(name for name, _ in _CAPS),
    )
)

GEMMA2 = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    gguf=("gemma2",),
    hf_keys=_HF_KEYS,
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf_gemma2,
    read_gguf=_gguf_gemma2,
    model=GemmaModel,
)
GEMMA3 = Family(
    name="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    gguf=("gemma3",),
    hf_keys=_HF_KEYS | {"rope_local_base_freq"},
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf_gemma3,
    read_gguf=_gguf_gemma3,
    model=GemmaModel,
)
