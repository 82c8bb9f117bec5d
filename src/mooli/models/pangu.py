"""openPangu-Ultra-MoE: DeepSeek-V3's decoder with a norm before and one behind each half of a layer, and no groups.

Owns what is different: the norms, and the keys of its config.json, which has two spellings.

Source: Pangu Ultra MoE, arXiv 2505.04519, and the model's code at gitcode.com/ascend-tribe.
"""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models.decoder import DecoderLayer, Names, SandwichLayer
from mooli.models.deepseek import HF_KEYS, DeepseekConfig, check_sigmoid, read_hf
from mooli.models.family import Family
from mooli.models.fields import HFSource, short
from mooli.models.layers import ALWAYS_PAIRS

_SPELLINGS = {
    "attention_q_lora_dim": "q_lora_rank",
    "attention_kv_lora_dim": "kv_lora_rank",
    "attention_qk_dim": "qk_nope_head_dim",
    "attention_qk_rope_dim": "qk_rope_head_dim",
    "attention_v_dim": "v_head_dim",
    "num_routed_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "num_dense_layers": "first_k_dense_replace",
    "num_mtp_layers": "num_nextn_predict_layers",
}
"""Its own keys, and DeepSeek's for the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PanguUltraConfig(DeepseekConfig):
    """With four norms in each layer."""

    layer: ClassVar[type[DecoderLayer]] = SandwichLayer

    norm_names: tuple[Names, ...] = (
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "post_attention_norm"),
        ("pre_mlp_layernorm", "ffn_norm"),
        ("post_mlp_layernorm", "post_ffw_norm"),
    )


def _hf(source: HFSource) -> PanguUltraConfig:
    values = source.values
    usual = {_SPELLINGS[own]: values[own] for own in _SPELLINGS if own in values}
    for own, name in _SPELLINGS.items():
        if name in usual and name in values and values[name] != usual[name]:
            raise CheckpointError(
                f"config.json: {own} is {short(usual[name])}, and {name} is {short(values[name])}: leave one out"
            )
    source = dataclasses.replace(source, values=ChainMap(usual, cast(dict[str, Any], values)))
    fields = source.fields
    common = source.common(max_position_embeddings=131072, bos_id=0, eos_id=1)
    check_sigmoid(source)
    if not fields.flag("sandwich_norm", True):
        raise UnsupportedModelError("sandwich_norm false is not implemented: layers have four norms")
    changed: dict[str, Any] = {
        "groups": 1,
        "kept_groups": 1,
        "normalise": fields.flag("norm_topk_prob", True),
        "correction": fields.flag("router_enable_expert_bias"),
    }
    alike = read_hf(source, common, ALWAYS_PAIRS, **changed)
    return PanguUltraConfig(**alike | {"rms_norm_eps": fields.number("rms_norm_eps", 1e-5)})


PANGU_ULTRA_MOE = Family(
    name="pangu_ultra_moe",
    architectures=("PanguUltraMoEForCausalLM",),
    hf_keys=HF_KEYS
    | _SPELLINGS.keys()
    | frozenset(
        (
            *("first_k_dense_replace", "scoring_func", "topk_method", "norm_topk_prob", "sandwich_norm"),
            "router_enable_expert_bias",
        )
    ),
    read_hf=_hf,
)
