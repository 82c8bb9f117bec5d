"""What of a request is loaded from disk and what is written there, case by case, with the fake model."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disk_fakes import ChosenEven, ErraticIO, MemoryStore
from mooli.cache.kv_cache import KVCache
from mooli.cache.match_end import MissReason
from mooli.cache.page_moves import pages_there, put_pages
from mooli.cache.radix_tree import token_key
from mooli.cache.request_pages import Given
from mooli.cache.states import StateRoom
from mooli.cache.store.page_store import PageStore, StoredPage
from mooli.cache.store_io import Piece, StoreIO
from mooli.engine.core import EngineCore
from mooli.errors import EngineError
from mooli.runner.fake import FakeRunner
from mooli.scheduler import speed, write_behind
from mooli.scheduler.disk_tier import DiskTier
from mooli.scheduler.request_state import RequestState
from mooli.scheduler.scheduler import Scheduler
from mooli.scheduler.speed import BreakEven
from mooli.scheduler.stats import StepStats
from mooli.types import Pin, Request, RequestOutput, SamplingParams

PAGE = 4
VOCAB = 50
PAGE_BYTES, STATE_BYTES = 8 * PAGE, 8
LONG = [(7 * at) % VOCAB for at in range(203)]
"""50 full pages: as many as may be loaded, as one token is computed."""


class ManualIO(ErraticIO):
    """Brings what it is told to."""

    def __init__(self, store: MemoryStore, states: MemoryStore | None = None) -> None:
        super().__init__(store, random.Random(0), failure_rate=0.0, speed=1.0, loss_rate=0.0, states=states)
        self.arriving: list[Piece] = []

    @property
    def has_arrived(self) -> bool:
        return bool(self.arriving)

    def take(self) -> list[Piece]:
        taken, self.arriving = self.arriving, []
        return taken

    def deliver(self, number: int, count: int, *, fails: bool = False) -> None:
        first, digests, tokens, state = self._loads[number]
        payloads = self.store.read(digests[:count], tokens[:count])
        is_last = fails or (count >= len(digests) and state is None)
        self.arriving.append(Piece(number, first, len(payloads), b"".join(payloads), is_last, 0.001))
        self._loads[number] = (first + count, digests[count:], tokens[count:], state)

    def deliver_state(self, number: int) -> None:
        first, _, _, state = self._loads[number]
        self.arriving.append(self._state_piece(number, first, state))

    def append(self, pages: Sequence[StoredPage]) -> None:
        self.store.append(pages)

    def cancel(self, number: int) -> None:
        self.num_cancelled += 1


class Placed:
    """An engine of the fake model with a disk. io: made of a store in memory unless one is given. states: the model has
    recurrent layers, whose states are stored there. snapshots: as many are kept in memory, at least every 40 tokens."""

    def __init__(
        self,
        store: MemoryStore | None = None,
        io: Any = None,
        *,
        num_pages: int = 100,
        even: BreakEven | None = None,
        gives_nan: Callable[[list[int]], bool] | None = None,
        chunk: int = 512,
        states: MemoryStore | None = None,
        snapshots: int = 20,
    ) -> None:
        self.store = store or MemoryStore(PAGE)
        self.io = io or ManualIO(self.store, states)
        has_states = states is not None
        room = StateRoom(8, 0, snapshots, 40) if has_states else None
        num_states = 0 if room is None else room.num_slots
        self.runner = FakeRunner(num_pages, PAGE, VOCAB, gives_nan=gives_nan, num_states=num_states)
        self.cache = KVCache(num_pages, PAGE, states=room, retention_share=0.5)
        self.scheduler = Scheduler(
            self.cache, max_batch_tokens=chunk, max_running_requests=8, context_length=1000, vocab_size=VOCAB
        )
        self.even = even or ChosenEven()
        clock = self.io.clock if isinstance(self.io, ErraticIO) else None
        options: dict[str, Any] = {} if clock is None else {"clock": clock}
        options["state_bytes"] = STATE_BYTES if has_states else 0
        self.tier = DiskTier(self.cache, self.io, self.runner, PAGE_BYTES, bytes(32), self.even, **options)
        self.scheduler.attach_disk(self.tier)
        self.core = EngineCore(self.scheduler, self.runner)
        self.outputs: dict[str, list[RequestOutput]] = {}

    def add(self, rid: str, ids: Sequence[int], count: int = 2, **options: Any) -> None:
        sampling = SamplingParams(max_new_tokens=count, temperature=0.0)
        self.core.add(Request(rid=rid, prompt_ids=np.array(ids, np.int32), sampling=sampling, **options))

    def step(self) -> None:
        for output in self.core.step():
            self.outputs.setdefault(output.rid, []).append(output)
        self.core.check()

    def run(self, rid: str | None = None, ids: Sequence[int] = (), **options: Any) -> list[int]:
        """Until nothing is to be done; the tokens of the request that is added first."""
        if rid is not None:
            self.add(rid, ids, **options)
        while self.core.has_work:
            self.step()
        return self.tokens(rid) if rid is not None else []

    def tokens(self, rid: str) -> list[int]:
        return [token for output in self.outputs[rid] for token in output.new_token_ids]

    def last(self, rid: str) -> RequestOutput:
        return self.outputs[rid][-1]

    def state(self, rid: str) -> RequestState:
        return self.scheduler._states[rid]

    def ends(self) -> dict[str, MissReason | None]:
        """Why requests found no more, as they begin from now on."""
        ends: dict[str, MissReason | None] = {}
        began = self.tier.began

        def noted(state: RequestState) -> None:
            began(state)
            assert state.match_end is not None
            ends[state.rid] = state.match_end.reason

        self.tier.began = noted  # type: ignore[method-assign]
        return ends


@pytest.fixture
def store() -> MemoryStore:
    """What an engine has left there that computed LONG and two tokens more."""
    return filled(LONG)


def filled(ids: Sequence[int]) -> MemoryStore:
    engine = Placed()
    engine.run("a", ids)
    engine.tier.close(60.0)
    return engine.store


COLD = Placed().run("cold", LONG)


# -- what is written ---------------------------------------------------------------------------------------------------
def test_a_long_sequence_is_written_behind_the_steps_heads_first() -> None:
    engine = Placed()
    engine.add("a", LONG, 40)
    engine.step()
    engine.step()
    written = len(engine.store.pages)
    assert written == 50, "its prompt is safe as soon as its first token is there"
    engine.run()
    engine.tier.close(60.0)
    pages = list(engine.store.pages.values())
    assert len(pages) == 60 and [page.position for page in pages] == list(range(60))
    assert all(page.parent == before.digest for before, page in pairwise(pages))
    assert engine.core.stats()["stored_tokens"] == 240


def test_a_short_sequence_is_written_when_it_is_used_again_or_at_the_end() -> None:
    engine = Placed()
    engine.run("a", LONG[:30])
    assert not engine.store.pages
    engine.run("b", [*LONG[:21], 1])
    assert len(engine.store.pages) == 5, "the pages that were found"
    engine.tier.close(60.0)
    assert len(engine.store.pages) == 7, "all that is warm"


def test_what_is_retained_is_written_first_at_the_end() -> None:
    engine = Placed()
    engine.run("a", [1, *LONG[:20]], pins=(Pin(60),))
    engine.run("b", [2, *LONG[:20]])
    engine.tier.close(60.0)
    first, *_ = engine.store.pages.values()
    assert np.frombuffer(first.tokens, "<i4")[0] == 1 and len(engine.store.pages) == 10


def test_a_request_can_be_kept_off_the_disk() -> None:
    engine = Placed()
    engine.run("a", LONG, no_store=True)
    engine.run("b", [3, *LONG], no_store=True)
    engine.run("c", [*LONG[:170], 3])  # the same beginning, without that wish
    engine.tier.close(60.0)
    assert len(engine.store.pages) == 43


def test_other_salts_are_other_pages() -> None:
    engine = Placed(filled(LONG))
    engine.run("a", LONG, namespace="salt")
    assert engine.last("a").cached_tokens == 0 and engine.io.num_loads == 0
    engine.tier.close(60.0)
    assert len(engine.store.pages) == 102


def test_a_queue_that_is_full_leaves_pages_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_behind, "MOST_SAVES", 0)
    engine = Placed()
    engine.run("a", LONG)
    engine.run("b", LONG)
    assert not engine.store.pages
    engine.tier.close(60.0)
    assert len(engine.store.pages) == 51


def test_pages_are_copied_out_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_behind, "PIECE_BYTES", 3 * PAGE_BYTES)
    engine, counts = Placed(), []
    read_pages = engine.runner.read_pages
    engine.tier.behind._pages = engine.runner
    engine.runner.read_pages = lambda pages: counts.append(len(pages)) or read_pages(pages)  # type: ignore
    engine.run("a", LONG)
    assert sum(counts) == 51 and max(counts) == 3


def test_what_left_the_tree_is_not_written_and_its_tail_neither() -> None:
    engine = Placed(num_pages=60)
    engine.add("a", LONG)
    engine.io.append = lambda pages: None  # type: ignore[method-assign]
    engine.step()  # computed
    del engine.io.append
    engine.step()
    engine.cache.evict(60)
    engine.run()
    engine.tier.close(60.0)
    positions = [page.position for page in engine.store.pages.values()]
    assert positions == list(range(len(positions)))


def test_nothing_is_written_where_loading_never_pays() -> None:
    engine = Placed(even=ChosenEven(math.inf))
    engine.run("a", LONG)
    engine.run("b", LONG)
    engine.tier.close(60.0)
    assert not engine.store.pages


# -- what is loaded ----------------------------------------------------------------------------------------------------
def test_a_request_waits_for_its_own_pages_only_and_goes_on_from_them(store: MemoryStore) -> None:
    engine = Placed(store)
    ends = engine.ends()
    engine.add("a", LONG)
    engine.step()
    assert not engine.core.has_work and engine.state("a").waited_for == "loading"
    engine.run("b", [9, 8, 7])
    assert engine.last("b").finish is not None and engine.state("a").pages is None
    engine.io.deliver(1, 20)
    engine.step()
    assert engine.cache.num_tree_pages >= 20 and engine.state("a").pages is None
    engine.io.deliver(1, 100)
    assert engine.run() == [] and engine.tokens("a") == COLD
    assert (engine.last("a").cached_tokens, engine.last("a").loaded_tokens) == (200, 200)
    assert engine.core.stats()["loaded_tokens"] == 200 and ends["a"] is MissReason.NEW
    engine.run("c", LONG)
    assert (engine.last("c").cached_tokens, engine.last("c").loaded_tokens) == (202, 0)
    assert store.num_touched >= 50


def test_several_that_need_the_same_pages_wait_for_one_load(store: MemoryStore) -> None:
    engine = Placed(store)
    for number in range(5):
        engine.add(f"r{number}", [*LONG[: 150 + 10 * number], number])
    engine.add("longer", LONG)
    engine.step()
    assert engine.io.num_loads == 1
    engine.io.deliver(1, 20)
    engine.step()
    engine.add("later", [*LONG[:150], 11])  # a part of it is there, the rest on its way
    engine.step()
    assert engine.io.num_loads == 1
    engine.io.deliver(1, 100)
    for number in range(2, 8):
        engine.step()
        if number in engine.io._loads:
            engine.io.deliver(number, 100)
    engine.run()
    assert engine.tokens("longer") == COLD and engine.io.num_loads <= 6
    assert sum(engine.last(rid).loaded_tokens for rid in engine.outputs) == 200


def test_pages_that_others_have_computed_meanwhile_stay_and_the_rest_comes_behind_them(store: MemoryStore) -> None:
    engine = Placed(store)
    engine.add("a", LONG)
    engine.step()
    engine.run("b", LONG[:46], logprob_start=0)  # which must compute its prompt itself
    assert engine.cache.num_tree_pages >= 11 and engine.state("a").pages is None
    engine.io.deliver(1, 100)
    engine.run()
    assert engine.tokens("a") == COLD and engine.core.stats()["loaded_tokens"] == (50 - 11) * PAGE


def test_a_request_that_is_aborted_while_it_waits_ends_at_once_and_others_load(store: MemoryStore) -> None:
    engine = Placed(store)
    engine.add("a", LONG)
    engine.add("b", LONG)
    engine.step()
    engine.core.abort("a")
    engine.step()
    assert engine.last("a").finish is not None and engine.io.num_cancelled == 1 and engine.io.num_loads == 2
    engine.io.deliver(1, 5)  # of the load that nobody wants any more
    engine.io.deliver(2, 100)
    engine.run()
    assert engine.tokens("b") == COLD and engine.last("b").loaded_tokens == 200
    engine.add("c", [1, *LONG])
    engine.tier.close(60.0)  # with requests open


@pytest.mark.parametrize("come", [0, 20])
def test_a_load_that_is_late_is_not_waited_for_and_what_came_is_used(store: MemoryStore, come: int) -> None:
    engine = Placed(store)
    ends = engine.ends()
    engine.add("a", LONG)
    engine.step()
    if come:
        engine.io.deliver(1, come)
    engine.io.now += 10.0
    engine.core.look_again()
    engine.run()
    assert engine.tokens("a") == COLD and engine.last("a").loaded_tokens == come * PAGE
    assert ends["a"] is MissReason.LOAD_FAILED and engine.core.stats()["failed_loads"] == 1
    engine.io.deliver(1, 100)
    engine.step()


def test_what_cannot_be_read_is_computed(store: MemoryStore) -> None:
    engine = Placed(store)
    ends = engine.ends()
    engine.add("a", LONG)
    engine.step()
    engine.io.deliver(1, 3, fails=True)
    engine.run()
    assert engine.tokens("a") == COLD and engine.last("a").loaded_tokens == 12
    assert ends["a"] is MissReason.LOAD_FAILED


def test_a_disk_that_hangs_is_not_asked(store: MemoryStore) -> None:
    engine = Placed(store)
    ends = engine.ends()
    engine.io.is_stuck = True
    assert engine.run("a", LONG) == COLD
    assert engine.io.num_loads == 0 and ends["a"] is MissReason.LOAD_FAILED


def test_a_load_that_would_take_longer_than_computing_is_not_begun(store: MemoryStore) -> None:
    engine = Placed(store, even=ChosenEven(201.0))
    ends = engine.ends()
    assert engine.run("a", LONG) == COLD
    assert engine.io.num_loads == 0 and ends["a"] is MissReason.JUDGED_SLOWER
    told = engine.outputs["a"][0].cache_end
    assert told is not None and (told.reason, told.num_tokens) == ("judged slower", 0)
    assert told.num_lost == len(LONG) // PAGE * PAGE, "of what is on disk"
    assert engine.core.stats()["slower_loads"] == 1


def test_pages_that_the_pool_cannot_take_are_not_read(store: MemoryStore) -> None:
    engine = Placed(store, num_pages=55)
    engine.add("others", [8] * 60, 100)
    engine.step()
    engine.add("a", [*LONG[:150], 7])
    engine.step()
    if engine.io.num_loads:
        assert len(engine.io._loads[1][1]) <= 40
        engine.io.deliver(1, 100)
    engine.run()
    assert engine.last("a").finish is not None


def test_nan_that_came_from_disk_leaves_the_tree_and_the_disk(store: MemoryStore) -> None:
    bad = [True]
    engine = Placed(store, gives_nan=lambda context: bad[0] and context[:4] == LONG[:4])
    engine.add("a", LONG)
    engine.step()
    engine.io.deliver(1, 100)
    engine.run()
    finish = engine.last("a").finish
    assert finish is not None and finish.err_type == "NaNError"
    assert engine.cache.num_tree_pages == 0 and not store.pages
    bad[0] = False
    assert engine.run("b", LONG) == COLD and engine.last("b").cached_tokens == 0


def test_what_gave_nan_is_never_written() -> None:
    engine = Placed(gives_nan=lambda context: len(context) > 100, chunk=20)
    engine.run("a", LONG)
    engine.tier.close(60.0)
    assert not engine.store.pages


def test_a_device_that_fails_in_between_ends_no_request(store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    engine = Placed(store)

    def broken(*_: Any) -> None:
        raise EngineError("a device that fails")

    engine.runner.write_pages = broken  # type: ignore[method-assign]
    engine.runner.read_pages = broken  # type: ignore[method-assign, assignment]
    engine.add("a", LONG)
    engine.step()
    engine.io.deliver(1, 100)
    engine.run()
    engine.run("b", [1, *LONG])
    engine.run("c", [2, *LONG])
    engine.cache.evict(100)
    engine.run("d", LONG)
    engine.tier.close(60.0)
    assert engine.tokens("a") == engine.tokens("d") == COLD and len(store.pages) == 51
    assert engine.io.num_loads == 1
    assert sum("a device that fails" in record.message for record in caplog.records) == 2


# -- with threads and files --------------------------------------------------------------------------------------------
def on_files(folder: Path, *, has_states: bool = False) -> tuple[Placed, threading.Semaphore]:
    stores = [
        PageStore.open(folder, bytes([kind]) * 32, page_tokens=PAGE, page_bytes=num_bytes, max_bytes=1 << 24)
        for kind, num_bytes in enumerate([PAGE_BYTES, STATE_BYTES] if has_states else [PAGE_BYTES])
    ]
    io, woken = StoreIO(stores[0], PAGE_BYTES, *stores[1:]), threading.Semaphore(0)
    engine = Placed(io=io, even=ChosenEven(patience=1e6), states=MemoryStore(PAGE) if has_states else None)

    def wake() -> None:
        woken.release()

    engine.core.bind_disk(wake)
    return engine, woken


def run_awake(engine: Placed, woken: threading.Semaphore) -> None:
    """As a loop does that sleeps while there is nothing to do."""
    while engine.scheduler.has_requests or engine.core.has_work:
        if engine.core.has_work:
            engine.step()
        else:
            assert woken.acquire(timeout=60), "nobody wakes an engine that waits for its disk"
            engine.core.look_again()


def test_an_engine_finds_what_the_one_before_left(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    for number in range(3):
        engine, woken = on_files(folder)
        engine.add("a", LONG)
        run_awake(engine, woken)
        assert engine.tokens("a") == COLD
        assert engine.last("a").loaded_tokens == (200 if number else 0)
        engine.core.close_disk()


def test_no_step_waits_for_a_disk_that_does_not_answer(tmp_path: Path) -> None:
    class Slow(MemoryStore):
        """Neither reads nor writes before it is let."""

        def __init__(self) -> None:
            super().__init__(PAGE)
            self.let = threading.Event()

        def read(self, digests: Sequence[bytes], tokens: Sequence[bytes]) -> list[bytes]:
            assert self.let.wait(60)
            return super().read(digests, tokens)

        def append(self, pages: Any) -> int:
            assert threading.current_thread() is not threading.main_thread() and self.let.wait(60)
            return super().append(pages)

    slow = Slow()
    slow.pages = filled(LONG).pages
    engine = Placed(slow, StoreIO(slow, PAGE_BYTES), even=ChosenEven(patience=1e6))
    woken = threading.Semaphore(0)
    engine.core.bind_disk(woken.release)
    engine.add("a", LONG)
    for number in range(20):  # others are computed and offered meanwhile
        engine.run(f"r{number}", [number + 1, *LONG[:150]], count=3)
        assert len(engine.tokens(f"r{number}")) == 3
    assert engine.state("a").pages is None and len(slow.pages) == 51
    slow.let.set()
    run_awake(engine, woken)
    assert engine.tokens("a") == COLD and engine.last("a").loaded_tokens == 200
    engine.core.close_disk()
    assert len(slow.pages) > 51 and slow.is_closed


# -- the moves and the break-even --------------------------------------------------------------------------------------
def test_pages_are_put_behind_those_that_are_there_or_not_at_all() -> None:
    cache, key = KVCache(8, PAGE), token_key(np.arange(40, dtype=np.int32))
    written: list[tuple[int, int]] = []
    given = Given()

    def write(pages: list[int], num_before: int) -> None:
        written.append((len(pages), num_before))

    assert put_pages(cache, "", key, 2, 4, write) == 0 and not written
    assert put_pages(cache, "", key, 0, 3, write, given) == 3 and written == [(3, 0)] and len(given.pages) == 3
    assert put_pages(cache, "", key, 1, 6, write) == 6 and written[1:] == [(3, 2)]
    assert put_pages(cache, "", key, 0, 6, write) == 6 and len(written) == 2
    assert put_pages(cache, "", key, 6, 10, write) == 6 and len(written) == 2, "the pool has eight pages"
    assert pages_there(cache, "", key, 10) == pages_there(cache, "", key, 6) and cache.num_free == 2

    def broken(pages: list[int], num_before: int) -> None:
        raise RuntimeError("a device that fails")

    with pytest.raises(RuntimeError):
        put_pages(cache, "", key, 6, 8, broken)
    cache.check([])
    assert cache.num_free == 2 and cache.evict(8) == 6


def test_pages_put_beside_a_partly_filled_one_share_no_tokens() -> None:
    cache, key = KVCache(8, PAGE), token_key(np.arange(40, dtype=np.int32))
    admission = cache.admit("", key[: 4 * 6], max_matched=0, most_tokens=6)
    assert admission is not None
    cache.release(admission.held, key[: 4 * 6])  # a page and a half
    assert put_pages(cache, "", key, 0, 3, lambda pages, num_before: None) == 3
    cache.check([])
    assert len(pages_there(cache, "", key, 10)) == 3


def test_loading_pays_from_the_break_even_on() -> None:
    even = BreakEven(1000.0, 512)
    assert even.least_tokens == 1 and even.tokens_for(1 << 30) == 0 and even.patience_s(10) == speed.UNMEASURED_WAIT_S
    even.learn_step(StepStats(prefill_tokens=512), 1.024)  # 500 tokens a second
    even.learn_step(StepStats(prefill_tokens=8), 0.000001)  # too few to say anything
    even.learn_load(1_000_000, 0.1)  # 10 MB/s: 0.1 ms a token
    assert even.least_tokens == pytest.approx(0.01 / (1 / 500 - 1000 / 1e7))
    assert even.patience_s(1000) == 2.0 and even.patience_s(1) == speed.LEAST_WAIT_S
    assert even.tokens_for(10_000_000) == pytest.approx(1 / (1 / 500 - 1000 / 1e7)), "a second more"
    even.learn_load(1_000_000, 1000.0)
    for _ in range(50):
        even.learn_load(1000, 1.0)
    assert math.isinf(even.least_tokens)
