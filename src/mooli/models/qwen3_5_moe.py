"""Qwen3.5 with experts, and Qwen3-Next: Qwen3.5's layers with a mixture in the place of their MLP.

Owns the numbers of the mixture, and how Qwen3-Next orders the projections of its DeltaNets: head of keys by head of
keys, with all that goes with each. Beside the experts stands an MLP with a gate.

Sources: Qwen3-Next's and Qwen3.5's code in Transformers; Qwen2's experts, arXiv 2407.10671.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mooli.backends.base import Weight
from mooli.models import qwen3_5
from mooli.models.config import TensorSpec
from mooli.models.experts import Experts
from mooli.models.family import Family
from mooli.models.fields import Fields, GGUFSource, HFSource
from mooli.models.layers import Tensors
from mooli.models.packer import Packer
from mooli.models.qwen3_5 import Qwen35Config
from mooli.models.qwen_moe import dense_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3NextConfig(Qwen35Config):
    """Of Qwen3-Next. is_split: the file has z apart, and queries, keys and values one behind the other (GGUF)."""

    is_split: bool = False

    def projections(self, name: str, gguf: str) -> Tensors:
        """Each head of keys has the rows of its query, its key, and of the values and z of its heads of values; in the
        other projection those of b, then of a."""
        hidden, heads = self.hidden_size, self.num_value_heads
        tensors = {f"{name}.in_proj_ba.weight": TensorSpec((2 * heads, hidden), f"{gguf}.ssm_ba.weight")}
        if self.is_split:
            usual = Qwen35Config.projections(self, name, gguf)
            return tensors | {part: usual[part] for part in (f"{name}.in_proj_qkv.weight", f"{name}.in_proj_z.weight")}
        rows = self.delta.row_width + heads * self.value_dim
        return tensors | {f"{name}.in_proj_qkvz.weight": TensorSpec((rows, hidden), f"{gguf}.ssm_in.weight")}

    def load_projections(self, packer: Packer, name: str) -> tuple[Weight, Weight, Weight]:
        share, keys = self.num_value_heads // self.num_key_heads, self.key_dim
        b, a = _rows_of_heads(self.num_key_heads, (share, share))
        if self.is_split:
            qkv, to_z = packer.linear(f"{name}.in_proj_qkv"), packer.linear(f"{name}.in_proj_z")
        else:
            widths = (keys, keys, share * self.value_dim, share * self.value_dim)
            q, k, v, z = _rows_of_heads(self.num_key_heads, widths)
            qkv, to_z = packer.linears_of(f"{name}.in_proj_qkvz", np.concatenate([q, k, v]), z)
        (gates,) = packer.linears_of(f"{name}.in_proj_ba", np.concatenate([b, a]))
        return qkv, to_z, gates


def _rows_of_heads(num_heads: int, widths: tuple[int, ...]) -> list[NDArray[np.int64]]:
    """Where heads have several parts of so many rows each, behind each other: the rows of each part, head by head."""
    rows = np.arange(num_heads * sum(widths), dtype=np.int64).reshape(num_heads, -1)
    return [part.reshape(-1) for part in np.split(rows, np.cumsum(widths)[:-1], axis=1)]


def _hf(source: HFSource) -> Qwen35Config:
    source = qwen3_5.text_source(source)
    return Qwen35Config(**_alike(source), experts=_experts(source.fields, num_experts=256, top_k=8, normalise=True))


def _hf_next(source: HFSource) -> Qwen3NextConfig:
    source = qwen3_5.text_source(source)
    fields, alike = source.fields, _alike(source)
    own = {"dense_layers": dense_layers(fields, alike["num_layers"]), "normalise": fields.flag("norm_topk_prob", True)}
    return Qwen3NextConfig(**alike, experts=_experts(fields, num_experts=512, top_k=10, **own))


def _alike(source: HFSource) -> dict[str, Any]:
    """Models without plain MLPs do not say how wide those would be."""
    width = source.fields.integer("moe_intermediate_size", 512)
    return qwen3_5.read_hf(dataclasses.replace(source, values={"intermediate_size": width, **source.values}))


def _experts(fields: Fields, *, num_experts: int, top_k: int, **own: Any) -> Experts:
    """num_experts, top_k: where nothing is said."""
    return Experts(
        num_experts=fields.integer("num_experts", num_experts),
        top_k=fields.integer("num_experts_per_tok", top_k),
        width=fields.integer("moe_intermediate_size", 512),
        shared_width=fields.integer("shared_expert_intermediate_size", 512),
        **own,
    )


def _gguf(source: GGUFSource) -> Qwen35Config:
    return Qwen35Config(**_read_gguf(source))


def _gguf_next(source: GGUFSource) -> Qwen3NextConfig:
    is_split = not any(name.endswith(".ssm_in.weight") for name in source.shapes)
    return Qwen3NextConfig(**_read_gguf(source) | {"is_tiled": False}, is_split=is_split)


def _read_gguf(source: GGUFSource) -> dict[str, Any]:
    """Which layers have no experts is seen by their tensors."""
    fields = source.fields
    width = fields.integer("expert_feed_forward_length")
    alike = qwen3_5.read_gguf(source, fields.integer("feed_forward_length", 0) or width)
    layers = range(alike["num_layers"])
    experts = Experts(
        num_experts=fields.integer("expert_count"),
        top_k=fields.integer("expert_used_count"),
        width=width,
        shared_width=fields.integer("expert_shared_feed_forward_length"),
        dense_layers=tuple(i for i in layers if f"blk.{i}.ffn_gate_inp.weight" not in source.shapes),
        normalise=fields.flag("expert_weights_norm", True),
    )
    return {**alike, "experts": experts}


_KEYS = qwen3_5.HF_KEYS | {
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"),
}

QWEN3_5_MOE = Family(
    name="qwen3_5_moe_text",
    architectures=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
    gguf=("qwen35moe",),
    hf_keys=_KEYS,
    gguf_keys=qwen3_5.GGUF_KEYS,
    read_hf=_hf,
    read_gguf=_gguf,
)
QWEN3_NEXT = Family(
    name="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    gguf=("qwen3next",),
    hf_keys=_KEYS | {"norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"},
    gguf_keys=qwen3_5.GGUF_KEYS,
    read_hf=_hf_next,
    read_gguf=_gguf_next,
)
