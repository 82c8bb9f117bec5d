"""Native routes that ask about the server's state or change it: health, cache, aborts.

Owns their answers in SGLang's words. What health means is `mooli.server.health`'s.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Iterable

import msgspec

from mooli.server import health
from mooli.server.routing import Access, Dialect, Handler, HttpError, Incoming, Reply, Route
from mooli.server.service import Service

ABORTED = "The request was aborted by /abort_request."

MAX_FLUSH_WAIT_S = 600.0

_FLUSH_INTERVAL_S = 0.05


class AbortBody(msgspec.Struct, kw_only=True):
    """rid: of one request, or a list of them. A request whose id was made from `rid` ends with it: that of a batch is
    rid_0, rid_1, …, those of n samples have a further number. abort_all: every request."""

    rid: str | list[str] | None = None
    abort_all: bool = False


async def health_now(service: Service, request: Incoming) -> Reply:
    return _probe_reply(health.server_problem(service))


async def health_generate(service: Service, request: Incoming) -> Reply:
    return _probe_reply(await health.generation_problem(service))


async def live(service: Service, request: Incoming) -> Reply:
    return _probe_reply(health.engine_problem(service))


async def ready(service: Service, request: Incoming) -> Reply:
    return _probe_reply(health.readiness_problem(service))


async def flush_cache(service: Service, request: Incoming) -> Reply:
    """?timeout: seconds to wait for running and waiting requests to end; 0 if not given."""
    deadline_s = time.monotonic() + _timeout_s(request.query.get("timeout"))
    service.num_flushing += 1
    try:
        while True:
            if await ask(service, "flush_cache"):
                return _text("Cache flushed.\n")
            if time.monotonic() >= deadline_s:
                return _text("The cache is not flushed: requests are running or waiting.\n", status=400)
            # However many wait, the engine is asked as often as for one.
            await asyncio.sleep(_FLUSH_INTERVAL_S * service.num_flushing)
    finally:
        service.num_flushing -= 1


async def abort_request(service: Service, request: Incoming) -> Reply:
    body: AbortBody = request.body
    given = [] if body.rid is None else [body.rid] if isinstance(body.rid, str) else body.rid
    if not body.abort_all and not any(given):
        raise HttpError(400, "give rid, or abort_all to end every request", param="rid")
    open_rids = service.client.open_rids
    service.client.abort(open_rids if body.abort_all else _belonging(open_rids, given), ABORTED)
    return Reply(b"", media_type="text/plain")


async def ask(service: Service, question: str) -> object:
    """One of the engine's questions. Raises HttpError (503) if it does not answer."""
    try:
        return await service.client.ask(question, service.config.watchdog_timeout)
    except TimeoutError as exc:
        raise HttpError(503, str(exc)) from exc


def _belonging(open_rids: Iterable[str], given: Iterable[str]) -> list[str]:
    """The ids that are among `given`, or were made from one of them."""
    wanted = set(given)
    return [rid for rid in open_rids if not wanted.isdisjoint(_origins(rid))]


def _origins(rid: str) -> list[str]:
    """The ids that the call of request `rid` may have been given: itself, that of a batch or of samples, of both."""
    origins = [rid]
    for _ in range(2):
        shorter = re.sub(r"_\d+\Z", "", origins[-1])
        if shorter == origins[-1]:
            break
        origins.append(shorter)
    return origins


def _timeout_s(given: str | None) -> float:
    try:
        seconds = float(given or 0)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_FLUSH_WAIT_S:
        raise HttpError(
            400,
            f"timeout={(given or '')[:40]!r} is no number of seconds from 0 to {MAX_FLUSH_WAIT_S:g}",
            param="timeout",
        )
    return seconds


def _probe_reply(problem: str | None) -> Reply:
    if problem is None:
        return Reply(b"", media_type="text/plain")
    return _text(f"{problem}\n", status=503)


def _text(text: str, status: int = 200) -> Reply:
    return Reply(text.encode(), status=status, media_type="text/plain; charset=utf-8")


def _probe(path: str, handler: Handler, summary: str, access: Access = Access.OPEN) -> Route:
    return Route(path=path, methods=("GET",), handler=handler, access=access, dialect=Dialect.NATIVE, summary=summary)


ROUTES = (
    _probe("/health", health_now, "200 while the engine lives and the server is not about to end"),
    _probe("/health_generate", health_generate, "The same, shown by a request of one token"),
    _probe("/health/live", live, "200 while the engine lives"),
    _probe("/health/ready", ready, "200 while requests are taken"),
    _probe("/ready", ready, "200 while requests are taken"),
    _probe("/ping", live, "200 while the engine lives", Access.KEY),
    Route(
        path="/flush_cache",
        methods=("GET", "POST"),
        handler=flush_cache,
        access=Access.ADMIN,
        dialect=Dialect.NATIVE,
        summary="Forget all cached prefixes, once nothing runs",
    ),
    Route(
        path="/abort_request",
        methods=("POST",),
        handler=abort_request,
        access=Access.ADMIN,
        dialect=Dialect.NATIVE,
        summary="End requests early",
        body=AbortBody,
    ),
)
