"""Gemma 3's files: old and new spellings of a configuration, what is refused, and GGUF files, whose norms are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mooli.backends.dequant import dequantize
from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models.checkpoint import as_declared, gguf_names
from mooli.models.gemma import GemmaConfig
from mooli.models.loader import open_model
from mooli.models.registry import read_hf_config
from mooli.models.rope import RopeScaling
from mooli.tensor import RawTensor, TensorType

OLD: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "rope_theta": 5e5,
    "rope_local_base_freq": 2e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "torch_dtype": "float32",
}


def read(**changes: Any) -> GemmaConfig:
    config = read_hf_config({**OLD, **changes})
    assert isinstance(config, GemmaConfig)
    return config


def test_both_spellings_say_the_same() -> None:
    old = read()
    assert old.windows == (8, 0, 8, 0)
    assert (old.rope_theta, old.local_rope_theta) == (5e5, 2e4)
    assert old.rope_scaling == RopeScaling(type="linear", factor=8.0)
    assert old.attention_multiplier == 0.25
    assert old.embedding_multiplier == pytest.approx(32**0.5)
    new = read(
        sliding_window_pattern=None,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_theta=None,
        rope_local_base_freq=None,
        rope_scaling=None,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    )
    assert new == old


def test_what_is_not_said_is_as_the_family_has_it() -> None:
    names = ("sliding_window", "sliding_window_pattern", "rope_theta", "rope_local_base_freq", "rope_scaling")
    config = read_hf_config({name: value for name, value in OLD.items() if name not in names})
    assert isinstance(config, GemmaConfig)
    assert config.windows == (4096,) * 4  # of six layers the last sees all
    assert (config.rope_theta, config.rope_scaling, config.local_rope_theta) == (1e6, None, 1e4)
    assert (config.bos_id, config.eos_ids) == (2, (1,))


def test_the_embedding_is_scaled_by_what_its_type_can_hold() -> None:
    assert read(torch_dtype="bfloat16", hidden_size=640).embedding_multiplier == 25.25
    assert read(torch_dtype="float16", hidden_size=640).embedding_multiplier == float(np.float16(640**0.5))


@pytest.mark.parametrize(
    "change",
    [
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"use_bidirectional_attention": True},
        {"attention_bias": True},
        {"tie_word_embeddings": False},
        {"hidden_activation": "silu"},
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_computed_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError):
        read(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"layer_types": ["full_attention"]},
        {"layer_types": ["chunked_attention"] * 4},
        {"layer_types": [1, 2, 3, 4]},
        {"query_pre_attn_scalar": 0},
        {"sliding_window_pattern": 0},
        {"rope_parameters": {"full_attention": 7}},
    ],
    ids=str,
)
def test_what_cannot_be_is_an_error(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        read(**change)


def write_gguf(path: Path, config: GemmaConfig, values: dict[str, np.ndarray], **scalars: float) -> None:
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_sliding_window(max(config.windows))
    for name, value in scalars.items():
        writer.add_float32(f"gemma3.{name}", value)
    names = {ours: theirs for theirs, ours in gguf_names(config.tensors()).items()}
    for name, value in values.items():
        writer.add_tensor(names[name], value + np.float32(1) if value.ndim == 1 else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_has_the_same_weights_and_nearly_the_same_configuration(tmp_path: Path) -> None:
    config = read(num_hidden_layers=7, sliding_window_pattern=6, rope_scaling=None, rope_local_base_freq=1e4)
    draw = np.random.default_rng(3)
    values = {name: draw.standard_normal(spec.shape).astype(np.float32) for name, spec in config.tensors().items()}
    write_gguf(tmp_path / "m.gguf", config, values)
    found, checkpoint = open_model(tmp_path / "m.gguf")
    assert isinstance(found, GemmaConfig)
    assert found.windows == (8, 8, 8, 8, 8, 0, 8)
    assert (found.attention_multiplier, found.embedding_multiplier) == (
        config.attention_multiplier,
        config.embedding_multiplier,
    )
    assert (found.rope_theta, found.local_rope_theta) == (config.rope_theta, 1e4)
    for name, spec in config.tensors().items():
        of_folder = RawTensor(name, TensorType.F32, spec.shape, values[name].reshape(-1, spec.shape[-1]).view(np.uint8))
        np.testing.assert_array_equal(dequantize(checkpoint.tensor(name)), dequantize(as_declared(of_folder, spec)))
    checkpoint.close()


def test_a_gguf_file_with_caps_is_refused(tmp_path: Path) -> None:
    config = read()
    values = {name: np.zeros(spec.shape, np.float32) for name, spec in config.tensors().items()}
    write_gguf(tmp_path / "m.gguf", config, values, final_logit_softcapping=30.0)
    with pytest.raises(UnsupportedModelError, match="final_logit_softcapping"):
        open_model(tmp_path / "m.gguf")
