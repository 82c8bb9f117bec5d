"""What rank 0 makes of ranks that end, with processes that only talk."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_rank import PART_BYTES

import mooli.engine.ranks as ranks_module
from mooli.batch import PageCopy, PromptLogprobRows, SamplingBatch, ScheduleBatch, StepOutput, TokenMasks
from mooli.config import EngineConfig
from mooli.engine import rank_process
from mooli.engine.ranks import RankedPages, RankedRunner, Ranks
from mooli.errors import ConfigError, EngineDeadError, EngineError

pytestmark = pytest.mark.slow

FAKE_RANK = str(Path(__file__).with_name("fake_rank.py"))
CONFIG = EngineConfig.from_kwargs(model_path="none", device="torch", tp_size=3)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """What is logged of planted faults is not worth showing."""
    caplog.set_level("CRITICAL", logger="mooli")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Two ranks beside this process that follow a scenario: start("obeys"), or start(code=…) for other programs."""
    made: list[Ranks] = []

    def start(scenario: str = "", *, code: str | None = None) -> Ranks:
        command = (FAKE_RANK, scenario) if code is None else ("-c", code)
        monkeypatch.setattr(ranks_module, "COMMAND", (sys.executable, *command))
        made.append(Ranks.start(CONFIG, Path("none")))
        return made[-1]

    yield start
    for ranks in made:
        ranks.close()


class Computes:
    """Rank 0's own part of a step."""

    def __init__(self, failure: BaseException | None = None) -> None:
        self.failure = failure
        self.steps = 0

    def execute(self, batch: ScheduleBatch) -> StepOutput:
        self.steps += 1
        if self.failure is not None:
            raise self.failure
        return StepOutput(np.empty(0, np.int32), [])


def a_step() -> ScheduleBatch:
    """With something in every field."""

    def ints(*values: int) -> np.ndarray:
        return np.array(values, np.int32)

    floats = np.array([0.5], np.float32)
    sampling = SamplingBatch(
        temperature=floats, top_k=ints(7), top_p=floats, min_p=floats, frequency_penalty=floats,
        presence_penalty=floats, repetition_penalty=floats, seeds=np.array([2**64 - 1], np.uint64),
        positions=np.array([2**40], np.int64), history_ids=ints(1, 2, 3), history_indptr=ints(0, 3),
        output_starts=ints(1), bias_ids=ints(4), bias_values=np.array([-np.inf], np.float32), bias_indptr=ints(0, 1),
        num_top=ints(-1), logprob_token_ids=[(5, 6)],
        masks=TokenMasks(np.array([[2**32 - 1, 7]], np.uint32), ints(0)),
    )  # fmt: skip
    return ScheduleBatch(
        3, ints(8, 9), ints(0, 1), ints(16, 17), ints(0), ints(0), ints(2), ints(1), ints(1, -1).reshape(1, 2),
        sampling, [PageCopy(1, 2, 3)], [PromptLogprobRows(0, 0, ints(9), 2, (1,))], rope_positions=ints(4, 4),
    )  # fmt: skip


def test_every_field_of_a_step_arrives() -> None:
    sent = a_step()
    frame = rank_process.encode(rank_process.Step(sent))
    got = rank_process.decode(frame[4:], rank_process.ToRank).batch
    for name in ScheduleBatch.__slots__:
        if name not in ("sampling", "prompt_logprobs"):
            np.testing.assert_array_equal(getattr(got, name), getattr(sent, name), err_msg=name)
    for name in SamplingBatch.__slots__:
        if name != "masks":
            np.testing.assert_array_equal(getattr(got.sampling, name), getattr(sent.sampling, name), err_msg=name)
    for name in TokenMasks.__slots__:
        np.testing.assert_array_equal(
            getattr(got.sampling.masks, name), getattr(sent.sampling.masks, name), err_msg=name
        )
    assert got.token_ids.dtype == np.int32
    assert got.token_ids.flags.writeable
    assert got.prompt_logprobs[0].token_ids == (1,)


def test_an_array_that_is_not_what_a_step_has_is_refused() -> None:
    wrong = a_step()
    wrong.positions = np.zeros(2, np.int64)
    frame = rank_process.encode(rank_process.Step(wrong))
    with pytest.raises(EngineError, match=r"no int32 array.*positions"):
        rank_process.decode(frame[4:], rank_process.ToRank)


def test_ranks_are_asked_and_told_in_turn_and_end_when_told(start) -> None:
    ranks = start("obeys")
    ranks.tell(rank_process.Load())
    assert [message.available_bytes for message in ranks.expect(rank_process.Loaded)] == [1000, 2000]
    own = Computes()
    RankedRunner(own, ranks).execute(a_step())
    assert own.steps == 1
    assert oct(ranks.store.parent.stat().st_mode)[-3:] == "700"
    ranks.stop()
    ranks.close()
    assert not ranks.store.parent.exists()
    assert [process.returncode for process in ranks._processes.values()] == [0, 0]


