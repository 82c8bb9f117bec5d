"""Configurations of every family, from config.json and GGUF metadata, and the rotary frequencies they give."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from mooli.errors import CheckpointError, ConfigError, UnsupportedModelError
from mooli.models.registry import merge_hf_overrides, read_gguf_config, read_hf_config
from mooli.models.rope import RopeScaling, inv_freq, mscale, rope_spec

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SMALL}
YARN_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def frequencies(config: Any) -> np.ndarray:
    return inv_freq(config.head_dim, config.rope_theta, config.rope_scaling)


def written_by_transformers(config: PreTrainedConfig, folder: Path) -> dict[str, Any]:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


FAMILIES = {
    "llama": LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"], dtype="bfloat16"),
    "llama with biases": LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"], attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SMALL, architectures=["MistralForCausalLM"], sliding_window=8, head_dim=16),
    "qwen2": Qwen2Config(**SMALL, architectures=["Qwen2ForCausalLM"], tie_word_embeddings=True, eos_token_id=[5, 6]),
    "qwen3": Qwen3Config(**SMALL, architectures=["Qwen3ForCausalLM"], head_dim=16, dtype="float16"),
}
EXPECTED: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 8, "dtype": "bfloat16", "eos_ids": (2,), "bos_id": 1, "tie_word_embeddings": False},
    "llama with biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "dtype": "float32"},
    "mistral": {"head_dim": 16, "sliding_window": 8, "qkv_bias": False, "o_bias": False},
    "qwen2": {
        "qkv_bias": True,
        "o_bias": False,
        "tie_word_embeddings": True,
        "eos_ids": (5, 6),
        "sliding_window": None,
    },
    "qwen3": {"qk_norm": True, "qkv_bias": False, "head_dim": 16, "dtype": "float16", "bos_id": None},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_that_transformers_writes_is_read(tmp_path: Path, name: str) -> None:
    hf = FAMILIES[name]
    config = read_hf_config(written_by_transformers(hf, tmp_path))
    assert config.family == name.split()[0] == hf.model_type
    assert config.architecture == hf.architectures[0]
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (96, 32, 64)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (2, 4, 2)
    assert config.max_position_embeddings == hf.max_position_embeddings
    assert config.rms_norm_eps == hf.rms_norm_eps
    for field, value in EXPECTED[name].items():
        assert getattr(config, field) == value, field


ROPES = {
    "plain": LlamaConfig(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "linear": LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "llama3": LlamaConfig(**SMALL, head_dim=128, rope_parameters={**LLAMA3_ROPE, "rope_theta": 5e5}),
    "llama3.2": LlamaConfig(**SMALL, head_dim=64, rope_parameters={**LLAMA3_ROPE, "factor": 32.0, "rope_theta": 5e5}),
    "qwen3": Qwen3Config(**SMALL, head_dim=128, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "yarn": LlamaConfig(**SMALL, head_dim=64, rope_parameters={**YARN_ROPE, "truncate": False}),
    "yarn, whole ends": LlamaConfig(**SMALL, head_dim=128, rope_parameters=YARN_ROPE),
    "yarn, two multipliers": LlamaConfig(
        **SMALL, head_dim=64, rope_parameters={**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 8.0}
    ),
    "yarn, its own factor": LlamaConfig(
        **SMALL, head_dim=64, rope_parameters={**YARN_ROPE, "attention_factor": 1.75, "beta_slow": 2.0}
    ),
    "yarn, equal ends": LlamaConfig(
        **SMALL, head_dim=64, rope_parameters={**YARN_ROPE, "beta_fast": 4.0, "beta_slow": 4.0, "truncate": False}
    ),
    "yarn, no factor": LlamaConfig(
        **SMALL, max_position_embeddings=16384, head_dim=64, rope_parameters={**YARN_ROPE, "factor": None}
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_frequencies_equal_those_of_transformers(tmp_path: Path, name: str) -> None:
    hf = ROPES[name]
    hf.architectures = ["Qwen3ForCausalLM" if name == "qwen3" else "LlamaForCausalLM"]
    rotary = (Qwen3RotaryEmbedding if name == "qwen3" else LlamaRotaryEmbedding)(hf)
    config = read_hf_config(written_by_transformers(hf, tmp_path))
    actual = frequencies(config)
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, rotary.inv_freq.numpy(), rtol=1e-5)
    positions = torch.arange(9)[None]
    cosines = rotary(torch.zeros(1), positions)[0][0, :, : config.head_dim // 2]
    spec = rope_spec(config.head_dim, config.rope_theta, config.rope_scaling)
    np.testing.assert_allclose(spec.factor, rotary.attention_scaling)
    np.testing.assert_allclose(spec.factor * np.cos(np.arange(9)[:, None] * actual), cosines.numpy(), atol=1e-5)


def test_frequency_factors_divide_each_frequency() -> None:
    config = read_hf_config(LLAMA)
    factors = (1.0, 2.0, 4.0, 8.0)
    scaled = dataclasses.replace(config, rope_scaling=RopeScaling(type="freq_factors", freq_factors=factors))
    np.testing.assert_allclose(frequencies(scaled) * factors, frequencies(config))


def test_old_and_new_spellings_of_rope_and_dtype_agree() -> None:
    old = {**LLAMA, "torch_dtype": "bfloat16", "rope_theta": 5e5, "rope_scaling": {**LLAMA3_ROPE}}
    oldest = {**old, "rope_scaling": {**{k: v for k, v in LLAMA3_ROPE.items() if k != "rope_type"}, "type": "llama3"}}
    new = {**LLAMA, "dtype": "bfloat16", "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}}
    assert read_hf_config(old) == read_hf_config(new) == read_hf_config(oldest)
    scaling = read_hf_config(old).rope_scaling
    assert scaling is not None
    assert (scaling.type, scaling.factor) == ("llama3", 8.0)


def test_missing_keys_take_the_defaults_of_transformers() -> None:
    bare = {key: value for key, value in LLAMA.items() if key not in ("architectures", "num_key_value_heads")}
    config = read_hf_config(bare)
    assert (config.architecture, config.num_kv_heads, config.rope_theta) == ("LlamaForCausalLM", 4, 10000.0)
    assert (config.bos_id, config.eos_ids, config.dtype) == (1, (2,), "float32")


def test_ending_ids_of_both_files_are_joined_without_repeats() -> None:
    config = read_hf_config({**LLAMA, "eos_token_id": 7}, {"eos_token_id": [9, 7, 8]})
    assert config.eos_ids == (9, 7, 8)


QWEN2 = {**SMALL, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 16}


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({}, None),
        ({"use_sliding_window": False, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "max_window_layers": 0}, 16),
        ({"use_sliding_window": True, "max_window_layers": 2}, None),
        ({"use_sliding_window": True}, None),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 16),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 2}, None),
    ],
)
def test_a_sliding_window_of_qwen2_counts_where_it_reaches_every_layer(
    settings: dict[str, Any], window: int | None
) -> None:
    assert read_hf_config({**QWEN2, **settings}).sliding_window == window


UNSUPPORTED = {
    "another family": ({**LLAMA, "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM, Mistral"),
    "another model type": ({**SMALL, "model_type": "mamba"}, "mamba"),
    "a table for a name": ({**LLAMA, "architectures": [{"a": 1}]}, "'a': 1"),
    "dynamic": ({**LLAMA, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope scaling 'dynamic'"),
    "half a head rotated": ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "gelu": ({**LLAMA, "hidden_act": "gelu"}, "activation 'gelu'"),
    "float8": ({**LLAMA, "dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    "a window in some layers": (
        {**QWEN2, "use_sliding_window": True, "max_window_layers": 1},
        "only some of the layers",
    ),
}


@pytest.mark.parametrize(("config", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_what_is_not_implemented_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_hf_config(config)


WRONG = [
    ({"hidden_size": None}, "no hidden_size"),
    ({"hidden_size": "32"}, "hidden_size must be a whole number"),
    ({"hidden_size": True}, "hidden_size must be a whole number"),
    ({"hidden_size": 33}, "not a multiple of the number of heads"),
    ({"hidden_size": 1 << 18}, "hidden_size is 262144"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"vocab_size": 1 << 25}, "vocab_size is"),
    ({"num_hidden_layers": 10**9}, "num_layers is"),
    ({"num_attention_heads": 0}, "not a multiple of the number of heads 0"),
    ({"num_attention_heads": -4}, "heads -4"),
    ({"num_key_value_heads": 3}, "not a multiple of num_kv_heads 3"),
    ({"num_key_value_heads": 8}, "num_kv_heads is 8"),
    ({"head_dim": 7}, "odd"),
    ({"head_dim": 1 << 20}, "head_dim is"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"),
    ({"rms_norm_eps": float("nan")}, "must be finite"),
    ({"rope_theta": -1.0}, "rope_theta is"),
    ({"rope_theta": 10**400}, "rope_theta is"),
    ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
    ({"rope_scaling": {"type": "linear"}}, "no factor"),
    ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "factor is 0.0"),
    ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "high_freq_factor is"),
    ({"rope_scaling": {**YARN_ROPE, "beta_fast": 0.5}}, "beta_fast is 0.5"),
    ({"rope_scaling": {**YARN_ROPE, "truncate": 1}}, "truncate must be true or false"),
    ({"rope_scaling": {**YARN_ROPE, "original_max_position_embeddings": -1}}, "original_max_position_embeddings is -1"),
    ({"max_position_embeddings": 1 << 40}, "max_position_embeddings is"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be a whole number"),
    ({"eos_token_id": [1, None]}, "no eos_token_id"),
    ({"eos_token_id": list(range(1025))}, "1025 eos_token_id"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_a_value_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_hf_config({**LLAMA, **change})


def test_neither_architecture_nor_type_is_refused() -> None:
    with pytest.raises(CheckpointError, match="neither architectures nor model_type"):
        read_hf_config(SMALL)


def test_overrides_are_merged_into_nested_objects() -> None:
    base = {**LLAMA, "rope_scaling": {**LLAMA3_ROPE}}
    merged = merge_hf_overrides(base, {"rope_scaling": {"factor": 2.0}, "vocab_size": 7})
    assert merged["rope_scaling"] == {**LLAMA3_ROPE, "factor": 2.0}
    assert merged["vocab_size"] == 7
    assert base["vocab_size"] == 96


def test_an_override_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot override n_layer"):
        merge_hf_overrides(LLAMA, {"n_layer": 3})


GGUF = {
    "general.architecture": "qwen2",
    "qwen2.block_count": 2,
    "qwen2.context_length": 512,
    "qwen2.embedding_length": 32,
    "qwen2.feed_forward_length": 64,
    "qwen2.attention.head_count": 4,
    "qwen2.attention.head_count_kv": 2,
    "qwen2.attention.layer_norm_rms_epsilon": np.float32(1e-6),
}
SHAPES = {"token_embd.weight": (96, 32), "blk.0.attn_q.bias": (32,)}


def test_gguf_metadata_is_read() -> None:
    config = read_gguf_config(GGUF, SHAPES)
    assert (config.family, config.architecture, config.vocab_size) == ("qwen2", "Qwen2ForCausalLM", 96)
    assert (config.rms_norm_eps, config.rope_theta, config.head_dim) == (1e-6, 10000.0, 8)
    assert (config.tie_word_embeddings, config.qkv_bias, config.qk_norm) == (True, True, False)
    assert not read_gguf_config(GGUF, {**SHAPES, "output.weight": (96, 32)}).tie_word_embeddings


def test_control_tokens_that_end_a_turn_are_endings_and_ordinary_ones_are_not() -> None:
    vocabulary = {
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.eot_token_id": 1,
        "tokenizer.ggml.tokens": ["<|im_end|>", "<|eot_id|>", "<|endoftext|>", "x"],
        "tokenizer.ggml.token_type": np.array([1, 3, 3, 3]),
    }
    assert read_gguf_config({**GGUF, **vocabulary}, SHAPES).eos_ids == (3, 1, 2)


YARN_GGUF = {
    "qwen2.rope.scaling.type": "yarn",
    "qwen2.rope.scaling.factor": np.float32(4.0),
    "qwen2.rope.scaling.original_context_length": 128,
}


@pytest.mark.parametrize(
    ("more", "factor"),
    [
        ({}, mscale(4.0)),
        ({"yarn_log_multiplier": 0.8}, mscale(4.0) / mscale(4.0, 0.8)),
        ({"yarn_attn_factor": 0.5}, 0.5),
    ],
)
def test_yarn_of_a_gguf_file_is_that_of_a_folder(more: dict[str, float], factor: float) -> None:
    keys = {f"qwen2.rope.scaling.{key}": value for key, value in more.items()}
    scaling = read_gguf_config({**GGUF, **YARN_GGUF, **keys}, SHAPES).rope_scaling
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    expected = read_hf_config({**LLAMA, "rope_parameters": rope}).rope_scaling
    assert scaling is not None and expected is not None
    if "yarn_attn_factor" in more:
        factor *= mscale(4.0)
    assert scaling.attention_factor == pytest.approx(factor)
    same = dataclasses.replace(expected, attention_factor=scaling.attention_factor, all_dim=scaling.all_dim)
    assert scaling == same


def test_overrides_of_a_gguf_model_use_hugging_face_names() -> None:
    overrides = {"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "eos_token_id": 4}
    config = read_gguf_config(GGUF, SHAPES, overrides=overrides)
    assert (config.rope_theta, config.rope_scaling, config.eos_ids) == (
        7.0,
        RopeScaling(type="linear", factor=2.0),
        (4,),
    )
    with pytest.raises(ConfigError, match="cannot override vocab_size of a GGUF model"):
        read_gguf_config(GGUF, SHAPES, overrides={"vocab_size": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "mamba"}, "'mamba'.*llama, qwen2, qwen3"),
        ({"qwen2.expert_count": 8}, "mixture of experts"),
        ({"qwen2.rope.dimension_count": 4}, "partial rotary"),
        ({"qwen2.attention.value_length": 4}, "different length"),
        ({"qwen2.attention.head_count_kv": np.array([2, 4])}, "different qwen2.attention.head_count_kv"),
        ({"qwen2.rope.scaling.type": "longrope", "qwen2.rope.scaling.factor": 4.0}, "'longrope'"),
        ({"qwen2.attention.sliding_window": 64}, "sliding window"),
    ],
)
def test_a_gguf_feature_that_is_not_implemented_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_gguf_config({**GGUF, **change}, SHAPES)


@pytest.mark.parametrize(
    ("change", "shapes", "message"),
    [
        ({"general.architecture": 3}, SHAPES, "general.architecture"),
        ({"qwen2.block_count": "2"}, SHAPES, "qwen2.block_count must be a whole number"),
        ({"qwen2.block_count": 0}, SHAPES, "num_layers is 0"),
        ({}, {}, "no token_embd.weight"),
        ({"qwen2.context_length": 1 << 60}, SHAPES, "max_position_embeddings"),
    ],
)
def test_gguf_metadata_that_cannot_be_is_refused(
    change: dict[str, Any], shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_gguf_config({**GGUF, **change}, shapes)


def test_one_number_a_layer_is_read_if_all_agree() -> None:
    metadata = {**GGUF, "qwen2.attention.head_count_kv": np.array([2, 2])}
    assert read_gguf_config(metadata, SHAPES).num_kv_heads == 2


def test_frequency_factors_of_the_wrong_number_are_refused() -> None:
    with pytest.raises(CheckpointError, match="3 rope frequency factors for head_dim 8"):
        read_gguf_config(GGUF, SHAPES, vectors={"rope_freqs.weight": (1.0, 1.0, 1.0)})
