"""From a request to its route, and from its handler to the answer: ASGI applications of all routes and of one.

Owns the table of routes with the answers to requests that fit none, and what happens between a socket and a handler:
limits and deadlines of the body, the watch for a client that leaves, the deadline of the whole request, and errors at
any moment of it. Never knows what a route does, and never checks who asks.

A handler runs in a task of its own. When the client leaves or the time is up, that task is cancelled, and with it ends
whatever the handler had started. A client that reads slowly holds up that task alone.

Source: ASGI 3.0, HTTP connection scope.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import msgspec
from starlette.routing import compile_path

from mooli.errors import ConfigError
from mooli.server.errors import Problem, error_event, error_reply, is_for_client, problem_of, reply_messages
from mooli.server.json_body import BodyRoom, BodyShare, read_body
from mooli.server.routing import (
    CLIENT,
    App,
    Dialect,
    Download,
    EventStream,
    HttpError,
    Incoming,
    Receive,
    Reply,
    Route,
    Scope,
    Send,
)

if TYPE_CHECKING:
    from mooli.server.service import Service


class RouteTable:
    """ASGI application: hands a request to the application of its route, or answers 404 or 405.

    Paths are exact, but for `{name}` and `{name:path}` as Starlette reads them.
    Raises ConfigError where two routes claim the same path and method.
    """

    def __init__(self, entries: Iterable[tuple[Route, App]]) -> None:
        """entries: routes, each with its ASGI application."""
        self._entries = list(entries)
        self._exact: dict[str, dict[str, int]] = {}
        self._patterns: list[tuple[Any, Mapping[str, Any], dict[str, int]]] = []
        by_path: dict[str, dict[str, int]] = {}
        for index, (route, _) in enumerate(self._entries):
            methods = by_path.setdefault(route.path, {})
            for method in route.methods:
                if method in methods:
                    raise ConfigError(f"two routes claim {method} {route.path}")
                methods[method] = index
        for path, methods in by_path.items():
            if "GET" in methods:
                methods.setdefault("HEAD", methods["GET"])
            if "{" in path:
                regex, _, convertors = compile_path(path)
                self._patterns.append((regex, convertors, methods))
            else:
                self._exact[path] = methods

    def __iter__(self) -> Iterator[Route]:
        return (route for route, _ in self._entries)

    def route_of(self, scope: Scope) -> Route | None:
        """The route that will answer, None if there is none."""
        methods, _ = self._methods(scope)
        index = methods.get(scope["method"])
        return None if index is None else self._entries[index][0]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        methods, path_params = self._methods(scope)
        index = methods.get(scope["method"])
        if index is not None:
            scope["path_params"] = path_params
            await self._entries[index][1](scope, receive, send)
            return
        if methods:
            allowed = ", ".join(sorted(methods))
            problem = Problem(
                405, f"{_path(scope)} takes {allowed}, not {scope['method']}.", headers={"Allow": allowed}
            )
        else:
            problem = Problem(404, f"There is no {_path(scope)} here.", code="unknown_url")
        for message in error_reply(Dialect.OPENAI, problem):
            await send(message)

    def _methods(self, scope: Scope) -> tuple[Mapping[str, int], dict[str, Any]]:
        """What the path of a request takes, by method, and the values in the path."""
        path = _path(scope)
        exact = self._exact.get(path)
        if exact is not None:
            return exact, {}
        for regex, convertors, methods in self._patterns:
            match = regex.match(path)
            if match:
                return methods, {name: convertors[name].convert(value) for name, value in match.groupdict().items()}
        return {}, {}


async def asked(app: App, path: str, body: Any, **scope: Any) -> tuple[int, bytes]:
    """What an application answers to a POST of `body`, as JSON, without a socket: the status, and the body whole.

    scope: of the ASGI scope, what is to be other than that of a plain request.
    """
    requests = [{"type": "http.request", "body": msgspec.json.encode(body), "more_body": False}]
    status, received = 0, bytearray()

    async def receive() -> dict[str, Any]:
        if not requests:
            await asyncio.Event().wait()  # nobody leaves
        return requests.pop()

    async def take(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            received.extend(message.get("body", b""))

    plain = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "method": "POST",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": None, "server": None,
        "headers": [(b"content-type", b"application/json")], "state": {},
    }  # fmt: skip
    await app(plain | scope, receive, take)
    return status, bytes(received)


def _path(scope: Scope) -> str:
    """Without the root path, which the server puts in front of it (ASGI 3.0)."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root) else path


