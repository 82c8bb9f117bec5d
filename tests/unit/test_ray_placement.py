"""Where a request goes: the ring, load, spill, warm-up and failures, without Ray."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooli.ray.heads import Heads
from mooli.ray.placement import UNCONFIRMED_S, Placement, Report, Rules


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def heads(index: int, conversation: int = 0, session: str = "") -> Heads:
    return Heads(b"head %d" % index, b"head %d %d" % (index, conversation), session)


def placement(*names: str, clock: Clock | None = None, **rules: float) -> Placement:
    made = Placement(Rules(**rules), clock or Clock())
    made.set_replicas(names)
    return made


def first(made: Placement, what: Heads | None, call: str = "a call") -> str:
    """Where a lone request goes, which ends at once."""
    name = made.place(call, what)[0]
    made.ended(call, name)
    return name


def test_a_head_has_the_same_replica_in_every_process_and_in_any_order_of_names():
    one, other = placement("a", "b", "c"), placement("c", "a", "b")
    assert [first(one, heads(i)) for i in range(200)] == [first(other, heads(i)) for i in range(200)]


def test_heads_are_shared_out_about_evenly():
    made = placement("a", "b", "c", "d")
    counts = Counter(first(made, heads(i)) for i in range(4000))
    assert len(counts) == 4
    assert all(700 < count < 1300 for count in counts.values())


def test_a_replica_that_goes_moves_its_own_heads_alone():
    before, after = placement("a", "b", "c"), placement("a", "c")
    for i in range(300):
        if (was := first(before, heads(i))) != "b":
            assert first(after, heads(i)) == was


def test_a_session_counts_alone_and_stays():
    made = placement("a", "b", "c", "d")
    assert len({first(made, heads(i, session="s")) for i in range(50)}) == 1
    assert len({first(made, heads(0, session=f"s{i}")) for i in range(50)}) == 4


def test_what_has_no_head_goes_where_least_is_to_do():
    made = placement("a", "b", "c")
    assert {made.place(f"call {i}", None)[0] for i in range(3)} == {"a", "b", "c"}


def test_a_request_counts_from_its_placement_to_its_end():
    made = placement("a", "b")
    name = made.place("x", heads(1))[0]
    assert made.load(name) == 1
    made.sent("x", name)
    made.ended("x", "another")
    assert made.load(name) == 1
    made.ended("x", name)
    made.ended("x", name)
    assert made.load(name) == 0


def test_a_call_may_be_placed_twice_on_the_same_replica():
    made = placement("a")
    made.place("x", None)
    made.place("x", None)
    made.ended("x", "a")
    assert made.load("a") == 1
    made.ended("x", "a")
    assert made.load("a") == 0


def test_a_burst_of_one_head_spills_before_anything_is_answered():
    made = placement("a", "b", "c", "d", spill_floor=4)
    counts = Counter(made.place(f"call {i}", heads(0, conversation=i))[0] for i in range(400))
    assert max(counts.values()) <= 1.5 * 100 + 1
    assert min(counts.values()) > 20


def test_below_the_floor_nothing_spills():
    made = placement("a", "b", spill_floor=8)
    assert len({made.place(f"call {i}", heads(0, conversation=i))[0] for i in range(8)}) == 1
    assert len({made.place(f"more {i}", heads(0, conversation=i))[0] for i in range(8)}) == 2


def test_a_conversation_spills_to_the_same_place_each_time():
    made = placement("a", "b", "c", "d", spill_floor=1, spill_factor=1.0)
    owner = made.place("fill", heads(0))[0]
    for i in range(50):
        assert len({first(made, heads(0, conversation=i)) for _ in range(3)}) == 1
    assert {first(made, heads(0, conversation=i)) for i in range(50)} == {"a", "b", "c", "d"} - {owner}


def test_where_all_are_busy_the_one_with_least_to_do_is_next():
    made = placement("a", "b", spill_floor=1, spill_factor=1.0)
    for i in range(30):
        made.place(f"call {i}", heads(i))
    assert abs(made.load("a") - made.load("b")) <= 2


def test_what_others_sent_counts_until_the_next_report():
    made = placement("a", "b", spill_floor=2)
    owner = made.place("x", heads(0))[0]
    made.reported(owner, Report(running=3, waiting=6))
    assert made.load(owner) == 9
    assert made.place("y", heads(0))[0] != owner
    made.reported(owner, Report(running=1))
    assert made.load(owner) == 1


def test_of_equal_loads_the_one_with_most_room_is_first():
    made = placement("a", "b", "c")
    made.reported("b", Report(free_tokens=500))
    assert made.place("x", None)[0] == "b"


def test_a_new_replica_warms_up():
    clock = Clock()
    made = placement("a", clock=clock, warm_up_s=60, warm_up_share=0.25)
    first(made, heads(0))
    made.set_replicas(["a", "b"])
    shares, owned = [], set()
    for after_s in (0, 20, 40, 60):
        clock.now_s = 1000 + after_s
        now = {i for i in range(2000) if first(made, heads(i)) == "b"}
        assert owned <= now, "a head that has come does not go again"
        owned = now
        shares.append(len(now) / 2000)
    assert 0.08 < shares[0] < 0.17
    assert shares == sorted(shares)
    assert 0.4 < shares[-1] < 0.6


def test_replicas_that_come_before_the_first_request_are_all_as_cold():
    made = placement("a", warm_up_share=0.0)
    made.set_replicas(["a", "b"])
    assert {first(made, heads(i)) for i in range(50)} == {"a", "b"}


def test_a_lone_replica_takes_everything_while_it_warms_up():
    made = placement("a", warm_up_share=0.0)
    first(made, heads(0))
    made.set_replicas(["b"])
    assert {first(made, heads(i)) for i in range(20)} == {"b"}


def test_failures_are_load_for_a_while():
    clock = Clock()
    made = placement("a", "b", clock=clock, failure_s=30)
    owner = first(made, heads(0))
    made.failed(owner)
    assert first(made, heads(0)) != owner
    assert first(made, None) != owner
    clock.now_s += 31
    assert first(made, heads(0)) == owner


def test_what_has_failed_a_call_is_its_last_choice():
    made = placement("a", "b", "c")
    order = made.place("x", heads(0))
    made.ended("x", order[0])
    again = made.place("x", heads(0), avoid=order[:1])
    assert again == [*order[1:], order[0]]


def test_who_is_wanted_has_the_call_and_no_other():
    made = placement("a", "b", "c")
    assert made.place("x", heads(0), wanted="b") == ["b"]
    assert sorted(made.place("y", heads(0), wanted="z")) == ["a", "b", "c"]


def test_a_call_that_was_never_sent_is_forgotten():
    clock = Clock()
    made = placement("a", clock=clock)
    made.place("lost", None)
    made.place("long", None)
    made.sent("long", "a")
    clock.now_s += UNCONFIRMED_S + 1
    made.place("next", None)
    assert made.load("a") == 2


def test_a_call_that_another_takes_counts_there():
    made = placement("a", "b")
    old = made.place("x", None)[0]
    new = ({"a", "b"} - {old}).pop()
    made.moved("x", old, new)
    assert (made.load(old), made.load(new)) == (0, 1)
    made.moved("x", new, "")
    assert made.load(new) == 0


def test_without_replicas_there_is_nobody_to_place_on():
    assert placement().place("x", heads(0)) == []


@pytest.mark.slow
@given(st.integers(0, 2**32 - 1))
def test_whatever_happens_counts_are_right_and_every_replica_is_named_once(seed):
    chance = random.Random(seed)
    clock = Clock()
    made = placement("r0", "r1", clock=clock, spill_floor=chance.randint(1, 4))
    names, num_made, placed = {"r0", "r1"}, 2, {}
    for number in range(100):
        clock.now_s += chance.random() * 4
        what = chance.random()
        if what < 0.5:
            call = f"call {number}"
            ranked = made.place(call, heads(chance.randint(0, 5), number) if chance.random() < 0.8 else None)
            assert sorted(ranked) == sorted(names)
            made.sent(call, ranked[0])
            placed[call] = ranked[0]
        elif what < 0.8 and placed:
            call = chance.choice(list(placed))
            made.ended(call, placed.pop(call))
        elif what < 0.85:
            made.failed(chance.choice(sorted(names)))
        elif what < 0.95:
            if chance.random() < 0.5 and len(names) > 1:
                names.discard(chance.choice(sorted(names)))
            else:
                names.add(f"r{num_made}")
                num_made += 1
            made.set_replicas(names)
            placed = {call: name for call, name in placed.items() if name in names}
    clock.now_s += 1000
    for name in names:
        assert made.load(name) == sum(where == name for where in placed.values())


def test_deciding_needs_no_ray():
    code = (
        "import sys; sys.modules['ray'] = None; import mooli.ray, mooli.ray.placement, mooli.ray.heads,"
        " mooli.ray.config, mooli.ray.merging"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
