"""Dense families with a module of their own, against Transformers: tiny random models, and their GGUF files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
import test_llama_family as alike
import transformers
from numpy.typing import NDArray
from test_llama_family import GEMMA_SIZES, SIZES, Golden, golden_of, opened

from model_files import interleaved
from mooli.backends.dequant import dequantize
from mooli.errors import ConfigError
from mooli.models.llama import LlamaConfig
from mooli.models.loader import open_model, stored_types
from mooli.models.registry import FAMILIES, read_hf_config
from mooli.models.sharding import Place, check_size, part_checkpoint
from variants import VARIANTS, Variant, require

Tensors = dict[str, NDArray[np.float32]]

LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.1 * i for i in range(12)],
    "long_factor": [1.5 + 0.5 * i for i in range(12)],
    "attention_factor": 1.1,
}

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "phi3-window": transformers.Phi3Config(**SIZES, sliding_window=9),
    # Transformers chooses by the prompt, which is longer than this but for one of a token, at position 0.
    "phi3-longrope": transformers.Phi3Config(
        **{**SIZES, "hidden_size": 128}, original_max_position_embeddings=2, rope_parameters=LONGROPE
    ),
    "glm4": transformers.Glm4Config(**SIZES, head_dim=32),
    "gemma2-caps": transformers.Gemma2Config(
        **GEMMA_SIZES,
        sliding_window=9,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
    ),
    "ministral3": transformers.Ministral3Config(
        **SIZES,
        head_dim=32,
        rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}
        | {"original_max_position_embeddings": 12},
    ),
    "pangu": transformers.LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=False),
    "minicpm": transformers.GraniteConfig(
        **SIZES,
        embedding_multiplier=12.0,
        residual_multiplier=1.4 / math.sqrt(3),
        attention_multiplier=0.25,
        logits_scaling=4.0,
        tie_word_embeddings=True,
    ),
    "olmo2": transformers.Olmo2Config(**SIZES, tie_word_embeddings=False),
    "olmo3-yarn": transformers.Olmo3Config(
        **SIZES,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}

RENAMED: dict[str, dict[str, Any]] = {
    "pangu": {"model_type": "PanguEmbedded", "architectures": ["PanguEmbeddedForCausalLM"], "bias": True},
    "minicpm": {
        "model_type": "minicpm",
        "architectures": ["MiniCPMForCausalLM"],
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 16,
    },
}
"""Of families that Transformers computes under another name, what their config.json has."""

TRIED = {
    "reference-float32",
    "cpu-float32",
    "cpu-bfloat16-int4",
    "cpu-float32-kv-int8",
    "torch-float32",
    "torch-bfloat16",
    "ascend-bfloat16",
}
"""Variants that these run on: each backend, and each way of keeping keys and values."""


CONFIG_OF: dict[Path, transformers.PreTrainedConfig] = {}


@pytest.fixture(scope="module", params=list(CONFIGS))
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    made = golden_of(CONFIGS[request.param], tmp_path_factory.mktemp(request.param))
    CONFIG_OF[made.folder] = CONFIGS[request.param]
    if request.param in RENAMED:
        file = made.folder / "config.json"
        own = {k: v for k, v in json.loads(file.read_text()).items() if "multiplier" not in k and k != "attention_bias"}
        file.write_text(json.dumps({**own, **RENAMED[request.param]}))
    return made


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if str(variant) in TRIED], ids=str)
def test_a_prompt_gives_what_transformers_gives_however_it_is_computed(golden: Golden, variant: Variant) -> None:
    require(variant.backend)
    with opened(golden.folder, variant) as runnable:
        alike.test_logits_agree_with_transformers(runnable, golden, variant)
        alike.test_a_prompt_in_chunks_gives_what_it_gives_whole(runnable, variant, ((1, 2, 3, 39),))
        alike.test_rows_in_a_batch_give_what_they_give_alone(runnable, variant)
        alike.test_a_cached_prefix_gives_what_computing_it_gives(runnable, variant)


def write_gguf(folder: Path, path: Path, arch: gguf.MODEL_ARCH) -> None:
    """As the converter of llama.cpp writes the model of a folder: names by its package, values by `CONVERTED`."""
    config = CONFIG_OF[folder]
    name = gguf.MODEL_ARCH_NAMES[arch]
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors = CONVERTED[name](writer, config, tensors)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for tensor, values in tensors.items():
        found = names.get_name(tensor, try_suffixes=(".weight", ".bias")) or tensor
        assert found, tensor
        writer.add_tensor(found, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert_phi3(writer: gguf.GGUFWriter, config: Any, tensors: Tensors) -> Tensors:
    rope = config.rope_parameters
    head_dim = config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * head_dim))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_sliding_window(config.sliding_window or 0)
    if rope["rope_type"] != "longrope":
        return tensors
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_attn_factors(rope["attention_factor"])
    factors = {f"rope_factors_{kind}.weight": np.float32(rope[f"{kind}_factor"]) for kind in ("long", "short")}
    return {**factors, **tensors}


def convert_glm4(writer: gguf.GGUFWriter, config: Any, tensors: Tensors) -> Tensors:
    writer.add_rope_dimension_count(int(config.head_dim * config.rope_parameters["partial_rotary_factor"]))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    return tensors


def convert_olmo2(writer: gguf.GGUFWriter, config: Any, tensors: Tensors) -> Tensors:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    return tensors


def convert_gemma2(writer: gguf.GGUFWriter, config: Any, tensors: Tensors) -> Tensors:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)
    return {name: values + np.float32(1) if values.ndim == 1 else values for name, values in tensors.items()}


def convert_pangu(writer: gguf.GGUFWriter, config: Any, tensors: Tensors) -> Tensors:
    writer.add_rope_dimension_count(16)
    return tensors


def convert_ministral3(writer: gguf.GGUFWriter, config: Any, tensors: Tensors) -> Tensors:
    rope = config.rope_parameters
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
    writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    return in_pairs(config, tensors)


def convert_minicpm(writer: gguf.GGUFWriter, config: Any, tensors: Tensors) -> Tensors:
    writer.add_embedding_scale(12.0)
    writer.add_residual_scale(1.4 / math.sqrt(3))
    writer.add_logit_scale(4.0)
    return in_pairs(config, tensors)


def in_pairs(config: Any, tensors: Tensors) -> Tensors:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    named = {name: heads.get(name.split(".")[-2], 0) for name in tensors}
    return {name: interleaved(values, named[name]) if named[name] else values for name, values in tensors.items()}


CONVERTED: dict[str, Callable[[gguf.GGUFWriter, Any, Tensors], Tensors]] = {
    "phi3": convert_phi3,
    "glm4": convert_glm4,
    "olmo2": convert_olmo2,
    "gemma2": convert_gemma2,
    "pangu-embedded": convert_pangu,
    "minicpm": convert_minicpm,
    "mistral3": convert_ministral3,
}
CALLED = {"olmo3": "olmo2", "PanguEmbedded": "pangu-embedded", "ministral3": "mistral3"}
"""Families whose GGUF files call themselves otherwise."""

ARCHITECTURES = {gguf.MODEL_ARCH_NAMES[arch]: arch for arch in gguf.MODEL_ARCH}


def value_of(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def test_a_gguf_file_is_the_same_model(golden: Golden, tmp_path: Path) -> None:
    config, checkpoint = open_model(golden.folder)
    called = CALLED.get(config.family, config.family)
    write_gguf(golden.folder, tmp_path / "m.gguf", ARCHITECTURES[called])
    found, written = open_model(tmp_path / "m.gguf")
    assert called in FAMILIES[found.family].gguf
    same: dict[str, Any] = {"family": config.family, "architecture": config.architecture}
    if isinstance(config, LlamaConfig):
        same["pairs"] = config.pairs  # which kinds of files have them is no number of the model
    for name, value in asdict(replace(found, **same)).items():
        expected = getattr(config, name)
        assert value == (pytest.approx(expected, rel=1e-6) if isinstance(expected, float) else value_of(expected)), name
    assert stored_types(tmp_path / "m.gguf", found).keys() >= config.tensors().keys()
    for name in config.tensors():
        np.testing.assert_array_equal(dequantize(written.tensor(name)), dequantize(checkpoint.tensor(name)), name)
    written.close()
    checkpoint.close()


def test_what_is_one_tensor_in_files_is_cut_and_released_as_several(golden: Golden) -> None:
    config, checkpoint = open_model(golden.folder)
    assert set(checkpoint.names()) == set(config.tensors())
    whole = {name: dequantize(checkpoint.tensor(name)) for name in config.tensors()}
    for size in (2, 4):
        if config.family.startswith("olmo"):
            with pytest.raises(ConfigError, match=r"its 1 norms over all heads.*Possible: tp_size=1$"):
                check_size(config, size)
            continue
        check_size(config, size)
        parts = [part_checkpoint(config, checkpoint, Place(rank, size)) for rank in range(size)]
        expected = config.part(size).tensors()
        for name, spec in config.tensors().items():
            if spec.split is None or spec.split.rule == "padded" or spec.split.axis >= len(spec.shape):
                continue
            made = [dequantize(part.tensor(name)) for part in parts]
            assert {values.shape for values in made} == {expected[name].shape}
            assert {part.shape(name) for part in parts} == {expected[name].shape}
            if spec.split.rule == "shared":
                made = made[:: max(1, size // spec.split.units)]
            np.testing.assert_array_equal(np.concatenate(made, axis=spec.split.axis), whole[name])
    for name in config.tensors():
        checkpoint.release(name)
        np.testing.assert_array_equal(dequantize(checkpoint.tensor(name)), whole[name])
    checkpoint.close()


PHI = {
    "model_type": "phi3", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75, "rope_theta": 10000.0,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 12, "long_factor": [3.0] * 12},
}  # fmt: skip


def test_longrope_is_chosen_by_the_longest_sequence_there_will_be() -> None:
    for context, factor in ((None, 3.0), (131072, 3.0), (4097, 3.0), (4096, 1.0), (2048, 1.0)):
        scaling = read_hf_config(PHI, context=context).rope_scaling
        assert scaling.freq_factors == (factor,) * 12
        assert scaling.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
