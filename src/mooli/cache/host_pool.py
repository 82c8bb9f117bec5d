"""Which pages are in the host's memory below a pool that lies elsewhere, and in which row each of them is.

Owns the rows and what they hold, by name (`mooli.cache.page_hash`), and what goes first where there are too few: the
page that was used least recently, of a sequence always its last one before those it follows. Never touches bytes: they
are the backend's. A name is no proof: tokens are compared too.

    a row is free, or holds one page               a page is in one row at most, whatever the device's pool has
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mooli.cache.page_pool import PagePool
from mooli.errors import EngineError


class PageName(NamedTuple):
    """A full page: its digest, that of the page it follows, and its tokens as `page_hash.page_tokens` has them."""

    digest: bytes
    parent: bytes
    tokens: bytes


@dataclass(slots=True, eq=False)
class _HostPage:
    """used: the use it was in last; pages of one use have one number."""

    row: int
    parent: bytes
    tokens: bytes
    used: int


class HostPool:
    """`num_pages` rows."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_dropped = 0
        """Pages that went for others since the start."""
        self._rows = PagePool(num_pages)
        self._pages: OrderedDict[bytes, _HostPage] = OrderedDict()
        """Used least recently first; of one sequence, a page always before the one it follows."""
        self._num_uses = 0

    @property
    def num_used(self) -> int:
        return len(self._pages)

    def leading(self, digests: Sequence[bytes], tokens: Sequence[bytes]) -> int:
        """How many of these pages are there, from the first on."""
        count = 0
        for digest, own in zip(digests, tokens, strict=True):
            page = self._pages.get(digest)
            if page is None or page.tokens != own:
                break
            count += 1
        return count

    def rows(self, digests: Sequence[bytes]) -> list[int]:
        """Where pages are that are there."""
        return [self._pages[digest].row for digest in digests]

    def use(self, digests: Sequence[bytes]) -> int:
        """Pages that follow each other are used now, those that are there. Returns the number of this use."""
        self._num_uses += 1
        for digest in reversed(digests):
            self._touch(digest)
        if digests:
            self._touch_above(digests[0])
        return self._num_uses

    def _touch(self, digest: bytes) -> bool:
        page = self._pages.get(digest)
        if page is None:
            return False
        page.used = self._num_uses
        self._pages.move_to_end(digest)
        return True

    def _touch_above(self, digest: bytes) -> None:
        """Pages that this one follows."""
        page = self._pages.get(digest)
        while page is not None and self._touch(page.parent):
            page = self._pages[page.parent]

    def add(self, names: Sequence[PageName], kept_use: int | None = None) -> list[int]:
        """Rows for pages that follow each other, none of which is there yet: for the first of them, as many as find
        room. Others go for them, but not those that they follow, nor what was used in `kept_use` or later. The bytes
        are the caller's to bring at once; where it cannot, it drops the pages again."""
        self._num_uses += 1
        if names:
            parent = names[0].parent
            if self._touch(parent):
                self._touch_above(parent)
        kept_use = self._num_uses if kept_use is None else kept_use
        missing = min(len(names), self.num_pages) - self._rows.num_free
        while missing > 0 and self._pages:
            digest, page = next(iter(self._pages.items()))
            if page.used >= kept_use:
                break
            self._remove(digest)
            self.num_dropped += 1
            missing -= 1
        taken = names[: min(len(names), self._rows.num_free)]
        rows = self._rows.allocate(len(taken))
        for name, row in reversed(list(zip(taken, rows, strict=True))):
            self._pages[name.digest] = _HostPage(row, name.parent, name.tokens, self._num_uses)
        if taken:
            self._touch_above(taken[0].digest)
        return rows

    def drop(self, digests: Sequence[bytes]) -> None:
        """These pages are not to be found again, nor what continues them."""
        gone = set(digests)
        for digest, page in reversed(list(self._pages.items())):  # a page comes before what continues it
            if digest in gone or page.parent in gone:
                gone.add(digest)
                self._remove(digest)

    def clear(self) -> None:
        for digest in list(self._pages):
            self._remove(digest)

    def _remove(self, digest: bytes) -> None:
        self._rows.free([self._pages.pop(digest).row])

    def check(self) -> None:
        """Prove that each row is free or one page's, and that pages go after what continues them; raises EngineError
        otherwise. For tests."""
        rows = [*self._rows.free_pages(), *(page.row for page in self._pages.values())]
        if sorted(rows) != list(range(self.num_pages)):
            raise EngineError(f"of {self.num_pages} rows of the host some have two owners or none: {sorted(rows)}")
        places = {digest: place for place, digest in enumerate(self._pages)}
        for digest, page in self._pages.items():
            if places.get(page.parent, len(places)) < places[digest]:
                raise EngineError("a page on the host would go before one that continues it")
