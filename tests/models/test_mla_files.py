"""Models with latent attention from the other files they come in: GGUF as converters write it, folders of the hub with
layers that are left out, and openPangu-Ultra-MoE, which Transformers does not know."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from test_mla_families import MOE, YARN, randomise

from mooli.backends import create_backend
from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models.deepseek import DeepseekConfig
from mooli.models.loader import open_model
from mooli.models.registry import create_model, read_hf_config
from steps import LIMITS, Pages, Row, step

PROMPT = np.random.default_rng(3).integers(0, MOE["vocab_size"], 37).tolist()
SIZES = {**MOE, "first_k_dense_replace": 1}
Tensors = dict[str, NDArray[np.float32]]


def built(config: transformers.PreTrainedConfig) -> Any:
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    randomise(model)
    return model.eval()


def state_of(model: Any) -> Tensors:
    return {name: values.detach().numpy() for name, values in model.state_dict().items()}


def logits_of(path: Path, backend_name: str, num_layers: int = 3) -> NDArray[np.float32]:
    backend = create_backend(backend_name, dtype="float32")
    config, checkpoint = open_model(path)
    assert config.num_layers == num_layers
    model = create_model(config, checkpoint, backend)
    checkpoint.close()
    page_size = backend.default_page_size
    backend.allocate(config.cache_spec(page_size, "float32"), 8, LIMITS)
    batch = step([Row(PROMPT, 0, Pages(8, page_size).take(len(PROMPT)), len(PROMPT))], page_size)
    planned = backend.plan(batch)
    hidden = backend.capture(model.forward)(planned)
    parts = []
    for begin in range(0, len(PROMPT), LIMITS.max_rows):
        taken = backend.take_rows(planned, hidden, batch.sampling_tokens[begin : begin + LIMITS.max_rows])
        parts.append(np.array(backend.to_host(backend.capture(model.logits)(*taken)), np.float32))
    backend.close()
    return np.concatenate(parts)


def write_gguf(path: Path, model: Any, *, is_split: bool, kind: gguf.GGMLQuantizationType | None = None) -> None:
    """As the converters of llama.cpp write it: old ones leave the projection from latents in one."""
    config = model.config
    heads, rank, nope = config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim
    rope, value, layers = config.qk_rope_head_dim, config.v_head_dim, config.num_hidden_layers
    writer = gguf.GGUFWriter(path, "deepseek2")
    is_v3 = config.model_type == "deepseek_v3"
    for add, number in (
        (writer.add_block_count, layers),
        (writer.add_context_length, config.max_position_embeddings),
        (writer.add_embedding_length, config.hidden_size),
        (writer.add_feed_forward_length, config.intermediate_size),
        (writer.add_head_count, heads),
        (writer.add_head_count_kv, 1 if is_split else heads),
        (writer.add_layer_norm_rms_eps, config.rms_norm_eps),
        (writer.add_rope_freq_base, config.rope_parameters["rope_theta"]),
        (writer.add_rope_dimension_count, rope),
        (writer.add_kv_lora_rank, rank),
        (writer.add_key_length, rank + rope if is_split else nope + rope),
        (writer.add_value_length, rank if is_split else value),
        (writer.add_leading_dense_block_count, config.first_k_dense_replace),
        (writer.add_expert_count, config.n_routed_experts),
        (writer.add_expert_used_count, config.num_experts_per_tok),
        (writer.add_expert_shared_count, config.n_shared_experts),
        (writer.add_expert_feed_forward_length, config.moe_intermediate_size),
        (writer.add_expert_weights_scale, config.routed_scaling_factor),
        (writer.add_expert_group_count, config.n_group),
        (writer.add_expert_group_used_count, config.topk_group),
    ):
        add(number)
    if config.q_lora_rank:
        writer.add_q_lora_rank(config.q_lora_rank)
    if is_split:
        writer.add_key_length_mla(nope + rope)
        writer.add_value_length_mla(value)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if is_v3 else gguf.ExpertGatingFuncType.SOFTMAX)
    writer.add_expert_weights_norm(is_v3)
    if config.rope_parameters["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * config.rope_parameters["mscale_all_dim"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, layers)
    for name, values in gguf_tensors(state_of(model), config, is_split=is_split).items():
        stem, _, ending = name.replace("e_score_correction_bias", "e_score_correction.bias").rpartition(".")
        found = names.get_name(stem)
        assert found is not None, name
        data, raw = np.ascontiguousarray(values), None
        if kind is not None and values.ndim > 1 and "gate.weight" not in name and values.shape[-1] % 32 == 0:
            data, raw = gguf.quantize(data, kind), kind
        writer.add_tensor(f"{found}.{ending}", data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(state: Tensors, config: Any, *, is_split: bool) -> Tensors:
    """By the names that the package has for them."""
    heads, rank, nope = config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim
    made: Tensors = {}
    for name, values in state.items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = np.split(values, 2, axis=1)
            made |= {name.replace("gate_up_proj", "gate_proj.weight"): gate}
            made |= {name.replace("gate_up_proj", "up_proj.weight"): up}
        elif name.endswith("experts.down_proj"):
            made[f"{name}.weight"] = values
        elif name.endswith("kv_b_proj.weight") and is_split:
            both = values.reshape(heads, -1, rank)
            made[name.replace("kv_b_proj", "k_b_proj")] = both[:, :nope].transpose(0, 2, 1)
            made[name.replace("kv_b_proj", "v_b_proj")] = both[:, nope:]
        elif not name.endswith(("inv_freq",)):
            made[name] = values
    return made


GGUF_CONFIGS = {
    "v2": transformers.DeepseekV2Config(**{**SIZES, "q_lora_rank": None}, n_group=1, topk_group=1),
    "v3": transformers.DeepseekV3Config(**SIZES, n_group=4, topk_group=2, rope_parameters={**YARN, "mscale": 0.7}),
}


@pytest.mark.parametrize("is_split", [True, False], ids=["keys and values apart", "in one"])
@pytest.mark.parametrize("version", list(GGUF_CONFIGS))
def test_a_gguf_file_gives_the_logits_of_the_folder(tmp_path: Path, version: str, is_split: bool) -> None:
    model = built(GGUF_CONFIGS[version])
    path = tmp_path / "model.gguf"
    write_gguf(path, model, is_split=is_split)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0].numpy()
    for backend in ("reference", "cpu"):
        np.testing.assert_allclose(logits_of(path, backend), expected, atol=2e-4)


def test_minicpm3_has_longrope_and_gguf_files(tmp_path: Path) -> None:
    """A file has neither the multipliers nor the length of values: they are those of the published model."""
    long, short = ([scale + i / 8 for i in range(8)] for scale in (4.0, 1.0))
    sizes = {key: value for key, value in SIZES.items() if "expert" not in key and "moe" not in key}
    sizes |= {"v_head_dim": 16, "tie_word_embeddings": True}
    rotary = {"rope_type": "longrope", "rope_theta": 10000.0, "long_factor": long, "short_factor": short}
    config = transformers.MiniCPM3Config(**sizes, rope_parameters={**rotary, "original_max_position_embeddings": 4})
    model = built(config)
    model.save_pretrained(tmp_path / "folder")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "minicpm3")
    for add, number in (
        (writer.add_block_count, config.num_hidden_layers),
        (writer.add_context_length, config.max_position_embeddings),
        (writer.add_embedding_length, config.hidden_size),
        (writer.add_feed_forward_length, config.intermediate_size),
        (writer.add_head_count, config.num_attention_heads),
        (writer.add_head_count_kv, config.num_attention_heads),
        (writer.add_layer_norm_rms_eps, config.rms_norm_eps),
        (writer.add_q_lora_rank, config.q_lora_rank),
        (writer.add_kv_lora_rank, config.kv_lora_rank),
        (writer.add_key_length, config.qk_nope_head_dim + config.qk_rope_head_dim),
        (writer.add_rope_dimension_count, config.qk_rope_head_dim),
        (writer.add_rope_scaling_orig_ctx_len, 4),
        (writer.add_rope_scaling_attn_factors, math.sqrt(1 + math.log(config.max_position_embeddings / 4, 4))),
    ):
        add(number)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MINICPM3, config.num_hidden_layers)
    for name, values in state_of(model).items():
        if not name.endswith(("inv_freq", "embed_scale", "lm_head.weight")):
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values))
    for kind, factors in (("long", long), ("short", short)):
        writer.add_tensor(f"rope_factors_{kind}.weight", np.asarray(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0].numpy()
    for file in ("folder", "model.gguf"):
        np.testing.assert_allclose(logits_of(tmp_path / file, "reference"), expected, atol=2e-4)


@pytest.mark.parametrize("is_split", [True, False], ids=["keys and values apart", "in one"])
def test_quantised_keys_and_values_are_read_as_they_are(tmp_path: Path, is_split: bool) -> None:
    sizes = {**SIZES, "qk_nope_head_dim": 32, "v_head_dim": 32}
    model = built(transformers.DeepseekV3Config(**sizes, n_group=1, topk_group=1))
    path = tmp_path / "model.gguf"
    write_gguf(path, model, is_split=is_split, kind=gguf.GGMLQuantizationType.Q8_0)
    reference, cpu = (logits_of(path, backend) for backend in ("reference", "cpu"))
    errors = np.sqrt(np.mean((cpu - reference) ** 2, axis=1)) / np.sqrt(np.mean(reference**2))
    # Activations are rounded to eight bits, and where two experts are nearly equal that chooses the other.
    assert np.median(errors) <= 0.03


def test_layers_that_predict_further_tokens_are_left_out_with_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = built(GGUF_CONFIGS["v3"])
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    assert "model.layers.2.mlp.experts.7.up_proj.weight" in tensors, "folders of the hub have experts one by one"
    extra = {
        "model.layers.3.eh_proj.weight": np.ones((64, 128), np.float32),
        "model.layers.3.enorm.weight": np.ones(64),
    }
    save_file({**tensors, **extra}, file)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.e.* has no place"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "num_nextn_predict_layers": 1, "model_type": "kimi_k2"})
    )
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0].numpy()
    with caplog.at_level(logging.INFO):
        np.testing.assert_allclose(logits_of(tmp_path, "reference"), expected, atol=1e-4)
    assert "which predict further tokens (MTP), are not used: up to 1" in caplog.text


# ---------------------------------------------------------------- openPangu-Ultra-MoE

OWN_KEYS = {
    "q_lora_rank": "attention_q_lora_dim",
    "kv_lora_rank": "attention_kv_lora_dim",
    "qk_nope_head_dim": "attention_qk_dim",
    "qk_rope_head_dim": "attention_qk_rope_dim",
    "v_head_dim": "attention_v_dim",
    "n_routed_experts": "num_routed_experts",
    "n_shared_experts": "num_shared_experts",
    "first_k_dense_replace": "num_dense_layers",
    "num_nextn_predict_layers": "num_mtp_layers",
}


def sandwich_logits(model: Any, norms: Tensors) -> NDArray[np.float32]:
    """DeepSeek-V3's decoder with a norm behind each half of a layer: what its layers call the norm after attention is
    the one before the MLP."""
    inner, eps = model.model, model.config.rms_norm_eps
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        x = inner.embed_tokens(ids)
        rotations = inner.rotary_emb(x, torch.arange(len(PROMPT))[None])
        mask = torch.full((len(PROMPT), len(PROMPT)), -torch.inf).triu(1)[None, None]

        def normed(values: torch.Tensor, name: str) -> torch.Tensor:
            return torch.nn.functional.rms_norm(values, values.shape[-1:], torch.from_numpy(norms[name]), eps)

        for index, layer in enumerate(inner.layers):
            name = f"model.layers.{index}"
            mixed, _ = layer.self_attn(layer.input_layernorm(x), rotations, mask)
            x = x + normed(mixed, f"{name}.post_attention_layernorm.weight")
            x = x + normed(layer.mlp(layer.post_attention_layernorm(x)), f"{name}.post_mlp_layernorm.weight")
        return np.asarray(model.lm_head(inner.norm(x))[0].numpy())


@pytest.mark.parametrize("has_bias", [True, False], ids=["correction", "no correction"])
@pytest.mark.parametrize("spelling", ["its own", "DeepSeek's"])
def test_pangu_ultra_is_deepseek_with_four_norms_and_no_groups(tmp_path: Path, spelling: str, has_bias: bool) -> None:
    config = transformers.DeepseekV3Config(**SIZES, n_group=1, topk_group=1, rms_norm_eps=1e-3, norm_topk_prob=True)
    model = built(config)
    random = np.random.default_rng(5)
    norms = {
        f"model.layers.{layer}.{name}.weight": (1 + 0.3 * random.standard_normal(64)).astype(np.float32)
        for layer in range(3)
        for name in ("post_attention_layernorm", "post_mlp_layernorm")
    }
    if not has_bias:
        for layer in model.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias.zero_()
    expected = sandwich_logits(model, norms)
    tensors = {}
    for name, values in state_of(model).items():
        if has_bias or not name.endswith("e_score_correction_bias"):
            tensors[name.replace("post_attention_layernorm", "pre_mlp_layernorm")] = values.copy()
    save_file({**tensors, **norms}, tmp_path / "model.safetensors")
    values = {**SIZES, "num_nextn_predict_layers": 1}
    if spelling == "its own":
        values = {OWN_KEYS.get(key, key): value for key, value in values.items()}
    values |= {"architectures": ["PanguUltraMoEForCausalLM"], "model_type": "pangu_ultra_moe", "rms_norm_eps": 1e-3}
    values |= {"sandwich_norm": True, "router_enable_expert_bias": has_bias, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    np.testing.assert_allclose(logits_of(tmp_path, "reference"), expected, atol=1e-4)
    for backend in ("cpu", "torch"):
        actual = logits_of(tmp_path, backend)
        assert np.sqrt(np.mean((actual - expected) ** 2)) <= 4e-5 * np.sqrt(np.mean(expected**2))


# ---------------------------------------------------------------- what is refused

HUB: dict[str, Any] = {**SIZES, "architectures": ["DeepseekV3ForCausalLM"], "n_group": 2, "topk_group": 1}
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "V3.2": ({"architectures": ["DeepseekV32ForCausalLM"]}, UnsupportedModelError, "'DeepseekV32ForCausalLM' is not"),
    "an indexer": ({"index_topk": 2048}, UnsupportedModelError, r"indexer.*index_topk"),
    "other scores": ({"scoring_func": "softmax"}, UnsupportedModelError, "scoring_func 'softmax'"),
    "another choice": ({"topk_method": "greedy"}, UnsupportedModelError, "topk_method 'greedy'"),
    "some layers": ({"moe_layer_freq": 2}, UnsupportedModelError, "moe_layer_freq"),
    "another activation": ({"hidden_act": "gelu"}, UnsupportedModelError, "activation 'gelu'"),
    "groups that are not equal": ({"n_group": 3}, CheckpointError, "3 of 8 experts are not chosen from 1 of 3"),
    "too few left": ({"n_group": 8, "topk_group": 2}, CheckpointError, "3 of 8 experts are not chosen from 2 of 8"),
    "no rank": ({"kv_lora_rank": 0}, CheckpointError, "kv_lora_rank is 0"),
    "odd rotation": ({"qk_rope_head_dim": 15}, CheckpointError, "qk_rope_head_dim 15 is odd"),
    "V2, normalised": (
        {"architectures": ["DeepseekV2ForCausalLM"], "norm_topk_prob": True},
        UnsupportedModelError,
        "norm_topk_prob is not implemented for deepseek_v2",
    ),
    "V2, another choice": (
        {"architectures": ["DeepseekV2ForCausalLM"], "topk_method": "noaux_tc"},
        UnsupportedModelError,
        "topk_method 'noaux_tc'",
    ),
    "kinds of layers": (
        {"architectures": ["Glm4MoeLiteForCausalLM"], "mlp_layer_types": ["dense"]},
        CheckpointError,
        "mlp_layer_types must be a list",
    ),
    "no sandwich": (
        {"architectures": ["PanguUltraMoEForCausalLM"], "sandwich_norm": False},
        UnsupportedModelError,
        "sandwich_norm false",
    ),
    "two spellings": (
        {"architectures": ["PanguUltraMoEForCausalLM"], "num_routed_experts": 4},
        CheckpointError,
        "num_routed_experts is 4, and n_routed_experts is 8",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_computed_is_refused_by_name(what: str) -> None:
    changes, error, words = REFUSED[what]
    with pytest.raises(error, match=words):
        read_hf_config({**HUB, **changes})


def test_a_rank_has_a_part_of_the_heads_and_all_of_the_latents() -> None:
    config = read_hf_config(HUB)
    assert isinstance(config, DeepseekConfig)
    part = config.part(2)
    assert part.cache_layers() == config.cache_layers()
    assert part.tensors()["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (48, 64)
    assert part.tensors()["model.layers.0.self_attn.q_b_proj.weight"].shape == (2 * 32, 24)
    assert part.tensors()["model.layers.1.mlp.experts.0.down_proj.weight"].shape == (64, 16)
