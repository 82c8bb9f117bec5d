"""What is seen of the radix tree from outside: numbers of nodes, notes of changes, and nothing while nobody looks."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import numpy as np
import pytest
from core_trials import Trial

from mooli.cache import tree_watch
from mooli.cache.kv_cache import KVCache
from mooli.cache.match_end import MissReason
from mooli.cache.page_hash import PageChain, root_of
from mooli.cache.radix_tree import Node, token_key
from mooli.engine.core import EngineCore
from mooli.errors import EngineError
from mooli.runner.fake import FakeRunner
from mooli.scheduler.scheduler import Scheduler
from mooli.types import Request, RequestOutput, SamplingParams

PAGE = 4


def key(*token_ids: int) -> bytes:
    return token_key(np.array(token_ids, np.int32))


def finished(cache: KVCache, *token_ids: int, namespace: str = "") -> None:
    held = cache.open(cache.match(namespace, key(*token_ids), len(token_ids) - 1))
    assert cache.grow(held, len(token_ids))
    cache.release(held, key(*token_ids[held.num_shared * cache.page_size :]))


class Mirror:
    """A tree as somebody has it who fetched it in parts, and applied what came after."""

    def __init__(self) -> None:
        self.nodes: dict[int, tuple[int, ...]] = {}
        self.version = 0

    def fetch(self, cache: KVCache, rng: random.Random) -> None:
        after: int | None = 0
        while after is not None:
            part = cache.watch.part(after, rng.randint(1, 4))
            self.version = self.version if after else part.version
            self.nodes |= {row[0]: row for row in part.nodes}
            after = part.after

    def apply(self, changes: tree_watch.TreeChanges) -> None:
        if changes.version <= self.version:
            return
        assert changes.is_complete
        assert {root for _, _, root, *_ in changes.nodes} <= set(changes.roots)
        for number, _ in changes.removed:
            self.nodes.pop(number, None)
        self.nodes |= {row[0]: row for row in changes.nodes}

    def places(self) -> dict[int, tuple[int, ...]]:
        """All but the times of last use."""
        return {number: row[:6] + row[7:] for number, row in self.nodes.items()}


def real_places(cache: KVCache) -> dict[int, tuple[int, ...]]:
    """The same, of the tree itself."""
    found = {}
    for node in cache._tree.nodes():
        above = []
        step: Node = node
        while step.parent is not None:
            step = step.parent
            above.append(len(step.key) // 4)
        if node.parent is not None:
            parent = node.parent.number if node.parent.parent is not None else 0
            place = (node.number, parent, step.number, sum(above), len(node.key) // 4, len(node.pages), node.num_locks)
            found[node.number] = (*place, 0, node.weight)
    return found


def run_watched(seed: int) -> None:
    """A random trial with somebody who begins to watch in its middle."""
    trial, rng, mirror = Trial(seed), random.Random(seed), Mirror()
    step, begins_at, num_steps = trial.core.step, rng.randint(1, 10), 0

    def watched_step() -> list[RequestOutput]:
        nonlocal num_steps
        outputs = step()
        num_steps += 1
        if num_steps == begins_at:
            trial.cache.watch.take()
            mirror.fetch(trial.cache, rng)
        elif num_steps > begins_at and rng.random() < 0.4:
            mirror.apply(trial.cache.watch.take())
            assert mirror.places() == real_places(trial.cache)
        return outputs

    trial.core.step = watched_step  # type: ignore[method-assign]
    trial.run(10)
    if num_steps >= begins_at:
        mirror.apply(trial.cache.watch.take())
        assert mirror.places() == real_places(trial.cache) == {}


@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.slow) for block in range(1, 4))])
def test_who_applies_all_changes_has_the_tree_as_it_is(block: int) -> None:
    for seed in range(block * 20, block * 20 + 20):
        run_watched(seed)


def test_parts_that_change_meanwhile_are_right_after_the_next_changes() -> None:
    rng = random.Random(0)
    for seed in range(50):
        rng.seed(seed)
        cache = KVCache(30, PAGE)
        for _ in range(6):
            finished(cache, *(rng.randrange(2) for _ in range(rng.randint(5, 20))))
        first = cache.watch.part(0, 2)
        mirror = Mirror()
        mirror.version = first.version
        mirror.nodes = {row[0]: row for row in first.nodes}
        after = first.after
        while after is not None:
            finished(cache, *(rng.randrange(2) for _ in range(rng.randint(5, 20))))
            cache.evict(rng.randrange(3))
            part = cache.watch.part(after, 2)
            mirror.nodes |= {row[0]: row for row in part.nodes}
            after = part.after
        changes = cache.watch.take()
        changes.is_complete = True
        mirror.apply(changes)
        assert mirror.places() == real_places(cache)


def test_nothing_is_noted_while_nobody_looks() -> None:
    cache = KVCache(50, PAGE)
    finished(cache, *range(10))
    assert not cache.watch.is_attached
    assert not cache.watch._nodes and not cache.watch._changed
    assert {node.number for node in cache._tree.nodes()} == {0}
    cache.watch.take()
    assert cache.watch.is_attached
    cache.watch.detach()
    finished(cache, *range(50, 60))
    assert not cache.watch.is_attached
    assert not cache.watch._nodes and not cache.watch._changed


def test_numbers_stay_and_none_comes_again() -> None:
    cache = KVCache(50, PAGE)
    finished(cache, *range(8))
    before = {row[0] for row in cache.watch.part(0, 100).nodes}
    cache.watch.detach()
    finished(cache, *range(20, 28))
    after = {row[0] for row in cache.watch.part(0, 100).nodes}
    assert before < after
    cache.watch.take()
    cache.flush()
    assert {number for number, _ in cache.watch.take().removed} == after
    finished(cache, *range(8))
    assert {row[0] for row in cache.watch.part(0, 100).nodes}.isdisjoint(after)


def test_a_split_gives_the_upper_part_a_number_and_the_lower_part_keeps_its_own() -> None:
    cache = KVCache(50, PAGE)
    finished(cache, *range(12))
    ((number, parent, root, *_),) = cache.watch.part(0, 10).nodes
    assert parent == 0
    cache.watch.take()
    finished(cache, *range(4), *range(60, 68))
    changes = cache.watch.take()
    rows = {row[0]: row for row in changes.nodes}
    upper = rows[number][1]
    assert upper > number
    assert rows[upper][1:6] == (0, root, 0, 4, 1)
    assert rows[number][1:6] == (upper, root, 4, 8, 2)
    assert changes.removed == []


def test_what_is_dropped_for_room_is_told_with_its_place() -> None:
    cache = KVCache(6, PAGE)
    finished(cache, *range(12))
    ((number, _, root, *_),) = cache.watch.part(0, 10).nodes
    cache.watch.take()
    cache.evict(1)
    changes = cache.watch.take()
    assert [row[:5] for row in changes.dropped] == [(number, root, 8, 4, 1)]
    assert [row[3:6] for row in changes.nodes] == [(0, 8, 2)]
    cache.evict(2)
    changes = cache.watch.take()
    assert [row[:5] for row in changes.dropped] == [(number, root, 0, 8, 2)]
    assert changes.removed == [(number, root)]
    assert changes.roots == {root: ""}
    assert changes.nodes == []


def test_what_is_on_disk_of_a_node_is_known_after_some_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_watch, "MOST_LOOKED", 3)
    monkeypatch.setattr(tree_watch, "MOST_NAMED", 60)
    rng = random.Random(0)
    cache, mirror = KVCache(120, PAGE), Mirror()
    cache.digests.engine = bytes(32)
    on_disk: set[bytes] = set()
    cache.watch.look_on_disk(lambda names: sum(1 for _ in itertools.takewhile(on_disk.__contains__, names)))

    def name(token_ids: list[int]) -> list[bytes]:
        chain = PageChain(root_of(bytes(32), ""), PAGE)
        chain.extend(key(*token_ids), len(token_ids) // PAGE)
        return chain.digests

    def stored_of(node: Node) -> int:
        return sum(digest in on_disk for digest in cache.digests.of(node))

    cache.watch.take()
    for _ in range(150):
        tokens = [rng.randrange(2) for _ in range(rng.randint(5, 40))]
        finished(cache, *tokens)
        if rng.random() < 0.3:
            on_disk.update(name(tokens)[: rng.randint(0, 10)])
        if rng.random() < 0.02:
            on_disk.clear()
        cache.evict(rng.randrange(4))
        mirror.apply(cache.watch.take())
    for _ in range(len(mirror.nodes)):
        mirror.apply(cache.watch.take())
    told = {number: row[8] for number, row in mirror.nodes.items()}
    assert told == {node.number: stored_of(node) for node in cache._tree.nodes() if node.parent is not None}
    assert len(set(told.values())) > 2
    assert {row[0]: row[8] for row in cache.watch.part(0, 100).nodes} == told
    cache.evict(120)
    assert sum(row[6] for row in cache.watch.take().dropped) == sum(told.values())


def test_times_of_last_use_are_seconds_of_this_clock() -> None:
    cache = KVCache(50, PAGE)
    began = time.monotonic_ns()
    finished(cache, *range(8))
    finished(cache, *range(40, 48))
    idle = [row[6] for row in cache.watch.part(0, 10).nodes]
    assert all(0 <= idle_ns <= time.monotonic_ns() - began for idle_ns in idle)
    assert idle[0] != idle[1]


def test_uses_have_times_that_differ_even_within_one_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: 5)
    cache = KVCache(50, PAGE)
    for first in range(0, 40, 10):
        finished(cache, *range(first, first + 4))
    used = [node.last_used for node in cache._tree.nodes() if node.parent is not None]
    assert len(set(used)) == 4
    cache.evict(1)
    assert min(used) not in {node.last_used for node in cache._tree.nodes()}


def test_too_many_notes_are_given_up_and_whoever_asks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_watch, "MOST_NOTES", 5)
    cache = KVCache(200, PAGE)
    cache.watch.take()
    for first in range(0, 1000, 100):
        finished(cache, *range(first, first + 5))
    assert not cache.watch.is_attached
    changes = cache.watch.take()
    assert (changes.is_complete, changes.nodes) == (False, [])
    assert len(cache.watch.part(0, 100).nodes) == 10
    finished(cache, 7, 7, 7, 7, 7)
    changes = cache.watch.take()
    assert changes.is_complete
    assert len(changes.nodes) == 1


def test_the_tokens_of_a_node() -> None:
    cache = KVCache(50, PAGE)
    finished(cache, *range(12), namespace="mine")
    finished(cache, *range(4), *range(60, 66), namespace="mine")
    rows = {row[3:5]: row[0] for row in cache.watch.part(0, 10).nodes}
    found = cache.watch.tokens(rows[4, 8], 100)
    assert found is not None
    assert (found.namespace, found.start, found.num_tokens, found.token_ids) == ("mine", 4, 8, list(range(4, 12)))
    cut = cache.watch.tokens(rows[4, 6], 3)
    assert cut is not None
    assert (cut.num_tokens, cut.token_ids) == (6, [60, 61, 62])
    assert cache.watch.tokens(found.root, 100) is None
    assert cache.watch.tokens(10**6, 100) is None


@pytest.mark.parametrize(
    ("tokens", "num_tokens", "reason", "num_nodes"),
    [
        (range(12), 12, None, 2),
        (range(6), 6, None, 2),
        ([0, 1, 2, 3, 60], 5, None, 2),
        ([0, 1, 2, 3, 99], 4, MissReason.DIVERGED, 1),
        ([*range(12), 99], 12, MissReason.NEW, 2),
        ([99], 0, MissReason.NEW, 0),
    ],
)
def test_where_tokens_are_found(tokens: Any, num_tokens: int, reason: MissReason | None, num_nodes: int) -> None:
    cache = KVCache(50, PAGE)
    finished(cache, *range(12))
    finished(cache, *range(4), *range(60, 66))
    before = real_places(cache)
    end, path = cache.find("", key(*tokens))
    assert (end.num_tokens, end.reason, len(path)) == (num_tokens, reason, num_nodes)
    assert all(number in {row[0] for row in cache.watch.part(0, 10).nodes} for number in path)
    assert len(real_places(cache)) == max(len(before), 3)
    assert cache.find("other", key(*tokens))[0].reason is MissReason.NAMESPACE


# -- of a whole core ---------------------------------------------------------------------------------------------------
def made_core(num_pages: int = 100, max_running_requests: int = 2) -> EngineCore:
    scheduler = Scheduler(
        KVCache(num_pages, PAGE),
        max_batch_tokens=8,
        max_running_requests=max_running_requests,
        context_length=100,
        vocab_size=50,
    )
    return EngineCore(scheduler, FakeRunner(num_pages, PAGE, 50))


def request(rid: str, *prompt: int, max_new_tokens: int = 4) -> Request:
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, ignore_eos=True)
    return Request(rid=rid, prompt_ids=np.array(prompt, np.int32), sampling=sampling)


def test_open_requests_are_told_with_how_far_they_are() -> None:
    core = made_core()
    core.answer("watch")
    before = time.time()
    core.add(request("a", *range(6)))
    core.add(request("b", *range(6), 13))
    core.add(request("c", 30, 31))
    core.step()
    told: Any = core.answer("changes", most_requests=10)
    a, b, c = told["requests"]
    assert a[:8] == ("a", True, a[2], 6, 6, 0, 1, 4)
    assert a[2] in told["roots"] and a[8] in {row[0] for row in told["nodes"]}
    assert a[9:] == (2, 0, "namespace", None, 0, 0)
    assert b == ("b", False, a[2], 7, 0, -1, 0, 4, 0, 0, 0, None, "in flight", 0, 0)
    assert c[:2] == ("c", True)
    assert told["stats"]["running"] == 2
    assert [(row[0], *row[2:]) for row in told["began"]] == [("a", 0, 0, "namespace"), ("c", 0, 0, "new")]
    assert all(before <= row[1] <= time.time() for row in told["began"])
    began = []
    while core.has_work:
        core.step()
        told = core.answer("changes", most_requests=10)
        began += told["began"]
    assert [(row[0], *row[2:]) for row in began] == [("b", 6, 6, None)]
    assert len(core.answer("requests", most=0)) == 0  # type: ignore[arg-type]
    assert told["cost_s"] > 0
    while core.has_work:
        core.step()
    assert core.answer("changes", most_requests=10)["requests"] == []  # type: ignore[index]


def test_who_shares_a_prompt() -> None:
    core = made_core()
    core.add(request("a", *range(8), max_new_tokens=30))
    core.add(request("z", *range(20, 28), max_new_tokens=30))
    for _ in range(4):
        core.step()
    found: Any = core.answer("find", namespace="", token_ids=list(range(6)))
    assert (found["num_tokens"], found["reason"], found["requests"], len(found["path"])) == (6, None, ["a"], 1)
    node: Any = core.answer("node", number=found["path"][0], most=100)
    assert node["token_ids"][:8] == list(range(8))
    assert core.answer("node", number=10**9, most=100) is None
    missed: Any = core.answer("find", namespace="x", token_ids=[1, 2])
    assert (missed["num_tokens"], missed["path"], missed["requests"], missed["root"]) == (0, [], [], 0)


def test_questions_about_the_tree_are_told_apart_from_what_is_none() -> None:
    core = made_core()
    with pytest.raises(EngineError, match="cannot answer 'nodes'"):
        core.answer("nodes", number=3)
    with pytest.raises(EngineError, match="cannot answer 'ping'"):
        core.answer("ping", most=3)


def test_nobody_who_begins_is_noted_once_nobody_watches() -> None:
    core = made_core()
    core.answer("watch")
    core.answer("unwatch")
    core.answer("unwatch")
    core.add(request("a", *range(6)))
    while core.has_work:
        core.step()
    watching = core._scheduler.watching
    assert not watching._beginnings.noted
    assert watching._beginnings not in watching._holds
    assert not core._scheduler._cache.watch.is_attached
