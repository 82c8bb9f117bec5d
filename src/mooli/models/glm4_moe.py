"""GLM-4.5 to 4.7: experts that a sigmoid chooses, with a correction that only chooses.

Owns its configuration and names. The first layers are dense; in the others an MLP stands beside the experts. The first
half of each head is rotated. Layers that guess tokens ahead stand behind the others in files, and are left out.

Source: GLM-4.5, arXiv 2508.06471, and the model's code in Transformers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from mooli.backends.routing import RouteSpec
from mooli.models import llama, rope
from mooli.models.family import Family
from mooli.models.fields import GGUFSource, HFSource, check_range, equal_heads
from mooli.models.qwen_moe import MoeConfig, MoeModel

_ROTATED = 0.5
"""Which part of a head, where a config.json says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Glm4MoeConfig(MoeConfig):
    """Of a decoder of the family. CheckpointError for a number out of its bounds.

    groups, kept_groups: of experts, see `RouteSpec`. factor: of what the experts give. num_extra_blocks: of the file,
    which guess tokens ahead.
    """

    shared_name: ClassVar[str] = "shared_experts"
    shared_has_gate: ClassVar[bool] = False
    has_correction: ClassVar[bool] = True
    gguf_mlp_norm: ClassVar[str] = "post_attention_norm"

    groups: int = 1
    kept_groups: int = 1
    factor: float = 1.0
    num_extra_blocks: int = 0

    def __post_init__(self) -> None:
        MoeConfig.__post_init__(self)
        check_range("n_group", self.groups, 1, self.num_experts)
        check_range("topk_group", self.kept_groups, 1, self.groups)
        check_range("routed_scaling_factor", self.factor, 1e-6, 1e6)
        check_range("layers that guess ahead", self.num_extra_blocks, 0, 64)

    @property
    def route(self) -> RouteSpec:
        return RouteSpec(
            num_experts=self.num_experts,
            top_k=self.top_k,
            score="sigmoid",
            groups=self.groups,
            kept_groups=self.kept_groups,
            group_top=2 if self.groups > 1 else 1,
            normalise=self.normalise,
            eps=1e-20,
            factor=self.factor,
        )

    def may_ignore(self, name: str) -> bool:
        extra = range(self.num_layers, self.num_layers + self.num_extra_blocks)
        ahead = tuple(f"{block}{index}." for index in extra for block in ("model.layers.", "blk."))
        return MoeConfig.may_ignore(self, name) or name.startswith(ahead)


def _hf(source: HFSource) -> Glm4MoeConfig:
    fields = source.fields
    common = source.common(max_position_embeddings=131072)
    partial, values = rope.without_partial(source.values, _ROTATED)
    heads = fields.integer("num_attention_heads")
    head_dim = fields.optional_integer("head_dim") or equal_heads(common["hidden_size"], heads)
    width = fields.integer("moe_intermediate_size", 1408)
    own: dict[str, Any] = {
        "head_dim": head_dim,
        "num_kv_heads": fields.optional_integer("num_key_value_heads", 8) or heads,
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-5),
        "rotary_dim": rope.rotary_dim(head_dim, partial),
        "qkv_bias": fields.flag("attention_bias"),
        "qk_norm": fields.flag("use_qk_norm"),
        "num_experts": fields.integer("n_routed_experts", 128),
        "top_k": fields.integer("num_experts_per_tok", 8),
        "expert_width": width,
        "shared_width": width * fields.integer("n_shared_experts", 1),
        "dense_layers": _first(fields.integer("first_k_dense_replace", 1), common["num_layers"]),
        "normalise": fields.flag("norm_topk_prob", True),
        "groups": fields.integer("n_group", 1),
        "kept_groups": fields.integer("topk_group", 1),
        "factor": fields.number("routed_scaling_factor", 1.0),
        "num_extra_blocks": fields.integer("num_nextn_predict_layers", 1),
    }
    return Glm4MoeConfig(**llama.read_hf(dataclasses.replace(source, values=values), common, **own))


def _first(count: int, num_layers: int) -> tuple[int, ...]:
    check_range("num_layers", num_layers, 1, 1024)
    return tuple(range(min(count, num_layers)))


def _gguf(source: GGUFSource) -> Glm4MoeConfig:
    fields = source.fields
    alike = llama.read_gguf(source, has_experts=True, is_partial=True)
    extra = fields.integer("nextn_predict_layers", 0)
    check_range("layers that guess ahead", extra, 0, alike["num_layers"] - 1)
    width = fields.integer("expert_feed_forward_length")
    return Glm4MoeConfig(
        **alike
        | {
            "num_layers": alike["num_layers"] - extra,
            "num_extra_blocks": extra,
            "num_experts": fields.integer("expert_count"),
            "top_k": fields.integer("expert_used_count"),
            "expert_width": width,
            "shared_width": width * fields.integer("expert_shared_count", 0),
            "dense_layers": _first(fields.integer("leading_dense_block_count", 0), alike["num_layers"] - extra),
            "normalise": fields.flag("expert_weights_norm", True),
            "groups": fields.integer("expert_group_count", 1),
            "kept_groups": fields.integer("expert_group_used_count", 1),
            "factor": fields.number("expert_weights_scale", 1.0),
        }
    )


GLM4_MOE = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    gguf=("glm4moe",),
    hf_keys=llama.HF_KEYS
    | {
        *("attention_bias", "use_qk_norm", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
        *("n_shared_experts", "first_k_dense_replace", "norm_topk_prob", "n_group", "topk_group"),
        *("routed_scaling_factor", "num_nextn_predict_layers"),
    },
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf,
    read_gguf=_gguf,
    model=MoeModel,
)
