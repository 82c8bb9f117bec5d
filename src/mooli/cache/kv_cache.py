"""The KV cache as the scheduler sees it: admit, grow, insert, release.

Owns the page pool, the radix tree and the slots of recurrent states, and the rule that every page and every slot has
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

Of models with recurrent layers a request also has a slot, with the state after its last computed token, and the tree
has snapshots of states (see `mooli.cache.states`). A match ends where one is.

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
from dataclasses import replace
from itertools import takewhile

import numpy as np

from mooli.batch import PageCopy, StateCopy
from mooli.cache.evicted import EvictedPages
from mooli.cache.host_pool import PageName
from mooli.cache.match_end import MatchEnd, MatchEnds
from mooli.cache.node_digests import NodeDigests
from mooli.cache.page_events import PageEvent, PageEvents
from mooli.cache.page_hash import page_tokens
from mooli.cache.page_pool import PagePool
from mooli.cache.radix_tree import TOKEN_BYTES, Match, Node, RadixTree
from mooli.cache.request_pages import Admission, Given, RequestPages
from mooli.cache.states import StateRoom, States
from mooli.cache.tree_watch import TreeWatch
from mooli.cache.turns import Turn, Turns
from mooli.errors import ConfigError, EngineError
from mooli.types import FIRST_CONTENT_ID


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
        self.match_granularity_tokens = match_granularity_tokens
        self.num_pages = num_pages
        self.page_size = page_size
        self.enabled = enabled
        self.num_evicted_pages = 0
        """Pages evicted since the start."""
        self._pool = PagePool(num_pages)
        self._tree = RadixTree(page_size, int(num_pages * retention_share), clock)
        self._turns = Turns(self._tree, page_size)
        self.states: States | None = None
        """Of a model with recurrent layers; others pay nothing for them."""
        if states is not None:
            self.states = States(states, self._tree, page_size, int(states.num_snapshots * retention_share))
        self.digests = NodeDigests(page_size)
        """Of the pages in the tree."""
        self.watch = TreeWatch(self._tree, page_size, self.digests)
        """For who wants to see the tree; costs nothing before."""
        self._evicted_pages = EvictedPages(self.digests)
        self._ends = MatchEnds(self._tree, self._evicted_pages, page_size, enabled)
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
        end = self._ends.of(agreeing, match, len(key) // TOKEN_BYTES, max_matched)
        num_agreeing = self._ends.agreeing_tokens(agreeing)
        held = self.open(match, given)
        num_shared = held.num_shared
        num_matched = num_shared * self.page_size + match.head_tokens
        if self.num_available < promised_pages + max(0, num_pages - num_shared):
            self.discard(held)
            return None
        end = self._ends.explained(end, held.node, num_shared, namespace, key, num_agreeing)
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
        self.states.begin(held, num_matched)
        if self.enabled:
            self.states.want(held, num_matched, len(key) // TOKEN_BYTES, num_agreeing)
        if slot < 0:
            return Admission(held, num_matched, num_tokens, copies, end)
        self._tree.use_state(slot)
        return Admission(held, num_matched, num_tokens, copies, end, [StateCopy(slot, held.state)])

    def want_states(self, admission: Admission, ends: Iterable[int | None]) -> None:
        """A request that begins keeps its state at the last page boundary before each of these numbers of tokens; None
        is left aside. Does nothing for models without states."""
        if self.states is not None and self.enabled:
            self.states.want_before(admission.held, admission.num_matched, ends)

    def find(self, namespace: str, key: bytes) -> tuple[MatchEnd, list[int]]:
        """Where the tokens of `key` stop agreeing with the tree, all of which may be there; and the nodes up to there,
        by their numbers (see `TreeWatch.path`). Changes nothing."""
        num_tokens = len(key) // TOKEN_BYTES
        match = self._tree.match(namespace, key, num_tokens) if self.enabled else Match(namespace)
        self.watch.attach()
        return self._ends.of(match, match, num_tokens, num_tokens), self.watch.path(match)

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
        if self.states is not None and held.saved:
            self.states.give(held, inserted.tail, num_tokens)
        return inserted.tail

    # -- states: only of models with recurrent layers --
    def begin_step(self, held: RequestPages, start: int, length: int, num_tried: int) -> list[tuple[int, int]]:
        """Where states are kept in a step that computes the tokens start .. start + length of a request, of which the
        last `num_tried` are guesses: after how many of them, and the slot. Ends with `end_step` or `discard`."""
        return [] if self.states is None else self.states.begin_step(held, start, length, num_tried)

    def end_step(self, held: RequestPages, num_computed: int) -> bool:
        """Of what the step computed, `num_computed` tokens count from the first on. False if their state is not kept
        anywhere: then the request cannot go on from here."""
        return self.states is None or self.states.end_step(held, num_computed)

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
        num_tokens = num_pages * self.page_size
        match = self.agreeing(namespace, key[: num_tokens * TOKEN_BYTES], num_tokens)
        if self.states is None or len(match.pages) < num_pages:
            return False
        return self.states.put(match, num_tokens, write, given)

    def release(self, held: RequestPages, key: bytes, turn: Turn | None = None) -> None:
        """The request ends or is preempted: what it computed stays in the tree, unlocked. `key` as in `insert`.

        turn: what it asks for besides; None for nothing.
        """
        first, tail = held.num_shared * self.page_size, None
        if held.node is not None and key:
            tail = self._insert(held, key)
        num_tokens = first + len(key) // TOKEN_BYTES
        is_usable = num_tokens > 0 and num_tokens % self.match_granularity_tokens == 0 and held.node is not None
        if self.states is not None and is_usable:
            self.states.give_last(held, tail, num_tokens)
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
        if self.states is not None:
            self.states.discard(held)
        node, held.node = held.node, None
        held.pages, held.num_shared = [], 0
        if node is not None:
            self._unlock(node)

    def forget(self, held: RequestPages) -> None:
        """Like `discard`, and what it had given to the tree is not to be trusted: it goes as soon as nobody uses it."""
        self._untrusted |= held.given.pages
        if self.states is not None:
            self.states.forget(held.given)
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
            self.states.free_lost()

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
        if self.states is not None:
            self.states.check(holders)


def _pages_above(node: Node | None) -> list[int]:
    """Pages of the path from the root to `node`, in order."""
    spans: list[list[int]] = []
    while node is not None:
        spans.append(node.pages)
        node = node.parent
    return [page for span in reversed(spans) for page in span]
