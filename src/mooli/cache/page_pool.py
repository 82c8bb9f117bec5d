"""The free pages.

Owns the list of pages nobody uses. Never knows what a page holds or who took it.
"""

from __future__ import annotations

from collections.abc import Iterable

from mooli.errors import EngineError


class PagePool:
    """Pages are numbered 0 .. num_pages - 1. The page freed last is handed out first: it may still be in a cache."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_free = bytearray(b"\x01" * num_pages)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages. Raises EngineError if there are fewer: callers look at `num_free` first."""
        if count > len(self._free):
            raise EngineError(f"{count} pages asked for, {len(self._free)} free: the caller must evict first")
        cut = len(self._free) - count
        taken = self._free[cut:]
        del self._free[cut:]
        for page in taken:
            self._is_free[page] = 0
        return taken

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back. Raises EngineError on a page that is free already, before two owners can meet on it."""
        for page in pages:
            if self._is_free[page]:
                raise EngineError(f"page {page} freed twice")
            self._is_free[page] = 1
            self._free.append(page)

    def free_pages(self) -> list[int]:
        """A copy of the free list, for checks."""
        return list(self._free)
