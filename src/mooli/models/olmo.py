"""OLMo 2 and OLMo 3: branches are normed when they have been computed, not before.

Owns their configuration and that order: h = x + N(attention(x)), then h + N(mlp(h)). Queries and keys have a norm each
over all heads together, so that no rank can compute it of its own heads. OLMo 3 has windows in three of four layers,
and scales the rotations of the others alone.

Sources: OLMo 2, arXiv 2501.00656; the Olmo 3 models' configuration and code in Transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mooli.backends.base import Array, RopeSpec
from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models import llama, rope
from mooli.models.config import ROWS, Split, TensorSpec
from mooli.models.decoder import DecoderLayer, Names
from mooli.models.family import Family
from mooli.models.fields import GGUFSource, HFSource, short
from mooli.models.layer_kinds import gguf_windows, hf_windows
from mooli.models.layers import Attention, Tensors

_FULL_EVERY = 4
_WHOLE = Split(ROWS, 1, "norms over all heads")


@dataclass(frozen=True, slots=True)
class OlmoAttention(Attention):
    """Norms of queries and keys are over all heads together."""

    @classmethod
    def norm_tensors(cls, name: str, gguf: str, *, num_heads: int, num_kv_heads: int, head_dim: int) -> Tensors:
        return {
            f"{name}.{part}_norm.weight": TensorSpec((heads * head_dim,), f"{gguf}.attn_{part}_norm.weight", _WHOLE)
            for part, heads in (("q", num_heads), ("k", num_kv_heads))
        }

    def _normed(self, qkv: Array) -> Array:
        return self.ops.projection_norm(qkv, self.spec, self.q_norm, self.k_norm, self.eps)


class OlmoLayer(DecoderLayer):
    """One layer with a norm behind each of its branches."""

    __slots__ = ()

    def mix(self, batch: Any, layer: int, hidden: Array) -> Array:
        return self.mixer.mix(batch, layer, hidden)

    def output(self, batch: Any, mixed: Array, hidden: Array) -> Array:
        hidden = self.ops.rms_norm(self.mixer.output(batch, mixed), self.norms[0], self.eps, residual=hidden)
        return self.ops.rms_norm(self.mlp.output(batch, hidden), self.norms[1], self.eps, residual=hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class OlmoConfig(llama.LlamaConfig):
    """Of a decoder of the family. rope_scaling: of layers without a window."""

    layer: ClassVar[type[DecoderLayer]] = OlmoLayer

    norm_names: tuple[Names, ...] = (
        ("post_attention_layernorm", "post_attention_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
    )
    attention: type[Attention] = OlmoAttention

    def rotations(self) -> tuple[RopeSpec, ...]:
        scaled, plain = self.rotation(), rope.rope_spec(self.head_dim, self.rope_theta)
        return tuple(plain if self.window(layer) else scaled for layer in range(self.num_layers))


def _read_hf(source: HFSource, windows: tuple[int, ...]) -> OlmoConfig:
    fields, bias = source.fields, source.fields.flag("attention_bias")
    common = source.common(max_position_embeddings=2048, eos_id=50279)
    own: dict[str, Any] = {"rms_norm_eps": fields.number("rms_norm_eps", 1e-5), "windows": windows}
    return OlmoConfig(**llama.read_hf(source, common, qkv_bias=bias, o_bias=bias, qk_norm=True, **own))


def _hf_olmo2(source: HFSource) -> OlmoConfig:
    num_layers = source.fields.integer("num_hidden_layers")
    return _read_hf(source, (0,) * min(num_layers, 1024))


def _hf_olmo3(source: HFSource) -> OlmoConfig:
    windows = hf_windows(source, source.fields.integer("sliding_window", 4096), _FULL_EVERY)
    return _read_hf(dataclasses.replace(source, values=_of_full_layers(source.values)), windows)


def _of_full_layers(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json whose rope parameters are those of layers without a window alone. The others have the same base and
    no scaling, or are refused."""
    named, theta = values.get("rope_parameters"), values.get("rope_theta") or 5e5
    if not isinstance(named, Mapping) or not {"full_attention", "sliding_attention"} & named.keys():
        return {**values, "rope_theta": theta}
    full, local = (named.get(kind) or {} for kind in ("full_attention", "sliding_attention"))
    for given in (full, local):
        if not isinstance(given, Mapping):
            raise CheckpointError(
                f"config.json: rope_parameters must have an object a kind of layer, got {short(given)}"
            )
    full, local = {"rope_theta": theta, **full}, {"rope_theta": theta, **local}
    if rope.hf_rope({"rope_parameters": local}) != (rope.hf_rope({"rope_parameters": full})[0], None):
        raise UnsupportedModelError(
            f"rope parameters {short(dict(local))} of layers with a window are not implemented for OLMo 3; they must"
            " have the base of the others and no scaling"
        )
    return {**values, "rope_parameters": full}


def _gguf(source: GGUFSource) -> OlmoConfig:
    """Of both: files of OLMo 3 say which layers have a window."""
    alike = llama.read_gguf(source, has_window=True)
    window = alike.pop("sliding_window")
    pattern = source.metadata.get(f"{source.name}.attention.sliding_window_pattern")
    windows = gguf_windows(pattern, window, alike["num_layers"]) if window else None
    if window and windows is None:
        raise CheckpointError(f"the GGUF file has a window of {window} and does not say which layers have it")
    return OlmoConfig(**alike, windows=windows or (0,) * alike["num_layers"])


OLMO2 = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    gguf=("olmo2",),
    hf_keys=llama.HF_KEYS | {"attention_bias"},
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf_olmo2,
    read_gguf=_gguf,
)
OLMO3 = Family(
    name="olmo3",  # its GGUF files call themselves olmo2
    architectures=("Olmo3ForCausalLM",),
    hf_keys=llama.HF_KEYS | {"attention_bias", "sliding_window", "sliding_window_pattern", "layer_types"},
    read_hf=_hf_olmo3,
)
