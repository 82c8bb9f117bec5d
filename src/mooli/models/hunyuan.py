"""HunYuan, its dense models: Llama's layers, but queries and keys are normed after they are rotated.

Owns that order and the names of the norms. A long context is reached by a larger rotary base, which `alpha` gives.

Source: the HunYuan dense models' configuration and code in Transformers; NTK-aware scaling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mooli.backends.base import Array
from mooli.errors import CheckpointError
from mooli.models import llama
from mooli.models.family import Family
from mooli.models.fields import Fields, GGUFSource, HFSource, check_range, equal_heads, short
from mooli.models.layers import Attention


@dataclass(frozen=True, slots=True)
class HunyuanAttention(Attention):
    """Rotates first: a norm has a gain for each dimension, so the order matters."""

    norm_names: ClassVar[tuple[str, str]] = ("query_layernorm", "key_layernorm")

    def mix(self, batch: Any, layer: int, x: Array) -> Array:
        qkv = self._normed(self._rotated(batch, self.ops.linear(batch, x, self.qkv)))
        return self.ops.attend(batch, layer, qkv, self.spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class HunyuanConfig(llama.LlamaConfig):
    """Of a decoder of the family."""

    attention: ClassVar[type[Attention]] = HunyuanAttention


def _hf(source: HFSource) -> HunyuanConfig:
    fields, bias = source.fields, source.fields.flag("attention_bias")
    common = source.common(max_position_embeddings=2048, bos_id=1, eos_id=2)
    num_heads = fields.integer("num_attention_heads")
    head_dim = fields.optional_integer("head_dim") or equal_heads(common["hidden_size"], num_heads)
    source = dataclasses.replace(source, values=_with_stretched_base(source.values, head_dim))
    own: dict[str, Any] = {
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-5),
        "head_dim": head_dim,
        "qk_norm": True,
    }
    return HunyuanConfig(**llama.read_hf(source, common, qkv_bias=bias, o_bias=bias, **own))


def _with_stretched_base(values: Mapping[str, Any], head_dim: int) -> Mapping[str, Any]:
    """Rope parameters of type "dynamic" with a fixed `alpha` as a base alone, which is what they amount to."""
    for key in ("rope_parameters", "rope_scaling"):
        given = values.get(key)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise CheckpointError(f"config.json: {key} must be an object, got {short(given)}")
        if given.get("rope_type", given.get("type")) == "dynamic" and given.get("alpha"):
            check_range("head_dim", head_dim, 3, 1024)
            alpha = Fields(given, f"config.json: {key}").number("alpha")
            check_range("alpha", alpha, 1e-3, 1e9)
            theta = given.get("rope_theta") or values.get("rope_theta") or 10000.0
            base = Fields({"rope_theta": theta}, "config.json").number("rope_theta") * alpha ** (
                head_dim / (head_dim - 2)
            )
            return {**values, "rope_parameters": None, "rope_scaling": None, "rope_theta": base}
    return values


def _gguf(source: GGUFSource) -> HunyuanConfig:
    return HunyuanConfig(**llama.read_gguf(source))


HUNYUAN = Family(
    name="hunyuan_v1_dense",
    architectures=("HunYuanDenseV1ForCausalLM",),
    gguf=("hunyuan-dense",),
    hf_keys=llama.HF_KEYS | {"attention_bias"},
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf,
    read_gguf=_gguf,
    model=llama.LlamaModel,
)
