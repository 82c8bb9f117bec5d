"""The KV cache as the scheduler uses it: one owner for each page, from match to release."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mooli.batch import PageCopy
from mooli.cache.kv_cache import KVCache
from mooli.cache.match_end import MatchEnd, MissReason
from mooli.cache.page_pool import PagePool
from mooli.cache.radix_tree import token_key
from mooli.cache.request_pages import Admission, Given, RequestPages
from mooli.cache.states import StateRoom
from mooli.cache.turns import Turn
from mooli.errors import ConfigError, EngineError
from mooli.types import Pin


def key(*token_ids: int) -> bytes:
    return token_key(np.array(token_ids, np.int32))


def opened(cache: KVCache, *token_ids: int) -> RequestPages:
    """A request for these tokens: its cached prefix locked and room for all of them."""
    held = cache.open(cache.match("", key(*token_ids), len(token_ids) - 1))
    assert cache.grow(held, len(token_ids))
    return held


def finished(cache: KVCache, *token_ids: int, **turn: Any) -> None:
    """turn: fields of `Turn`, whose prompt is all of it."""
    held = opened(cache, *token_ids)
    asks = Turn(key(*token_ids), **turn) if turn else None
    cache.release(held, key(*token_ids[held.num_shared * cache.page_size :]), asks)
    cache.check([])


def admitted(cache: KVCache, *token_ids: int, max_matched: int | None = None, **fields: Any) -> Admission | None:
    most = len(token_ids) - 1 if max_matched is None else max_matched
    return cache.admit("", key(*token_ids), max_matched=most, **{"most_tokens": 100, **fields})


def test_the_pool_hands_out_each_page_once() -> None:
    pool = PagePool(5)
    assert sorted(pool.allocate(2) + pool.allocate(3)) == [0, 1, 2, 3, 4]
    with pytest.raises(EngineError, match="evict first"):
        pool.allocate(1)


def test_the_pool_refuses_to_free_a_free_page() -> None:
    with pytest.raises(EngineError, match="freed twice"):
        PagePool(3).free([1])


def test_released_pages_serve_the_next_request_with_the_same_prefix() -> None:
    cache = KVCache(8, 4)
    finished(cache, *range(10))
    held = opened(cache, *range(8), 50, 51)
    assert (held.num_shared, len(held.pages), cache.num_tree_pages) == (2, 3, 3)
    cache.check([held])


def test_a_match_inside_a_page_names_the_page_to_copy_and_locks_it() -> None:
    cache = KVCache(3, 4)
    finished(cache, *range(8))
    match = cache.match("", key(*range(6), 50, 51), 7)
    held = cache.open(match)
    assert (len(match.pages), match.head_tokens) == (1, 2)
    assert cache.num_evictable == 0
    assert not cache.grow(held, 16)
    cache.drop_copy_source(held)
    cache.drop_copy_source(held)
    assert cache.num_evictable == 1
    assert cache.grow(held, 12)
    cache.check([held])


@pytest.mark.parametrize(("granularity", "found"), [(1, 7), (2, 6), (4, 4)])
def test_a_match_is_cut_to_the_granularity(granularity: int, found: int) -> None:
    cache = KVCache(4, 4, match_granularity_tokens=granularity)
    ids = np.arange(8, dtype=np.int32)
    held = cache.open(cache.match("", token_key(ids), 8))
    assert cache.grow(held, 8)
    cache.release(held, token_key(ids))
    match = cache.match("", token_key(ids), 7)
    assert 4 * len(match.pages) + match.head_tokens == found
    assert (match.source_page >= 0) == (match.head_tokens > 0)
    again = cache.open(match)
    assert (again.copy_source is not None) == (match.head_tokens > 0)
    cache.check([again])


@pytest.mark.parametrize("granularity", [0, 3, 8])
def test_a_granularity_that_does_not_divide_a_page_is_refused(granularity: int) -> None:
    with pytest.raises(ConfigError, match=f"match_granularity_tokens={granularity}.*page size of 4"):
        KVCache(4, 4, match_granularity_tokens=granularity)


def test_growth_evicts_what_nobody_uses_and_nothing_else() -> None:
    cache = KVCache(4, 4)
    finished(cache, *range(8))
    held = opened(cache, *range(50, 62))
    assert (cache.num_tree_pages, cache.num_free, cache.num_evicted_pages) == (1, 0, 1)
    assert not cache.grow(held, 20)
    assert len(held.pages) == 3, "a growth that cannot be done changes nothing"
    cache.check([held])


def test_inserting_while_running_makes_computed_pages_available_at_once() -> None:
    cache = KVCache(8, 4)
    held = opened(cache, *range(10))
    cache.insert(held, key(*range(8)))
    assert held.num_shared == 2
    assert len(cache.match("", key(*range(9)), 8).pages) == 2
    assert cache.num_evictable == 0
    cache.check([held])


def test_a_duplicate_is_freed_and_the_page_list_points_at_the_first() -> None:
    cache = KVCache(8, 4)
    first, second = opened(cache, *range(8)), opened(cache, *range(8))
    cache.insert(first, key(*range(8)))
    assert first.pages != second.pages
    cache.insert(second, key(*range(8)))
    assert first.pages == second.pages
    assert cache.num_free == 6
    cache.check([first, second])


def test_discarding_keeps_nothing_that_was_not_inserted() -> None:
    cache = KVCache(8, 4)
    held = opened(cache, *range(12))
    cache.insert(held, key(*range(4)))
    cache.discard(held)
    assert (cache.num_tree_pages, cache.num_free) == (1, 7)
    cache.check([])


def test_forgetting_takes_back_what_was_inserted() -> None:
    cache = KVCache(8, 4)
    held = opened(cache, *range(12))
    cache.insert(held, key(*range(8)))
    cache.forget(held)
    assert (cache.num_tree_pages, cache.num_free) == (0, 8)
    cache.check([])


def test_forgetting_spares_what_others_had_computed() -> None:
    cache = KVCache(8, 4)
    finished(cache, *range(12))
    held = opened(cache, *range(21))
    cache.insert(held, key(*range(12, 20)))
    cache.forget(held)
    assert (cache.num_tree_pages, cache.num_free) == (3, 5)
    assert len(cache.match("", key(*range(21)), 20).pages) == 3
    cache.check([])


def test_forgetting_spares_a_page_that_another_gave_while_it_was_computed() -> None:
    cache = KVCache(8, 4)
    first, second = opened(cache, *range(9)), opened(cache, *range(9))
    cache.insert(first, key(*range(4)))
    cache.insert(second, key(*range(8)))
    cache.release(first, key(*range(4, 8)))
    cache.forget(second)
    assert cache.num_tree_pages == 1, "the first one's; the second page of both is that of the second"
    cache.check([])


def test_what_is_forgotten_while_another_uses_it_goes_when_that_ends() -> None:
    cache = KVCache(8, 4)
    held = opened(cache, *range(12))
    cache.insert(held, key(*range(12)))
    user = opened(cache, *range(8), 50)
    cache.forget(held)
    assert cache.num_tree_pages == 2
    cache.check([user])
    cache.discard(user)
    assert (cache.num_tree_pages, cache.num_free) == (0, 8)
    cache.check([])


def test_what_is_forgotten_while_it_is_copied_goes_after_the_copy() -> None:
    cache = KVCache(8, 4)
    held = opened(cache, *range(8))
    cache.insert(held, key(*range(8)))
    user = opened(cache, *range(6), 50)
    cache.forget(held)
    assert cache.num_tree_pages == 2
    cache.drop_copy_source(user)
    assert cache.num_tree_pages == 1
    cache.check([user])


def test_a_page_that_is_used_again_is_not_taken_for_the_one_that_was_forgotten() -> None:
    cache = KVCache(4, 4)
    held = opened(cache, *range(8))
    cache.insert(held, key(*range(8)))
    user = opened(cache, *range(8), 50, 51, 52, 53)
    cache.forget(held)
    cache.release(user, key(50, 51, 52, 53))
    assert cache.num_tree_pages == 3, "what is built on it was computed by one that is trusted"
    cache.evict(3)
    finished(cache, *range(60, 72))
    cache.discard(opened(cache, *range(60, 73)))
    assert cache.num_tree_pages == 3
    cache.check([])


def test_a_request_that_runs_again_forgets_what_it_gave_before() -> None:
    cache = KVCache(8, 4)
    finished(cache, *range(4))
    held = opened(cache, *range(14))
    given = held.given
    cache.release(held, key(*range(4, 14)))
    again = cache.open(cache.match("", key(*range(14)), 13), given)
    assert again.num_shared == 3
    cache.drop_copy_source(again)
    cache.forget(again)
    assert cache.num_tree_pages == 1, "the partly filled one has gone too"
    cache.check([])


def test_flushing_spares_what_is_in_use() -> None:
    cache = KVCache(8, 4)
    finished(cache, *range(12))
    held = opened(cache, *range(5))
    cache.flush()
    assert cache.num_tree_pages == 1
    cache.check([held])


def test_evicting_frees_pages_on_request() -> None:
    cache = KVCache(8, 4)
    finished(cache, *range(12))
    assert cache.evict(2) == 2
    assert (cache.num_free, cache.num_available) == (7, 8)


def test_a_disabled_cache_has_the_same_interface_and_keeps_nothing() -> None:
    cache = KVCache(8, 4, enabled=False)
    finished(cache, *range(12))
    assert cache.num_free == 8
    held = opened(cache, *range(12))
    cache.insert(held, key(*range(8)))
    assert (held.num_shared, cache.num_tree_pages) == (0, 0)
    cache.check([held])


@pytest.mark.parametrize("holders", [[], [RequestPages([0, 1])]], ids=["a lost page", "a page with two owners"])
def test_check_finds(holders: list[RequestPages]) -> None:
    cache = KVCache(4, 4)
    if not holders:
        cache._pool.allocate(1)
    with pytest.raises(EngineError, match="owners"):
        cache.check(holders)


# -- a request begins -------------------------------------------------------------------------------------------------
def test_admission_gives_pages_for_what_matched_and_for_the_first_tokens_to_compute() -> None:
    cache = KVCache(16, 4)
    finished(cache, *range(12))
    admission = admitted(cache, *range(10), *range(50, 60), most_tokens=5)
    assert admission is not None
    held = admission.held
    assert (held.num_shared, len(held.pages), admission.num_matched, admission.num_tokens) == (2, 4, 10, 5)
    assert admission.copies == [PageCopy(held.copy_source.pages[0], held.pages[2], 2)]  # type: ignore[union-attr]
    cache.check([held])


def test_who_cannot_be_admitted_leaves_nothing_locked_and_takes_nothing() -> None:
    cache = KVCache(4, 4)
    finished(cache, *range(8))
    assert admitted(cache, *range(8), 50, num_pages=3, promised_pages=2) is None
    assert cache.num_available == 4
    cache.check([])
    assert admitted(cache, *range(8), 50, num_pages=3, promised_pages=1) is not None


def test_alone_in_a_full_pool_a_request_takes_the_page_that_it_could_have_copied() -> None:
    cache = KVCache(2, 4)
    finished(cache, *range(8))
    admission = admitted(cache, *range(6), 50, 51)
    assert admission is not None
    assert (admission.num_matched, admission.copies, len(admission.held.pages)) == (4, [], 2)
    assert admission.end == MatchEnd(6, MissReason.DIVERGED, 6), "where the tokens differ, used or not"
    cache.check([admission.held])


def test_where_and_why_a_match_ends() -> None:
    cache = KVCache(32, 4)
    assert _end_of(cache, 1, 2, 3) == MatchEnd(0, MissReason.NAMESPACE)
    finished(cache, *range(10, 20))
    assert _end_of(cache, 1, 2, 3) == MatchEnd(0, MissReason.NEW), "nothing begins like this"
    assert _end_of(cache, *range(10, 20)) == MatchEnd(9, None), "one token is always computed"
    assert _end_of(cache, *range(10, 20), 20, 21) == MatchEnd(10, MissReason.NEW), "nothing was there yet"
    assert _end_of(cache, *range(10, 16), 70, 71) == MatchEnd(6, MissReason.DIVERGED, 16), "inside a page"
    assert _end_of(cache, *range(10, 18), 70, 71) == MatchEnd(8, MissReason.DIVERGED, 18), "at the end of a page"
    assert _end_of(cache, *range(10, 20), max_matched=7) == MatchEnd(7, MissReason.HELD_BACK, num_lost=2)
    assert _end_of(cache, 10, 70, 71, max_matched=2) == MatchEnd(1, MissReason.DIVERGED, 11), "it came to differ first"
    finished(cache, *range(10, 18), *range(40, 50))
    assert _end_of(cache, *range(10, 18), 70, 71) == MatchEnd(8, MissReason.DIVERGED, 40), "of two, the one used last"


def test_a_match_cut_for_the_device_ends_where_the_tokens_differ() -> None:
    cache = KVCache(8, 4, match_granularity_tokens=2)
    finished(cache, *range(8))
    admission = admitted(cache, 0, 1, 2, 50, 51)
    assert admission is not None
    assert (admission.num_matched, admission.end) == (2, MatchEnd(3, MissReason.DIVERGED, 3))


def test_a_disabled_cache_says_so() -> None:
    assert _end_of(KVCache(8, 4, enabled=False), 1, 2, 3) == MatchEnd(0, MissReason.DISABLED)


def _end_of(cache: KVCache, *token_ids: int, max_matched: int | None = None) -> MatchEnd:
    admission = admitted(cache, *token_ids, max_matched=max_matched)
    assert admission is not None
    cache.check([admission.held])
    cache.discard(admission.held)
    return admission.end


# -- what is kept longer, and what goes first --------------------------------------------------------------------------
HEAD = (1, 1, 1, 1)
"""What conversations begin with: a page."""


def first_gone(cache: KVCache, *sequences: tuple[int, ...]) -> int:
    """Which of these sequences, all cached whole, loses its last page first."""
    assert cache.evict(1) == 1
    cache.check([])
    lost = [i for i, ids in enumerate(sequences) if len(cache.match("", key(*ids), len(ids)).pages) * 4 < len(ids)]
    assert len(lost) == 1
    return lost[0]


@pytest.mark.parametrize(
    ("turn", "is_known"),
    [
        ({"session": "s"}, True),
        ({"session": "s2", "previous": "s"}, True),
        ({"session": "other"}, False),
        ({"diverged_at": 5}, True),
        ({"pins": (Pin(5),)}, False),
    ],
)
def test_what_a_newer_turn_has_left_behind_goes_first(turn: dict[str, Any], is_known: bool) -> None:
    cache = KVCache(32, 4, retention_share=0.5)
    other, older = (*HEAD, *range(30, 38)), (*HEAD, 90, 91, 92, 93, 94, 95, 96, 97)
    finished(cache, *other)
    finished(cache, *older, session="s")
    newer = (*HEAD, 90, 94, 95, 96, 97, 20, 21, 22)  # whose page begins as a copy
    finished(cache, *newer, **turn)
    assert first_gone(cache, other, older, newer) == (1 if is_known else 0)


def test_branches_that_are_no_older_turns_stay() -> None:
    cache = KVCache(32, 4)
    other, sample = (*HEAD, *range(30, 38)), (*HEAD, 90, 91, 92, 93, 94, 95, 96, 97)
    finished(cache, *other)
    finished(cache, *sample)
    finished(cache, *HEAD, 93, 94, 95, 20, diverged_at=4)  # not all of its last words
    finished(cache, *HEAD, 40, 41, 42, 43, session="t")
    finished(cache, *other, 50, 51, 52, 53, session="s")
    finished(cache, *other, 50, 51, 52, 53, 70, 71, 72, 73)  # another goes on from there
    finished(cache, *other, 60, 61, 62, 63, session="s")
    finished(cache, 2, 2, 2, 2, session="t")  # something else of the same name
    assert all(node.last_used >= 0 for node in cache._tree.nodes())


def test_what_is_pinned_outlives_what_came_later_and_never_stands_in_the_way() -> None:
    cache = KVCache(8, 4, retention_share=0.5)
    pinned = tuple(range(16))
    finished(cache, *pinned, pins=(Pin(60, num_tokens=6), Pin(60, weight=2, num_tokens=3)))
    assert cache.num_retained == 2, "to the end of the page in which six tokens end"
    for first in range(20, 100, 10):
        finished(cache, *range(first, first + 10))
    assert len(cache.match("", key(*pinned), 16).pages) == 2
    for first in range(100, 200, 20):
        finished(cache, *range(first, first + 16), pins=(Pin(1000, weight=9),))
        assert cache.num_retained <= 4
    held = opened(cache, *range(200, 232))
    assert len(held.pages) == 8, "all of the pool"
    cache.check([held])
    unlimited = KVCache(8, 4)
    finished(unlimited, *pinned, pins=(Pin(60),))
    assert unlimited.num_retained == 0


# -- recurrent states --------------------------------------------------------------------------------------------------
def with_states(num_pages: int = 16, *, snapshots: int = 4, every: int = 64, **fields: Any) -> KVCache:
    room = StateRoom(num_running=3, num_tried=2, num_snapshots=snapshots, every_tokens=every)
    return KVCache(num_pages, 4, states=room, **fields)


def begun(cache: KVCache, *token_ids: int) -> Admission:
    admission = cache.admit("", key(*token_ids), max_matched=len(token_ids) - 1, most_tokens=len(token_ids))
    assert admission is not None
    return admission


def computed(cache: KVCache, admission: Admission, *token_ids: int) -> list[int]:
    """The request computes all its tokens in a step, and ends. After how many of them states were kept."""
    held = admission.held
    kept = cache.begin_step(held, admission.num_matched, len(token_ids) - admission.num_matched, 0)
    assert cache.end_step(held, len(token_ids))
    first = held.num_shared * cache.page_size
    cache.release(held, key(*token_ids[first:]))
    cache.check([])
    return [admission.num_matched + count for count, _ in kept]


def test_a_match_ends_at_the_deepest_snapshot_whose_state_is_copied() -> None:
    cache = with_states()
    assert computed(cache, begun(cache, *range(10)), *range(10)) == [8], "a page less than all that could be asked"
    assert cache.states.num_snapshots == 2, "and that of the end"
    longer = begun(cache, *range(10), 50)
    assert (longer.num_matched, longer.end.reason) == (10, None)
    assert [copy.target for copy in longer.state_copies] == [longer.held.state]
    assert longer.state_copies[0].source != longer.held.state, "copied, never shared"
    cache.discard(longer.held)
    again = begun(cache, *range(10))
    assert (again.num_matched, again.end) == (8, MatchEnd(8, MissReason.NO_STATE, num_lost=1))
    cache.discard(again.held)
    other = begun(cache, *range(7), 60, 61)
    assert (other.num_matched, other.end) == (0, MatchEnd(0, MissReason.NO_STATE, num_lost=7)), (
        "pages alone are of no use"
    )
    assert computed(cache, other, *range(7), 60, 61) == [4, 8], "it keeps what it has in common with others"
    third = begun(cache, *range(5), 70)
    assert third.num_matched == 4
    cache.discard(third.held)
    cache.flush()
    assert (cache.states.num_snapshots, cache.states.num_free, cache.num_free) == (0, 9, 16)
    cache.check([])


def test_the_snapshot_used_least_recently_makes_room_and_its_pages_stay() -> None:
    cache = with_states(snapshots=2)
    computed(cache, begun(cache, *range(6)), *range(6))  # at 4 and 6
    cache.discard(begun(cache, *range(4), 80).held)  # that of 4 is used
    computed(cache, begun(cache, 90, 91), 90, 91)
    assert (cache.states.num_snapshots, cache.states.num_dropped, cache.num_tree_pages) == (2, 1, 3)
    assert begun(cache, *range(6), 80).num_matched == 4
    none = with_states(snapshots=0)
    assert computed(none, begun(none, *range(9)), *range(9)) == []
    assert begun(none, *range(9)).num_matched == 0


def test_snapshots_of_what_is_retained_are_given_up_last_and_are_a_share_of_all() -> None:
    cache = with_states(32, retention_share=0.5)

    def ended(*token_ids: int, pins: tuple[Pin, ...] = ()) -> None:
        admission = begun(cache, *token_ids)
        cache.begin_step(admission.held, admission.num_matched, len(token_ids) - admission.num_matched, 0)
        cache.end_step(admission.held, len(token_ids))
        first = admission.held.num_shared * cache.page_size
        cache.release(admission.held, key(*token_ids[first:]), Turn(key(*token_ids), pins) if pins else None)
        cache.check([])

    for first in (0, 20, 40):
        ended(*range(first, first + 9), pins=(Pin(60, num_tokens=8),))
        for other in range(3):
            ended(100 + first + other, 90)
    found = [begun(cache, *range(first, first + 9), 99).num_matched for first in (0, 20, 40)]
    assert found == [0, 8, 8], "two of four may be"
    assert cache.states.num_snapshots == 4


def test_a_state_is_kept_where_a_pin_ends() -> None:
    cache = with_states(retention_share=0.5)
    admission = begun(cache, *range(20))
    cache.want_states(admission, [6, None])
    assert computed(cache, admission, *range(20)) == [4, 16]
    assert begun(cache, *range(6), 90).num_matched == 4


def test_snapshots_go_with_their_pages() -> None:
    cache = with_states()
    computed(cache, begun(cache, *range(14)), *range(14))
    assert cache.states.num_snapshots == 2
    cache.evict(1)
    cache.check([])
    assert cache.states.num_snapshots == 1, "the last page had the state of the end"
    assert begun(cache, *range(14)).num_matched == 12


def test_a_state_after_right_guesses_is_kept_and_those_after_wrong_ones_are_not() -> None:
    cache = with_states()
    admission = begun(cache, 1, 2, 3)
    held, first = admission.held, admission.held.state
    cache.begin_step(held, 0, 3, 0)
    assert cache.end_step(held, 3) and held.state == first
    tried = dict(cache.begin_step(held, 3, 3, 2))
    assert sorted(tried) == [1, 2], "after the known token, and after the first guess"
    assert cache.end_step(held, 5)
    assert held.state == tried[2] and first not in held.slots
    cache.check([held])
    cache.begin_step(held, 5, 3, 0)
    assert not cache.end_step(held, 6), "nothing was kept there: the request must begin again"
    cache.discard(held)
    cache.check([])


def test_snapshots_of_a_request_with_nan_are_forgotten_where_others_have_computed_the_pages() -> None:
    cache = with_states()
    computed(cache, begun(cache, *range(8), 9), *range(8), 9)
    bad = begun(cache, *range(4), 7, 7)
    assert bad.num_matched == 0
    cache.begin_step(bad.held, 0, 6, 0)
    cache.end_step(bad.held, 6)
    cache.insert(bad.held, key(*range(4)))
    assert begun(cache, *range(4), 30).num_matched == 4
    cache.forget(bad.held)
    assert begun(cache, *range(4), 31).num_matched == 0
    assert begun(cache, *range(8), 30).num_matched == 8, "what others gave stays"


def test_what_a_page_is_continued_with_keeps_the_snapshot_inside_it() -> None:
    cache = with_states(snapshots=8)
    computed(cache, begun(cache, *range(6)), *range(6))
    computed(cache, begun(cache, *range(6), 50, 51, 52), *range(6), 50, 51, 52)
    assert begun(cache, *range(6), 60).num_matched == 6


def test_whole_pages_need_states_at_their_ends() -> None:
    cache = KVCache(8, 4, match_granularity_tokens=4, states=StateRoom(3, 0, 8, 4))
    computed(cache, begun(cache, *range(10)), *range(10))
    assert begun(cache, *range(10), 50).num_matched == 8
    with pytest.raises(ConfigError, match="inside pages of 4"):
        KVCache(8, 4, states=StateRoom(3, 0, 8, 6))
    with pytest.raises(ConfigError, match="no slot"):
        KVCache(8, 4, states=StateRoom(0, 0, 8, 4))


def test_a_snapshot_from_outside_comes_to_its_pages_or_not_at_all() -> None:
    cache, tokens = with_states(snapshots=2), key(*range(12))
    computed(cache, begun(cache, *range(11)), *range(11))  # at 8 and 11
    written: list[int] = []
    assert cache.states_there("", tokens, 2).keys() == {2} and cache.states_there("", tokens, 1) == {}
    assert cache.put_state("", tokens, 2, written.append) and not written, "it is there"
    assert not cache.put_state("", tokens, 3, written.append) and not written, "its last page is not full"
    given = Given()
    assert cache.put_state("", tokens, 1, written.append, given) and given.states == set(written)
    cache.check([])
    assert cache.states_there("", tokens, 3) == {1: written[0]} and cache.states.num_dropped == 1
    used = begun(cache, *range(4), 90)
    assert used.num_matched == 4 and used.state_copies[0].source == written[0]
    cache.discard(used.held)

    def broken(slot: int) -> None:
        raise RuntimeError("a device that fails")

    with pytest.raises(RuntimeError):
        cache.put_state("", tokens, 2, broken)
    none = with_states(snapshots=0)
    computed(none, begun(none, *range(11)), *range(11))
    assert not none.put_state("", tokens, 1, written.append)
    cache.flush()
    cache.check([])
    assert cache.states.num_free == 3 + 2 + 2
