"""A family is one module and one entry of the registry: one that the package does not know works everywhere."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from model_files import F32, STRING, U32, gguf_bytes, interleaved, pair, safetensors_bytes, string, u32
from mooli import Engine
from mooli.backends import create_backend
from mooli.backends.base import Backend
from mooli.backends.dequant import dequantize
from mooli.config import EngineConfig
from mooli.doctor.model_folder import probe_model
from mooli.engine.build import build_engine
from mooli.errors import CheckpointError, ConfigError, UnsupportedModelError
from mooli.models import registry
from mooli.models.checkpoint import Checkpoint
from mooli.models.loader import open_model
from mooli.models.registry import create_model, read_gguf_config, read_hf_config
from mooli.models.sharding import Place, check_size, part_checkpoint
from mooli.plan import plan_memory, read_model
from steps import LIMITS, Pages, Row, step
from toy_family import TOY, ToyConfig, logits_of

CONFIG = {
    "architectures": ["ToyLM"], "vocab": 121, "dim": 64, "depth": 2, "queries": 4, "keys": 2, "wide": 96, "bias": True,
    "eos_token_id": 3, "torch_dtype": "float32",
}  # fmt: skip

Weights = dict[str, NDArray[np.float32]]


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one entry."""
    monkeypatch.setitem(registry.FAMILIES, "toy", TOY)


def whole() -> ToyConfig:
    config = read_hf_config(CONFIG)
    assert isinstance(config, ToyConfig)
    return config


def random_weights() -> Weights:
    rng = np.random.default_rng(7)
    made = {}
    for name, spec in whole().tensors().items():
        scale, centre = (spec.shape[1] ** -0.5, 0.0) if len(spec.shape) == 2 else (0.2, float("norm" in name))
        made[name] = (rng.standard_normal(spec.shape) * scale + centre).astype(np.float32)
    return made


@pytest.fixture
def weights() -> Weights:
    return random_weights()


@pytest.fixture
def folder(tmp_path: Path, weights: Weights) -> Path:
    path = tmp_path / "toy"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    header, data = {}, b""
    for name, values in {**weights, "vision.patches.weight": np.ones((2, 2), np.float32)}.items():
        header[name] = {"dtype": "F32", "shape": values.shape, "data_offsets": [len(data), len(data) + values.nbytes]}
        data += values.tobytes()
    (path / "model.safetensors").write_bytes(safetensors_bytes(header, data))
    return path


