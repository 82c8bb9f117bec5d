"""Steps in another process, and what became of each: `child.py` seen from this side.

Owns the reading of its lines and the second process after a crash. Never imports what is examined.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mooli.doctor.surroundings import Ran, Surroundings, run_program

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
