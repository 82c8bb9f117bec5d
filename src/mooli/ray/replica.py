"""One replica: a whole server without a socket, inside an actor of Ray Serve.

Owns the engine's process and the application of all routes in front of it, as `mooli.server.launch` does for a server
that listens: start, watch, end. Requests come as `Forwarded`, and are answered in pieces. The engine is a child
process, so that neither Ray's threads nor text hold up a step. When it dies, open requests get the cause and the actor
ends, which Serve replaces at once. Never knows of other replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

from ray import serve

from mooli.config import EngineConfig
from mooli.engine.child import EngineChild
from mooli.errors import EngineDeadError
from mooli.logs import set_up_logging
from mooli.ray.forwarding import EngineGoneError, Forwarded, Piece, Whole
from mooli.server.app import build_app
from mooli.server.bring_up import make_log_tail, start_service, watch
from mooli.server.config import ServerConfig
from mooli.server.errors import Problem, error_reply
from mooli.server.http_server import DEATH_LINGER_S
from mooli.server.keys import KeyRing
from mooli.server.launch import with_environment
from mooli.server.native_control import engine_problem
from mooli.server.native_info import current_load
from mooli.server.routing import Dialect

logger = logging.getLogger(__name__)

NO_MORE_PIECES = 1
"""Exit status of an actor whose engine has died."""


class EngineReplica:
    """The deployment's class. Its constructor raises what starting a server raises, and Serve says so."""

    async def __init__(self, server: ServerConfig, engine: EngineConfig) -> None:  # type: ignore[misc]  # Serve's
        started_s = time.perf_counter()
        set_up_logging(engine.log_level)
        self.name: str = serve.get_replica_context().replica_id.unique_id
        self._lifetime = contextlib.ExitStack()
        with EngineChild() as child:
            server = with_environment(server)
            keys, log_tail = KeyRing(server), make_log_tail(server)
            self._lifetime.enter_context(log_tail.attached())
            self._service, self._engine = await start_service(server, engine, (), started_s, child, keys, log_tail)
        self._app = build_app(self._service)
        self._watching = asyncio.ensure_future(watch(self._service, self._engine))
        self._ending = asyncio.ensure_future(self._end_with_engine())

    # -- requests --
    async def answer(self, request: Forwarded) -> AsyncIterator[Piece]:
        """The answer, as it comes. Leaving the iterator early is a client that leaves.

        Raises EngineGoneError instead of an answer of the server that it has no engine.
        """
        if request.wanted not in ("", self.name):
            problem = Problem(404, f"There is no replica {request.wanted[:40]!r}: /v1/loads has their names.")
            start, body = error_reply(Dialect.NATIVE, problem)
            yield Piece(start["status"], tuple(start["headers"]), body["body"], is_last=True)
            return
        asking = _Asking(request.body)
        scope = {**request.scope, "state": {}, "extensions": {}}
        running = asyncio.ensure_future(self._app(scope, asking.receive, asking.send))
        running.add_done_callback(lambda _: asking.wake())
        try:
            while True:
                piece = await asking.next_piece(running)
                if piece.status >= 500 and not self._engine.is_alive:
                    raise EngineGoneError(self.name, str(self._engine.error or "the engine process has ended"))
                yield piece
                if piece.is_last:
                    return
        finally:
            asking.leave()
            if not asking.is_complete:
                running.cancel()
            await asyncio.wait([running])
            if not running.cancelled() and running.exception() is not None:
                logger.error("%s failed", request.scope.get("path"), exc_info=running.exception())

    async def whole(self, request: Forwarded) -> Whole:
        """The whole answer, for questions to all replicas. Raises like `answer`."""
        pieces = [piece async for piece in self.answer(request)]
        first = pieces[0]
        return Whole(self.name, first.status, first.headers, b"".join(piece.body for piece in pieces))

    # -- what Serve asks --
    async def check_health(self) -> None:
        """Raises EngineDeadError: the engine is gone, or silent for `watchdog_timeout`."""
        problem = engine_problem(self._service)
        if problem is not None:
            raise EngineDeadError(problem)

    async def record_routing_stats(self) -> dict[str, int]:
        """For the router, of what `/v1/loads` shows."""
        load = await current_load(self._service)
        return {
            "running": load["num_running_reqs"],
            "waiting": load["num_waiting_reqs"],
            "free_tokens": load["max_total_num_tokens"] - load["num_used_tokens"],
        }

    async def __del__(self) -> None:
        """Called by Serve once nothing is being answered, or the time for it is up."""
        if not hasattr(self, "_ending"):
            return
        for task in (self._watching, self._ending):
            task.cancel()
        await self._engine.close()
        self._lifetime.close()

    async def _end_with_engine(self) -> None:
        cause = await self._engine.died
        logger.critical("this replica ends: %s", cause)
        await asyncio.sleep(DEATH_LINGER_S)
        os._exit(NO_MORE_PIECES)


class _Asking:
    """One request as the application sees it, and what it has said so far."""

    def __init__(self, body: bytes) -> None:
        self.is_complete = False
        self._body: bytes | None = body
        self._left = asyncio.Event()
        self._news = asyncio.Event()
        self._status = 0
        self._headers: tuple[tuple[bytes, bytes], ...] = ()
        self._said: list[bytes] = []

    async def receive(self) -> MutableMapping[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], tuple(message.get("headers", ()))
            return  # what follows at once goes with it
        self._said.append(message.get("body", b""))
        self.is_complete = not message.get("more_body", False)
        self._news.set()

    def wake(self) -> None:
        self._news.set()

    def leave(self) -> None:
        self._left.set()

    async def next_piece(self, running: asyncio.Future[None]) -> Piece:
        """Everything that was said since the last one. Raises what ended an application that has said too little."""
        await self._news.wait()
        self._news.clear()
        if not self._said and not self.is_complete:
            with contextlib.suppress(asyncio.CancelledError):
                await running
            raise RuntimeError("the application has ended without an answer")
        piece = Piece(self._status, self._headers, b"".join(self._said), self.is_complete)
        self._status, self._headers, self._said = 0, (), []
        return piece
