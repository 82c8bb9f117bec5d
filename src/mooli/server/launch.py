"""A server's life: from its arguments, through signals, to its exit status.

Owns the order of start and end, signals, the lines that say that it is ready, and the surroundings: log, environment.
How an engine comes up is in `mooli.server.bring_up`, how requests are taken and drained in `mooli.server.http_server`.

Exit status: 0 after SIGTERM or SIGINT, when everything that was running has been answered or given its grace period; 1
when the engine has died; 2 when the server could not start.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mooli.config import EngineConfig
from mooli.engine.child import EngineChild
from mooli.engine.facts import device_words
from mooli.frontend.text_side import check_preferred
from mooli.link.client import EngineClient
from mooli.logs import set_up_logging
from mooli.server import openai_batches, traffic
from mooli.server.app import build_app
from mooli.server.bring_up import make_log_tail, start_service, watch
from mooli.server.config import ServerConfig
from mooli.server.http_server import HttpServer, Served, sd_notify
from mooli.server.keys import KeyRing
from mooli.server.listener import allow_many_connections, bound_socket, tls_context
from mooli.server.logs import LogTail
from mooli.server.running_servers import RunningServer, announced, servers_folder
from mooli.server.service import Service
from mooli.server.several_models import SeveralModels
from mooli.server.traffic import TrafficLog

logger = logging.getLogger(__name__)

READY_LINE = "The server is fired up and ready to roll!"
"""Scripts made for SGLang wait for it."""


def run(config: ServerConfig, engine_config: EngineConfig, argv: Sequence[str], child: EngineChild) -> int:
    """Serve until a signal or the engine's death; the exit status. argv: the command without secrets, for /server_info.
    child: becomes the engine's process.

    Raises a MooliError if the server cannot start.
    """
    config = with_environment(config)
    _set_up_logging(config, engine_config)
    for warning in config.warnings():
        logger.warning("%s", warning)
    keys = KeyRing(config)
    allow_many_connections()
    log_tail = make_log_tail(config)
    with log_tail.attached():
        return asyncio.run(_run(config, engine_config, argv, child, keys, log_tail))


async def _run(
    config: ServerConfig,
    engine_config: EngineConfig,
    argv: Sequence[str],
    child: EngineChild,
    keys: KeyRing,
    log_tail: LogTail,
) -> int:
    started_s = time.perf_counter()
    tls = tls_context(config)
    stop = asyncio.Event()
    with _signals(stop), reloading(keys), bound_socket(config) as listener:
        starting = asyncio.ensure_future(start_service(config, engine_config, argv, started_s, child, keys, log_tail))
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            logger.info("stopped before the server was ready")
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            return 0
        service, engine = await starting
        stopping.cancel()
        return await _listen(OneEngine(service, engine), service.model_name, listener, tls, stop, _ready_words(service))


def run_several(
    config: ServerConfig, models: Mapping[str, EngineConfig], engine_config: EngineConfig, argv: Sequence[str]
) -> int:
    """`run` for several models by their names, of which each is loaded when it is first asked for. engine_config: what
    they have in common. Raises a MooliError if the server cannot start."""
    config = with_environment(config)
    _set_up_logging(config, engine_config)
    for warning in config.warnings():
        logger.warning("%s", warning)
    check_preferred(engine_config)
    keys = KeyRing(config)
    allow_many_connections()
    log_tail = make_log_tail(config)
    with log_tail.attached():
        return asyncio.run(_run_several(config, models, argv, keys, log_tail))


async def _run_several(
    config: ServerConfig, models: Mapping[str, EngineConfig], argv: Sequence[str], keys: KeyRing, log_tail: LogTail
) -> int:
    tls = tls_context(config)
    stop = asyncio.Event()

    async def start(name: str) -> tuple[Service, EngineClient]:
        with EngineChild() as child:
            return await start_service(config, models[name], argv, time.perf_counter(), child, keys, log_tail)

    with _signals(stop), reloading(keys), bound_socket(config) as listener:
        served = SeveralModels(config, keys, tuple(models), start, watch)
        names = ", ".join(models)
        return await _listen(served, names, listener, tls, stop, f"models, loaded when they are asked for: {names}")


async def _listen(
    served: Served, name: str, listener: socket.socket, tls: ssl.SSLContext | None, stop: asyncio.Event, words: str
) -> int:
    """Answer until `stop` is set, or the engine dies; the exit status. words: of the log, about what is served."""
    server = HttpServer(served, listener, tls)
    draining = asyncio.ensure_future(_drain_on(stop, server))
    known = RunningServer(os.getpid(), _url(served.config, server), name, time.time())
    try:
        with announced(known, servers_folder()):
            return await server.run(on_started=lambda: _announce(words, known.url))
    finally:
        draining.cancel()


class OneEngine:
    """A service and its engine's process, which is this object's from now on."""

    def __init__(self, service: Service, engine: EngineClient) -> None:
        self.config = service.config
        self.app = build_app(service)
        self.traffic = TrafficLog(service.metrics, service.config)
        self.died: asyncio.Future[Any] = engine.died
        self._service = service
        self._engine = engine

    @property
    def num_active(self) -> int:
        return self._service.num_active

    def begin(self) -> None:
        service = self._service
        if service.batches is None:
            return
        most = service.config.max_batch_rows or max(1, service.facts.max_running_requests // 2)
        service.batches.start(openai_batches.rows_of(service), openai_batches.settings_of(service), at_a_time=most)

    def drain(self) -> None:
        self._service.is_draining = True

    async def stop(self) -> None:
        if self._service.batches is not None:
            await self._service.batches.stop()

    def abort_all(self, message: str) -> None:
        self._service.client.abort(self._service.client.open_rids, message)

    async def watch(self) -> None:
        await watch(self._service, self._engine)

    async def close(self) -> None:
        if self._service.batches is not None:
            await self._service.batches.close()
        await self._engine.close()


async def _drain_on(stop: asyncio.Event, server: HttpServer) -> None:
    while True:
        await stop.wait()
        stop.clear()
        server.drain()


@contextlib.contextmanager
def _signals(stop: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    caught = (signal.SIGTERM, signal.SIGINT)
    for number in caught:
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in caught:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def reloading(keys: KeyRing) -> Iterator[None]:
    """While this lasts, SIGHUP has the keys file read again. Without a file it ends the process, as it always does."""
    if keys.path is None:
        yield
        return
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, keys.reload)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


def _url(config: ServerConfig, server: HttpServer) -> str:
    scheme = "https" if config.ssl_certfile else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"{scheme}://{host}:{server.port}"


def _ready_words(service: Service) -> str:
    facts = service.facts
    return (
        f"{service.model_name} on backend {service.engine_config.backend_name} ({device_words(facts.backend)}): context"
        f" {facts.context_length} tokens, KV cache {facts.max_total_num_tokens} tokens, ready in"
        f" {service.startup_time_s:.1f} s"
    )


def _announce(words: str, url: str) -> None:
    gc.freeze()  # what is there now stays: nobody waits while it is looked through for garbage
    logger.info("%s", words)
    logger.info("listening on %s", url)
    logger.info(READY_LINE)
    sd_notify("READY=1")


def with_environment(config: ServerConfig) -> ServerConfig:
    """Keys that are not given as flags, where every user of the machine could read them, come from the environment."""
    return replace(
        config,
        api_key=config.api_key or os.environ.get("MOOLI_API_KEY") or None,
        admin_api_key=config.admin_api_key or os.environ.get("MOOLI_ADMIN_API_KEY") or None,
    )


def _set_up_logging(config: ServerConfig, engine_config: EngineConfig) -> None:
    set_up_logging(engine_config.log_level)
    logging.getLogger("uvicorn").setLevel((config.log_level_http or "warning").upper())
    if config.log_level_http is not None:
        logging.getLogger(traffic.__name__).setLevel(config.log_level_http.upper())
