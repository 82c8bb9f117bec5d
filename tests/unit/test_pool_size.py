"""The size of the KV pool, as a function of numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooli import ConfigError, OutOfMemoryError
from mooli.engine.pool_size import GIB, PoolNeeds, context_for, num_pool_pages, state_room

PAGE = {"bytes_per_page": 2**20, "page_size": 16}


def needs(**kwargs):
    given = {"available_bytes": 16 * GIB, "weight_bytes": GIB, "model_context": 4096, "max_running_requests": 48}
    return PoolNeeds(**{**PAGE, **given, **kwargs})


def pool_bytes(n):
    return num_pool_pages(n) * n.bytes_per_page


def test_by_default_half_of_what_the_weights_leave_is_taken():
    assert pool_bytes(needs()) == 15 * GIB // 2


def test_by_default_no_more_is_taken_than_all_running_requests_need():
    n = needs(max_running_requests=2, model_context=160)
    assert num_pool_pages(n) == 2 * 10


def test_by_default_a_gib_is_left_free_on_a_small_machine():
    n = needs(available_bytes=GIB + 300 * 2**20, weight_bytes=100 * 2**20)
    assert pool_bytes(n) == 200 * 2**20


def test_mem_fraction_static_counts_weights_and_pool_together():
    n = needs(mem_fraction_static=0.5)
    assert pool_bytes(n) == 7 * GIB


def test_max_total_tokens_is_the_size_whatever_the_default_rule_says():
    assert num_pool_pages(needs(max_total_tokens=100)) == 6
    assert pool_bytes(needs(max_total_tokens=14 * 1024 * 16)) == 14 * GIB


def test_max_total_tokens_that_does_not_fit_is_refused():
    with pytest.raises(OutOfMemoryError, match="lower max_total_tokens"):
        num_pool_pages(needs(max_total_tokens=16 * 1024 * 16))
    with pytest.raises(OutOfMemoryError, match="raise mem_fraction_static"):
        num_pool_pages(needs(max_total_tokens=8 * 1024 * 16, mem_fraction_static=0.5))


def test_max_total_tokens_below_one_page_is_refused():
    with pytest.raises(ConfigError, match="less than one page"):
        num_pool_pages(needs(max_total_tokens=15))


def test_a_context_longer_than_max_total_tokens_is_a_contradiction():
    with pytest.raises(ConfigError, match="does not fit in max_total_tokens"):
        num_pool_pages(needs(max_total_tokens=160, context_length=161))
    assert num_pool_pages(needs(max_total_tokens=160, context_length=160)) == 10


@pytest.mark.parametrize(
    "kwargs",
    [
        {"weight_bytes": 17 * GIB},
        {"available_bytes": 2 * GIB, "weight_bytes": GIB},
        {"mem_fraction_static": 0.05},
        {"available_bytes": 4 * GIB, "context_length": 2**20, "model_context": 2**20},
    ],
    ids=["weights alone", "nothing left free", "a small fraction", "a long context"],
)
def test_too_little_memory_says_what_is_needed_what_is_there_and_what_to_do(kwargs):
    with pytest.raises(OutOfMemoryError, match=r"needs [\d.]+ GiB, but memory holds .* were available .* What to do: "):
        num_pool_pages(needs(**kwargs))


def test_what_other_engines_have_claimed_is_told_where_memory_lacks():
    with pytest.raises(OutOfMemoryError, match=r"0.50 GiB were available \(20.00 GiB more are other engines'\)"):
        num_pool_pages(needs(available_bytes=GIB // 2, claimed_bytes=20 * GIB))


def test_the_context_is_the_models_if_the_pool_holds_it():
    assert context_for(needs(), 1000) == 4096
    assert context_for(needs(), 100) == 1600
    assert context_for(needs(context_length=100), 100) == 100


@given(
    available=st.integers(0, 64 * GIB),
    weights=st.integers(0, 64 * GIB),
    fraction=st.none() | st.floats(0.01, 1.0),
    page_bytes=st.integers(2**10, 2**26),
    context=st.integers(1, 2**20),
    running=st.integers(1, 4096),
)
def test_weights_and_pool_never_exceed_their_share(available, weights, fraction, page_bytes, context, running):
    n = needs(
        available_bytes=available,
        weight_bytes=weights,
        mem_fraction_static=fraction,
        bytes_per_page=page_bytes,
        model_context=context,
        max_running_requests=running,
    )
    try:
        pages = num_pool_pages(n)
    except OutOfMemoryError:
        return
    assert pages * 16 >= min(context, 256)
    limit = fraction * available if fraction is not None else available - max(GIB, available // 10)
    assert weights + pages * page_bytes <= limit


def test_states_take_their_share_before_pages() -> None:
    plain = needs(available_bytes=16 * GIB, weight_bytes=4 * GIB, max_running_requests=8)
    assert state_room(plain) is None
    hybrid = replace(plain, state_bytes=16 * 2**20, num_tried=8)
    room = state_room(hybrid)
    assert room is not None
    assert (room.num_running, room.num_tried) == (8, 8)
    assert room.num_snapshots * hybrid.state_bytes == GIB * 6 // 8, "an eighth of what pool and states take"
    pages = num_pool_pages(replace(hybrid, mem_fraction_static=0.625))
    assert (pages + 16 * (len_of(replace(hybrid, mem_fraction_static=0.625)))) == 6 * 1024, "together all of it"
    assert room.every_tokens == 4 * 16 * 16, "a state every four times as many bytes of pages"
    small = state_room(replace(hybrid, state_bytes=2**10))
    assert small is not None and small.every_tokens == 256
    none = state_room(replace(hybrid, snapshot_share=0.0))
    assert none is not None and none.num_snapshots == 0


def len_of(given: PoolNeeds) -> int:
    room = state_room(given)
    assert room is not None
    return room.num_slots


def test_fewer_requests_run_where_their_states_would_take_most_of_the_memory() -> None:
    given = needs(available_bytes=8 * GIB, weight_bytes=2 * GIB, max_running_requests=48, state_bytes=128 * 2**20)
    room = state_room(given)
    assert room is not None and 1 < room.num_running < 48
    assert num_pool_pages(given) > 0
    huge = replace(given, state_bytes=4 * GIB)
    with pytest.raises(OutOfMemoryError, match="recurrent states 4"):
        num_pool_pages(huge)


def test_a_pool_in_tokens_has_some_snapshots_however_small() -> None:
    room = state_room(needs(max_total_tokens=64, state_bytes=2**22))
    assert room is not None and room.num_snapshots == 8
