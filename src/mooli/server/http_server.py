"""The HTTP server itself: it listens, answers, and ends when all that was there is answered, or the engine has died.

Owns what a server listens for (`Served`), the draining of its connections, and what systemd is told. Routes and
protection are in `mooli.server.app`, connections in `mooli.server.protocol`. Never starts an engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import uvicorn
from uvicorn.server import ServerState

from mooli.errors import EngineError
from mooli.server.config import ServerConfig
from mooli.server.listener import Acceptor, bound_socket
from mooli.server.protection import SHUTTING_DOWN
from mooli.server.protocol import LimitedProtocol, make_protocol
from mooli.server.routing import App
from mooli.server.traffic import TrafficLog

logger = logging.getLogger(__name__)

DEATH_LINGER_S = 1.0
"""How long a server whose engine has died still answers, so that probes see 503 and open streams get the cause."""

CLOSE_WAIT_S = 2
"""For connections that are being answered when everything else is done."""


class Served(Protocol):
    """What a server listens for: one engine with all routes, or several that come and go.

    traffic: hears of what never becomes a request. died: done, with the cause, when nothing can be served any more.
    """

    config: ServerConfig
    app: App
    traffic: TrafficLog
    died: asyncio.Future[Any]

    @property
    def num_active(self) -> int:
        """Calls that are not closed yet."""
        ...

    def begin(self) -> None:
        """Requests are taken from now on: so is work that needs none."""
        ...

    def drain(self) -> None:
        """No new generation begins from now on."""
        ...

    async def stop(self) -> None:
        """Leave off what needs no request."""
        ...

    def abort_all(self, message: str) -> None: ...

    async def watch(self) -> None:
        """Until it is cancelled: see that engines live."""
        ...

    async def close(self) -> None:
        """End the engines' processes, and give back all else."""
        ...


class HttpServer:
    """Listens, and answers until `drain` is called or the engine dies. `port` is the real one."""

    def __init__(
        self, served: Served, listener: socket.socket | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self._served = served
        self._listener = listener or bound_socket(served.config)
        self.port: int = self._listener.getsockname()[1]
        self._uvicorn = _Uvicorn(_uvicorn_config(served), tls)
        self._drain_asked = asyncio.Event()
        self._hurry = asyncio.Event()

    def drain(self) -> None:
        """Take no new work, finish what is running for `shutdown_timeout`, then end. The second time: end at once."""
        if self._drain_asked.is_set():
            self._hurry.set()
        self._served.drain()
        self._drain_asked.set()

    async def run(self, *, on_started: Callable[[], object] = lambda: None) -> int:
        """Serve; returns the exit status. The engine process has ended when this returns."""
        with self._listener:
            serving = asyncio.ensure_future(self._uvicorn.serve([self._listener]))
            try:
                while not self._uvicorn.started and not serving.done():
                    await asyncio.sleep(0.005)
                if serving.done():
                    await serving
                    raise EngineError("the HTTP server has ended before it was ready")
                self._served.begin()
                on_started()
                return await self._serve(serving)
            finally:
                self._uvicorn.should_exit = True
                await asyncio.wait([serving])
                await self._served.close()

    async def _serve(self, serving: asyncio.Future[None]) -> int:
        died = self._served.died
        draining = asyncio.ensure_future(self._drained())
        watching = asyncio.ensure_future(self._served.watch())
        try:
            ends: list[asyncio.Future[Any]] = [serving, draining, died]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not died.done():
                for ended in (serving, draining):
                    if ended.done():
                        await ended  # what has failed in it is the end's cause
                return 0
            await asyncio.sleep(DEATH_LINGER_S)
            return 1
        finally:
            for task in (draining, watching):
                task.cancel()

    async def _drained(self) -> None:
        """Once asked to: wait until every request that was there is answered to its last byte, then end the others."""
        await self._drain_asked.wait()
        sd_notify("STOPPING=1")
        served, state = self._served, self._uvicorn.server_state
        await served.stop()
        timeout_s = served.config.shutdown_timeout
        admitted = set(state.tasks)
        if admitted:
            logger.info("shutting down: requests that have %g s to finish: %d", timeout_s, len(admitted))
        else:
            logger.info("shutting down: no request is being answered")

        def is_finished() -> bool:
            return not (admitted & state.tasks or _has_unsent(state))

        await _wait_for(lambda: is_finished() or self._hurry.is_set(), timeout_s)
        if is_finished():
            return
        logger.warning("requests that are not finished and end here: %d", len(admitted & state.tasks))
        served.abort_all(SHUTTING_DOWN)
        await _wait_for(lambda: not served.num_active, CLOSE_WAIT_S)
        for connection in _connections(state):
            connection.refuse_unanswered()
        await _wait_for(is_finished, CLOSE_WAIT_S)
        for connection in _connections(state):
            connection.transport.abort()


class _Uvicorn(uvicorn.Server):
    """Without signal handlers: when to end is decided here. Connections come from an `Acceptor`."""

    def __init__(self, config: uvicorn.Config, tls: ssl.SSLContext | None) -> None:
        super().__init__(config)
        self._tls = tls

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        config, state = self.config, self.server_state

        def make_connection() -> asyncio.Protocol:
            return config.http_protocol_class(config=config, server_state=state, app_state={})  # type: ignore[call-arg]

        def make_room() -> None:
            for connection in _connections(state):
                connection.close_if_idle()

        acceptors = [Acceptor(listener, make_connection, self._tls, make_room) for listener in sockets or []]
        for acceptor in acceptors:
            acceptor.start()
        self.servers = acceptors  # type: ignore[assignment]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _uvicorn_config(served: Served) -> uvicorn.Config:
    config = served.config
    return uvicorn.Config(
        served.app,
        http=make_protocol(config, served.traffic),
        loop="asyncio",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,  # the lines of requests are `mooli.server.traffic`'s
        server_header=False,
        root_path=config.fastapi_root_path,
        timeout_keep_alive=int(config.keep_alive_timeout),
        timeout_graceful_shutdown=CLOSE_WAIT_S,
    )


def _connections(state: ServerState) -> list[LimitedProtocol]:
    return [connection for connection in state.connections if isinstance(connection, LimitedProtocol)]


def _has_unsent(state: ServerState) -> bool:
    return any(connection.has_unsent for connection in _connections(state))


async def _wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    """Until it is true, or for `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(0.02)


def sd_notify(state: str) -> bool:
    """Tell systemd `state`, such as "READY=1". Whether it was sent: nothing is without NOTIFY_SOCKET, which it sets for
    units of `Type=notify`; a service manager that does not listen is no error. Source: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # Linux' abstract names begin with a zero byte
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
            link.connect(address)
            link.setblocking(False)
            link.send(state.encode())
    except OSError as exc:
        logger.debug("systemd was not told %s: %s", state, exc)
        return False
    return True
