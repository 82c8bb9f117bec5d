"""Experts from all the files they come in: one by one, in stacks, and GGUF as converters write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from test_moe_families import made

from model_files import interleaved
from mooli.backends import create_backend
from mooli.backends.dequant import dequantize
from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models.experts import Experts
from mooli.models.llama import LlamaConfig
from mooli.models.loader import open_model, stored_types
from mooli.models.registry import create_model, read_hf_config
from mooli.models.stacks import Places, Stacked
from mooli.plan import plan_memory
from mooli.tensor import RawTensor, TensorType
from steps import LIMITS, Pages, Row, step

Weights = dict[str, NDArray[np.float32]]

PROMPT = np.random.default_rng(3).integers(0, 199, 21).tolist()

ARCHITECTURES = {"qwen3-moe": "qwen3moe", "qwen2-moe": "qwen2moe", "mixtral": "llama", "olmoe": "olmoe"}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {each: tmp_path_factory.mktemp(each) for each in ARCHITECTURES}
    for each, path in found.items():
        made(each, path)
    return found


@pytest.fixture
def folder(folders: dict[str, Path], name: str) -> Path:
    return folders[name]


def weights_of(folder: Path) -> Weights:
    """By the names that published files have: each expert on its own."""
    weights: Weights = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            weights[name] = value
            continue
        stem = name.rsplit(".", 1)[0]
        for expert, matrix in enumerate(value):
            if name.endswith("down_proj"):
                weights[f"{stem}.{expert}.down_proj.weight"] = matrix
                continue
            for part, rows in zip(("gate_proj", "up_proj"), np.split(matrix, 2), strict=True):
                weights[f"{stem}.{expert}.{part}.weight"] = np.ascontiguousarray(rows)
    return weights


def logits_of(path: Path, backend_name: str = "reference") -> NDArray[np.float32]:
    backend = create_backend(backend_name, dtype="float32")
    config, checkpoint = open_model(path)
    model = create_model(config, checkpoint, backend)
    checkpoint.close()
    page_size = backend.default_page_size
    backend.allocate(config.cache_spec(page_size, "float32"), 8, LIMITS)
    batch = step([Row(PROMPT, 0, Pages(8, page_size).take(len(PROMPT)), len(PROMPT))], page_size)
    planned = backend.plan(batch)
    hidden = backend.capture(model.forward)(planned)
    taken = backend.take_rows(planned, hidden, batch.sampling_tokens)
    logits = np.array(backend.to_host(backend.capture(model.logits)(*taken)), np.float32)
    backend.close()
    return logits


EXPERT_NAMES = {"gate_proj": 0, "up_proj": 1, "down_proj": 2, "w1": 0, "w3": 1, "w2": 2}


def stacked(weights: Weights) -> tuple[Weights, dict[str, list[list[NDArray[np.float32]]]]]:
    """What is no expert's, and of each layer's module the gate, up and down projections of its experts."""
    others: Weights = {}
    layers: dict[str, dict[int, list[NDArray[np.float32]]]] = {}
    for name, value in weights.items():
        stem, found, rest = name.partition(".experts.")
        if not found:
            others[name] = value
            continue
        expert, part, _ = rest.split(".")
        layers.setdefault(stem, {}).setdefault(int(expert), [value] * 3)[EXPERT_NAMES[part]] = value
    return others, {stem: [experts[e] for e in range(len(experts))] for stem, experts in layers.items()}


def copied(folder: Path, target: Path, weights: Weights) -> Path:
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, target / "model.safetensors")
    return target


def test_folders_may_have_experts_one_by_one_or_in_stacks(folder: Path, tmp_path: Path) -> None:
    weights = weights_of(folder)
    others, layers = stacked(weights)
    for stem, experts in layers.items():
        others[f"{stem}.experts.gate_up_proj"] = np.stack([np.concatenate([gate, up]) for gate, up, _ in experts])
        others[f"{stem}.experts.down_proj"] = np.stack([down for _, _, down in experts])
    one_by_one = copied(folder, tmp_path / "one", weights)
    in_stacks = copied(folder, tmp_path / "stacks", others)
    expected = logits_of(folder)
    np.testing.assert_array_equal(logits_of(one_by_one), expected)
    np.testing.assert_array_equal(logits_of(in_stacks), expected)
    np.testing.assert_array_equal(logits_of(in_stacks, "cpu"), logits_of(one_by_one, "cpu"))


TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    **{f"mlp.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}


def write_gguf(path: Path, folder: Path, architecture: str, *, quantize: str = "F32", one_by_one: bool = False) -> None:
    """What a converter does, with the writer of the gguf package."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if config.get("sliding_window") and architecture == "llama":
        writer.add_sliding_window(config["sliding_window"])
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    others, layers = stacked(weights_of(folder))
    values: Weights = {}
    for name, value in others.items():
        stem, kind = name.rsplit(".", 1)
        block = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            block = f"blk.{layer}."
        if architecture == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            key = "num_attention_heads" if "q_proj" in stem else "num_key_value_heads"
            value = interleaved(value, config[key])
        values[f"{block}{TO_GGUF[stem]}.{kind}"] = value
    for stem, experts in layers.items():
        block = f"blk.{stem.split('.')[2]}"
        for part, each in zip(("gate", "up", "down"), zip(*experts, strict=True), strict=True):
            if one_by_one:
                values |= {f"{block}.ffn_{part}.{index}.weight": value for index, value in enumerate(each)}
            else:
                values[f"{block}.ffn_{part}_exps.weight"] = np.stack(each)
    for name, value in values.items():
        kind = gguf.GGMLQuantizationType[quantize if value.ndim > 1 and "gate_inp" not in name else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_files_have_the_same_model(folder: Path, name: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", folder, ARCHITECTURES[name])
    config, checkpoint = open_model(tmp_path / "m.gguf")
    checkpoint.close()
    expected, _ = open_model(folder)
    for field in ("family", "sliding_window", "experts"):
        assert getattr(config, field) == getattr(expected, field), field
    np.testing.assert_array_equal(logits_of(tmp_path / "m.gguf"), logits_of(folder))


def test_old_gguf_files_have_experts_one_by_one(folders: dict[str, Path], tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", folders["mixtral"], "llama", one_by_one=True)
    np.testing.assert_array_equal(logits_of(tmp_path / "m.gguf"), logits_of(folders["mixtral"]))


def test_stacks_of_quantised_experts_are_cut_in_whole_rows(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, path = folders["qwen2-moe"], tmp_path / "m.gguf"
    write_gguf(path, folder, "qwen2moe", quantize="Q8_0")
    config, checkpoint = open_model(path)
    value = weights_of(folder)["model.layers.1.mlp.experts.5.up_proj.weight"]
    kind = gguf.GGMLQuantizationType.Q8_0
    np.testing.assert_array_equal(
        dequantize(checkpoint.tensor("model.layers.1.mlp.experts.5.up_proj.weight")),
        gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind),
    )
    checkpoint.release("model.layers.1.mlp.experts.5.up_proj.weight")
    checkpoint.close()
    types = stored_types(path, config)
    assert types is not None
    assert types["model.layers.1.mlp.experts.5.up_proj.weight"] == TensorType.Q8_0
    assert set(types) == set(config.tensors())
    plan = plan_memory(config, 1 << 30, stored_types=types)
    backend = create_backend("cpu")
    _, checkpoint = open_model(path)
    create_model(config, checkpoint, backend)
    checkpoint.close()
    assert plan.weight_bytes == backend.weight_bytes()
    backend.close()


@pytest.mark.parametrize("device", ["cpu", "torch"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_plan_has_the_bytes_that_loading_takes(folder: Path, device: str, quantization: str | None) -> None:
    config, checkpoint = open_model(folder)
    backend = create_backend(device, dtype="bfloat16", quantization=quantization)
    create_model(config, checkpoint, backend)
    checkpoint.close()
    plan = plan_memory(config, 1 << 30, device=device, dtype="bfloat16", quantization=quantization)
    assert plan.weight_bytes == backend.weight_bytes()
    backend.close()


def test_places_in_stacks() -> None:
    values = np.arange(2 * 6 * 5, dtype=np.float32).reshape(2, 6, 5)

    def raw(array: NDArray[np.float32], kind: TensorType = TensorType.F32) -> RawTensor:
        rows = np.ascontiguousarray(array).reshape(-1, array.shape[-1])
        return RawTensor("t", kind, rows.shape, rows.view(np.uint8))

    def cut(place: Stacked, array: NDArray[np.float32], wanted: int = 2) -> NDArray[np.float32]:
        tensor = place.cut(raw(array), "x", wanted)
        assert tensor.name == "x" and tensor.shape == place.shape(raw(array).shape, wanted)
        return dequantize(tensor).reshape(tensor.shape)

    np.testing.assert_array_equal(cut(Stacked("s", 1, 2), values), values[1])
    np.testing.assert_array_equal(cut(Stacked("s", 1, 2, 1, 2), values), values[1, 3:])
    np.testing.assert_array_equal(cut(Stacked("s", 1, 2, 1, 2, interleaved=True), values), values[1, 1::2])
    turned = values.swapaxes(1, 2)
    np.testing.assert_array_equal(cut(Stacked("s", 1, 2, is_transposed=True), turned), values[1])
    np.testing.assert_array_equal(
        cut(Stacked("s", 1, 2, 0, 2, interleaved=True, is_transposed=True), turned), values[1, ::2]
    )
    np.testing.assert_array_equal(cut(Stacked("s", 1, 2), values[:, 0], 1), values[1, 0])
    np.testing.assert_array_equal(cut(Stacked("s", 0, 2, 1, 2), values[:, :, 0], 1), values[0, 3:, 0])
    np.testing.assert_array_equal(
        cut(Stacked("s", 1, 2, 1, 2, interleaved=True), values[:, :, 0], 1), values[1, 1::2, 0]
    )
    with pytest.raises(CheckpointError, match="s has 12 rows, which are not 5 equal parts"):
        Stacked("s", 0, 5).shape((12, 5), 2)
    with pytest.raises(CheckpointError, match="not 4 parts each"):
        Stacked("s", 0, 2, 0, 4).shape((12, 5), 2)
    with pytest.raises(CheckpointError, match="s is Q8_0, whose values do not stand alone"):
        blocks = RawTensor("t", TensorType.Q8_0, (4, 32), np.zeros((4, 34), np.uint8))
        Stacked("s", 0, 2, is_transposed=True).cut(blocks, "x", 2)


def test_a_stack_is_released_when_the_last_expert_of_it_is_packed() -> None:
    stacks = {
        f"expert {e} {part}": (Stacked("gate_up", e, 2, index, 2),) for e in (0, 1) for index, part in enumerate("gu")
    }
    places = Places({**{name: name for name in stacks}, "norm": "norm"}, stacks, ["gate_up", "norm", "other"])
    assert places.files["other"] == "other"
    assert [places.released(name) for name in (*stacks, "norm")] == [None, None, None, "gate_up", "norm"]


def test_an_expert_that_is_missing_and_a_stack_of_another_number_are_named(folder: Path, tmp_path: Path) -> None:
    weights = weights_of(folder)
    lost = next(name for name in weights if ".experts.4." in name)
    incomplete = {name: value for name, value in weights.items() if name != lost}
    with pytest.raises(CheckpointError, match=f"{lost} is missing"):
        open_model(copied(folder, tmp_path / "lost", incomplete))
    others, layers = stacked(weights)
    for stem, experts in layers.items():
        others[f"{stem}.experts.gate_up_proj"] = np.stack([np.concatenate(each[:2]) for each in experts[:-1]])
        others[f"{stem}.experts.down_proj"] = np.stack([each[2] for each in experts[:-1]])
    with pytest.raises(CheckpointError, match=r"equal parts|has shape"):
        open_model(copied(folder, tmp_path / "few", others))


QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_what_a_config_does_not_say_is_the_default_of_its_class() -> None:
    config = read_hf_config(QWEN3)
    assert isinstance(config, LlamaConfig) and config.qk_norm
    assert config.experts == Experts(num_experts=128, top_k=8, width=768)
    stepped = read_hf_config({**QWEN3, "decoder_sparse_step": 2, "mlp_only_layers": [1]})
    assert isinstance(stepped, LlamaConfig) and stepped.experts is not None
    assert stepped.experts.dense_layers == (0, 1, 2)
    shared = read_hf_config({**QWEN3, "architectures": ["Qwen2MoeForCausalLM"]})
    assert isinstance(shared, LlamaConfig) and shared.qkv_bias
    assert shared.experts == Experts(num_experts=60, top_k=4, width=1408, shared_width=5632)
    for changes, error, words in (
        ({"num_experts_per_tok": 129}, CheckpointError, "num_experts_per_tok is 129"),
        ({"num_experts": 5000}, CheckpointError, "num_experts is 5000"),
        ({"moe_intermediate_size": 0}, CheckpointError, "moe_intermediate_size is 0"),
        ({"mlp_only_layers": "all"}, CheckpointError, "mlp_only_layers must be a list"),
        ({"decoder_sparse_step": 0}, CheckpointError, "decoder_sparse_step is 0"),
        ({"use_sliding_window": True}, UnsupportedModelError, "a sliding window is not implemented"),
        ({"hidden_act": "gelu"}, UnsupportedModelError, "activation 'gelu' is not implemented"),
    ):
        with pytest.raises(error, match=words):
            read_hf_config({**QWEN3, **changes})
