"""The run: all variants of a model started once, then asked in turns, one computing while the others are stopped.

Owns the order, and that a failing engine costs its own figures only. Never formats anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from comparison.catalogue import Variant
from comparison.child import EngineError, available_bytes
from comparison.engines import RunningEngine
from comparison.health import Reading
from comparison.results import EngineFacts, Results, Sample
from comparison.timing import figures
from comparison.workloads import SHAPES, WARM_UP, make_workload

ROOM_BYTES = 4 << 30
"""Of memory that must be free before an engine starts or has its turn: others are ended until it is."""

SETTLE_S = 0.2
"""Between the end of one engine's turn and the gauge."""

FAR_BEHIND = 4.0
"""An engine that needed this many times the fastest one's time for a workload does it once, not in every round: it is
nobody's best peer, and its turns would take most of the run."""


class Gauges(Protocol):
    def read(self) -> Reading: ...


@dataclass(frozen=True)
class Limits:
    """Seconds: start_s to be ready with the first answer, run_s for one workload."""

    start_s: float
    run_s: float


def order(variants: Sequence[str], workloads: Sequence[str], rounds: int) -> Iterator[tuple[int, str, str]]:
    """(round, workload, variant): in each round each workload goes round all variants, beginning one later each time,
    so that no variant is always the first."""
    turn = 0
    for number in range(rounds):
        for workload in workloads:
            for place in range(len(variants)):
                yield number, workload, variants[(turn + place) % len(variants)]
            turn += 1


class ModelRun:
    """One model's variants. A variant that failed at a workload is not asked for that again; it is started anew for the
    next one, and left out when that fails. One that is far behind at a workload does it in one round only."""

    def __init__(
        self,
        model: str,
        variants: Sequence[Variant],
        results: Results,
        gauge: Gauges,
        *,
        logs: Path,
        limits: Limits,
        scale: float = 1.0,
        say: Callable[[str], None] = print,
        available: Callable[[], int] = available_bytes,
    ) -> None:
        self._available = available
        self._model, self._results, self._gauge = model, results, gauge
        self._variants = {variant.key: variant for variant in variants}
        self._logs, self._limits, self._scale, self._say = logs, limits, scale, say
        self._running: dict[str, RunningEngine] = {}
        self._given_up: set[tuple[str, str]] = set()
        self._wall_s: dict[str, dict[str, float]] = {}  # by workload, then variant: the first round's
        self._facts = results.variants.setdefault(model, {})

    def run(self, workloads: Sequence[str], rounds: int, saved: Callable[[], None]) -> None:
        """All rounds; `saved` is called after every sample. Every process is ended, also when this is interrupted."""
        try:
            for key in self._variants:
                self._start(key)
                saved()
            for number, workload, key in order(list(self._variants), workloads, rounds):
                self._measure(number, workload, key)
                saved()
        finally:
            self.close()

    def close(self) -> None:
        for key in list(self._running):
            self._end(key)

    def _start(self, key: str) -> None:
        """Start a variant, have it answer once, and stop it until its turn."""
        variant = self._variants[key]
        facts = EngineFacts(variant.engine, variant.weights, variant.bits, variant.through, variant.version)
        log = self._logs / f"{self._model}-{key}.log".replace(" ", "_").replace("/", "_").replace(",", "")
        warm_up = make_workload("warm-up", WARM_UP, seed=len(self._facts))
        self._make_room(key)
        try:
            began = time.perf_counter()
            engine = self._running[key] = variant.start(log)
            details = engine.wait_ready(self._limits.start_s)
            engine.run(warm_up, self._limits.start_s)
            start_s = time.perf_counter() - began
            facts = replace(facts, start_s=start_s, resident_bytes=engine.child.resident_bytes(), details=details)
            engine.child.pause()
            self._say(f"{self._model}: {key} started in {start_s:.1f} s")
        except EngineError as exc:
            facts = replace(facts, error=str(exc))
            self._end(key)
            self._say(f"{self._model}: {key} left out: {exc}")
        before = self._facts.get(key)
        # the first start counts: a later one finds its files in memory
        self._facts[key] = before if before is not None and facts.error is None else facts

    def _measure(self, number: int, workload: str, key: str) -> None:
        if (key, workload) in self._given_up or self._facts[key].error or self._is_far_behind(workload, key):
            return
        if key not in self._running:
            self._start(key)
        engine = self._running.get(key)
        if engine is None:
            return
        self._make_room(key)
        work = make_workload(workload, SHAPES[workload], seed=number, scale=self._scale)
        before = self._gauge.read()
        got, error = None, None
        try:
            engine.child.resume()
            engine.run(make_workload("warm-up", WARM_UP, seed=1_000_000 + number), self._limits.run_s)
            got = figures(work, engine.run(work, self._limits.run_s))
            engine.child.pause()
        except EngineError as exc:
            error = str(exc)
            self._given_up.add((key, workload))
            self._end(key)
        else:
            self._wall_s.setdefault(workload, {}).setdefault(key, got["wall_s"])
        time.sleep(SETTLE_S)
        after = self._gauge.read()
        sample = Sample(self._model, key, workload, number, before.fields(), after.fields(), got, error)
        self._results.samples.append(sample)
        said = error or ", ".join(f"{name} {value:.4g}" for name, value in (got or {}).items())
        self._say(f"{self._model}: round {number + 1}, {workload}, {key}: {said}")

    def _is_far_behind(self, workload: str, key: str) -> bool:
        """Whether it has done this workload and no further sample of it could matter."""
        took = self._wall_s.get(workload, {})
        return key in took and took[key] > FAR_BEHIND * min(took.values())

    def _make_room(self, key: str) -> None:
        """End others, the fastest to start again first, while memory for this one's turn is short."""
        while self._available() < ROOM_BYTES and (others := [other for other in self._running if other != key]):
            quickest = min(others, key=lambda other: self._facts[other].start_s or 0.0)
            self._say(f"{self._model}: {quickest} ended to make room, until its turn")
            self._end(quickest)

    def _end(self, key: str) -> None:
        engine = self._running.pop(key, None)
        if engine is not None:
            engine.child.end()
