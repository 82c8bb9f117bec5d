"""Clients take turns where several wait: nobody's flood keeps another from its share. All is counted, nothing timed."""

from __future__ import annotations

import random

import pytest
from test_scheduler import Bench, request

from mooli.scheduler.admission import MOST_CLIENTS, Waiting
from mooli.types import Request

by_policy = pytest.mark.parametrize("policy", ["fcfs", "lpm"])


class Fresh:
    """Prompts of which no two begin alike."""

    def __init__(self) -> None:
        self.count = 0

    def request(self, client: str, num_tokens: int = 4, rid: str = "", max_new_tokens: int = 1) -> Request:
        self.count += 1
        prompt = [self.count % 1000, self.count // 1000, *range(num_tokens - 2)]
        return request(rid or f"{client}{self.count}", prompt, max_new_tokens, client=client)


def order(bench: Bench, limit: int = 500) -> list[str]:
    """Clients of the requests, in the order in which they end."""
    ended: list[str] = []
    for _ in range(limit):
        if not bench.scheduler.has_requests:
            return ended
        ended += [out.rid for out in bench.step() if out.finish is not None]
    raise AssertionError("no end")


def clients(rids: list[str]) -> str:
    return "".join(rid[0] for rid in rids)


@by_policy
def test_a_flood_of_one_client_leaves_another_its_turn(policy: str) -> None:
    bench, fresh = Bench(max_running_requests=1, policy=policy), Fresh()
    bench.add(*(fresh.request("a") for _ in range(300)))
    bench.step()
    bench.add(*(fresh.request("b") for _ in range(3)))
    assert clients(order(bench))[:7] == "bababaa"


@by_policy
def test_turns_are_counted_in_tokens_not_in_requests(policy: str) -> None:
    bench, fresh = Bench(max_running_requests=1, policy=policy, num_pages=400), Fresh()
    bench.add(*(fresh.request("a", 40) for _ in range(8)))
    bench.add(*(fresh.request("b", 10) for _ in range(32)))
    computed = {"a": 0, "b": 0}
    for rid in order(bench)[:30]:
        computed[rid[0]] += 40 if rid[0] == "a" else 10
        assert abs(computed["a"] - computed["b"]) <= 40
    assert sum(computed.values()) > 300


@by_policy
def test_what_a_client_has_running_counts_for_it(policy: str) -> None:
    bench, fresh = Bench(max_running_requests=2, policy=policy), Fresh()
    bench.add(fresh.request("a", 4, rid="a-long", max_new_tokens=60), fresh.request("b", 4, rid="b-long"))
    bench.step()
    bench.step()
    for _ in range(20):  # the long output goes on
        bench.step()
    bench.add(*(fresh.request(client, 4) for client in "aaabbb"))
    assert clients(order(bench)[:3]) == "bbb"


@by_policy
@pytest.mark.parametrize("client", ["", "somebody"])
def test_requests_of_one_client_keep_the_order_of_the_policy(policy: str, client: str) -> None:
    def batches(*, name: str, is_queue_skipped: bool) -> list[list[list[int]]]:
        rng, bench = random.Random(5), Bench(num_pages=40, max_batch_tokens=16, policy=policy)
        if is_queue_skipped:  # what there was before clients: the policy's order over all that wait

            def in_turn(queue: Waiting, running: object, tokens_computed: int) -> object:
                states = sorted((s for q in queue._queues.values() for s in q), key=lambda s: s.arrival)
                states.sort(key=lambda s: (s.num_preemptions == 0, s.arrival))
                return queue._by_policy(states, tokens_computed)

            bench.scheduler._waiting.in_turn = in_turn.__get__(bench.scheduler._waiting)  # type: ignore[method-assign]
        for index in range(40):
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 12))]
            bench.add(request(f"r{index}", prompt, rng.randrange(1, 20), client=name))
            bench.step()
        bench.run()
        return [[b.token_ids.tolist(), b.starts.tolist(), b.req_indices.tolist()] for b in bench.batches]

    assert batches(name=client, is_queue_skipped=False) == batches(name="", is_queue_skipped=True)


