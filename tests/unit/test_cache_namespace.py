"""The namespace of a KV cache: another digest wherever the bits of a page may be others, and the same otherwise."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from mooli.config import EngineConfig
from mooli.engine import build
from mooli.engine.facts import CacheNamespace, EngineFacts

ONE = CacheNamespace(
    model="a",
    load_format="auto",
    seed=None,
    numbers="b",
    backend="cpu",
    dtype="auto",
    quantization=None,
    kv_cache_dtype="bfloat16",
    page_size=32,
    parts=1,
    page_format={"instruction set": "avx2", "layout": "tiles"},
    numeric_version=1,
)
OTHERS: dict[str, Any] = {
    "model": "c",
    "load_format": "dummy",
    "seed": 0,
    "numbers": "c",
    "adapter": "c",
    "backend": "torch",
    "dtype": "float32",
    "quantization": "int8",
    "kv_cache_dtype": "int8",
    "page_size": 64,
    "parts": 2,
    "page_format": {"instruction set": "avx512", "layout": "tiles"},
    "numeric_version": 2,
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 320,
    "torch_dtype": "float32",
}


def test_every_ingredient_changes_the_digest() -> None:
    assert OTHERS.keys() == {item.name for item in fields(CacheNamespace)}
    digests = {replace(ONE, **{name: value}).digest for name, value in OTHERS.items()}
    assert len(digests) == len(OTHERS) and ONE.digest not in digests
    reordered = replace(ONE, page_format=dict(reversed(ONE.page_format.items())))
    assert reordered.digest == ONE.digest
    assert len(ONE.digest) == 32


def test_ingredients_can_be_shown() -> None:
    assert json.loads(json.dumps(ONE.to_dict()))["page_format"]["instruction set"] == "avx2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def facts_of(folder: Path, **settings: Any) -> EngineFacts:
    given = {"device": "cpu", "num_threads": 1, "load_format": "dummy", "max_total_tokens": 256, **settings}
    built = build.build_engine(EngineConfig.from_kwargs(model_path=str(folder), **given), folder)
    built.close()
    return built.facts


def test_engines_of_other_bits_have_namespaces_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = [
        facts_of(folder),
        facts_of(folder, random_seed=1),
        facts_of(folder, page_size=64),
        facts_of(folder, dtype="bfloat16"),
        facts_of(folder, quantization="int8"),
        facts_of(folder, kv_cache_dtype="int8"),
        facts_of(folder, json_model_override_args='{"rope_theta": 5000.0}'),
        facts_of(folder, json_model_override_args='{"rms_norm_eps": 1e-3}'),
        facts_of(folder, device="reference", num_threads=None),
    ]
    monkeypatch.setenv("MOOLI_ISA", "scalar")
    facts.append(facts_of(folder))
    monkeypatch.setattr(build, "NUMERIC_VERSION", build.NUMERIC_VERSION + 1)
    facts.append(facts_of(folder))
    assert len({each.cache_namespace for each in facts}) == len(facts)
    assert facts[-1].cache_ingredients["page_format"]["instruction set"] == "scalar"


def test_what_changes_no_bit_changes_no_namespace(folder: Path) -> None:
    first = facts_of(folder)
    for settings in (
        {},
        {"num_threads": 2},
        {"max_total_tokens": 512},
        {"random_seed": 0},
        {"schedule_policy": "fcfs"},
    ):
        assert facts_of(folder, **settings).cache_namespace == first.cache_namespace, settings


def test_files_that_are_replaced_are_another_model(folder: Path) -> None:
    first = facts_of(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG) + " ")
    assert facts_of(folder).cache_namespace != first.cache_namespace


def test_factors_of_rotations_are_chosen_by_the_context_length(folder: Path) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    own = {"architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 64}
    own["rope_scaling"] = {"type": "longrope", **factors}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **own}))
    whole, short, shorter = facts_of(folder), facts_of(folder, context_length=64), facts_of(folder, context_length=32)
    assert whole.cache_namespace != short.cache_namespace == shorter.cache_namespace
    assert facts_of(folder, context_length=65).cache_namespace == whole.cache_namespace
