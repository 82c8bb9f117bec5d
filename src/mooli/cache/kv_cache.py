"""The KV cache as the scheduler sees it: admit, grow, insert, release.

Owns the page pool, the slots of recurrent states and the radix tree, and the rule that every page and every slot has
exactly one owner. Never knows what a request is beyond what it holds, and never touches device memory: copying is asked
for through `PageCopy` and `StateCopy`.

    the pages of one request, by position in its page list

        0 ............ num_shared ............... num_computed / page_size ........ len(pages)
        [ the tree's,  ) [ the request's own,     ) [ the request's own,              )
        [ locked       ) [ hold computed KV       ) [ allocated, nothing in them yet  )

    match + open   [0, num_shared) is the tree's, found and locked; nothing is the request's yet
    grow           appends own pages
    admit          these three for a request that begins, or nothing where pages are too few
    insert         own pages that are full and computed become the tree's: num_shared moves right. Where the tree had
                   the page already, the own one is freed and the page list points at the tree's
    release        like insert, a partly filled last page included; then own pages left are freed, shared ones unlocked
    discard        own pages are freed as they are, shared ones unlocked
                   the tree hears then what the request asks to keep, and what it has left behind (`Turn`)
    forget         like discard; and the pages that this request computed and gave to the tree leave it, each as soon as
                   nobody uses it. What others had computed stays

Of models with recurrent layers a request also has a slot, with the state after its last computed token. A state cannot
be cut as pages can, and it is overwritten as the request goes on: so some are copied on the way to slots of their own,
and these snapshots go into the tree with the pages before them. A match ends where a snapshot is, whose state is copied
to the slot of whoever begins there; so none is ever shared, or locked.

    admit          a slot, and what is matched is copied to it
    begin_step     where states go in a step: kept for the tree at chosen places, and after each guess but the last
    end_step       the state after what counts is the request's; those after guesses are given back
    insert         snapshots of what is given go with it; room for the newest is made at the cost of the one used least
    release        the request's own state becomes a snapshot
    forget         the snapshots that this request gave go at once

    put_state      a snapshot that was outside comes to its place, at the same cost for others
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import takewhile

import numpy as np

from mooli.batch import PageCopy, StateCopy
from mooli.cache.evicted import EvictedPages, Eviction
from mooli.cache.host_pool import PageName
from mooli.cache.node_digests import NodeDigests
from mooli.cache.page_events import PageEvent, PageEvents
from mooli.cache.page_hash import page_tokens
from mooli.cache.page_pool import PagePool
from mooli.cache.radix_tree import TOKEN_BYTES, Match, Node, RadixTree
from mooli.cache.tree_watch import TreeWatch
from mooli.cache.turns import Turn, Turns
from mooli.errors import ConfigError, EngineError
from mooli.types import FIRST_CONTENT_ID


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


@dataclass(slots=True)
class Given:
    """What a request gave to the tree: pages that it computed, and slots of states. Some may be others' by now."""

    pages: set[int] = field(default_factory=set)
    states: set[int] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class RequestPages:
    """The pages one running request uses; see the picture above. Only `KVCache` changes it.

    node: the locked tree node where the shared pages end; None with the cache disabled.
    copy_source: the locked node whose first page this request's next step copies from.
    state: the slot with the state after `state_tokens` tokens; -1 where there is none. saved: slots of states to be
    given to the tree, by the number of tokens they come after; tried: the same of guesses, while a step is computed.
    wanted: numbers of tokens after which a state is to be kept for others, as soon as they are computed.
    """

    pages: list[int] = field(default_factory=list)
    num_shared: int = 0
    node: Node | None = None
    copy_source: Node | None = None
    given: Given = field(default_factory=Given)
    state: int = -1
    state_tokens: int = 0
    saved: dict[int, int] = field(default_factory=dict)
    tried: dict[int, int] = field(default_factory=dict)
    wanted: set[int] = field(default_factory=set)

    @property
    def slots(self) -> list[int]:
        """Of all its states."""
        own = [self.state] if self.state >= 0 else []
        return [*own, *self.saved.values(), *self.tried.values()]


