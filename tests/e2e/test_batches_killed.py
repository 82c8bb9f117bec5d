"""A server with batches that is killed again and again, on the demo model; and what the command makes of the rows."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from server_process import PATIENCE_S, ServerProcess, needs_demo, needs_proc, wait_until

pytestmark = [needs_demo, needs_proc, pytest.mark.whole_machine]

NUM_KILLS, NUM_ROWS = 3, 14

CHAT = "/v1/chat/completions"

FLAGS = ("--random-seed", "7", "--skip-server-warmup")

HEAD = "You answer in one short sentence and never use a list."


def input_lines() -> bytes:
    rows = []
    for number in range(NUM_ROWS):
        messages = [{"role": "system", "content": HEAD}, {"role": "user", "content": f"What is {number} plus 2?"}]
        body = {"model": "demo", "messages": messages, "max_tokens": 20}
        rows.append({"custom_id": f"row {number}", "method": "POST", "url": CHAT, "body": body})
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def timeless(results: bytes) -> bytes:
    return re.sub(rb'"created":\d+', b'"created":0', results)


def test_a_batch_survives_kills_and_is_what_the_command_makes_of_it(tmp_path: Path) -> None:
    rng = random.Random(3)
    folder = tmp_path / "batches"
    flags = (*FLAGS, "--batch-dir", str(folder), "--max-batch-rows", "2")
    with ServerProcess(*flags) as server, client_of(server) as client:
        sent = client.files.create(file=("in.jsonl", input_lines()), purpose="batch")
        batch_id = client.batches.create(input_file_id=sent.id, endpoint=CHAT, completion_window="24h").id
        kill(server, folder / "batches" / batch_id / "journal", rng.randrange(1, 4))
    for number in range(1, NUM_KILLS):
        with ServerProcess(*flags) as server:
            kill(server, folder / "batches" / batch_id / "journal", rng.randrange(3 * number + 1, 3 * number + 4))
    with ServerProcess(*flags) as server, client_of(server) as client:
        wait_until(lambda: client.batches.retrieve(batch_id).status == "completed", "the batch is done")
        done = client.batches.retrieve(batch_id)
        counts = done.request_counts
        assert (counts.total, counts.completed, counts.failed) == (NUM_ROWS, NUM_ROWS, 0)
        results = client.files.content(done.output_file_id).content
        assert client.files.content(sent.id).content == input_lines()
        assert len(list(client.files.list())) == 2, "no file is there twice"
    assert [json.loads(line)["custom_id"] for line in results.splitlines()] == [f"row {n}" for n in range(NUM_ROWS)]
    assert timeless(results) == timeless(_command_line(tmp_path))


def client_of(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", timeout=PATIENCE_S)


def kill(server: ServerProcess, journal: Path, least: int) -> None:
    """When the journal has so many answers."""
    wait_until(lambda: journal.exists() and journal.read_bytes().count(b"\n") > least, "more rows are answered")
    os.killpg(server.pid, signal.SIGKILL)
    server.process.wait(PATIENCE_S)


def _command_line(folder: Path) -> bytes:
    """The results of `mooli batch`."""
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    source.write_bytes(input_lines())
    command = [sys.executable, "-m", "mooli", "batch", str(source), "-o", str(output), "--model-path", "demo"]
    done = subprocess.run(
        [*command, "--random-seed", "7", "--max-total-tokens", "4096"],
        capture_output=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return output.read_bytes()
