"""What those who look at the radix tree see of it: its nodes by number, and what has changed since they last looked.

Owns the numbers of nodes and the notes of changes. It costs nothing while it is not attached, and while it is, a note
for each node that a use or a change touches. Notes are absolute, never differences: who has missed some is right again
once it has the nodes anew. Where nobody fetches them they are given up, and nothing is noted any more. Never changes
the tree.

What is on disk changes without the tree, so it is looked at anew again and again, some nodes with each answer: of a
large tree it is known late. Only heads of a sequence are on disk, so of each node it is one number.

A node goes out as a tuple: number, number of its parent (0: its parent is the root), number of the root, position of
its first token, tokens, pages, nanoseconds since its last use, locks, pages that are on disk as well, weight where it
is retained (else 0).
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mooli.cache.node_digests import NodeDigests
from mooli.cache.radix_tree import TOKEN_BYTES, Match, Node, RadixTree, Root
from mooli.errors import EngineError

MOST_NOTES = 5000
"""Of changed and removed nodes. With more of them, who looks has the tree anew for less."""

MOST_DROPPED = 1000
"""Of spans that left the cache, the latest."""

MOST_LOOKED = 250
"""Nodes that are looked for on disk for one answer, beside those that have changed: about a millisecond."""

MOST_NAMED = 500
"""Pages that get their digest for one answer, to be looked for: about a millisecond, once for each."""

NodeRow = tuple[int, int, int, int, int, int, int, int, int, int]

DroppedRow = tuple[int, int, int, int, int, int, int]
"""Number, number of the root, position of the first token dropped, tokens, pages, nanoseconds since the last use, pages
of these that are on disk."""

OnDisk = Callable[[Sequence[bytes]], int]
"""How many leading pages of a chain are on disk, by their digests. Looks at memory alone."""


@dataclass(slots=True)
class TreeChanges:
    """All since the last time. version: grows by one each time. is_complete: False where notes are missing, which are
    then empty. nodes: new or changed. removed: gone, each with its root. roots: namespaces of the roots named here."""

    version: int
    is_complete: bool = True
    nodes: list[NodeRow] = field(default_factory=list)
    removed: list[tuple[int, int]] = field(default_factory=list)
    dropped: list[DroppedRow] = field(default_factory=list)
    roots: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class TreePart:
    """Nodes in the order of their numbers. version: of the changes that are in them for certain. after: the last number
    looked at; None where there is none beyond."""

    version: int
    after: int | None
    nodes: list[NodeRow]
    roots: dict[int, str]


@dataclass(frozen=True, slots=True)
class NodeTokens:
    """What one node holds: the first of its `num_tokens` ids, from position `start` of the sequence on."""

    namespace: str
    root: int
    start: int
    num_tokens: int
    token_ids: list[int]


class _Stored:
    """How many pages of each node are on disk, by its number, as far as it was looked."""

    def __init__(self, digests: NodeDigests, on_disk: OnDisk) -> None:
        self.found: dict[int, int] = {}
        self._digests = digests
        self._on_disk = on_disk
        self._left = 0

    def begin(self) -> None:
        """An answer is made: so much work may go into it."""
        self._left = MOST_NAMED

    def look(self, node: Node) -> bool:
        """Whether of a node something else is found than before. One that would take too much work is left as it is."""
        num_full = len(node.key) // self._digests.page_bytes
        names = node.digests
        if names is None or len(names) < num_full:
            step, work = node, 0
            while step.parent is not None and work <= self._left:
                work += 1 + len(step.key) // self._digests.page_bytes - len(step.digests or ())
                step = step.parent
            if work > self._left:
                return False
            self._left -= work
            names = self._digests.of(node)
        count = self._leading(names, num_full)
        if count == self.found.get(node.number, 0):
            return False
        self.found[node.number] = count
        return True

    def _leading(self, names: Sequence[bytes], num_full: int) -> int:
        """Of the first `num_full` pages, those on disk: each is there only while all before it are."""

        def is_beyond(at: int) -> bool:
            return self._on_disk(names[at : at + 1]) == 0

        if num_full and not is_beyond(num_full - 1):
            return num_full
        return bisect_left(range(num_full), True, key=is_beyond)


class TreeWatch:
    """An observer of one tree (`TreeObserver`). Numbers are never used twice, attached or not.

    digests: of its pages.
    """

    def __init__(self, tree: RadixTree, page_size: int, digests: NodeDigests) -> None:
        self.version = 0
        self._digests = digests
        self._stored: _Stored | None = None
        self._looked_at = 0
        self._tree = tree
        self._page_size = page_size
        self._num_given = 0
        self._nodes: dict[int, Node] = {}
        self._changed: dict[int, Node] = {}
        self._removed: dict[int, Root] = {}
        self._dropped: deque[tuple[int, Root, int, int, int, int, int]] = deque(maxlen=MOST_DROPPED)
        self._is_complete = True

    def look_on_disk(self, on_disk: OnDisk) -> None:
        """Say of nodes from now on how many of their pages are there."""
        self._stored = _Stored(self._digests, on_disk)

    @property
    def is_attached(self) -> bool:
        return self in self._tree.observers

    def begin(self) -> None:
        """The changes that are taken next are those from here on."""
        self.attach()
        self._forget()
        self._is_complete = True

    def attach(self) -> None:
        """Give nodes their numbers, and note changes. Linear in the number of nodes, once."""
        if self.is_attached:
            return
        for node in self._tree.nodes():
            self._give_number(node)
        self._nodes = dict(sorted(self._nodes.items()))
        self._tree.observers += (self,)

    def detach(self) -> None:
        """Note nothing more, and forget what was noted: what comes later is not complete."""
        if self.is_attached:
            self._tree.observers = tuple(one for one in self._tree.observers if one is not self)
        self._nodes = {}
        if self._stored is not None:
            self._stored.found.clear()
        self._forget()
        self._is_complete = False

    def _forget(self) -> None:
        self._changed, self._removed = {}, {}
        self._dropped.clear()

    # -- what is looked at --------------------------------------------------------------------------------------------
    def take(self) -> TreeChanges:
        """What has changed since it was last taken or begun, and attach."""
        self.version += 1
        is_complete = self._is_complete and self.is_attached
        self.attach()
        self._is_complete = True
        changes = TreeChanges(self.version, is_complete)
        if is_complete:
            self._look_at_some()
            rows = self._rows()
            changes.nodes = [rows.of(node) for node in self._changed.values() if node.parent is not None]
            changes.removed = [(number, root.number) for number, root in self._removed.items()]
            changes.dropped = [
                (number, root.number, start, num_tokens, num_pages, max(0, rows.now_ns - last_used), num_stored)
                for number, root, start, num_tokens, num_pages, last_used, num_stored in self._dropped
            ]
            gone = {*self._removed.values(), *(root for _, root, *_ in self._dropped)}
            changes.roots = rows.roots | {root.number: root.namespace for root in gone}
        self._forget()
        return changes

    def part(self, after: int, most: int) -> TreePart:
        """Up to `most` nodes with numbers above `after`, and attach."""
        self.attach()
        numbers = list(self._nodes)
        first = bisect_right(numbers, after)
        wanted = numbers[first : first + most]
        found = [node for node in map(self._nodes.__getitem__, wanted) if node.parent is not None]
        if self._stored is not None:
            self._stored.begin()
            for node in found:
                self._stored.look(node)
        rows = self._rows()
        nodes = [rows.of(node) for node in found]
        is_last = first + most >= len(numbers)
        return TreePart(self.version, None if is_last else wanted[-1], nodes, rows.roots)

    def _look_at_some(self) -> None:
        """What of the changed nodes is on disk, and of some others, each in its turn: those count as changed where it
        is something else than before."""
        if self._stored is None:
            return
        self._stored.begin()
        for node in self._changed.values():
            if node.parent is not None:
                self._stored.look(node)
        numbers = list(self._nodes)
        first = bisect_right(numbers, self._looked_at)
        for number in numbers[first : first + MOST_LOOKED]:
            node = self._nodes[number]
            if node.parent is not None and self._stored.look(node):
                self._changed[number] = node
        self._looked_at = numbers[first + MOST_LOOKED - 1] if first + MOST_LOOKED < len(numbers) else 0

    def _rows(self) -> _Rows:
        return _Rows({} if self._stored is None else self._stored.found)

    def tokens(self, number: int, most: int) -> NodeTokens | None:
        """What a node holds, at most so many ids of it; None for a number that is nobody's, a root's or a gone one's.
        Only while attached."""
        node = self._nodes.get(number)
        if node is None or node.parent is None:
            return None
        root, start = _place(node)
        ids: list[int] = np.frombuffer(node.key, ">i4", min(most, len(node.key) // TOKEN_BYTES)).tolist()
        return NodeTokens(root.namespace, root.number, start, len(node.key) // TOKEN_BYTES, ids)

    def path(self, match: Match) -> list[int]:
        """The nodes that `match` has found, from the root on; it may end inside the last. Only while attached."""
        found = [match.child] if match.child is not None and match.child_tokens else []
        step = match.node
        while step is not None and step.parent is not None:
            found.append(step)
            step = step.parent
        return [node.number for node in reversed(found)]

    def number_of(self, node: Node | None) -> int:
        """0 for none, and for a root. Only while attached."""
        return 0 if node is None or node.parent is None else node.number

    def root_of(self, namespace: str) -> int:
        """The number of a namespace's root; 0 where nothing is cached. Only while attached."""
        root = self._tree.root(namespace)
        return 0 if root is None else root.number

    # -- what the tree tells ------------------------------------------------------------------------------------------
    def used(self, node: Node, below: Node | None) -> None:
        step: Node | None = node
        while step is not below and step is not None:
            self.changed(step)
            step = step.parent

    def changed(self, node: Node) -> None:
        if not node.number:
            self._give_number(node)
        self._changed[node.number] = node
        if len(self._changed) > MOST_NOTES:
            self.detach()

    def added(self, node: Node, num_pages: int) -> None:
        """Who adds pages locks them: `used` tells of it."""

    def dropping(self, node: Node, num_pages: int) -> None:
        root, start = _place(node)
        kept = (len(node.pages) - num_pages) * self._page_size
        num_tokens = len(node.key) // TOKEN_BYTES - kept
        stored = 0 if self._stored is None else self._stored.found.get(node.number, 0)
        num_stored = max(0, min(stored, len(node.pages)) - (len(node.pages) - num_pages))
        self._dropped.append((node.number, root, start + kept, num_tokens, num_pages, node.used_ns, num_stored))
        if num_pages < len(node.pages):
            self.changed(node)

    def removing(self, node: Node) -> None:
        self._changed.pop(node.number, None)
        self._nodes.pop(node.number, None)
        if self._stored is not None:
            self._stored.found.pop(node.number, None)
        if node.parent is not None:
            self._removed[node.number] = _place(node)[0]
            if len(self._removed) > MOST_NOTES:
                self.detach()

    def _give_number(self, node: Node) -> None:
        if not node.number:
            self._num_given += 1
            node.number = self._num_given
        self._nodes[node.number] = node


