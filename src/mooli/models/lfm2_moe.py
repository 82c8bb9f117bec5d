"""LFM2 with experts: LFM2's layers, of which all but the first have a mixture in the place of their MLP.

Owns the numbers of the mixture and its names. A sigmoid chooses, with a correction that only chooses.

Source: LFM2 technical report, arXiv 2511.23404, and the model's code in Transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mooli.backends.routing import MAX_EXPERTS, MAX_TOP_K, RouteSpec
from mooli.errors import UnsupportedModelError
from mooli.models import lfm2
from mooli.models.experts import SparseMLP
from mooli.models.family import Family
from mooli.models.fields import GGUFSource, HFSource, check_range
from mooli.models.layers import MLP, Tensors
from mooli.models.packer import Packer

_SIGMOID = 2
"""In GGUF files."""


class LFM2Experts(SparseMLP):
    """Other names."""

    __slots__ = ()
    names: ClassVar[tuple[str, str, str]] = ("w1", "w3", "w2")
    correction_name: ClassVar[str] = "expert_bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class LFM2MoeConfig(lfm2.LFM2Config):
    """Of a decoder of the family. num_dense_layers: the first ones, with a plain MLP. factor: of what the experts give.
    CheckpointError for a number out of its bounds."""

    num_experts: int
    top_k: int
    expert_width: int
    num_dense_layers: int = 2
    has_correction: bool = True
    normalise: bool = True
    factor: float = 1.0

    def __post_init__(self) -> None:
        lfm2.LFM2Config.__post_init__(self)
        check_range("num_experts", self.num_experts, 1, MAX_EXPERTS)
        check_range("num_experts_per_tok", self.top_k, 1, min(self.num_experts, MAX_TOP_K))
        check_range("moe_intermediate_size", self.expert_width, 1, 2**20)
        check_range("num_dense_layers", self.num_dense_layers, 0, self.num_layers)
        check_range("routed_scaling_factor", self.factor, 1e-6, 1e6)

    @property
    def route(self) -> RouteSpec:
        return RouteSpec(
            num_experts=self.num_experts,
            top_k=self.top_k,
            score="sigmoid",
            normalise=self.normalise,
            eps=1e-6,
            factor=self.factor,
        )

    def mlp_tensors(self, layer: int, name: str, gguf: str) -> Tensors:
        if layer < self.num_dense_layers:
            return lfm2.LFM2Config.mlp_tensors(self, layer, name, gguf)
        return LFM2Experts.tensors(
            f"{name}.feed_forward",
            gguf,
            hidden_size=self.hidden_size,
            num_experts=self.num_experts,
            width=self.expert_width,
            correction=self.has_correction,
        )


class LFM2MoeModel(lfm2.LFM2Model):
    """With experts in most layers."""

    config: LFM2MoeConfig

    def load_mlp(self, packer: Packer, layer: int, name: str) -> MLP:
        config = self.config
        if layer < config.num_dense_layers:
            return lfm2.LFM2Model.load_mlp(self, packer, layer, name)
        return LFM2Experts.load(packer, name, self._ops, config.route, correction=config.has_correction)


def _hf(source: HFSource) -> LFM2MoeConfig:
    fields = source.fields
    alike = lfm2.read_hf(source)
    return LFM2MoeConfig(
        **alike,
        intermediate_size=fields.integer("intermediate_size", 7168),
        num_experts=fields.integer("num_experts", 32),
        top_k=fields.integer("num_experts_per_tok", 4),
        expert_width=fields.integer("moe_intermediate_size", 1792),
        num_dense_layers=min(fields.integer("num_dense_layers", 2), alike["num_layers"]),
        has_correction=fields.flag("use_expert_bias", True),
        normalise=fields.flag("norm_topk_prob", True),
        factor=fields.number("routed_scaling_factor", 1.0),
    )


def _gguf(source: GGUFSource) -> LFM2MoeConfig:
    fields = source.fields
    gating = fields.integer("expert_gating_func", _SIGMOID)
    if gating != _SIGMOID:
        raise UnsupportedModelError(f"{source.name}.expert_gating_func {gating} is not implemented; {_SIGMOID} is")
    alike = lfm2.read_gguf(source)
    dense = min(fields.integer("leading_dense_block_count", 0), alike["num_layers"])
    return LFM2MoeConfig(
        **alike,
        num_experts=fields.integer("expert_count"),
        top_k=fields.integer("expert_used_count"),
        expert_width=fields.integer("expert_feed_forward_length"),
        num_dense_layers=dense,
        has_correction=any(name.endswith("exp_probs_b.bias") for name in source.shapes),
        factor=fields.number("expert_weights_scale", 1.0),
    )


LFM2_MOE = Family(
    name="lfm2_moe",
    architectures=("Lfm2MoeForCausalLM",),
    gguf=("lfm2moe",),
    hf_keys=lfm2.HF_KEYS
    | {
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_dense_layers", "use_expert_bias"),
        *("norm_topk_prob", "routed_scaling_factor"),
    },
    gguf_keys=lfm2.GGUF_KEYS,
    read_hf=_hf,
    read_gguf=_gguf,
    model=LFM2MoeModel,
)
