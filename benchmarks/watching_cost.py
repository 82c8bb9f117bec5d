"""What being watched costs a busy server: tokens a second with the stream of events open, and without, in turns.

A server with the demo model answers more clients than it can run at once, whose prompts share heads, so that the tree
grows, splits and makes room all the time. In every other window somebody fetches the tree and reads the stream. Then,
without a model, what one question about a tree of 10,000 nodes takes of the engine's time, half of them being on disk.

    python benchmarks/watching_cost.py [--rounds 12] [--seconds 6] [--clients 12]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from serving_cost import cpu_s

from mooli.cache.kv_cache import KVCache
from mooli.cache.radix_tree import token_key
from mooli.config import EngineConfig
from mooli.engine import messages
from mooli.engine.child import EngineChild
from mooli.server.bring_up import start_service
from mooli.server.config import ServerConfig
from mooli.server.http_server import HttpServer
from mooli.server.keys import KeyRing
from mooli.server.launch import OneEngine

HEADS = 24
HEAD_WORDS = 60
PAGE = 32
WORDS = (
    "of", "time", "and", "the", "tree", "that", "grows", "by", "a", "river", "where", "stones", "are", "counted",
    "again", "until", "night", "comes", "over", "all",
)  # fmt: skip


async def serve() -> None:
    """Be the server; prints its port."""
    config = ServerConfig.from_kwargs(port=0)
    with tempfile.TemporaryDirectory() as folder, EngineChild() as child:
        engine_config = EngineConfig.from_kwargs(
            model_path="demo", log_level="error", max_total_tokens=16384, kv_cache_dir=folder
        )
        service, engine = await start_service(config, engine_config, [], time.perf_counter(), child, KeyRing(config))
        server = HttpServer(OneEngine(service, engine))
        await server.run(on_started=lambda: print(server.port, flush=True))


@contextmanager
def running_server() -> Iterator[tuple[int, int]]:
    """Its port and its pid."""
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield int(server.stdout.readline()), server.pid
        finally:
            server.terminate()


async def exchange(port: int, request: bytes) -> bytes:
    """The body of the answer to a request whose connection is closed after it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer.partition(b"\r\n\r\n")[2]


async def get(port: int, path: str) -> Any:
    return json.loads(
        await exchange(port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    )


async def client(port: int, seed: int) -> None:
    """Ask without end."""
    rng = random.Random(seed)
    while True:
        head = random.Random(rng.randrange(HEADS))
        words = [head.choice(WORDS) for _ in range(HEAD_WORDS)] + [rng.choice(WORDS) for _ in range(20)]
        body = {
            "text": " ".join(words),
            "sampling_params": {"max_new_tokens": 24, "ignore_eos": True, "temperature": 0},
        }
        content = json.dumps(body).encode()
        request = (
            f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length:"
            f" {len(content)}\r\nConnection: close\r\n\r\n"
        )
        await exchange(port, request.encode() + content)


async def watch(port: int, counts: dict[str, int]) -> None:
    """As the page does: the stream, and the tree once."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /v1/cache/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await reader.readuntil(b'"hello"')
    tree = await get(port, "/v1/cache/tree")
    counts["nodes"] = len(tree.get("nodes", []))
    try:
        while data := await reader.read(1 << 16):
            counts["bytes"] += len(data)
            counts["events"] += data.count(b"data: ")
    finally:
        writer.close()


async def window(port: int, pid: int, seconds: float) -> tuple[float, float]:
    """Generated tokens a second, and microseconds of the server's processor time a token."""
    before, before_s, began = await generated(port), cpu_s(pid), time.perf_counter()
    await asyncio.sleep(seconds)
    tokens, used_s, elapsed_s = await generated(port) - before, cpu_s(pid) - before_s, time.perf_counter() - began
    return tokens / elapsed_s, used_s / tokens * 1e6


async def generated(port: int) -> int:
    return int((await get(port, "/server_info"))["internal_states"][0]["generated_tokens"])


async def compare(port: int, pid: int, args: argparse.Namespace) -> None:
    clients = [asyncio.ensure_future(client(port, seed)) for seed in range(args.clients)]
    await asyncio.sleep(5)  # until the pool is full
    counts = {"nodes": 0, "bytes": 0, "events": 0}
    rates: dict[bool, list[float]] = {False: [], True: []}
    costs: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * args.rounds):
        is_watched = number % 4 in (1, 2)  # not watched, watched, watched, not watched: a drift harms both
        watcher = asyncio.ensure_future(watch(port, counts)) if is_watched else None
        await asyncio.sleep(0.5)
        rate, cost = await window(port, pid, args.seconds)
        rates[is_watched].append(rate)
        costs[is_watched].append(cost)
        if watcher is not None:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
    for each in clients:
        each.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    print(f"{args.clients} clients, {args.rounds} windows of {args.seconds:g} s each, alone and watched in turns:")
    for name, unit, values in (("speed", "tok/s", rates), ("processor time", "us a token", costs)):
        alone, watched = statistics.median(values[False]), statistics.median(values[True])
        ratios = [b / a for a, b in zip(values[False], values[True], strict=True)]
        error = statistics.stdev(ratios) / len(ratios) ** 0.5
        print(
            f"  {name}: {alone:.1f} and {watched:.1f} {unit}, in pairs {statistics.median(ratios) - 1:+.2%}"
            f" (standard error {error:.2%})"
        )
    watched_s = args.rounds * (args.seconds + 0.5)
    print(
        f"while watched: {counts['events'] / watched_s:.1f} events and {counts['bytes'] / watched_s / 1000:.1f} kB a"
        f" second; the tree had {counts['nodes']} nodes"
    )


