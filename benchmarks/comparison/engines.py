"""An engine that runs, behind a server or in a worker process, and how it is asked for a workload.

Owns starting, asking, pausing and ending. Never decides which engine is asked when.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from comparison.child import Child, EngineError
from comparison.dialects import Dialect
from comparison.http_client import run_workload
from comparison.timing import TurnTimes, check_work, from_fields
from comparison.workloads import Workload

_POLL_S = 0.05


class RunningEngine(Protocol):
    """What the comparison needs of an engine. All methods raise EngineError."""

    child: Child

    def wait_ready(self, limit_s: float) -> dict[str, Any]:
        """Wait until it answers; facts about it."""
        ...

    def run(self, workload: Workload, limit_s: float) -> list[TurnTimes]:
        """All requests of `workload`, with its exact lengths."""
        ...


class ServerEngine:
    """A server on a port of this machine, asked over HTTP."""

    def __init__(self, child: Child, port: int, dialect: Dialect, facts: Mapping[str, Any]) -> None:
        self.child = child
        self._url = f"http://127.0.0.1:{port}"
        self._dialect = dialect
        self._facts = dict(facts)

    def wait_ready(self, limit_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + limit_s
        while True:
            self.child.check_alive()
            try:
                with urllib.request.urlopen(f"{self._url}{self._dialect.health}", timeout=2) as response:
                    if response.status == 200:
                        return self._facts
            except (urllib.error.URLError, OSError):
                pass  # not yet
            if time.monotonic() > deadline:
                raise EngineError(f"did not start within {limit_s:.0f} s{self.child.log_tail()}")
            time.sleep(_POLL_S)

    def run(self, workload: Workload, limit_s: float) -> list[TurnTimes]:
        self.child.check_alive()
        try:
            turns = asyncio.run(run_workload(self._url, self._dialect, workload, limit_s))
        except EngineError:
            self.child.check_alive()  # a crash explains more than a broken connection
            raise
        check_work(workload, turns)
        return turns


class WorkerEngine:
    """A process that runs an engine inside itself and speaks the lines of workers/protocol.py."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self._rest = b""

    def wait_ready(self, limit_s: float) -> dict[str, Any]:
        said = self._line(limit_s, "did not start")
        if not isinstance(said.get("ready"), dict):
            raise EngineError(f"said {said} instead of being ready")
        return dict(said["ready"])

    def run(self, workload: Workload, limit_s: float) -> list[TurnTimes]:
        asked = {
            "conversations": workload.conversations,
            "output_len": workload.output_len,
            "at_once": workload.at_once,
        }
        self.child.check_alive()
        try:
            self.child.stdin.write(json.dumps(asked).encode() + b"\n")
            self.child.stdin.flush()
        except OSError as exc:
            self.child.check_alive()
            raise EngineError(f"takes no more work: {exc}") from exc
        said = self._line(limit_s, "took too long")
        if "error" in said:
            raise EngineError(f"failed: {said['error']}")
        turns = [from_fields(fields) for fields in said.get("turns", [])]
        check_work(workload, turns)
        return turns

    def _line(self, limit_s: float, late: str) -> dict[str, Any]:
        """The next line. Raises EngineError when there is none in time."""
        deadline = time.monotonic() + limit_s
        out = self.child.stdout.fileno()
        while b"\n" not in self._rest:
            ready, _, _ = select.select([out], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise EngineError(f"{late} (more than {limit_s:.0f} s){self.child.log_tail()}")
            piece = os.read(out, 1 << 16)
            if not piece:
                time.sleep(_POLL_S)  # the pipe may end a moment before the process
                self.child.check_alive()
                raise EngineError(f"closed its output{self.child.log_tail()}")
            self._rest += piece
        line, self._rest = self._rest.split(b"\n", 1)
        try:
            said = json.loads(line)
        except ValueError as exc:
            raise EngineError(f"said what is not JSON: {line[:80]!r}") from exc
        if not isinstance(said, dict):
            raise EngineError(f"said {line[:80]!r}")
        return said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(
    command: Sequence[str], port: int, dialect: Dialect, log: Path, env: Mapping[str, str], facts: Mapping[str, Any]
) -> ServerEngine:
    return ServerEngine(Child(command, log, env=env), port, dialect, facts)


def start_worker(command: Sequence[str], log: Path, env: Mapping[str, str]) -> WorkerEngine:
    return WorkerEngine(Child(command, log, env=env, pipes=True))
