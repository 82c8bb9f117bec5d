"""What a batch costs those who wait for answers: a stream alone, beside a batch, and beside the same rows as requests.

In turns, on one server.

    python benchmarks/batch_neighbour.py [--model demo] [--streams 12] [--turns 2]

A stream has a prompt of its own of some 250 tokens and an answer of 32. The rows, as many at a time as the server takes
of a batch, have prompts of some 150 tokens and answers of 48.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import aiohttp

from mooli.server.launch import READY_LINE

PORT = 31877
URL = f"http://127.0.0.1:{PORT}"

WORDS = ("radish", "castle", "river", "number", "letter", "winter", "garden", "window", "copper", "orange", "silver")


def text(number: int, count: int) -> str:
    """Of its own from its first word on."""
    return f"{number}: " + " ".join(WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(count))


def chat(number: int, words: int, tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": text(number, words)}]
    return {"model": "m", "messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


async def stream(session: aiohttp.ClientSession, number: int) -> tuple[float, list[float]]:
    """Seconds to the first token, and between tokens."""
    started, times = time.perf_counter(), []
    async with session.post(f"{URL}/v1/chat/completions", json={**chat(number, 160, 32), "stream": True}) as answer:
        async for line in answer.content:
            if line.startswith(b"data: {") and b'"content":"' in line:
                times.append(time.perf_counter())
    return times[0] - started, [later - earlier for earlier, later in itertools.pairwise(times)]


async def streams(
    session: aiohttp.ClientSession, numbers: Iterator[int], count: int
) -> tuple[list[float], list[float]]:
    firsts, gaps = [], []
    for _ in range(count):
        first, between = await stream(session, next(numbers))
        firsts.append(first)
        gaps += between
        await asyncio.sleep(0.1)
    return firsts, gaps


async def begin_batch(session: aiohttp.ClientSession, numbers: Iterator[int], count: int) -> str:
    rows = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": chat(next(numbers), 95, 48)}
        for n in range(count)
    ]
    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", "".join(json.dumps(row) + "\n" for row in rows), filename="rows.jsonl")
    async with session.post(f"{URL}/v1/files", data=form) as answer:
        file_id = (await answer.json())["id"]
    body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    async with session.post(f"{URL}/v1/batches", json=body) as answer:
        return (await answer.json())["id"]


async def batch_of(session: aiohttp.ClientSession, batch_id: str) -> dict[str, Any]:
    async with session.get(f"{URL}/v1/batches/{batch_id}") as answer:
        return await answer.json()


async def flood(session: aiohttp.ClientSession, numbers: Iterator[int], at_a_time: int, done: list[int]) -> None:
    async def work() -> None:
        while True:
            async with session.post(f"{URL}/v1/chat/completions", json=chat(next(numbers), 95, 48)) as answer:
                await answer.read()
            done.append(1)

    await asyncio.gather(*(work() for _ in range(at_a_time)))


async def measure(count: int, turns: int, at_a_time: int) -> None:
    numbers = itertools.count()
    found: dict[str, tuple[list[float], list[float]]] = {}
    rates: dict[str, list[float]] = {}

    def add(name: str, got: tuple[list[float], list[float]], rate: float) -> None:
        firsts, gaps = found.setdefault(name, ([], []))
        firsts += got[0]
        gaps += got[1]
        rates.setdefault(name, []).append(rate)

    async with aiohttp.ClientSession(headers={"X-Mooli": "1"}) as session:
        await streams(session, numbers, 2)
        for _ in range(turns):
            add("alone", await streams(session, numbers, count), 0.0)

            batch_id = await begin_batch(session, numbers, 5000)
            await asyncio.sleep(2.0)  # until it runs
            before, started = await batch_of(session, batch_id), time.perf_counter()
            got = await streams(session, numbers, count)
            after, took_s = await batch_of(session, batch_id), time.perf_counter() - started
            rows = after["request_counts"]["completed"] - before["request_counts"]["completed"]
            add("beside a batch", got, rows / took_s)
            async with session.post(f"{URL}/v1/batches/{batch_id}/cancel"):
                pass
            while (await batch_of(session, batch_id))["status"] != "cancelled":
                await asyncio.sleep(0.1)

            done: list[int] = []
            flooding = asyncio.ensure_future(flood(session, numbers, at_a_time, done))
            await asyncio.sleep(2.0)
            done.clear()
            started = time.perf_counter()
            got = await streams(session, numbers, count)
            add("beside requests", got, len(done) / (time.perf_counter() - started))
            flooding.cancel()
            await asyncio.gather(flooding, return_exceptions=True)
    print(
        "| | first token, median | 95 % | token, median | 95 % | rows/s beside |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, (firsts, gaps) in found.items():
        cells = [
            f"{1000 * value:.0f} ms"
            for values in (firsts, gaps)
            for value in (statistics.median(values), statistics.quantiles(values, n=20)[-1])
        ]
        print(f"| {name} | {' | '.join(cells)} | {statistics.mean(rates[name]):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", type=int, default=12, help="in each turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="of the batch, in the engine at a time")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            [
                sys.executable, "-m", "mooli", "serve", "--model-path", arguments.model, "--port", str(PORT),
                "--batch-dir", folder, "--max-batch-rows", str(arguments.rows), "--max-total-tokens", "16384",
                "--log-level-http", "warning", "--kv-cache-dir", "none",
            ],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            for line in server.stderr or ():
                if READY_LINE in line:
                    break
            else:
                raise SystemExit("the server has not started")
            asyncio.run(measure(arguments.streams, arguments.turns, arguments.rows))
        finally:
            server.terminate()
            server.communicate()


if __name__ == "__main__":
    main()
