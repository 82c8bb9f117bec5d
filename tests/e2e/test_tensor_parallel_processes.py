"""Engines and servers on several processes: the same answers as on one, and no process left behind by any death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from server_process import ServerProcess, needs_proc, wait_until

import mooli.engine.ranks as ranks_module
from mooli import Engine
from mooli.errors import CheckpointError, ConfigError, EngineDeadError

pytestmark = needs_proc

TINY: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 121,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}
PROMPTS = [[5, 6, 7, 8] * 40, [9, 10, 11], [5, 6, 7, 8] * 39 + [1, 2, 3]]
GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
LONG = {"temperature": 0, "max_new_tokens": 3000, "ignore_eos": True}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return str(tmp_path)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is logged of planted faults is not worth showing; and two processors are enough work for one rank."""
    caplog.set_level("CRITICAL", logger="mooli")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def make(folder: str, **settings: Any) -> Engine:
    defaults: dict[str, Any] = {"device": "torch", "dtype": "float32", "max_total_tokens": 4096}
    return Engine(
        model_path=folder, load_format="dummy", skip_tokenizer_init=True, random_seed=4, log_level="critical",
        **{**defaults, **settings},
    )  # fmt: skip


def answers(engine: Engine) -> list[list[int]]:
    return [answer["output_ids"] for answer in engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)]


def stored(engine: Engine) -> int:
    """Tokens that have come from disk."""
    return int(engine.get_server_info()["internal_states"][0]["loaded_tokens"])


def read(path: Path) -> bytes:
    """Of /proc; nothing where the process or the thread has just ended."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def ranks_below(pid: int) -> list[int]:
    """Ids of the rank processes among the children of a process, by /proc alone."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, read(task / "children").split()):
            if b"mooli.engine.rank_process" in read(Path(f"/proc/{child}/cmdline")):
                found.append(child)
    return found


def is_running(pid: int) -> bool:
    state = read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()
    return bool(state) and state[0] != b"Z"


def test_two_processes_answer_as_one_until_one_is_killed_which_ends_the_engine(folder: str) -> None:
    with make(folder) as engine:
        expected = answers(engine)
    kept = {"kv_cache_dir": f"{folder}/kv", "kv_cache_min_free_bytes": 0}
    with make(folder, tp_size=2, **kept) as engine:
        assert answers(engine) == expected
        assert answers(engine) == expected  # warm
        assert stored(engine) == 0
    with make(folder, tp_size=2, **kept) as engine:
        assert answers(engine) == expected
        assert stored(engine) == 144, "of both ranks, from disk: the whole pages of the first prompt"
        info = engine.get_server_info()
        assert (info["tp_size"], info["backend"]["transport"]) == (2, "gloo")
        (rank,) = ranks_below(os.getpid())
        streams = [engine.generate(input_ids=prompt, sampling_params=LONG, stream=True) for prompt in PROMPTS]
        for stream in streams:
            next(stream)
        os.kill(rank, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineDeadError, match=r"rank 1 of 2 was killed by signal 9 \(SIGKILL\)"):
                for _ in stream:
                    pass
        with pytest.raises(EngineDeadError, match="rank 1 of 2"):
            engine.generate(input_ids=PROMPTS[1], sampling_params=GREEDY)
    assert ranks_below(os.getpid()) == []


BREAKS = """
import mooli.engine.rank_process as rank
{fault}
rank.main()
"""
BAD_MODEL = """
from mooli.errors import CheckpointError
def open_model(*args, **kwargs): raise CheckpointError("the weights are torn")
rank.open_model = open_model
"""
BAD_STEP = """
from mooli.runner.model_runner import ModelRunner
plain, steps = ModelRunner.execute, []
def execute(self, batch):
    steps.append(batch)
    if len(steps) == 5: raise ValueError("planted in a step")
    return plain(self, batch)
ModelRunner.execute = execute
"""


def test_a_rank_that_cannot_load_the_model_says_why(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "COMMAND", (sys.executable, "-c", BREAKS.format(fault=BAD_MODEL)))
    with pytest.raises(CheckpointError, match="rank 1 of 2 failed: the weights are torn"):
        make(folder, tp_size=2)
    assert ranks_below(os.getpid()) == []


