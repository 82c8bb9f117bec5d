"""ERNIE 4.5 with experts: a softmax over all of them, and a correction that only chooses.

Owns its configuration and names. Some layers have no experts, the others besides what every token goes through. Folders
have the correction as a matrix of one row, beside the router.

Sources: ERNIE 4.5 technical report, and the model's code in Transformers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from mooli.errors import UnsupportedModelError
from mooli.models import llama, rope
from mooli.models.experts import Experts, SparseMLP
from mooli.models.family import Family
from mooli.models.fields import Fields, GGUFSource, HFSource, check_range
from mooli.models.layer_kinds import MAX_LAYERS
from mooli.models.layers import ALWAYS_PAIRS, Tensors
from mooli.models.llama import LlamaConfig
from mooli.models.stacks import Stacked


class ErnieExperts(SparseMLP):
    """The correction stands elsewhere."""

    __slots__ = ()
    shared_name: ClassVar[str] = "mlp.shared_experts"
    shared_has_gate: ClassVar[bool] = False

    @classmethod
    def tensors(cls, name: str, gguf: str, **sizes: Any) -> Tensors:
        tensors = super().tensors(name, gguf, **sizes)
        correction = f"{name}.{cls.correction_name}"
        place = Stacked(f"{name}.moe_statics.e_score_correction_bias", 0, 1)
        return {**tensors, correction: dataclasses.replace(tensors[correction], hf_stacks=(place,))}


def _dense_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    check_range("num_layers", num_layers, 1, MAX_LAYERS)
    first, last = fields.integer("moe_layer_start_index", 1), fields.integer("moe_layer_end_index", -1)
    every = fields.integer("moe_layer_interval", 1)
    check_range("moe_layer_interval", every, 1, 1024)
    last = num_layers - 1 if last == -1 else last
    return tuple(i for i in range(num_layers) if (i + 1) % every or not first <= i <= last)


def _hf(source: HFSource) -> LlamaConfig:
    fields = source.fields
    if fields.flag("use_bias"):
        raise UnsupportedModelError(f"biases (use_bias) are not implemented for {source.family} models")
    common = source.common(max_position_embeddings=131072, bos_id=1, eos_id=2)
    width = fields.integer("moe_intermediate_size", 1536)
    experts = Experts(
        kind=ErnieExperts,
        num_experts=fields.optional_integer("moe_num_experts") or fields.integer("num_experts", 64),
        top_k=fields.optional_integer("moe_k") or fields.integer("num_experts_per_tok", 6),
        width=width,
        shared_width=width * fields.integer("moe_num_shared_experts", 2),
        dense_layers=_dense_layers(fields, common["num_layers"]),
        correction=True,
        normalise=True,
        minimum=fields.number("moe_norm_min", 1e-12),
    )
    own: dict[str, Any] = {
        "num_kv_heads": fields.optional_integer("num_key_value_heads", 4) or fields.integer("num_attention_heads"),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", True),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-5),
        "rope_theta": rope.hf_rope({"rope_theta": 5e5, **source.values})[0],
        "experts": experts,
        "pairs": ALWAYS_PAIRS,
    }
    return LlamaConfig(**llama.read_hf(source, common, **own))


def _gguf(source: GGUFSource) -> LlamaConfig:
    """The tensors say which layers have experts."""
    fields, shapes = source.fields, source.shapes
    alike = llama.read_gguf(source, has_experts=True)
    layers = range(min(alike["num_layers"], MAX_LAYERS))
    shared = {shapes[name][0] for i in layers if (name := f"blk.{i}.ffn_up_shexp.weight") in shapes}
    experts = Experts(
        kind=ErnieExperts,
        num_experts=fields.integer("expert_count"),
        top_k=fields.integer("expert_used_count"),
        width=fields.integer("expert_feed_forward_length"),
        shared_width=int(max(shared, default=0)),
        dense_layers=tuple(i for i in layers if f"blk.{i}.ffn_gate_inp.weight" not in shapes),
        correction=True,
        normalise=True,
        minimum=1e-12,
    )
    return LlamaConfig(**alike, experts=experts, pairs=ALWAYS_PAIRS)


ERNIE4_5_MOE = Family(
    name="ernie4_5_moe",
    architectures=("Ernie4_5_MoeForCausalLM",),
    gguf=("ernie4_5-moe",),
    hf_keys=llama.HF_KEYS
    | {
        *("use_bias", "moe_intermediate_size", "moe_num_experts", "num_experts", "moe_k", "num_experts_per_tok"),
        *("moe_num_shared_experts", "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
        "moe_norm_min",
    },
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf,
    read_gguf=_gguf,
)