class _Rows:
    """Writes nodes down at one moment. stored: pages on disk, by number. roots: of the nodes written so far."""

    def __init__(self, stored: Mapping[int, int]) -> None:
        self._stored = stored
        self.now_ns = time.monotonic_ns()
        self.roots: dict[int, str] = {}
        self._places: dict[int, tuple[Root, int]] = {}
        """By number: the root, and the position behind the node."""

    def of(self, node: Node) -> NodeRow:
        root, end = self._end_of(node)
        self.roots[root.number] = root.namespace
        parent = node.parent
        num_tokens = len(node.key) // TOKEN_BYTES
        return (
            node.number,
            0 if parent is None or parent.parent is None else parent.number,
            root.number,
            end - num_tokens,
            num_tokens,
            len(node.pages),
            max(0, self.now_ns - node.used_ns),
            node.num_locks,
            min(self._stored.get(node.number, 0), len(node.pages)),
            node.weight,
        )

    def _end_of(self, node: Node) -> tuple[Root, int]:
        """The root of `node` and the position behind it; those above it are looked up once, however many ask."""
        above: list[Node] = []
        step = node
        while (known := self._places.get(step.number)) is None:
            if step.parent is None:
                known = (_as_root(step), 0)
                break
            above.append(step)
            step = step.parent
        for step in reversed(above):
            known = self._places[step.number] = (known[0], known[1] + len(step.key) // TOKEN_BYTES)
        return known


def _place(node: Node) -> tuple[Root, int]:
    """The root above `node`, and the position of its first token."""
    start, step = 0, node
    while step.parent is not None:
        step = step.parent
        start += len(step.key) // TOKEN_BYTES
    return _as_root(step), start


def _as_root(node: Node) -> Root:
    if not isinstance(node, Root):
        raise EngineError("a node of the radix tree has no root above it")
    return node
