"""A compressed radix tree from token sequences to the pages that hold their KV.

Owns the pages inside it and their locks. Never allocates or frees a page: pages come in by
`insert` and go out as return values. Idea: RadixAttention (Zheng et al., SGLang, arXiv 2312.07104); here matching is by
token, and the last page of a leaf may be partly filled.

A node holds a span of tokens and the pages under it. Spans begin at page boundaries and end at them, except a leaf's:

    root ─ [t0 .. t31 | pages 7 3] ─┬─ [t32 .. t47 | page 9]
                                    └─ [t32' .. t41' | page 4]          page 4 holds 10 tokens of 16

Of models with recurrent layers a node also says in which slots states are, by how many of its tokens they come after:
pages alone are of no use there. Such snapshots are nobody's but the tree's, and go with their tokens or before them.

What goes first where pages are wanted, and what is retained for a time, is in `mooli.cache.eviction`.

Tokens are kept as big-endian int32 bytes: comparing bytes is comparing tokens, at memcmp speed, so that among sorted
children the one with the longest common prefix is a neighbour of where the wanted span would stand.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mooli.cache.eviction import AGE, EvictionQueue, is_evictable_leaf
from mooli.errors import EngineError

TOKEN_BYTES = 4


MOST_BRANCHES = 8
"""How many children of a node `RadixTree.following` looks at."""


def token_key(token_ids: NDArray[np.int32]) -> bytes:
    """Ids (n,), none negative, of tokens or of content (`Request.key_ids`), as the bytes the tree works with: 4 n."""
    return token_ids.astype(">i4").tobytes()


def common_bytes(a: bytes, b: bytes) -> int:
    """Length of the longest common prefix in whole tokens, in bytes."""
    count = min(len(a), len(b))
    if a[:count] == b[:count]:
        return count
    tokens = count // TOKEN_BYTES
    differs = np.frombuffer(a, np.int32, tokens) != np.frombuffer(b, np.int32, tokens)
    return int(differs.argmax()) * TOKEN_BYTES


def _last_state(node: Node) -> int:
    return node.states[max(node.states)] if node.states else -1


def _used_last(nodes: Iterable[Node]) -> Node | None:
    return max(nodes, key=lambda node: node.last_used, default=None)


class Node:
    """A span of tokens (`key`) and its pages.

    num_locks counts the requests that use this node or one below it; 0 means evictable.
    order: the keys of `children` (first page of each child's span) in sorted order.
    last_used: nanoseconds of the monotonic clock, later for each use; negative of one that is superseded, until it is
    used again. number: by which observers know it, 0 before.
    retain_until, weight: until when it is retained, and how much it is worth then; 0 where it is not.
    states: the slots of states, by how many tokens of this span they come after; None where there is none.
    digests: of its first full pages, as many as somebody has asked for (`mooli.cache.node_digests`).
    """

    __slots__ = (
        "children", "digests", "key", "last_used", "num_locks", "number", "order", "pages", "parent", "retain_until",
        "states", "weight",
    )  # fmt: skip

    def __init__(self, key: bytes, pages: list[int], parent: Node | None) -> None:
        self.key = key
        self.pages = pages
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.order: list[bytes] = []
        self.num_locks = 0
        self.last_used = 0
        self.retain_until = 0
        self.weight = 0
        self.number = 0
        self.states: dict[int, int] | None = None
        self.digests: list[bytes] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.key) // TOKEN_BYTES

    @property
    def used_ns(self) -> int:
        """When it was used last, superseded or not."""
        return self.last_used if self.last_used >= 0 else self.last_used + AGE


class Root(Node):
    """The empty span every sequence of one namespace begins with."""

    __slots__ = ("namespace",)

    def __init__(self, namespace: str) -> None:
        super().__init__(b"", [], None)
        self.namespace = namespace


@dataclass(slots=True)
class Match:
    """The longest prefix found: full `pages`, then `head_tokens` of `source_page`. Valid until the tree next changes.

    node: the last node matched whole (None: the namespace is new). child: the node in which the match ends, if it ends
    inside one, after `child_pages` of its pages; `child_tokens` of its tokens agree.
    """

    namespace: str
    node: Node | None = None
    child: Node | None = None
    child_pages: int = 0
    child_tokens: int = 0
    pages: list[int] = field(default_factory=list)
    head_tokens: int = 0
    source_page: int = -1


@dataclass(slots=True)
class Insertion:
    """node: where the inserted span ends, now holding the caller's lock. pages: what backs the span from now on.

    surplus: pages that nobody needs any more, for the caller to free: its own duplicates and replaced partial pages.
    tail: the node that had the span's last tokens, which do not fill a page, already; None where they are in `node`.
    """

    node: Node
    pages: list[int]
    surplus: list[int]
    tail: Node | None = None


class TreeObserver(Protocol):
    """Is told of what changes, before it does unless it says otherwise. It changes nothing itself."""

    def used(self, node: Node, below: Node | None) -> None:
        """The locks of `node` and of all above it, up to `below` (not included)."""

    def changed(self, node: Node) -> None:
        """The span or the place of `node`: it has changed."""

    def added(self, node: Node, num_pages: int) -> None:
        """The last pages of `node`, of which one may be partly filled: they have come."""

    def dropping(self, node: Node, num_pages: int) -> None:
        """The last pages of a leaf, all of them perhaps: nobody is to find them any more."""

    def removing(self, node: Node) -> None:
        """The node itself, a root too."""


class RadixTree:
    """Namespaces are separate trees with one common order of eviction.

    observers: hear of every change; most of the time there are none. most_retained: pages that may be retained.
    clock: nanoseconds, for tests.
    """

    def __init__(self, page_size: int, most_retained: int = 0, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.observers: tuple[TreeObserver, ...] = ()
        self.num_pages = 0
        self.num_evictable = 0
        self.snapshots: dict[int, Node] = {}
        """Slots of all states in the tree, least recently used first."""
        self._lost_states: list[int] = []
        self._page_bytes = page_size * TOKEN_BYTES
        self._roots: dict[str, Root] = {}
        self._num_nodes = 0
        self._now = clock
        self._clock = 0
        self._queue = EvictionQueue(self._tell_changed, clock)
        self._queue.most_retained = most_retained

    @property
    def num_retained(self) -> int:
        """Pages that are retained now."""
        self._queue.expire(self._num_nodes)
        return self._queue.num_retained

    def _tell_changed(self, node: Node) -> None:
        for observer in self.observers:
            observer.changed(node)

    # -- finding ------------------------------------------------------------------------------------------------------
    def root(self, namespace: str) -> Root | None:
        """Where everything of `namespace` begins; None where there is nothing of it."""
        return self._roots.get(namespace)

    def match(self, namespace: str, key: bytes, max_tokens: int) -> Match:
        """The longest prefix of `key` in the tree, at most `max_tokens` long. Does not change the tree."""
        root = self._roots.get(namespace)
        if root is None:
            return Match(namespace)
        node: Node = root
        page_bytes = self._page_bytes
        end = min(len(key), max_tokens * TOKEN_BYTES)
        pages: list[int] = []
        at = 0
        while at + page_bytes <= end and (child := node.children.get(key[at : at + page_bytes])):
            span = len(child.key)
            if span % page_bytes == 0 and at + span <= end and key.startswith(child.key, at):
                pages += child.pages
                at += span
                node = child
                continue
            common = common_bytes(child.key, key[at : min(end, at + span)])
            return self._ending_inside(namespace, node, child, pages, common)
        nearest, common = self._nearest_child(node, key[at : min(end, at + page_bytes)])
        if nearest is None or common == 0:
            return Match(namespace, node, pages=pages)
        return self._ending_inside(namespace, node, nearest, pages, common)

    def _ending_inside(self, namespace: str, node: Node, child: Node, pages: list[int], common: int) -> Match:
        full, head_bytes = divmod(common, self._page_bytes)
        pages = pages + child.pages[:full]
        match = Match(namespace, node, child, full, common // TOKEN_BYTES, pages, head_bytes // TOKEN_BYTES)
        if head_bytes:
            match.source_page = child.pages[full]
        return match

    def _nearest_child(self, node: Node, span: bytes) -> tuple[Node | None, int]:
        """The child that shares most leading tokens with `span` (at most a page long), and how many bytes it shares."""
        at = bisect_left(node.order, span)
        best, most = None, -1
        for edge in node.order[max(at - 1, 0) : at + 1][::-1]:
            common = common_bytes(edge, span)
            if common > most:
                best, most = node.children[edge], common
        return best, most

    def token_after(self, match: Match) -> int | None:
        """The token that the tree has where `match` ends: of several, the one used last. None where it has none, and
        where nothing agrees at all."""
        child, at = match.child, match.child_tokens * TOKEN_BYTES
        if child is None and match.node is not None and match.node.parent is not None:
            child = _used_last(islice(match.node.children.values(), MOST_BRANCHES))
        token = child.key[at : at + TOKEN_BYTES] if child is not None else b""
        return int.from_bytes(token, "big") if token else None

    def following(self, node: Node, key: bytes, num_bytes: int) -> bytes:
        """What the tree has after `key` (at most a page of tokens) below `node`, at most `num_bytes` of it.

        Where there are several ways to go on, the one used last. Changes nothing.
        """
        first = bisect_left(node.order, key)
        agreeing = takewhile(lambda edge: edge.startswith(key), islice(node.order, first, first + MOST_BRANCHES))
        child = _used_last(node.children[edge] for edge in agreeing)
        found = b""
        skip = len(key)
        while child is not None and len(found) < num_bytes:
            found += child.key[skip : skip + num_bytes - len(found)]
            skip = 0
            child = _used_last(islice(child.children.values(), MOST_BRANCHES))
        return found

    # -- locking ------------------------------------------------------------------------------------------------------
    def lock_match(self, match: Match) -> tuple[Node, Node | None]:
        """Lock what was matched: the node under the full pages, and the node whose first page is the one to copy from.

        Splits a node where the full pages end inside it. Each returned node is given back by `unlock`.
        """
        node = match.node
        if node is None:
            node = self._roots.setdefault(match.namespace, Root(match.namespace))
        if match.child is not None and match.child_pages:
            node = self._split(match.child, match.child_pages)
        source = match.child if match.head_tokens else None
        self.lock(node)
        if source is not None:
            self.lock(source)
        return node, source

    def lock(self, node: Node, below: Node | None = None) -> None:
        """Count one user on `node` and all above it, up to `below` (not included) or the root. Counts as use."""
        self._clock = max(self._clock + 1, self._now())
        for observer in self.observers:
            observer.used(node, below)
        step: Node | None = node
        while step is not below and step is not None:
            if step.num_locks == 0:
                self.num_evictable -= len(step.pages)
            step.num_locks += 1
            step.last_used = self._clock
            step = step.parent

    def unlock(self, node: Node) -> None:
        """Take one user off `node` and all above it. Counts as use."""
        self._clock = max(self._clock + 1, self._now())
        for observer in self.observers:
            observer.used(node, None)
        step: Node | None = node
        while step is not None:
            step.num_locks -= 1
            if step.num_locks < 0:
                raise EngineError("a radix tree node was unlocked more often than locked")
            step.last_used = self._clock
            if step.num_locks == 0:
                self.num_evictable += len(step.pages)
                self._offer(step)
            step = step.parent

    # -- growing ------------------------------------------------------------------------------------------------------
    def insert(self, node: Node, key: bytes, pages: list[int]) -> Insertion:
        """Hand over `pages`, which hold the tokens of `key`, to the tree below `node`; the last may be partly filled.

        The caller holds one lock on `node`, which moves to the node returned. Where the tree has a page already it is
        kept and the caller's is surplus. A partly filled page that the new tokens continue is replaced if unlocked.
        """
        start, at, backing, surplus = node, 0, list(pages), []
        tail: Node | None = None
        page_bytes = self._page_bytes
        while at < len(key):
            first = at // page_bytes
            edge = key[at : at + page_bytes]
            child = node.children.get(edge) if len(edge) == page_bytes else None
            if child is None:
                nearest, common = self._nearest_child(node, edge)
                if nearest is not None and common == len(edge):
                    surplus.append(backing[first])  # a partial tail that the start of a page in the tree holds already
                    backing[first] = nearest.pages[0]
                    tail = nearest
                    break
                states = None
                if nearest is not None and common == len(nearest.key) and nearest.num_locks == 0:
                    surplus += nearest.pages
                    states, nearest.states = nearest.states, None
                    self._remove(nearest)
                node = self._append(node, start, key[at:], backing[first:])
                if states:
                    self._move_states(node, states, node.num_tokens - (len(key) - at) // TOKEN_BYTES)
                break
            full = common_bytes(child.key, key[at : at + len(child.key)]) // page_bytes
            surplus += backing[first : first + full]
            backing[first : first + full] = child.pages[:full]
            if full * page_bytes < len(child.key):
                child = self._split(child, full)
            node = child
            at += full * page_bytes
        self.lock(node, below=start)
        return Insertion(node, backing, surplus, tail)

    def _append(self, node: Node, start: Node, key: bytes, pages: list[int]) -> Node:
        """Add a span below `node`: longer node where nobody else can notice, a new leaf otherwise."""
        own_locks = 1 if node is start else 0
        self.num_pages += len(pages)
        if node.parent is not None and not node.children and node.num_locks == own_locks and not node.weight:
            node.key += key
            node.pages += pages
            if node.num_locks == 0:
                self.num_evictable += len(pages)
            for observer in self.observers:
                observer.added(node, len(pages))
            for observer in self.observers:
                observer.changed(node)
            return node
        leaf = Node(key, pages, node)
        self._attach(leaf, node)
        self._num_nodes += 1
        self.num_evictable += len(pages)
        for observer in self.observers:
            observer.added(leaf, len(pages))
        return leaf

    def _split(self, node: Node, num_pages: int) -> Node:
        """Cut `node` after `num_pages` pages, and return the new upper part. `node` stays the lower part, so that who
        locked it still covers the same tokens."""
        parent = node.parent
        if parent is None or not 0 < num_pages <= len(node.pages):
            raise EngineError("a radix tree node can only be split inside its span")
        if num_pages == len(node.pages) and len(node.key) == num_pages * self._page_bytes:
            return node
        cut = num_pages * self._page_bytes
        upper = Node(node.key[:cut], node.pages[:num_pages], parent)
        upper.num_locks, upper.last_used = node.num_locks, node.last_used
        upper.retain_until, upper.weight = node.retain_until, node.weight
        parent.children[upper.key[: self._page_bytes]] = upper
        node.key, node.pages = node.key[cut:], node.pages[num_pages:]
        if node.digests is not None:
            upper.digests, node.digests = node.digests[:num_pages], node.digests[num_pages:]
        if node.states:
            states, node.states = node.states, None
            self._move_states(upper, {at: slot for at, slot in states.items() if at <= upper.num_tokens}, 0)
            self._move_states(
                node, {at: slot for at, slot in states.items() if at > upper.num_tokens}, -upper.num_tokens
            )
        self._attach(node, upper)
        self._num_nodes += 1
        if upper.weight:
            self._queue.parted(upper)
        for observer in self.observers:
            observer.changed(upper)
            observer.changed(node)
        return upper

    def _attach(self, child: Node, parent: Node) -> None:
        edge = child.key[: self._page_bytes]
        child.parent = parent
        parent.children[edge] = child
        parent.order.insert(bisect_left(parent.order, edge), edge)

    # -- states -------------------------------------------------------------------------------------------------------
    def states_along(self, match: Match) -> list[tuple[int, int]]:
        """After how many of the tokens that were matched there are states, and in which slots; the deepest first. Does
        not change the tree."""
        node, most = match.child, match.child_tokens
        if node is None and match.node is not None:
            node, most = match.node, match.node.num_tokens
        num_above = len(match.pages) * self._page_bytes // TOKEN_BYTES
        num_above -= match.child_pages * self._page_bytes // TOKEN_BYTES if match.child is not None else most
        found = []
        while node is not None and node.parent is not None:
            found += [(num_above + at, slot) for at, slot in sorted((node.states or {}).items())[::-1] if at <= most]
            node = node.parent
            most = node.num_tokens
            num_above -= most
        return found

    def with_state(self, match: Match, granularity: int) -> tuple[Match, int]:
        """As much of `match` as ends where a state is, a multiple of `granularity` tokens from a page's first, and the
        slot of that state; an empty match and -1 where there is none. Does not change the tree."""
        node, most = match.child, match.child_tokens
        num_above = len(match.pages) - match.child_pages
        if node is None and match.node is not None:
            node, most = match.node, match.node.num_tokens
            num_above -= len(node.pages)
        node = node if node is not None else match.node
        while node is not None and node.parent is not None:
            ends = [at for at in node.states or () if at <= most and at % granularity == 0]
            if ends and node.states:
                at = max(ends)
                full, head_tokens = divmod(at, self._page_bytes // TOKEN_BYTES)
                pages = match.pages[:num_above] + node.pages[:full]
                found = Match(match.namespace, node.parent, node, full, at, pages, head_tokens)
                if head_tokens:
                    found.source_page = node.pages[full]
                return found, node.states[at]
            node = node.parent
            most = node.num_tokens
            num_above -= len(node.pages)
        return Match(match.namespace, node), -1

    def keep_state(self, node: Node, num_back: int, slot: int) -> bool:
        """Keep a state that comes `num_back` tokens before the end of `node`, or as many before it on the way from the
        root. False if there is one already."""
        while num_back >= node.num_tokens and node.parent is not None:
            num_back -= node.num_tokens
            node = node.parent
        at = node.num_tokens - num_back
        if node.parent is None or (node.states and at in node.states):
            return False
        self._move_states(node, {at: slot}, 0)
        return True

    def use_state(self, slot: int) -> None:
        """It is the last to be given up now."""
        self.snapshots[slot] = self.snapshots.pop(slot)

    def drop_state(self, slot: int) -> None:
        """Give up a snapshot; its tokens stay."""
        node = self.snapshots.pop(slot)
        node.states = {at: other for at, other in (node.states or {}).items() if other != slot} or None

    def take_lost_states(self) -> list[int]:
        """Slots of states whose tokens have left the tree since this was last asked: nobody's any more."""
        lost, self._lost_states = self._lost_states, []
        return lost

    def _move_states(self, node: Node, states: dict[int, int], by: int) -> None:
        """States of these tokens, moved on by `by`, are those of `node`, which may have others."""
        if states:
            node.states = {**(node.states or {}), **{at + by: slot for at, slot in states.items()}}
            self.snapshots.update(dict.fromkeys(states.values(), node))

    def _lose_states(self, node: Node, num_kept: int) -> None:
        """Only the first `num_kept` tokens of `node` stay."""
        for at, slot in list((node.states or {}).items()):
            if at > num_kept:
                self.drop_state(slot)
                self._lost_states.append(slot)

    # -- what goes first ----------------------------------------------------------------------------------------------
    def retain(self, node: Node, num_pages: int, seconds: float, weight: int) -> None:
        """Retain the first `num_pages` pages of those on the way to a locked node and in it, for so long from now; as
        many of them as may be retained in all. Cuts a node where they end inside it."""
        self._queue.expire(self._num_nodes)
        way: list[Node] = []
        step = node
        while step.parent is not None:
            way.append(step)
            step = step.parent
        until = self._now() + int(seconds * 1e9)
        start, most = 0, min(num_pages, self._queue.most_retained)
        for step in reversed(way):
            if start >= most:
                break
            first = step if start + len(step.pages) <= most else self._split(step, most - start)
            self._queue.retain(first, start, until, weight)
            start += len(first.pages)
        self._queue.expire(self._num_nodes)

    def supersede(self, leaf: Node, kept: Node) -> None:
        """What is on the way to `leaf` alone, neither on that to `kept` nor on any other, and in nobody's use, goes
        before all else. Of snapshots too."""
        way = set()
        above: Node | None = kept
        while above is not None:
            way.add(above)
            above = above.parent
        step = leaf
        while step.parent is not None and step not in way and not step.num_locks:
            if any(child.last_used >= 0 for child in step.children.values()):
                break
            self._queue.supersede(step, self._num_nodes)
            if step.states:
                self.snapshots = {**dict.fromkeys(step.states.values(), step), **self.snapshots}
            step = step.parent

    def weakest_state(self, most_retained: int) -> int:
        """The snapshot to be given up first: of what is superseded, then the one used least recently. Those at the ends
        of retained nodes come last, up to so many of them. -1 where there is none."""
        self._queue.expire(self._num_nodes)
        weakest, first, num_retained = -1, -1, 0
        place = (0, 0)
        for slot, node in self.snapshots.items():
            if not node.weight or slot != _last_state(node):
                first = slot if first < 0 else first
                if not self._queue.num_retained:
                    break
                continue
            num_retained += 1
            if weakest < 0 or (node.weight, node.retain_until) < place:
                weakest, place = slot, (node.weight, node.retain_until)
        return first if first >= 0 and num_retained <= most_retained else weakest

    # -- shrinking ----------------------------------------------------------------------------------------------------
    def evict(self, num_pages: int, note: Callable[[Node, int], None] | None = None) -> list[int]:
        """Drop up to `num_pages` unlocked pages, from the ends of the leaves that go first, and return them.

        note: told of each node that loses so many of its last pages, before it does.
        """
        dropped: list[int] = []
        queue = self._queue
        queue.expire(self._num_nodes)
        while len(dropped) < num_pages and (node := queue.next()) is not None:
            count = min(num_pages - len(dropped), len(node.pages))
            if note is not None:
                note(node, count)
            dropped += self._drop_end(node, count)
        return dropped

    def forget(self, node: Node, unwanted: Set[int]) -> list[int]:
        """Drop those of the `unwanted` pages that end the way to `node` or a leaf right below it, and are in nobody's
        use; return them. A page before one that is wanted stays."""
        dropped: list[int] = []
        for leaf in [child for child in node.children.values() if unwanted >= set(child.pages)]:
            if is_evictable_leaf(leaf):
                dropped += self._drop_end(leaf, len(leaf.pages))
        step: Node | None = node
        while step is not None and is_evictable_leaf(step):
            parent = step.parent
            count = sum(1 for _ in takewhile(unwanted.__contains__, reversed(step.pages)))
            is_whole = count == len(step.pages)
            if count:
                dropped += self._drop_end(step, count)
            step = parent if is_whole else None
        return dropped

    def _drop_end(self, node: Node, count: int) -> list[int]:
        """Take the last `count` pages off an unlocked leaf, the leaf itself with its first; return them, last first."""
        for observer in self.observers:
            observer.dropping(node, count)
        dropped = node.pages[: -count - 1 : -1]
        if count == len(node.pages):
            self._remove(node)
            return dropped
        del node.pages[-count:]
        node.key = node.key[: len(node.pages) * self._page_bytes]
        if node.digests is not None:
            del node.digests[len(node.pages) :]
        if node.states:
            self._lose_states(node, node.num_tokens)
        if node.weight:
            self._queue.lost(node, count)
        self.num_pages -= count
        self.num_evictable -= count
        self._offer(node)
        return dropped

    def _remove(self, node: Node) -> None:
        """Take an unlocked leaf out of the tree."""
        parent, edge = node.parent, node.key[: self._page_bytes]
        if parent is None:
            raise EngineError("a root cannot be removed as a leaf")
        for observer in self.observers:
            observer.removing(node)
        if node.states:
            self._lose_states(node, 0)
        if node.weight:
            self._queue.lost(node, len(node.pages))
        del parent.children[edge]
        del parent.order[bisect_left(parent.order, edge)]
        node.parent = None
        self._num_nodes -= 1
        self.num_pages -= len(node.pages)
        self.num_evictable -= len(node.pages)
        self._offer(parent)

    def _offer(self, node: Node) -> None:
        """Put `node` up for eviction if it is an unlocked leaf; drop it if it is the root of an empty namespace."""
        if not is_evictable_leaf(node):
            if isinstance(node, Root) and not node.children and node.num_locks == 0:
                self._roots.pop(node.namespace, None)
                for observer in self.observers:
                    observer.removing(node)
            return
        self._queue.offer(node, self._num_nodes)

    # -- checking -----------------------------------------------------------------------------------------------------
    def nodes(self) -> Iterator[Node]:
        """Every node, roots included."""
        stack: list[Node] = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def check(self, users: dict[int, int]) -> list[int]:
        """Verify every rule of the structure and return all pages. `users`: id of a node → locks held on that node.

        Raises EngineError at the first rule that does not hold. Linear in the size of the tree: for tests.
        """
        pages: list[int] = []
        states: dict[int, Node] = {}
        evictable = num_nodes = num_states = 0
        self._queue.expire(self._num_nodes)
        self._queue.check(list(self.nodes()))
        users = dict(users)
        for node in self.nodes():
            own_locks = node.num_locks - sum(child.num_locks for child in node.children.values())
            rules = {
                "one page per page of tokens": len(node.pages) == -(-len(node.key) // self._page_bytes),
                "only leaves end inside a page": not node.children or len(node.key) % self._page_bytes == 0,
                "only roots are empty": (node.parent is None) == (not node.key),
                "children in order": node.order == sorted(node.children),
                "children by first page": all(
                    child.key[: self._page_bytes] == edge and child.parent is node
                    for edge, child in node.children.items()
                ),
                "locks are those of the users": own_locks == users.pop(id(node), 0),
                "states come after tokens of their node": all(0 < at <= node.num_tokens for at in node.states or ()),
            }
            for rule, holds in rules.items():
                if not holds:
                    raise EngineError(f"radix tree: rule broken: {rule}")
            pages += node.pages
            states |= dict.fromkeys((node.states or {}).values(), node)
            num_states += len(node.states or ())
            num_nodes += node.parent is not None
            evictable += len(node.pages) if node.num_locks == 0 else 0
        if users:
            raise EngineError("radix tree: a request uses a node that is not in the tree")
        if (len(pages), evictable, num_nodes) != (self.num_pages, self.num_evictable, self._num_nodes):
            raise EngineError("radix tree: counts of pages or nodes are wrong")
        if states != self.snapshots or num_states != len(states) or self._lost_states:
            raise EngineError("radix tree: snapshots are lost or twice in the tree")
        return pages
