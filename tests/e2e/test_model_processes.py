"""Several models of one server, as users start it: each in an engine process of its own, ended when nobody uses it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from server_process import ServerProcess, needs_demo, needs_proc, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.whole_machine, needs_demo, needs_proc]


def engines_of(server: ServerProcess) -> set[int]:
    """Child processes that are not over."""
    pid = server.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child) for child in children if not is_over(child)}


def is_over(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # it was there a moment ago
        return True


def ask(server: ServerProcess, model: str) -> str:
    answer = server.http.post(
        "/v1/completions",
        json={"model": model, "prompt": "The capital of France is", "max_tokens": 6, "temperature": 0},
    )
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_each_model_is_a_process_whose_end_the_others_never_notice() -> None:
    with ServerProcess("--models", "first=demo,second=demo", "--model-idle-timeout", "0", model=None) as server:
        assert not engines_of(server)
        text = ask(server, "first")
        (first,) = engines_of(server)
        assert ask(server, "second") == text
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: first not in engines_of(server), "the killed engine is gone")
        assert ask(server, "second") == ask(server, "first") == text
        engines = engines_of(server)
        assert len(engines) == 2
        server.signal(signal.SIGTERM)
        assert server.exit_status() == 0
        assert not [pid for pid in engines if Path(f"/proc/{pid}").exists()]


def test_a_model_that_nobody_uses_gives_its_memory_back() -> None:
    with ServerProcess("--models", "first=demo,second=demo", "--model-idle-timeout", "0.5", model=None) as server:
        text = ask(server, "first")
        wait_until(lambda: not engines_of(server), "the process has ended")
        assert server.http.get("/api/ps").json() == {"models": []}
        assert ask(server, "first") == text