@pytest.fixture
def gguf(tmp_path: Path, weights: Weights) -> Path:
    numbers = {
        "block_count": 2, "context_length": 256, "embedding_length": 64, "queries": 4, "keys": 2, "wide": 96,
    }  # fmt: skip
    pairs = [pair("general.architecture", STRING, string("toy"))]
    pairs += [pair(f"toy.{key}", U32, u32(value)) for key, value in numbers.items()]
    pairs += [pair("toy.unread", F32, struct.pack("<f", 1.0))]
    tensors, offset = [], 0
    for name, spec in whole().tensors().items():
        values = weights[name]
        if spec.gguf_paired_heads:
            values = interleaved(values, spec.gguf_paired_heads)
        tensors.append((spec.gguf, values.shape[::-1], 0, offset, values.tobytes()))
        offset += -(-values.nbytes // 32) * 32
    path = tmp_path / "toy.gguf"
    path.write_bytes(gguf_bytes(pairs, tensors))
    return path


@pytest.fixture
def reference() -> Iterator[Backend]:
    backend = create_backend("reference")
    yield backend
    backend.close()


def test_both_kinds_of_file_are_the_same_model(folder: Path, gguf: Path, weights: Weights) -> None:
    opened: list[tuple[Any, Checkpoint]] = [open_model(folder), open_model(gguf)]
    for config, checkpoint in opened:
        assert (config.family, config.architecture, config.vocab_size) == ("toy", "ToyLM", 121)
        assert (config.num_queries, config.num_kv_heads, config.width, config.has_bias) == (4, 2, 96, True)
        for name, values in weights.items():
            np.testing.assert_array_equal(dequantize(checkpoint.tensor(name)), values, err_msg=name)
        checkpoint.close()


def test_it_computes_what_it_means(folder: Path, weights: Weights, reference: Backend) -> None:
    config, checkpoint = open_model(folder)
    model = create_model(config, checkpoint, reference)
    checkpoint.close()
    reference.allocate(config.cache_spec(16, "float32"), 8, LIMITS)
    ids = [5, 0, 120, 7, 7, 9]
    batch = step([Row(ids, 0, Pages(8, 16).take(len(ids)), samples=len(ids))], 16)
    planned = reference.plan(batch)
    taken = reference.take_rows(planned, reference.capture(model.forward)(planned), batch.sampling_tokens)
    logits = reference.to_host(reference.capture(model.logits)(*taken))
    np.testing.assert_allclose(logits, logits_of(whole(), weights, ids), atol=1e-4)


def test_an_engine_serves_it(folder: Path, weights: Weights) -> None:
    ids = [5, 0, 120, 7, 7, 9]
    expected: list[int] = []
    for _ in range(4):
        expected.append(int(logits_of(whole(), weights, ids + expected)[-1].argmax()))
    with Engine(model_path=str(folder), skip_tokenizer_init=True, dtype="float32", num_threads=1) as engine:
        answer = engine.generate(
            input_ids=ids, sampling_params={"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
        )
    assert answer["output_ids"] == expected


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_it_is_planned_as_the_engine_builds_it(request: pytest.FixtureRequest, kind: str) -> None:
    path: Path = request.getfixturevalue(kind)
    config, types = read_model(str(path))
    plan = plan_memory(config, 1 << 30, dtype="float32", stored_types=types)
    built = build_engine(EngineConfig.from_kwargs(model_path=str(path), dtype="float32", num_threads=1), path)
    built.close()
    assert plan.weight_bytes == built.facts.weight_bytes
    assert plan.kv_bytes_per_token * built.facts.max_total_num_tokens == built.facts.kv_cache_bytes
    assert plan.architecture == built.facts.architecture == "ToyLM"


@pytest.mark.parametrize("size", [2, 4])
def test_its_parts_make_the_whole(folder: Path, weights: Weights, size: int) -> None:
    config, checkpoint = open_model(folder)
    check_size(config, size)
    parts = [part_checkpoint(config, checkpoint, Place(rank, size)) for rank in range(size)]
    assert config.part(size).num_kv_heads == max(1, 2 // size)
    for name, spec in config.part(size).tensors().items():
        tensors = [dequantize(part.tensor(name)) for part in parts]
        split = config.tensors()[name].split
        if split is None or (len(spec.shape) == 1 and split.axis == 1):
            assert np.array_equal(tensors[0], weights[name])
            continue
        if split.rule == "padded":
            assert np.array_equal(np.concatenate(tensors)[:121], weights[name])
            continue
        assert tensors[0].shape == spec.shape
        step_over = 2 if split.rule == "shared" and size == 4 else 1
        assert np.array_equal(np.concatenate(tensors[::step_over], axis=split.axis), weights[name])
    checkpoint.close()


def test_numbers_of_ranks_that_do_not_fit_are_told_in_its_words() -> None:
    words = "divide its 4 queries and its 96 wide columns, and divide its 2 keys or be a multiple of them"
    with pytest.raises(ConfigError, match=rf"tp_size=3 .* {words}\. Possible: tp_size=1, 2, 4$"):
        check_size(whole(), 3)


def test_its_own_keys_may_be_overridden_and_no_others(folder: Path, gguf: Path) -> None:
    assert open_model(folder, load_format="dummy", overrides={"depth": 1})[0].num_layers == 1
    with pytest.raises(ConfigError, match=r"cannot override rope_theta .* depth, dim"):
        open_model(folder, overrides={"rope_theta": 1.0})
    config, _ = open_model(gguf, load_format="dummy", overrides={"wide": 32})
    assert isinstance(config, ToyConfig) and config.width == 32
    with pytest.raises(ConfigError, match="cannot override depth of a GGUF model"):
        open_model(gguf, overrides={"depth": 1})


def test_what_does_not_fit_is_told_in_its_names(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "depth": 1}))
    with pytest.raises(CheckpointError, match=r"h\.1\..* has no place in a toy model of 1 layers"):
        open_model(folder)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "queries": 100}))
    with pytest.raises(CheckpointError, match="queries is 100"):
        open_model(folder)


def test_errors_and_the_doctor_know_it_by_the_registry(folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"implemented: LlamaForCausalLM, .*ToyLM \(docs"):
        read_hf_config({"architectures": ["OtherLM"]})
    with pytest.raises(UnsupportedModelError, match=r"implemented: llama, qwen2, qwen3, smollm3, .*, toy \(docs"):
        read_gguf_config({"general.architecture": "other"}, {})
    section = probe_model(str(folder), "cpu", None)
    assert section.facts["layers"] == 2
    assert not [finding for finding in section.findings if finding.code.startswith(("model", "config", "weights"))]


class Recorded(dict[str, Any]):
    """A config.json that remembers which keys were asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip
WITH_LATENTS = ("minicpm3", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "pangu_ultra_moe")
MIXTURES = ("gpt_oss", "granitemoe", "granitemoeshared", "ernie4_5_moe", "hunyuan_v1_moe")


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma2", "PanguEmbedded", *MIXTURES, *WITH_LATENTS, "toy"]
)
def test_a_family_declares_exactly_the_keys_that_it_reads(name: str) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    window = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}
    latent = LATENT if name in WITH_LATENTS else {}
    config = Recorded({**(CONFIG if name == "toy" else sizes | heads | window | latent), "model_type": name})
    config["architectures"] = []
    read_hf_config(config)
    own = registry.FAMILIES[name].hf_keys
    assert own <= config.asked <= registry.HF_KEYS | own
