"""Families with experts, each against Transformers in float32, on every backend and of every kind of file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers
from numpy.typing import NDArray
from test_llama_family import Golden
from tiny_families import SIZES, assert_near, check, logits_of, save, stacked_experts, write_gguf

from model_files import interleaved
from mooli.errors import UnsupportedModelError
from mooli.models.registry import read_hf_config
from variants import VARIANTS, Variant, require

Tensors = dict[str, NDArray[np.float32]]


@dataclass
class Case:
    """A configuration, and how its GGUF files differ: `keys` of metadata, besides those that all have."""

    config: transformers.PreTrainedConfig
    arch: gguf.MODEL_ARCH
    keys: dict[str, Any] = field(default_factory=dict)


GGUF_KEYS: dict[str, Any] = {"feed_forward_length": 96, "expert_count": 8, "expert_used_count": 3}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 3.0,
}
GRANITE_KEYS: dict[str, Any] = {
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.scale": 0.3,
    "embedding_scale": 12.0,
    "residual_scale": 0.22,
    "logit_scale": 3.0,
}
MAMBA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "intermediate_size": 96,
    "shared_intermediate_size": 80,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
}
MAMBA_KEYS: dict[str, Any] = {
    "ssm.conv_kernel": 4,
    "ssm.state_size": 16,
    "ssm.group_count": 1,
    "ssm.inner_size": 128,
    "ssm.time_step_rank": 8,
    "rope.scaling.finetuned": False,
    "expert_shared_feed_forward_length": 80,
}
CASES: dict[str, Case] = {
    "granitemoe": Case(
        transformers.GraniteMoeConfig(
            **SIZES, **GRANITE, intermediate_size=96, num_local_experts=8, num_experts_per_tok=3, rms_norm_eps=1e-3
        ),
        gguf.MODEL_ARCH.GRANITE_MOE,
        {**GRANITE_KEYS, "attention.layer_norm_rms_epsilon": 1e-3},
    ),
    "granitemoeshared": Case(
        transformers.GraniteMoeSharedConfig(
            **SIZES,
            **GRANITE,
            intermediate_size=96,
            num_local_experts=8,
            num_experts_per_tok=3,
            shared_intermediate_size=80,
        ),
        gguf.MODEL_ARCH.GRANITE_MOE,
        {**GRANITE_KEYS, "attention.layer_norm_rms_epsilon": 1e-6, "expert_shared_feed_forward_length": 80},
    ),
    "granite 4": Case(
        transformers.GraniteMoeHybridConfig(**SIZES, **GRANITE, **MAMBA, num_local_experts=8, num_experts_per_tok=3),
        gguf.MODEL_ARCH.GRANITE_HYBRID,
        {**GRANITE_KEYS, **MAMBA_KEYS},
    ),
    "granite 4, dense and rotated": Case(
        transformers.GraniteMoeHybridConfig(
            **SIZES, **GRANITE, **MAMBA, num_local_experts=0, position_embedding_type="rope"
        ),
        gguf.MODEL_ARCH.GRANITE_HYBRID,
        {
            **GRANITE_KEYS,
            **MAMBA_KEYS,
            "expert_count": 0,
            "expert_used_count": 0,
            "feed_forward_length": 80,
            "rope.scaling.finetuned": True,
        },
    ),
    "glm4_moe": Case(
        transformers.Glm4MoeConfig(
            **SIZES,
            head_dim=32,
            intermediate_size=96,
            moe_intermediate_size=32,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_shared_experts=2,
            routed_scaling_factor=1.5,
            attention_bias=True,
            use_qk_norm=True,
        ),
        gguf.MODEL_ARCH.GLM4_MOE,
        {
            "block_count": 4,
            "nextn_predict_layers": 1,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.key_length": 32,
            "attention.value_length": 32,
            "rope.dimension_count": 16,
            "leading_dense_block_count": 1,
            "expert_feed_forward_length": 32,
            "expert_shared_count": 2,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 1.5,
        },
    ),
    "glm4_moe, groups": Case(
        transformers.Glm4MoeConfig(
            **SIZES,
            intermediate_size=96,
            moe_intermediate_size=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=4,
            topk_group=2,
            norm_topk_prob=False,
            first_k_dense_replace=2,
        ),
        gguf.MODEL_ARCH.GLM4_MOE,
        {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": 8,
            "leading_dense_block_count": 2,
            "expert_used_count": 2,
            "expert_feed_forward_length": 32,
            "expert_shared_count": 1,
            "expert_weights_norm": False,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
        },
    ),
    "minimax_m2": Case(
        transformers.MiniMaxM2Config(
            **SIZES, head_dim=32, intermediate_size=32, num_local_experts=8, num_experts_per_tok=3, rotary_dim=16
        ),
        gguf.MODEL_ARCH.MINIMAXM2,
        {
            "attention.layer_norm_rms_epsilon": 1e-6,
            "attention.key_length": 32,
            "attention.value_length": 32,
            "rope.dimension_count": 16,
            "rope.freq_base": 5e6,
            "expert_feed_forward_length": 32,
            "expert_gating_func": 2,
        },
    ),
    "lfm2_moe": Case(
        transformers.Lfm2MoeConfig(
            **SIZES,
            intermediate_size=96,
            moe_intermediate_size=32,
            num_experts=8,
            num_experts_per_tok=3,
            num_dense_layers=1,
            routed_scaling_factor=1.5,
            layer_types=["conv", "full_attention", "conv"],
        ),
        gguf.MODEL_ARCH.LFM2MOE,
        {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 1e6,
            "shortconv.l_cache": 3,
            "leading_dense_block_count": 1,
            "expert_feed_forward_length": 32,
            "expert_gating_func": 2,
            "expert_weights_scale": 1.5,
        },
    ),
    "ernie4_5_moe": Case(
        transformers.Ernie4_5_MoeConfig(
            **SIZES, intermediate_size=96, moe_intermediate_size=32, moe_num_experts=8, moe_k=3
        ),
        gguf.MODEL_ARCH.ERNIE4_5_MOE,
        {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 5e5,
            "expert_feed_forward_length": 32,
        },
    ),
    "hunyuan_v1_moe": Case(
        transformers.HunYuanMoEV1Config(
            **SIZES,
            head_dim=32,
            intermediate_size=96,
            num_experts=8,
            moe_topk=3,
            rope_parameters={"rope_type": "dynamic", "factor": 1.0, "alpha": 50.0, "rope_theta": 10000.0},
        ),
        gguf.MODEL_ARCH.HUNYUAN_MOE,
        {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.key_length": 32,
            "attention.value_length": 32,
            "rope.freq_base": 10000.0 * 50.0 ** (32 / 30),
            "expert_feed_forward_length": 96,
            "expert_shared_feed_forward_length": 96,
        },
    ),
}


FEW = [
    variant
    for variant in VARIANTS
    if variant.backend == "reference" or (variant.kv_cache_dtype is None and variant.dtype != "float16")
    if variant.quantization is None or variant.backend == "cpu"
]
"""One of each kind of arithmetic: what rounding does to experts, `test_gpt_oss.py` shows on all."""


@pytest.fixture(scope="module", params=list(CASES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def golden(name: str, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return save(CASES[name].config, tmp_path_factory.mktemp(name))


@pytest.mark.parametrize("variant", FEW, ids=str)
def test_logits_agree_with_transformers(golden: Golden, variant: Variant) -> None:
    require(variant.backend)
    check(golden, variant)


def converted(name: str, tensors: Tensors) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """As converters have it, still under the names of folders."""
    for key, values in stacked_experts(tensors).items():
        if "granite" in name and key.endswith(("q_proj.weight", "k_proj.weight")):
            heads = SIZES["num_attention_heads" if "q_proj" in key else "num_key_value_heads"]
            yield key, interleaved(values, heads)
        elif key.endswith(("correction_bias", "expert_bias")):
            yield (f"{key}.bias" if key.endswith("expert_bias") else key.replace("_bias", ".bias")), values.ravel()
        elif ".feed_forward.experts." in key:
            yield key.replace("feed_forward", "block_sparse_moe"), values
        elif ".mamba." in key:
            yield from converted_mamba(key, values)
        elif ".shared_mlp." in key and "granite" in name:
            yield from converted_shared(key, values, has_experts="dense" not in name)
        elif key.endswith("conv.conv.weight"):
            yield key, values.squeeze(1)
        elif key.endswith("input_linear.weight"):
            for part, projection in enumerate(("gate_proj", "up_proj")):
                stem = key.replace("block_sparse_moe.input_linear", f"mlp.experts.{projection}")
                yield stem, np.split(values, 2, axis=1)[part]
        else:
            yield key, values
    if name == "glm4_moe":  # a layer that guesses tokens ahead
        yield "model.layers.3.eh_proj.weight", np.zeros((64, 128), np.float32)


def converted_mamba(key: str, values: NDArray[np.float32]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Numbers of heads are columns in files, and the norm has a row for each group."""
    if key.endswith("A_log"):
        yield key, -np.exp(values).reshape(-1, 1)
    elif key.endswith(".D"):
        yield key, values.reshape(-1, 1)
    elif key.endswith("dt_bias"):
        yield key.replace("dt_bias", "dt_proj.bias"), values
    elif key.endswith("norm.weight"):
        yield key, values.reshape(1, -1)
    else:
        yield key, values.squeeze(1) if values.ndim == 3 else values


