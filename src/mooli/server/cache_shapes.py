"""What is seen of the cache and of the requests in it, as it goes out.

Owns the shapes of answers and events, and how rows of the engine become them (`mooli.scheduler.watching`,
`mooli.cache.tree_watch`). Never asks the engine, and never decides who sees what.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import msgspec

from mooli.server.activity import Happened, Miss, OpenEntry


class Pages(msgspec.Struct, kw_only=True):
    """Pages of the KV cache. cached: in the tree. evictable: of those, in nobody's use. retained: of those in the tree,
    what requests asked to keep. in_use: by running requests. evicted: since the start."""

    total: int
    free: int
    cached: int
    evictable: int
    retained: int
    in_use: int
    evicted: int


class Namespace(msgspec.Struct, kw_only=True):
    """What a tree of its own is for. name: `default`, `tenant NAME`, or the end of a digest where there is a salt."""

    id: int
    name: str


class CacheNode(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A span of tokens in the tree. parent: null where it hangs on the root of its namespace. start: position of its
    first token. idle_s: since its last use. locks: requests that run in it or below. stored: so many of its pages, from
    the first on, are on disk as well, as far as it has been looked. retained: a request asked to keep it, and its time
    is not over."""

    id: int
    parent: int | None = None
    namespace: int
    start: int
    tokens: int
    pages: int
    idle_s: float
    locks: int = 0
    stored: int = 0
    retained: bool = False


class DroppedSpan(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The end of a node, or all of it, that had to make room. stored: so many of its pages are still on disk."""

    node: int
    namespace: int
    start: int
    tokens: int
    pages: int
    idle_s: float
    stored: int = 0


class OpenRequest(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A request that has not ended. computed_tokens: of its prompt and output, those from the cache included.
    cached_tokens: null before it has begun to run. node: where its pages in the tree end; null at the root, while it
    waits, and where nobody watches. waits_for: `in flight` (another computes the same prefix), `loading` (from
    disk), `grammar`, or `room`. guessed_tokens: of its answer, proposed and tried; right_guesses: of these, what was
    sampled then. None of them is in the tree before it is known to be right."""

    id: str
    state: Literal["running", "waiting"]
    namespace: int | None = None
    prompt_tokens: int
    computed_tokens: int
    cached_tokens: int | None = None
    output_tokens: int
    max_output_tokens: int
    node: int | None = None
    pages: int
    miss: Miss | None = None
    waits_for: str | None = None
    guessed_tokens: int = 0
    right_guesses: int = 0
    age_s: float
    first_token_s: float | None = None


class Hello(msgspec.Struct, tag="hello", kw_only=True):
    """The first event: changes come with versions above this one, at most so often."""

    seq: int
    version: int
    interval_s: float


class Changes(msgspec.Struct, tag="changes", omit_defaults=True, kw_only=True):
    """What is new since the last event. Values are absolute: a node stands for itself as it is now, and `requests` are
    all that are open, where one of them has moved. at: Unix seconds. version: of the tree behind these changes."""

    seq: int
    at: float
    version: int
    namespaces: list[Namespace] = []
    nodes: list[CacheNode] = []
    removed: list[int] = []
    evicted: list[DroppedSpan] = []
    requests: list[OpenRequest] | None = None
    happened: list[Happened] = []
    pages: Pages | None = None
    tokens_per_s: float | None = None


class Missed(msgspec.Struct, tag="missed", kw_only=True):
    """So many events are lost: the tree must be fetched again."""

    seq: int
    count: int


class Closed(msgspec.Struct, tag="closed", kw_only=True):
    """The last event, and why."""

    message: str


FeedEvent = Hello | Changes | Missed | Closed


class Tree(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The nodes of the tree, in the order of their ids. version: apply `changes` with versions above it; of a tree in
    several answers, above that of the first. more: there are nodes with ids above `after`."""

    at: float
    version: int
    page_size: int
    namespaces: list[Namespace] = []
    nodes: list[CacheNode] = []
    requests: list[OpenRequest] = []
    pages: Pages
    more: bool = False
    after: int | None = None


def event(data: FeedEvent) -> bytes:
    """A framed event. Source: WHATWG HTML, server-sent events."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def shown_nodes(rows: Sequence[Sequence[int]], roots: Collection[int]) -> list[CacheNode]:
    return [
        CacheNode(
            id=number,
            parent=parent or None,
            namespace=root,
            start=start,
            tokens=tokens,
            pages=pages,
            idle_s=round(idle_ns / 1e9, 3),
            locks=locks,
            stored=stored,
            retained=weight > 0,
        )
        for number, parent, root, start, tokens, pages, idle_ns, locks, stored, weight in rows
        if root in roots
    ]


def shown_spans(rows: Sequence[Sequence[int]], roots: Collection[int]) -> list[DroppedSpan]:
    return [
        DroppedSpan(
            node=number,
            namespace=root,
            start=start,
            tokens=tokens,
            pages=pages,
            idle_s=round(idle_ns / 1e9, 3),
            stored=stored,
        )
        for number, root, start, tokens, pages, idle_ns, stored in rows
        if root in roots
    ]


def page_counts(stats: Mapping[str, int]) -> Pages:
    """Of `Scheduler.stats`."""
    return Pages(
        total=stats["total_pages"],
        free=stats["free_pages"],
        cached=stats["tree_pages"],
        evictable=stats["evictable_pages"],
        retained=stats["retained_pages"],
        in_use=stats["used_pages"],
        evicted=stats["evicted_pages"],
    )


def open_request(row: Sequence[Any], entry: OpenEntry, now_s: float) -> OpenRequest:
    (_, is_running, root, prompt, computed, cached, output, most_output, node, pages, agreed, reason, waits_for) = row[
        :13
    ]
    guessed, right = row[13:]
    return OpenRequest(
        id=entry.generation.rid,
        state="running" if is_running else "waiting",
        namespace=root or None,
        prompt_tokens=prompt,
        computed_tokens=computed,
        cached_tokens=None if cached < 0 else cached,
        output_tokens=output,
        max_output_tokens=most_output,
        node=node or None,
        pages=pages,
        miss=None if reason is None else Miss(reason=reason, tokens=agreed),
        waits_for=waits_for,
        guessed_tokens=guessed,
        right_guesses=right,
        age_s=round(now_s - entry.started_s, 3),
        first_token_s=entry.first_token_s,
    )
