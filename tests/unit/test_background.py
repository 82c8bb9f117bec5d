"""Requests in the background: nobody else waits for them longer than a step. All is counted, nothing timed."""

from __future__ import annotations

import numpy as np
import pytest
from test_fair_share import Fresh, order
from test_scheduler import Bench, request

from mooli.scheduler.planning import BACKGROUND_PART
from mooli.types import Request

by_policy = pytest.mark.parametrize("policy", ["fcfs", "lpm"])


class Work(Fresh):
    def background(self, num_tokens: int = 4, rid: str = "", max_new_tokens: int = 1, client: str = "batch") -> Request:
        made = self.request(client, num_tokens, rid, max_new_tokens)
        made.is_background = True
        return made


def lengths(bench: Bench) -> list[int]:
    return sorted(bench.batches[-1].lengths.tolist())


@by_policy
def test_whoever_comes_goes_before_all_that_wait_in_the_background(policy: str) -> None:
    bench, work = Bench(max_running_requests=1, policy=policy), Work()
    bench.add(*(work.background() for _ in range(20)))
    bench.step()
    bench.add(*(work.request("user") for _ in range(3)))
    assert [rid.rstrip("0123456789") for rid in order(bench)][:3] == ["user"] * 3


@by_policy
def test_a_place_is_given_to_whoever_comes_in_the_very_next_step(policy: str) -> None:
    bench, work = Bench(max_running_requests=3, policy=policy), Work()
    bench.add(*(work.background(max_new_tokens=40) for _ in range(5)))
    for _ in range(4):
        bench.step()
    bench.add(*(work.request("user", rid=f"u{i}") for i in range(3)))
    assert {out.rid for out in bench.step() if out.finish is not None} == {"u0", "u1", "u2"}
    assert bench.scheduler.counters.preemptions == 3
    bench.run()
    assert all(len(bench.tokens(rid)) == 40 for rid in bench.outputs if not rid.startswith("u"))


def test_of_one_client_too_what_is_in_the_background_gives_way() -> None:
    bench, work = Bench(max_running_requests=2), Work()
    bench.add(work.background(max_new_tokens=40, client="a"), work.background(max_new_tokens=40, client="a"))
    bench.step()
    bench.add(work.request("a", rid="1", max_new_tokens=10))
    bench.step()
    bench.add(work.request("a", rid="2"))
    assert [out.rid for out in bench.step() if out.finish is not None] == ["2"]


def test_pages_are_given_to_whoever_comes_in_the_very_next_step() -> None:
    bench, work = Bench(num_pages=20, max_running_requests=8), Work()
    bench.add(*(work.background(20, max_new_tokens=20) for _ in range(3)))
    while bench.cache.num_available > 3:
        bench.step()
    bench.add(work.request("user", 60, rid="u"))
    assert [out.rid for out in bench.step() if out.finish is not None] == ["u"]
    bench.run()


def test_growing_answers_take_their_pages_from_the_background() -> None:
    bench, work = Bench(num_pages=24, max_running_requests=8), Work()
    bench.add(work.request("user", 8, rid="u", max_new_tokens=80))
    bench.step()
    bench.add(*(work.background(12, max_new_tokens=30) for _ in range(3)))
    bench.run()
    assert bench.last("u").num_preemptions == 0
    assert bench.scheduler.counters.preemptions > 0