@by_policy
def test_nobody_saves_up_turns_by_asking_for_nothing(policy: str) -> None:
    bench, fresh = Bench(max_running_requests=1, policy=policy), Fresh()
    bench.add(*(fresh.request(client) for client in "ab"))
    bench.step()
    for _ in range(100):  # only one of the two wants something, all the time
        bench.add(fresh.request("a"))
        bench.step()
    bench.add(*(fresh.request(client) for client in "aaaaaabbbbbb"))
    ended = clients(order(bench))
    assert max(map(len, ended.strip("b").split("a"))) <= 2, "they take turns"


@by_policy
def test_newcomers_do_not_keep_a_client_from_its_turn(policy: str) -> None:
    bench, fresh = Bench(max_running_requests=1, policy=policy), Fresh()
    bench.add(fresh.request("x"), fresh.request("a", 60, rid="a-first"), fresh.request("a", rid="a-waits"))
    bench.step()
    came = 0
    while "a-waits" not in bench.outputs:
        came += 1
        for index in range(2):  # each a client of its own, twice as many as can be served
            bench.add(fresh.request(f"new{came}.{index}", 10))
        bench.step()
        assert came < 130, "the client that was served before starves"


@pytest.mark.slow
def test_the_books_about_clients_stay_small() -> None:
    bench, fresh = Bench(max_running_requests=2), Fresh()
    bench.add(fresh.request("a", rid="a-long", max_new_tokens=190))
    bench.step()
    for index in range(3 * MOST_CLIENTS):
        if not bench.scheduler.num_waiting and bench.scheduler.num_running < 2 and "a-long" in bench.outputs:
            finished = bench.outputs["a-long"][-1].finish is not None
            if finished:
                bench.add(fresh.request("a", rid=f"a-long{index}", max_new_tokens=190))
        bench.add(fresh.request(f"client {index}"))
        bench.step()
        assert len(bench.scheduler._waiting._served) <= MOST_CLIENTS + 4
    bench.run(1000)
    assert not bench.scheduler._waiting._served


@by_policy
def test_a_request_that_waits_for_a_twin_does_not_hold_up_its_client_or_others(policy: str) -> None:
    bench, fresh = Bench(max_running_requests=8, max_batch_tokens=16, policy=policy), Fresh()
    shared = list(range(100, 120))
    bench.add(request("a-leader", shared, 1, client="a"))
    bench.step()
    bench.add(request("a-twin", [*shared, 5], 1, client="a"), fresh.request("a"), fresh.request("b"))
    bench.step()
    assert sorted(clients(list(bench.outputs))) == ["a", "a", "b"]
    assert bench.scheduler.num_waiting == 1
    assert order(bench) == ["a-twin"]
    assert bench.last("a-twin").cached_tokens == 20


