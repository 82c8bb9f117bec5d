"""What is kept of every HTTP request: its id, one count of it and of its answer, one line in the log.

Owns the outermost layer of the application, which sees each answer whatever refused or gave it. The connection tells of
what never becomes a request. Never decides what is answered, but for the failure of a layer itself.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mooli.logs import log_object
from mooli.server.errors import error_reply, problem_of
from mooli.server.http import RouteTable
from mooli.server.logs import HEADER, REQUEST_ID, request_id_of
from mooli.server.metrics import UNMATCHED
from mooli.server.routing import App, Dialect, Receive, Scope, Send

if TYPE_CHECKING:
    from mooli.server.config import ServerConfig
    from mooli.server.service import Service

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""Status of a request whose client did not wait for the answer (nginx's number)."""

SHOWN_PATH_CHARS = 256
"""In the log, of a path that no route has."""

REFUSAL_KEY = "refusal"
"""In the `state` of a scope: the status that the connection has sent in place of the application's answer."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its answer, as they are logged. endpoint: the path of the route as the route writes it. path: as
    the client wrote it, where there is no route."""

    client: str
    method: str
    endpoint: str
    path: str
    status: int
    duration_s: float
    request_id: str


class HttpCounts(Protocol):
    """What counts requests (`mooli.server.metrics.Metrics`)."""

    def http_request(self, endpoint: str, method: str) -> None: ...

    def http_response(self, endpoint: str, method: str, status: int) -> None: ...


class TrafficLog:
    """Counts, and writes a line for each request: as words, or as JSON with `log_requests_format`."""

    def __init__(self, counts: HttpCounts, config: ServerConfig) -> None:
        self._counts = counts
        self._is_json = config.log_requests_format == "json"

    def began(self, endpoint: str, method: str) -> None:
        self._counts.http_request(endpoint, method)

    def ended(self, exchange: Exchange) -> None:
        self._counts.http_response(exchange.endpoint, exchange.method, exchange.status)
        if logger.isEnabledFor(logging.INFO):
            self._write(exchange)

    def refused(self, client: str, status: int, request_id: str) -> None:
        """Something that is no request has been answered."""
        self.began(UNMATCHED, "-")
        self.ended(Exchange(client, "-", UNMATCHED, "-", status, 0.0, request_id))

    def _write(self, exchange: Exchange) -> None:
        is_matched = exchange.endpoint != UNMATCHED
        route = exchange.endpoint if is_matched else exchange.path[:SHOWN_PATH_CHARS]
        if self._is_json:
            log_object(
                logger,
                {
                    "event": "answered",
                    "client": exchange.client,
                    "method": exchange.method,
                    "route": exchange.endpoint if is_matched else None,
                    "path": None if is_matched else route,
                    "status": exchange.status,
                    "duration_s": round(exchange.duration_s, 6),
                    "request_id": exchange.request_id,
                },
            )
            return
        logger.info(
            "%s %s %s %d %.3f s request_id=%s",
            exchange.client,
            exchange.method,
            route if is_matched else json.dumps(route),  # quoted: nobody can forge a line with a path
            exchange.status,
            exchange.duration_s,
            exchange.request_id,
        )


class Traffic:
    """ASGI middleware: gives each request its id, and tells a `TrafficLog` of it and of its answer, once."""

    def __init__(self, app: App, table: RouteTable, service: Service) -> None:
        self._app = app
        self._table = table
        self._service = service
        self._log = TrafficLog(service.metrics, service.config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_s = time.perf_counter()
        route = self._table.route_of(scope)
        endpoint, method = UNMATCHED if route is None else route.path, scope["method"]
        request_id = request_id_of(scope)
        REQUEST_ID.set(request_id)
        answer = _Answer(send, self._service, request_id)
        self._log.began(endpoint, method)
        try:
            await self._app(scope, receive, answer.send)
        except Exception as exc:
            if answer.status:
                raise
            logger.error("%s %s failed", method, endpoint, exc_info=exc)
            for message in error_reply(Dialect.OPENAI, problem_of(exc, Dialect.OPENAI, {})):
                await answer.send(message)
        finally:
            status = answer.status or scope["state"].get(REFUSAL_KEY, CLIENT_LEFT)
            duration_s = time.perf_counter() - started_s
            client = address(scope.get("client"))
            self._log.ended(Exchange(client, method, endpoint, scope["path"], status, duration_s, request_id))


class _Answer:
    """Puts headers to an answer as it begins. status: 0 until it has."""

    def __init__(self, send: Send, service: Service, request_id: str) -> None:
        self.status = 0
        self._send = send
        self._service = service
        self._request_id = request_id

    def send(self, message: MutableMapping[str, Any]) -> Awaitable[None]:
        return self._start(message) if message["type"] == "http.response.start" else self._send(message)

    async def _start(self, message: MutableMapping[str, Any]) -> None:
        headers = [*message.get("headers", ()), (HEADER, self._request_id.encode())]
        if self._service.is_draining and all(name != b"connection" for name, _ in headers):
            headers.append((b"connection", b"close"))
        await self._send({**message, "headers": headers})
        # Only now: one that was cancelled while it waited for the socket has sent nothing.
        self.status = message["status"]


def address(client: tuple[str, int] | None) -> str:
    """host:port of who sent a request."""
    if client is None:
        return "-"
    host, port = client
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
