"""What building an engine makes of the memory it finds, and that `mooli plan` says the same beforehand."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from model_files import demo_path
from mooli import Engine
from mooli.backends import create_backend
from mooli.backends.base import CacheSpec, LatentLayer, MemoryInfo
from mooli.backends.cpu import CpuBackend
from mooli.backends.reference import ReferenceBackend
from mooli.config import EngineConfig
from mooli.engine.build import build_engine
from mooli.engine.facts import EngineFacts
from mooli.errors import ConfigError, OutOfMemoryError, UnsupportedModelError
from mooli.plan import plan_memory, plan_table, read_model
from variants import require, simulated_npu

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


def test_a_layer_that_the_backend_cannot_compute_is_refused_before_a_weight_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(backend: CpuBackend, spec: CacheSpec) -> int:
        return len(CacheSpec((*spec.layers, LatentLayer(512, 64)), spec.page_size, "int8").paged_layers())

    monkeypatch.setattr(CpuBackend, "kv_bytes_per_page", refuse)
    monkeypatch.setattr(CpuBackend, "load_linear", lambda *arguments, **options: pytest.fail("a weight was read"))
    config = EngineConfig.from_kwargs(model_path=str(folder), load_format="dummy", device="cpu", num_threads=1)
    with pytest.raises(UnsupportedModelError, match=r"'int8' is not implemented for models with multi-head latent"):
        build_engine(config, folder)


def test_three_engines_of_one_machine_take_no_more_than_it_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, taken = 24 * GIB, 0
    for _ in range(3):
        found = MemoryInfo(machine, machine - taken, taken)
        taken += built_with(folder, monkeypatch, found, found)
    assert taken < 0.9 * machine
    found = MemoryInfo(machine, GIB // 2, machine - GIB // 2)
    with pytest.raises(OutOfMemoryError, match=r"0.50 GiB were available \(23.50 GiB more are other engines'\)"):
        built_with(folder, monkeypatch, found, found)


@pytest.mark.parametrize("is_exact", [True, False])
def test_what_a_backend_says_of_itself_decides_about_guesses_and_the_length_of_steps(
    folder: Path, monkeypatch: pytest.MonkeyPatch, is_exact: bool
) -> None:
    monkeypatch.setattr(ReferenceBackend, "is_exact", is_exact)
    monkeypatch.setattr(ReferenceBackend, "mixed_step_parts", 8)
    config = EngineConfig.from_kwargs(
        model_path=str(folder), load_format="dummy", device="reference", context_length=512, max_total_tokens=512
    )
    built = build_engine(config, folder)
    built.close()
    assert built.facts.speculative_algorithm == ("NGRAM" if is_exact else None)
    assert (built.core._pace is not None) == is_exact
    assert built.core._scheduler.mixed_prefill_tokens == ReferenceBackend.default_chunked_prefill_size // 8


ONE_DEVICE = """
import sys
from pathlib import Path
from mooli.config import EngineConfig
from mooli.engine.build import build_engine
config = EngineConfig.from_kwargs(model_path=sys.argv[1], load_format="dummy", device="cpu", max_total_tokens=512)
build_engine(config, Path(sys.argv[1])).close()
print(sorted({"mooli.engine.ranks", "mooli.engine.rank_process", "mooli.backends.parallel"} & set(sys.modules)))
"""


@pytest.mark.slow
def test_an_engine_on_one_device_imports_nothing_that_only_ranks_need(folder: Path) -> None:
    result = subprocess.run([sys.executable, "-c", ONE_DEVICE, str(folder)], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def planned_and_built(path: Path, monkeypatch: pytest.MonkeyPatch, device: str, **settings: Any) -> EngineFacts:
    """The facts of an engine that finds 6 GiB, after comparing all that the plan for 6 GiB says."""
    require(device)
    backend_class = type(create_backend(device, dtype="float32"))
    monkeypatch.setattr(backend_class, "memory", lambda backend: MemoryInfo(8 * GIB, 6 * GIB))
    load_format = "auto" if path.is_file() else "dummy"
    built = build_engine(
        EngineConfig.from_kwargs(model_path=str(path), load_format=load_format, device=device, **settings), path
    )
    built.close()
    facts = built.facts
    model_config, types = read_model(str(path))
    plan = plan_memory(model_config, 6 * GIB, device=device, stored_types=types, **settings)
    for planned, actual in (
        (plan.weight_bytes, facts.weight_bytes),
        (plan.page_size, facts.page_size),
        (plan.num_tokens, facts.max_total_num_tokens),
        (plan.kv_cache_bytes, facts.kv_cache_bytes),
        (plan.kv_cache_dtype, facts.kv_cache_dtype),
        (plan.context_length, facts.context_length),
    ):
        assert planned == actual
    return facts


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"quantization": "int4"}, {"dtype": "bfloat16"}], ids=str)
def test_a_plan_for_the_demo_model_says_what_its_engine_has(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    path = demo_path()
    if path is None:
        pytest.skip("the demo model is not installed")
    assert planned_and_built(path, monkeypatch, "cpu", **settings).weight_bytes > 2**20


@pytest.mark.slow
@pytest.mark.parametrize("is_tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "settings",
    [
        {"device": "cpu"},
        {"device": "cpu", "dtype": "float32", "kv_cache_dtype": "int8"},
        {"device": "cpu", "quantization": "int8", "context_length": 900},
        {"device": "torch"},
        {"device": "torch", "dtype": "bfloat16", "quantization": "int8"},
    ],
    ids=str,
)
def test_a_plan_says_what_an_engine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], stored: str, is_tied: bool
) -> None:
    config = SMALL | {"torch_dtype": stored, "tie_word_embeddings": is_tied, "attention_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    planned_and_built(tmp_path, monkeypatch, **settings)


RECURRENT = {
    "architectures": ["Lfm2ForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "layer_types": ["conv", "full_attention", "conv"],
    "eos_token_id": 127,
}


def test_an_engine_of_recurrent_layers_goes_on_from_its_own_answers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RECURRENT))
    settings: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "num_threads": 1}
    settings |= {"max_total_tokens": 1024, "random_seed": 3}
    prompt = [(7 * i + 3) % 120 for i in range(70)]
    sampling = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    with Engine(model_path=str(tmp_path), **settings) as engine:
        facts = engine.get_server_info()
        assert facts["state_bytes"] == 2 * 4 * 2 * 64 and facts["num_state_slots"] > facts["max_running_requests"]
        first = engine.generate(input_ids=prompt, sampling_params=sampling)
        again = engine.generate(input_ids=prompt, sampling_params=sampling)
        longer = [*prompt, *first["output_ids"], 5, 6]
        second = engine.generate(input_ids=longer, sampling_params=sampling)
        assert engine.flush_cache()
        cold = engine.generate(input_ids=longer, sampling_params=sampling)
    assert again["output_ids"] == first["output_ids"]
    assert again["meta_info"]["cached_tokens"] == 64, "as far as its last whole page"
    assert second["meta_info"]["cached_tokens"] == 81, "all that was computed"
    assert (cold["meta_info"]["cached_tokens"], cold["output_ids"]) == (0, second["output_ids"])


@pytest.mark.parametrize(("device", "page_size"), [("torch", 16), ("ascend", 128)])
def test_what_a_device_has_lost_comes_back_out_of_the_hosts_memory_and_then_from_disk(
    device: str, page_size: int, folder: Path, tmp_path: Path
) -> None:
    require(device)
    numbers = random.Random(3)
    first, second = ([numbers.randrange(320) for _ in range(2 * page_size + 5)] for _ in range(2))
    arguments: dict[str, Any] = {
        "model_path": str(folder),
        "device": device,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_total_tokens": 3 * page_size,
        "context_length": 3 * page_size,
        "enable_hierarchical_cache": True,
        "kv_cache_dir": str(tmp_path / "kv"),
        "kv_cache_min_free_bytes": 0,
    }

    def asked(engine: Engine, ids: list[int]) -> tuple[list[int], dict[str, Any], str]:
        params = {"max_new_tokens": 4, "temperature": 0}
        answer: Any = engine.generate(input_ids=ids, sampling_params=params, return_cache_report=True)
        meta = answer["meta_info"]
        return answer["output_ids"], meta["cached_tokens_details"], meta["cache_report"]["reason"]

    with ExitStack() as stack:
        if device == "ascend":
            stack.enter_context(simulated_npu())
        with Engine(**arguments) as engine:
            cold, details, _ = asked(engine, first)
            assert details == {"device": 0, "host": 0}
            asked(engine, second)
            again, details, reason = asked(engine, first)
            assert again == cold and reason == "new" and details == {"device": 0, "host": 2 * page_size}
        with Engine(**arguments) as engine:
            again, details, _ = asked(engine, first)
            assert again == cold and details["storage"] == 2 * page_size and details["host"] == 0


def test_what_recurrent_layers_cannot_do_is_refused_by_name(tmp_path: Path, folder: Path) -> None:
    recurrent = tmp_path / "recurrent"
    recurrent.mkdir()
    (recurrent / "config.json").write_text(json.dumps(RECURRENT))
    config, _ = read_model(str(recurrent))
    with pytest.raises(ConfigError, match="layers of lfm2 keep a recurrent state"):
        plan_memory(config, 4 * GIB, tp=2)
    plan = plan_memory(config, 4 * GIB)
    assert plan.state_bytes == 1024 and plan.num_states > 48
    assert "states" in plan_table(plan) and "states" not in plan_table(plan_memory(read_model(str(folder))[0], 4 * GIB))
    settings = {"load_format": "dummy", "device": "cpu", "num_threads": 1, "state_cache_fraction": 0.3}
    with pytest.raises(ConfigError, match=r"state_cache_fraction=0.3 is of no use"):
        build_engine(EngineConfig.from_kwargs(model_path=str(folder), **settings), folder)
