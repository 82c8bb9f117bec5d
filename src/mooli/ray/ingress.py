"""The front of an application: reads a request's body, has a replica chosen by it, and passes the answer on.

Serve's proxy chooses a replica before it has read a body, and does not send a request again. So this stands behind it,
and in front of the engines. Owns three things.

- **Which model, which heads.** See `mooli.ray.heads`; `x-session-id` counts alone where it is sent.
- **Once more.** A request whose replica dies before it has answered anything is sent to another, however often. One
  whose answer has begun ends with the cause, in the words of its API.
- **Questions to all.** What one replica knows of itself only is asked of all, and merged: `mooli.ray.merging`.

Who may call what is decided where the request arrives: each replica has the keys. A body is not read here for who has
none. Never tokenises, and never knows what an answer says.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from mooli.ray.forwarding import EngineGoneError, Forwarded, Piece, Whole, sendable
from mooli.ray.heads import heads_of
from mooli.ray.merging import MERGERS, Merger
from mooli.server.app import ROUTES
from mooli.server.config import ServerConfig
from mooli.server.early_body import ClientLeftError, EarlyBodies, model_of
from mooli.server.errors import INTERNAL, Problem, error_event, error_reply, problem_of
from mooli.server.http import RouteTable
from mooli.server.json_body import BodyShare
from mooli.server.keys import Key, KeyRing
from mooli.server.launch import with_environment
from mooli.server.logs import HEADER
from mooli.server.routing import Access, App, Dialect, HttpError, Receive, Route, Scope, Send

logger = logging.getLogger(__name__)

SESSION_HEADER = b"x-session-id"

REPLICA_HEADER = b"x-mooli-replica"
"""The name of the replica that shall answer: of those, some routes show what no other knows (/v1/cache/tree)."""

MOST_ATTEMPTS = 16
"""Times that one request is sent: one that kills its engines must not kill them all day."""

ALL_PATIENCE_S = 30.0
"""For replicas that are all asked something."""

NO_REPLICA = "No replica of this model can be reached: it is being removed, or its engines do not start."
CUT_OFF = "The replica that was answering has ended"


class Ingress:
    """The deployment's class, wrapped by `serve.ingress`. handles: of the models' engines, by name."""

    def __init__(self, server: ServerConfig, head_chars: int, handles: Mapping[str, DeploymentHandle]) -> None:
        self._gateway = Gateway(with_environment(server), head_chars, handles)

    def __serve_build_asgi_app__(self) -> App:
        return self._gateway


class Gateway:
    """The ASGI application of an ingress."""

    def __init__(self, config: ServerConfig, head_chars: int, handles: Mapping[str, DeploymentHandle]) -> None:
        self._config = config
        self._keys = KeyRing(config)
        self._head_chars = head_chars
        self._handles = dict(handles)
        self._bodies = EarlyBodies(config)
        self._table = RouteTable((route, self) for route in ROUTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            raise ValueError(f"connections of type {scope['type']} are not served")
        route = self._table.route_of(scope)
        dialect = Dialect.OPENAI if route is None else route.dialect
        try:
            with self._bodies.share() as share:
                await self._answer(scope, receive, send, route, share)
        except ClientLeftError:
            return
        except HttpError as exc:
            await _send_all(send, error_reply(dialect, problem_of(exc, dialect, {})))

    # -- one request --
    async def _answer(self, scope: Scope, receive: Receive, send: Send, route: Route | None, share: BodyShare) -> None:
        headers = dict(scope["headers"])
        key = self._keys.find(scope["headers"]) if self._keys.asks_admins else None
        body = b""
        if route is not None and route.body is not None and self._may_call(route, key):
            body = await self._bodies.read(scope, receive, share)
        request = Forwarded(sendable(scope), body)
        merger = None if route is None else MERGERS.get(route.path)
        if merger is not None and REPLICA_HEADER not in headers:
            await self._ask_all(merger, request, route, send)
            return
        handle = self._handle_for(scope, body)
        request = dataclasses.replace(request, wanted=headers.get(REPLICA_HEADER, b"").decode("latin-1"))
        if route is not None and route.is_generation:
            session = headers.get(SESSION_HEADER, b"").decode("latin-1")
            tenant = "" if key is None else key.tenant
            heads = heads_of(body, self._head_chars, tenant=tenant, session=session)
            request = dataclasses.replace(request, heads=heads)
        dialect = Dialect.OPENAI if route is None else route.dialect
        await _Forwarding(handle, request, dialect, receive, send, self._config.request_timeout).run()

    def _may_call(self, route: Route, key: Key | None) -> bool:
        """Whether the body is worth reading. Replicas decide; they refuse without it."""
        if route.access is Access.OPEN or not self._keys.asks_admins:
            return True
        if route.access is Access.ADMIN:
            return key is not None and key.is_admin
        return key is not None or not self._keys.asks_users

    def _handle_for(self, scope: Scope, body: bytes) -> DeploymentHandle:
        """Raises HttpError (404) for a model that is not here. With one model, its replicas see to names."""
        if len(self._handles) > 1:
            name = model_of(body) or _model_in_path(scope)
            if name:
                name = name.removesuffix(":latest")
                if name not in self._handles:
                    there = ", ".join(map(repr, self._handles))
                    raise HttpError(
                        404,
                        f"The model {name[:200]!r} does not exist; this server has {there}",
                        param="model",
                        code="model_not_found",
                    )
                return self._handles[name]
        return next(iter(self._handles.values()))

    # -- all replicas --
    async def _ask_all(self, merger: Merger, request: Forwarded, route: Route | None, send: Send) -> None:
        request, context = merger.prepare(request)
        asked = [
            handle.broadcast("whole", request).results_async(timeout_s=ALL_PATIENCE_S, return_exceptions=True)
            for handle in self._handles.values()
        ]
        answers: list[Whole] = []
        num_silent = 0
        for found in await asyncio.gather(*asked, return_exceptions=True):
            for item in [found] if isinstance(found, BaseException) else found:
                if isinstance(item, Whole):
                    answers.append(item)
                else:
                    num_silent += 1
                    logger.warning("%s has not been answered by a replica: %s", merger.path, item)
        if not answers:
            raise HttpError(503, NO_REPLICA, retry_after_s=1)
        if num_silent and merger.is_told:
            raise HttpError(503, f"{num_silent} replicas have not said that it is done", retry_after_s=1)
        merged = merger.merge(answers, context)
        start = {"type": "http.response.start", "status": merged.status, "headers": _headers(merged.headers)}
        await _send_all(send, (start, {"type": "http.response.body", "body": merged.body, "more_body": False}))


class _Forwarding:
    """One request on its way to replicas, until one has answered."""

    def __init__(
        self,
        handle: DeploymentHandle,
        request: Forwarded,
        dialect: Dialect,
        receive: Receive,
        send: Send,
        timeout_s: float | None,
    ) -> None:
        self._handle = handle.options(method_name="answer", stream=True)
        self._request = request
        self._dialect = dialect
        self._receive = receive
        self._send = send
        self._timeout_s = timeout_s
        self._has_begun = self._is_complete = False

    async def run(self) -> None:
        """Until the answer is complete, or the client has left."""
        answering = asyncio.ensure_future(self._answer())
        watching = asyncio.ensure_future(self._left())
        try:
            # The replica keeps to the deadline; this one is of requests that no replica takes.
            timeout_s = None if self._timeout_s is None else self._timeout_s + 1
            await asyncio.wait([answering, watching], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                await answering
            elif not watching.done():
                await _end(answering)
                await self._send_problem(Problem(504, f"The request has taken longer than {self._timeout_s:g} s."))
        finally:
            await _end(watching)
            await _end(answering)

    async def _left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _answer(self) -> None:
        avoid: tuple[str, ...] = ()
        failed: tuple[str, ...] = ()
        for _ in range(MOST_ATTEMPTS):
            request = dataclasses.replace(self._request, avoid=avoid, failed=failed)
            failed = ()
            try:
                async with contextlib.aclosing(self._pieces(request)) as pieces:
                    async for piece in pieces:
                        await self._pass_on(piece)
                return
            except EngineGoneError as exc:
                cause, failed = f"its engine has ended: {exc.cause}", (exc.replica,)
                avoid = (*avoid, exc.replica)
            except (RayActorError, ActorDiedError, ActorUnavailableError) as exc:
                cause = "its process has died or cannot be reached"
                logger.warning("a replica has ended while it had a request: %s", str(exc).partition("\n")[0])
            except (DeploymentUnavailableError, RayServeException) as exc:
                logger.warning("no replica takes a request: %s", exc)
                await self._send_problem(Problem(503, NO_REPLICA, headers={"Retry-After": "1"}))
                return
            except Exception:
                logger.exception("a replica has failed a request")
                await self._send_problem(Problem(500, INTERNAL))
                return
            if self._has_begun:
                await self._send_problem(Problem(503, f"{CUT_OFF}: {cause}. Send the request again."))
                return
            logger.warning("a request is sent to another replica, as %s", cause)
        await self._send_problem(
            Problem(503, f"{MOST_ATTEMPTS} replicas have ended while they had this request; the last: {cause}.")
        )

    async def _pieces(self, request: Forwarded) -> AsyncGenerator[Piece, None]:
        response = self._handle.remote(request)
        is_whole = False
        try:
            async for piece in response:
                is_whole = piece.is_last
                yield piece
        finally:
            if not is_whole:
                response.cancel()

    async def _pass_on(self, piece: Piece) -> None:
        if not self._has_begun:
            headers = _headers(piece.headers)
            await self._send({"type": "http.response.start", "status": piece.status, "headers": headers})
            self._has_begun = True
        self._is_complete = piece.is_last
        await self._send({"type": "http.response.body", "body": piece.body, "more_body": not piece.is_last})

    async def _send_problem(self, problem: Problem) -> None:
        """As an answer, or as the last event of a stream that has begun."""
        if self._is_complete:
            return
        self._is_complete = True
        if self._has_begun:
            last = error_event(self._dialect, problem)
            await self._send({"type": "http.response.body", "body": last, "more_body": False})
        else:
            self._has_begun = True
            await _send_all(self._send, error_reply(self._dialect, problem))


def _model_in_path(scope: Scope) -> str:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path.removeprefix("/v1/models/") if path.startswith("/v1/models/") else ""


def _headers(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Without the request's id, which Serve's proxy adds: it is the same one."""
    return [(name, value) for name, value in headers if name.lower() != HEADER]


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancel, and wait until it has ended."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _send_all(send: Send, messages: Sequence[dict[str, Any]]) -> None:
    for message in messages:
        await send(message)


async def _live(receive: Receive, send: Send) -> None:
    """Nothing is to be done at the start and at the end."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
