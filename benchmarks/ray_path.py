"""Several replicas behind Ray Serve on this machine: what its path costs, whose cache is found, and whether anything is
lost as replicas die, come and go.

    python benchmarks/ray_path.py [--only cost,share,kills,scale,heads]

cost: one replica of one thread beside a plain server of one thread, in turns: milliseconds to the first token of a lone
request whose prompt is in the cache, and tokens a second of 8 streams; Ray's processes are on the same cores.
share: cached tokens of a shuffled trace with long heads, by head and round robin, beside one engine with the cache of
both replicas. kills: three replicas killed at random moments under load. scale: 1 -> 3 -> 1 replicas under load.
heads: what reading the head of a body costs beside tokenising it, for routing.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / "e2e"), str(TESTS)]

from ray_cluster import RayCluster, descendants  # noqa: E402
from server_process import ServerProcess, wait_until  # noqa: E402

REPLICA_TOKENS = 6144
ENGINE = {"model_path": "demo", "num_threads": 1, "max_total_tokens": REPLICA_TOKENS, "speculative_algorithm": "none"}
PLAIN = ("--num-threads", "1", "--speculative-algorithm", "none")
WORDS = ["radish", "bean", "soil", "water", "light", "root", "leaf", "seed", "frost", "bed", "spade", "worm", "rain"]


@contextmanager
def cluster(**arguments: Any) -> Iterator[RayCluster]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with RayCluster(port, {**ENGINE, "shutdown_timeout": 60, **arguments}) as made:
        yield made


def greedy(text: str, num_tokens: int, **fields: Any) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    return {"text": text, "sampling_params": params, **fields}


# -- cost --------------------------------------------------------------------------------------------------------------
async def stream(url: str, prompt: str, num_tokens: int) -> tuple[float, int]:
    """Seconds to the first event, and the number of tokens."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(greedy(prompt, num_tokens, stream=True)).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        "\r\nConnection: close\r\n\r\n"
    )
    began_s = time.perf_counter()
    writer.write(head.encode() + body)
    first_s, data = 0.0, b""
    while piece := await reader.read(1 << 16):
        data += piece
        if not first_s and b"data: " in data:
            first_s = time.perf_counter() - began_s
    writer.close()
    assert b'"completion_tokens":%d' % num_tokens in data, data[-500:]
    return first_s, num_tokens


async def together(url: str, num_streams: int, num_tokens: int) -> float:
    """Tokens a second."""
    began_s = time.perf_counter()
    await asyncio.gather(*(stream(url, f"Story {i}", num_tokens) for i in range(num_streams)))
    return num_streams * num_tokens / (time.perf_counter() - began_s)


def rss_mb(pid: int) -> int:
    pids = [pid, *descendants(pid)]
    sizes = [Path(f"/proc/{each}/smaps_rollup").read_text().split("Pss:")[1].split()[0] for each in pids]
    return sum(map(int, sizes)) // 1024


def cpu_s(pid: int) -> float:
    """Processor time of a process and all below it so far (proc_pid_stat(5))."""
    ticks = 0
    for each in [pid, *descendants(pid)]:
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def cost(num_rounds: int) -> None:
    with ServerProcess(*PLAIN) as plain, cluster(replicas=1) as serve:
        ends = {"plain": (plain.url, plain.pid), "ray": (serve.url, serve.process.pid)}
        firsts: dict[str, list[float]] = {name: [] for name in ends}
        rates: dict[str, list[float]] = {name: [] for name in ends}
        spent: Counter[str] = Counter()
        for _ in range(num_rounds):
            for name, (url, pid) in ends.items():
                asyncio.run(stream(url, "Once upon a time", 2))
                firsts[name] += [asyncio.run(stream(url, "Once upon a time", 2))[0] * 1000 for _ in range(8)]
                before_s = cpu_s(pid)
                rates[name].append(asyncio.run(together(url, 8, 64)))
                spent[name] += int(1e6 * (cpu_s(pid) - before_s) / (8 * 64))
        for name, (_, pid) in ends.items():
            print(
                f"{name:6} first token {statistics.median(firsts[name]):6.1f} ms (best {min(firsts[name]):.1f}),"
                f" 8 streams {statistics.median(rates[name]):6.0f} tok/s (best {max(rates[name]):.0f}),"
                f" {spent[name] // num_rounds} us of processors a token, {rss_mb(pid)} MB"
            )


# -- share -------------------------------------------------------------------------------------------------------------
def trace(num_groups: int, num_questions: int) -> list[str]:
    """Prompts of groups whose heads have some 300 tokens, shuffled."""
    chance = random.Random(5)
    heads = [f"Report {i}. " + " ".join(chance.choices(WORDS, k=300)) for i in range(num_groups)]
    prompts = [
        f"{head} Question {i}: {' '.join(chance.choices(WORDS, k=12))}?" for head in heads for i in range(num_questions)
    ]
    chance.shuffle(prompts)
    return prompts


