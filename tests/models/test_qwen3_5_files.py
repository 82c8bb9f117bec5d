"""Qwen3.5 from the other files it comes in: GGUF as converters write it, and inside a model that sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from mooli.backends import create_backend
from mooli.errors import UnsupportedModelError
from mooli.models.loader import open_model
from mooli.models.qwen3_5 import Qwen35Config
from mooli.models.registry import create_model, read_hf_config
from steps import LIMITS, Limits, Pages, Row, step

KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 2, 6, 16, 32
CONFIG: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": KEY_HEADS,
    "linear_num_value_heads": VALUE_HEADS,
    "linear_key_head_dim": KEY_DIM,
    "linear_value_head_dim": VALUE_DIM,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}
PROMPT = np.random.default_rng(3).integers(0, 120, 37).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NDArray[np.float32]]:
    """A saved model of text alone, and the logits of Transformers."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.Qwen3_5TextConfig(**CONFIG), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5)
        logits = model(torch.tensor([PROMPT])).logits[0].numpy()
    folder = tmp_path_factory.mktemp("qwen3.5")
    model.save_pretrained(folder)
    return folder, logits


def logits_of(path: Path, backend_name: str) -> NDArray[np.float32]:
    backend = create_backend(backend_name, dtype="float32")
    config, checkpoint = open_model(path)
    model = create_model(config, checkpoint, backend)
    checkpoint.close()
    page_size = backend.default_page_size
    limits = Limits(LIMITS.max_tokens, LIMITS.max_rows, LIMITS.max_pages_per_row, num_states=2)
    backend.allocate(config.cache_spec(page_size, "float32"), 8, limits)
    batch = step([Row(PROMPT, 0, Pages(8, page_size).take(len(PROMPT)), len(PROMPT), state=1)], page_size)
    planned = backend.plan(batch)
    hidden = backend.capture(model.forward)(planned)
    taken = backend.take_rows(planned, hidden, batch.sampling_tokens)
    logits = np.array(backend.to_host(backend.capture(model.logits)(*taken)), np.float32)
    backend.close()
    return logits


def tiled(values: NDArray[Any], width: int) -> NDArray[Any]:
    """Rows of heads of values, of `width` each, as converters put them: one of each head of keys, then the next."""
    heads = values.reshape(KEY_HEADS, VALUE_HEADS // KEY_HEADS, width, *values.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(0, 1).reshape(values.shape))


def converted(name: str, value: NDArray[np.float32]) -> tuple[str, NDArray[np.float32]]:
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "post_attention_norm.weight",
        **{f"self_attn.{x}_proj.weight": f"attn_{x}.weight" for x in "qkv"},
        "self_attn.o_proj.weight": "attn_output.weight",
        "self_attn.q_norm.weight": "attn_q_norm.weight",
        "self_attn.k_norm.weight": "attn_k_norm.weight",
        **{f"mlp.{x}_proj.weight": f"ffn_{x}.weight" for x in ("gate", "up", "down")},
        "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
        "linear_attn.in_proj_z.weight": "attn_gate.weight",
        "linear_attn.in_proj_b.weight": "ssm_beta.weight",
        "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
        "linear_attn.conv1d.weight": "ssm_conv1d.weight",
        "linear_attn.A_log": "ssm_a",
        "linear_attn.dt_bias": "ssm_dt.bias",
        "linear_attn.norm.weight": "ssm_norm.weight",
        "linear_attn.out_proj.weight": "ssm_out.weight",
    }
    keys = 2 * KEY_HEADS * KEY_DIM
    part = name.split(".", 3)[3] if name.startswith("model.layers.") else name
    value = value.squeeze(1) if value.ndim == 3 else value
    if "norm.weight" in name and "linear_attn" not in name:
        value = value + 1
    elif part.endswith("A_log"):
        value = tiled(-np.exp(value), 1)
    elif part.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        value = np.concatenate([value[:keys], tiled(value[keys:], VALUE_DIM)])
    elif part.endswith("in_proj_z.weight"):
        value = tiled(value, VALUE_DIM)
    elif part.endswith(("in_proj_b.weight", "in_proj_a.weight", "dt_bias")):
        value = tiled(value, 1)
    elif part.endswith("linear_attn.out_proj.weight"):
        value = np.ascontiguousarray(tiled(np.ascontiguousarray(value.T), VALUE_DIM).T)
    prefix = f"blk.{name.split('.')[2]}." if part is not name else ""
    return prefix + names[part], value


def write_gguf(path: Path, folder: Path) -> None:
    writer = gguf.GGUFWriter(path, "qwen35")
    writer.add_block_count(4)  # one guesses tokens ahead
    writer.add_uint32("qwen35.nextn_predict_layers", 1)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_state_size(KEY_DIM)
    writer.add_ssm_group_count(KEY_HEADS)
    writer.add_ssm_time_step_rank(VALUE_HEADS)
    writer.add_ssm_inner_size(VALUE_HEADS * VALUE_DIM)
    for name, value in load_file(folder / "model.safetensors").items():
        writer.add_tensor(*converted(name, value))
    writer.add_tensor("blk.3.nextn.eh_proj.weight", np.zeros((64, 128), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("backend_name", ["reference", "cpu"])
def test_a_gguf_file_gives_the_logits_of_transformers(
    tmp_path: Path, tiny: tuple[Path, NDArray[np.float32]], backend_name: str
) -> None:
    folder, expected = tiny
    write_gguf(tmp_path / "model.gguf", folder)
    actual = logits_of(tmp_path / "model.gguf", backend_name)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_the_text_part_of_a_model_that_sees_is_read_and_the_rest_is_not(
    tmp_path: Path, tiny: tuple[Path, NDArray[np.float32]]
) -> None:
    folder, expected = tiny
    text = json.loads((folder / "config.json").read_text())
    whole = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps({**whole, "vision_config": {"depth": 2}}))
    weights = {
        name.replace("model.", "model.language_model.", 1): value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    seen = {
        "model.visual.blocks.0.norm1.weight": np.zeros(8, np.float32),
        "mtp.fc.weight": np.zeros((4, 4), np.float32),
    }
    save_file({**weights, **seen}, tmp_path / "model.safetensors")
    np.testing.assert_allclose(logits_of(tmp_path, "reference"), expected, atol=1e-4)


def test_defaults_are_those_of_transformers_and_what_is_not_computed_is_refused() -> None:
    default = transformers.Qwen3_5TextConfig()
    config = read_hf_config({"architectures": ["Qwen3_5ForCausalLM"], **default.to_dict()})
    assert isinstance(config, Qwen35Config)
    assert config.attends == tuple(kind == "full_attention" for kind in default.layer_types)
    assert (config.rotary_dim, config.delta.num_heads, config.delta.row_width) == (64, 32, 8192)
    assert config.cache_spec(32, "bfloat16").state_bytes == 24 * 4 * (32 * 128 * 128 + 3 * 8192)
    with pytest.raises(UnsupportedModelError, match="biases of attention"):
        read_hf_config({"architectures": ["Qwen3_5ForCausalLM"], **CONFIG, "attention_bias": True})
    with pytest.raises(UnsupportedModelError, match="qwen3_5_moe"):
        read_hf_config({"model_type": "qwen3_5_moe", **CONFIG})
