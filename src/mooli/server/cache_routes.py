"""Routes for who wants to see what the server does: the tree, its changes, the requests that are open, the log's end.

Owns their bodies, who may see what, and the text of a node. Without a key file everybody sees the shape of the whole
tree, as there is nobody to hide it from; a text is shown to who knows its salt, or has an admin's key. What they are
made of is `mooli.server.cache_shapes`'. Never changes anything.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable
from typing import Any, TypeVar

import msgspec

from mooli.frontend.tool_messages import read_tools
from mooli.server.activity import Hour, Miss
from mooli.server.cache_feed import MOST_NODES, MOST_REQUESTS, View
from mooli.server.cache_shapes import OpenRequest, Pages, page_counts
from mooli.server.conversation import Conversation, prompt_ids
from mooli.server.logs import TAIL_LINES, LogLine
from mooli.server.native_info import engine_stats
from mooli.server.routing import Access, Client, Dialect, EventStream, HttpError, Incoming, Reply, Route
from mooli.server.service import Service
from mooli.types import FIRST_CONTENT_ID
from mooli.version import __version__

MOST_TEXT_TOKENS = 4096
"""Of a node, shown at once."""

T = TypeVar("T")


class NodeText(msgspec.Struct, kw_only=True):
    """What a node holds, from position `start` of its sequences on. is_cut: it has more tokens than are shown."""

    id: int
    namespace: int
    start: int
    tokens: int
    text: str
    is_cut: bool


class FindBody(msgspec.Struct, kw_only=True):
    """One of prompt, messages (OpenAI's, with tools where there are some) and input_ids. cache_salt: of the requests
    meant."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    input_ids: list[int] | None = None
    cache_salt: str | None = None


class Found(msgspec.Struct, kw_only=True):
    """How many tokens a prompt has, how many of them the cache holds, and why no more. path: the nodes from the root
    on; it may end inside the last. requests: open ones that run where it ends, or behind that."""

    tokens: int
    found_tokens: int
    miss: Miss | None
    namespace: int | None
    path: list[int]
    requests: list[str]


class CacheCounts(msgspec.Struct, kw_only=True):
    """Since the start, of requests that have begun. hit_rate: share of their prompt tokens that came from the cache."""

    prompt_tokens: int
    cached_tokens: int
    hit_rate: float


class Status(msgspec.Struct, kw_only=True):
    """The server at this moment. at: Unix seconds. running, waiting: requests of everybody; `requests` are those that
    the caller may see, `more` so many beyond them. tokens_per_s: generated now."""

    at: float
    version: str
    model: str
    uptime_s: float
    is_draining: bool
    running: int
    waiting: int
    requests: list[OpenRequest]
    more: int
    tokens_per_s: float
    pages: Pages
    page_size: int
    cache: CacheCounts
    last_hour: Hour


class LogAnswer(msgspec.Struct, kw_only=True):
    """last: number of the last line there is. missed: lines behind `after` that are not shown."""

    lines: list[LogLine]
    last: int
    missed: int


def view_of(service: Service, client: Client, salt: str | None) -> View:
    """What `client` may see: all of it with an admin's key or where there are no keys, else what is its own. Raises
    RequestError for a salt that is none."""
    namespace = service.rules.namespace_of(salt, client.caller.tenant)
    if not service.keys.asks_admins or (client.key is not None and client.key.is_admin):
        return View()
    named = client.key is not None and bool(client.key.name)
    return View(namespace, client.caller.tenant if named else "")


async def show_tree(service: Service, request: Incoming) -> Reply:
    """?limit: most nodes. ?after: only those with larger ids. ?cache_salt: of the caller's requests."""
    view = view_of(service, request.client, request.query.get("cache_salt"))
    after = _number(request, "after", 0, 0, 2**62)
    limit = _number(request, "limit", MOST_NODES, 1, MOST_NODES)
    feed, timeout_s = service.cache_feed, service.config.watchdog_timeout
    return Reply(await _answer(feed.tree(view, after=after, limit=limit, timeout_s=timeout_s)))


async def show_node(service: Service, request: Incoming) -> Reply:
    """?max_tokens: shown of it. ?cache_salt: of the caller's requests."""
    salt = request.query.get("cache_salt")
    own = service.rules.namespace_of(salt, request.client.caller.tenant)
    most = _number(request, "max_tokens", 512, 1, MOST_TEXT_TOKENS)
    given = request.path_params["node_id"]
    number = int(given) if given.isascii() and given.isdigit() and len(given) < 19 else 0
    found = await _answer(service.cache_feed.node(number, most, service.config.watchdog_timeout))
    key = request.client.key
    if found is None or not (found["namespace"] == own or (key is not None and key.is_admin)):
        raise HttpError(
            404, f"there is no node {given[:40]!r} of yours in the cache: it may have been evicted", param="node_id"
        )
    ids = [token_id for token_id in found["token_ids"] if token_id < FIRST_CONTENT_ID]
    tokenizer = service.tokenizer
    text = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=False)
    return Reply(
        NodeText(
            id=number,
            namespace=found["root"],
            start=found["start"],
            tokens=found["num_tokens"],
            text=text,
            is_cut=len(found["token_ids"]) < found["num_tokens"],
        )
    )


