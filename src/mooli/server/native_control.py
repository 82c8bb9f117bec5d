"""Native routes that ask about the server's state or change it: health, cache, aborts.

Owns their answers in SGLang's words, and what health means: questions, each answered with None or with what is wrong in
words. A busy engine is not a dead one: it says nothing while it computes a long step, so that only a silence of
`watchdog_timeout` counts. An engine that has ended counts at once. Never ends or restarts anything: that is the
server's life, `mooli.server.launch`.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
import uuid
from collections.abc import Iterable

import msgspec

from mooli.errors import BusyError, MooliError
from mooli.frontend.inputs import GenerateCall
from mooli.server.routing import Access, Dialect, Handler, HttpError, Incoming, Reply, Route
from mooli.server.service import Service

# -- health ------------------------------------------------------------------------------------------------------------

GENERATE_LIMIT_S = 20.0
"""How long `generation_problem` waits for a sign of the engine."""

KEEP_S = 1.0
"""How long its answer is good for others: so often, at most, probes make the engine generate."""

_LOOK_INTERVAL_S = 0.05

PROBE_RID_PREFIX = "HEALTH_CHECK"


def engine_problem(service: Service) -> str | None:
    """Whether the engine process is gone or hung. Someone who restarts servers wants to know this and nothing more."""
    client = service.client
    if not client.is_alive:
        return str(client.error or "the engine process has ended")
    silence_s = time.monotonic() - client.last_sign_s
    if silence_s > service.config.watchdog_timeout:
        return f"the engine has given no sign for {silence_s:.0f} s"
    return None


def server_problem(service: Service) -> str | None:
    """`engine_problem`, or that the server is about to end."""
    return engine_problem(service) or ("the server is shutting down" if service.is_draining else None)


def readiness_problem(service: Service) -> str | None:
    """`server_problem`, or that a request would be refused for lack of room."""
    problem = server_problem(service)
    if problem is None and service.client.num_open >= service.max_open:
        return f"the request queue is full: {service.client.num_open} requests are open"
    return problem


async def generation_problem(service: Service) -> str | None:
    """`server_problem`, or that a request of one token brought no sign of the engine within GENERATE_LIMIT_S.

    Any sign counts, as other requests may be before it. All who ask within KEEP_S share one request, which is not
    counted in the metrics.
    """
    return (
        server_problem(service)
        or await service.shared("generation_problem", lambda: _generation_problem(service), keep_s=KEEP_S).result()
    )


async def _generation_problem(service: Service) -> str | None:
    client = service.client
    if client.num_open >= service.max_open:
        return None  # with a full queue only the signs of others can be judged
    sampling_params = {
        "max_new_tokens": 1, "min_new_tokens": 0, "temperature": 0.0, "n": 1, "stop": [], "ignore_eos": True,
    }  # fmt: skip
    inputs = await service.prepare(
        GenerateCall(input_ids=[0], sampling_params=sampling_params, rid=f"{PROBE_RID_PREFIX}_{uuid.uuid4().hex}")
    )
    before_s = client.last_sign_s
    deadline_s = time.monotonic() + GENERATE_LIMIT_S
    try:
        with service.start(inputs, is_counted=False) as call:
            waiting = asyncio.ensure_future(call.wait())
            try:
                while time.monotonic() < deadline_s:
                    await asyncio.wait({waiting}, timeout=_LOOK_INTERVAL_S)
                    if waiting.done():
                        await waiting
                        return None
                    if client.last_sign_s > before_s:
                        return None
            finally:
                waiting.cancel()
    except BusyError:
        return None  # the queue has become full meanwhile: the engine is as well as a moment ago
    except MooliError as exc:
        return str(exc)
    return f"the engine has not answered a request within {GENERATE_LIMIT_S:g} s"


# -- routes ------------------------------------------------------------------------------------------------------------

ABORTED = "The request was aborted by /abort_request."

MAX_FLUSH_WAIT_S = 600.0

_FLUSH_INTERVAL_S = 0.05


class AbortBody(msgspec.Struct, kw_only=True):
    """rid: of one request, or a list of them. A request whose id was made from `rid` ends with it: that of a batch is
    rid_0, rid_1, …, those of n samples have a further number. abort_all: every request."""

    rid: str | list[str] | None = None
    abort_all: bool = False


async def health_now(service: Service, request: Incoming) -> Reply:
    return _probe_reply(server_problem(service))


async def health_generate(service: Service, request: Incoming) -> Reply:
    return _probe_reply(await generation_problem(service))


async def live(service: Service, request: Incoming) -> Reply:
    return _probe_reply(engine_problem(service))


async def ready(service: Service, request: Incoming) -> Reply:
    return _probe_reply(readiness_problem(service))


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