class OwnPages:
    """Rank 0's part."""

    def __init__(self) -> None:
        self.held: dict[int, bytes] = {}

    def read_pages(self, pages: list[int]) -> Any:
        return np.frombuffer(b"".join(self.held[page] for page in pages), np.uint8).reshape(-1, PART_BYTES)

    def write_pages(self, pages: list[int], data: Any) -> None:
        parts = data.tobytes()
        self.held.update((page, parts[at * PART_BYTES :][:PART_BYTES]) for at, page in enumerate(pages))


def test_pages_of_all_ranks_are_read_and_written_as_one(start) -> None:
    ranks, own = start("obeys"), OwnPages()
    pages = RankedPages(own, PART_BYTES, ranks)  # type: ignore[arg-type]
    data = bytes(range(4 * pages.page_bytes))
    pages.write_pages([7, 2, 5, 1], memoryview(data))
    assert own.held[7] == bytes([0, 1, 2]) and own.held[2] == bytes([9, 10, 11])
    assert pages.read_pages([7, 2, 5, 1]).tobytes() == data
    assert pages.read_pages([5]).tobytes() == data[18:27], "of each page the parts of all ranks, in their order"
    own.held.clear()
    with pytest.raises(EngineDeadError, match="rank 0 of 3 failed: KeyError"):
        pages.read_pages([5])


@pytest.mark.parametrize(
    ("scenario", "cause"),
    [
        ("killed", r"rank 2 of 3 was killed by signal 9 \(SIGKILL\)"),
        ("raises", r"rank 1 of 3 failed: RuntimeError: no such operation"),
    ],
)
def test_a_rank_that_breaks_down_is_named_with_its_cause_and_ends_all(start, scenario: str, cause: str) -> None:
    ranks = start(scenario)
    told: list[EngineDeadError] = []
    heard = threading.Event()
    ranks.watch(lambda error: (told.append(error), heard.set()))
    runner = RankedRunner(Computes(), ranks)
    runner.execute(a_step())
    assert heard.wait(60)
    with pytest.raises(EngineDeadError, match=cause):
        runner.execute(a_step())
    assert [str(error) for error in told] == [str(ranks._error)]
    late: list[EngineDeadError] = []
    ranks.watch(late.append)
    assert len(late) == 1
    assert all(process.wait(60) is not None for process in ranks._processes.values())


def test_a_failure_of_this_process_alone_is_rank_0s(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "BLAME_WAIT_S", 0.1)
    ranks = start("obeys")
    with pytest.raises(EngineDeadError, match="rank 0 of 3 failed: ValueError: planted"):
        RankedRunner(Computes(ValueError("planted")), ranks).execute(a_step())
    with pytest.raises(EngineDeadError, match="rank 0 of 3 failed: ValueError: planted"):
        RankedRunner(Computes(), ranks).execute(a_step())


def test_an_interruption_of_this_process_is_not_said_to_be_a_rank_out_of_memory(start) -> None:
    ranks = start("obeys")
    with pytest.raises(KeyboardInterrupt):
        RankedRunner(Computes(KeyboardInterrupt()), ranks).execute(a_step())
    ranks._listener.join(60)
    with pytest.raises(EngineDeadError, match=r"rank 0 of 3 was interrupted by KeyboardInterrupt"):
        RankedRunner(Computes(), ranks).execute(a_step())


def test_ranks_that_do_not_listen_are_killed(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "STOP_WAIT_S", 0.2)
    ranks = start("deaf")
    ranks.stop()
    ranks.close()
    assert [process.returncode for process in ranks._processes.values()] == [-9, -9]


FAILS = """
import socket, sys
from mooli.engine import rank_process as m
connection = socket.socket(fileno=int(sys.argv[1]))
rank = m.receive(connection, m.ToRank).rank
failed = m.Failed("ConfigError", "no device for me", is_consequence=False)
connection.sendall(m.encode(failed if rank == 2 else m.Opened()))
m.receive(connection, m.ToRank)
"""


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (FAILS, ConfigError, "rank 2 of 3 failed: no device for me"),
        ("import os; os.kill(os.getpid(), 11)", EngineDeadError, r"rank \d of 3 was killed by signal 11 \(SIGSEGV\)"),
        ("raise SystemExit(7)", EngineDeadError, r"rank \d of 3 has ended with exit status 7"),
    ],
    ids=["says why", "is killed", "exits"],
)
def test_a_rank_that_does_not_start_is_an_error_with_its_cause(start, code: str, kind: type, message: str) -> None:
    before = set(os.listdir(f"/proc/{os.getpid()}/fd"))
    with pytest.raises(kind, match=message):
        start(code=code)
    assert len(os.listdir(f"/proc/{os.getpid()}/fd")) <= len(before) + 1
