"""SGLang's gateways in front of Mooli servers: what of the cache they keep, and what is lost when workers come and go.

For each gateway that is installed, with servers of one thread each:

1. share: of the tokens of a grouped trace's prompts, those that came from a cache; two servers by turns and by the
   gateway's cache-aware policy, and one server with the cache of both.
2. kills: clients that never pause, and three servers killed at random moments, each started anew. No request may be
   lost before its first token; one that has begun may be cut, and its client has to be told.
3. scale: one server, then three, then one again, under the same clients. Nothing may fail.
4. cost: time to the first token and tokens per second through the gateway beside the same server alone, in turns.

Every answer is compared with that of the one server. Exit status 0 only if 1 to 3 hold.

    python benchmarks/gateways.py [share] [kills] [scale] [cost] [--gateways smg,sglang_router] [--seed 0]
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "e2e"))

import httpx
from gateway_process import COMMANDS, GatewayProcess, grouped_trace, is_installed, servers, share_of_cached
from server_process import ServerProcess, wait_until

PARTS = ("share", "kills", "scale", "cost")
GROUPS, TURNS, HEAD_WORDS, ANSWER_TOKENS = 12, 8, 200, 16
CLIENTS = 4
KV_TOKENS = 2048
"""Of each of two servers. Their heads fill two thirds of it, if each head is at one server only."""

MIN_GAIN, MAX_BEHIND = 1.25, 0.05
"""Share of cached tokens: times that of turns at least, and behind that of one server at most."""

KILLS = 3


@dataclass
class Outcome:
    """What became of a request. kind: whole, cut (it had begun, and its client was told), or what should never be."""

    kind: str
    text: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    first_token_s: float = 0.0
    whole_s: float = 0.0
    cause: str = ""


def ask(http: httpx.Client, prompt: str, expected: str | None, num_tokens: int = ANSWER_TOKENS) -> Outcome:
    """Stream a greedy answer. expected: what one server says, None if that is not known yet."""
    params = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    started_s, first_s, text, meta = time.perf_counter(), 0.0, "", {}
    cause = "the stream has ended without its end"
    try:
        body = {"text": prompt, "stream": True, "sampling_params": params}
        with http.stream("POST", "/generate", json=body) as reply:
            if reply.status_code != 200:
                return Outcome("refused", cause=f"{reply.status_code} {reply.read().decode()[:200]}")
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    cause = event["error"]["message"]
                    break
                first_s = first_s or time.perf_counter() - started_s
                text, meta = event["text"], event["meta_info"]
    except httpx.HTTPError as exc:
        cause = repr(exc)
    whole_s = time.perf_counter() - started_s
    is_whole = bool(meta) and (meta["finish_reason"] or {}).get("type") == "length"
    if expected is not None and not (text == expected if is_whole else expected.startswith(text)):
        return Outcome("wrong", text, cause=f"{text!r} is not {expected!r}")
    kind = "whole" if is_whole else "cut" if first_s else "lost"
    return Outcome(kind, text, meta, first_s, whole_s, "" if is_whole else cause)


def run_trace(http: httpx.Client, prompts: Sequence[str], expected: Mapping[str, str]) -> list[Outcome]:
    """All prompts in order, CLIENTS at a time. Ends the run where one is not answered: its share would mean nothing."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        outcomes = list(pool.map(lambda prompt: ask(http, prompt, expected.get(prompt)), prompts))
    if failed := [outcome for outcome in outcomes if outcome.kind != "whole"]:
        raise SystemExit(f"{len(failed)} of {len(outcomes)} requests failed: {failed[0].kind}: {failed[0].cause}")
    return outcomes


