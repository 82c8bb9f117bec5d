"""The comparison's run with engines that answer, crash, hang and lie: each costs its own figures only."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import comparison.run as comparison_run
from comparison.catalogue import WORKERS, Variant
from comparison.child import Child, EngineError
from comparison.engines import RunningEngine, WorkerEngine, start_worker
from comparison.health import Reading
from comparison.results import Results
from comparison.run import Limits, ModelRun

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads process groups in /proc")

WORKER = """
import os, subprocess, sys, time
sys.path.insert(0, {workers!r})
from protocol import serve

def load():
    print("noise of a library")
    {at_load}
    def run(ledger):
        large = len(ledger.conversations) > 1
        conversation = ledger.begin()
        while conversation is not None:
            goes_on = True
            while goes_on:
                now = 0.01 * len(ledger.turns)  # said, not measured: no test depends on how fast a machine is
                count = ledger.output_len
                {at_run}
                goes_on = ledger.answered(conversation, [7] * count, now, now + 0.001, now + 0.002)
            conversation = ledger.begin()
    return {{"version": "1"}}, run
serve(load)
"""

LIMITS = Limits(start_s=60, run_s=60)


class SteadyGauge:
    def read(self) -> Reading:
        return Reading(ops_s=1e12, bytes_s=1e10, stolen_s=0.0)


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison_run, "SETTLE_S", 0.0)


def living() -> Iterator[list[str]]:
    """State, parent, group and more of each process that is no zombie (proc_pid_stat(5))."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    yield fields


@pytest.fixture
def pids() -> Iterator[list[int]]:
    """Of all started engines; after the test none may live."""
    started: list[int] = []
    yield started
    assert started
    assert not [stat for stat in living() if int(stat[2]) in started]


@pytest.fixture
def engine(tmp_path: Path, pids: list[int]) -> Callable[..., Variant]:
    """A variant whose worker does something at its start and something else before each answer."""

    def make(name: str, at_load: str = "pass", at_run: str = "pass") -> Variant:
        script = tmp_path / f"{name}.py"
        script.write_text(WORKER.format(workers=str(WORKERS), at_load=at_load, at_run=at_run))

        def start(log: Path) -> RunningEngine:
            engine = start_worker([sys.executable, str(script)], log, {})
            pids.append(engine.child.pid)
            return engine

        return Variant(name, "int4", 4, "in process", "1", start)

    return make


def run(
    tmp_path: Path, variants: list[Variant], *, workloads: list[str], rounds: int = 1, limits: Limits = LIMITS
) -> Results:
    results = Results({}, {}, "2030-01-01 00:00:00")
    said: list[str] = []
    model_run = ModelRun(
        "qwen", variants, results, SteadyGauge(), logs=tmp_path / "logs", limits=limits, scale=0.02, say=said.append
    )
    model_run.run(workloads, rounds, lambda: None)
    return results


def outcome(results: Results) -> dict[tuple[int, str, str], str | None]:
    return {(sample.round, sample.workload, sample.variant.split()[0]): sample.error for sample in results.samples}


def test_all_workloads_are_run_in_turns(tmp_path: Path, engine: Callable[..., Variant]) -> None:
    results = run(tmp_path, [engine("A"), engine("B")], workloads=["single", "random", "shared", "multiturn"], rounds=2)
    assert len(results.samples) == 16
    assert {sample.error for sample in results.samples} == {None}
    assert all(sample.figures and sample.figures["ms_per_token"] > 0 for sample in results.samples)
    facts = results.variants["qwen"]["A int4, in process"]
    assert facts.details == {"version": "1"}
    assert facts.resident_bytes
    assert facts.start_s


def test_an_engine_far_behind_does_a_workload_once(tmp_path: Path, engine: Callable[..., Variant]) -> None:
    slow = engine("slow", at_run="now *= 100 if large else 1")
    found = outcome(run(tmp_path, [slow, engine("A")], workloads=["single", "random"], rounds=3))
    assert {key for key in found if key[1:] == ("random", "slow")} == {(0, "random", "slow")}
    assert len(found) == 3 * 4 - 2 - 2  # `single` is large too


def test_an_engine_that_does_not_start_is_left_out_with_its_last_words(
    tmp_path: Path, engine: Callable[..., Variant]
) -> None:
    broken = engine("broken", at_load="sys.exit('no such instruction')")
    results = run(tmp_path, [broken, engine("A")], workloads=["single"])
    assert outcome(results) == {(0, "single", "A"): None}
    error = results.variants["qwen"]["broken int4, in process"].error
    assert error is not None
    assert "no such instruction" in error


def test_a_program_that_is_not_there_is_left_out(tmp_path: Path, engine: Callable[..., Variant]) -> None:
    gone = Variant("gone", "x", 4, "HTTP", "1", lambda log: WorkerEngine(Child(["/no/such/program"], log, pipes=True)))
    results = run(tmp_path, [gone, engine("A")], workloads=["single"])
    assert "cannot be started" in (results.variants["qwen"]["gone x, HTTP"].error or "")
    assert outcome(results) == {(0, "single", "A"): None}


