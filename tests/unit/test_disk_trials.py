"""Random trials of the scheduler with a disk below it that is late, fails, is cut and loses pages; in many without
recurrent states with memory of the host between, of a few pages or of many, whose copies fail now and then.

Every output is that of the request run alone, pages, rows and locks balance after every step, and nothing waits for
ever: the checks are those of `core_trials`. Engines come one after another on one store, as after restarts.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from core_trials import Trial, random_setting

from disk_fakes import ChosenEven, ErraticIO, MemoryStore
from mooli.cache.host_pool import HostPool
from mooli.cache.kv_cache import KVCache
from mooli.cache.match_end import MissReason
from mooli.cache.store_io import Piece
from mooli.scheduler.disk_tier import DiskTier
from mooli.scheduler.drafts import ForcedSettings
from mooli.scheduler.host_tier import HostPolicy, HostTier
from mooli.scheduler.request_state import RequestState
from mooli.types import Request

TRIALS_PER_BLOCK = 60


class WatchedTier(DiskTier):
    """Knows for whom it puts pages into the pool."""

    namespace = ""

    def _put(self, state: RequestState, piece: Piece, last: int) -> int:
        self.namespace = state.request.namespace
        return super()._put(state, piece, last)


class WatchedHost(HostTier):
    """Knows for whom it copies pages back, and keeps what it has between the rounds of a trial."""

    namespace = ""

    def clear(self) -> None:
        self._saves.clear()

    def _bring(self, state: RequestState, found: Any, last: int) -> int:
        self.namespace = state.request.namespace
        return super()._bring(state, found, last)


class DiskTrial(Trial):
    """A trial on stores that others may have written to: of pages by their size, and of states by minus that."""

    def __init__(self, seed: int, setting: Any, stores: dict[int, MemoryStore]) -> None:
        rng = self.disk_rng = random.Random(f"disk {seed}")
        self.host_rng = random.Random(f"host {seed}")
        store = stores.setdefault(setting.page_size, MemoryStore(setting.page_size))
        states = stores.setdefault(-setting.page_size, MemoryStore(setting.page_size))
        self.io = ErraticIO(
            store,
            rng,
            failure_rate=rng.choice([0.0, 0.0, 0.3]),
            speed=rng.choice([0.2, 0.6, 1.0]),
            loss_rate=rng.choice([0.0, 0.1]),
            states=states if setting.states else None,
        )
        self.ends: Counter[MissReason] = Counter()
        super().__init__(seed, setting)
        self.scheduler._admission.holds.append(_Ends(self.ends))  # type: ignore[attr-defined]

    def disk(self, cache: KVCache) -> DiskTier:  # type: ignore[override]
        even = ChosenEven(self.disk_rng.choice([1.0, 1.0, 12.0]), self.disk_rng.choice([2.0, 10.0, 100.0]))
        page_bytes = 8 * self.setting.page_size
        io: Any = self.io
        state_bytes = 8 if self.setting.states else 0
        self.tier = WatchedTier(cache, io, self, page_bytes, bytes(32), even, io.clock, state_bytes, self.memory)
        self.tier.behind._is_worth = lambda num_tokens: num_tokens >= self.setting.page_size * 2
        return self.tier

    def host(self, cache: KVCache) -> HostTier | None:  # type: ignore[override]
        rng, page_bytes = self.host_rng, 8 * self.setting.page_size
        self.memory: WatchedHost | None = None
        if rng.random() < 0.8 and self.setting.states is None:
            num_rows, policy = rng.choice([2, 10, 100, 100]), rng.choice(list(HostPolicy))
            even = ChosenEven(rng.choice([1.0, 1.0, 6.0]))
            cache.digests.engine = bytes(32)
            self.runner.allocate_host(num_rows)
            self.memory = WatchedHost(cache, HostPool(num_rows), self, page_bytes, bytes(32), policy, even)
            self.memory._back_pages, self.memory._out_pages = rng.choice([1, 3, 100]), rng.choice([1, 100])
        return self.memory

    # What of a backend moves pages; now and then it fails.
    def back_up(self, pages: Sequence[int], rows: Sequence[int]) -> None:
        assert len(pages) == len(rows) > 0
        if self.setting.failure_rate and self.host_rng.random() < 0.02:
            raise RuntimeError("planned failure of a copy to the host")
        self.runner.back_up(pages, rows)

    def load_back(self, pages: Sequence[int], rows: Sequence[int]) -> None:
        assert len(pages) == len(rows) > 0 and self.memory is not None
        if self.setting.failure_rate and self.host_rng.random() < 0.1:
            raise RuntimeError("planned failure of a copy from the host")
        self.runner.load_back(pages, rows)
        for page in pages:
            self.page_namespace[page] = self.memory.namespace

    def host_bytes(self, row: int) -> bytes:
        return self.runner.host_bytes(row)

    def read_pages(self, pages: Sequence[int]) -> Any:
        return self.runner.read_pages(pages)

    def write_pages(self, pages: Sequence[int], data: Any) -> None:
        if self.setting.failure_rate and self.disk_rng.random() < 0.1:
            raise RuntimeError("planned failure of a write to the pool")
        self.runner.write_pages(pages, data)
        for page in pages:
            self.page_namespace[page] = self.tier.namespace

    def read_state(self, slot: int) -> Any:
        return self.runner.read_state(slot)

    def write_state(self, slot: int, data: Any) -> None:
        if self.setting.failure_rate and self.disk_rng.random() < 0.1:
            raise RuntimeError("planned failure of a write of a state")
        self.runner.write_state(slot, data)

    def rounds(self, num_requests: int) -> None:
        """The memory of the host stays where that of the device is emptied."""
        for _ in range(1 if self.memory is None else 6):
            self.requests.clear()
            self.ended_early.clear()
            self.run(num_requests)

    def _add(self, rid: str) -> None:
        if self.memory is not None and self.host_rng.random() < 0.3:
            self.cache.evict(self.host_rng.randrange(1 + self.cache.num_tree_pages))
        super()._add(rid)
        request: Request | None = self.requests.get(rid)
        if request is not None:
            request.no_store = self.disk_rng.random() < 0.2


class _Ends:
    """A `Hold` that holds nothing."""

    reason = ""

    def __init__(self, ends: Counter[MissReason]) -> None:
        self._ends = ends

    def begin_step(self, running: Any) -> None:
        pass

    def holds(self, state: RequestState) -> bool:
        return False

    def began(self, state: RequestState) -> None:
        most = max(state.cached_tokens, state.num_found)
        assert state.match_end is not None and 0 <= state.loaded_tokens <= most and state.host_tokens <= most
        if state.match_end.reason is not None:
            self._ends[state.match_end.reason] += 1


@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.slow) for block in range(1, 5))])
def test_every_output_equals_the_request_run_alone_whatever_the_disk_does(block: int) -> None:
    stores: dict[int, MemoryStore] = {}
    stems: dict[int, list[list[int]]] = {}
    total: Counter[str] = Counter()
    ends: Counter[MissReason] = Counter()
    for seed in range(block * TRIALS_PER_BLOCK, (block + 1) * TRIALS_PER_BLOCK):
        rng = random.Random(seed)
        setting = replace(
            random_setting(rng),
            page_size=rng.choice([1, 2, 4]),
            enabled=True,
            priorities=seed % 2 == 1,
            num_clients=1 + seed % 3,
            constrained=seed % 5 < 2,
            forced=ForcedSettings(1 + seed % 7, 1 + seed % 11) if seed % 4 else None,
            background=seed % 7 > 3,
            num_snapshots=(None, 30, 30, 4)[seed % 4],
        )
        setting = replace(setting, num_pages=max(2, setting.num_pages * 4 // setting.page_size))
        trial = DiskTrial(seed, setting, stores)
        trial.stems = stems.setdefault(setting.page_size, trial.stems)  # the same prompts come again
        del trial.stems[:-12]
        trial.rounds(num_requests=8 if setting.is_crowded else 6)
        trial.tier.close(10.0)
        total.update(trial.tier.stats(), loads=trial.io.num_loads, cancelled=trial.io.num_cancelled)
        if trial.memory is not None:
            total.update(trial.memory.stats())
        ends.update(trial.ends)
    assert total["loaded_tokens"] > 150 and total["stored_tokens"] > 500, total
    assert total["loaded_states"] > 10 and total["stored_states"] > 20, total
    assert total["loads"] > 30 and total["cancelled"] > 3 and total["failed_loads"] > 3, total
    assert total["host_loaded_tokens"] > 60 and total["host_saved_tokens"] > 300, total
    assert total["host_dropped_tokens"] > 100 and total["host_failed_loads"] + total["host_slower_loads"] > 3, total
    assert ends[MissReason.LOAD_FAILED] and ends[MissReason.JUDGED_SLOWER], ends
