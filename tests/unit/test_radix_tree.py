"""The radix tree: what it finds, what it locks, what it drops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooli.cache.radix_tree import Node, RadixTree, token_key
from mooli.errors import EngineError


def key(*token_ids: int) -> bytes:
    return token_key(np.array(token_ids, np.int32))


class Shelf:
    """A tree of pages of four tokens, filled with sequences whose pages are numbered as they come."""

    def __init__(self, page_size: int = 4, most_retained: int = 0) -> None:
        self.now = 0
        self.tree = RadixTree(page_size, most_retained, lambda: self.now)
        self.page_size = page_size
        self.next_page = 0
        self.surplus: list[int] = []

    def put(self, *token_ids: int, namespace: str = "", at_match: bool = False) -> list[int]:
        """Insert a sequence from the root (or from its cached prefix), unlock it, return the pages that back it."""
        match = self.tree.match(namespace, key(*token_ids) if at_match else b"", len(token_ids))
        first = len(match.pages) * self.page_size
        node, source = self.tree.lock_match(match)
        if source is not None:
            self.tree.unlock(source)
        count = -(-(len(token_ids) - first) // self.page_size)
        pages = list(range(self.next_page, self.next_page + count))
        self.next_page += count
        inserted = self.tree.insert(node, key(*token_ids[first:]), pages)
        self.tree.unlock(inserted.node)
        self.surplus += inserted.surplus
        return match.pages + inserted.pages

    def retain(self, *token_ids: int, pages: int = 99, seconds: float = 10, weight: int = 1) -> None:
        """As a request does that has these tokens, of which the tree has the full pages."""
        node, source = self.locked(*token_ids)
        assert source is None
        self.tree.retain(node, pages, seconds, weight)
        self.tree.unlock(node)
        self.check()

    def locked(self, *token_ids: int) -> tuple[Node, Node | None]:
        return self.tree.lock_match(self.tree.match("", key(*token_ids), len(token_ids)))

    def found(self, *token_ids: int, namespace: str = "") -> tuple[list[int], int]:
        match = self.tree.match(namespace, key(*token_ids), len(token_ids))
        return match.pages, match.head_tokens

    def check(self, users: dict[int, int] | None = None) -> None:
        owned = self.tree.check(users or {})
        assert len(owned) == len(set(owned))


def test_keys_sort_like_the_tokens_they_are_made_of() -> None:
    sequences = [(1,), (1, 2), (1, 256), (2, 0), (255, 1), (256, 0), (70000, 3)]
    assert sorted(sequences) == sorted(sequences, key=lambda tokens: key(*tokens))


def test_an_empty_tree_matches_nothing() -> None:
    assert Shelf().found(1, 2, 3) == ([], 0)


def test_full_pages_are_found_by_reference_and_the_rest_as_a_head_to_copy() -> None:
    shelf = Shelf()
    shelf.put(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    match = shelf.tree.match("", key(1, 2, 3, 4, 5, 6, 7, 9), 8)
    assert (match.pages, match.head_tokens, match.source_page) == ([0], 3, 1)


def test_a_match_may_end_in_a_partly_filled_page() -> None:
    shelf = Shelf()
    shelf.put(1, 2, 3, 4, 5, 6)
    assert shelf.found(1, 2, 3, 4, 5, 6, 7, 8) == ([0], 2)


@pytest.mark.parametrize(
    ("limit", "expected"), [(8, ([0, 1], 0)), (7, ([0], 3)), (4, ([0], 0)), (3, ([], 3)), (0, ([], 0))]
)
def test_a_match_is_never_longer_than_asked_for(limit: int, expected: tuple[list[int], int]) -> None:
    shelf = Shelf()
    shelf.put(*range(8))
    match = shelf.tree.match("", key(*range(8)), limit)
    assert (match.pages, match.head_tokens) == expected


def test_matching_changes_nothing() -> None:
    shelf = Shelf()
    shelf.put(*range(12))
    shelf.found(*range(6))
    assert sum(1 for _ in shelf.tree.nodes()) == 2


def test_the_child_that_shares_most_is_found_among_thousands() -> None:
    shelf = Shelf(page_size=8)
    for i in range(3000):
        shelf.put(1, 2, 3, i, 5, 6, 7, 8)
    assert shelf.found(1, 2, 3, 1234, 5, 6, 0, 0) == ([], 6)
    assert shelf.found(1, 2, 3, 5000, 5, 6, 0, 0) == ([], 3)


def test_a_span_splits_only_at_page_boundaries() -> None:
    shelf = Shelf()
    shelf.put(*range(12))
    shelf.put(0, 1, 2, 3, 4, 5, 60, 70)
    shelf.check()
    assert shelf.found(*range(12)) == ([0, 1, 2], 0)
    assert shelf.found(0, 1, 2, 3, 4, 5, 60, 70) == ([0, 4], 0)
    assert shelf.surplus == [3]


def test_what_is_there_already_is_surplus() -> None:
    shelf = Shelf()
    shelf.put(*range(10))
    assert shelf.put(*range(10)) == [0, 1, 2]
    assert shelf.surplus == [3, 4, 5]


def test_a_partial_tail_that_the_tree_holds_in_a_fuller_page_is_surplus() -> None:
    shelf = Shelf()
    shelf.put(*range(8))
    assert shelf.put(*range(6)) == [0, 1]
    assert shelf.tree.num_pages == 2


def test_a_longer_sequence_replaces_the_partial_page_it_continues() -> None:
    shelf = Shelf()
    shelf.put(1, 2, 3, 4, 5, 6)
    shelf.put(1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert shelf.surplus == [2, 1]
    assert shelf.found(1, 2, 3, 4, 5, 6, 7, 8, 9) == ([0, 3], 1)
    assert sum(1 for _ in shelf.tree.nodes()) == 2, "the leaf grew instead of a chain of nodes"


def test_a_locked_partial_page_stays_beside_the_longer_one() -> None:
    shelf = Shelf()
    shelf.put(1, 2)
    node, source = shelf.locked(1, 2, 3)
    assert source is not None
    inserted = shelf.tree.insert(node, key(1, 2, 3, 4), [9])
    assert (inserted.surplus, shelf.tree.num_pages) == ([], 2)
    shelf.tree.unlock(source)
    shelf.tree.unlock(inserted.node)
    shelf.check()


def test_namespaces_share_nothing() -> None:
    shelf = Shelf()
    shelf.put(1, 2, 3, 4, namespace="a")
    assert shelf.found(1, 2, 3, 4, namespace="b") == ([], 0)
    assert shelf.found(1, 2, 3, 4, namespace="a") == ([0], 0)


def test_an_emptied_namespace_leaves_nothing_behind() -> None:
    shelf = Shelf()
    shelf.put(1, 2, 3, 4, namespace="a")
    shelf.tree.evict(1)
    assert list(shelf.tree.nodes()) == []


def test_eviction_takes_the_end_of_the_least_recently_used_leaf_first() -> None:
    shelf = Shelf()
    shelf.put(*range(12))
    shelf.put(50, 51, 52, 53)
    assert shelf.tree.evict(1) == [2]
    assert shelf.tree.evict(2) == [1, 0]
    assert shelf.tree.evict(5) == [3]
    shelf.check()


def test_use_protects_from_eviction() -> None:
    shelf = Shelf()
    shelf.put(1, 1, 1, 1)
    shelf.put(2, 2, 2, 2)
    shelf.put(1, 1, 1, 1, 3, at_match=True)
    assert shelf.tree.evict(1) == [1]


def test_locked_pages_are_not_evicted() -> None:
    shelf = Shelf()
    shelf.put(*range(8))
    node, _ = shelf.locked(*range(4))
    assert shelf.tree.num_evictable == 1
    assert shelf.tree.evict(9) == [1]
    shelf.tree.unlock(node)
    assert shelf.tree.evict(9) == [0]


def test_unlocking_twice_is_an_error() -> None:
    shelf = Shelf()
    shelf.put(1, 2, 3, 4)
    node, _ = shelf.locked(1, 2, 3, 4)
    shelf.tree.unlock(node)
    with pytest.raises(EngineError):
        shelf.tree.unlock(node)


def test_a_lock_survives_the_splitting_of_its_node() -> None:
    shelf = Shelf()
    shelf.put(*range(12))
    node, _ = shelf.locked(*range(12))
    shelf.put(0, 1, 2, 3, 40, 50, 60, 70)
    assert shelf.tree.evict(99) == [4]
    shelf.check({id(node): 1})
    shelf.tree.unlock(node)
    assert sorted(shelf.tree.evict(99)) == [0, 1, 2]


def test_forgetting_drops_a_branch_up_to_what_others_use() -> None:
    shelf = Shelf()
    shelf.put(0, 1, 2, 3, 4, 5, 6, 7)
    shelf.put(0, 1, 2, 3, 40, 50, 60, 70)
    node, _ = shelf.locked(*range(8))
    shelf.tree.unlock(node)
    assert shelf.tree.forget(node, {0, 1, 3}) == [1]
    assert shelf.found(0, 1, 2, 3, 40, 50, 60, 70) == ([0, 3], 0)
    shelf.check()


def test_forgetting_goes_up_through_as_many_nodes_as_are_unwanted() -> None:
    shelf = Shelf()
    shelf.put(*range(16))
    upper, _ = shelf.locked(*range(4))
    middle, _ = shelf.locked(*range(12))
    for held in (upper, middle):
        shelf.tree.unlock(held)
    lower, _ = shelf.locked(*range(16))
    shelf.tree.unlock(lower)
    assert len(list(shelf.tree.nodes())) == 4, "a root and three nodes"
    assert shelf.tree.forget(lower, {1, 2, 3}) == [3, 2, 1]
    assert shelf.found(*range(16)) == ([0], 0)
    shelf.check()


def test_forgetting_cuts_a_node_at_the_last_page_that_is_wanted() -> None:
    shelf = Shelf()
    shelf.put(*range(16))
    node, _ = shelf.locked(*range(16))
    shelf.tree.unlock(node)
    assert shelf.tree.forget(node, {0, 2, 3}) == [3, 2]
    assert shelf.found(*range(16)) == ([0, 1], 0)
    shelf.check()
    assert shelf.tree.evict(9) == [1, 0]


def test_forgetting_takes_a_partly_filled_page_below_along() -> None:
    shelf = Shelf()
    shelf.put(*range(4))
    shelf.put(0, 1, 2, 3, 50, 51)
    shelf.put(0, 1, 2, 3, 60, 61)
    node, _ = shelf.locked(*range(4))
    shelf.tree.unlock(node)
    # [0, 1, 2, 3] was there already: pages 1 and 3 are the surplus of the second and the third.
    assert shelf.surplus == [1, 3]
    assert shelf.tree.forget(node, {2}) == [2]
    assert shelf.found(0, 1, 2, 3, 60, 61) == ([0], 2)
    shelf.check()


def test_the_queue_of_leaves_does_not_grow_with_use() -> None:
    shelf = Shelf()
    shelf.put(1, 2, 3, 4)
    for _ in range(1000):
        shelf.put(1, 2, 3, 4, at_match=True)
    assert len(shelf.tree._queue._leaves) < 100


# -- what goes first ---------------------------------------------------------------------------------------------------
def three_leaves(most_retained: int = 9) -> Shelf:
    """Below a common page 0: pages 1 and 2, used first, then page 3, then page 4."""
    shelf = Shelf(most_retained=most_retained)
    shelf.put(0, 0, 0, 0, *range(8))
    for first in (50, 60):
        shelf.put(0, 0, 0, 0, *range(first, first + 4), at_match=True)
    return shelf


def test_superseded_goes_before_what_was_used_last_and_retained_goes_last() -> None:
    shelf = three_leaves()
    shelf.retain(0, 0, 0, 0, *range(4))
    newest, _ = shelf.locked(0, 0, 0, 0, 60, 61, 62, 63)
    other, _ = shelf.locked(0, 0, 0, 0, 50, 51, 52, 53)
    shelf.tree.unlock(newest)
    shelf.tree.supersede(newest, other)
    shelf.tree.unlock(other)
    shelf.check()
    assert shelf.tree.evict(9) == [4, 2, 3, 1, 0], "page 2 is behind what is retained, and was used before page 3"


def test_use_takes_back_that_a_leaf_is_superseded_and_nothing_in_use_or_shared_is() -> None:
    shelf = three_leaves()
    for _ in range(2):
        node, _ = shelf.locked(0, 0, 0, 0, *range(8))
        other, _ = shelf.locked(0, 0, 0, 0, 50, 51, 52, 53)
        shelf.tree.supersede(node, other)
        assert node.last_used > 0 and other.last_used > 0, "it is locked"
        shelf.tree.unlock(node)
        shelf.tree.supersede(node, other)
        assert node.last_used < 0 < node.used_ns
        assert node.parent is not None and node.parent.last_used > 0, "others hang on it"
        shelf.tree.unlock(other)
    shelf.put(0, 0, 0, 0, *range(8), at_match=True)
    shelf.check()
    assert shelf.tree.evict(9) == [4, 3, 2, 1, 0], "3 and 4 in the order of their last use"


def test_retained_pages_are_a_bounded_share_the_weakest_and_the_earliest_give_way() -> None:
    shelf = three_leaves(most_retained=3)
    shelf.retain(0, 0, 0, 0, 50, 51, 52, 53, seconds=5)
    shelf.retain(0, 0, 0, 0, *range(4), seconds=9)
    assert shelf.tree.num_retained == 3, "of [0 .. 7] the first page, which now is a node"
    shelf.retain(0, 0, 0, 0, 60, 61, 62, 63, seconds=2)
    assert shelf.tree.num_retained == 3
    assert shelf.tree.evict(2) == [2, 4], "the new one was the first to end, and so is ordinary"
    shelf.retain(0, 0, 0, 0, *range(4), seconds=1, weight=7)
    assert shelf.tree.evict(2) == [3, 1], "of more weight, whatever the deadlines are"
    long = Shelf(most_retained=2)
    long.put(*range(16))
    long.retain(*range(16))
    assert long.tree.num_retained == 2, "as much of the beginning as there may be"
    assert [node.num_tokens for node in long.tree.nodes() if node.weight] == [8]
    assert Shelf().tree.num_retained == 0


def test_a_deadline_passes_by_the_clock_and_asking_again_moves_it() -> None:
    shelf = three_leaves()
    shelf.retain(0, 0, 0, 0, *range(8), seconds=3)
    shelf.now = int(2e9)
    shelf.retain(0, 0, 0, 0, *range(4), seconds=4)
    assert shelf.tree.num_retained == 3
    shelf.now = int(3e9)
    assert shelf.tree.num_retained == 2, "page 2 is ordinary from its deadline on"
    shelf.check()
    shelf.now = int(6e9)
    assert shelf.tree.num_retained == 0
    shelf.check()
    assert shelf.tree.evict(9) == [3, 4, 2, 1, 0], "as if nothing had been retained, but that it was used"


def test_what_follows_a_retained_node_is_not_retained_with_it() -> None:
    shelf = Shelf(most_retained=9)
    shelf.put(*range(8))
    shelf.retain(*range(8))
    shelf.put(*range(16), at_match=True)
    assert (shelf.tree.num_pages, shelf.tree.num_retained) == (4, 2)
    assert shelf.tree.evict(3) == [3, 2, 1], "never unevictable"
    shelf.check()
    assert shelf.tree.num_retained == 1


def test_the_account_of_retained_nodes_does_not_grow_with_use() -> None:
    shelf = three_leaves()
    for i in range(500):
        shelf.now += 1
        shelf.retain(0, 0, 0, 0, *range(8), weight=1 + i % 2)
    assert sum(map(len, shelf.tree._queue._retained.values())) < 150


def _common_tokens(a: list[int], b: list[int]) -> int:
    return max(n for n in range(min(len(a), len(b)) + 1) if a[:n] == b[:n])


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=14)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    page_size=st.integers(1, 5),
    sequences=st.lists(TOKENS, min_size=1, max_size=12),
    wanted=TOKENS,
    drop=st.integers(0, 12),
)
def test_a_match_is_the_longest_common_prefix_with_anything_inserted(
    page_size: int, sequences: list[list[int]], wanted: list[int], drop: int
) -> None:
    shelf = Shelf(page_size)
    for i, sequence in enumerate(sequences):
        shelf.put(*sequence, at_match=i % 2 == 1)
        shelf.check()
    best = max(_common_tokens(sequence, wanted) for sequence in sequences)
    pages, head_tokens = shelf.found(*wanted)
    assert len(pages) * page_size + head_tokens == best
    before = shelf.tree.num_pages
    assert len(shelf.tree.evict(drop)) == min(drop, before)
    shelf.check()
    pages, head_tokens = shelf.found(*wanted)
    assert len(pages) * page_size + head_tokens <= best
