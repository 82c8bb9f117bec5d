"""The KV cache as the scheduler sees it: admit, grow, insert, release.

Owns the page pool and the radix tree, and the rule that every page has exactly one owner. Never knows what a request is
beyond the pages it holds, and never touches device memory: copying is asked for through `PageCopy`.

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
    forget         like discard; and the pages that this request computed and gave to the tree leave it, each as soon as
                   nobody uses it. What others had computed stays
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from itertools import takewhile

import numpy as np

from mooli.batch import PageCopy
from mooli.cache.page_pool import PagePool
from mooli.cache.radix_tree import TOKEN_BYTES, Match, Node, RadixTree
from mooli.errors import ConfigError, EngineError
from mooli.types import FIRST_CONTENT_ID


@dataclass(slots=True, eq=False)
class RequestPages:
    """The pages one running request uses; see the picture above. Only `KVCache` changes it.

    node: the locked tree node where the shared pages end; None with the cache disabled.
    copy_source: the locked node whose first page this request's next step copies from.
    given: the tree's pages that this request computed.
    """

    pages: list[int] = field(default_factory=list)
    num_shared: int = 0
    node: Node | None = None
    copy_source: Node | None = None
    given: set[int] = field(default_factory=set)


class MissReason(Enum):
    """Why no more of a request was in the cache."""

    NAMESPACE = "namespace"
    """Nothing is cached in the request's namespace."""
    NEW = "new"
    """The tree ends here. Whether it ever went on, and was evicted, is not known."""
    DIVERGED = "diverged"
    """The tree goes on with another token."""
    HELD_BACK = "held back"
    """The request must compute what follows itself: it asked for log-probabilities of its prompt."""
    DISABLED = "disabled"
    """The cache is off."""


@dataclass(frozen=True, slots=True)
class MatchEnd:
    """Where a request's tokens stopped agreeing with the tree, and why; the cache may have used fewer of them.

    reason: None where all were there that may be: at least one token of a request is always computed.
    found: what the tree has at index `num_tokens`, where it has DIVERGED: an id of a token or of content.
    """

    num_tokens: int
    reason: MissReason | None
    found: int | None = None


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


