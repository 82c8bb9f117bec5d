"""Full pages on their way between the tree and a place outside it, as bytes.

Owns the two moves and nothing in between. Both are done between steps, on the thread that steps, and are over when they
return: a page has an owner before and after, and no lock outlives them. So a move can never stand in the way of a
request that needs pages, and what comes for pages that have left the tree meanwhile is simply not put there.
"""

from __future__ import annotations

from collections.abc import Callable

from mooli.cache.kv_cache import KVCache
from mooli.cache.radix_tree import TOKEN_BYTES
from mooli.cache.request_pages import Given


def pages_there(cache: KVCache, namespace: str, key: bytes, num_pages: int) -> list[int]:
    """The pages of the tree that hold the first tokens of `key`: up to `num_pages` full ones. Changes nothing."""
    return cache.agreeing(namespace, key, num_pages * cache.page_size).pages


def room_behind(cache: KVCache, namespace: str, key: bytes, num_pages: int) -> int:
    """How many pages could be put behind the first `num_pages` of `key`, which the tree has. Changes nothing."""
    match = cache.agreeing(namespace, key, num_pages * cache.page_size)
    is_free = match.child is not None and match.child.num_locks == 0
    own, node = match.child_pages if is_free else 0, match.node  # of those that could be evicted, what must stay
    while node is not None and node.num_locks == 0:
        own += len(node.pages)
        node = node.parent
    return cache.num_available - own


def put_pages(
    cache: KVCache,
    namespace: str,
    key: bytes,
    first: int,
    last: int,
    write: Callable[[list[int], int], None],
    given: Given | None = None,
) -> int:
    """Put pages `first` to `last` (not included) of `key`, which are full, behind those that the tree has.

    write: called at most once with pages of the pool and how many of the wanted ones come before them: it fills them.
    What it raises is raised, and nothing is put. given: of the request that they are for, which counts as who computed
    them (see `KVCache.forget`).

    Returns how many leading pages of `key` the tree has now: `last`, or fewer where those before `first` have left it
    or the pool has no room.
    """
    page_bytes = cache.page_size * TOKEN_BYTES
    match = cache.agreeing(namespace, key[: last * page_bytes], last * cache.page_size)
    there = len(match.pages)
    if not first <= there < last:
        return there
    match.head_tokens, match.source_page = 0, -1  # nothing is copied: a partly filled page may be replaced
    held = cache.open(match, given)
    try:
        if not cache.grow(held, last * cache.page_size):
            return there
        write(held.pages[there:], there - first)
        cache.insert(held, key[there * page_bytes : last * page_bytes])
        return last
    finally:
        cache.discard(held)
