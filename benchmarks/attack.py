"""What a hostile client or model folder can do, in full: as `tests/attacks`, and how late others get their first token.

1. http: malformed requests. Each is refused, answered or cut, and the server goes on with the same answers.
2. models: mutated model folders. Each opens whole or raises a MooliError, at a bounded cost.
3. exhaustion: one client's attempts, each kept up for some seconds. Another client's first token may be at most 5 times
   as late as alone, and no process may grow past `MAX_GROWTH_MIB`.

    python benchmarks/attack.py [http] [models] [exhaustion] [--seconds 6] [--only NAME …] [-- flags of the server]

Times mean something on an idle machine only. Exit status 0 only if all of it holds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / name) for name in ("e2e", "attacks")]

import aiohttp  # noqa: E402
import exhaustion  # noqa: E402
import http_client  # noqa: E402
import malformed_http  # noqa: E402
import mutated_models  # noqa: E402
import open_models  # noqa: E402
from process_memory import Growth  # noqa: E402
from server_process import ServerProcess  # noqa: E402

MAX_LATER = 5.0
"""Times a first token may be as late as alone."""

PROMPT_TOKENS = 256
PAUSE_S = 0.1
ATTEMPTS_AT_ONCE = 2
ROUND_S = 20.0

SUITES = ("http", "models", "exhaustion")
CAPITAL = "The capital of France is"


def http(flags: list[str]) -> list[str]:
    found = []
    with ServerProcess("--read-timeout", "15", "--keep-alive-timeout", "15", *flags) as server:
        expected = server.generate(CAPITAL)["output_ids"]
        for family in malformed_http.FAMILIES:
            attacks = list(family())
            faults = http_client.faults(attacks, server.port)
            print(f"{family.__name__}: {len(attacks)} requests, {len(faults)} faults", flush=True)
            found += faults
            if server.generate(CAPITAL)["output_ids"] != expected:
                found.append(f"{family.__name__}: the server answers otherwise than before")
        if "Traceback" in server.log:
            found.append("a traceback in the log:\n" + server.log[server.log.index("Traceback") :][:3000])
    return found


def models() -> list[str]:
    found = []
    for family in mutated_models.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            mutations = list(family())
            faults = open_models.faults(mutations, Path(folder))
        print(f"{family.__name__}: {len(mutations)} folders, {len(faults)} faults", flush=True)
        found += faults
    return found


class Victim:
    """A client that asks for one answer after another, each to a prompt of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._rng = random.Random(0)

    async def first_tokens_s(self, end: float) -> list[float]:
        """How late they came, until `end`. Raises RuntimeError if one does not come."""
        times = []
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
            while time.perf_counter() < end:
                times.append(await self._first_token_s(session))
                await asyncio.sleep(PAUSE_S)
        return times

    async def _first_token_s(self, session: aiohttp.ClientSession) -> float:
        ids = [self._rng.randrange(1000, 20_000) for _ in range(PROMPT_TOKENS)]
        body = {"input_ids": ids, "stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
        began = time.perf_counter()
        async with session.post(f"{self._url}/generate", json=body) as answer:
            async for line in answer.content:
                if line.startswith(b"data: {") and b'"error"' not in line:
                    return time.perf_counter() - began
            raise RuntimeError(f"another client was answered with {answer.status}")


def exhaust(flags: list[str], seconds: float, only: list[str]) -> list[str]:
    found = []
    for name in only or exhaustion.ATTEMPTS:
        with ServerProcess("--max-total-tokens", "8192", *flags) as server:
            faults = one_attempt(server, name, seconds)
        found += [f"{name}: {fault}" for fault in faults]
    return found


def one_attempt(server: ServerProcess, name: str, seconds: float) -> list[str]:
    """A server of its own for each: what one leaves behind is not the next one's."""
    expected = server.generate(CAPITAL)["output_ids"]
    victim = Victim(server.url)
    alone = asyncio.run(victim.first_tokens_s(time.perf_counter() + 3))
    growth = Growth({"server": server.pid, "engine": server.engine_pid})
    command = [sys.executable, exhaustion.__file__, server.url, name, str(seconds)]
    attackers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=_give_way)
        for _ in range(ATTEMPTS_AT_ONCE)
    ]
    try:
        time.sleep(1)
        try:
            beside = asyncio.run(victim.first_tokens_s(time.perf_counter() + seconds))
        except (RuntimeError, OSError, asyncio.TimeoutError, aiohttp.ClientError) as exc:
            return [f"{type(exc).__name__}: {exc}"]
        faults = [f"the attempt was answered with {status}" for status in sorted(statuses_of(attackers))]
    finally:
        for attacker in attackers:
            attacker.kill()
            attacker.wait()
    later = max(beside) / statistics.median(alone)
    peaks = ", ".join(f"{process} +{mib:.0f} MiB" for process, mib in growth.peaks_mib().items())
    print(
        f"{name}: first token after {statistics.median(alone) * 1000:.0f} ms alone, beside it"
        f" {statistics.median(beside) * 1000:.0f} ms, at most {max(beside) * 1000:.0f} ms ({later:.1f} times); {peaks}",
        flush=True,
    )
    faults += growth.faults()
    if later > MAX_LATER:
        faults.append(f"another client's first token came {later:.1f} times as late as alone")
    if server.generate(CAPITAL)["output_ids"] != expected:
        faults.append("the server answers otherwise than before")
    if "Traceback" in server.log:
        faults.append("a traceback in the log:\n" + server.log[server.log.index("Traceback") :][:3000])
    return faults


def _give_way() -> None:
    """The client of an attack is on another machine, where it takes no processor from the server. Where the system
    shares processors between sessions, a process's own number counts inside its session only."""
    os.nice(19)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("19")


def statuses_of(attackers: list[subprocess.Popen[str]]) -> set[int]:
    """Those that no client may cause. A last round that does not end soon is not waited for."""
    found: set[int] = set()
    for attacker in attackers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            said, _ = attacker.communicate(timeout=ROUND_S)
            found.update(json.loads(said)["faults"])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)}; default: all")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--only", nargs="+", default=[], choices=list(exhaustion.ATTEMPTS), metavar="ATTEMPT")
    own = list(itertools.takewhile(lambda word: word != "--", sys.argv[1:]))
    args, flags = parser.parse_args(own), sys.argv[len(own) + 2 :]
    suites = args.suites or list(SUITES)
    if unknown := set(suites) - set(SUITES):
        parser.error(f"there is no {', '.join(sorted(unknown))}: use {', '.join(SUITES)}")
    found = []
    if "http" in suites:
        found += http(flags)
    if "models" in suites:
        found += models()
    if "exhaustion" in suites:
        found += exhaust(flags, args.seconds, args.only)
    print(json.dumps({"faults": len(found)}) if not found else "\n".join(["", f"{len(found)} faults:", *found]))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
