"""gpt-oss against Transformers in float32, on every backend and of every kind of file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from test_llama_family import Golden
from tiny_families import SIZES, assert_near, check, logits_of, middle_error, save, write_gguf

from mooli.backends.base import PagedLayer
from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models.llama import LlamaConfig
from mooli.models.registry import read_gguf_config, read_hf_config
from variants import VARIANTS, Variant, require
from weight_formats import mxfp4

YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
CONFIG = transformers.GptOssConfig(
    **SIZES,
    head_dim=32,
    intermediate_size=96,
    num_local_experts=8,
    num_experts_per_tok=3,
    sliding_window=9,
    rope_parameters=YARN,
)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return save(CONFIG, tmp_path_factory.mktemp("gpt-oss"))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_logits_agree_with_transformers(golden: Golden, variant: Variant) -> None:
    require(variant.backend)
    check(golden, variant)


def converted(tensors: dict[str, NDArray[np.float32]]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """As llama.cpp's files have it: gate and up projection apart, outputs first."""
    for name, values in tensors.items():
        stem, kind = name.removesuffix("_bias"), "bias" if name.endswith("_bias") else "weight"
        rows = values.swapaxes(1, 2) if values.ndim == 3 else values
        if "experts" not in name:
            yield f"{name}.weight" if name.endswith("sinks") else name, values
        elif stem.endswith("gate_up_proj"):
            for part, projection in enumerate(("gate_proj", "up_proj")):
                yield f"{stem.replace('gate_up_proj', projection)}.{kind}", rows[:, part::2]
        else:
            yield f"{stem}.{kind}", rows


KEYS: dict[str, Any] = {
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.sliding_window": 9,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "feed_forward_length": 96,
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_feed_forward_length": 96,
    "rope.freq_base": 150000.0,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 8.0,
    "rope.scaling.original_context_length": 64,
}


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.model <= 2e-5 and v.backend != "torch"], ids=str)
def test_a_gguf_file_gives_the_same_logits(tmp_path: Path, golden: Golden, variant: Variant) -> None:
    require(variant.backend)
    write_gguf(tmp_path / "model.gguf", golden.folder, gguf.MODEL_ARCH.GPT_OSS, KEYS, converted)
    for actual, expected in zip(logits_of(tmp_path / "model.gguf", variant), golden.logits, strict=True):
        assert_near(actual, expected, variant)


def config(**changes: Any) -> LlamaConfig:
    read = read_hf_config({**CONFIG.to_dict(), "architectures": ["GptOssForCausalLM"], **changes})
    assert isinstance(read, LlamaConfig)
    return read


def test_defaults_are_those_of_transformers() -> None:
    default = transformers.GptOssConfig()
    read = read_hf_config({"model_type": "gpt_oss", **json.loads(default.to_json_string())})
    assert isinstance(read, LlamaConfig)
    assert read.windows == tuple(128 if kind == "sliding_attention" else 0 for kind in default.layer_types)
    assert read.experts is not None and (read.experts.num_experts, read.experts.top_k) == (128, 4)
    assert (read.head_dim, read.rope_theta) == (64, 150000.0)
    assert read.rope_scaling is not None and not read.rope_scaling.truncate
    bare = {"vocab_size": 9, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8}
    read = read_hf_config({"model_type": "gpt_oss", **bare, "intermediate_size": 32})
    assert isinstance(read, LlamaConfig)
    assert read.windows == (128, 0, 128) and read.qkv_bias and read.o_bias
    assert read.rope_scaling is not None and read.rope_scaling.factor == 32.0
    assert [layer.window for layer in read.cache_layers() if isinstance(layer, PagedLayer)] == [128, 0, 128]


def test_what_is_not_computed_is_refused_by_name() -> None:
    assert config(sliding_window=None).windows == (0, 0, 0)
    with pytest.raises(UnsupportedModelError, match=r"swiglu_limit 5.0"):
        config(swiglu_limit=5.0)
    with pytest.raises(UnsupportedModelError, match=r"swiglu_alpha 1.5"):
        config(swiglu_alpha=1.5)
    with pytest.raises(CheckpointError, match="layer_types must be a list of full_attention, sliding_attention"):
        config(layer_types=["full_attention", "linear_attention", "full_attention"])
    with pytest.raises(CheckpointError, match="2 kinds of layers for 3 layers"):
        config(layer_types=["full_attention", "full_attention"])
    with pytest.raises(CheckpointError, match="num_experts_per_tok is 9"):
        config(num_experts_per_tok=9)


def test_a_gguf_file_that_says_less_is_refused_by_key() -> None:
    metadata = {
        "general.architecture": "gpt-oss",
        "gpt-oss.block_count": 3,
        "gpt-oss.context_length": 512,
        "gpt-oss.embedding_length": 64,
        "gpt-oss.attention.head_count": 4,
        **{f"gpt-oss.{key}": value for key, value in KEYS.items()},
    }
    shapes = {"token_embd.weight": (199, 64)}
    read = read_gguf_config(metadata, shapes)
    assert isinstance(read, LlamaConfig) and read.windows == (9, 0, 9)
    del metadata["gpt-oss.expert_used_count"]
    with pytest.raises(CheckpointError, match=r"gpt-oss\.expert_used_count"):
        read_gguf_config(metadata, shapes)


def test_experts_of_the_hub_are_in_four_bits(tmp_path: Path, golden: Golden) -> None:
    """The same model in both layouts, its experts' weights rounded before: MXFP4, and as Transformers saves them."""
    tensors, packed = load_file(golden.folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        written = mxfp4(np.ascontiguousarray(tensors[name].swapaxes(1, 2)))
        packed |= {f"{name}{suffix}": np.asarray(part) for suffix, part in written.parts.items()}
        tensors[name] = np.ascontiguousarray(written.values.reshape(8, -1, tensors[name].shape[1]).swapaxes(1, 2))
    config = json.loads((golden.folder / "config.json").read_text())
    kept = {name: values for name, values in tensors.items() if f"{name}_blocks" not in packed}
    for folder, weights, more in (
        ("plain", tensors, {}),
        ("packed", kept | packed, {"quantization_config": {"quant_method": "mxfp4"}}),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config | more))
        save_file(weights, tmp_path / folder / "model.safetensors")
    expected = logits_of(tmp_path / "plain", VARIANTS[0])[-1]
    assert middle_error(expected, golden.logits[-1]) > 0.01
    np.testing.assert_allclose(logits_of(tmp_path / "packed", VARIANTS[0])[-1], expected, atol=1e-5)
    on_the_cpu = next(variant for variant in VARIANTS if variant.backend == "cpu")
    require("cpu")
    assert middle_error(logits_of(tmp_path / "packed", on_the_cpu)[-1], expected) < 0.05
