"""Routes of a test's own behind the real HTTP layer: real sockets, uvicorn, protection; no engine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from mooli.server.app import build_app
from mooli.server.config import ServerConfig
from mooli.server.keys import KeyRing
from mooli.server.protocol import make_protocol
from mooli.server.routing import Access, Dialect, Route
from mooli.server.traffic import TrafficLog


class Counts:
    """What the metrics were told."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.responses: list[tuple[str, str, int]] = []

    def http_request(self, endpoint: str, method: str) -> None:
        self.requests.append((endpoint, method))

    def http_response(self, endpoint: str, method: str, status: int) -> None:
        self.responses.append((endpoint, method, status))


def post(path: str, handler: Callable[..., Awaitable[Any]], body: Any = None, **fields: Any) -> Route:
    """A route with the defaults most tests want."""
    values = {"methods": ("POST",), "access": Access.KEY, "dialect": Dialect.NATIVE, "summary": path, **fields}
    return Route(path=path, handler=handler, body=body, **values)


def message_of(answer: httpx.Response) -> str:
    """The words of an error, in any dialect."""
    error = answer.json()["error"]
    message: str = error if isinstance(error, str) else error["message"]
    return message


class RouteServer:
    """Serves `routes`. http: a client of it. counts: see `Counts`."""

    def __init__(self, routes: list[Route], **arguments: Any) -> None:
        self.config = ServerConfig.from_kwargs(**{"port": 0, "allowed_hosts": "*", **arguments})
        self.counts = Counts()
        self.service = SimpleNamespace(
            config=self.config, metrics=self.counts, is_draining=False, keys=KeyRing(self.config)
        )
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._uvicorn = uvicorn.Config(
            build_app(self.service, routes), ws="none", lifespan="off", loop="asyncio", log_config=None,
            interface="asgi3", timeout_keep_alive=int(self.config.keep_alive_timeout),
            root_path=self.config.fastapi_root_path,
        )  # fmt: skip
        self._state = ServerState()
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120, verify=False)

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())

    async def _serve(self) -> None:
        self._uvicorn.load()
        protocol = make_protocol(self.config, TrafficLog(self.service.metrics, self.config))
        listening = await self._loop.create_server(
            lambda: protocol(config=self._uvicorn, server_state=self._state, app_state={}), sock=self._listener
        )
        await self._stopping.wait()
        listening.close()
        for connection in list(self._state.connections):
            connection.transport.abort()
        while self._state.tasks:  # all clients have left
            await asyncio.sleep(0.005)

    def stop(self) -> None:
        self.http.close()
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(120)
        assert not self._thread.is_alive(), "a request has not ended with its connection"

    @property
    def num_tasks(self) -> int:
        """Requests that are being answered."""
        return len(self._state.tasks)

    @property
    def num_connections(self) -> int:
        return len(self._state.connections)

    def connect(self) -> Connection:
        return Connection(self.port)


class Connection:
    """A client's bare socket."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=120)

    def send(self, data: bytes) -> Connection:
        self.socket.sendall(data)
        return self

    def read_to_end(self) -> bytes:
        """Everything until the server closes."""
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := self.socket.recv(65536):
                received += piece
        return received

    def read_until(self, mark: bytes) -> bytes:
        received = b""
        while mark not in received:
            piece = self.socket.recv(65536)
            assert piece, f"the server has closed after {received!r}"
            received += piece
        return received

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., RouteServer]]:
    """Starts servers: serve(route, …, **server_arguments)."""
    servers: list[RouteServer] = []

    def start(*routes: Route, **arguments: Any) -> RouteServer:
        servers.append(RouteServer(list(routes), **arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def json_request(path: str, body: bytes = b"{}", *headers: str) -> bytes:
    """A whole POST as it goes over the wire."""
    head = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*head, *headers, "", ""]).encode() + body
