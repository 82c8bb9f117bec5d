"""In which order what nobody uses leaves the radix tree, and what of it is retained.

Owns the queue of unlocked leaves, and the account of retained nodes: how many pages they have, until when, and which of
them stops being one first. Never drops a page and never changes a span: the tree says what becomes of its nodes, and
asks which leaf is next.

    superseded   a newer turn of the same conversation has gone another way     first, the oldest first
    ordinary     all others                                                     by last use
    retained     a request asked for it, for a time                             last: least weight, earliest deadline

A wish to retain is advice. Retained pages are at most a share of the pool, and of more the weakest are ordinary again;
after its deadline each is; and where nothing else is left they go like all others. So no page is ever unevictable. The
way to a retained node is retained at least as long and weighs at least as much, as a leaf goes before what it hangs on.

An ordinary or superseded node is queued by `last_used`, from which a great number is taken to supersede it: so any use
makes it ordinary again, and neither costs those who ask for nothing.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING

from mooli.errors import EngineError

if TYPE_CHECKING:
    from mooli.cache.radix_tree import Node

AGE = 1 << 62
"""More nanoseconds than any clock tells: 146 years."""


def is_evictable_leaf(node: Node) -> bool:
    """In the tree, with nothing below it and in nobody's use."""
    return node.parent is not None and not node.children and node.num_locks == 0


def _place(node: Node) -> int:
    """Among leaves: a smaller one goes first."""
    return node.weight * AGE + node.retain_until if node.weight else node.last_used


class EvictionQueue:
    """tell: hears of each node whose place has changed without a use. clock: nanoseconds; those of `last_used`.

    most_retained: pages that may be retained; 0 for none. num_retained: those that are. Deadlines that have passed are
    noticed by `expire`.
    """

    def __init__(self, tell: Callable[[Node], None], clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.most_retained = 0
        self.num_retained = 0
        self._tell = tell
        self._clock = clock
        self._number = count()
        # Entries of what has changed since are stale, and skipped.
        self._leaves: list[tuple[int, int, Node]] = []
        self._retained: dict[int, list[tuple[int, int, int, Node]]] = {}
        """By weight: nodes by their deadlines, of one deadline those that begin last."""

    # -- leaves -------------------------------------------------------------------------------------------------------
    def offer(self, leaf: Node, num_nodes: int) -> None:
        """It may be evicted. num_nodes: of the tree."""
        if len(self._leaves) > 64 + 4 * num_nodes:  # mostly stale entries: keep one for each leaf that is due
            due = {id(n): (at, i, n) for at, i, n in self._leaves if is_evictable_leaf(n) and at == _place(n)}
            self._leaves = list(due.values())
            heapq.heapify(self._leaves)
        place = leaf.last_used if not leaf.weight else _place(leaf)
        heapq.heappush(self._leaves, (place, next(self._number), leaf))

    def next(self) -> Node | None:
        """The leaf that goes first, taken out of the queue; None where no leaf is unlocked."""
        leaves = self._leaves
        while leaves:
            place, _, node = heapq.heappop(leaves)
            if node.num_locks or node.children or node.parent is None:
                continue
            if place == (node.last_used if not node.weight else _place(node)):
                return node
        return None

    def supersede(self, node: Node, num_nodes: int) -> None:
        """An unlocked node goes before all that are not superseded, until it is used again."""
        self._let_go(node)
        if node.last_used >= 0:
            node.last_used -= AGE
        if is_evictable_leaf(node):
            self.offer(node, num_nodes)
        self._tell(node)

    # -- retained nodes -----------------------------------------------------------------------------------------------
    def retain(self, node: Node, start: int, until: int, weight: int) -> None:
        """Retain a locked node until then, or as long as it was to be already; of two weights the larger counts. All on
        the way to it are told too. start: pages before it."""
        until, weight = max(until, node.retain_until), max(weight, node.weight)
        if not node.weight:
            self.num_retained += len(node.pages)
        if (until, weight) != (node.retain_until, node.weight):
            node.retain_until, node.weight = until, weight
            self._file(node, start)
            self._tell(node)

    def parted(self, upper: Node) -> None:
        """A retained node has been cut in two, and this is the new one."""
        start, step = 0, upper.parent
        while step is not None:
            start += len(step.pages)
            step = step.parent
        self._file(upper, start)

    def lost(self, node: Node, num_pages: int) -> None:
        """A retained node has so many pages less."""
        self.num_retained -= num_pages

    def expire(self, num_nodes: int) -> None:
        """Nodes whose time is over are ordinary again, and the weakest of too many."""
        if not self.num_retained:
            return
        now = self._clock()
        for weight in list(self._retained):
            while weight in self._retained and self._retained[weight][0][0] <= now:
                self._release_first(weight, num_nodes)
        while self.num_retained > self.most_retained:
            self._release_first(min(self._retained), num_nodes)

    def _release_first(self, weight: int, num_nodes: int) -> None:
        heap = self._retained[weight]
        until, _, _, node = heapq.heappop(heap)
        if not heap:
            del self._retained[weight]
        if node.parent is not None and (node.retain_until, node.weight) == (until, weight):
            self._let_go(node)
            if is_evictable_leaf(node):
                self.offer(node, num_nodes)
            self._tell(node)

    def _let_go(self, node: Node) -> None:
        if node.weight:
            self.num_retained -= len(node.pages)
            node.retain_until = node.weight = 0

    def _file(self, node: Node, start: int) -> None:
        if sum(map(len, self._retained.values())) > 64 + 4 * self.num_retained:  # mostly stale entries
            for weight, heap in list(self._retained.items()):
                due = {
                    id(entry[-1]): entry
                    for entry in heap
                    if entry[-1].parent and (entry[-1].retain_until, entry[-1].weight) == (entry[0], weight)
                }
                self._retained[weight] = list(due.values())
                heapq.heapify(self._retained[weight])
                if not due:
                    del self._retained[weight]
        entry = (node.retain_until, -start, next(self._number), node)
        heapq.heappush(self._retained.setdefault(node.weight, []), entry)

    # -- checking -----------------------------------------------------------------------------------------------------
    def check(self, nodes: list[Node]) -> None:
        """Prove that unlocked leaves can be evicted in their order, and that the account is that of `nodes`, which are
        all of the tree. Raises EngineError otherwise."""
        offered = {(id(node), place) for place, _, node in self._leaves}
        filed = {(id(n), until, weight) for weight, heap in self._retained.items() for until, _, _, n in heap}
        retained = [node for node in nodes if node.weight]
        rules = {
            "unlocked leaves can be evicted": all(
                (id(node), _place(node)) in offered for node in nodes if is_evictable_leaf(node)
            ),
            "retained nodes have deadlines": all((id(n), n.retain_until, n.weight) in filed for n in retained),
            "retained pages are counted": self.num_retained == sum(len(node.pages) for node in retained),
            "retained pages are a share of all": self.num_retained <= self.most_retained,
            "the way to what is retained is": all(
                node.parent is None
                or node.parent.parent is None
                or (node.parent.weight >= node.weight and node.parent.retain_until >= node.retain_until)
                for node in retained
            ),
            "what is not retained says so": all(not node.retain_until for node in nodes if not node.weight),
        }
        for rule, holds in rules.items():
            if not holds:
                raise EngineError(f"radix tree: rule broken: {rule}")
