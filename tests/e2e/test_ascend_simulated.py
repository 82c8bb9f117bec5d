"""The guide's Engine cell and server command on a simulated NPU, and the 7B model's configuration cut to one layer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from server_process import ServerProcess, needs_demo

from mooli import Engine
from mooli.errors import BackendUnavailableError

TINY: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}

QWEN_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_window_layers": 28,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
"""config.json of Qwen2.5-7B-Instruct."""

PROMPTS = [[5, 6, 7, 8] * 40, [9, 10, 11], [5, 6, 7, 8] * 39 + [1, 2, 3]]
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(autouse=True)
def _simulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOOLI_SIMULATE_ASCEND", "1")
    monkeypatch.setenv("MOOLI_SELFTEST", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def folder(path: Path, config: dict[str, Any]) -> str:
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def make(path: str, **settings: Any) -> Engine:
    # The guide's cell; the rest is for a model without weights and without a tokenizer.
    return Engine(
        model_path=path, tp_size=1, trust_remote_code=True, load_format="dummy", skip_tokenizer_init=True,
        random_seed=4, max_total_tokens=1024, **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("profile", "cached"), [("8.2", [128, 0, 128]), ("8.5", [159, 2, 158])], ids=lambda value: str(value)
)
def test_the_guides_engine_answers_warm_as_cold_and_as_the_reference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, profile: str, cached: list[int]
) -> None:
    monkeypatch.setenv("MOOLI_SIMULATE_ASCEND", profile)
    path = folder(tmp_path, TINY)
    with make(path, backend="reference") as engine:
        expected = [answer["output_ids"] for answer in engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)]
    with make(path, backend="ascend", dtype="float16") as engine:
        cold = engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)
        warm = engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)
        described = engine.get_server_info()["backend"]
    assert [answer["output_ids"] for answer in cold] == expected
    assert [answer["output_ids"] for answer in warm] == expected
    assert [answer["meta_info"]["cached_tokens"] for answer in warm] == cached
    assert described["library"].startswith(f"SIMULATED Ascend910B3, CANN {profile}")


def test_device_npu_with_attention_backend_ascend_is_the_same(tmp_path: Path) -> None:
    with make(folder(tmp_path, TINY), device="npu", attention_backend="ascend", page_size=128) as engine:
        info = engine.get_server_info()
    assert (info["backend"]["backend"], info["page_size"]) == ("ascend", 128)


def test_an_answer_that_overflows_ends_with_an_error_that_names_the_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with make(folder(tmp_path, TINY), backend="ascend", dtype="float16") as engine:
        sound = engine.generate(input_ids=PROMPTS[:2], sampling_params=GREEDY)
        norm = torch.ops.npu.npu_rms_norm
        monkeypatch.setattr(torch.ops.npu, "npu_rms_norm", lambda *args: [norm(*args)[0] * 60000])
        broken = engine.generate(input_ids=[[50, 51], [60, 61]], sampling_params={**GREEDY, "max_new_tokens": 1})
        monkeypatch.undo()
        again = engine.generate(input_ids=PROMPTS[:2], sampling_params=GREEDY)
    for answer in broken:
        reason = answer["meta_info"]["finish_reason"]
        assert reason["type"] == "error"
        assert "computed in float16" in reason["message"]
    assert [answer["output_ids"] for answer in again] == [answer["output_ids"] for answer in sound]


def test_without_the_switch_there_is_no_simulation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOOLI_SIMULATE_ASCEND", "0")
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(BackendUnavailableError, match="torch_npu"):
        make(folder(tmp_path, TINY), backend="ascend")


SEVEN_B = """
import json, sys
from mooli import Engine
with Engine(
    model_path=sys.argv[1], load_format="dummy", skip_tokenizer_init=True, json_model_override_args=sys.argv[2],
    tp_size=1, trust_remote_code=True, backend="ascend", dtype="float16", max_total_tokens=512, random_seed=1,
    max_running_requests=2, context_length=512,
) as engine:
    ids, params = [list(range(1000, 1140))], {"temperature": 0, "max_new_tokens": 3}
    answers = [engine.generate(input_ids=ids, sampling_params=params)[0] for _ in range(2)]
    print(json.dumps([[a["output_ids"], a["meta_info"]["cached_tokens"]] for a in answers]))
"""


@pytest.mark.parametrize(
    "cut",
    [
        {"num_hidden_layers": 1, "vocab_size": 8192, "bos_token_id": 1, "eos_token_id": 2},
        pytest.param(
            {"num_hidden_layers": 1},
            marks=pytest.mark.skipif("MOOLI_TEST_7B" not in os.environ, reason="4 GiB and a minute: MOOLI_TEST_7B=1"),
        ),
    ],
    ids=["vocabulary cut too", "whole vocabulary"],
)
def test_the_7b_models_configuration_runs_with_the_guides_flags(tmp_path: Path, cut: dict[str, int]) -> None:
    # In a process of its own, whose memory is given back.
    command = [sys.executable, "-c", SEVEN_B, folder(tmp_path, QWEN_7B), json.dumps(cut)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    (cold, _), (warm, cached) = json.loads(result.stdout)
    assert len(cold) == 3
    assert warm == cold
    assert cached == 128


@needs_demo
def test_the_guides_server_command_starts_simulated() -> None:
    with ServerProcess("--backend", "ascend", "--dtype", "bfloat16", "--trust-remote-code") as server:
        text = "Once upon a time, " * 40
        first, second = (server.generate(text, max_new_tokens=2) for _ in range(2))
        assert first["text"] == second["text"]
        assert second["meta_info"]["cached_tokens"] >= 128
        assert "SIMULATED Ascend910B3, CANN 8.2" in server.log
