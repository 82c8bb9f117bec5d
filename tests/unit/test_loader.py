"""Weights of every source come out under the same names with the same values, and lies are found before packing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from model_files import QWEN_PATH, demo_path, interleaved
from mooli.backends.dequant import dequantize
from mooli.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedModelError
from mooli.models.checkpoint import DummyCheckpoint, check_tensors, gguf_names
from mooli.models.llama import LlamaConfig
from mooli.models.loader import open_model

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8, "head_dim": 32},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "smollm3": {"num_hidden_layers": 4, "pad_token_id": None},
    "ernie4_5": {"head_dim": 32, "use_bias": True},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "hunyuan_v1_dense": {"head_dim": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
}
GGUF_NAMES = {"mistral": "llama", "hunyuan_v1_dense": "hunyuan-dense"}
"""Where they differ from the family's."""

PAIRED_BY_CONVERTERS = ("llama", "smollm3", "granite")


def tiny_model(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms would be all zeros and ones
            parameter.copy_(torch.randn_like(parameter))
    return model


def weights(model: Any) -> dict[str, np.ndarray]:
    found = {name: value.float().numpy() for name, value in model.state_dict().items()}
    return {name: value.squeeze(1) if value.ndim == 3 else value for name, value in found.items()}


def used(model: Any) -> dict[str, np.ndarray]:
    """The weights as the model is to take them."""
    config, found = model.config, weights(model)
    for name, value in found.items():
        if config.model_type == "ernie4_5" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            found[name] = value.reshape(heads, -1, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if config.model_type == "granite" and name == "model.norm.weight":
            found[name] = value / np.float32(config.logits_scaling)
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_folder_of_every_family_gives_the_weights_of_transformers(
    tmp_path: Path, family: str, dtype: str
) -> None:
    model = tiny_model(family).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config, checkpoint = open_model(tmp_path)
    assert (config.family, config.dtype) == (family, dtype)
    expected = used(model)
    for name, spec in config.tensors().items():
        assert checkpoint.shape(name) == spec.shape
        np.testing.assert_array_equal(dequantize(checkpoint.tensor(name)), expected[name], err_msg=name)
        checkpoint.release(name)
    checkpoint.close()


TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.query_layernorm": "attn_q_norm",
    "self_attn.key_layernorm": "attn_k_norm",
    "model.embedding_norm": "token_embd_norm",
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "conv.conv": "shortconv.conv",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{TO_GGUF[part]}.{kind}"
    return f"{TO_GGUF[stem]}.{kind}"


def write_gguf(path: Path, model: Any, architecture: str, *, quantize: str = "F32", **extra: np.ndarray) -> None:
    """What a converter does, with the writer of the gguf package."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "lfm2":
        writer.add_head_count_kv([config.num_key_value_heads * (kind != "conv") for kind in config.layer_types])
        writer.add_shortconv_l_cache(config.conv_L_cache)
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for name, value in weights(model).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture in PAIRED_BY_CONVERTERS and ("q_proj" in name or "k_proj" in name):
            value = interleaved(value, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        is_linear = value.ndim == 2 and "conv.conv" not in name
        kind = gguf.GGMLQuantizationType[quantize if is_linear else "F32"]
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)
    for name, value in extra.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_of_every_family_gives_the_weights_before_conversion(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    path = tmp_path / "model.gguf"
    write_gguf(path, model, GGUF_NAMES.get(family, family))
    config, checkpoint = open_model(path)
    assert config.tie_word_embeddings == model.config.tie_word_embeddings
    assert config.qkv_bias == ("model.layers.0.self_attn.q_proj.bias" in model.state_dict())
    assert config.qk_norm == (family in ("qwen3", "hunyuan_v1_dense", "lfm2"))
    assert config.unrotated == ((3,) if family == "smollm3" else ())
    expected = used(model)
    for name in config.tensors():
        raw = checkpoint.tensor(name)
        assert raw.name == name
        np.testing.assert_array_equal(dequantize(raw), expected[name], err_msg=name)
        checkpoint.release(name)
    checkpoint.close()


def test_quantised_query_rows_are_put_back_block_by_block(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = tmp_path / "model.gguf"
    write_gguf(path, model, "llama", quantize="Q8_0")
    _, checkpoint = open_model(path)
    name = "model.layers.1.self_attn.q_proj.weight"
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(weights(model)[name], kind), kind)
    np.testing.assert_array_equal(dequantize(checkpoint.tensor(name)), expected)


def test_frequency_factors_in_a_gguf_file_become_the_rope_scaling(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", **{"rope_freqs.weight": factors})
    config, _ = open_model(tmp_path / "m.gguf")
    assert config.rope_scaling is not None
    assert config.rope_scaling.freq_factors == tuple(factors.tolist())


def test_a_gguf_tensor_that_the_family_does_not_have_is_refused(tmp_path: Path) -> None:
    extra = {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}
    write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", **extra)
    with pytest.raises(CheckpointError, match=r"attn_sinks\.weight has no place"):
        open_model(tmp_path / "m.gguf")


@pytest.mark.parametrize("layer", ["00", "-1", "1e3", "99999"])
def test_odd_layer_numbers_are_no_layer(layer: str) -> None:
    names = gguf_names(DUMMY.tensors())
    assert names["blk.1.attn_q.weight"] == "model.layers.1.self_attn.q_proj.weight"
    assert f"blk.{layer}.attn_q.weight" not in names


@pytest.fixture
def qwen2_folder(tmp_path: Path) -> Iterator[Path]:
    tiny_model("qwen2", tie_word_embeddings=False).save_pretrained(tmp_path)
    yield tmp_path


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "removed"}))


def test_missing_and_wrongly_shaped_tensors_are_listed(qwen2_folder: Path) -> None:
    change_config(qwen2_folder, intermediate_size=97)
    with pytest.raises(CheckpointError) as error:
        open_model(qwen2_folder)
    message = str(error.value)
    assert "gate_proj.weight has shape [96, 64] instead of [97, 64]" in message
    assert "1 more" in message
    change_config(qwen2_folder, intermediate_size=96, num_hidden_layers=3)
    with pytest.raises(
        CheckpointError, match=r"layers\.2\.self_attn\.q_proj\.weight is missing|layers\.2.* is missing"
    ):
        open_model(qwen2_folder)
    change_config(qwen2_folder, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match="has no place in a qwen2 model of 1 layers"):
        open_model(qwen2_folder)


def test_a_bias_that_the_configuration_does_not_know_is_refused(qwen2_folder: Path) -> None:
    change_config(qwen2_folder, architectures=["LlamaForCausalLM"])
    with pytest.raises(CheckpointError, match=r"bias has no place in a llama model"):
        open_model(qwen2_folder)


def test_a_tied_head_that_is_stored_all_the_same_is_left_aside(qwen2_folder: Path) -> None:
    change_config(qwen2_folder, tie_word_embeddings=True)
    config, checkpoint = open_model(qwen2_folder)
    assert config.tie_word_embeddings
    checkpoint.close()


def test_without_a_dtype_in_the_config_the_stored_one_counts(tmp_path: Path) -> None:
    tiny_model("qwen2").to(torch.float16).save_pretrained(tmp_path)
    change_config(tmp_path, dtype="removed", torch_dtype="removed")
    assert open_model(tmp_path)[0].dtype == "float16"


def test_overrides_reach_the_configuration_and_its_ending_ids(qwen2_folder: Path) -> None:
    (qwen2_folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert open_model(qwen2_folder)[0].eos_ids == (5, 6)
    overrides = {"eos_token_id": 7, "max_position_embeddings": 64}
    config, _ = open_model(qwen2_folder, overrides=overrides)
    assert (config.eos_ids, config.max_position_embeddings) == ((7,), 64)


def test_a_folder_of_pickles_says_how_to_convert(qwen2_folder: Path) -> None:
    (qwen2_folder / "model.safetensors").rename(qwen2_folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        open_model(qwen2_folder)
    with pytest.raises(UnsupportedModelError, match="pickle"):
        open_model(qwen2_folder / "pytorch_model.bin")


def test_a_folder_without_weights_says_so_but_serves_dummy_ones(qwen2_folder: Path) -> None:
    (qwen2_folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"no \.safetensors file"):
        open_model(qwen2_folder)
    config, checkpoint = open_model(qwen2_folder, load_format="dummy", overrides={"num_hidden_layers": 1})
    assert config.num_layers == 1
    check_tensors(config, checkpoint)


@pytest.mark.parametrize(
    ("name", "load_format", "error", "message"),
    [
        ("", "pt", ConfigError, "auto, safetensors, gguf, dummy"),
        ("", "gguf", ModelNotFoundError, "no .gguf file"),
        ("nothing", "auto", ModelNotFoundError, "no model at"),
        ("model.safetensors", "auto", CheckpointError, "give the folder"),
        ("config.json", "auto", CheckpointError, "not a GGUF file"),
        ("config.json", "safetensors", ConfigError, "give a folder"),
    ],
)
def test_a_path_and_load_format_that_do_not_fit_are_refused(
    qwen2_folder: Path, name: str, load_format: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_model(qwen2_folder / name, load_format=load_format)


def test_a_bad_config_file_is_a_checkpoint_error(qwen2_folder: Path) -> None:
    (qwen2_folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        open_model(qwen2_folder)


DUMMY = LlamaConfig(
    family="qwen3",
    architecture="Qwen3ForCausalLM",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    qk_norm=True,
    qkv_bias=True,
)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dummy_weights_are_a_function_of_name_and_seed(dtype: str) -> None:
    config = dataclasses.replace(DUMMY, dtype=dtype)
    name = "model.layers.0.mlp.up_proj.weight"
    first = DummyCheckpoint(config, 3).tensor(name)
    np.testing.assert_array_equal(first.data, DummyCheckpoint(config, 3).tensor(name).data)
    assert np.any(first.data != DummyCheckpoint(config, 4).tensor(name).data)
    assert np.any(first.data != DummyCheckpoint(config, 3).tensor(name.replace("0", "1")).data)
    assert dequantize(first).std() == pytest.approx(64**-0.5, rel=0.05)


def test_dummy_weights_have_sensible_scales_and_all_shapes() -> None:
    checkpoint = DummyCheckpoint(DUMMY, 0)
    check_tensors(DUMMY, checkpoint)
    norm = dequantize(checkpoint.tensor("model.norm.weight"))
    assert 0.9 <= norm.min() < norm.max() <= 1.1
    bias = dequantize(checkpoint.tensor("model.layers.0.self_attn.q_proj.bias"))
    assert 0 < np.abs(bias).max() <= 0.02
    with pytest.raises(CheckpointError, match="no tensor other"):
        checkpoint.tensor("other")


def test_rounding_of_dummy_weights_to_bfloat16_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mooli.models.checkpoint._DUMMY_VALUES_AT_A_TIME", 1000)
    name = "model.embed_tokens.weight"
    exact = dequantize(DummyCheckpoint(DUMMY, 1).tensor(name))
    rounded = dequantize(DummyCheckpoint(dataclasses.replace(DUMMY, dtype="bfloat16"), 1).tensor(name))
    np.testing.assert_array_equal(rounded, torch.from_numpy(exact).bfloat16().float().numpy())


REAL = {
    "smollm2": (
        demo_path(),
        {"family": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_layers": 30},
        {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "rope_theta": 1e5, "rms_norm_eps": 1e-5, "bos_id": 1},
        {"tie_word_embeddings": True, "qkv_bias": False, "max_position_embeddings": 8192, "eos_ids": (2, 0)},
    ),
    "qwen2.5": (
        QWEN_PATH,
        {"family": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_layers": 24},
        {"num_heads": 14, "num_kv_heads": 2, "head_dim": 64, "rope_theta": 1e6, "rms_norm_eps": 1e-6},
        {"tie_word_embeddings": False, "qkv_bias": True, "max_position_embeddings": 32768, "eos_ids": (151645, 151643)},
    ),
}


@pytest.mark.parametrize(("path", "sizes", "numbers", "rest"), REAL.values(), ids=REAL.keys())
def test_a_real_file_has_every_tensor_its_configuration_needs(
    path: Path | None, sizes: dict[str, Any], numbers: dict[str, Any], rest: dict[str, Any]
) -> None:
    if path is None or not path.is_file():
        pytest.skip("the model is not on this machine")
    config, checkpoint = open_model(path)
    for field, value in {**sizes, **numbers, **rest}.items():
        assert getattr(config, field) == value, field
    assert set(checkpoint.names()) == set(config.tensors())
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        values = dequantize(checkpoint.tensor(name))
        assert values.shape == checkpoint.shape(name)
        assert np.isfinite(values).all()
        checkpoint.release(name)
    checkpoint.close()


def test_a_real_configuration_serves_dummy_weights() -> None:
    path = demo_path()
    if path is None:
        pytest.skip("the demo model is not installed")
    config, checkpoint = open_model(path, load_format="dummy", seed=1)
    assert checkpoint.tensor("model.layers.29.self_attn.k_proj.weight").shape == (192, 576)
    assert config.vocab_size == 49152
