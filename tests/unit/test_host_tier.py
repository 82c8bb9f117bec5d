"""What of a request is kept in the host's memory below a device and what comes back, case by case, with the fake
model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from disk_fakes import ChosenEven, ErraticIO, MemoryStore
from mooli.cache.host_pool import HostPool, PageName
from mooli.cache.kv_cache import KVCache
from mooli.cache.page_moves import put_pages, room_behind
from mooli.cache.radix_tree import token_key
from mooli.engine.core import EngineCore
from mooli.errors import EngineError
from mooli.runner.fake import FakeRunner
from mooli.scheduler.disk_tier import DiskTier
from mooli.scheduler.host_tier import HostPolicy, HostTier
from mooli.scheduler.scheduler import Scheduler
from mooli.types import Request, RequestOutput, SamplingParams

PAGE = 4
VOCAB = 50
PAGE_BYTES = 8 * PAGE
LONG = [(7 * at) % VOCAB for at in range(203)]
"""50 full pages: as many as may come back, as one token is computed."""


class Hosted:
    """An engine of the fake model with memory of the host, and a disk where a store is given."""

    def __init__(
        self,
        policy: HostPolicy = HostPolicy.WRITE_THROUGH,
        *,
        num_pages: int = 100,
        num_rows: int = 200,
        least: float = 1.0,
        gives_nan: Callable[[list[int]], bool] | None = None,
        store: MemoryStore | None = None,
    ) -> None:
        self.runner = FakeRunner(num_pages, PAGE, VOCAB, gives_nan=gives_nan)
        self.runner.allocate_host(num_rows)
        self.cache = KVCache(num_pages, PAGE)
        self.cache.digests.engine = bytes(32)
        self.scheduler = Scheduler(
            self.cache, max_batch_tokens=512, max_running_requests=8, context_length=1000, vocab_size=VOCAB
        )
        self.host = HostPool(num_rows)
        runner: Any = self.runner
        self.tier = HostTier(self.cache, self.host, runner, PAGE_BYTES, bytes(32), policy, ChosenEven(least))
        self.scheduler.attach_host(self.tier)
        if store is not None:
            io: Any = ErraticIO(store, random.Random(0), failure_rate=0.0, speed=1.0, loss_rate=0.0)
            self.scheduler.attach_disk(
                DiskTier(self.cache, io, runner, PAGE_BYTES, bytes(32), ChosenEven(), io.clock, host=self.tier)
            )
        self.core = EngineCore(self.scheduler, self.runner)
        self.outputs: dict[str, list[RequestOutput]] = {}

    def add(self, rid: str, ids: Sequence[int], count: int = 2, **options: Any) -> None:
        sampling = SamplingParams(max_new_tokens=count, temperature=0.0)
        self.core.add(Request(rid=rid, prompt_ids=np.array(ids, np.int32), sampling=sampling, **options))

    def step(self) -> None:
        for output in self.core.step():
            self.outputs.setdefault(output.rid, []).append(output)
        self.core.check()

    def run(self, rid: str, ids: Sequence[int], **options: Any) -> list[int]:
        self.add(rid, ids, **options)
        while self.core.has_work:
            self.step()
        return [token for output in self.outputs[rid] for token in output.new_token_ids]

    def last(self, rid: str) -> RequestOutput:
        return self.outputs[rid][-1]

    def end(self, rid: str) -> tuple[str | None, int]:
        """Why a request found no more, and what it lost."""
        end = next(output.cache_end for output in self.outputs[rid] if output.cache_end is not None)
        return end.reason, end.num_lost


COLD = Hosted().run("cold", LONG)


# -- what is copied out ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("policy", "after_first", "after_second", "after_eviction"),
    [
        (HostPolicy.WRITE_THROUGH, 51, 51, 51),
        (HostPolicy.WRITE_THROUGH_SELECTIVE, 0, 50, 50),
        (HostPolicy.WRITE_BACK, 0, 0, 51),
    ],
)
def test_the_policy_says_what_is_copied_out_and_when(
    policy: HostPolicy, after_first: int, after_second: int, after_eviction: int
) -> None:
    engine = Hosted(policy)
    engine.run("a", LONG)
    assert engine.host.num_used == after_first
    engine.run("b", LONG)
    assert engine.host.num_used == after_second
    engine.cache.evict(100)
    assert engine.host.num_used == after_eviction
    assert engine.run("c", LONG) == COLD
    assert (engine.last("c").cached_tokens, engine.last("c").host_tokens) == (200, 200)
    assert engine.end("c")[0] == "new", "what came back was not lost"
    num_saved = engine.tier.num_saved
    engine.cache.evict(100)
    assert engine.tier.num_saved == num_saved, "what is on the host is not copied there again"


def test_evicting_and_copying_back_a_part_leaves_the_rest_where_it_is() -> None:
    engine = Hosted(HostPolicy.WRITE_BACK)
    engine.run("a", LONG, count=4)
    engine.cache.evict(22)
    assert engine.host.num_used == 21, "the partly filled page is no page of the host's"
    assert engine.run("b", LONG) == COLD
    assert (engine.last("b").cached_tokens, engine.last("b").host_tokens) == (200, 20 * PAGE)
    stats = engine.core.stats()
    assert stats["host_loaded_tokens"] == 20 * PAGE and stats["host_used_tokens"] == 21 * PAGE
    assert stats["host_total_tokens"] == 800
    engine.cache.evict(100)
    assert engine.host.num_used == 51


def test_a_prompt_of_whole_pages_finds_all_that_it_may() -> None:
    engine = Hosted()
    cold = engine.run("a", LONG[:200])
    engine.cache.evict(100)
    assert engine.run("b", LONG[:200]) == cold
    last = engine.last("b")
    assert (last.cached_tokens, last.host_tokens, engine.end("b")) == (199, 199, (None, 0)), "not evicted"


def test_a_host_that_is_full_drops_tails_of_what_was_used_least_recently() -> None:
    engine = Hosted(num_rows=60)
    engine.run("a", LONG)
    other = [3, *LONG[:100]]
    engine.run("b", other)
    assert engine.host.num_used == 60 and engine.host.num_dropped == 51 + 25 - 60
    engine.cache.evict(100)
    engine.run("c", LONG)
    assert engine.last("c").host_tokens == (60 - 25) * PAGE
    assert engine.end("c") == ("evicted", 200 - 35 * PAGE)
    small = Hosted(num_rows=7)
    small.run("a", LONG)
    small.cache.evict(100)
    small.run("b", LONG)
    assert small.last("b").host_tokens == 7 * PAGE, "heads stay"


@pytest.mark.parametrize("policy", HostPolicy)
def test_nothing_is_copied_out_where_copying_back_never_pays(policy: HostPolicy) -> None:
    engine = Hosted(policy, least=math.inf)
    engine.run("a", LONG)
    engine.run("b", LONG)
    engine.cache.evict(100)
    assert engine.host.num_used == 0


def test_emptying_the_cache_empties_the_host() -> None:
    engine = Hosted()
    engine.run("a", LONG)
    assert engine.core.flush_cache() and engine.host.num_used == 0
    engine.run("b", LONG)
    assert engine.last("b").cached_tokens == 0


def test_other_salts_are_other_pages() -> None:
    engine = Hosted()
    engine.run("a", LONG)
    engine.run("b", LONG, namespace="salt")
    assert engine.last("b").cached_tokens == 0 and engine.host.num_used == 102


# -- what comes back ---------------------------------------------------------------------------------------------------
def test_a_request_waits_for_its_own_pages_while_others_go_on() -> None:
    engine = Hosted()
    engine.run("a", LONG)
    engine.cache.evict(100)
    engine.tier._back_pages = 20
    engine.add("b", [9, 8, 7], 20)
    engine.step()
    engine.add("c", LONG)
    engine.add("d", LONG[:150])
    for num_loaded in (0, 20, 40):
        engine.step()
        state = engine.scheduler._states["c"]
        assert (state.waited_for, state.pages, engine.tier.num_loaded) == ("loading", None, num_loaded)
    assert len(engine.outputs["b"]) == 4
    while engine.core.has_work:
        engine.step()
    assert engine.last("c").host_tokens == 200 and engine.tier.num_loaded == 50, "once for both"
    assert (engine.last("d").cached_tokens, engine.last("d").host_tokens) == (149, 0)


def test_a_copy_that_would_take_longer_than_computing_is_not_made() -> None:
    engine = Hosted(least=201.0)
    engine.run("a", LONG)
    engine.cache.evict(100)
    assert engine.run("b", LONG) == COLD
    assert engine.last("b").cached_tokens == 0 and engine.end("b") == ("judged slower", 200)
    assert engine.core.stats()["host_slower_loads"] == 1


def test_a_request_that_is_aborted_while_it_waits_ends_at_once() -> None:
    engine = Hosted()
    engine.run("a", LONG)
    engine.cache.evict(100)
    engine.tier._back_pages = 20
    engine.add("b", LONG)
    engine.step()
    engine.step()
    engine.core.abort("b")
    engine.step()
    finish = engine.last("b").finish
    assert finish is not None and finish.type == "abort" and not engine.core.has_work
    assert engine.run("c", LONG) == COLD and engine.last("c").host_tokens == 200 - 20 * PAGE


def test_where_the_pool_has_no_room_a_request_waits_for_that_and_not_for_pages() -> None:
    engine = Hosted(num_pages=60)
    engine.run("a", LONG)
    engine.cache.evict(100)
    engine.add("b", [8] * 60, 60)
    engine.step()
    engine.add("c", LONG)
    engine.step()
    assert engine.scheduler._states["c"].waited_for is None and engine.tier.num_loaded == 0
    while engine.core.has_work:
        engine.step()
    assert engine.last("c").host_tokens == 200, "it had room once the other had ended"


def test_a_request_that_gave_way_comes_back_through_the_host() -> None:
    engine = Hosted(HostPolicy.WRITE_BACK, num_pages=40)
    cold = Hosted(num_pages=200).run("a", LONG[:60], count=60)
    for rid in "ab":
        engine.add(rid, [ord(rid) - 97, *LONG[1:60]], 60)
    while engine.core.has_work:
        engine.step()
    stats = engine.core.stats()
    assert stats["preemptions"] and stats["host_loaded_tokens"] > 0
    assert [token for output in engine.outputs["a"] for token in output.new_token_ids] == cold


@pytest.mark.parametrize("copy", ["back_up", "load_back"])
def test_a_device_that_fails_in_between_ends_no_request(copy: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = Hosted()

    def broken(*_: Any) -> None:
        raise EngineError("a device that fails")

    if copy == "load_back":
        engine.run("a", LONG)
        engine.cache.evict(100)
    setattr(engine.runner, copy, broken)
    for rid in "bcd":
        assert engine.run(rid, LONG) == COLD
        engine.cache.evict(100)
    assert sum("a device that fails" in record.message for record in caplog.records) == 1
    if copy == "load_back":
        assert engine.end("b") == ("load failed", 200) and engine.core.stats()["host_failed_loads"] == 3
    else:
        assert engine.host.num_used == 0


def test_nan_that_came_from_the_host_leaves_it() -> None:
    bad = [False]
    engine = Hosted(gives_nan=lambda context: bad[0] and context[:4] == LONG[:4])
    engine.run("a", LONG)
    engine.cache.evict(100)
    bad[0] = True
    engine.run("b", [*LONG, 5])
    finish = engine.last("b").finish
    assert finish is not None and finish.err_type == "NaNError"
    assert engine.cache.num_tree_pages == 0 and engine.host.num_used == 0
    bad[0] = False
    assert engine.run("c", LONG) == COLD and engine.last("c").cached_tokens == 0


# -- with a disk below -------------------------------------------------------------------------------------------------
def test_a_match_goes_on_from_device_to_host_to_disk() -> None:
    store = MemoryStore(PAGE)
    first = Hosted(store=store)
    first.run("a", LONG)
    first.core.close_disk()
    assert len(store.pages) == 51
    engine = Hosted(HostPolicy.WRITE_BACK, store=store)
    engine.run("a", LONG[:120])
    assert engine.last("a").loaded_tokens == 116
    engine.cache.evict(20)
    assert engine.run("b", LONG) == COLD
    last = engine.last("b")
    assert (last.cached_tokens, last.host_tokens, last.loaded_tokens) == (200, 19 * PAGE, 200 - 30 * PAGE)


def test_pages_go_to_disk_from_the_host_without_a_second_copy_out_of_the_device() -> None:
    store = MemoryStore(PAGE)
    engine = Hosted(store=store)

    def never(pages: Sequence[int]) -> Any:
        raise AssertionError("read out of the device twice")

    engine.runner.read_pages = never  # type: ignore[method-assign]
    engine.run("a", LONG)
    engine.run("b", LONG[:30])
    engine.cache.evict(100)
    rows = {digest: engine.runner.host_bytes(page.row) for digest, page in engine.host._pages.items()}
    engine.core.close_disk()
    assert len(store.pages) == 51, "also what the device has lost by then"
    assert {digest: page.payload for digest, page in store.pages.items()} == rows


# -- the rows ----------------------------------------------------------------------------------------------------------
def names(length: int, stem: bytes = b"r", first: int = 0) -> list[PageName]:
    chain = [stem + bytes([at]) for at in range(first, first + length)]
    return [PageName(digest, parent, digest) for digest, parent in zip(chain, [stem, *chain], strict=False)]


def test_rows_go_from_tails_to_heads_and_never_for_what_they_follow() -> None:
    pool = HostPool(4)
    assert sorted(pool.add(names(6))) == [0, 1, 2, 3], "the first of them"
    digests = [name.digest for name in names(6)]
    assert pool.leading(digests, digests) == 4 and pool.leading(digests[:2], [b"other", b""]) == 0
    tail = PageName(digests[4], digests[3], digests[4])
    assert pool.add([tail]) == [] and pool.num_dropped == 0, "not for a page that they lead to"
    assert len(pool.add(names(2, b"s"))) == 2 and pool.leading(digests, digests) == 2
    use = pool.use(digests[:2])
    assert len(pool.add(names(4, b"t"), use)) == 2, "what is being copied back stays"
    pool.check()
    pool.drop([digests[0]])
    assert pool.leading(digests, digests) == 0 and pool.num_used == 2
    pool.clear()
    pool.check()
    assert pool.num_used == 0


def test_room_behind_pages_is_what_could_be_taken_without_them() -> None:
    cache, key = KVCache(8, PAGE), token_key(np.arange(40, dtype=np.int32))
    assert room_behind(cache, "", key, 0) == 8
    put_pages(cache, "", key, 0, 6, lambda pages, num_before: None)
    assert [room_behind(cache, "", key, count) for count in (0, 2, 6)] == [8, 6, 2]
    admission = cache.admit("", key[: 4 * PAGE * 3 + 4], max_matched=3 * PAGE, most_tokens=1)
    assert admission is not None
    assert [room_behind(cache, "", key, count) for count in (0, 3, 6)] == [4, 4, 1]
    cache.discard(admission.held)