logger = logging.getLogger(__name__)

MIN_BODY_BYTES_PER_S = 64 * 1024
"""A body may take `read_timeout` and a second more for each of these."""

EVENT_STREAM_HEADERS = [
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class _ClientLeft(Exception):
    """The connection has ended before the answer."""


class Endpoint:
    """The ASGI application of one route. room: for the bodies of all routes together."""

    def __init__(self, service: Service, route: Route, room: BodyRoom) -> None:
        self._service = service
        self._route = route
        self._room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _Exchange(self._service, self._route, self._room, scope, receive, send).run()


class _Exchange:
    """One request and its answer."""

    def __init__(
        self, service: Service, route: Route, room: BodyRoom, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._service = service
        self._route = route
        self._room = room
        self._scope = scope
        self._receive = receive
        self._send = send
        self._has_begun = False
        self._is_complete = False
        self._is_file = False
        self._has_come = asyncio.Event()
        """All of the body is there."""

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        # Who is in the background has to wait for others.
        timeout_s = None if self._scope[CLIENT].is_background else self._service.config.request_timeout
        deadline = None if timeout_s is None else loop.time() + timeout_s
        try:
            incoming = await self._incoming()
        except _ClientLeft:
            return
        except Exception as exc:
            await self._send_error(exc)
            return
        answering = asyncio.ensure_future(self._answer(incoming))
        del incoming
        watching = asyncio.ensure_future(self._left())
        try:
            await asyncio.wait(
                [answering, watching],
                timeout=None if deadline is None else max(0.0, deadline - loop.time()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not answering.done() and not watching.done() and not self._is_complete:
                await _end(answering)
                await self._send_error(HttpError(504, f"The request has taken longer than {timeout_s:g} s."))
        finally:
            await _end(watching)
            # A connection also counts as left once its answer is complete: then there is nothing to cut short.
            await (answering if self._is_complete else _end(answering))

    # -- the request --
    async def _incoming(self) -> Incoming:
        """Raises HttpError, or _ClientLeft."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self._scope["headers"]}
        body: msgspec.Struct | None = None
        unsupported: Mapping[str, Any] = {}
        if self._route.body is not None:
            with self._room.share() as share:
                raw = await self._read_body(headers, share)
                if raw or self._route.needs_body:
                    _check_is_json(raw, headers, self._route.dialect)
                    most = self._service.config.max_body_values
                    body, unsupported = await read_body(raw, self._route.body, self._route.unsupported, most)
                else:
                    body = self._route.body()
        stream = self._pieces() if self._route.reads_stream is not None else None
        if stream is None:
            self._has_come.set()
        client = self._scope[CLIENT]
        if "no-store" in headers.get("cache-control", "").lower():
            client = replace(client, no_store=True)
        query = parse_qsl(self._scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        return Incoming(
            body=body,
            unsupported=unsupported,
            query=dict(query),
            path_params=self._scope.get("path_params", {}),
            headers=headers,
            client=client,
            stream=stream,
        )

    async def _read_body(self, headers: Mapping[str, str], share: BodyShare) -> bytes:
        config = self._service.config
        declared = headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared) > config.max_body_bytes:
            raise self._too_large()
        received = bytearray()
        async for piece in self._pieces():
            share.take(len(piece))
            received += piece
            if len(received) > config.max_body_bytes:
                raise self._too_large()
        return bytes(received)

    async def _pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes, as long as it comes quickly enough. Raises HttpError (408), or _ClientLeft."""
        loop = asyncio.get_running_loop()
        started_s, num_bytes = loop.time(), 0
        while True:
            limit_s = self._service.config.read_timeout + num_bytes / MIN_BODY_BYTES_PER_S
            try:
                message = await asyncio.wait_for(self._receive(), max(0.0, started_s + limit_s - loop.time()))
            except asyncio.TimeoutError:
                raise HttpError(408, f"The body did not arrive within {limit_s:.0f} s.") from None
            if message["type"] != "http.request":
                raise _ClientLeft
            is_last = not message.get("more_body", False)
            if is_last:
                self._has_come.set()
            piece = message.get("body", b"")
            num_bytes += len(piece)
            yield piece
            if is_last:
                return

    def _too_large(self) -> HttpError:
        return HttpError(413, f"The body is larger than the {self._service.config.max_body_bytes} bytes allowed here.")

    async def _left(self) -> None:
        """Returns when the client has left; who reads its body hears of that first."""
        await self._has_come.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # -- the answer --
    async def _answer(self, incoming: Incoming) -> None:
        try:
            handling = self._route.handler(self._service, incoming)
            del incoming  # the handler alone says how long the body is kept
            reply = await handling
            if isinstance(reply, Reply):
                await self._send_reply(reply)
            elif isinstance(reply, Download):
                await self._send_download(reply)
            else:
                await self._send_events(reply)
        except _ClientLeft:
            pass
        except Exception as exc:
            await self._send_error(exc)

    async def _send_reply(self, reply: Reply) -> None:
        body = reply.content if isinstance(reply.content, bytes) else msgspec.json.encode(reply.content)
        await self._send_messages(reply_messages(reply.status, body, reply.media_type, reply.headers))

    async def _send_download(self, download: Download) -> None:
        headers = {
            "Content-Type": download.media_type, "Content-Length": str(download.num_bytes), **download.headers
        }  # fmt: skip
        pairs = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        try:
            self._is_file = True
            await self._start({"type": "http.response.start", "status": int(HTTPStatus.OK), "headers": pairs})
            async for piece in download.pieces:
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        finally:
            await _close(download.pieces)
        await self._finish(b"")

    async def _send_events(self, stream: EventStream) -> None:
        pieces = stream.pieces
        try:
            piece = await anext(pieces, b"")
            headers = [(b"content-type", stream.media_type.encode("latin-1")), *EVENT_STREAM_HEADERS]
            await self._start({"type": "http.response.start", "status": int(HTTPStatus.OK), "headers": headers})
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
            async for piece in pieces:
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        finally:
            await _close(pieces)
        await self._finish(b"")

    async def _send_error(self, error: Exception) -> None:
        """As an answer, or where one has begun as a stream's last event."""
        if self._is_complete or not is_for_client(error):
            logger.error("%s %s failed", self._scope["method"], self._route.path, exc_info=error)
        if self._is_complete or (self._is_file and self._has_begun):
            return  # who does not complete an answer has its connection cut
        problem = problem_of(error, self._route.dialect, self._route.names)
        if self._has_begun:
            await self._finish(error_event(self._route.dialect, problem))
        else:
            await self._send_messages(error_reply(self._route.dialect, problem))

    async def _send_messages(self, messages: tuple[dict[str, Any], dict[str, Any]]) -> None:
        start, body = messages
        await self._start(start)
        await self._finish(body["body"])

    async def _start(self, message: dict[str, Any]) -> None:
        await self._send(message)
        # Only now: one that was cancelled while it waited for the socket has sent nothing.
        self._has_begun = True

    async def _finish(self, last: bytes) -> None:
        self._is_complete = True
        await self._send({"type": "http.response.body", "body": last, "more_body": False})


async def _close(pieces: AsyncIterator[bytes]) -> None:
    close = getattr(pieces, "aclose", None)
    if close is not None:
        await close()


async def _end(task: asyncio.Future[None]) -> None:
    """Cancel, and wait until it has ended."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _check_is_json(raw: bytes, headers: Mapping[str, str], dialect: Dialect) -> None:
    """Raises HttpError.

    The content type must be JSON's: a web page may send forms and plain text anywhere, but JSON only where CORS allows.
    Of Ollama's clients many name another or none (`curl -d`, LiteLLM); pages of other sites are known by their Origin.
    """
    if not raw:
        raise HttpError(400, "This request needs a JSON object as its body.")
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = media_type == "application/json" or media_type.endswith("+json")
    if not is_json and dialect is not Dialect.OLLAMA:
        raise HttpError(
            400,
            f"The content type is {media_type or 'missing'}, but only JSON is read here: send the header"
            " 'Content-Type: application/json'.",
        )
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise HttpError(415, f"A body with the content encoding {encoding!r} is not read here: send it as it is.")