def test_an_engine_that_crashes_is_started_again_for_the_next_workload_only(
    tmp_path: Path, engine: Callable[..., Variant]
) -> None:
    crashes = engine("crashes", at_run="os.abort() if len(ledger.conversations) == 16 else None")
    results = run(tmp_path, [crashes, engine("A")], workloads=["random", "single"], rounds=2)
    found = outcome(results)
    assert "SIGABRT" in (found.pop((0, "random", "crashes")) or "")
    assert (1, "random", "crashes") not in found
    assert set(found.values()) == {None}
    assert len(found) == 6


def test_an_engine_that_takes_too_long_is_ended(tmp_path: Path, engine: Callable[..., Variant]) -> None:
    hangs = engine("hangs", at_run="time.sleep(600 if large else 0)")
    results = run(tmp_path, [hangs, engine("A")], workloads=["random"], limits=Limits(60, 3))
    found = outcome(results)
    assert "took too long (more than 3 s)" in (found[0, "random", "hangs"] or "")
    assert found[0, "random", "A"] is None


@pytest.mark.parametrize(
    ("at_run", "said"),
    [
        ("count -= large", "answered 10 tokens with 1 instead of 10 with 2"),
        ("assert not large, 'out of pages'", "failed: AssertionError: out of pages"),
    ],
    ids=["too short", "an exception"],
)
def test_an_answer_that_is_not_the_work_is_no_sample(
    tmp_path: Path, engine: Callable[..., Variant], at_run: str, said: str
) -> None:
    results = run(tmp_path, [engine("A", at_run=at_run)], workloads=["random"])
    assert said in (outcome(results)[0, "random", "A"] or "")


def test_idle_engines_do_not_run(tmp_path: Path, engine: Callable[..., Variant]) -> None:
    beats = tmp_path / "beats"
    spin = f"import threading; threading.Thread(target=lambda: [(open({str(beats)!r}, 'a').write('x'), time.sleep(0.01)) for _ in range(10**6)], daemon=True).start()"  # noqa: E501

    counted = []

    def at_turn_of_a(log: Path) -> RunningEngine:
        first = beats.stat().st_size
        time.sleep(0.2)
        counted.append(beats.stat().st_size - first)
        return engine("A").start(log)

    run(tmp_path, [engine("spins", at_load=spin), Variant("A", "", 4, "", "", at_turn_of_a)], workloads=["single"])
    assert counted == [0]


def test_engines_are_ended_and_started_again_where_memory_is_short(
    tmp_path: Path, engine: Callable[..., Variant], pids: list[int]
) -> None:
    results = Results({}, {}, "2030-01-01 00:00:00")
    most = []

    def available() -> int:
        most.append(len({stat[2] for stat in living() if int(stat[2]) in pids}))
        return 0

    model_run = ModelRun(
        "qwen",
        [engine("A"), engine("B")],
        results,
        SteadyGauge(),
        logs=tmp_path,
        limits=LIMITS,
        scale=0.02,
        say=lambda line: None,
        available=available,
    )
    model_run.run(["single", "random"], 1, lambda: None)
    assert {sample.error for sample in results.samples} == {None}
    assert len(results.samples) == 4
    assert max(most) == 1
    assert len(pids) > 2


def test_what_an_engine_started_is_ended_with_it(tmp_path: Path, engine: Callable[..., Variant]) -> None:
    pid_file = tmp_path / "pid"
    starts = (
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time;"
        " signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'], start_new_session=False);"
        f" open({str(pid_file)!r}, 'w').write(str(child.pid))"
    )
    comparison_child = sys.modules["comparison.child"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison_child, "END_WAIT_S", 0.5)
        run(tmp_path, [engine("A", at_load=starts)], workloads=["single"])
    deadline = time.monotonic() + 60
    while is_running(int(pid_file.read_text())):  # one that was killed may be seen for a moment
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_interruption_ends_all_engines_and_keeps_what_finished(
    tmp_path: Path, engine: Callable[..., Variant]
) -> None:
    results = Results({}, {}, "2030-01-01 00:00:00")
    model_run = ModelRun(
        "qwen",
        [engine("A"), engine("B")],
        results,
        SteadyGauge(),
        logs=tmp_path,
        limits=LIMITS,
        scale=0.02,
        say=lambda line: None,
    )

    def saved() -> None:
        if len(results.samples) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model_run.run(["single", "random"], 2, saved)
    assert len(results.samples) == 3


def test_a_worker_that_says_something_else_is_an_error(tmp_path: Path) -> None:
    child = Child([sys.executable, "-c", "print('hello')"], tmp_path / "log", pipes=True)
    try:
        with pytest.raises(EngineError, match="not JSON"):
            WorkerEngine(child).wait_ready(20)
    finally:
        child.end()
