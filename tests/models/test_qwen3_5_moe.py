"""Qwen3.5 with experts and Qwen3-Next against Transformers in float32, of every kind of file that is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from test_llama_family import Golden
from test_qwen3_5_files import KEY_DIM, KEY_HEADS, VALUE_DIM, VALUE_HEADS, converted
from test_sparse_families import FEW
from tiny_families import SIZES, Floats, assert_near, check, logits_of, save, stacked_experts

from mooli.models.qwen3_5 import Qwen35Config
from mooli.models.qwen3_5_moe import Qwen3NextConfig
from mooli.models.registry import read_hf_config
from variants import VARIANTS, Variant, require

MIXED: dict[str, Any] = {
    **SIZES,
    "head_dim": 32,
    "linear_num_key_heads": KEY_HEADS,
    "linear_num_value_heads": VALUE_HEADS,
    "linear_key_head_dim": KEY_DIM,
    "linear_value_head_dim": VALUE_DIM,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 96,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "qwen3.5-moe": transformers.Qwen3_5MoeTextConfig(**MIXED),
    "qwen3-next": transformers.Qwen3NextConfig(**MIXED, intermediate_size=64, mlp_only_layers=[1]),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return save(CONFIGS[request.param], tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("variant", FEW, ids=str)
def test_logits_agree_with_transformers(golden: Golden, variant: Variant) -> None:
    require(variant.backend)
    check(golden, variant)


EXPERTS = {
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    **{f"mlp.experts.{part}_proj.weight": f"ffn_{part}_exps.weight" for part in ("gate", "up", "down")},
    **{f"mlp.shared_expert.{part}_proj.weight": f"ffn_{part}_shexp.weight" for part in ("gate", "up", "down")},
}


def next_converted(name: str, value: Floats, *, is_split: bool) -> Iterator[tuple[str, Floats]]:
    """As converters write Qwen3-Next; old ones leave the projection that has z in one."""
    value = value.squeeze(1) if value.ndim == 3 and "conv1d" in name else value
    if name.endswith("in_proj_qkvz.weight") and is_split:
        block, shares = f"blk.{name.split('.')[2]}", VALUE_HEADS // KEY_HEADS * VALUE_DIM
        heads = np.split(value.reshape(KEY_HEADS, -1, 64), [KEY_DIM, 2 * KEY_DIM, 2 * KEY_DIM + shares], axis=1)
        q, k, v, z = (np.ascontiguousarray(part).reshape(-1, 64) for part in heads)
        yield from ((f"{block}.attn_qkv.weight", np.concatenate([q, k, v])), (f"{block}.attn_gate.weight", z))
        return
    if "norm.weight" in name and "linear_attn" not in name:
        value = value + 1
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3NEXT, 3)
    dense = {f"model.layers.1.mlp.{part}_proj.weight": f"blk.1.ffn_{part}.weight" for part in ("gate", "up", "down")}
    if name in dense:  # which no published model has
        yield dense[name], value
    elif name.endswith("A_log"):
        yield f"blk.{name.split('.')[2]}.ssm_a", -np.exp(value)
    else:
        found = known.get_name(name.replace("dt_bias", "dt_proj.bias"), try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        yield found, value


def write_gguf(path: Path, folder: Path, *, architecture: str = "qwen35moe", is_split: bool = True) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_feed_forward_length(64)
    writer.add_block_count(3)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_expert_count(8)
    writer.add_expert_used_count(3)
    writer.add_expert_feed_forward_length(32)
    writer.add_expert_shared_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_state_size(KEY_DIM)
    writer.add_ssm_group_count(KEY_HEADS)
    writer.add_ssm_time_step_rank(VALUE_HEADS)
    writer.add_ssm_inner_size(VALUE_HEADS * VALUE_DIM)
    known = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.QWEN35MOE]
    names = {gguf.TENSOR_NAMES[tensor].rpartition(".")[2] for tensor in known}
    for name, values in stacked_experts(load_file(folder / "model.safetensors")).items():
        part = name.split(".", 3)[-1]
        if architecture == "qwen3next":
            for converted_name, value in next_converted(name, values, is_split=is_split):
                writer.add_tensor(converted_name, value)
        elif part in EXPERTS:
            assert EXPERTS[part].removesuffix(".weight") in names
            # Converters have long left out lengths of one: the shared gate is a vector.
            writer.add_tensor(f"blk.{name.split('.')[2]}.{EXPERTS[part]}", values.squeeze())
        else:
            writer.add_tensor(*converted(name, values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("golden", ["qwen3.5-moe"], indirect=True)
@pytest.mark.parametrize("backend_name", ["reference", "cpu"])
def test_a_gguf_file_gives_the_same_logits(tmp_path: Path, golden: Golden, backend_name: str) -> None:
    require(backend_name)
    write_gguf(tmp_path / "model.gguf", golden.folder)
    variant = next(variant for variant in VARIANTS if variant.backend == backend_name)
    for actual, expected in zip(logits_of(tmp_path / "model.gguf", variant), golden.logits, strict=True):
        assert_near(actual, expected, variant)


@pytest.mark.parametrize("golden", ["qwen3-next"], indirect=True)
@pytest.mark.parametrize(("backend_name", "is_split"), [("cpu", True), ("reference", True), ("reference", False)])
def test_a_gguf_file_of_qwen3_next_gives_the_same_logits(
    tmp_path: Path, golden: Golden, backend_name: str, is_split: bool
) -> None:
    require(backend_name)
    write_gguf(tmp_path / "model.gguf", golden.folder, architecture="qwen3next", is_split=is_split)
    variant = next(variant for variant in VARIANTS if variant.backend == backend_name)
    for actual, expected in zip(logits_of(tmp_path / "model.gguf", variant), golden.logits, strict=True):
        assert_near(actual, expected, variant)


def test_the_text_part_of_a_model_that_sees_may_have_its_experts_in_one_tensor(tmp_path: Path) -> None:
    golden = save(CONFIGS["qwen3.5-moe"], tmp_path / "text")
    text = json.loads((golden.folder / "config.json").read_text())
    whole = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps({**whole, "vision_config": {"depth": 2}}))
    weights = {}
    for name, values in stacked_experts(load_file(golden.folder / "model.safetensors")).items():
        weights[name.replace("model.", "model.language_model.", 1)] = values
    for layer in range(3):
        experts = f"model.language_model.layers.{layer}.mlp.experts"
        gate, up = weights.pop(f"{experts}.gate_proj.weight"), weights.pop(f"{experts}.up_proj.weight")
        weights[f"{experts}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        weights[f"{experts}.down_proj"] = weights.pop(f"{experts}.down_proj.weight")
    weights["model.visual.blocks.0.norm1.weight"] = np.zeros(8, np.float32)
    save_file(weights, tmp_path / "model.safetensors")
    for actual, expected in zip(logits_of(tmp_path, VARIANTS[0]), golden.logits, strict=True):
        assert_near(actual, expected, VARIANTS[0])


def test_defaults_are_those_of_transformers() -> None:
    default = transformers.Qwen3_5MoeTextConfig()
    config = read_hf_config({"architectures": ["Qwen3_5MoeForCausalLM"], **default.to_dict()})
    assert isinstance(config, Qwen35Config) and config.experts is not None
    experts = config.experts
    assert (experts.num_experts, experts.top_k, experts.width, experts.shared_width) == (256, 8, 512, 512)
    assert experts.normalise and config.rotary_dim == 64 and sum(config.attends) == 10
    following = transformers.Qwen3NextConfig()
    config = read_hf_config({"architectures": ["Qwen3NextForCausalLM"], **following.to_dict()})
    assert isinstance(config, Qwen3NextConfig) and config.experts is not None
    assert (config.experts.num_experts, config.experts.top_k) == (following.num_experts, following.num_experts_per_tok)
    assert config.experts.normalise == following.norm_topk_prob and not config.experts.dense_layers
