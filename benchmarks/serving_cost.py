"""What serving costs beside computing: HTTP, text, the link between the processes, and scheduling.

The whole server runs on one core, around an engine whose model takes no time (benchmarks/instant_core.py), the client
on another. First with steps that take no time at all: streamed tokens a second when the server is all there is (chunks
hold several tokens, as tokens come faster than they are sent), and the time to the first token of a lone request. Then
with steps of a fixed time, so that each token is a chunk of its own: what one costs in processor time.

    python benchmarks/serving_cost.py [--streams 32] [--tokens 256] [--step-ms 8]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mooli.config import EngineConfig
from mooli.engine.child import EngineChild
from mooli.server.bring_up import start_service
from mooli.server.config import ServerConfig
from mooli.server.http_server import HttpServer
from mooli.server.keys import KeyRing
from mooli.server.launch import OneEngine

HERE = Path(__file__).resolve().parent
ROUTES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello there"}], "ignore_eos": True},
    "/v1/completions": {"prompt": "Hello there", "ignore_eos": True},
    "/generate": {"text": "Hello there"},
}


async def serve() -> None:
    """Be the server; prints its port."""
    config = ServerConfig.from_kwargs(port=0)
    engine_config = EngineConfig.from_kwargs(model_path="demo", log_level="error")
    command = [sys.executable, str(HERE / "instant_core.py")]
    with EngineChild(command) as child:
        service, engine = await start_service(config, engine_config, [], time.perf_counter(), child, KeyRing(config))
        server = HttpServer(OneEngine(service, engine))
        await server.run(on_started=lambda: print(server.port, flush=True))


def body(path: str, num_tokens: int) -> bytes:
    if path == "/generate":
        sampling = {"max_new_tokens": num_tokens, "ignore_eos": True}
        content = {**ROUTES[path], "stream": True, "sampling_params": sampling}
    else:
        content = {**ROUTES[path], "stream": True, "max_tokens": num_tokens}
    return json.dumps(content).encode()


async def stream(port: int, path: str, num_tokens: int) -> tuple[float, int]:
    """Time to the first chunk with text in seconds, and the number of chunks."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = body(path, num_tokens)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        "\r\nConnection: close\r\n\r\n"
    )
    began = time.perf_counter()
    writer.write(head.encode() + content)
    first_s, num_chunks = None, 0
    while data := await reader.read(1 << 16):
        if first_s is None and b"data: " in data:
            first_s = time.perf_counter() - began
        num_chunks += data.count(b"data: ")
    writer.close()
    if first_s is None:
        raise SystemExit(f"{path} has not answered with a stream")
    return first_s, num_chunks


async def first_tokens(port: int, path: str) -> list[float]:
    await stream(port, path, 4)
    return [(await stream(port, path, 2))[0] * 1000 for _ in range(50)]


async def together(port: int, path: str, num_streams: int, num_tokens: int) -> tuple[float, float]:
    """Tokens a second of all streams together, and tokens in a chunk."""
    began = time.perf_counter()
    results = await asyncio.gather(*(stream(port, path, num_tokens) for _ in range(num_streams)))
    elapsed_s = time.perf_counter() - began
    num_chunks = sum(chunks for _, chunks in results)
    return num_streams * num_tokens / elapsed_s, num_streams * num_tokens / num_chunks


def cpu_s(pid: int) -> float:
    """Processor time of a process and its children so far (proc_pid_stat(5))."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        pids = [pid, *(int(word) for word in file.read().split())]
    ticks = 0
    for each in pids:
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def running_server(core: int, step_ms: float) -> Iterator[tuple[int, int]]:
    """A server whose processes share one core: its port and its pid."""
    command = ["taskset", "-c", str(core), sys.executable, __file__, "--serve"]
    environment = {**os.environ, "STEP_MS": str(step_ms)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            yield int(server.stdout.readline()), server.pid
        finally:
            server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=8.0)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve())
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[1:] or cores)
    print(f"the server's two processes on core {cores[0]}, the client on {cores[1:] or cores}")
    with running_server(cores[0], 0) as (port, _):
        for path in ROUTES:
            first = asyncio.run(first_tokens(port, path))
            rate, size = asyncio.run(together(port, path, args.streams, args.tokens))
            print(
                f"{path:22} {rate:7.0f} tok/s streamed, {size:.1f} tokens a chunk; first token of a lone request"
                f" {statistics.median(first):.2f} ms, at most {max(first):.2f} ms"
            )
    with running_server(cores[0], args.step_ms) as (port, pid):
        for path in ROUTES:
            before_s = cpu_s(pid)
            rate, size = asyncio.run(together(port, path, args.streams, args.tokens))
            cost_us = (cpu_s(pid) - before_s) / (args.streams * args.tokens) * 1e6
            most = args.streams * 1000 / args.step_ms
            print(
                f"{path:22} steps of {args.step_ms:g} ms: {rate:7.0f} of {most:.0f} tok/s, {size:.1f} tokens a chunk,"
                f" {cost_us:.0f} us of processor time a token"
            )


if __name__ == "__main__":
    main()
