"""A server's life: engine process, warm-up, listening, draining, exit status.

Owns the order of start and end, signals, what systemd is told, and what happens when the engine process dies or falls
silent. Routes and protection are in `mooli.server.app`.

Exit status: 0 after SIGTERM or SIGINT, when everything that was running has been answered or given its grace period; 1
when the engine has died; 2 when the server could not start.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import shlex
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from uvicorn.server import ServerState

from mooli.config import EngineConfig
from mooli.engine import messages
from mooli.engine.child import EngineChild
from mooli.engine.facts import device_words
from mooli.errors import EngineError
from mooli.frontend.inputs import GenerateCall
from mooli.frontend.text_side import check_preferred, open_tokenizer, sampling_defaults, token_bytes, with_seed
from mooli.frontend.tokenizer import Tokenizer
from mooli.frontend.wire_formats.choice import open_wire_format
from mooli.hub.locate import locate_async
from mooli.link.client import EngineClient
from mooli.logs import set_up_logging
from mooli.server import openai_batches, traffic
from mooli.server.app import build_app
from mooli.server.batch_desk import BatchDesk
from mooli.server.config import ServerConfig
from mooli.server.file_store import FileLimits, FileStore, Folder
from mooli.server.keys import KeyRing
from mooli.server.listener import Acceptor, allow_many_connections, bound_socket, tls_context
from mooli.server.logs import LogTail, RequestLog, StepLog
from mooli.server.metrics import Metrics
from mooli.server.protection import SHUTTING_DOWN
from mooli.server.protocol import LimitedProtocol, make_protocol
from mooli.server.routing import App
from mooli.server.running_servers import RunningServer, announced, servers_folder
from mooli.server.service import Service
from mooli.server.several_models import SeveralModels
from mooli.server.traffic import TrafficLog

logger = logging.getLogger(__name__)

READY_LINE = "The server is fired up and ready to roll!"
"""Scripts made for SGLang wait for it."""

PING_INTERVAL_S = 2.0

DEATH_LINGER_S = 1.0
"""How long a server whose engine has died still answers, so that probes see 503 and open streams get the cause."""

CLOSE_WAIT_S = 2
"""For connections that are being answered when everything else is done."""


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


async def start_service(
    config: ServerConfig,
    engine_config: EngineConfig,
    argv: Sequence[str],
    started_s: float,
    child: EngineChild,
    keys: KeyRing,
    log_tail: LogTail | None = None,
) -> tuple[Service, EngineClient]:
    """Have `child` build the engine, load the text side meanwhile, and warm both up: what routes work with, and its
    engine process, which whoever calls this closes. log_tail: which is attached; without it nothing is kept.

    Raises ConfigError, a ModelError, OutOfMemoryError, BackendUnavailableError or EngineDeadError.
    """
    check_preferred(engine_config)
    batches = open_batches(config)
    try:
        return await _start(config, engine_config, argv, started_s, child, keys, batches, log_tail)
    except BaseException:
        if batches is not None:
            await batches.close()
        raise


async def _start(
    config: ServerConfig,
    engine_config: EngineConfig,
    argv: Sequence[str],
    started_s: float,
    child: EngineChild,
    keys: KeyRing,
    batches: BatchDesk | None,
    log_tail: LogTail | None,
) -> tuple[Service, EngineClient]:
    model_path = await locate_async(engine_config.model_path, needs_weights=engine_config.load_format != "dummy")
    defaults = sampling_defaults(model_path) if config.sampling_defaults == "model" else {}
    start = messages.Start(
        config=engine_config.to_dict(), model_path=str(model_path), log_level=engine_config.log_level
    )
    opening = asyncio.ensure_future(asyncio.to_thread(_open_text, engine_config, model_path))
    vocab_size = asyncio.ensure_future(_vocab_size(opening))
    try:
        client = await EngineClient.connect(start, *child.take(), vocab_size=vocab_size, progress=_Progress().update)
    except BaseException:
        # The tokenizer is not needed any more, and what it may fail of is nobody's business.
        for task in (vocab_size, opening):
            task.cancel()
        await asyncio.gather(vocab_size, opening, return_exceptions=True)
        raise
    try:
        tokenizer = await opening
        service = make_service(
            config, with_seed(engine_config), client, tokenizer, started_s=started_s, defaults=defaults, argv=argv,
            keys=keys, batches=batches, log_tail=log_tail,
        )  # fmt: skip
        if not config.skip_server_warmup:
            await _warm_up(service)
    except BaseException:
        await client.close()
        raise
    return service, client


def _open_text(config: EngineConfig, model_path: Path) -> Tokenizer | None:
    tokenizer = open_tokenizer(config, model_path)
    # A broken template is told at the start, and not at somebody's first chat.
    if tokenizer is not None and tokenizer.chat_template is not None:
        tokenizer.chat_template.compile()
    return tokenizer


async def _vocab_size(opening: asyncio.Future[Tokenizer | None]) -> int | None:
    tokenizer = await opening
    return None if tokenizer is None else tokenizer.vocab_size


def make_service(
    config: ServerConfig,
    engine_config: EngineConfig,
    client: EngineClient,
    tokenizer: Tokenizer | None,
    *,
    started_s: float,
    defaults: dict[str, object] | None = None,
    argv: Sequence[str] = (),
    keys: KeyRing | None = None,
    batches: BatchDesk | None = None,
    log_tail: LogTail | None = None,
) -> Service:
    """What routes work with, its metrics and logs connected to `client`. keys, batches: those that `config` names, if
    they are read already."""
    keys, batches = keys or KeyRing(config), batches or open_batches(config)
    metrics = Metrics(engine_config.served_model_name or engine_config.model_path, client.facts, config, keys)
    step_log = StepLog(client.facts, config.decode_log_interval)
    if tokenizer is not None and engine_config.grammar_backend != "none":
        wire_format = open_wire_format(engine_config, tokenizer)
        client.token_bytes = functools.partial(token_bytes, tokenizer, client.facts, wire_format)
    service = Service(
        config=config,
        engine_config=engine_config,
        client=client,
        tokenizer=tokenizer,
        metrics=metrics,
        step_log=step_log,
        request_log=RequestLog(config, tokenizer) if config.log_requests else None,
        sampling_defaults=defaults or {},
        startup_time_s=time.perf_counter() - started_s,
        launch_command=shlex.join(argv),
        keys=keys,
        batches=batches,
        log_tail=log_tail or make_log_tail(config),
        token_bytes=client.token_bytes,
    )

    def take_report(report: messages.Outputs) -> None:
        service.last_stats = report.stats
        metrics.step(report)
        step_log.step(report)

    client.on_report = take_report
    return service


def open_batches(config: ServerConfig) -> BatchDesk | None:
    """What `batch_dir` names, which no other server has from now on. Raises ConfigError."""
    if config.batch_dir is None:
        return None
    limits = FileLimits(config.max_file_bytes, config.max_files, config.max_files_bytes)
    return BatchDesk(FileStore(Folder(Path(config.batch_dir)), limits))


def make_log_tail(config: ServerConfig) -> LogTail:
    """What keeps the last lines of the log, without the keys that the arguments have."""
    return LogTail(key for key in (config.api_key, config.admin_api_key) if key)


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


async def watch(service: Service, engine: EngineClient) -> None:
    """Ask the engine for a sign of life again and again. It answers between two steps; one that says nothing at all
    for `watchdog_timeout` is hung, and is killed."""
    timeout_s = service.config.watchdog_timeout
    while engine.is_alive:
        try:
            await engine.ask("ping", timeout_s)
        except TimeoutError:
            if time.monotonic() - engine.last_sign_s >= timeout_s:
                logger.critical("the engine has given no sign for %g s: it is killed", timeout_s)
                engine.kill(f"gave no sign for {timeout_s:g} s (watchdog_timeout) and was killed by the server")
                return
        except EngineError:
            return
        sd_notify("WATCHDOG=1")
        await asyncio.sleep(PING_INTERVAL_S)


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


async def _warm_up(service: Service) -> None:
    """A short generation, so that the first user does not pay for what is done once."""
    params = {"temperature": 0, "max_new_tokens": 4, "stop": None}
    has_text = service.tokenizer is not None
    inputs = await service.prepare(GenerateCall("Hello" if has_text else None, params, None if has_text else [0]))
    with service.start(inputs, is_counted=False) as call:
        await call.wait()


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


class _Progress:
    """One log line for each stage of loading."""

    def __init__(self) -> None:
        self._stage = ""

    def update(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage = stage
            logger.info("%s", stage)


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
