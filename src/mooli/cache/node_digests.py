"""Digests of the pages in the tree, for those who name them outside it.

Owns which node of the tree has which digests: each page is hashed once, when somebody first asks, and its digest stays
on the node until the page goes. Never changes a span, and never hashes where nobody asks. The chain is `page_hash`'s.
"""

from __future__ import annotations

from mooli.cache.page_hash import chain, page_tokens, root_of
from mooli.cache.radix_tree import TOKEN_BYTES, Node, Root
from mooli.errors import EngineError


class NodeDigests:
    """engine: of all that decides the bits of a page (`page_hash.root_of`); may be set before the first question."""

    def __init__(self, page_size: int, engine: bytes = b"") -> None:
        self.engine = engine
        self.page_bytes = page_size * TOKEN_BYTES

    def of(self, node: Node) -> list[bytes]:
        """The digests of all full pages of `node`, in order: not to be changed."""
        above: list[Node] = []
        step: Node = node
        while step.parent is not None:
            above.append(step)
            step = step.parent
        if not isinstance(step, Root):
            raise EngineError("a node of the radix tree has no root above it")
        parent = root_of(self.engine, step.namespace)
        for step in reversed(above):
            if step.digests is None:
                step.digests = []
            known = step.digests
            first = len(known) * self.page_bytes
            tokens = page_tokens(step.key[first:])
            for at in range(0, len(tokens) - self.page_bytes + 1, self.page_bytes):
                known.append(chain(known[-1] if known else parent, tokens[at : at + self.page_bytes]))
            parent = known[-1] if known else parent
        return node.digests or []

    def before(self, node: Node) -> bytes:
        """What the first page of `node` follows."""
        above = node.parent
        if isinstance(above, Root):
            return root_of(self.engine, above.namespace)
        if above is None:
            raise EngineError("nothing stands before the root of a radix tree")
        return self.of(above)[-1]

    def after(self, node: Node) -> bytes:
        """What a page right behind `node`, which may be a root, follows."""
        return root_of(self.engine, node.namespace) if isinstance(node, Root) else self.of(node)[-1]

    def page(self, parent: bytes, key: bytes, index: int) -> bytes:
        """The digest of page `index` of `key`, which follows `parent`."""
        at = index * self.page_bytes
        return chain(parent, page_tokens(key[at : at + self.page_bytes]))
