"""Recurrent states beside the pages: which slots hold them, and which of them are snapshots in the tree.

Owns the slots, and the rule that there are never more snapshots than there is room for, in the tree or on their way to
it. Never touches device memory: copying is asked for through `StateCopy`. A model without recurrent layers has none of
this.

A state cannot be cut as pages can, and it is overwritten as a request goes on. So some are copied on the way to slots
of their own, and these snapshots go into the tree with the pages before them. A match ends where a snapshot is, whose
state is copied to the slot of whoever begins there; so none is ever shared, or locked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from mooli.cache.page_pool import PagePool
from mooli.cache.radix_tree import Match, Node, RadixTree
from mooli.cache.request_pages import Given, RequestPages
from mooli.errors import ConfigError, EngineError


@dataclass(frozen=True, slots=True)
class StateRoom:
    """How many states there is room for, of a model with recurrent layers.

    num_running: of running requests, one each. num_tried: that steps may keep after guesses, in all rows together.
    num_snapshots: in the tree, or on their way to it. every_tokens: of a prompt, at least at multiples of this, a
    multiple of the page size, its state is kept.
    """

    num_running: int
    num_tried: int
    num_snapshots: int
    every_tokens: int

    @property
    def num_slots(self) -> int:
        return self.num_running + self.num_tried + self.num_snapshots


class States:
    """Of one cache. most_retained: snapshots that requests may have retained (`Request.pins`).

    Raises ConfigError if states are to be kept inside pages, or there is no room for any.
    """

    def __init__(self, room: StateRoom, tree: RadixTree, page_size: int, most_retained: int) -> None:
        if room.num_running < 1 or room.every_tokens < 1 or room.every_tokens % page_size:
            raise ConfigError(f"{room} has no slot, or keeps states inside pages of {page_size} tokens")
        self.room = room
        self.num_dropped = 0
        """Snapshots given up for others since the start; those that went with their pages are not counted."""
        self._tree = tree
        self._page_size = page_size
        self._most_retained = most_retained
        self._slots = PagePool(room.num_slots)
        self._num_saved = 0
        """Snapshots that are not in the tree yet."""

    @property
    def num_snapshots(self) -> int:
        """In the tree."""
        return len(self._tree.snapshots)

    @property
    def num_free(self) -> int:
        """Slots that hold nothing."""
        return self._slots.num_free

    def begin(self, held: RequestPages, num_matched: int) -> None:
        """A request has a slot from here on, for the state after `num_matched` tokens."""
        (held.state,), held.state_tokens = self._slots.allocate(1), num_matched

    def want(self, held: RequestPages, num_matched: int, num_tokens: int, agreeing: int) -> None:
        """A request of `num_tokens` tokens keeps its state at least after every so many, after those that it has in
        common with others, and as far as the next request with the same tokens could use it."""
        every, page_size = self.room.every_tokens, self._page_size
        wanted = {*range(num_matched // every * every + every, num_tokens, every)}
        wanted |= {agreeing // page_size * page_size, (num_tokens - 1) // page_size * page_size}
        held.wanted = {count for count in wanted if count > num_matched}

    def want_before(self, held: RequestPages, num_matched: int, ends: Iterable[int | None]) -> None:
        """And at the last page boundary before each of these numbers of tokens; None is left aside."""
        wanted = {end // self._page_size * self._page_size for end in ends if end is not None}
        held.wanted.update(count for count in wanted if count > num_matched)

    def begin_step(self, held: RequestPages, start: int, length: int, num_tried: int) -> list[tuple[int, int]]:
        """See `KVCache.begin_step`."""
        known = start + length - num_tried
        held.state_tokens = start + length
        due = sorted(count for count in held.wanted if count <= known)
        held.wanted.difference_update(due)
        for count in due:
            if count > start and self.make_room():
                held.saved[count] = self._slots.allocate(1)[0]
                self._num_saved += 1
        for count in range(known, start + length):
            held.tried[count] = self._slots.allocate(1)[0]
        saved = [(count - start, slot) for count, slot in held.saved.items() if count > start]
        return sorted([*saved, *((count - start, slot) for count, slot in held.tried.items())])

    def end_step(self, held: RequestPages, num_computed: int) -> bool:
        """See `KVCache.end_step`."""
        if held.state >= 0 and held.state_tokens != num_computed:
            self._slots.free([held.state])
            held.state, held.state_tokens = held.tried.pop(num_computed, -1), num_computed
        if held.tried:
            self._slots.free(held.tried.values())
            held.tried = {}
        return held.state >= 0

    def put(self, match: Match, num_tokens: int, write: Callable[[int], None], given: Given | None) -> bool:
        """Have a snapshot at the end of `match`, which has `num_tokens`, if there is room; see `KVCache.put_state`."""
        node, at = (match.child, match.child_tokens) if match.child is not None else (match.node, -1)
        if node is None:
            return False
        num_back = node.num_tokens - at if at >= 0 else 0
        if any(there == num_tokens for there, _ in self._tree.states_along(match)):
            return True
        if not self.make_room():
            return False
        (slot,) = self._slots.allocate(1)
        is_kept = False
        try:
            write(slot)
            is_kept = self._tree.keep_state(node, num_back, slot)
        finally:
            if not is_kept:
                self._slots.free([slot])
        if given is not None and is_kept:
            given.states.add(slot)
        return is_kept

    def make_room(self) -> bool:
        """Whether there may be one snapshot more, at the cost of the one that was used least recently if need be."""
        if self.num_snapshots + self._num_saved < self.room.num_snapshots:
            return True
        weakest = self._tree.weakest_state(self._most_retained)
        if weakest < 0:
            return False
        self._tree.drop_state(weakest)
        self._slots.free([weakest])
        self.num_dropped += 1
        return True

    def give(self, held: RequestPages, tail: Node | None, num_tokens: int) -> None:
        """The snapshots of a request's first `num_tokens` tokens are the tree's now. Those tokens end at its node, or
        in `tail` below it."""
        for count in sorted(count for count in held.saved if count <= num_tokens):
            slot = held.saved.pop(count)
            self._num_saved -= 1
            self._give(held, tail, num_tokens - count, num_tokens, slot)

    def give_last(self, held: RequestPages, tail: Node | None, num_tokens: int) -> None:
        """The request ends after `num_tokens` tokens: if its own state is the one after them, it is a snapshot now."""
        if held.state >= 0 and held.state_tokens == num_tokens and self.make_room():
            slot, held.state = held.state, -1
            self._give(held, tail, 0, num_tokens, slot)

    def _give(self, held: RequestPages, tail: Node | None, num_back: int, num_tokens: int, slot: int) -> None:
        """num_back: so many of the tokens that the tree has come after the state."""
        node, beyond = held.node, num_tokens % self._page_size
        if node is not None and tail is not None:
            # Those in the tail that are the request's too: the tail may have more.
            is_inside = num_back < beyond
            node, num_back = (tail, tail.num_tokens - beyond + num_back) if is_inside else (node, num_back - beyond)
        if node is not None and self._tree.keep_state(node, num_back, slot):
            held.given.states.add(slot)
        else:
            self._slots.free([slot])

    def discard(self, held: RequestPages) -> None:
        """The request has no state any more."""
        self._slots.free(held.slots)
        self._num_saved -= len(held.saved)
        held.state, held.saved, held.tried = -1, {}, {}

    def forget(self, given: Given) -> None:
        """Snapshots that a request gave to the tree leave it."""
        unwanted = [slot for slot in given.states if slot in self._tree.snapshots]
        for slot in unwanted:
            self._tree.drop_state(slot)
        self._slots.free(unwanted)

    def free_lost(self) -> None:
        """Of snapshots whose tokens have left the tree."""
        self._slots.free(self._tree.take_lost_states())

    def check(self, holders: Collection[RequestPages]) -> None:
        """Prove that each slot has one owner, and that snapshots are as many as there may be. Raises EngineError."""
        slots = [*self._slots.free_pages(), *self._tree.snapshots]
        for held in holders:
            slots += held.slots
        if sorted(slots) != list(range(self._slots.num_pages)):
            raise EngineError(
                f"of {self._slots.num_pages} slots of states some have two owners or none: {sorted(slots)}"
            )
        num_saved = sum(len(held.saved) for held in holders)
        if self._num_saved != num_saved or num_saved + self.num_snapshots > self.room.num_snapshots:
            raise EngineError("snapshots are more than there may be, or those on their way to the tree are miscounted")
