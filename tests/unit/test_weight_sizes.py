"""Weights that are larger than the memory are refused before one is loaded, with what would fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mooli.config import EngineConfig
from mooli.engine import weight_sizes
from mooli.engine.build import build_engine
from mooli.engine.weight_sizes import GIB, check_weights_fit
from mooli.errors import OutOfMemoryError
from mooli.models.loader import open_model
from mooli.plan import weight_bytes

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 40,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def check(folder: Path, available_bytes: int, **settings: Any) -> None:
    config = EngineConfig.from_kwargs(model_path=str(folder), **settings)
    model, _ = open_model(folder, load_format="dummy")
    check_weights_fit(config, model, folder, available_bytes)


def planned(folder: Path, quantization: str | None, device: str = "cpu") -> int:
    model, _ = open_model(folder, load_format="dummy")
    return weight_bytes(model, "bfloat16", device=device, quantization=quantization)


def test_what_would_fit_is_named(folder: Path) -> None:
    whole, eight, four = (planned(folder, quantization) for quantization in (None, "int8", "int4"))
    with pytest.raises(OutOfMemoryError) as error:
        check(folder, whole - 1, device="cpu")
    assert f"take {whole / GIB:.2f} GiB as they would be loaded" in str(error.value)
    assert f"with quantization int8 ({eight / GIB:.2f} GiB) or int4 ({four / GIB:.2f} GiB) they would" in str(
        error.value
    )
    assert f"mooli plan {folder} --memory {(whole - 1) // 2**20}Mi" in str(error.value)
    with pytest.raises(OutOfMemoryError, match=r"with quantization int4 \(.*\) they would fit"):
        check(folder, eight - 1, device="cpu")
    with pytest.raises(OutOfMemoryError, match=f"the least they can take here is {four / GIB:.2f} GiB"):
        check(folder, four - 1, device="cpu")
    check(folder, whole, device="cpu")
    check(folder, eight, device="cpu", quantization="int8")


def test_int4_is_not_offered_where_it_is_not_possible(folder: Path) -> None:
    with pytest.raises(OutOfMemoryError, match=r"quantization int8 \([0-9.]+ GiB\) they would fit"):
        check(folder, planned(folder, None, "torch") - 1, device="torch", dtype="bfloat16")


def test_types_of_the_files_count(folder: Path) -> None:
    whole = planned(folder, None)
    config = CONFIG | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    (folder / "config.json").write_text(json.dumps(config))
    check(folder, whole // 2, device="cpu")
    with pytest.raises(OutOfMemoryError, match="the least"):
        check(folder, whole // 5, device="cpu", quantization="int8")


def test_models_that_are_far_smaller_are_not_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_sizes, "loaded_bytes", lambda *_: pytest.fail("counted"))
    check(folder, 8 * GIB, device="cpu")


def test_nothing_is_loaded_of_a_model_that_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mooli.engine.build.create_model", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("mooli.engine.build.SoloTeam.meet", lambda *_: 2**28)
    config = EngineConfig.from_kwargs(model_path=str(folder), device="cpu", load_format="dummy")
    with pytest.raises(OutOfMemoryError, match="Nothing was loaded"):
        build_engine(config, folder)
