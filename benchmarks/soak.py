"""A server under several times its capacity, with clients that leave, abort and send nonsense; then its books are read.

Starts `mooli.launch_server` with a small KV cache, so that eviction and preemption happen all the time, and sends
random requests on all generation routes. Every two minutes, and at the end, all that is open is aborted, and then:

- every request has ended once: with an answer, with a refusal that says why, or because its client left;
- no page is lost: when nothing runs, pages in use are zero, and free pages and the tree's make up the pool;
- the memory of both processes does not grow (slope of a line through the second half).

    python benchmarks/soak.py [--seconds 1200] [--clients 96] [--model demo] [--seed 0]

Exit status 0 only if all of it holds.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

KV_TOKENS = 2048
FLAGS = {
    "--max-total-tokens": KV_TOKENS, "--context-length": 2048, "--chunked-prefill-size": 128,
    "--max-running-requests": 24, "--max-queued-requests": 24, "--log-level": "error", "--shutdown-timeout": 20,
}  # fmt: skip

MAX_SLOPE_MIB_PER_MIN = 1.0
"""Growth that counts as a leak, in a run that is long enough to tell (`MIN_SLOPE_S`)."""
MIN_SLOPE_S = 600  # also long enough for preemptions on any machine
ROUND_S = 120

REFUSALS = (400, 429, 503)

PAUSE_S, REFUSED_PAUSE_S = 0.05, 0.5
"""Between two requests of one client, on average; the second after a refusal, so that most requests do get in."""


@dataclass
class Tally:
    """What became of the requests, by kind; and what should never be."""

    ended: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)
    memory_mib: list[tuple[float, float]] = field(default_factory=list)

    def fault(self, text: str) -> None:
        if len(self.faults) < 50:
            self.faults.append(text)


class Client:
    """One user that sends one random request after another."""

    def __init__(self, url: str, session: aiohttp.ClientSession, rng: random.Random, tally: Tally) -> None:
        self._url, self._session, self._rng, self._tally = url, session, rng, tally
        self._pause_s = PAUSE_S

    async def run(self, end: float) -> None:
        while time.monotonic() < end:
            kind = self._rng.random()
            self._pause_s = PAUSE_S
            try:
                if kind < 0.08:
                    await self._nonsense()
                else:
                    await self._request(leaves=kind < 0.35, is_aborted=0.35 <= kind < 0.42)
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as exc:
                self._tally.fault(f"connection failed: {type(exc).__name__}: {exc}")
            await asyncio.sleep(self._rng.expovariate(1 / self._pause_s))

    def _body(self) -> tuple[str, dict[str, Any], str]:
        """Path, body and request id."""
        rng = self._rng
        rid = f"{rng.getrandbits(64):016x}"
        stem = rng.choice(STEMS)
        text = " ".join(
            stem[: rng.randint(1, rng.choice([4, 16, len(stem)]))]
            + [str(rng.randrange(10**6)) for _ in range(rng.choice([0, 2, 2, 40]))]
        )
        length = rng.choice([1, 4, 16, 64, 200, 400])
        common: dict[str, Any] = {
            "temperature": rng.choice([0, 0.8]), "stop": rng.choice([None, None, ["the"], [".\n", "xyz"]]),
            "ignore_eos": rng.random() < 0.5, "n": rng.choice([1, 1, 1, 2, 3]),
        }  # fmt: skip
        is_stream = rng.random() < 0.6
        path = rng.choice(["/generate", "/v1/completions", "/v1/chat/completions", "/v1/messages"])
        if path == "/generate":
            body: dict[str, Any] = {"text": text, "rid": rid, "stream": is_stream}
            body["sampling_params"] = {**common, "max_new_tokens": length}
            body["return_logprob"] = rng.random() < 0.2
        elif path == "/v1/completions":
            body = {**common, "prompt": text, "max_tokens": length, "stream": is_stream, "rid": rid}
        elif path == "/v1/chat/completions":
            messages = [{"role": "user", "content": text}]
            body = {**common, "messages": messages, "max_tokens": length, "stream": is_stream, "rid": rid}
        else:
            body = {
                "messages": [{"role": "user", "content": text}],
                "max_tokens": length,
                "stream": is_stream,
                "model": "m",
            }
        return path, body, rid

    async def _request(self, *, leaves: bool, is_aborted: bool) -> None:
        path, body, rid = self._body()
        is_stream = body["stream"]
        patience_s = self._rng.expovariate(2.0) if leaves else 300.0
        aborting = asyncio.ensure_future(self._abort_later(rid)) if is_aborted else None
        try:
            await asyncio.wait_for(self._exchange(path, body, is_stream), patience_s)
        except asyncio.TimeoutError:
            if not leaves:
                self._tally.fault(f"{path} has not ended within {patience_s:g} s")
            self._tally.ended["client left"] += 1
        finally:
            if aborting is not None:
                aborting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await aborting

    async def _exchange(self, path: str, body: dict[str, Any], is_stream: bool) -> None:
        async with self._session.post(self._url + path, json=body) as response:
            data = await response.read()
        if response.status in REFUSALS:
            if b'"message"' not in data:
                self._tally.fault(f"{path}: a refusal ({response.status}) without a reason: {data[:200]!r}")
            if response.status == 400 and b"context" not in data:
                self._tally.fault(f"{path}: a good request was refused: {data[:200]!r}")
            self._tally.ended[f"refused {response.status}"] += 1
            self._pause_s = REFUSED_PAUSE_S
        elif response.status != 200:
            self._tally.fault(f"{path}: status {response.status}: {data[:200]!r}")
        elif is_stream:
            self._check_stream(path, data.decode(), body)
        else:
            self._check_answer(path, json.loads(data), body)

    def _check_answer(self, path: str, answer: Any, body: dict[str, Any]) -> None:
        if path == "/generate":
            ends = [item["meta_info"]["finish_reason"] for item in (answer if isinstance(answer, list) else [answer])]
            wanted = body["sampling_params"]["n"]
        elif path == "/v1/messages":
            ends, wanted = [answer["stop_reason"]], 1
        else:
            ends, wanted = [choice["finish_reason"] for choice in answer["choices"]], body["n"]
        if len(ends) != wanted or not all(ends):
            self._tally.fault(f"{path}: {wanted} answers were asked for, these ends came: {ends}")
        self._tally.ended["answered"] += 1

    def _check_stream(self, path: str, text: str, body: dict[str, Any]) -> None:
        """Each sequence ends once, and the stream says that it is over."""
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        ends: collections.Counter[int] = collections.Counter()
        if path == "/v1/messages":
            ends[0] = sum(event["type"] == "message_delta" for event in events)
            aborts = [event for event in events if event["type"] == "error" and "abort" in event["error"]["message"]]
            ends[0] += len(aborts)  # this API has no stop reason for it
            wanted, is_over = 1, bool(aborts) or text.endswith('{"type":"message_stop"}\n\n')
        elif path == "/generate":
            wanted, is_over = body["sampling_params"]["n"], text.endswith("data: [DONE]\n\n")
            for event in events:
                ends[event.get("index", 0)] += event["meta_info"]["finish_reason"] is not None
        else:
            wanted, is_over = body["n"], text.endswith("data: [DONE]\n\n")
            for event in events:
                for choice in event["choices"]:
                    ends[choice["index"]] += choice["finish_reason"] is not None
        if not is_over or len(ends) != wanted or set(ends.values()) != {1}:
            self._tally.fault(f"{path}: the stream of {wanted} ended like this: {dict(ends)}: {text[-300:]!r}")
        self._tally.ended["streamed"] += 1

    async def _abort_later(self, rid: str) -> None:
        await asyncio.sleep(self._rng.expovariate(4.0))
        async with self._session.post(f"{self._url}/abort_request", json={"rid": rid}) as response:
            await response.read()

    async def _nonsense(self) -> None:
        rng = self._rng
        path = rng.choice(["/generate", "/v1/completions", "/v1/chat/completions", "/v1/messages", "/tokenize"])
        body = rng.choice([b"{", b"[]", b"\xff\xfe", b"null", b"{}", *NONSENSE[path]])
        headers = {"Content-Type": rng.choice(["application/json", "text/plain"])}
        async with self._session.post(self._url + path, data=body, headers=headers) as response:
            data = await response.read()
        if not 400 <= response.status < 500:
            self._tally.fault(f"{path}: nonsense {body!r} was answered with {response.status}: {data[:200]!r}")
        self._tally.ended["nonsense refused"] += 1


NONSENSE = {
    "/generate": [b'{"text": 5}', b'{"text": "x", "sampling_params": {"top_p": 9}}', b'{"input_ids": [[]]}'],
    "/v1/completions": [b'{"prompt": "x", "max_tokens": -3}', b'{"prompt": "x", "temperature": "hot"}'],
    "/v1/chat/completions": [b'{"messages": []}', b'{"messages": [{"role": "king", "content": "x"}]}'],
    "/v1/messages": [b'{"messages": []}', b'{"model": "m", "max_tokens": 1, "messages": []}'],
    "/tokenize": [b'{"prompt": 5}', b'{"prompt": "x", "messages": []}'],
}

STEMS = [[f"{word}{i}" for i in range(120)] for word in ("alpha", "beta", "gamma", "delta")]


def memory_mib(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/status") as file:
            match = re.search(r"VmRSS:\s+(\d+) kB", file.read())
        total += int(match.group(1)) if match else 0
    return total / 1024


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


async def wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(1200):
            if process.poll() is not None:
                raise SystemExit(f"the server has ended with status {process.returncode}")
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.1)
    raise SystemExit("the server has not become ready")


async def check_books(url: str, session: aiohttp.ClientSession, tally: Tally) -> dict[str, Any]:
    """With nothing running: no request, no page in use, none lost. Returns the engine's numbers."""
    state: dict[str, Any] = {}
    for _ in range(300):
        async with session.get(f"{url}/server_info") as response:
            state = (await response.json())["internal_states"][0]
        if not state["running"] and not state["waiting"]:
            break
        await asyncio.sleep(0.1)
    if state["running"] or state["waiting"]:
        tally.fault(f"requests are left that nobody sent: {state}")
    if state["used_pages"] or state["free_pages"] + state["tree_pages"] != state["total_pages"]:
        tally.fault(f"pages are lost: {state}")
    if state["requests"] != state["finished"]:
        tally.fault(f"{state['requests']} requests came to the engine and {state['finished']} ended")
    async with session.get(f"{url}/v1/loads") as response:
        loads = (await response.json())["loads"][0]
    if loads["num_used_tokens"] or loads["num_running_reqs"] or loads["num_waiting_reqs"]:
        tally.fault(f"/v1/loads shows load where there is none: {loads}")
    return state


