"""Ministral 3: Llama's layers, with queries that grow by their position beyond the context of the first training.

Owns that growth and the configuration. Rotations are scaled by yarn.

Source: the Ministral 3 models' configuration and code in Transformers; the growth is that of Llama 4.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mooli.backends.base import RopeSpec
from mooli.models import llama, rope
from mooli.models.family import Family
from mooli.models.fields import Fields, GGUFSource, HFSource, check_range
from mooli.models.layers import PAIRS_IN_GGUF


@dataclass(frozen=True, slots=True, kw_only=True)
class MinistralConfig(llama.LlamaConfig):
    """Of a decoder of the family. growth, period: of queries, as `RopeSpec` has them."""

    growth: float = 0.0
    period: int = 1

    def __post_init__(self) -> None:
        llama.LlamaConfig.__post_init__(self)
        check_range("llama_4_scaling_beta", self.growth, 0.0, 1e3)
        check_range("original_max_position_embeddings", self.period, 1, 2**28)

    def rotation(self) -> RopeSpec:
        return dataclasses.replace(llama.LlamaConfig.rotation(self), growth=self.growth, period=self.period)


def _hf(source: HFSource) -> MinistralConfig:
    fields = source.fields
    common = source.common(max_position_embeddings=262144, bos_id=1, eos_id=2)
    given = {key: value for key, value in rope.hf_parameters(source.values).items() if value is not None}
    parameters = Fields(given, "rope parameters")
    own: dict[str, Any] = {
        "head_dim": fields.integer("head_dim", 128),
        "num_kv_heads": fields.optional_integer("num_key_value_heads", 8) or fields.integer("num_attention_heads"),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-5),
        "sliding_window": fields.optional_integer("sliding_window"),
        "growth": parameters.number("llama_4_scaling_beta", 0.0),
        "period": parameters.integer("original_max_position_embeddings", common["max_position_embeddings"]),
    }
    return MinistralConfig(**llama.read_hf(source, common, **own), pairs=PAIRS_IN_GGUF)


def _gguf(source: GGUFSource) -> MinistralConfig:
    fields = source.fields
    return MinistralConfig(
        **llama.read_gguf(source, has_window=True),
        growth=fields.number("attention.temperature_scale", 0.0),
        period=fields.integer("rope.scaling.original_context_length", fields.integer("context_length")),
        pairs=PAIRS_IN_GGUF,
    )


MINISTRAL3 = Family(
    name="ministral3",
    architectures=("Ministral3ForCausalLM",),
    gguf=("mistral3",),
    hf_keys=llama.HF_KEYS | {"sliding_window"},
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf,
    read_gguf=_gguf,
)
