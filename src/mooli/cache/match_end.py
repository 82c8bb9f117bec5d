"""Where a request's tokens stop agreeing with the tree, and why.

Owns the reasons that the tree itself can tell, and how they are found. What else is known of a miss, of tiers below
and of other requests that run, is added by the scheduler. Changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from mooli.cache.evicted import EvictedPages, Eviction
from mooli.cache.radix_tree import TOKEN_BYTES, Match, Node, RadixTree


class MissReason(Enum):
    """Why no more of a request was in the cache."""

    NAMESPACE = "namespace"
    """Nothing is cached in the request's namespace."""
    NEW = "new"
    """The tree ends here, and it is not known that it ever went on."""
    EVICTED = "evicted"
    """The tree went on as the request does, and lost it for want of room."""
    IN_FLIGHT = "in flight"
    """Another request that runs has the same tokens, and has not computed them yet."""
    DIVERGED = "diverged"
    """The tree goes on with another token."""
    HELD_BACK = "held back"
    """The request must compute what follows itself: it asked for log-probabilities of its prompt."""
    NO_STATE = "no state"
    """The tree goes on as the request does, but has no state there to go on from: the model has recurrent layers."""
    JUDGED_SLOWER = "judged slower"
    """More is in a tier below, and loading it would have taken longer than computing it."""
    LOAD_FAILED = "load failed"
    """More is in a tier below, and did not come, or not in time."""
    DISABLED = "disabled"
    """The cache is off."""


@dataclass(frozen=True, slots=True)
class MatchEnd:
    """Where a request's tokens stopped agreeing with the tree, and why; the cache may have used fewer of them. With
    NO_STATE, where the last state was that it could use.

    reason: None where all were there that may be: at least one token of a request is always computed.
    found: what the tree has at index `num_tokens`, where it has DIVERGED: an id of a token or of content.
    num_lost: how many of the tokens behind were known before, or are to the tree. eviction: of the first of them, where
    they were EVICTED.
    """

    num_tokens: int
    reason: MissReason | None
    found: int | None = None
    num_lost: int = 0
    eviction: Eviction | None = None


class MatchEnds:
    """Of one tree. evicted: what is known of pages that left it. is_enabled: whether anything is ever found."""

    def __init__(self, tree: RadixTree, evicted: EvictedPages, page_size: int, is_enabled: bool) -> None:
        self._tree = tree
        self._evicted = evicted
        self._page_size = page_size
        self._is_enabled = is_enabled

    def agreeing_tokens(self, match: Match) -> int:
        """How many tokens agree with the tree: of the last node, where it goes on otherwise, those that do."""
        return (len(match.pages) - match.child_pages) * self._page_size + match.child_tokens

    def of(self, match: Match, usable: Match, num_tokens: int, max_matched: int) -> MatchEnd:
        """Where `match` ends for a request of `num_tokens` tokens of which it could have found `max_matched`."""
        agreeing = self.agreeing_tokens(match)
        if usable is not match and (used := self.agreeing_tokens(usable)) < agreeing:
            return MatchEnd(used, MissReason.NO_STATE)
        if agreeing >= max_matched:
            return MatchEnd(agreeing, None if max_matched >= num_tokens - 1 else MissReason.HELD_BACK)
        if not self._is_enabled:
            return MatchEnd(agreeing, MissReason.DISABLED)
        if match.node is None:
            return MatchEnd(agreeing, MissReason.NAMESPACE)
        found = self._tree.token_after(match)
        return MatchEnd(agreeing, MissReason.NEW if found is None else MissReason.DIVERGED, found)

    def explained(
        self, end: MatchEnd, node: Node | None, num_shared: int, namespace: str, key: bytes, num_agreeing: int
    ) -> MatchEnd:
        """With what more is known of the tokens of `key` behind those that are held, `num_shared` pages that end at
        `node`. num_agreeing: tokens whose pages are in the tree, with states or without."""
        most = len(key) // TOKEN_BYTES - 1
        if end.reason is MissReason.HELD_BACK:
            there = self.agreeing_tokens(self._tree.match(namespace, key, most)) if self._is_enabled else 0
            return replace(end, num_lost=max(0, there - end.num_tokens))
        if end.reason is MissReason.NO_STATE:
            return replace(end, num_lost=num_agreeing - end.num_tokens)
        if node is not None and end.reason in (MissReason.NEW, MissReason.DIVERGED, MissReason.NAMESPACE):
            num_pages, eviction = self._evicted.after(node, num_shared, key) or (0, None)
            num_lost = min(most, (num_shared + num_pages) * self._page_size) - end.num_tokens
            if eviction is not None and num_lost > 0:
                return MatchEnd(end.num_tokens, MissReason.EVICTED, None, num_lost, eviction)
        return end