class KVCache:
    """All pages of the KV pool. With `enabled=False` nothing is shared: every match is empty, nothing is kept.

    A page number stands for the same tokens in every layer, whatever the layers keep of them: groups of layers that
    could give up pages at different times (`CacheSpec.page_groups`) are given them together.
    """

    def __init__(
        self, num_pages: int, page_size: int, enabled: bool = True, *, match_granularity_tokens: int = 1
    ) -> None:
        """match_granularity_tokens: a match is cut to a multiple of this, which divides the page size.

        Raises ConfigError if it does not.
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
        self._tree = RadixTree(page_size)
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
        given: set[int] | None = None,
    ) -> Admission | None:
        """Let a request begin on what is cached of it, with pages for the first tokens that it computes.

        key: all its tokens (see `token_key`), of which at most `max_matched` may come from the cache and at most
        `most_tokens` are computed first. num_pages: what it needs in the end. It is admitted only if as many are
        available besides the `promised_pages`. given: see `open`.

        None, and no change, if there are too few pages.
        """
        match = self.match(namespace, key, max_matched)
        end = self._end(match, len(key) // TOKEN_BYTES, max_matched)  # before `open`, which may split a node
        held = self.open(match, given)
        num_shared = held.num_shared
        num_matched = num_shared * self.page_size + match.head_tokens
        if self.num_available < promised_pages + max(0, num_pages - num_shared):
            self.discard(held)
            return None
        copied = match.head_tokens
        if copied and self.room(held, num_matched) <= 0:
            # Alone in a pool just large enough: the page to copy from is the one that is needed.
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
        return Admission(held, num_matched, num_tokens, copies, end)

    def _end(self, match: Match, num_tokens: int, max_matched: int) -> MatchEnd:
        """Where `match` ends for a request of `num_tokens` tokens of which it could have found `max_matched`."""
        agreeing = (len(match.pages) - match.child_pages) * self.page_size + match.child_tokens
        if agreeing >= max_matched:
            return MatchEnd(agreeing, None if max_matched >= num_tokens - 1 else MissReason.HELD_BACK)
        if not self.enabled:
            return MatchEnd(agreeing, MissReason.DISABLED)
        if match.node is None:
            return MatchEnd(agreeing, MissReason.NAMESPACE)
        found = self._tree.token_after(match)
        return MatchEnd(agreeing, MissReason.NEW if found is None else MissReason.DIVERGED, found)

    def match(self, namespace: str, key: bytes, max_tokens: int) -> Match:
        """The longest cached prefix of `key` (see `token_key`), at most `max_tokens`. Changes nothing."""
        if not self.enabled:
            return Match(namespace)
        match = self._tree.match(namespace, key, max_tokens)
        match.head_tokens -= match.head_tokens % self.match_granularity_tokens
        if not match.head_tokens:
            match.source_page = -1
        return match

    def open(self, match: Match, given: set[int] | None = None) -> RequestPages:
        """Lock what was matched, for a request that begins to run. Ends with `release`, `discard` or `forget`.

        given: of a request that ran before, what it had given then. A page that was evicted since may be another's by
        now; at worst `forget` drops one too many.

        If `match.head_tokens`, the caller copies that many tokens of `match.source_page` to the first page it grows,
        and calls `drop_copy_source` after the step that copied.
        """
        if not self.enabled:
            return RequestPages()
        node, source = self._tree.lock_match(match)
        return RequestPages(list(match.pages), len(match.pages), node, source, set() if given is None else given)

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
        if held.node is None or not key:
            return
        first = held.num_shared
        last = first + self.pages_for(len(key) // TOKEN_BYTES)
        own = held.pages[first:last]
        inserted = self._tree.insert(held.node, key, own)
        held.given.update(page for page, mine in zip(inserted.pages, own, strict=True) if page == mine)
        held.node = inserted.node
        held.pages[first:last] = inserted.pages
        held.num_shared = last
        self._free(inserted.surplus)

    def release(self, held: RequestPages, key: bytes) -> None:
        """The request ends or is preempted: what it computed stays in the tree, unlocked. `key` as in `insert`."""
        self.insert(held, key)
        self.discard(held)

    def discard(self, held: RequestPages) -> None:
        """The request ends and its own pages are not worth keeping, or not known to be right."""
        self.drop_copy_source(held)
        self._free(held.pages[held.num_shared :])
        node, held.node = held.node, None
        held.pages, held.num_shared = [], 0
        if node is not None:
            self._unlock(node)

    def forget(self, held: RequestPages) -> None:
        """Like `discard`, and what it had given to the tree is not to be trusted: it goes as soon as nobody uses it."""
        self._untrusted |= held.given
        self.discard(held)

    def _unlock(self, node: Node) -> None:
        self._tree.unlock(node)
        if self._untrusted:
            self._free(self._tree.forget(node, self._untrusted))

    def _free(self, pages: list[int]) -> None:
        self._untrusted.difference_update(pages)
        self._pool.free(pages)

    def evict(self, num_pages: int) -> int:
        """Free up to `num_pages` unlocked pages, least recently used first. Returns how many."""
        before = self._pool.num_free
        self._evict(num_pages)
        return self._pool.num_free - before

    def _evict(self, num_pages: int) -> None:
        dropped = self._tree.evict(num_pages)
        self.num_evicted_pages += len(dropped)
        self._free(dropped)

    def flush(self) -> None:
        """Empty the tree of everything that nobody uses."""
        self._free(self._tree.evict(self._tree.num_pages))

    def check(self, holders: Collection[RequestPages]) -> None:
        """Prove that each page has one owner: free, one of `holders`, or the tree, and that locks are the holders'.

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


def _pages_above(node: Node | None) -> list[int]:
    """Pages of the path from the root to `node`, in order."""
    spans: list[list[int]] = []
    while node is not None:
        spans.append(node.pages)
        node = node.parent
    return [page for span in reversed(spans) for page in span]
