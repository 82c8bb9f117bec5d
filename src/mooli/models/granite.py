"""Granite 3, dense and with experts: Llama's layers with a multiplier of scores, embedding, branches and logits.

Experts may have an MLP beside them that all tokens go through (GraniteMoeShared).

Owns how their configuration is read, and the names of experts. Folders have all experts of a layer in two tensors, and
the gate and up projection of what every token goes through besides in one.

Source: the Granite 3 models' configuration and code in Transformers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from mooli.models import llama
from mooli.models.experts import Experts, SparseMLP
from mooli.models.family import Family
from mooli.models.fields import GGUFSource, HFSource
from mooli.models.layers import PAIRS_IN_GGUF, GatedMLP, Tensors
from mooli.models.llama import LlamaConfig
from mooli.models.stacks import Rows, Stacked


class GraniteSharedMLP(GatedMLP):
    """Of all tokens. Folders have its gate and its up projection in one tensor."""

    __slots__ = ()
    module: ClassVar[str] = "shared_mlp"
    names: ClassVar[tuple[str, str, str]] = ("gate", "up", "output_linear")

    @classmethod
    def tensors(cls, name: str, gguf: str, *, hidden_size: int, width: int, bias: bool) -> Tensors:
        tensors = super().tensors(name, gguf, hidden_size=hidden_size, width=width, bias=bias)
        for part, module in enumerate(cls.names[:2]):
            key, place = f"{name}.{module}.weight", Rows(f"{name}.input_linear.weight", part * width, width, 2 * width)
            tensors[key] = dataclasses.replace(tensors[key], hf_stacks=(place,))
        return tensors


class GraniteExperts(SparseMLP):
    """Other names."""

    __slots__ = ()
    module: ClassVar[str] = "block_sparse_moe"
    router_name: ClassVar[str] = "router.layer"
    shared_mlp: ClassVar[type[GatedMLP]] = GraniteSharedMLP
    shared_name: ClassVar[str] = "shared_mlp"
    shared_has_gate: ClassVar[bool] = False

    @classmethod
    def hf_stacks(cls, name: str, kind: str, part: int, expert: int, num_experts: int) -> tuple[Stacked, ...]:
        block = name.removesuffix(".experts")
        if part == 2:
            return (Stacked(f"{block}.output_linear.{kind}", expert, num_experts),)
        return (Stacked(f"{block}.input_linear.{kind}", expert, num_experts, part, 2),)


def experts(num_experts: int, top_k: int, width: int, shared_width: int = 0) -> Experts:
    """Of the whole family: the softmax is over the chosen experts alone."""
    return Experts(
        kind=GraniteExperts,
        num_experts=num_experts,
        top_k=top_k,
        width=width,
        shared_width=shared_width,
        score="chosen_softmax",
    )


def _hf(source: HFSource) -> LlamaConfig:
    return LlamaConfig(**read_hf(source), mlp_bias=source.fields.flag("mlp_bias"))


def _hf_moe(source: HFSource) -> LlamaConfig:
    fields, alike = source.fields, read_hf(source)
    num_experts = fields.optional_integer("num_experts") or fields.integer("num_local_experts", 8)
    top_k = fields.integer("num_experts_per_tok", 2)
    return LlamaConfig(**alike, experts=experts(num_experts, top_k, alike["intermediate_size"]))


def _hf_shared(source: HFSource) -> LlamaConfig:
    fields, alike = source.fields, read_hf(source)
    num_experts, top_k = fields.integer("num_local_experts", 8), fields.integer("num_experts_per_tok", 2)
    shared_width = fields.integer("shared_intermediate_size", 0)
    return LlamaConfig(**alike, experts=experts(num_experts, top_k, alike["intermediate_size"], shared_width))


def read_hf(source: HFSource) -> dict[str, Any]:
    """What all of the family read of a config.json alike."""
    fields, bias = source.fields, source.fields.flag("attention_bias")
    common = source.common(max_position_embeddings=2048, bos_id=1, eos_id=2)
    multipliers: dict[str, Any] = {name: fields.number(name, 1.0) for name in MULTIPLIERS}
    return llama.read_hf(source, common, qkv_bias=bias, o_bias=bias, pairs=PAIRS_IN_GGUF, **multipliers)


def _gguf(source: GGUFSource) -> LlamaConfig:
    return LlamaConfig(**llama.read_gguf(source), **gguf_multipliers(source), pairs=PAIRS_IN_GGUF)


def _gguf_moe(source: GGUFSource) -> LlamaConfig:
    fields, alike = source.fields, llama.read_gguf(source, has_experts=True)
    mixture = experts(
        fields.integer("expert_count"),
        fields.integer("expert_used_count"),
        alike["intermediate_size"],
        fields.integer("expert_shared_feed_forward_length", 0),
    )
    return LlamaConfig(**alike, **gguf_multipliers(source), experts=mixture, pairs=PAIRS_IN_GGUF)


def gguf_multipliers(source: GGUFSource) -> dict[str, Any]:
    changed = source.overridden({name: source.fields.number(key, 1.0) for name, key in MULTIPLIERS.items()})
    return {name: changed.number(name) for name in MULTIPLIERS}


MULTIPLIERS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
"""Their names in a config.json and in GGUF files."""

GRANITE = Family(
    name="granite",
    architectures=("GraniteForCausalLM",),
    gguf=("granite",),
    hf_keys=llama.HF_KEYS | {"attention_bias", "mlp_bias"} | MULTIPLIERS.keys(),
    gguf_keys=llama.GGUF_KEYS | MULTIPLIERS.keys(),
    read_hf=_hf,
    read_gguf=_gguf,
)
GRANITE_MOE = Family(
    name="granitemoe",
    architectures=("GraniteMoeForCausalLM",),
    gguf=("granitemoe",),
    hf_keys=llama.HF_KEYS
    | {"attention_bias", "num_experts", "num_local_experts", "num_experts_per_tok"}
    | MULTIPLIERS.keys(),
    gguf_keys=llama.GGUF_KEYS | MULTIPLIERS.keys(),
    read_hf=_hf_moe,
    read_gguf=_gguf_moe,
)
GRANITE_MOE_SHARED = Family(
    name="granitemoeshared",  # its GGUF files call themselves granitemoe
    architectures=("GraniteMoeSharedForCausalLM",),
    hf_keys=llama.HF_KEYS
    | {"attention_bias", "num_local_experts", "num_experts_per_tok", "shared_intermediate_size"}
    | MULTIPLIERS.keys(),
    read_hf=_hf_shared,
)
