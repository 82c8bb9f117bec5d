"""What left the cache for want of room, remembered by hashes: so that a miss can be told from a prompt never seen.

Owns a bounded memory of pages that were evicted, each by its digest in the chain of pages and by when it was used last
and dropped. Keeps no token and no page, and never decides what is evicted.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

from mooli.cache.node_digests import NodeDigests
from mooli.cache.radix_tree import Node

MOST_PAGES = 16384
"""Remembered; those dropped first are forgotten first. About 200 bytes each."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """Nanoseconds of the monotonic clock: when pages were dropped, and used last before that."""

    dropped_ns: int
    used_ns: int


class EvictedPages:
    """digests: of the pages in the tree."""

    def __init__(self, digests: NodeDigests, most_pages: int = MOST_PAGES) -> None:
        self._digests = digests
        self._most_pages = most_pages
        self._pages: OrderedDict[bytes, Eviction] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def note(self, node: Node, num_pages: int) -> None:
        """The last `num_pages` of `node` are about to be dropped. Of one that is partly filled nothing is kept."""
        digests = self._digests.of(node)
        eviction = Eviction(time.monotonic_ns(), node.used_ns)
        for digest in digests[len(node.pages) - num_pages :]:
            self._pages[digest] = eviction
            self._pages.move_to_end(digest)
        while len(self._pages) > self._most_pages:
            self._pages.popitem(last=False)

    def after(self, node: Node, num_before: int, key: bytes) -> tuple[int, Eviction] | None:
        """How many more full pages of `key` were there behind its first `num_before`, which end at the end of `node`,
        and when the first of them was dropped; None where none is known."""
        last = len(key) // self._digests.page_bytes
        if not self._pages or num_before >= last:
            return None
        digest = self._digests.after(node)
        found: Eviction | None = None
        count = 0
        for index in range(num_before, last):
            digest = self._digests.page(digest, key, index)
            eviction = self._pages.get(digest)
            if eviction is None:
                break
            found = found or eviction
            count += 1
        return None if found is None else (count, found)
