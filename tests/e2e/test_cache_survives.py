"""What a server has computed is there after its end: SIGTERM, kill -9, or with a second server beside it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from server_process import ServerProcess, needs_demo, needs_proc, wait_until

pytestmark = [needs_demo, needs_proc]

HISTORY = " ".join(f"Line {number}: the {number * 37 % 101}th radish grew." for number in range(40))


def flags(folder: Path) -> tuple[str, ...]:
    return ("--kv-cache-dir", str(folder), "--kv-cache-min-free-bytes", "0")


def asked(server: ServerProcess, text: str = HISTORY, **fields: Any) -> tuple[str, int, int]:
    """The answer, and of its prompt the tokens that came from disk, and that had to be computed."""
    answer = server.generate(text, **fields)
    meta = answer["meta_info"]
    stored = meta["cached_tokens_details"].get("storage", 0)
    return answer["text"], stored, meta["prompt_tokens"] - meta["cached_tokens"]


def metric(server: ServerProcess, name: str) -> float:
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"sglang:{name}"))


def num_pages(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.pages"))


def test_a_server_that_was_killed_finds_its_conversations_again(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    with ServerProcess(*flags(folder)) as server:
        cold, stored, computed = asked(server)
        assert stored == 0 and computed > 400
        private = "Nobody shall know. " + HISTORY
        asked(server, private, no_store=True)
        wait_until(lambda: metric(server, "backuped_tokens") >= (computed - 32) // 32 * 32, "its pages are written")
        before = num_pages(folder)
        os.kill(server.engine_pid, signal.SIGKILL)
        server.signal(signal.SIGKILL)
    assert before > 0

    with ServerProcess(*flags(folder)) as server:
        again, stored, left = asked(server)
        assert again == cold and stored >= computed - 2 * 32 and left == computed - stored
        assert metric(server, "prefetched_tokens") == stored
        assert asked(server, private)[1] == 0, "what was to be forgotten is not there"
        with ServerProcess(*flags(folder)) as second:  # which reads what the other has finished
            assert asked(second)[0] == cold
            second.signal(signal.SIGTERM)
            assert second.exit_status() == 0
        continued, _, _ = asked(server, HISTORY + again + " And then")
        server.signal(signal.SIGTERM)
        assert server.exit_status() == 0

    with ServerProcess(*flags(folder)) as server:
        same, stored, left = asked(server, HISTORY + again + " And then")
        assert same == continued and stored > 400 and left <= 2 * 32


def test_a_folder_that_cannot_be_used_is_said_at_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    folder.mkdir()
    folder.chmod(0o777)
    server = ServerProcess(*flags(folder))
    try:
        assert server.exit_status() == 2
        assert "others can write" in server.log
    finally:
        server.end()


def test_a_header_keeps_a_prompt_off_the_disk(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    with ServerProcess(*flags(folder)) as server:
        body = {"model": "m", "prompt": HISTORY, "max_tokens": 4}
        answer = server.http.post("/v1/completions", json=body, headers={"Cache-Control": "max-age=0, No-Store"})
        assert answer.status_code == 200
        server.signal(signal.SIGTERM)
        assert server.exit_status() == 0
    assert num_pages(folder) == 0
