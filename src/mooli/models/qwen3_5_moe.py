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
from mooli.backends.routing import MAX_EXPERTS, MAX_TOP_K, RouteSpec
from mooli.models import llama, qwen3_5, qwen_moe
from mooli.models.config import TensorSpec
from mooli.models.experts import SparseMLP
from mooli.models.family import Family
from mooli.models.fields import GGUFSource, HFSource, check_range
from mooli.models.layers import MLP, Tensors
from mooli.models.packer import Packer


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen35MoeConfig(qwen3_5.Qwen35Config):
    """Of a decoder of the family. shared_width: of the MLP beside the experts. dense_layers: which have an MLP of
    intermediate_size instead. CheckpointError for a number out of its bounds."""

    num_experts: int
    top_k: int
    expert_width: int
    shared_width: int
    normalise: bool = True
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        qwen3_5.Qwen35Config.__post_init__(self)
        check_range("num_experts", self.num_experts, 1, MAX_EXPERTS)
        check_range("num_experts_per_tok", self.top_k, 1, min(self.num_experts, MAX_TOP_K))
        check_range("moe_intermediate_size", self.expert_width, 1, 2**20)
        check_range("shared_expert_intermediate_size", self.shared_width, 1, 2**20)

    @property
    def route(self) -> RouteSpec:
        return RouteSpec(num_experts=self.num_experts, top_k=self.top_k, normalise=self.normalise)

    def mlp_tensors(self, layer: int, name: str, gguf: str) -> Tensors:
        if layer in self.dense_layers:
            return llama.LlamaConfig.mlp_tensors(self, layer, name, gguf)
        hidden, shared = self.hidden_size, f"{name}.mlp.shared_expert"
        experts = SparseMLP.tensors(
            f"{name}.mlp", gguf, hidden_size=hidden, num_experts=self.num_experts, width=self.expert_width
        )
        gate = {f"{shared}_gate.weight": TensorSpec((1, hidden), f"{gguf}.ffn_gate_inp_shexp.weight")}
        return experts | qwen_moe.shared_tensors(shared, gguf, hidden_size=hidden, width=self.shared_width) | gate


class Qwen35MoeModel(qwen3_5.Qwen35Model):
    """With experts in most layers."""

    config: Qwen35MoeConfig

    def load_mlp(self, packer: Packer, layer: int, name: str) -> MLP:
        if layer in self.config.dense_layers:
            return qwen3_5.Qwen35Model.load_mlp(self, packer, layer, name)
        shared = qwen_moe.load_shared(packer, f"{name}.mlp.shared_expert", self._ops, has_gate=True)
        return SparseMLP.load(packer, f"{name}.mlp", self._ops, self.config.route, shared=shared)


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3NextConfig(Qwen35MoeConfig):
    """Of Qwen3-Next."""

    def _net(self, name: str, gguf: str) -> Tensors:
        """Each head of keys has the rows of its query, its key, and of the values and z of its heads of values; in the
        other projection those of b, then of a."""
        tensors = qwen3_5.Qwen35Config._net(self, name, gguf)
        hidden, heads = self.hidden_size, self.num_value_heads
        for part in ("qkv", "z", "b", "a"):
            del tensors[f"{name}.in_proj_{part}.weight"]
        rows = self.delta.row_width + heads * self.value_dim
        return {
            f"{name}.in_proj_qkvz.weight": TensorSpec((rows, hidden), f"{gguf}.ssm_in.weight"),
            f"{name}.in_proj_ba.weight": TensorSpec((2 * heads, hidden), f"{gguf}.ssm_ba.weight"),
            **tensors,
        }

    def load_projections(self, packer: Packer, name: str) -> tuple[Weight, Weight, Weight]:
        share, keys = self.num_value_heads // self.num_key_heads, self.key_dim
        q, k, v, z = _rows_of_heads(self.num_key_heads, (keys, keys, share * self.value_dim, share * self.value_dim))
        b, a = _rows_of_heads(self.num_key_heads, (share, share))
        qkv, to_z = packer.linears_of(f"{name}.in_proj_qkvz", np.concatenate([q, k, v]), z)
        (gates,) = packer.linears_of(f"{name}.in_proj_ba", np.concatenate([b, a]))
        return qkv, to_z, gates


def _rows_of_heads(num_heads: int, widths: tuple[int, ...]) -> list[NDArray[np.int64]]:
    """Where heads have several parts of so many rows each, behind each other: the rows of each part, head by head."""
    rows = np.arange(num_heads * sum(widths), dtype=np.int64).reshape(num_heads, -1)
    return [part.reshape(-1) for part in np.split(rows, np.cumsum(widths)[:-1], axis=1)]


def _hf(source: HFSource) -> Qwen35MoeConfig:
    return Qwen35MoeConfig(**_read_hf(source, num_experts=256, top_k=8))


def _hf_next(source: HFSource) -> Qwen3NextConfig:
    alike = _read_hf(source, num_experts=512, top_k=10)
    dense = qwen_moe.dense_layers(source.fields, alike["num_layers"])
    return Qwen3NextConfig(**alike, dense_layers=dense, normalise=source.fields.flag("norm_topk_prob", True))


def _read_hf(source: HFSource, *, num_experts: int, top_k: int) -> dict[str, Any]:
    """num_experts, top_k: where nothing is said."""
    source = qwen3_5.text_source(source)
    fields = source.fields
    width = fields.integer("moe_intermediate_size", 512)
    own = {
        "num_experts": fields.integer("num_experts", num_experts),
        "top_k": fields.integer("num_experts_per_tok", top_k),
        "expert_width": width,
        "shared_width": fields.integer("shared_expert_intermediate_size", 512),
    }
    # Models without plain MLPs do not say how wide those would be.
    values = {"intermediate_size": width, **source.values}
    return qwen3_5.read_hf(dataclasses.replace(source, values=values)) | own


def _gguf(source: GGUFSource) -> Qwen35MoeConfig:
    fields = source.fields
    width = fields.integer("expert_feed_forward_length")
    return Qwen35MoeConfig(
        **qwen3_5.read_gguf(source, width),
        num_experts=fields.integer("expert_count"),
        top_k=fields.integer("expert_used_count"),
        expert_width=width,
        shared_width=fields.integer("expert_shared_feed_forward_length"),
    )


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
    model=Qwen35MoeModel,
)
QWEN3_NEXT = Family(
    name="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    hf_keys=_KEYS | {"norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"},
    read_hf=_hf_next,
    model=Qwen35MoeModel,
)
