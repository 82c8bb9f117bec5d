"""Gateways as their packages bring them, in processes of their own, and a trace of prompts that shares prefixes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from server_process import PATIENCE_S, ServerProcess, wait_until

COMMANDS = {
    "smg": ("smg", "launch", "--disable-tokenizer-autoload", "--load-monitor-interval", "1"),
    "sglang_router": ("sglang_router.launch_router",),
}
"""By the package that is imported: how `python -m` starts it."""

NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
"""A gateway looks for its workers' tokenizer: never anywhere but on this machine."""

QUICK = (
    "--health-check-interval-secs", "1", "--health-success-threshold", "1", "--health-failure-threshold", "1",
    "--retry-max-retries", "10", "--retry-initial-backoff-ms", "200", "--retry-max-backoff-ms", "1000",
    "--cb-timeout-duration-secs", "1",
)  # fmt: skip
"""Notice within a second that a worker has gone or come back, and try for longer than that. What is default tries again
for less than a second, at the same dead worker, and takes a worker back a minute after its tenth failure."""


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class GatewayProcess:
    """Use as a context manager: leaving it ends the gateway, whatever state it is in.

    package: one of COMMANDS. api_key: what clients must send; the gateway sends it to its workers too. http: a client
    that sends it.
    """

    def __init__(
        self, package: str, *flags: str, worker_urls: Sequence[str] = (), policy: str, api_key: str | None = None
    ) -> None:
        module, *arguments = COMMANDS[package]
        self._command = [sys.executable, "-m", module, *arguments, "--policy", policy, *QUICK, *flags]
        if worker_urls:
            self._command += ["--worker-urls", *worker_urls]
        if api_key is not None:
            self._command += ["--api-key", api_key]
        self._key = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._num_workers = len(worker_urls)

    def __enter__(self) -> GatewayProcess:
        self._log = tempfile.TemporaryFile()
        try:
            # A port that was free may be another process' a moment later.
            if not any(self._start() for _ in range(3)):
                raise AssertionError(self.log)
            self.wait_for_workers(self._num_workers)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> bool:
        port, metrics_port = _free_ports()
        self.url = f"http://127.0.0.1:{port}"
        address = ["--host", "127.0.0.1", "--port", str(port)]
        metrics = ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)]
        self._process = subprocess.Popen(
            [*self._command, *address, *metrics],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, env={**os.environ, **NO_HUB},
            start_new_session=True,
        )  # fmt: skip
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_S, headers=self._key)
        wait_until(lambda: self._is_up() or self._process.poll() is not None, "the gateway answers")
        if self._process.poll() is None:
            return True
        self.http.close()
        return False

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _is_up(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/liveness").status_code == 200
        return False

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def workers(self) -> list[dict[str, Any]]:
        return self.http.get("/workers").json()["workers"]

    def healthy(self) -> set[str]:
        """URLs of the workers that it sends requests to."""
        return {worker["url"] for worker in self.workers() if worker["is_healthy"]}

    def wait_for_workers(self, number: int) -> None:
        """Until that many are registered and healthy, and no other is."""

        def is_so() -> bool:
            return len(self.workers()) == len(self.healthy()) == number

        try:
            wait_until(is_so, f"{number} workers")
        except AssertionError as exc:
            raise AssertionError(f"{exc}; the gateway says {self.workers()}\n{self.log[-4000:]}") from None

    def add(self, worker_url: str, **fields: Any) -> None:
        """Have a worker registered; it is used some moments later."""
        reply = self.http.post("/workers", json={"url": worker_url, **fields})
        assert reply.status_code == 202, reply.text

    def remove(self, worker_url: str) -> None:
        """Have a worker forgotten; requests that it has go on."""
        (worker,) = (worker for worker in self.workers() if worker["url"] == worker_url)
        reply = self.http.delete(f"/workers/{worker['id']}")
        assert reply.status_code == 202, reply.text


def _free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


@contextlib.contextmanager
def servers(number: int, *flags: str, env: Mapping[str, str] | None = None) -> Iterator[list[ServerProcess]]:
    """Servers of one thread each, started side by side."""
    started = [ServerProcess("--num-threads", "1", *flags, env=dict(env or {})) for _ in range(number)]
    with contextlib.ExitStack() as stack:
        for server in started:
            stack.callback(server.end)  # also those that another's failed start leaves behind
        yield [stack.enter_context(server) for server in started]


@dataclass(frozen=True)
class Prompt:
    """One of a grouped trace: a head that others of its group have too, and an end of its own."""

    group: int
    text: str


def grouped_trace(groups: int, turns: int, *, head_words: int, salt: str = "") -> list[Prompt]:
    """Every group once, then every group again, `turns` times. Heads differ from their first word on."""
    return [
        Prompt(group, f"{_HEADS[group % len(_HEADS)]}{group}{salt} {_head(group, head_words)} Question {turn}: why?")
        for turn in range(turns)
        for group in range(groups)
    ]


_HEADS = ("Radishes", "Winter", "Lanterns", "Music", "Harbours", "Numbers", "Cheese", "Trees")
_WORDS = ("stone", "river", "yellow", "cloud", "engine", "paper", "bread", "silver", "garden", "window")


def _head(group: int, words: int) -> str:
    return " ".join(_WORDS[(group * 7 + index * index + index // 3) % len(_WORDS)] for index in range(words))


def share_of_cached(metas: Sequence[Mapping[str, Any]]) -> float:
    """Of the prompts' tokens, those that came from a cache. metas: `meta_info` of the answers."""
    return sum(meta["cached_tokens"] for meta in metas) / sum(meta["prompt_tokens"] for meta in metas)
