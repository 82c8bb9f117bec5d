"""Configurations of the dense families: what is not said, what is refused, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models.glm import GlmConfig
from mooli.models.llama import LlamaConfig
from mooli.models.ministral import MinistralConfig
from mooli.models.olmo import OlmoConfig
from mooli.models.registry import read_gguf_config, read_hf_config
from mooli.models.rope import RopeScaling

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
GGUF_SIZES = {
    "block_count": 4,
    "context_length": 512,
    "embedding_length": 64,
    "feed_forward_length": 48,
    "attention.head_count": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def read(family: str, **values: Any) -> Any:
    return read_hf_config({"model_type": family, **SIZES, **values})


def read_gguf(name: str, **values: Any) -> Any:
    numbers = {f"{name}.{key.replace('__', '.')}": value for key, value in (GGUF_SIZES | values).items()}
    return read_gguf_config({"general.architecture": name, **numbers}, {"token_embd.weight": (64, 64)})


def test_what_is_not_said_is_as_transformers_has_it() -> None:
    glm = read("glm4")
    assert isinstance(glm, GlmConfig)
    assert (glm.head_dim, glm.rotary_dim, glm.num_kv_heads, glm.qkv_bias, glm.o_bias) == (128, 64, 2, True, False)
    assert glm.eos_ids == (151329, 151336, 151338) and glm.rms_norm_eps == 1.5625e-7
    phi = read("phi3")
    assert (phi.max_position_embeddings, phi.rotary_dim, phi.sliding_window, phi.eos_ids) == (4096, 0, None, (32000,))
    olmo = read("olmo3")
    assert isinstance(olmo, OlmoConfig)
    assert olmo.windows == (4096, 4096, 4096, 0) and olmo.rope_theta == 5e5
    assert read("olmo2").windows == (0,) * 4 and read("olmo2").rope_theta == 1e4
    gemma = read("gemma2")
    assert (gemma.attention_cap, gemma.logit_cap, gemma.attention_multiplier, gemma.windows) == (
        50,
        30,
        1 / 16,
        (4096, 0) * 2,
    )
    assert (gemma.rope_theta, gemma.local_rope_theta) == (1e4, 1e4)
    assert read("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None).attention_cap == 0
    pangu = read("PanguEmbedded", bias=True)
    assert isinstance(pangu, LlamaConfig)
    assert (pangu.qkv_bias, pangu.o_bias, pangu.mlp_bias, pangu.eos_ids) == (True, True, False, (45892,))
    assert not read("PanguEmbedded").o_bias
    cpm = read("minicpm", scale_emb=12, scale_depth=1.4, dim_model_base=16)
    assert (cpm.embedding_multiplier, cpm.residual_multiplier, cpm.logits_scaling) == (12, 0.7, 4)
    assert cpm.tie_word_embeddings
    ministral = read("ministral3", num_attention_heads=8)
    assert isinstance(ministral, MinistralConfig)
    assert (ministral.growth, ministral.num_kv_heads, ministral.head_dim) == (0, 8, 128)


def test_olmo3_scales_the_rotations_of_whole_layers_alone() -> None:
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    for values in (
        {"rope_scaling": yarn, "rope_theta": 5e5},
        {"rope_parameters": {"full_attention": yarn, "sliding_attention": {"rope_type": "default"}}},
    ):
        config = read("olmo3", max_position_embeddings=512, **values)
        assert isinstance(config.rope_scaling, RopeScaling) and config.rope_scaling.type == "yarn"
        assert config.rope_theta == 5e5
    other = {"full_attention": yarn, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    with pytest.raises(UnsupportedModelError, match="layers with a window"):
        read("olmo3", rope_parameters=other)


LONG = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


@pytest.mark.parametrize(
    ("family", "change", "error", "message"),
    [
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, UnsupportedModelError, "'linear'.*longrope"),
        ("phi3", {"rope_scaling": {**LONG, "long_factor": [2.0] * 3, "short_factor": [2.0] * 3}}, CheckpointError, "3"),
        ("phi3", {"rope_scaling": {"type": "su"}}, CheckpointError, "short_factor must be a list"),
        ("phi3", {"partial_rotary_factor": 1.5}, CheckpointError, "partial_rotary_factor is 1.5"),
        ("phi3", {"partial_rotary_factor": 0.01}, CheckpointError, "rotary values of a head is 0"),
        ("glm4", {"hidden_act": "gelu"}, UnsupportedModelError, "'gelu'"),
        ("gemma2", {"attention_bias": True}, UnsupportedModelError, "attention_bias"),
        ("gemma2", {"tie_word_embeddings": False}, UnsupportedModelError, "tie_word_embeddings"),
        ("gemma2", {"hidden_activation": "silu"}, UnsupportedModelError, "'silu'"),
        ("gemma2", {"rope_scaling": {"type": "linear", "factor": 2.0}}, UnsupportedModelError, "'linear'"),
        ("gemma2", {"query_pre_attn_scalar": 0}, CheckpointError, "query_pre_attn_scalar"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, CheckpointError, "attn_logit_softcapping is -1"),
        ("olmo3", {"layer_types": ["full_attention"]}, CheckpointError, "1 kinds of layers for 4"),
        ("olmo3", {"layer_types": ["chunked"] * 4}, CheckpointError, "layer_types"),
        ("minicpm", {"dim_model_base": 0}, CheckpointError, "dim_model_base is 0"),
        ("llama", {"partial_rotary_factor": 0.5}, UnsupportedModelError, "partial_rotary_factor 0.5"),
    ],
    ids=str,
)
def test_what_is_not_computed_or_cannot_be_is_named(
    family: str, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read(family, **change)


def test_gguf_files_say_what_transformers_does_not() -> None:
    assert read_gguf("gemma2", attention__key_length=32, attention__sliding_window=8).windows == (8, 0, 8, 0)
    assert read_gguf("phi3", rope__dimension_count=16, attention__sliding_window=0).rotary_dim == 16
    pattern = [True, False, True, False]
    olmo = read_gguf("olmo2", attention__sliding_window=8, attention__sliding_window_pattern=pattern)
    assert olmo.windows == (8, 0, 8, 0)
    assert read_gguf("olmo2").windows == (0,) * 4
    with pytest.raises(CheckpointError, match="a window of 8"):
        read_gguf("olmo2", attention__sliding_window=8)
    with pytest.raises(CheckpointError, match="each of 4 layers"):
        read_gguf("olmo2", attention__sliding_window=8, attention__sliding_window_pattern=[True])
    with pytest.raises(CheckpointError, match="embedding_scale"):
        read_gguf("minicpm")
    with pytest.raises(UnsupportedModelError, match="partial rotary"):
        read_gguf("olmo2", rope__dimension_count=16)
    assert read_gguf("mistral3", attention__temperature_scale=0.1).growth == 0.1
