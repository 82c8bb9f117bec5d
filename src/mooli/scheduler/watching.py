"""What can be seen of the engine from outside while it works: the tree, and the requests that are open.

Owns the questions about them and the shape of their answers, which are plain data and bounded, so that each takes a
moment between two steps. It notes something only while somebody watches. Never decides or changes anything.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np

from mooli.cache.kv_cache import KVCache
from mooli.cache.match_end import MatchEnd
from mooli.cache.radix_tree import Node, token_key
from mooli.scheduler.admission import Hold
from mooli.scheduler.request_state import RequestState

MOST_BEGINNINGS = 5000
"""Noted for one answer."""

ROOM = "room"
"""What a request waits for that nothing in particular holds: its turn, a place, or pages."""


class _Beginnings:
    """A `Hold` that holds nothing, and notes which requests begin to run, when and on what."""

    reason = ""

    def __init__(self) -> None:
        self.noted: list[tuple[Any, ...]] = []

    def begin_step(self, running: Iterable[RequestState]) -> None:
        pass

    def holds(self, state: RequestState) -> bool:
        return False

    def began(self, state: RequestState) -> None:
        if len(self.noted) < MOST_BEGINNINGS:
            self.noted.append((state.rid, time.time(), state.num_found, *_end_of(state.match_end)))


class Watching:
    """Answers about one scheduler.

    open_requests: by name, in the order of their arrival. holds: those of the scheduler; here is one more while
    somebody watches.
    """

    def __init__(self, cache: KVCache, open_requests: Mapping[str, RequestState], holds: list[Hold]) -> None:
        self._cache = cache
        self._open = open_requests
        self._holds = holds
        self._beginnings = _Beginnings()

    def begin(self) -> dict[str, Any]:
        """Changes are noted from here on."""
        self._cache.watch.begin()
        if self._beginnings not in self._holds:
            self._holds.append(self._beginnings)
        return {"version": self._cache.watch.version}

    def end(self) -> None:
        """Nothing is noted any more."""
        self._cache.watch.detach()
        self._beginnings.noted.clear()
        if self._beginnings in self._holds:
            self._holds.remove(self._beginnings)

    def changes(self, most_requests: int) -> dict[str, Any]:
        """Since the last time (`TreeChanges`), and who has begun: name, Unix seconds, tokens found, tokens that agreed
        and why no more did. The open requests are as they are now. cost_s: what it took to tell."""
        started = time.perf_counter()
        began, self._beginnings.noted = self._beginnings.noted, []
        changes = self._cache.watch.take()
        return {
            "version": changes.version,
            "is_complete": changes.is_complete,
            "nodes": changes.nodes,
            "removed": changes.removed,
            "dropped": changes.dropped,
            "roots": changes.roots,
            "began": began,
            "requests": self.requests(most_requests),
            "cost_s": time.perf_counter() - started,
        }

    def nodes(self, after: int, most: int) -> dict[str, Any]:
        """A part of the tree (`TreePart`)."""
        started = time.perf_counter()
        part = self._cache.watch.part(after, most)
        return {
            "version": part.version,
            "after": part.after,
            "nodes": part.nodes,
            "roots": part.roots,
            "cost_s": time.perf_counter() - started,
        }

    def node(self, number: int, most: int) -> dict[str, Any] | None:
        """What a node holds (`NodeTokens`); None if it is not there."""
        self._cache.watch.attach()
        found = self._cache.watch.tokens(number, most)
        return None if found is None else asdict(found)

    def find(self, namespace: str, token_ids: list[int]) -> dict[str, Any]:
        """Where a prompt is in the tree, and which open requests run where they end or behind that."""
        end, path = self._cache.find(namespace, token_key(np.array(token_ids, np.int32)))
        users = [state.rid for state in self._open.values() if path and self._is_below(state, path[-1])]
        num_tokens, reason = end.num_tokens, None if end.reason is None else end.reason.value
        root = self._cache.watch.root_of(namespace)
        return {"root": root, "num_tokens": num_tokens, "reason": reason, "path": path, "requests": users}

    def requests(self, most: int) -> list[tuple[Any, ...]]:
        """Up to `most` of the open requests, first come first: name, whether it runs, root, prompt tokens, computed
        tokens, cached tokens (-1 before it first began), output tokens, most output tokens, node, pages, tokens that
        agreed and why no more did, what it waits for, guessed tokens and how many of them were right."""
        return [self._row(state) for state in islice(self._open.values(), most)]

    def _row(self, state: RequestState) -> tuple[Any, ...]:
        held, watch = state.pages, self._cache.watch
        is_running = held is not None
        return (
            state.rid,
            is_running,
            watch.root_of(state.request.namespace),
            state.num_prompt_tokens,
            state.num_computed,
            state.cached_tokens,
            state.num_output_tokens,
            state.max_tokens - state.num_prompt_tokens,
            0 if held is None else watch.number_of(held.node),
            0 if held is None else len(held.pages),
            *_end_of(state.match_end),
            None if is_running else state.waited_for or ROOM,
            state.drafts.num_proposed,
            sum(num_right * times for num_right, times in enumerate(state.drafts.histogram)),
        )

    def _is_below(self, state: RequestState, number: int) -> bool:
        """Whether it runs in the node of that number, or in one below it."""
        step: Node | None = None if state.pages is None else state.pages.node
        while step is not None and step.number != number:
            step = step.parent
        return step is not None


def _end_of(end: MatchEnd | None) -> tuple[int, str | None]:
    if end is None:
        return 0, None
    return end.num_tokens, None if end.reason is None else end.reason.value