class Clients:
    """CLIENTS that send prompts at random without a pause while this is entered.

    outcomes: what became of them. expected: the prompts, and what one server answers; others may take their place.
    """

    def __init__(self, http: httpx.Client, expected: Mapping[str, str], seed: int) -> None:
        self.outcomes: list[Outcome] = []
        self.expected = expected
        self._http = http
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(random.Random(seed + i),)) for i in range(CLIENTS)]

    def _run(self, rng: random.Random) -> None:
        while not self._stop.is_set():
            prompt, expected = rng.choice(list(self.expected.items()))
            self.outcomes.append(ask(self._http, prompt, expected))

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, number: int) -> None:
        """Until that many more requests have ended."""
        goal = len(self.outcomes) + number
        wait_until(lambda: len(self.outcomes) >= goal, f"{number} more answers")

    def counts(self) -> dict[str, int]:
        return dict(collections.Counter(outcome.kind for outcome in self.outcomes))

    def faults(self, *allowed: str) -> list[str]:
        return [f"{one.kind}: {one.cause}" for one in self.outcomes if one.kind not in ("whole", *allowed)]


def cached(outcomes: Sequence[Outcome]) -> float:
    return share_of_cached([outcome.meta for outcome in outcomes])


def flush(workers: Sequence[ServerProcess]) -> None:
    for worker in workers:
        worker.http.post("/flush_cache", headers={"X-Mooli": "1"}).raise_for_status()


@contextlib.contextmanager
def pair_behind(package: str, policy: str) -> Iterator[tuple[GatewayProcess, list[ServerProcess]]]:
    with (
        servers(2, "--max-total-tokens", str(KV_TOKENS)) as workers,
        GatewayProcess(package, policy=policy, worker_urls=[worker.url for worker in workers]) as gateway,
    ):
        yield gateway, workers


def share(package: str, prompts: Sequence[str], expected: Mapping[str, str], alone: float) -> list[str]:
    shares, faults = {}, []
    for policy in ("round_robin", "cache_aware"):
        with pair_behind(package, policy) as (gateway, _):
            outcomes = run_trace(gateway.http, prompts, expected)
        shares[policy] = cached(outcomes)
    turns, aware = shares["round_robin"], shares["cache_aware"]
    print(
        f"{package} share: turns {turns:.3f}, cache-aware {aware:.3f} ({aware / turns:.2f} times),"
        f" one server {alone:.3f}",
        flush=True,
    )
    if aware < MIN_GAIN * turns:
        faults.append(f"the cache-aware share is only {aware / turns:.2f} times that of turns")
    if aware < alone - MAX_BEHIND:
        faults.append(f"the cache-aware share {aware:.3f} is more than {MAX_BEHIND} behind {alone:.3f}")
    return faults


def kills(package: str, prompts: Sequence[str], expected: Mapping[str, str], seed: int) -> list[str]:
    rng = random.Random(seed)
    with pair_behind(package, "cache_aware") as (gateway, workers), contextlib.ExitStack() as restarted:
        before = cached(run_trace(gateway.http, prompts, expected))
        with Clients(gateway.http, expected, seed) as clients:
            for _ in range(KILLS):
                clients.wait_for(rng.randrange(5, 30))
                time.sleep(rng.random() * 0.3)  # in the middle of whatever is going on
                index = rng.randrange(2)
                killed = workers[index]
                os.killpg(killed.pid, signal.SIGKILL)
                wait_until(lambda url=killed.url: url not in gateway.healthy(), "the gateway has noticed")
                again = ServerProcess(
                    "--num-threads", "1", "--max-total-tokens", str(KV_TOKENS), port=killed.port
                )  # fmt: skip
                workers[index] = restarted.enter_context(again)
                wait_until(lambda url=killed.url: url in gateway.healthy(), "the gateway takes it back")
            clients.wait_for(40)
        after = [cached(run_trace(gateway.http, prompts, expected)) for _ in range(2)]
    shares = ", ".join(f"{one:.3f}" for one in after)
    print(f"{package} kills: {clients.counts()}; share before {before:.3f}, twice after {shares}", flush=True)
    for cause in sorted({outcome.cause for outcome in clients.outcomes if outcome.kind == "cut"}):
        print(f"  cut: {cause}")
    return clients.faults("cut")