def converted_shared(
    key: str, values: NDArray[np.float32], *, has_experts: bool
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    stem = key.split("shared_mlp.")[0] + ("mlp.shared_expert." if has_experts else "mlp.")
    if key.endswith("output_linear.weight"):
        yield f"{stem}down_proj.weight", values
        return
    for projection, rows in zip(("gate_proj", "up_proj"), np.split(values, 2), strict=True):
        yield f"{stem}{projection}.weight", rows


@pytest.mark.parametrize("backend_name", ["reference", "cpu"])
def test_a_gguf_file_gives_the_same_logits(tmp_path: Path, name: str, golden: Golden, backend_name: str) -> None:
    require(backend_name)
    case, variant = CASES[name], next(v for v in VARIANTS if v.backend == backend_name)
    write_gguf(tmp_path / "model.gguf", golden.folder, case.arch, GGUF_KEYS | case.keys, lambda it: converted(name, it))
    for actual, expected in zip(logits_of(tmp_path / "model.gguf", variant), golden.logits, strict=True):
        assert_near(actual, expected, variant)


def test_ernie_divides_weights_by_no_less_than_its_minimum(tmp_path: Path) -> None:
    config = transformers.Ernie4_5_MoeConfig(
        **SIZES,
        intermediate_size=96,
        moe_intermediate_size=32,
        moe_num_experts=8,
        moe_k=1,
        moe_norm_min=0.6,
        moe_layer_start_index=0,
        moe_layer_interval=2,
        moe_num_shared_experts=0,
    )
    check(save(config, tmp_path), VARIANTS[0])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ernie4_5_moe", {"use_bias": True}, "use_bias"),
        ("granite 4", {"mamba_n_groups": 2}, "states in 2 groups"),
        ("granite 4", {"mamba_proj_bias": True}, "mamba_proj_bias"),
        ("granite 4", {"time_step_limit": [0.0, 1.0]}, "time_step_limit"),
        ("granite 4", {"position_embedding_type": "learned"}, "position_embedding_type 'learned'"),
        ("minimax_m2", {"use_qk_norm": False}, "use_qk_norm=false"),
        ("minimax_m2", {"qk_norm_type": "per_head"}, "qk_norm_type 'per_head'"),
        ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ("hunyuan_v1_moe", {"moe_intermediate_size": [96, 96, 32]}, "layers with different moe_intermediate_size"),
        ("hunyuan_v1_moe", {"moe_intermediate_size": 64}, "moe_intermediate_size 64 is not implemented"),
        ("hunyuan_v1_moe", {"num_shared_expert": [2, 2, 2]}, "num_shared_expert"),
        ("hunyuan_v1_moe", {"norm_topk_prob": False}, "norm_topk_prob=false"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(name: str, change: dict[str, Any], message: str) -> None:
    config = {**CASES[name].config.to_dict(), "architectures": None}
    read_hf_config(config)
    with pytest.raises(UnsupportedModelError, match=message):
        read_hf_config({**config, **change})


def test_hunyuan_may_say_the_same_of_each_layer(tmp_path: Path) -> None:
    config = {**CASES["hunyuan_v1_moe"].config.to_dict(), "architectures": None}
    listed = {"moe_topk": [3] * 3, "num_shared_expert": [1] * 3, "moe_intermediate_size": [96] * 3}
    assert read_hf_config({**config, **listed}) == read_hf_config(config)