async def soak(url: str, process: subprocess.Popen[bytes], seconds: float, num_clients: int, seed: int) -> Tally:
    tally = Tally()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        rng = random.Random(seed)
        pids = [process.pid, *children(process.pid)]
        began = time.monotonic()
        rounds = max(1, round(seconds / ROUND_S))
        for index in range(rounds):
            round_end = began + seconds * (index + 1) / rounds
            clients = [Client(url, session, random.Random(rng.random()), tally) for _ in range(num_clients)]
            tasks = [asyncio.ensure_future(client.run(round_end)) for client in clients]
            while time.monotonic() < round_end and process.poll() is None:
                tally.memory_mib.append((time.monotonic() - began, memory_mib(pids)))
                await asyncio.sleep(min(2.0, seconds / 30))
            if process.poll() is not None:
                for task in tasks:
                    task.cancel()
                tally.fault(f"the server has ended with status {process.returncode}")
                return tally
            await abort_until_done(url, session, tasks)
            state = await check_books(url, session, tally)
            left_s = max(0.0, began + seconds - time.monotonic())
            size = f"{tally.memory_mib[-1][1]:.0f} MiB"
            engine = f"{state['evicted_pages']} pages evicted, {state['preemptions']} preemptions"
            print(
                f"{left_s:6.0f} s left; {dict(tally.ended)}; {engine}; {size}; faults {len(tally.faults)}", flush=True
            )
            if not state["evicted_pages"] or (seconds >= MIN_SLOPE_S and not state["preemptions"]):
                tally.fault("the KV cache was never full: nothing was shown")
    return tally