# -- without a model ---------------------------------------------------------------------------------------------------
def grown_cache(num_nodes: int) -> tuple[KVCache, Callable[[], None]]:
    """A cache with so many nodes, and a request that comes and ends."""
    rng = np.random.default_rng(0)
    cache = KVCache(4 * num_nodes, PAGE)
    heads = [rng.integers(0, 50_000, 4 * PAGE).astype(np.int32) for _ in range(100)]

    def run_one() -> None:
        tail = rng.integers(0, 50_000, PAGE + 8).astype(np.int32)
        key = token_key(np.concatenate([heads[rng.integers(len(heads))], tail]))
        held = cache.open(cache.match("", key, len(key) // 4 - 1))
        cache.grow(held, len(key) // 4)
        cache.release(held, key[held.num_shared * PAGE * 4 :])

    while sum(1 for _ in cache._tree.nodes()) < num_nodes:
        for _ in range(500):
            run_one()
    return cache, run_one


def timed_ms(function: Callable[[], Any], times: int = 1) -> float:
    began = time.process_time()
    for _ in range(times):
        function()
    return (time.process_time() - began) / times * 1000


def questions(num_nodes: int) -> None:
    """All in processor time."""
    cache, run_one = grown_cache(num_nodes)
    alone_us = timed_ms(run_one, 2000) * 1000
    begin_ms = timed_ms(cache.watch.begin)
    after: int | None = 0
    part_ms = []
    while after is not None:
        began = time.process_time()
        part = cache.watch.part(after, 500)
        messages.encode(messages.Reply(1, {"nodes": part.nodes}))
        part_ms.append((time.process_time() - began) * 1000)
        after = part.after
    watched_us = timed_ms(run_one, 2000) * 1000
    cache.watch.take()
    take_ms = []
    for _ in range(50):
        for _ in range(20):
            run_one()
        began = time.process_time()
        changes = cache.watch.take()
        messages.encode(messages.Reply(1, {"nodes": changes.nodes, "removed": changes.removed}))
        take_ms.append((time.process_time() - began) * 1000)
    on_disk: set[bytes] = set()
    cache.watch.look_on_disk(lambda names: sum(1 for _ in itertools.takewhile(on_disk.__contains__, names)))
    naming_ms = max(timed_ms(cache.watch.take) for _ in range(10))
    for number, node in enumerate(cache._tree.nodes()):
        if node.parent is not None:
            on_disk.update(cache.digests.of(node) if number % 2 else ())
    looking_ms = statistics.median(timed_ms(cache.watch.take) for _ in range(20))
    print(
        f"{num_nodes} nodes: to begin {begin_ms:.1f} ms, once; {len(part_ms)} parts of 500 nodes, {max(part_ms):.2f} ms"
        f" each at most; changes of 20 requests {statistics.median(take_ms):.2f} ms; a request's way through the cache"
        f" {alone_us:.0f} us alone, {watched_us:.0f} us watched; to look for nodes on disk {naming_ms:.1f} ms until"
        f" their pages have names, {looking_ms:.1f} ms later"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="windows of each kind")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a window")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve())
        return
    questions(10_000)
    with running_server() as (port, pid):
        asyncio.run(compare(port, pid, args))


if __name__ == "__main__":
    main()
