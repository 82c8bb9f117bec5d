"""What one request holds of the KV cache.

Owns plain data: what a request has, what it gave, and what it begins with. Only the cache changes any of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mooli.batch import PageCopy, StateCopy
from mooli.cache.match_end import MatchEnd
from mooli.cache.radix_tree import Node


@dataclass(slots=True)
class Given:
    """What a request gave to the tree: pages that it computed, and slots of states. Some may be others' by now."""

    pages: set[int] = field(default_factory=set)
    states: set[int] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class RequestPages:
    """The pages one running request uses; see the picture in `mooli.cache.kv_cache`.

    node: the locked tree node where the shared pages end; None with the cache disabled.
    copy_source: the locked node whose first page this request's next step copies from.
    state: the slot with the state after `state_tokens` tokens; -1 where there is none. saved: slots of states to be
    given to the tree, by the number of tokens they come after; tried: the same of guesses, while a step is computed.
    wanted: numbers of tokens after which a state is to be kept for others, as soon as they are computed.
    """

    pages: list[int] = field(default_factory=list)
    num_shared: int = 0
    node: Node | None = None
    copy_source: Node | None = None
    given: Given = field(default_factory=Given)
    state: int = -1
    state_tokens: int = 0
    saved: dict[int, int] = field(default_factory=dict)
    tried: dict[int, int] = field(default_factory=dict)
    wanted: set[int] = field(default_factory=set)

    @property
    def slots(self) -> list[int]:
        """Of all its states."""
        own = [self.state] if self.state >= 0 else []
        return [*own, *self.saved.values(), *self.tried.values()]


@dataclass(frozen=True, slots=True)
class Admission:
    """What a request begins to run on.

    held: its pages, for all matched tokens and the first `num_tokens` to be computed. copies: to be made before those.
    """

    held: RequestPages
    num_matched: int
    num_tokens: int
    copies: list[PageCopy]
    end: MatchEnd
    state_copies: list[StateCopy] = field(default_factory=list)
