"""What building an engine makes of the memory it finds, with a small model of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mooli.backends.base import MemoryInfo
from mooli.backends.cpu import CpuBackend
from mooli.config import EngineConfig
from mooli.engine.build import build_engine
from mooli.errors import OutOfMemoryError

GIB = 2**30
SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 2**20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 320,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path


def built_with(folder: Path, monkeypatch: pytest.MonkeyPatch, *found: MemoryInfo) -> int:
    """Bytes of the pool of an engine that finds this memory, one after the other each time that it asks."""
    memory = iter(found)
    monkeypatch.setattr(CpuBackend, "memory", lambda backend: next(memory))
    config = EngineConfig.from_kwargs(model_path=str(folder), load_format="dummy", device="cpu", num_threads=1)
    built = build_engine(config, folder)
    built.close()
    return built.facts.kv_cache_bytes


def test_what_others_took_while_weights_were_loaded_is_not_taken_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    much, little = MemoryInfo(64 * GIB, 16 * GIB), MemoryInfo(64 * GIB, 4 * GIB, 12 * GIB)
    assert 7.9 * GIB < built_with(folder, monkeypatch, much, much) < 8 * GIB
    assert 1.9 * GIB < built_with(folder, monkeypatch, much, little) < 2.1 * GIB


def test_three_engines_of_one_machine_take_no_more_than_it_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, taken = 24 * GIB, 0
    for _ in range(3):
        found = MemoryInfo(machine, machine - taken, taken)
        taken += built_with(folder, monkeypatch, found, found)
    assert taken < 0.9 * machine
    found = MemoryInfo(machine, GIB // 2, machine - GIB // 2)
    with pytest.raises(OutOfMemoryError, match=r"0.50 GiB were available \(23.50 GiB more are other engines'\)"):
        built_with(folder, monkeypatch, found, found)
