"""A whole server around the fake runner: real HTTP, real text side, real scheduler, in threads of the test's process.

The engine "process" is a thread at the other end of the same kind of socket. `core` and `runner` can be looked at while
no request is open.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fake_engine import byte_tokenizer, fake_build
from openapi_check import check_answer

from mooli.config import EngineConfig
from mooli.engine import messages, process
from mooli.link.client import EngineClient
from mooli.server.bring_up import make_service
from mooli.server.config import ServerConfig
from mooli.server.http_server import HttpServer
from mooli.server.launch import OneEngine
from mooli.server.listener import tls_context


class EngineThread:
    """Stands for a child process: the engine's end of the link, in a thread."""

    pid = 0

    def __init__(self, connection: socket.socket, build: Callable[..., Any]) -> None:
        self._connection = connection
        self._status = 0
        self._thread = threading.Thread(target=self._run, args=(build,), daemon=True)
        self._thread.start()

    def _run(self, build: Callable[..., Any]) -> None:
        with self._connection:
            self._status = process.run(self._connection, build)

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        return self._status

    def kill(self) -> None:
        """As `kill -9`: the link is cut in the middle of anything."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)


def fits_its_document(reply: httpx.Response) -> None:
    """Whatever a test asks for, the answer is one that the OpenAPI document tells of."""
    if reply.status_code == 200 and reply.headers.get("content-type") == "application/json":
        reply.read()
        check_answer(reply.request.method, reply.request.url.path, "application/json", reply.json())


class LiveServer:
    """url: of the running server. `http`: an httpx client for it, with the API key if there is one."""

    def __init__(
        self,
        next_token: Any = None,
        *,
        runner: dict[str, Any] | None = None,
        engine: dict[str, Any] | None = None,
        **server: Any,
    ) -> None:
        self.engine_config = EngineConfig.from_kwargs(**{"model_path": "fake", "random_seed": 7, **(engine or {})})
        self.config = ServerConfig.from_kwargs(**{"port": 0, "skip_server_warmup": True, **server})
        self._runner_options = {"next_token": next_token, **(runner or {})}
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(120), "the server has not started"
        if self._failure is not None:
            raise self._failure
        # Behind the server's own first question: its answer is a sign of life, which is not to come in a test's middle.
        asyncio.run_coroutine_threadsafe(self.service.client.ask("stats", 120), self.loop).result(120)
        headers = {"Authorization": f"Bearer {self.config.api_key}"} if self.config.api_key else {}
        self.url = f"http://127.0.0.1:{self.http_server.port}"
        hooks = {"response": [fits_its_document]}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=120, event_hooks=hooks)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as exc:
            self._failure = exc
            self._started.set()

    async def _serve(self) -> None:
        ours, theirs = socket.socketpair()
        tokenizer = None if self.engine_config.skip_tokenizer_init else byte_tokenizer()

        def build(start: messages.Start, vocab_size: Any, progress: Any) -> Any:
            built = fake_build(self.engine_config, **self._runner_options)
            self.core, self.runner = built.core, built.core._runner
            return built

        self.engine_process = EngineThread(theirs, build)
        start = messages.Start({}, "fake", "warning")
        client = await EngineClient.connect(start, self.engine_process, ours)
        self.service = make_service(self.config, self.engine_config, client, tokenizer, started_s=0.0)
        self.http_server = HttpServer(OneEngine(self.service, client), tls=tls_context(self.config))
        self.loop = asyncio.get_running_loop()
        self.status = await self.http_server.run(on_started=self._started.set)

    def stop(self) -> int:
        """Drain and end, as SIGTERM does; the exit status."""
        self.http.close()
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.http_server.drain)
        self._thread.join(120)
        assert not self._thread.is_alive(), "the server has not ended"
        return self.status


@pytest.fixture
def live() -> Iterator[Callable[..., LiveServer]]:
    """Starts servers: live(next_token, runner={...}, engine={...}, **server_arguments)."""
    servers: list[LiveServer] = []

    def start(*args: Any, **kwargs: Any) -> LiveServer:
        servers.append(LiveServer(*args, **kwargs))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
