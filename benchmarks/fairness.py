"""Whether one user's load holds up another's answers. Starts a server with a real model and prints two comparisons.

1. Gaps between the tokens of four streams, alone and while others send 4,000-token prompts without a pause.
2. Time to the first token of cold requests in a flood of requests that hit the cache, by policy.

    python benchmarks/fairness.py [--model demo] [--seconds 20]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import contextmanager
from typing import Any

import aiohttp
import numpy as np


@contextmanager
def server(model: str, *flags: str) -> Any:
    """A running server; its base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mooli.launch_server", "--model-path", model, "--port", str(port), *flags]
    process = subprocess.Popen([*command, "--kv-cache-dir", "none", "--log-level", "warning"])
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit("the server has ended")
            try:
                urllib.request.urlopen(f"{url}/health").read()
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


async def stream(session: aiohttp.ClientSession, url: str, ids: list[int], num_tokens: int) -> AsyncIterator[float]:
    """The time at which each new token came, in seconds."""
    body = {
        "input_ids": ids,
        "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True},
    }
    seen = 0
    async with session.post(f"{url}/generate", json=body) as response:
        if response.status != 200:
            raise SystemExit(await response.text())
        async for line in response.content:
            if line.startswith(b"data: {"):
                count = json.loads(line[6:])["meta_info"]["completion_tokens"]
                for _ in range(count - seen):
                    yield time.perf_counter()
                seen = count


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(1000, 20000) for _ in range(length)]


async def gaps_of_streams(url: str, seconds: float, num_long: int) -> tuple[list[float], int]:
    """Gaps between tokens of four streams in ms, beside `num_long` senders of 4,000-token prompts; and how many such
    prompts were answered."""
    rng = random.Random(1)
    end = time.perf_counter() + seconds
    gaps: list[float] = []
    answered = 0

    async def streaming() -> None:
        while time.perf_counter() < end:
            last = None
            async for moment in stream(session, url, prompt(rng, 64), 200):
                if last is not None:
                    gaps.append((moment - last) * 1000)
                last = moment
                if moment > end:
                    return

    async def sending() -> None:
        nonlocal answered
        while time.perf_counter() < end:
            async for _ in stream(session, url, prompt(rng, 4000), 1):
                answered += 1

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        tasks = [asyncio.ensure_future(streaming()) for _ in range(4)]
        await asyncio.sleep(0.5)
        loads = [asyncio.ensure_future(sending()) for _ in range(num_long)]
        await asyncio.gather(*tasks)
        for load in loads:
            load.cancel()
        await asyncio.gather(*loads, return_exceptions=True)
    return gaps, answered


async def first_tokens_in_flood(url: str, seconds: float) -> tuple[list[float], list[float], float]:
    """Times to the first token in ms of cold requests and of hits, and the share of prompt tokens that hit."""
    rng = random.Random(2)
    shared = prompt(rng, 1000)
    end = time.perf_counter() + seconds
    cold: list[float] = []
    warm: list[float] = []

    async def one(ids: list[int], into: list[float]) -> None:
        began = time.perf_counter()
        first = None
        async for moment in stream(session, url, ids, 8):
            first = first or moment
        if first is not None:
            into.append((first - began) * 1000)

    async def flood() -> None:
        while time.perf_counter() < end:
            await one(shared + prompt(rng, 20), warm)

    async def trickle() -> None:
        while time.perf_counter() < end:
            await one(prompt(rng, 600), cold)
            await asyncio.sleep(0.3)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        await one(shared, [])
        await asyncio.gather(*(flood() for _ in range(64)), *(trickle() for _ in range(2)))
        async with session.get(f"{url}/server_info") as response:
            counters = (await response.json())["internal_states"][0]
    return cold, warm, counters["cached_tokens"] / counters["prompt_tokens"]


def words(values: list[float]) -> str:
    if not values:
        return "nothing came"
    median, p99 = np.percentile(values, [50, 99])
    return f"median {median:.0f} ms, p99 {p99:.0f} ms, longest {max(values):.0f} ms ({len(values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args()
    run: Callable[[Any], Any] = asyncio.run
    with server(args.model) as url:
        for num_long in (0, 2):
            gaps, answered = run(gaps_of_streams(url, args.seconds, num_long))
            beside = f"beside {answered} prompts of 4,000 tokens" if num_long else "alone"
            print(f"gaps between tokens of 4 streams, {beside}: {words(gaps)}")
    for policy in ("fcfs", "lpm"):
        with server(args.model, "--schedule-policy", policy) as url:
            cold, warm, hit_rate = run(first_tokens_in_flood(url, args.seconds))
            print(
                f"{policy}: hit rate {hit_rate:.1%}; first token of cold requests: {words(cold)};"
                f" of hits: {words(warm)}"
            )


if __name__ == "__main__":
    main()
