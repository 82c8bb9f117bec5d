"""What of a server's conversations is there again after its end, and how soon. Starts servers and prints a table.

Fills a server with conversations, ends it by SIGTERM and by kill -9, and starts it again each time: how long it takes
to be ready (against a server without a disk, in turns), the first token of a long conversation that is loaded (against
the same computed), and how many tokens were found again.

    python benchmarks/restart.py [--model FILE] [--tokens 200000] [--prompt 20000] [--others 4000]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loaded import compared_model

START_LIMIT_S = 600.0


class Server:
    """ready_s: from the start of the process to its first healthy answer."""

    def __init__(self, model: str, flags: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        started_s = time.perf_counter()
        command = [sys.executable, "-m", "mooli.launch_server", "--model-path", model, "--port", str(port), *flags]
        command += ["--log-level", "warning", "--skip-server-warmup"]
        self.process = subprocess.Popen(command, start_new_session=True)
        while True:
            if self.process.poll() is not None:
                raise SystemExit("the server has ended")
            try:
                urllib.request.urlopen(f"{self.url}/health").read()
                break
            except OSError:
                if time.perf_counter() - started_s > START_LIMIT_S:
                    raise SystemExit("the server does not become ready") from None
                time.sleep(0.01)
        self.ready_s = time.perf_counter() - started_s

    def first_token(self, ids: list[int]) -> tuple[float, int, int]:
        """Seconds, and of the prompt the tokens that came from disk and from memory."""
        body = {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}}
        request = urllib.request.Request(
            f"{self.url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        started_s = time.perf_counter()
        answer: dict[str, Any] = json.load(urllib.request.urlopen(request))
        seconds = time.perf_counter() - started_s
        details = answer["meta_info"]["cached_tokens_details"]
        return seconds, details.get("storage", 0), details["device"]

    def metric(self, name: str) -> float:
        text = urllib.request.urlopen(f"{self.url}/metrics").read().decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"sglang:{name}"))

    def end(self, number: int) -> None:
        """SIGTERM to the server, or SIGKILL to all its processes at once."""
        if number == signal.SIGKILL:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        self.process.wait()


@contextmanager
def running(model: str, flags: list[str]) -> Iterator[Server]:
    server = Server(model, flags)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)


def readiness(model: str, *kinds: list[str], count: int = 7) -> list[float]:
    """The median of some starts with each kind of flags, in turns: what a disk is busy with delays them all."""
    times: list[list[float]] = [[] for _ in kinds]
    for _ in range(count):
        for flags, found in zip(kinds, times, strict=True):
            with running(model, flags) as server:
                found.append(server.ready_s)
                server.end(signal.SIGTERM)
    return [statistics.median(found) for found in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: Qwen2.5-Coder-0.5B of benchmarks/fetch_models.py")
    parser.add_argument("--tokens", type=int, default=200_000, help="of all conversations")
    parser.add_argument("--prompt", type=int, default=20_000, help="of the conversations that are timed, two")
    parser.add_argument("--others", type=int, default=4_000, help="of each of the others")
    parser.add_argument("--folder", help="where the cache lies meanwhile; default: beside temporary files")
    args = parser.parse_args()
    model = args.model or str(compared_model())
    draw = random.Random(1)
    num_others = max(0, args.tokens - 2 * args.prompt) // args.others
    most = 100_000 if "qwen" in model else 40_000
    lengths = [args.prompt] * 2 + [args.others] * num_others
    prompts = [[draw.randrange(1000, most) for _ in range(length)] for length in lengths]
    folder = Path(tempfile.mkdtemp(prefix="mooli-restart-", dir=args.folder))
    flags = ["--max-total-tokens", str(sum(lengths) + 64 * len(lengths) + 1024)]
    stored = [*flags, "--kv-cache-dir", str(folder / "kv"), "--kv-cache-max-bytes", "32gi"]
    stored += ["--kv-cache-min-free-bytes", "0"]
    plain = [*flags, "--kv-cache-dir", "none"]
    try:
        with running(model, stored) as server:
            cold_s = statistics.median([server.first_token(ids)[0] for ids in prompts][:2])
            print(f"first token, computed    {cold_s:8.2f} s  of {args.prompt} tokens")
            print(f"{sum(lengths)} tokens in {len(lengths)} conversations", flush=True)
            while server.metric("backuped_tokens") < sum(length // 32 * 32 for length in lengths):
                time.sleep(0.1)
            server.end(signal.SIGKILL)
        for words in ("kill -9", "SIGTERM"):  # the first of these servers ended so, and this one ends so
            with running(model, stored) as server:
                first_ready_s = server.ready_s
                first_s, from_disk, _ = server.first_token(prompts[0])
                found = from_disk + sum(server.first_token(ids)[1] for ids in prompts[1:])
                server.end(signal.SIGTERM)
            without_s, ready_s = readiness(model, plain, stored)
            print(f"after {words}:")
            print(f"  ready without a disk   {without_s:8.2f} s")
            print(f"  ready                  {ready_s:8.2f} s  ({ready_s - without_s:+.2f} s; at most +0.20)")
            print(f"  ready, the first time  {first_ready_s:8.2f} s  ({first_ready_s - without_s:+.2f} s)")
            print(f"  first token, from disk {first_s:8.2f} s  ({cold_s / first_s:.0f} times sooner; at least 20)")
            print(f"  found again            {100 * found / sum(lengths):8.1f} %  (at least 95)", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
