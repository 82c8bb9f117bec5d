"""Where a probe looks, and how it runs a program that may crash, hang or print without end.

Owns the paths, the environment and the limits, so that a test can put another machine in their place; the steps that
`child.py` takes in another process, seen from this side: the reading of its lines and the second process after a crash.
Never says what anything means, and never imports what is examined.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_OUTPUT_BYTES = 1 << 20
MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """A machine to examine.

    root: of its files. environ: of the programs that are run, and what set_env.sh has left there. python: the
    interpreter that imports torch. timeout_s: seconds that a tool such as npu-smi gets; import_timeout_s: those of an
    import, which on a cold disk takes its time.
    """

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    python: str = sys.executable
    timeout_s: float = 20.0
    import_timeout_s: float = 120.0

    def path(self, absolute: str) -> Path:
        """A path of the machine as it is written there, under `root`."""
        return self.root / absolute.lstrip("/")

    def text(self, path: Path) -> str | None:
        """The beginning of a file, or None where it cannot be read."""
        try:
            if not path.is_file():
                return None
            with path.open("rb") as file:
                return file.read(MAX_FILE_BYTES).decode("utf-8", "replace")
        except (OSError, ValueError):
            return None

    def program(self, name: str, *folders: str) -> str | None:
        """Where a program is: on PATH, else in one of `folders`."""
        found = shutil.which(name, path=self.environ.get("PATH", os.defpath))
        if found is None and folders:
            found = shutil.which(name, path=os.pathsep.join(str(self.path(folder)) for folder in folders))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """How a program ended. status: its exit status, negative for a signal, None if it did not start or was stopped.

    trouble: why it was stopped or did not start, else empty.
    """

    status: int | None
    output: str
    errors: str
    trouble: str = ""

    def ending(self) -> str:
        """In words, for somebody who wonders why there is no answer."""
        if self.trouble:
            return self.trouble
        if self.status is not None and self.status < 0:
            with contextlib.suppress(ValueError):
                return f"killed by {signal.Signals(-self.status).name}"
            return f"killed by signal {-self.status}"
        return f"exit status {self.status}"


def run_program(command: Sequence[str], environ: Mapping[str, str], timeout_s: float) -> Ran:
    """Run to the end, or stop it, and all it has started, after `timeout_s` seconds or MAX_OUTPUT_BYTES of output."""
    try:
        process = subprocess.Popen(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except (OSError, ValueError) as exc:
        return Ran(status=None, output="", errors="", trouble=f"it does not start: {exc}")
    try:
        output, trouble = _read_until(process, time.monotonic() + timeout_s, timeout_s)
        status = None if trouble else process.returncode
    finally:
        _stop(process)
    return Ran(
        status=status,
        output=output[0].decode("utf-8", "replace"),
        errors=output[1].decode("utf-8", "replace"),
        trouble=trouble,
    )


def _read_until(process: subprocess.Popen[bytes], deadline: float, timeout_s: float) -> tuple[list[bytearray], str]:
    received, trouble = [bytearray(), bytearray()], ""
    with selectors.DefaultSelector() as selector:
        for index, stream in enumerate((process.stdout, process.stderr)):
            if stream is not None:
                selector.register(stream, selectors.EVENT_READ, index)
        while selector.get_map() and not trouble:
            if time.monotonic() >= deadline:
                trouble = f"no answer within {timeout_s:g} s"
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                received[key.data] += chunk
            if sum(map(len, received)) > MAX_OUTPUT_BYTES:
                trouble = f"it prints more than {MAX_OUTPUT_BYTES} bytes"
    if not trouble:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            trouble = f"no end within {timeout_s:g} s"
    return [part[:MAX_OUTPUT_BYTES] for part in received], trouble


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole session. A process that hangs in a driver cannot be ended: it is left behind, not waited for."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(2)
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


# -- steps in another process ------------------------------------------------------------------------------------------

_CHILD = Path(__file__).with_name("child.py")
_TAIL = 2000

MAX_CRASHES = 3
"""After so many processes that crash or hang the rest is not tried: it would only take time."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """value: what the step gave. error: why it gave nothing, else empty; is_crash: it took its process along."""

    step: str
    value: Any = None
    error: str = ""
    is_crash: bool = False

    @property
    def ok(self) -> bool:
        return not self.error


def run_steps(
    surroundings: Surroundings, steps: Sequence[str], *, environ: Mapping[str, str] | None = None, go_on: bool = False
) -> dict[str, StepResult]:
    """The result of every step by its text. After a crash the steps behind it get a new process if `go_on`, else they
    are not tried. environ: laid over the surroundings' own."""
    results: dict[str, StepResult] = {}
    left, crashes = list(steps), 0
    while left and crashes < (MAX_CRASHES if go_on else 1):
        ran = run_program(
            [surroundings.python, str(_CHILD), *left],
            {**surroundings.environ, **(environ or {})},
            surroundings.import_timeout_s,
        )
        done = parse_lines(ran, left)
        results.update({result.step: result for result in done})
        left, crashes = left[len(done) :], crashes + 1
    for step in left:
        results[step] = StepResult(step, error="not tried: what comes before it crashes")
    return results


def parse_lines(ran: Ran, steps: Sequence[str]) -> list[StepResult]:
    """Results of the first of `steps`, at least of one, from what the child printed; the last may be the crash."""
    ends: dict[str, dict[str, Any]] = {}
    for text in ran.output.splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("end"), str):
            ends[line["end"]] = line
    results: list[StepResult] = []
    for step in steps:
        line = ends.get(step, {})
        if not line:
            said = ran.errors.strip()[-_TAIL:]
            why = f"{ran.ending()}{f': {said}' if said else ''}"
            return [*results, StepResult(step, error=why, is_crash=True)]
        results.append(StepResult(step, value=line.get("value"), error=str(line.get("error") or "")))
    return results