def scale(package: str, expected: Mapping[str, str], fresh: Mapping[str, str], seed: int) -> list[str]:
    """fresh: with other heads. Known ones stay where they are cached, and a new server would have no work."""
    faults = []
    with (
        servers(3, "--max-total-tokens", str(KV_TOKENS)) as workers,
        GatewayProcess(package, policy="cache_aware", worker_urls=[workers[0].url]) as gateway,
        Clients(gateway.http, expected, seed) as clients,
    ):
        clients.wait_for(30)
        for worker in workers[1:]:
            gateway.add(worker.url)
        gateway.wait_for_workers(3)
        clients.expected = fresh
        clients.wait_for(90)
        answered = [_finished(worker) for worker in workers]
        for worker in workers[1:]:
            gateway.remove(worker.url)
        gateway.wait_for_workers(1)
        for worker in workers[1:]:
            worker.signal(signal.SIGTERM)
            if (status := worker.exit_status()) != 0:
                faults.append(f"a server that was taken away has ended with {status}")
        clients.wait_for(30)
    print(
        f"{package} scale 1, 3, 1: {clients.counts()}; answered by each while there were three: {answered}", flush=True
    )
    return faults + clients.faults()


def _finished(worker: ServerProcess) -> int:
    return worker.http.get("/server_info").json()["internal_states"][0]["finished"]


def cost(package: str, prompts: Sequence[str]) -> None:
    """In turns, as the machine's speed changes. All prompts are in the cache by then."""
    with (
        servers(1) as (worker,),
        GatewayProcess(package, policy="cache_aware", worker_urls=[worker.url]) as gateway,
    ):
        few = prompts[:4]
        ways = {"alone": worker.http, "gateway": gateway.http}
        first: dict[str, list[float]] = {name: [] for name in ways}
        rate: dict[str, list[float]] = {name: [] for name in ways}
        for round_number in range(21):
            for name, http in ways.items():
                alone = [ask(http, prompt, None, 2) for prompt in few]
                started_s = time.perf_counter()
                with ThreadPoolExecutor(CLIENTS) as pool:
                    list(pool.map(lambda prompt, http=http: ask(http, prompt, None, 64), few))
                if round_number:  # the first fills the cache
                    first[name] += [outcome.first_token_s for outcome in alone]
                    rate[name].append(CLIENTS * 64 / (time.perf_counter() - started_s))
    for name in ways:
        print(
            f"{package} cost, {name}: first token {statistics.median(first[name]) * 1e3:.1f} ms,"
            f" {statistics.median(rate[name]):.0f} tok/s of {CLIENTS} streams",
            flush=True,
        )


def _shuffled(salt: str, turns: int, seed: int) -> list[str]:
    prompts = [prompt.text for prompt in grouped_trace(GROUPS, turns, head_words=HEAD_WORDS, salt=salt)]
    random.Random(seed).shuffle(prompts)
    return prompts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--gateways", default=",".join(COMMANDS), help="packages with commas between")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    parts = arguments.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}: {', '.join(PARTS)}")
    packages = arguments.gateways.split(",")
    for package in packages:
        if package not in COMMANDS or not is_installed(package):
            parser.error(f"{package} is not installed, or no gateway: pip install smg==1.13.0 sglang-router==0.3.2")

    prompts = _shuffled("", TURNS, arguments.seed)
    others = _shuffled(" again", 2, arguments.seed)
    with ServerProcess("--num-threads", "2", "--max-total-tokens", str(2 * KV_TOKENS)) as one:
        outcomes = run_trace(one.http, prompts, {})
        alone = cached(outcomes)
        expected = {prompt: outcome.text for prompt, outcome in zip(prompts, outcomes, strict=True)}
        fresh = {prompt: outcome.text for prompt, outcome in zip(others, run_trace(one.http, others, {}), strict=True)}
    faults = []
    for package in packages:
        if "share" in parts:
            faults += share(package, prompts, expected, alone)
        if "kills" in parts:
            faults += kills(package, prompts, expected, arguments.seed)
        if "scale" in parts:
            faults += scale(package, expected, fresh, arguments.seed)
        if "cost" in parts:
            cost(package, prompts)
    for fault in faults:
        print(f"FAULT {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