class MissReason(Enum):
    """Why no more of a request was in the cache."""

    NAMESPACE = "namespace"
    """Nothing is cached in the request's namespace."""
    NEW = "new"
    """The tree ends here, and it is not known that it ever went on."""
    EVICTED = "evicted"
    """The tree went on as the request does, and lost it for want of room."""
    IN_FLIGHT = "in flight"
    """Another request that runs has the same tokens, and has not computed them yet."""
    DIVERGED = "diverged"
    """The tree goes on with another token."""
    HELD_BACK = "held back"
    """The request must compute what follows itself: it asked for log-probabilities of its prompt."""
    NO_STATE = "no state"
    """The tree goes on as the request does, but has no state there to go on from: the model has recurrent layers."""
    JUDGED_SLOWER = "judged slower"
    """More is in a tier below, and loading it would have taken longer than computing it."""
    LOAD_FAILED = "load failed"
    """More is in a tier below, and did not come, or not in time."""
    DISABLED = "disabled"
    """The cache is off."""


@dataclass(frozen=True, slots=True)
class MatchEnd:
    """Where a request's tokens stopped agreeing with the tree, and why; the cache may have used fewer of them. With
    NO_STATE, where the last state was that it could use.

    reason: None where all were there that may be: at least one token of a request is always computed.
    found: what the tree has at index `num_tokens`, where it has DIVERGED: an id of a token or of content.
    num_lost: how many of the tokens behind were known before, or are to the tree. eviction: of the first of them, where
    they were EVICTED.
    """

    num_tokens: int
    reason: MissReason | None
    found: int | None = None
    num_lost: int = 0
    eviction: Eviction | None = None


@dataclass(frozen=True, slots=True)
class Admission:
    """What a request begins to run on.

    held: its pages, for all matched tokens and the first `num_tokens` to be computed. copies: to be made before those.
    """

    held: RequestPages
    num_matched: int
    num_tokens: int
    copies: list[PageCopy]
    end: MatchEnd
    state_copies: list[StateCopy] = field(default_factory=list)


