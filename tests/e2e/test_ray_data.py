"""A model over the rows of a Ray dataset, and Ray's own HTTP processor at a server."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_data_job import BAD_ROWS, ENGINE, GREEDY, NUM_ROWS, SAMPLED, conversation_of, rows
from server_process import ServerProcess, needs_demo, needs_proc, wait_until

from mooli import Engine

pytestmark = [
    needs_demo,
    needs_proc,
    pytest.mark.whole_machine,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]

LIMIT_S = 500


def session_of(pid: int) -> set[int]:
    """Processes that are there, of the session that `pid` has begun or had begun."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == pid and (entry / "cmdline").read_bytes():
                    found.add(int(entry.name))
            except OSError:
                continue
    return found


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, Any]]:
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # Ray's socket paths leave little room for a longer name
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",  # else a token is written into the home folder
        "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE": "1",  # where /dev/shm is smaller still
        "TMPDIR": str(folder),
    }
    script = Path(__file__).with_name("ray_data_job.py")
    try:
        with ServerProcess("--num-threads", "1") as server, open(folder / "log", "w+b") as log:
            command = [sys.executable, str(script), str(folder), server.url]
            job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True)
            try:
                out, _ = job.communicate(timeout=LIMIT_S)
                log.seek(0)
                assert job.returncode == 0, log.read().decode(errors="replace")[-8000:]
                wait_until(lambda: not session_of(job.pid), "all processes of Ray have ended")
            finally:
                for pid in session_of(job.pid):
                    os.kill(pid, signal.SIGKILL)
                job.wait()
        yield json.loads(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(model_path="demo", max_total_tokens=4096, num_threads=1) as started:
        yield started


def test_each_row_keeps_its_columns_and_gets_an_answer_or_what_is_wrong_with_it(results):
    found = results["one actor"]
    assert [{name: row[name] for name in ("id", "question")} for row in found] == rows()
    bad = {*BAD_ROWS, 5}
    assert {row["id"] for row in found if row["error"] is not None} == bad
    for row in found:
        told = [row[name] for name in ("generated_text", "finish_reason", "prompt_tokens", "completion_tokens")]
        if row["id"] in bad:
            assert told == [None] * 4
        else:
            assert told[1] == "length" and told[3] == SAMPLED["max_new_tokens"] and told[0] and told[2] > 20
    words = {row["id"]: row["error"] for row in found}
    assert "max_new_tokens" in words[3] and "n=2" in words[4] and "None" in words[5]


def test_rows_of_a_block_are_computed_in_the_order_of_their_prompts(results):
    """Of the three heads each is computed once, though no two rows with one head stand side by side."""
    found = [row for row in results["one actor"] if row["error"] is None]
    not_cached = sum(row["prompt_tokens"] - row["cached_tokens"] for row in found)
    heads = 3 * max(row["prompt_tokens"] for row in found)
    assert not_cached < heads + 16 * len(found)


def test_an_answer_depends_on_no_other_row_block_or_actor(results):
    one, two = ([(row["id"], row["generated_text"]) for row in results[name]] for name in ("one actor", "two actors"))
    assert one == two and len(one) == NUM_ROWS
    assert len({text for _, text in one if text is not None}) > 1  # sampled


def test_conversations_are_answered_as_an_engine_answers_them(results, engine):
    assert ENGINE["random_seed"] == 5
    said = [conversation_of({"id": i}) for i in range(2)]
    said[0] = [{"role": "system", "content": "Be brief.", "name": "x"}, *said[0]]
    expected = [engine.chat(messages, GREEDY)["text"] for messages in said]
    assert [(row["generated_text"], row["error"]) for row in results["conversations"]] == [(e, None) for e in expected]


def test_a_second_run_adds_the_rows_that_a_checkpoint_does_not_have(results):
    found = results["two runs"]
    assert sorted(row["id"] for row in found) == list(range(6))
    assert all(row["generated_text"] and row["error"] is None for row in found)


def test_rays_http_processor_gets_the_answers_and_errors_of_a_server(results, engine):
    first, *others = results["over http"]
    assert first["text"] is None and "messages" in first["error"]
    expected = [engine.chat(conversation_of(row), GREEDY)["message"]["content"] for row in others]
    assert [(row["text"], row["error"]) for row in others] == [(text, None) for text in expected]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("both", "not both"),
        ("neither", "prompt="),
        ("samples", "n=2"),
        ("actors", "concurrency=0"),
        ("argument", "no_such_argument"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_before_anything_runs(results, name, words):
    assert words in results[name]
