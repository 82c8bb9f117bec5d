"""Names of pages: one hash chain over the tokens from the start of a sequence, for all who name pages outside the tree.

Owns the chain. A page's digest says which tokens it holds and which come before, in which namespace: equal digests are
equal pages for every engine of that namespace, in any process. A digest is a name and no proof: whoever finds a page by
it compares the tokens too. Only full pages have one. Never touches the tree.

    root of the engine ─ namespace of the request ─ page 0 ─ page 1 ─ …         each: sha256(the one before, its own)
"""

from __future__ import annotations

import hashlib

import numpy as np

from mooli.cache.radix_tree import TOKEN_BYTES

DIGEST_BYTES = 32


def chain(parent: bytes, tokens: bytes) -> bytes:
    """The digest of a page: 32 bytes. parent: that of the page before, or `root_of` the sequence. tokens: the page's
    ids, of content where a request has some (`Request.key_ids`), as little-endian uint32."""
    return hashlib.sha256(parent + tokens).digest()


def root_of(engine: bytes, namespace: str) -> bytes:
    """What the first page of a sequence has as its parent: 32 bytes.

    engine: of all that decides the bits of a page (`mooli.engine.facts.CacheNamespace.root`). namespace: of the
    request, a digest of its tenant and salt.
    """
    return hashlib.sha256(engine + namespace.encode("utf-8", "surrogatepass")).digest()


def page_tokens(key: bytes) -> bytes:
    """The tokens of a key of the tree (`mooli.cache.radix_tree.token_key`) as pages are named by and stored with."""
    return np.frombuffer(key, ">i4").astype("<u4").tobytes()


class PageChain:
    """The digests of one sequence that grows. root: see `root_of`."""

    __slots__ = ("_bytes", "_root", "digests", "tokens")

    def __init__(self, root: bytes, page_size: int) -> None:
        self._root = root
        self._bytes = page_size * TOKEN_BYTES
        self.digests: list[bytes] = []
        self.tokens: list[bytes] = []
        """Of each page, as `page_tokens` has them."""

    def extend(self, key: bytes, num_pages: int) -> None:
        """Name the first `num_pages` pages of `key`, all of the sequence's tokens so far as a key of the tree."""
        first = len(self.digests)
        if num_pages <= first:
            return
        tokens = page_tokens(key[first * self._bytes : num_pages * self._bytes])
        for start in range(0, len(tokens), self._bytes):
            page = tokens[start : start + self._bytes]
            self.digests.append(chain(self.parent_of(len(self.digests)), page))
            self.tokens.append(page)

    @property
    def state_root(self) -> bytes:
        """What recurrent states of the sequence have as their parent: one apart from that of its pages."""
        return hashlib.sha256(self._root + b"recurrent states").digest()

    def parent_of(self, index: int) -> bytes:
        """What page `index` follows."""
        return self.digests[index - 1] if index else self._root
