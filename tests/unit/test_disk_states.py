"""Recurrent states on disk, with the fake model: what is written and when, what comes back, and what is damaged."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from test_disk_tier import COLD as STATELESS
from test_disk_tier import LONG, PAGE, PAGE_BYTES, Placed, on_files, run_awake
from test_page_store_faults import damage

from disk_fakes import MemoryStore
from mooli.cache.match_end import MissReason
from mooli.errors import EngineError
from mooli.scheduler import disk_tier

ALONE = Placed(states=MemoryStore(PAGE))
COLD = ALONE.run("cold", LONG)
DEEPEST, BEFORE = 50, 40
"""Pages of LONG after which the last states come, as many tokens before the end as the next request could use."""


def test_the_fake_model_minds_its_states() -> None:
    assert COLD != STATELESS


class Left:
    """What an engine has left that computed LONG and two tokens more."""

    def __init__(self) -> None:
        self.pages, self.states = MemoryStore(PAGE), MemoryStore(PAGE)
        engine = self.engine()
        engine.run("a", LONG)
        engine.tier.close(60.0)
        names = [page.digest for page in self.pages.pages.values()]
        self.after = {names.index(state.digest) + 1: state for state in self.states.pages.values()}

    def engine(self, **options: object) -> Placed:
        return Placed(self.pages, states=self.states, **options)  # type: ignore[arg-type]


@pytest.fixture
def left() -> Left:
    return Left()


def served(engine: Placed, *, fails: int = 0) -> None:
    """Until nothing is to be done: what is asked for comes, but the first `fails` states cannot be read."""
    while engine.scheduler.has_requests:
        engine.step()
        for number, (_, digests, _, state) in list(engine.io._loads.items()):
            if digests:
                engine.io.deliver(number, len(digests))
            if number <= fails:
                engine.io.states.forget([state[0]])
            engine.io.deliver_state(number)


def test_states_at_the_ends_of_pages_are_written_behind_the_pages(left: Left) -> None:
    assert sorted(left.after) == [10, 20, 30, 40, 50, 51], "every 40 tokens, for the next like it, and the end"
    assert all(state.position == 0 and state.tokens for state in left.after.values())
    assert len({state.parent for state in left.after.values()}) == 1
    assert left.after[50].parent not in {page.parent for page in left.pages.pages.values()}, "another key encrypts it"


def test_states_larger_than_their_pages_wait_until_they_are_used_or_for_the_end(left: Left) -> None:
    states = MemoryStore(PAGE)
    engine = Placed(states=states)
    engine.tier.behind._state_bytes = 45 * PAGE_BYTES
    engine.run("a", LONG)
    assert len(states.pages) == 2, "those after 50 and 51 pages"
    engine.run("b", [*LONG[:160], 9, 9])
    assert len(states.pages) == 3, "that of 40 pages was used"
    engine.tier.close(60.0)
    assert len(states.pages) == 6 and engine.core.stats()["stored_states"] == 6


def test_a_request_goes_on_from_pages_and_one_state(left: Left) -> None:
    engine = left.engine()
    engine.add("a", LONG)
    served(engine)
    assert engine.tokens("a") == COLD and engine.cache.states.num_snapshots >= 1
    assert (engine.last("a").cached_tokens, engine.last("a").loaded_tokens) == (200, 200)
    stats = engine.core.stats()
    assert (stats["loaded_tokens"], stats["loaded_states"], stats["failed_loads"]) == (200, 1, 0)


@pytest.mark.parametrize(("fails", "goes_on_from"), [(1, 160), (2, 120), (5, 0)])
def test_where_a_state_cannot_be_read_the_one_before_it_is_used(left: Left, fails: int, goes_on_from: int) -> None:
    engine = left.engine()
    ends = engine.ends()
    engine.add("a", LONG)
    served(engine, fails=fails)
    assert engine.tokens("a") == COLD and engine.last("a").cached_tokens == goes_on_from
    assert ends["a"] is MissReason.LOAD_FAILED and engine.core.stats()["failed_loads"] == 1


def test_pages_that_are_there_still_need_a_state_only(left: Left) -> None:
    engine = left.engine(snapshots=1)
    engine.add("a", LONG)
    served(engine)
    engine.run("b", [8] * 30)  # whose snapshot takes the one place
    engine.add("c", [*LONG[:190], 7])
    engine.step()
    first, digests, _, state = engine.io._loads[2]
    assert not digests and first == BEFORE and state == (left.after[BEFORE].digest, left.after[BEFORE].tokens)
    engine.io.deliver_state(2)
    engine.run()
    assert (engine.last("c").cached_tokens, engine.last("c").loaded_tokens) == (160, 160)
    expected = Placed(states=MemoryStore(PAGE)).run("c", [*LONG[:190], 7])
    assert engine.tokens("c") == expected


def test_pages_of_which_some_do_not_come_are_used_up_to_the_last_state_among_them(left: Left) -> None:
    engine = left.engine()
    engine.add("a", LONG)
    engine.step()
    engine.io.deliver(1, 33, fails=True)
    engine.step()
    assert engine.io._loads[2][1] == [] and engine.io._loads[2][0] == 30
    engine.io.deliver_state(2)
    engine.run()
    assert engine.tokens("a") == COLD and engine.last("a").cached_tokens == 120


def test_no_room_for_a_snapshot_and_a_device_that_fails_end_no_request(left: Left) -> None:
    engine = left.engine(snapshots=0)
    engine.add("a", LONG)
    served(engine)
    assert engine.tokens("a") == COLD and engine.io.num_loads == 0
    engine = left.engine()

    def broken(*_: object) -> None:
        raise EngineError("a device that fails")

    engine.runner.write_state = broken  # type: ignore[method-assign]
    engine.add("a", LONG)
    served(engine)
    assert engine.tokens("a") == COLD and engine.cache.states.num_snapshots <= 20


def test_nan_that_came_from_disk_leaves_no_state_there(left: Left) -> None:
    engine = left.engine(gives_nan=lambda context: True)
    engine.add("a", LONG)
    served(engine)
    assert engine.cache.states.num_snapshots == 0 and sorted(left.states.pages) == [left.after[51].digest]


def test_damaged_files_of_pages_and_of_states_are_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_tier, "ALARM_S", 60.0)
    folder, draw = tmp_path / "kv", random.Random(3)
    engine, woken = on_files(folder, has_states=True)
    engine.add("a", LONG)
    run_awake(engine, woken)
    engine.core.close_disk()
    whole = {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert len(whole) == 4 and len({path.parent for path in whole}) == 2
    cached = []
    for _ in range(80):
        for path in folder.rglob("*.*"):
            path.unlink()
        damaged = draw.sample(sorted(whole), draw.choice([0, 1, 1, 2]))
        for path, data in whole.items():
            path.write_bytes(damage(data, draw) if path in damaged else data)
        engine, woken = on_files(folder, has_states=True)
        engine.add("a", LONG)
        run_awake(engine, woken)
        engine.core.close_disk()
        assert engine.tokens("a") == COLD
        cached.append(engine.last("a").cached_tokens)
    assert set(cached) >= {0, 160, 200} and cached.count(200) < 60, cached
