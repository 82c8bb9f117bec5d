"""A process of an engine: started in a group of its own, stopped while it waits, and ended with all that it started.

Owns signals and what a process group uses. Never knows what the process does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

END_WAIT_S = 10.0
_PR_SET_PDEATHSIG = 1
_TAIL_LINES = 4


class EngineError(Exception):
    """An engine that did not start, crashed, took too long, or answered something else; the message says which."""


class Child:
    """One running process group whose output goes to `log`.

    pipes: give it stdin and stdout as pipes, and only its errors to the log.
    Raises EngineError when there is no such program.
    """

    def __init__(
        self, command: Sequence[str], log: Path, *, env: Mapping[str, str] | None = None, pipes: bool = False
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.command = list(command)
        try:
            with log.open("wb") as file:
                self._process: subprocess.Popen[bytes] = subprocess.Popen(
                    self.command,
                    stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if pipes else file,
                    stderr=file,
                    env={**os.environ, **(env or {})},
                    start_new_session=True,  # a Ctrl-C of the terminal is for the driver alone
                    preexec_fn=_die_with_parent if sys.platform == "linux" else None,
                )
        except OSError as exc:
            raise EngineError(f"cannot be started: {exc}") from exc
        self.pid = self._process.pid
        self.is_paused = False

    @property
    def stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def check_alive(self) -> None:
        """Raises EngineError with the end of the log when the process has ended."""
        status = self._process.poll()
        if status is not None:
            raise EngineError(f"ended with {_status_words(status)}{self.log_tail()}")

    def log_tail(self) -> str:
        """The last lines of the log, as the end of a sentence; empty when there are none."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        said = [line.strip() for line in lines if line.strip()][-_TAIL_LINES:]
        return f": {' / '.join(said)}" if said else ""

    def pause(self) -> None:
        """Stop the whole group: an idle engine that spins would take from the one that is measured."""
        self.is_paused = self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)
        self.is_paused = False

    def resident_bytes(self) -> int:
        """Memory that the group holds, shared pages counted once by their share (proc_pid_smaps(5), Pss)."""
        return sum(_pss_bytes(pid) for pid in _group(self.pid))

    def end(self) -> None:
        """Ask the group to end, then end it. May be called again."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + END_WAIT_S
        while time.monotonic() < deadline:
            self._process.poll()
            if not _group(self.pid):
                break
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                _close(pipe)

    def _signal(self, number: signal.Signals) -> bool:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return False
        return True


def available_bytes() -> int:
    """Memory that can be had without swapping (proc_meminfo(5)); much where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 60
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 1 << 60)


def _close(pipe: Any) -> None:
    try:
        pipe.close()
    except OSError:  # what was not yet written has no reader
        return


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _status_words(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _group(group: int) -> list[int]:
    """The living processes of a group (proc_pid_stat(5)); zombies do not count."""
    pids = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            pids.append(int(entry.name))
    return pids


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
