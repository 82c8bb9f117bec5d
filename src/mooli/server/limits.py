"""How much is taken at once, and nothing new while the server drains.

Owns the refusals that do not depend on what a request says, only on what else there is. Limits of a single request are
in `mooli.server.http`, those of what it asks for in the frontend's input rules.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

from mooli.server.asgi import CLIENT, Receive, Scope, Send
from mooli.server.errors import Problem, error_reply
from mooli.server.keys import Key
from mooli.server.route_table import RouteTable
from mooli.server.routing import Access, Dialect, HttpError, Route

if TYPE_CHECKING:
    from mooli.server.service import Service

BUSY_RETRY_S = 1
DRAINING_RETRY_S = 5
"""About the time until another server, or this one started anew, answers."""

SHUTTING_DOWN = "The server is shutting down."

MAX_PROBES = 256
"""Requests to one open route at a time: more is no probing."""


ALL_OTHERS = ""
"""Stands for the path of routes that are counted together."""


class BodyRoom:
    """Memory for bodies that are being read: many long ones at a time could take all there is."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0

    def share(self) -> BodyShare:
        """For one body; a context manager, which gives back what was taken."""
        return BodyShare(self)


class BodyShare:
    """What one body has of a `BodyRoom`."""

    def __init__(self, room: BodyRoom) -> None:
        self._room = room
        self._num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Raises HttpError (503) if there is not that much."""
        if self._room.num_bytes + num_bytes > self._room.max_bytes:
            raise HttpError(503, "The server is reading too many long requests.", retry_after_s=BUSY_RETRY_S)
        self._room.num_bytes += num_bytes
        self._num_bytes += num_bytes

    def __enter__(self) -> BodyShare:
        return self

    def __exit__(self, *_: object) -> None:
        self._room.num_bytes -= self._num_bytes
        self._num_bytes = 0


class Admission:
    """ASGI middleware: refuses what would be more than `max_concurrent_requests` of the server or of a key at a time
    (429), and new generations while the server drains (503). Probes, open to anybody, are counted apart, each kind for
    itself: a busy server is not a dead one, whatever strangers ask of it."""

    def __init__(self, table: RouteTable, service: Service) -> None:
        self._table = table
        self._service = service
        self._num_running: collections.Counter[str] = collections.Counter()
        """By the path of an open route, of all others together under ALL_OTHERS."""
        self._num_of: collections.Counter[str] = collections.Counter()
        """By the name of the key, probes left out."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._table.route_of(scope)
        kind = route.path if route is not None and route.access is Access.OPEN else ALL_OTHERS
        key = scope[CLIENT].key if kind == ALL_OTHERS else None
        problem = self._problem(route, kind) or self._key_problem(key)
        if problem is not None:
            for reply in error_reply(Dialect.OPENAI if route is None else route.dialect, problem):
                await send(reply)
            return
        name = "" if key is None else key.name
        self._num_running[kind] += 1
        self._num_of[name] += 1
        try:
            await self._table(scope, receive, send)
        finally:
            self._num_running[kind] -= 1
            self._num_of[name] -= 1

    def _problem(self, route: Route | None, kind: str) -> Problem | None:
        if route is not None and route.is_generation and self._service.is_draining:
            headers = {"Retry-After": str(DRAINING_RETRY_S), "Connection": "close"}
            return Problem(503, SHUTTING_DOWN, code="shutting_down", headers=headers)
        most = self._service.config.max_concurrent_requests if kind == ALL_OTHERS else MAX_PROBES
        if self._num_running[kind] < most:
            return None
        headers = {"Retry-After": str(BUSY_RETRY_S)}
        return Problem(429, f"The server is answering {most} requests already.", code="busy", headers=headers)

    def _key_problem(self, key: Key | None) -> Problem | None:
        if key is None or key.max_concurrent_requests is None:
            return None
        if self._num_of[key.name] < key.max_concurrent_requests:
            return None
        return Problem(
            429,
            f"This key may have {key.max_concurrent_requests} requests in progress at a time, and has them: try again"
            " when one of them has ended.",
            code="key_busy",
            headers={"Retry-After": str(BUSY_RETRY_S)},
        )