def test_an_error_in_a_step_of_a_rank_ends_the_engine_with_its_text(
    folder: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks_module, "COMMAND", (sys.executable, "-c", BREAKS.format(fault=BAD_STEP)))
    cause = "rank 1 of 2 failed: ValueError: planted in a step"
    with make(folder, tp_size=2) as engine, pytest.raises(EngineDeadError, match=cause):
        engine.generate(input_ids=PROMPTS[1], sampling_params=LONG)


def test_a_number_of_ranks_that_does_not_fit_starts_no_process(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "COMMAND", ("this is not a program",))
    with pytest.raises(ConfigError, match=r"tp_size=3 .*Possible: tp_size=1, 2, 4"):
        make(folder, tp_size=3)


DIES = """
import os, sys
from mooli import Engine
engine = Engine(
    model_path=sys.argv[1], load_format="dummy", skip_tokenizer_init=True, device="torch", tp_size=2,
    max_total_tokens=4096, log_level="critical",
)
stream = engine.generate(input_ids=[5, 6, 7], sampling_params={"max_new_tokens": 3000, "ignore_eos": True}, stream=True)
next(stream)
print("computing", flush=True)
for _ in stream: pass
"""


def test_no_rank_outlives_an_engine_that_is_killed_in_a_step(folder: str) -> None:
    with subprocess.Popen([sys.executable, "-c", DIES, folder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "computing\n"
        (rank,) = ranks_below(process.pid)
        folder_to_meet_in = Path(Path(f"/proc/{rank}/cmdline").read_bytes().split(b"\0")[-2].decode())
        assert folder_to_meet_in.is_dir()
        process.kill()
    wait_until(lambda: not is_running(rank), "the rank has ended")
    assert not folder_to_meet_in.exists()


def test_the_place_where_ranks_meet_stays_until_all_have_left_their_group(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch opens the file there once more when rank 0 leaves, and aborts the process if it goes at that moment."""
    seen = []

    def close(ranks: ranks_module.Ranks) -> None:
        wait_until(lambda: not is_running(rank), "the rank has ended")
        seen.append(ranks.store.parent.is_dir())
        plain_close(ranks)
        seen.append(ranks.store.parent.is_dir())

    plain_close = ranks_module.Ranks.close
    monkeypatch.setattr(ranks_module.Ranks, "close", close)
    with make(folder, tp_size=2):
        (rank,) = ranks_below(os.getpid())
    assert seen == [True, False]


def test_simulated_npus_answer_together_as_one_and_as_the_reference(
    folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with make(folder, device="reference", dtype="auto") as engine:
        expected = answers(engine)
    monkeypatch.setenv("MOOLI_SIMULATE_ASCEND", "1")
    monkeypatch.setenv("MOOLI_SELFTEST", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with make(folder, device="npu", dtype="float16", tp_size=2) as engine:
        assert [answers(engine), answers(engine)] == [expected, expected]
        described = engine.get_server_info()["backend"]
    assert (described["simulated"], described["graphs"], described["tp_size"]) == (True, "off", 2)


def server(folder: str) -> ServerProcess:
    flags = "--load-format dummy --skip-tokenizer-init --device torch --dtype float32 --tp 2 --random-seed 4"
    return ServerProcess(*flags.split(), model=folder)


def ask(running: ServerProcess, **params: Any) -> Any:
    body = {"input_ids": PROMPTS[1], "sampling_params": {**GREEDY, **params}}
    return running.http.post("/generate", json=body)


def test_a_server_of_two_processes_drains_on_sigterm(folder: str) -> None:
    with make(folder) as engine:
        expected = answers(engine)[1]
    with server(folder) as running:
        assert ask(running).json()["output_ids"] == expected
        (rank,) = ranks_below(running.engine_pid)
        running.signal(signal.SIGTERM)
        assert running.exit_status() == 0, running.log
        assert not is_running(rank)


def test_a_server_whose_rank_is_killed_while_it_waits_ends_with_the_cause(folder: str) -> None:
    with server(folder) as running:
        assert ask(running).status_code == 200
        (rank,) = ranks_below(running.engine_pid)
        os.kill(rank, signal.SIGKILL)
        assert running.exit_status() != 0
        assert "rank 1 of 2 was killed by signal 9 (SIGKILL)" in running.log
        assert "does not end" not in running.log