class KVCache:
    """All pages of the KV pool. With `enabled=False` nothing is shared: every match is empty, nothing is kept.

    A page number stands for the same tokens in every layer, whatever the layers keep of them.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        enabled: bool = True,
        *,
        match_granularity_tokens: int = 1,
        states: StateRoom | None = None,
        retention_share: float = 0.0,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """match_granularity_tokens: a match is cut to a multiple of this, which divides the page size.
        states: of a model with recurrent layers; None for others, which pay nothing for them.
        retention_share: of all pages, and of snapshots, that requests may have retained (`Request.pins`).
        clock: nanoseconds, for tests.

        Raises ConfigError if it does not divide the page size, or states are to be kept inside pages.
        """
        if match_granularity_tokens < 1 or page_size % match_granularity_tokens:
            raise ConfigError(
                f"match_granularity_tokens={match_granularity_tokens} must divide the page size of {page_size}"
            )
        if states is not None and (
            states.num_running < 1 or states.every_tokens < 1 or states.every_tokens % page_size
        ):
            raise ConfigError(f"{states} has no slot, or keeps states inside pages of {page_size} tokens")
        self.match_granularity_tokens = match_granularity_tokens
        self.states = states
        self.num_pages = num_pages
        self.page_size = page_size
        self.enabled = enabled
        self.num_evicted_pages = 0
        """Pages evicted since the start."""
        self.num_dropped_snapshots = 0
        """Snapshots given up for others since the start; those that went with their pages are not counted."""
        self._slots = PagePool(0 if states is None else states.num_slots)
        self._num_saved = 0
        """Snapshots that are not in the tree yet."""
        self._pool = PagePool(num_pages)
        self._tree = RadixTree(page_size, int(num_pages * retention_share), clock)
        self._turns = Turns(self._tree, page_size)
        self._most_retained_states = 0 if states is None else int(states.num_snapshots * retention_share)
        self.digests = NodeDigests(page_size)
        """Of the pages in the tree."""
        self.watch = TreeWatch(self._tree, page_size, self.digests)
        """For who wants to see the tree; costs nothing before."""
        self._evicted_pages = EvictedPages(self.digests)
        self._events: PageEvents | None = None
        self.keep_evicted: Callable[[list[PageName], list[int]], None] | None = None
        """Told of full pages that follow each other, by name and number, before they are dropped for want of room."""
        self._untrusted: set[int] = set()
        """Pages of the tree that leave it as soon as nobody uses them."""

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def num_tree_pages(self) -> int:
        return self._tree.num_pages

    @property
    def num_evictable(self) -> int:
        return self._tree.num_evictable

    @property
    def num_retained(self) -> int:
        """Pages of the tree that requests asked to keep, and whose time is not over."""
        return self._tree.num_retained

    def is_retained(self, namespace: str, key: bytes) -> bool:
        """Whether the tree has something of the beginning of `key` because a request asked to keep it."""
        match = self._tree.match(namespace, key, self.page_size)
        first = match.child if match.node is None or match.node.parent is None else match.node
        return first is not None and first.weight > 0

    @property
    def num_available(self) -> int:
        """Pages that `grow` could hand out now: free, or in the tree and in nobody's use."""
        return self._pool.num_free + self._tree.num_evictable

    @property
    def num_snapshots(self) -> int:
        return len(self._tree.snapshots)

    @property
    def num_free_slots(self) -> int:
        """Of states."""
        return self._slots.num_free

    @property
    def most_tried(self) -> int | None:
        """How many guesses the rows of a step may verify; None for any number."""
        return None if self.states is None else self.states.num_tried

    def pages_for(self, num_tokens: int) -> int:
        """How many pages hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def room(self, held: RequestPages, num_computed: int) -> int:
        """How many tokens could be stored after `num_computed`, were all available pages this request's."""
        return (len(held.pages) + self._pool.num_free + self._tree.num_evictable) * self.page_size - num_computed

    def cut(self, start: int, num_tokens: int) -> int:
        """At most `num_tokens` of a request's tokens from `start` on: fewer if what comes after them then begins where
        a match could end, which some devices compute faster."""
        past = (start + num_tokens) % self.match_granularity_tokens
        return num_tokens - past if past < num_tokens else num_tokens

    def admit(
        self,
        namespace: str,
        key: bytes,
        *,
        max_matched: int,
        most_tokens: int,
        num_pages: int = 0,
        promised_pages: int = 0,
        given: Given | None = None,
    ) -> Admission | None:
        """Let a request begin on what is cached of it, with pages for the first tokens that it computes.

        key: all its tokens (see `token_key`), of which at most `max_matched` may come from the cache and at most
        `most_tokens` are computed first. num_pages: what it needs in the end. It is admitted only if as many are
        available besides the `promised_pages`. given: see `open`.

        None, and no change, if there are too few pages.
        """
        agreeing = self.agreeing(namespace, key, max_matched)
        match, slot = self._usable(agreeing)
        # Before `open`, which may split a node.
        end = self._end(agreeing, match, len(key) // TOKEN_BYTES, max_matched)
        num_agreeing = self._agreeing_tokens(agreeing)
        held = self.open(match, given)
        num_shared = held.num_shared
        num_matched = num_shared * self.page_size + match.head_tokens
        if self.num_available < promised_pages + max(0, num_pages - num_shared):
            self.discard(held)
            return None
        end = self._explained(end, held, namespace, key, num_agreeing)
        copied = match.head_tokens
        if copied and self.room(held, num_matched) <= 0:
            # Alone in a pool just large enough: the page to copy from is the one that is needed.
            if self.states is not None:  # a state of less is elsewhere
                self.discard(held)
                fewer = self.admit(
                    namespace,
                    key,
                    max_matched=num_shared * self.page_size,
                    most_tokens=most_tokens,
                    num_pages=num_pages,
                    promised_pages=promised_pages,
                    given=given,
                )
                return fewer and replace(fewer, end=end)
            self.drop_copy_source(held)
            num_matched -= copied
            copied = 0
        num_missing = len(key) // TOKEN_BYTES - num_matched
        num_tokens = min(num_missing, most_tokens, self.room(held, num_matched))
        if num_tokens < num_missing:
            num_tokens = self.cut(num_matched, num_tokens)
        if num_tokens <= 0 or not self.grow(held, num_matched + num_tokens):
            self.discard(held)
            return None
        copies = [PageCopy(match.source_page, held.pages[num_shared], copied)] if copied else []
        if self.states is None:
            return Admission(held, num_matched, num_tokens, copies, end)
        (held.state,), held.state_tokens = self._slots.allocate(1), num_matched
        if self.enabled:
            held.wanted = self._wanted(self.states, num_matched, len(key) // TOKEN_BYTES, num_agreeing)
        if slot < 0:
            return Admission(held, num_matched, num_tokens, copies, end)
        self._tree.use_state(slot)
        return Admission(held, num_matched, num_tokens, copies, end, [StateCopy(slot, held.state)])

    def _wanted(self, room: StateRoom, num_matched: int, num_tokens: int, agreeing: int) -> set[int]:
        """After how many of its tokens a request keeps its state: at least after every so many, after those that it has
        in common with others, and as far as the next request with the same tokens could use it."""
        every, page_size = room.every_tokens, self.page_size
        wanted = {*range(num_matched // every * every + every, num_tokens, every)}
        wanted |= {agreeing // page_size * page_size, (num_tokens - 1) // page_size * page_size}
        return {count for count in wanted if count > num_matched}

    def want_states(self, admission: Admission, ends: Iterable[int | None]) -> None:
        """A request that begins keeps its state at the last page boundary before each of these numbers of tokens; None
        is left aside. Does nothing for models without states."""
        if self.states is None or not self.enabled:
            return
        wanted = {end // self.page_size * self.page_size for end in ends if end is not None}
        admission.held.wanted.update(count for count in wanted if count > admission.num_matched)

    def _agreeing_tokens(self, match: Match) -> int:
        return (len(match.pages) - match.child_pages) * self.page_size + match.child_tokens

    def _end(self, match: Match, usable: Match, num_tokens: int, max_matched: int) -> MatchEnd:
        """Where `match` ends for a request of `num_tokens` tokens of which it could have found `max_matched`."""
        agreeing = self._agreeing_tokens(match)
        if usable is not match and (used := self._agreeing_tokens(usable)) < agreeing:
            return MatchEnd(used, MissReason.NO_STATE)
        if agreeing >= max_matched:
            return MatchEnd(agreeing, None if max_matched >= num_tokens - 1 else MissReason.HELD_BACK)
        if not self.enabled:
            return MatchEnd(agreeing, MissReason.DISABLED)
        if match.node is None:
            return MatchEnd(agreeing, MissReason.NAMESPACE)
        found = self._tree.token_after(match)
        return MatchEnd(agreeing, MissReason.NEW if found is None else MissReason.DIVERGED, found)

    def _explained(self, end: MatchEnd, held: RequestPages, namespace: str, key: bytes, num_agreeing: int) -> MatchEnd:
        """With what more is known of the tokens of `key` behind those that are held. num_agreeing: tokens whose pages
        are in the tree, with states or without."""
        most = len(key) // TOKEN_BYTES - 1
        if end.reason is MissReason.HELD_BACK:
            there = self._agreeing_tokens(self._tree.match(namespace, key, most)) if self.enabled else 0
            return replace(end, num_lost=max(0, there - end.num_tokens))
        if end.reason is MissReason.NO_STATE:
            return replace(end, num_lost=num_agreeing - end.num_tokens)
        if held.node is not None and end.reason in (MissReason.NEW, MissReason.DIVERGED, MissReason.NAMESPACE):
            num_pages, eviction = self._evicted_pages.after(held.node, held.num_shared, key) or (0, None)
            num_lost = min(most, (held.num_shared + num_pages) * self.page_size) - end.num_tokens
            if eviction is not None and num_lost > 0:
                return MatchEnd(end.num_tokens, MissReason.EVICTED, None, num_lost, eviction)
        return end

    def find(self, namespace: str, key: bytes) -> tuple[MatchEnd, list[int]]:
        """Where the tokens of `key` stop agreeing with the tree, all of which may be there; and the nodes up to there,
        by their numbers (see `TreeWatch.path`). Changes nothing."""
        num_tokens = len(key) // TOKEN_BYTES
        match = self._tree.match(namespace, key, num_tokens) if self.enabled else Match(namespace)
        self.watch.attach()
        return self._end(match, match, num_tokens, num_tokens), self.watch.path(match)

    def match(self, namespace: str, key: bytes, max_tokens: int) -> Match:
        """The longest cached prefix of `key` (see `token_key`) that a request can go on from, at most `max_tokens`.
        Changes nothing."""
        return self._usable(self.agreeing(namespace, key, max_tokens))[0]

    def _usable(self, match: Match) -> tuple[Match, int]:
        """As much of a match as a request can go on from, and the slot of the state there; -1 without one."""
        return (match, -1) if self.states is None else self._tree.with_state(match, self.match_granularity_tokens)

    def agreeing(self, namespace: str, key: bytes, max_tokens: int) -> Match:
        """The longest prefix of `key` whose pages are cached, at most `max_tokens`. Changes nothing."""
        if not self.enabled:
            return Match(namespace)
        match = self._tree.match(namespace, key, max_tokens)
        match.head_tokens -= match.head_tokens % self.match_granularity_tokens
        if not match.head_tokens:
            match.source_page = -1
        return match

    def open(self, match: Match, given: Given | None = None) -> RequestPages:
        """Lock what was matched, for a request that begins to run. Ends with `release`, `discard` or `forget`.

        given: of a request that ran before, what it had given then. A page that was evicted since may be another's by
        now; at worst `forget` drops one too many.

        If `match.head_tokens`, the caller copies that many tokens of `match.source_page` to the first page it grows,
        and calls `drop_copy_source` after the step that copied.
        """
        if not self.enabled:
            return RequestPages()
        node, source = self._tree.lock_match(match)
        return RequestPages(list(match.pages), len(match.pages), node, source, Given() if given is None else given)

    def following(self, held: RequestPages, key: bytes, num_tokens: int) -> list[int]:
        """Up to `num_tokens` token ids that others had after the same tokens from the start on, content left out.
        Changes nothing.

        key: the request's tokens after its shared pages, at most a page of them; for more, nothing is found.
        """
        if held.node is None or len(key) > self.page_size * TOKEN_BYTES:
            return []
        found: list[int] = np.frombuffer(self._tree.following(held.node, key, num_tokens * TOKEN_BYTES), ">i4").tolist()
        return list(takewhile(lambda key_id: key_id < FIRST_CONTENT_ID, found))

    def drop_copy_source(self, held: RequestPages) -> None:
        """The copy has been made, or is no longer wanted: the source may be evicted. Does nothing without a source."""
        source, held.copy_source = held.copy_source, None
        if source is not None:
            self._unlock(source)

    def grow(self, held: RequestPages, num_tokens: int) -> bool:
        """Append pages until they can hold `num_tokens`, evicting if need be. False, and no change, if it cannot be."""
        missing = self.pages_for(num_tokens) - len(held.pages)
        if missing <= 0:
            return True
        lacking = missing - self._pool.num_free
        if lacking > 0:
            if lacking > self._tree.num_evictable:
                return False
            self._evict(lacking)
        held.pages += self._pool.allocate(missing)
        return True

    def insert(self, held: RequestPages, key: bytes) -> None:
        """Give the tree the pages after the shared ones: they hold the tokens of `key`, all computed.

        key: the tokens from position num_shared * page_size on. Replaces entries of `held.pages` by the tree's pages
        where it had them. Ending inside a page is for `release` alone.
        """
        if held.node is not None and key:
            self._insert(held, key)

    def _insert(self, held: RequestPages, key: bytes) -> Node | None:
        """The same for a key that is not empty. Returns `Insertion.tail`."""
        if held.node is None:
            raise EngineError("pages were given to a tree that does not take any")
        first = held.num_shared
        num_tokens = first * self.page_size + len(key) // TOKEN_BYTES
        last = first + self.pages_for(len(key) // TOKEN_BYTES)
        own = held.pages[first:last]
        inserted = self._tree.insert(held.node, key, own)
        held.given.pages.update(page for page, mine in zip(inserted.pages, own, strict=True) if page == mine)
        held.node = inserted.node
        held.pages[first:last] = inserted.pages
        held.num_shared = last
        self._free(inserted.surplus)
        if held.saved:
            self._give_states(held, inserted.tail, num_tokens)
        return inserted.tail

    # -- states: only of models with recurrent layers --
    def begin_step(self, held: RequestPages, start: int, length: int, num_tried: int) -> list[tuple[int, int]]:
        """Where states are kept in a step that computes the tokens start .. start + length of a request, of which the
        last `num_tried` are guesses: after how many of them, and the slot. Ends with `end_step` or `discard`."""
        known = start + length - num_tried
        held.state_tokens = start + length
        due = sorted(count for count in held.wanted if count <= known)
        held.wanted.difference_update(due)
        for count in due:
            if count > start and self._make_room_for_snapshot():
                held.saved[count] = self._slots.allocate(1)[0]
                self._num_saved += 1
        for count in range(known, start + length):
            held.tried[count] = self._slots.allocate(1)[0]
        saved = [(count - start, slot) for count, slot in held.saved.items() if count > start]
        return sorted([*saved, *((count - start, slot) for count, slot in held.tried.items())])

    def end_step(self, held: RequestPages, num_computed: int) -> bool:
        """Of what the step computed, `num_computed` tokens count from the first on. False if their state is not kept
        anywhere: then the request cannot go on from here."""
        if held.state >= 0 and held.state_tokens != num_computed:
            self._slots.free([held.state])
            held.state, held.state_tokens = held.tried.pop(num_computed, -1), num_computed
        if held.tried:
            self._slots.free(held.tried.values())
            held.tried = {}
        return self.states is None or held.state >= 0

    def states_there(self, namespace: str, key: bytes, num_pages: int) -> dict[int, int]:
        """The snapshots at the ends of full pages among the first `num_pages` of `key` that the tree has: by the number
        of pages they come after, the deepest first, the slot. Changes nothing."""
        found = self._tree.states_along(self.agreeing(namespace, key, num_pages * self.page_size))
        return {at // self.page_size: slot for at, slot in found if at % self.page_size == 0}

    def put_state(
        self, namespace: str, key: bytes, num_pages: int, write: Callable[[int], None], given: Given | None = None
    ) -> bool:
        """Have a snapshot after the first `num_pages` pages of `key`, if the tree has these and there is room.

        write: called at most once, with the slot to fill; what it raises is raised, and nothing is put. given: of the
        request that it is for, which counts as who computed it (see `forget`). Whether the tree has one there now.
        """
        match = self.agreeing(namespace, key[: num_pages * self.page_size * TOKEN_BYTES], num_pages * self.page_size)
        node, at = (match.child, match.child_tokens) if match.child is not None else (match.node, -1)
        if node is None or len(match.pages) < num_pages:
            return False
        num_back = node.num_tokens - at if at >= 0 else 0
        if any(there == num_pages * self.page_size for there, _ in self._tree.states_along(match)):
            return True
        if not self._make_room_for_snapshot():
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

    def _make_room_for_snapshot(self) -> bool:
        """Whether there may be one more, at the cost of the one that was used least recently if need be."""
        most = 0 if self.states is None else self.states.num_snapshots
        if len(self._tree.snapshots) + self._num_saved < most:
            return True
        weakest = self._tree.weakest_state(self._most_retained_states)
        if weakest < 0:
            return False
        self._tree.drop_state(weakest)
        self._slots.free([weakest])
        self.num_dropped_snapshots += 1
        return True

    def _give_states(self, held: RequestPages, tail: Node | None, num_tokens: int) -> None:
        """The snapshots of a request's first `num_tokens` tokens are the tree's now. Those tokens end at its node, or
        in `tail` below it."""
        for count in sorted(count for count in held.saved if count <= num_tokens):
            slot = held.saved.pop(count)
            self._num_saved -= 1
            self._give_state(held, tail, num_tokens - count, num_tokens, slot)

    def _give_state(self, held: RequestPages, tail: Node | None, num_back: int, num_tokens: int, slot: int) -> None:
        """num_back: so many of the tokens that the tree has come after the state."""
        node, beyond = held.node, num_tokens % self.page_size
        if node is not None and tail is not None:
            # Those in the tail that are the request's too: the tail may have more.
            is_inside = num_back < beyond
            node, num_back = (tail, tail.num_tokens - beyond + num_back) if is_inside else (node, num_back - beyond)
        if node is not None and self._tree.keep_state(node, num_back, slot):
            held.given.states.add(slot)
        else:
            self._slots.free([slot])

    def release(self, held: RequestPages, key: bytes, turn: Turn | None = None) -> None:
        """The request ends or is preempted: what it computed stays in the tree, unlocked. `key` as in `insert`.

        turn: what it asks for besides; None for nothing.
        """
        first, tail = held.num_shared * self.page_size, None
        if held.node is not None and key:
            tail = self._insert(held, key)
        num_tokens = first + len(key) // TOKEN_BYTES
        is_usable = num_tokens > 0 and num_tokens % self.match_granularity_tokens == 0 and held.node is not None
        if held.state >= 0 and held.state_tokens == num_tokens and is_usable and self._make_room_for_snapshot():
            slot, held.state = held.state, -1
            self._give_state(held, tail, 0, num_tokens, slot)
        if turn is not None and held.node is not None:
            self.drop_copy_source(held)  # it may be what the turn has left behind
            self._turns.ended(held.node, turn)
            for pin in turn.pins:
                num_tokens = len(turn.prompt) // TOKEN_BYTES
                num_pages = self.pages_for(num_tokens if pin.num_tokens is None else min(pin.num_tokens, num_tokens))
                self._tree.retain(held.node, num_pages, pin.seconds, pin.weight)
        self.discard(held)

    def discard(self, held: RequestPages) -> None:
        """The request ends and its own pages are not worth keeping, or not known to be right."""
        self.drop_copy_source(held)
        self._free(held.pages[held.num_shared :])
        self._slots.free(held.slots)
        self._num_saved -= len(held.saved)
        held.state, held.saved, held.tried = -1, {}, {}
        node, held.node = held.node, None
        held.pages, held.num_shared = [], 0
        if node is not None:
            self._unlock(node)

    def forget(self, held: RequestPages) -> None:
        """Like `discard`, and what it had given to the tree is not to be trusted: it goes as soon as nobody uses it."""
        self._untrusted |= held.given.pages
        unwanted = [slot for slot in held.given.states if slot in self._tree.snapshots]
        for slot in unwanted:
            self._tree.drop_state(slot)
        self._slots.free(unwanted)
        self.discard(held)

    def _unlock(self, node: Node) -> None:
        self._tree.unlock(node)
        if self._untrusted:
            self._free(self._tree.forget(node, self._untrusted))

    def _free(self, pages: list[int]) -> None:
        """Also of the states whose tokens went with them."""
        self._untrusted.difference_update(pages)
        self._pool.free(pages)
        if self.states is not None:
            self._slots.free(self._tree.take_lost_states())

    def evict(self, num_pages: int) -> int:
        """Free up to `num_pages` unlocked pages, least recently used first. Returns how many."""
        before = self._pool.num_free
        self._evict(num_pages)
        return self._pool.num_free - before

    def _evict(self, num_pages: int) -> None:
        note = self._evicted_pages.note if self.keep_evicted is None else self._note_and_keep
        dropped = self._tree.evict(num_pages, note)
        self.num_evicted_pages += len(dropped)
        self._free(dropped)

    def _note_and_keep(self, node: Node, num_pages: int) -> None:
        """See `keep_evicted`: what is not to be trusted is not kept, nor what follows it."""
        self._evicted_pages.note(node, num_pages)
        digests, page_bytes = self.digests.of(node), self.page_size * TOKEN_BYTES
        first = len(node.pages) - num_pages
        pages = list(takewhile(lambda page: page not in self._untrusted, node.pages[first : len(digests)]))
        if not pages or self.keep_evicted is None:
            return
        parent = digests[first - 1] if first else self.digests.before(node)
        names = []
        for at in range(first, first + len(pages)):
            tokens = page_tokens(node.key[at * page_bytes : (at + 1) * page_bytes])
            names.append(PageName(digests[at], parent, tokens))
            parent = digests[at]
        self.keep_evicted(names, pages)

    def flush(self) -> None:
        """Empty the tree of everything that nobody uses."""
        self._free(self._tree.evict(self._tree.num_pages))
        if self._events is not None and not self._tree.num_pages:
            self._events.cleared()

    def tell(self, take: Callable[[PageEvent], None]) -> None:
        """From here on `take` hears which full pages come into the tree, and which go."""
        self._events = PageEvents(self._tree, self.digests, take)

    def check(self, holders: Collection[RequestPages]) -> None:
        """Prove that each page and each slot of a state has one owner: free, one of `holders`, or the tree, and that
        locks are the holders'.

        Raises EngineError otherwise. Linear in the number of pages: for tests.
        """
        users: dict[int, int] = {}
        for held in holders:
            for node in (held.node, held.copy_source):
                if node is not None:
                    users[id(node)] = users.get(id(node), 0) + 1
            if held.pages[: held.num_shared] != _pages_above(held.node):
                raise EngineError("the shared pages of a request are not those of its place in the tree")
        owned = self._pool.free_pages() + self._tree.check(users)
        for held in holders:
            owned += held.pages[held.num_shared :]
        if sorted(owned) != list(range(self.num_pages)):
            twice = sorted({page for page in owned if owned.count(page) > 1})
            lost = sorted(set(range(self.num_pages)) - set(owned))
            raise EngineError(f"pages with two owners: {twice}; pages with none: {lost}")
        slots = [*self._slots.free_pages(), *self._tree.snapshots]
        for held in holders:
            slots += held.slots
        if sorted(slots) != list(range(self._slots.num_pages)):
            raise EngineError(
                f"of {self._slots.num_pages} slots of states some have two owners or none: {sorted(slots)}"
            )
        num_saved = sum(len(held.saved) for held in holders)
        if self._num_saved != num_saved or (self.states and num_saved + self.num_snapshots > self.states.num_snapshots):
            raise EngineError("snapshots are more than there may be, or those on their way to the tree are miscounted")


def _pages_above(node: Node | None) -> list[int]:
    """Pages of the path from the root to `node`, in order."""
    spans: list[list[int]] = []
    while node is not None:
        spans.append(node.pages)
        node = node.parent
    return [page for span in reversed(spans) for page in span]