@by_policy
def test_a_priority_is_a_head_start_beside_other_clients_too(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mooli.scheduler.admission.PRIORITY_TOKENS", 10)
    bench, fresh = Bench(max_running_requests=1, policy=policy, priorities=True), Fresh()
    bench.add(*(fresh.request("a") for _ in range(20)))
    urgent = [fresh.request("b") for _ in range(20)]
    for each in urgent:
        each.priority = 3
    bench.add(*urgent)
    ended = clients(order(bench))
    assert ended.startswith("bbbbb")
    assert ended.index("a") < 9, "by twenty tokens, and no more"


@by_policy
def test_places_that_one_client_holds_do_not_keep_another_waiting(policy: str) -> None:
    """Its answers have no end; the other is answered in the very next step, at the cost of the last of them."""
    bench, fresh = Bench(max_running_requests=3, policy=policy), Fresh()
    bench.add(*(fresh.request("a", max_new_tokens=40) for _ in range(5)))
    for _ in range(4):
        bench.step()
    bench.add(fresh.request("b", rid="b"))
    assert [out.rid for out in bench.step() if out.finish is not None] == ["b"]
    assert bench.scheduler.counters.preemptions == 1
    bench.run()
    assert all(len(bench.tokens(rid)) == 40 for rid in bench.outputs if rid != "b")


def test_pages_that_one_client_holds_do_not_keep_another_waiting() -> None:
    bench, fresh = Bench(num_pages=20, max_running_requests=8), Fresh()
    bench.add(*(fresh.request("a", 20, max_new_tokens=20) for _ in range(3)))
    while bench.cache.num_available > 3:
        bench.step()
    bench.add(fresh.request("b", 24, rid="b"))
    assert [out.rid for out in bench.step() if out.finish is not None] == ["b"]


def test_the_only_request_of_a_client_gives_way_to_nobody() -> None:
    bench, fresh = Bench(num_pages=16, max_running_requests=1), Fresh()
    bench.add(fresh.request("a", 20, rid="a", max_new_tokens=20))
    bench.step()
    for _ in range(5):
        bench.add(fresh.request("b", 20))
    assert order(bench)[0] == "a"
    assert bench.scheduler.counters.preemptions == 0


def test_a_prompt_in_progress_leaves_another_client_the_step() -> None:
    bench, fresh = Bench(max_batch_tokens=16, num_pages=100), Fresh()
    bench.add(fresh.request("a", 180, rid="a"), fresh.request("a", 180, rid="a2"))
    bench.step()
    bench.add(fresh.request("b", 15, rid="b"))
    assert [out.rid for out in bench.step() if out.finish is not None] == ["b"]
    assert sorted(bench.batches[-1].lengths.tolist()) == [1, 15]


def test_beside_the_end_of_anothers_prompt_a_long_one_takes_a_quarter_of_the_step() -> None:
    bench, fresh = Bench(max_batch_tokens=16, num_pages=100), Fresh()
    bench.add(fresh.request("a", 180, rid="a"))
    bench.step()
    bench.add(fresh.request("b", 5, rid="b"))
    bench.step()
    assert sorted(bench.batches[-1].lengths.tolist()) == [4, 5]
    bench.add(fresh.request("a", 4, rid="a-short"))
    bench.add(fresh.request("b", 5, rid="b2"))
    bench.step()
    assert sorted(bench.batches[-1].lengths.tolist()) == [4, 4, 5], "what ends too is not held up"


def test_within_a_client_no_token_of_a_step_is_left_out() -> None:
    bench, fresh = Bench(max_batch_tokens=16, num_pages=100), Fresh()
    bench.add(fresh.request("a", 20, rid="a"), fresh.request("a", 60, rid="a2"))
    bench.step()
    bench.step()
    assert [batch.num_tokens for batch in bench.batches] == [16, 16]


def test_newcomers_do_not_hold_up_a_prompt_in_progress() -> None:
    bench, fresh = Bench(max_batch_tokens=16, num_pages=200, max_running_requests=16), Fresh()
    bench.add(fresh.request("a", 160, rid="a"))
    bench.step()
    steps = 0
    while "a" not in bench.outputs:
        steps += 1
        bench.add(fresh.request(f"new{steps}", 12))
        bench.step()
        assert steps < 60


def test_of_prompts_in_progress_that_of_the_client_with_less_comes_first() -> None:
    bench, fresh = Bench(max_batch_tokens=16, num_pages=100), Fresh()
    bench.add(fresh.request("a", 180, rid="a"))
    bench.step()
    bench.add(fresh.request("b", 30, rid="b"))
    assert order(bench) == ["b", "a"]
    assert len(bench.batches) == 14  # no token of a step is left out for it


def test_a_prompt_with_log_probabilities_takes_a_quarter_of_a_step() -> None:
    bench, fresh = Bench(max_batch_tokens=16), Fresh()
    wanted = fresh.request("a", 10, rid="a")
    wanted.return_logprob, wanted.logprob_start = True, 0
    bench.add(wanted)
    bench.run()
    assert [batch.num_tokens for batch in bench.batches] == [4, 4, 2]


def test_where_there_are_several_clients_a_step_is_as_short_as_beside_streams() -> None:
    bench, fresh = Bench(max_batch_tokens=16, mixed_prefill_tokens=4, num_pages=100), Fresh()
    bench.add(fresh.request("a", 40, rid="a"))
    bench.step()
    bench.add(fresh.request("b", 2, rid="b"))
    bench.run()
    assert [batch.num_tokens for batch in bench.batches] == [16, 2 + 1, *[4] * 5, 3]
    bench.add(fresh.request("a", 16, rid="a2"))  # nobody was left: the books are new
    bench.run()
    assert bench.batches[-1].num_tokens == 16
