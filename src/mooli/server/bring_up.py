"""From arguments to what routes work with: an engine's process and the text side, both warm.

Owns the order in which they come up, and what is asked of an engine so that one that hangs is noticed. What fails on
the way leaves nothing behind. Never listens: that is `mooli.server.http_server`'s.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from mooli.config import EngineConfig
from mooli.engine import messages
from mooli.engine.child import EngineChild
from mooli.errors import EngineError
from mooli.frontend.inputs import GenerateCall
from mooli.frontend.text_side import check_preferred, open_tokenizer, sampling_defaults, token_bytes, with_seed
from mooli.frontend.tokenizer import Tokenizer
from mooli.frontend.wire_formats.choice import open_wire_format
from mooli.hub.locate import locate_async
from mooli.link.client import EngineClient
from mooli.server.batch_desk import BatchDesk
from mooli.server.config import ServerConfig
from mooli.server.file_store import FileLimits, FileStore, Folder
from mooli.server.http_server import sd_notify
from mooli.server.keys import KeyRing
from mooli.server.logs import LogTail, RequestLog, StepLog
from mooli.server.metrics import Metrics
from mooli.server.service import Service

logger = logging.getLogger(__name__)

PING_INTERVAL_S = 2.0


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


async def _warm_up(service: Service) -> None:
    """A short generation, so that the first user does not pay for what is done once."""
    params = {"temperature": 0, "max_new_tokens": 4, "stop": None}
    has_text = service.tokenizer is not None
    inputs = await service.prepare(GenerateCall("Hello" if has_text else None, params, None if has_text else [0]))
    with service.start(inputs, is_counted=False) as call:
        await call.wait()


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


class _Progress:
    """One log line for each stage of loading."""

    def __init__(self) -> None:
        self._stage = ""

    def update(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage = stage
            logger.info("%s", stage)