def cached_share(url: str, prompts: list[str]) -> float:
    """Four clients at a time."""

    async def run() -> float:
        limit = asyncio.Semaphore(4)
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:

            async def ask(prompt: str) -> tuple[int, int]:
                async with limit:
                    meta = (await http.post("/generate", json=greedy(prompt, 8))).json()["meta_info"]
                    return meta["cached_tokens"], meta["prompt_tokens"]

            found = await asyncio.gather(*map(ask, prompts))
        return sum(cached for cached, _ in found) / sum(all_ for _, all_ in found)

    return asyncio.run(run())


def share() -> None:
    prompts = trace(20, 8)
    with ServerProcess(*PLAIN, "--max-total-tokens", str(2 * REPLICA_TOKENS)) as plain:
        print(f"one engine, {2 * REPLICA_TOKENS} tokens   {cached_share(plain.url, prompts):.3f}")
    for routing in ("head", "round_robin"):
        with cluster(replicas=2, routing=routing) as serve:
            found = cached_share(serve.url, prompts)
            print(f"two replicas of {REPLICA_TOKENS}, {routing:11}   {found:.3f}")


# -- kills and scale ---------------------------------------------------------------------------------------------------
class Load:
    """Clients that ask until they are told to stop. ends: how requests ended, by kind."""

    def __init__(self, url: str, num_clients: int) -> None:
        self.ends: Counter[str] = Counter()
        self._url = url
        self._stop = threading.Event()
        self._clients = [threading.Thread(target=self._run, args=(i,)) for i in range(num_clients)]

    def __enter__(self) -> Load:
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for client in self._clients:
            client.join()

    def _run(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=120) as http:
            for count in itertools.count():
                if self._stop.is_set():
                    return
                body = greedy(f"Client {number}, story {count % 7}:", 40, stream=count % 2 == 0)
                try:
                    answer = http.post("/generate", json=body)
                    self.ends[_kind(answer)] += 1
                except httpx.HTTPError as exc:
                    self.ends[f"lost: {type(exc).__name__}"] += 1


def _kind(answer: httpx.Response) -> str:
    if answer.status_code != 200:
        return f"lost: status {answer.status_code}"
    if "text/event-stream" not in answer.headers["content-type"]:
        return "whole"
    if not answer.text.endswith("data: [DONE]\n\n"):
        return "lost: a stream that was cut off"
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    if "error" in events[-1]:
        return "ended with the cause, before a token" if len(events) == 1 else "ended with the cause, after some tokens"
    return "whole stream"


def kills() -> None:
    chance = random.Random(11)
    with cluster(replicas=2) as serve, Load(serve.url, 6) as load:
        for _ in range(3):
            time.sleep(2 + 3 * chance.random())
            victim = chance.choice(serve.actors("engine"))
            os.kill(victim, signal.SIGKILL)
            began_s = time.monotonic()
            wait_until(lambda: len(serve.loads()) == 2 and victim not in serve.actors("engine"), "two replicas")  # noqa: B023
            print(f"a replica was killed; two again after {time.monotonic() - began_s:.1f} s")
        time.sleep(2)
    print("; ".join(f"{kind}: {count}" for kind, count in sorted(load.ends.items())))


def scale() -> None:
    with cluster(replicas=1) as serve, Load(serve.url, 6) as load:
        for count in (3, 1):
            time.sleep(2)
            began_s = time.monotonic()
            serve.deploy(engine=count)
            wait_until(lambda: len(serve.loads()) == count, "replicas")  # noqa: B023
            print(f"{count} replicas after {time.monotonic() - began_s:.1f} s")
        time.sleep(2)
    print("; ".join(f"{kind}: {count}" for kind, count in sorted(load.ends.items())))


# -- heads -------------------------------------------------------------------------------------------------------------
def heads() -> None:
    from mooli.config import EngineConfig
    from mooli.frontend.chat_encoding import encode_chat
    from mooli.frontend.text_side import open_tokenizer
    from mooli.hub.locate import locate
    from mooli.ray.heads import heads_of

    tokenizer = open_tokenizer(EngineConfig.from_kwargs(model_path="demo"), locate("demo", needs_weights=False))
    assert tokenizer is not None
    chance = random.Random(3)
    for num_words in (50, 500, 5000):
        messages = [{"role": "user", "content": " ".join(chance.choices(WORDS, k=num_words))}]
        body = json.dumps({"model": "demo", "messages": messages}).encode()
        text_s = best_s(lambda: heads_of(body, 1024))  # noqa: B023
        token_s = best_s(lambda: encode_chat(tokenizer, messages))  # noqa: B023
        num_tokens = len(encode_chat(tokenizer, messages))
        print(
            f"{num_tokens:5} tokens: head of the text {text_s * 1e6:6.0f} us,"
            f" template and tokens {token_s * 1e6:6.0f} us"
        )


def best_s(work: Any) -> float:
    found = []
    for _ in range(30):
        began_s = time.perf_counter()
        work()
        found.append(time.perf_counter() - began_s)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="cost,share,kills,scale,heads")
    parser.add_argument("--rounds", type=int, default=5, help="of cost")
    args = parser.parse_args()
    parts = {"cost": lambda: cost(args.rounds), "share": share, "kills": kills, "scale": scale, "heads": heads}
    for name in args.only.split(","):
        if name not in parts:
            raise SystemExit(f"--only {name}: there are {', '.join(parts)}")
        print(f"-- {name}", flush=True)
        parts[name]()


if __name__ == "__main__":
    main()
