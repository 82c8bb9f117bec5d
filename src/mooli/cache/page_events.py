"""What becomes of full pages in the tree, told to the outside by their names: who comes, who goes.

Owns the events and when there is one. A page is told of when all its tokens are in the tree, once, and again when it
goes; a node that is split changes nothing. Names are those of the chain (`mooli.cache.page_hash`), which pages on disk
have too. Never waits: what becomes of an event is its taker's. It costs nothing while it is not attached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mooli.cache.node_digests import NodeDigests
from mooli.cache.radix_tree import Node, RadixTree, Root


@dataclass(frozen=True, slots=True)
class PagesStored:
    """Pages that follow each other. parent: the page before them, None at the beginning of a sequence. token_ids: of
    all of them, of content where a request has some. namespace: of the requests that may share them."""

    digests: list[bytes]
    parent: bytes | None
    token_ids: list[int]
    namespace: str


@dataclass(frozen=True, slots=True)
class PagesRemoved:
    digests: list[bytes]


@dataclass(frozen=True, slots=True)
class AllCleared:
    """Nothing is left, whatever was told before."""


PageEvent = PagesStored | PagesRemoved | AllCleared


class PageEvents:
    """An observer of one tree (`TreeObserver`). take: gets each event, and returns at once."""

    def __init__(self, tree: RadixTree, digests: NodeDigests, take: Callable[[PageEvent], None]) -> None:
        self._digests = digests
        self._take = take
        tree.observers += (self,)

    def cleared(self) -> None:
        """The whole tree has been emptied."""
        self._take(AllCleared())

    def added(self, node: Node, num_pages: int) -> None:
        digests, page_bytes = self._digests.of(node), self._digests.page_bytes
        first = len(node.pages) - num_pages
        new = digests[first:]
        if not new:
            return
        parent = digests[first - 1] if first else None
        if not first and node.parent is not None and not isinstance(node.parent, Root):
            parent = self._digests.before(node)
        tokens = node.key[first * page_bytes : len(digests) * page_bytes]
        self._take(PagesStored(new, parent, np.frombuffer(tokens, ">i4").tolist(), _namespace_of(node)))

    def dropping(self, node: Node, num_pages: int) -> None:
        gone = self._digests.of(node)[len(node.pages) - num_pages :]
        if gone:
            self._take(PagesRemoved(gone[::-1]))  # those behind go first

    def used(self, node: Node, below: Node | None) -> None:
        pass

    def changed(self, node: Node) -> None:
        pass

    def removing(self, node: Node) -> None:
        pass


def _namespace_of(node: Node) -> str:
    step = node
    while step.parent is not None:
        step = step.parent
    return step.namespace if isinstance(step, Root) else ""
