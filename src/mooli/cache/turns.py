"""Which cached answers a newer turn of the same conversation has left behind.

Owns the memory of where conversations with a name ended, and how a turn without one shows in the tree whose it is.
Never evicts: what is found goes first by the tree's own order (`RadixTree.supersede`), and a use takes that back.

A conversation leaves a branch behind where its history changes: reasoning is dropped, an answer is written otherwise,
a head has the time in it, all is compacted. With a name (`Request.session`, `Request.previous`) that is certain.
Without one, a branch beside the new one counts as an older turn if what it ends with, the older answer's last words, is
in the new prompt behind the place where they part. Samples of one prompt and conversations with a common head stay as
they are: none has the other's last words in its prompt.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from mooli.cache.radix_tree import MOST_BRANCHES, TOKEN_BYTES, Node, RadixTree, Root
from mooli.types import Pin

MOST_SESSIONS = 4096
"""Remembered by name; those used least recently are forgotten first."""

LAST_WORDS = 4
"""Tokens that a branch must end with to be known again."""

NEIGHBOURS = 4
"""Branches looked at on either side of the new one: those most like it stand next to it."""

MOST_STEPS = 64
"""Nodes from where branches part to the end of one."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What a request that ends wants of the cache beyond its own pages, and what of it says whose turn it was.

    prompt: its key (see `token_key`). pins, session, previous: as of `Request`. diverged_at: how many tokens agreed
    with the tree when it began, if the tree went on with others; None where it did not.
    """

    prompt: bytes
    pins: tuple[Pin, ...] = ()
    session: str = ""
    previous: str = ""
    diverged_at: int | None = None


class Turns:
    """Of one tree."""

    def __init__(self, tree: RadixTree, page_size: int) -> None:
        self._tree = tree
        self._page_bytes = page_size * TOKEN_BYTES
        self._ends: OrderedDict[tuple[str, str], tuple[Node, int]] = OrderedDict()
        """By namespace and name: where the last turn ended, after so many tokens."""

    def ended(self, node: Node, turn: Turn) -> None:
        """A turn has ended at a locked node: what it leaves behind goes first."""
        older = None
        if turn.session or turn.previous:
            older = self._named(node, turn)
        if older is None and turn.diverged_at is not None:
            older = self._beside(node, turn, turn.diverged_at)
        if older is not None:
            self._tree.supersede(older, node)

    def _named(self, node: Node, turn: Turn) -> Node | None:
        """Where the turn before ended, unless somebody else has gone on from there, or nothing of it is in this one:
        then it was something else that went by the same name."""
        namespace, num_tokens, head = _place(node)
        last, known_tokens = self._ends.get((namespace, turn.previous or turn.session), (None, 0))
        if turn.session and node.parent is not None:
            self._ends[namespace, turn.session] = node, num_tokens
            self._ends.move_to_end((namespace, turn.session))
            if len(self._ends) > MOST_SESSIONS:
                self._ends.popitem(last=False)
        if last is None or last.parent is None:
            return None
        _, now_tokens, last_head = _place(last)
        return last if now_tokens <= known_tokens and last_head is head else None

    def _beside(self, node: Node, turn: Turn, diverged_at: int) -> Node | None:
        """The end of a branch beside the way to `node` that is an older turn of it."""
        first, end = diverged_at * TOKEN_BYTES // self._page_bytes * self._page_bytes, _place(node)[1] * TOKEN_BYTES
        step = node
        while step.parent is not None and end - len(step.key) > first:
            end -= len(step.key)
            step = step.parent
        if step.parent is None or end - len(step.key) != first:
            return None  # nothing parts here any more
        for beside in self._neighbours(step.parent, step, diverged_at * TOKEN_BYTES - first):
            leaf, words = self._end_of(beside)
            if words and _has(turn.prompt, words, diverged_at * TOKEN_BYTES):
                return leaf
        return None

    def _neighbours(self, parent: Node, own: Node, common: int) -> Iterator[Node]:
        """Children of `parent` that begin with as many bytes of `own`, those most like it first."""
        edge = own.key[: self._page_bytes]
        at = bisect_left(parent.order, edge)
        for distance in range(1, NEIGHBOURS + 1):
            for index in (at - distance, at + distance):
                if 0 <= index < len(parent.order) and parent.order[index][:common] == edge[:common]:
                    yield parent.children[parent.order[index]]

    def _end_of(self, node: Node) -> tuple[Node, bytes]:
        """A leaf that was used late below `node`, and the tokens that it ends with; none where they are too few or too
        far."""
        words = node.key
        for _ in range(MOST_STEPS):
            if not node.children:
                return node, words[-LAST_WORDS * TOKEN_BYTES :] if len(words) >= LAST_WORDS * TOKEN_BYTES else b""
            node = max(islice(node.children.values(), MOST_BRANCHES), key=lambda child: child.last_used)
            words = words[-LAST_WORDS * TOKEN_BYTES :] + node.key
        return node, b""


def _place(node: Node) -> tuple[str, int, Node]:
    """The namespace, how many tokens end at the end of `node`, and the first node on the way to it."""
    num_tokens, step, head = 0, node, node
    while step.parent is not None:
        num_tokens += step.num_tokens
        head, step = step, step.parent
    return (step.namespace if isinstance(step, Root) else ""), num_tokens, head


def _has(prompt: bytes, words: bytes, first: int) -> bool:
    """Whether these tokens are in the prompt, from byte `first` on."""
    at = prompt.find(words, first)
    while at >= 0 and at % TOKEN_BYTES:
        at = prompt.find(words, at + 1)
    return at >= 0