def test_what_begins_alone_in_the_background_takes_no_more_than_another_may_wait_for() -> None:
    bench, work = Bench(max_batch_tokens=64, mixed_prefill_tokens=16, num_pages=100), Work()
    bench.add(work.background(150, rid="b"))
    bench.step()
    bench.step()
    assert [lengths(bench)] == [[16]]
    bench.add(work.request("user", 60, rid="u"))
    assert [out.rid for out in bench.step() if out.finish is not None] == ["u"]
    assert lengths(bench) == [16 // BACKGROUND_PART, 60]


def test_beside_others_the_background_has_a_small_part_of_a_step_and_goes_on() -> None:
    bench, work = Bench(max_batch_tokens=64, mixed_prefill_tokens=32, num_pages=200, max_running_requests=16), Work()
    bench.add(*(work.background(4, max_new_tokens=30) for _ in range(12)))
    for _ in range(3):
        bench.step()
    assert lengths(bench) == [1] * 12, "alone, all of them get their token"
    bench.add(work.request("user", 4, rid="u", max_new_tokens=100))
    bench.step()
    while "u" not in bench.outputs or bench.last("u").finish is None:
        bench.step()
        others = sum(lengths(bench)) - 1
        assert others <= 32 // BACKGROUND_PART
    assert bench.scheduler.counters.preemptions == 0
    assert sum(outs[-1].finish is not None for outs in bench.outputs.values()) > 8


def test_one_token_of_a_step_is_left_for_the_background_however_short_the_steps_are() -> None:
    bench, work = Bench(max_batch_tokens=8, mixed_prefill_tokens=1), Work()
    bench.add(work.background(4, rid="b", max_new_tokens=4), work.request("user", 4, rid="u", max_new_tokens=30))
    assert order(bench) == ["b", "u"]


@by_policy
def test_nobody_waits_for_a_prefix_that_is_computed_in_the_background(policy: str) -> None:
    bench = Bench(max_batch_tokens=64, mixed_prefill_tokens=8, num_pages=100, policy=policy)
    head = list(range(48))
    bench.add(request("b", [*head, 500], 1, is_background=True))
    bench.step()
    bench.add(request("u", [*head, 501], 1))
    assert [out.rid for out in bench.step() if out.finish is not None] == ["u"]
    bench.add(request("b2", [*head, 502], 1, is_background=True))
    bench.run()
    assert bench.last("b2").cached_tokens == 48


def test_in_the_background_clients_take_turns_too() -> None:
    bench, work = Bench(max_running_requests=1), Work()
    bench.add(*(work.background(client="a") for _ in range(30)))
    bench.step()
    bench.add(*(work.background(client="b") for _ in range(3)))
    assert "".join(rid[0] for rid in order(bench))[:7] == "bababaa"


def test_what_was_computed_in_the_background_is_not_held_against_a_client() -> None:
    bench, work = Bench(max_running_requests=1, num_pages=400), Work()
    bench.add(*(work.background(40, client="a") for _ in range(5)))
    for _ in range(5):
        bench.step()
    bench.add(*(work.request("b") for _ in range(4)), *(work.request("a") for _ in range(4)))
    assert "".join(rid[0] for rid in order(bench))[:8] == "babababa"


def test_answers_in_the_background_are_those_of_the_request_alone() -> None:
    alone = Bench()
    alone.add(request("b", list(range(30)), 40))
    alone.run()
    bench = Bench(num_pages=24, max_running_requests=2, mixed_prefill_tokens=8)
    bench.add(request("b", list(range(30)), 40, is_background=True))
    for number in range(12):
        bench.add(request(f"u{number}", [100 + number, *range(20)], 6))
        for _ in range(3):
            bench.step()
    bench.run()
    assert bench.tokens("b") == alone.tokens("b")
    assert bench.last("b").num_preemptions > 0


def test_a_request_in_the_background_can_be_ended_while_it_waits_and_while_it_runs() -> None:
    bench, work = Bench(max_running_requests=1), Work()
    bench.add(work.background(rid="a", max_new_tokens=40), work.background(rid="b"))
    bench.step()
    assert bench.scheduler.num_waiting == 1
    assert bench.scheduler.abort("b") and bench.scheduler.abort("a")
    bench.run()
    assert {rid: outs[-1].finish.type for rid, outs in bench.outputs.items() if outs[-1].finish} == {
        "a": "abort",
        "b": "abort",
    }
    assert bench.scheduler.flush_cache()


def test_a_request_that_is_held_lets_the_background_pass() -> None:
    class Never:
        reason = "never"
        held = True

        def begin_step(self, running: object) -> None:
            pass

        def holds(self, state: object) -> bool:
            return self.held and not state.is_background  # type: ignore[attr-defined]

        def began(self, state: object) -> None:
            pass

    hold, work = Never(), Work()
    bench = Bench(holds=[hold])
    bench.add(work.request("user", rid="u"), work.background(rid="b"))
    assert [out.rid for out in bench.step() if out.finish is not None] == ["b"]
    assert bench.step() == []
    hold.held = False
    bench.run()
    assert np.array_equal(bench.batches[-1].lengths, [4])