async def find_prompt(service: Service, request: Incoming) -> Reply:
    """POST: where in the tree a prompt is. Raises RequestError for one that is none."""
    body: FindBody = request.body
    given = [name for name in ("prompt", "messages", "input_ids") if getattr(body, name) is not None]
    if len(given) != 1:
        raise HttpError(400, f"give one of prompt, messages and input_ids, not {len(given)} of them", param="prompt")
    namespace = service.rules.namespace_of(body.cache_salt, request.client.caller.tenant)
    ids = await _ids(service, body, namespace)
    if not ids or not all(0 <= token_id < service.facts.vocab_size for token_id in ids):
        raise HttpError(
            400,
            f"the prompt must have at least one token, each from 0 to {service.facts.vocab_size - 1}",
            param=given[0],
        )
    if len(ids) > service.facts.context_length:
        raise HttpError(
            400,
            f"the prompt has {len(ids)} tokens; no request has more than {service.facts.context_length}",
            param=given[0],
        )
    found = await _answer(service.cache_feed.find(namespace, ids, service.config.watchdog_timeout))
    reason = found["reason"]
    return Reply(
        Found(
            tokens=len(ids),
            found_tokens=found["num_tokens"],
            miss=None if reason is None else Miss(reason=reason, tokens=found["num_tokens"]),
            namespace=found["root"] or None,
            path=found["path"],
            requests=found["requests"],
        )
    )


async def _ids(service: Service, body: FindBody, namespace: str) -> list[int]:
    if body.input_ids is not None:
        return body.input_ids
    if body.prompt is not None:
        service.rules.check_length(body.prompt)
        return await service.tokenize(body.prompt)
    conversation = Conversation(messages=body.messages or [], tools=read_tools(body.tools or []), owner=namespace)
    return [int(token_id) for token_id in await prompt_ids(service, conversation, takes_up=True)]


async def watch_cache(service: Service, request: Incoming) -> EventStream:
    """?cache_salt: of the caller's requests."""
    view = view_of(service, request.client, request.query.get("cache_salt"))
    if service.is_draining:
        raise HttpError(503, "The server is shutting down.", code="shutting_down")
    return EventStream(service.cache_feed.watch(view))


async def show_status(service: Service, request: Incoming) -> Reply:
    """?cache_salt: of the caller's requests."""
    view = view_of(service, request.client, request.query.get("cache_salt"))
    stats = await engine_stats(service)
    requests = await _answer(service.cache_feed.requests(view, service.config.watchdog_timeout))
    num_open = len(service.activity.open)
    cached, prompt = stats["cached_tokens"], stats["prompt_tokens"]
    return Reply(
        Status(
            at=time.time(),
            version=__version__,
            model=service.model_name,
            uptime_s=round(time.time() - service.started_at, 3),
            is_draining=service.is_draining,
            running=stats["running"],
            waiting=stats["waiting"],
            requests=requests,
            more=max(0, num_open - MOST_REQUESTS),
            tokens_per_s=round(service.step_log.last_gen_throughput, 3),
            pages=page_counts(stats),
            page_size=service.facts.page_size,
            cache=CacheCounts(prompt_tokens=prompt, cached_tokens=cached, hit_rate=cached / max(prompt, 1)),
            last_hour=service.activity.last_hour(),
        )
    )


async def show_log(service: Service, request: Incoming) -> Reply:
    """?after: only lines behind the one of that number. ?limit: the last so many of them."""
    if not service.keys.asks_admins and not service.config.is_loopback:
        raise HttpError(
            403,
            "The log is shown to who has an admin's key, and other machines can reach this server: start it with"
            " --admin-api-key, or with --host 127.0.0.1.",
        )
    after = _number(request, "after", 0, 0, 2**62)
    limit = _number(request, "limit", 200, 1, TAIL_LINES)
    tail = service.log_tail
    lines = tail.lines(after, limit)
    return Reply(LogAnswer(lines=lines, last=tail.num_lines, missed=max(0, tail.num_lines - after - len(lines))))


async def _answer(asked: Awaitable[T]) -> T:
    """Of the engine. Raises HttpError (503) if it does not answer."""
    try:
        return await asked
    except TimeoutError as exc:
        raise HttpError(503, str(exc)) from exc


def _number(request: Incoming, name: str, default: int, least: int, most: int) -> int:
    given = request.query.get(name)
    if given is None:
        return default
    number = int(given) if given.isascii() and given.isdigit() and len(given) < 19 else -1
    if not least <= number <= most:
        raise HttpError(400, f"{name}={given[:40]!r} is no number from {least} to {most}", param=name)
    return number


ROUTES = (
    Route(
        path="/v1/cache/tree",
        methods=("GET",),
        handler=show_tree,
        access=Access.KEY,
        dialect=Dialect.NATIVE,
        is_watching=True,
        summary="The radix tree: spans of tokens, their pages, their users",
    ),
    Route(
        path="/v1/cache/nodes/{node_id}",
        methods=("GET",),
        handler=show_node,
        access=Access.KEY,
        dialect=Dialect.NATIVE,
        is_watching=True,
        summary="The text that a node of the tree holds",
    ),
    Route(
        path="/v1/cache/find",
        methods=("POST",),
        handler=find_prompt,
        access=Access.KEY,
        dialect=Dialect.NATIVE,
        is_watching=True,
        summary="Where in the tree a prompt is, and who shares it",
        body=FindBody,
    ),
    Route(
        path="/v1/cache/events",
        methods=("GET",),
        handler=watch_cache,
        access=Access.KEY,
        dialect=Dialect.NATIVE,
        is_watching=True,
        summary="What happens to requests and to the tree, as it happens",
    ),
    Route(
        path="/v1/status",
        methods=("GET",),
        handler=show_status,
        access=Access.KEY,
        dialect=Dialect.NATIVE,
        is_watching=True,
        summary="What the server does now, and how the last hour was",
    ),
    Route(
        path="/v1/logs",
        methods=("GET", "POST"),
        handler=show_log,
        access=Access.ADMIN,
        dialect=Dialect.NATIVE,
        is_watching=True,
        summary="The last lines of the server's log",
    ),
)