async def abort_until_done(url: str, session: aiohttp.ClientSession, tasks: Sequence[asyncio.Future[None]]) -> None:
    """Clients that have sent their last request need not wait for the whole answer."""
    while not all(task.done() for task in tasks):
        async with session.post(f"{url}/abort_request", json={"abort_all": True}) as response:
            await response.read()
        await asyncio.wait(tasks, timeout=0.5)
    await asyncio.gather(*tasks)


def slope_mib_per_min(samples: list[tuple[float, float]]) -> float:
    late = samples[len(samples) // 2 :]
    times, sizes = np.array(late).T
    return float(np.polyfit(times, sizes, 1)[0] * 60) if len(late) > 2 else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--clients", type=int, default=96)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [str(word) for pair in FLAGS.items() for word in pair]
    command = [sys.executable, "-m", "mooli.launch_server", "--model-path", args.model, "--port", str(port), *flags]
    command += ["--kv-cache-dir", "none"]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        asyncio.run(wait_ready(url, process))
        tally = asyncio.run(soak(url, process, args.seconds, args.clients, args.seed))
    finally:
        process.terminate()
        status = process.wait()
    if status:
        tally.fault(f"the server's exit status is {status}")
    slope = slope_mib_per_min(tally.memory_mib)
    if args.seconds >= MIN_SLOPE_S and slope > MAX_SLOPE_MIB_PER_MIN:
        tally.fault(f"memory grows by {slope:.2f} MiB a minute")
    print(f"ended: {dict(tally.ended)}; memory slope of the second half {slope:+.2f} MiB/min")
    for fault in tally.faults:
        print(f"FAULT: {fault}")
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
