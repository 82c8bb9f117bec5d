"""What `mooli batch` does: a file of requests in, a file of their answers out.

Owns what answers a row (an engine in a process of its own behind the server's routes, or a server at a URL),
what is said of the progress, and the exit status: 0 when every row was answered, 1 when some have failed or the run
had to stop, 2 for what is wrong before it begins, 130 after Ctrl-C. What is kept, and when, is in `mooli.batches`.

The engine is reached without a socket, through the application that `mooli serve` has: bodies are its bodies.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from mooli.batch_flags import AT_A_SERVER, DEFAULTS, OF_SERVERS, WITHOUT_EFFECT
from mooli.batches.output import ResultFiles
from mooli.batches.runner import Batch, Progress, Send
from mooli.config import EngineConfig
from mooli.entry import INTERRUPTED, Interruptible
from mooli.errors import BatchError, ConfigError, EngineDeadError, EngineError
from mooli.logs import report_error, set_up_logging

if TYPE_CHECKING:
    import aiohttp

    from mooli.link.client import EngineClient
    from mooli.server.routing import App
    from mooli.server.service import Service

CONNECT_LIMIT_S = 30

_ASK_LIMIT_S = 30

_OF_ANSWERS = (
    "served_model_name", "tokenizer_path", "chat_template", "reasoning_parser", "tool_call_parser", "grammar_backend",
    "preferred_sampling_params", "allow_auto_truncate", "random_seed",
)  # fmt: skip
"""Engine arguments that decide what an answer is, beside those that decide the bits of the cache."""


GO_ON = "the same command goes on from there"


def run_batch(args: argparse.Namespace) -> int:
    """Run the command; the exit status. Raises a MooliError for what is wrong before the first row is sent."""
    with Interruptible():
        try:
            return _run(args)
        except KeyboardInterrupt:  # before the first row is sent, or behind the last
            print(f"interrupted; what is done is kept, and {GO_ON}", file=sys.stderr)
            return INTERRUPTED


def _run(args: argparse.Namespace) -> int:
    target = _target(args)
    files = _Files(args)
    show = _Show(sys.stderr)
    with Batch(files.source, files.journal, files.results, anew=args.overwrite) as batch:
        progress = batch.progress
        if not batch.has_begun and not args.overwrite and files.output.exists():
            if batch.has_results():
                show.line(f"{files.output} is there already, with all {progress.total} rows: nothing is left to do")
                return _status(files, progress, show)
            raise ConfigError(
                f"{files.output} is there already, and is not of these rows: give another --output, or --overwrite"
            )
        if batch.has_begun:
            show.line(f"{progress.done} of {progress.total} rows are done already")
        if batch.num_pending:
            status = _answer_rows(batch, target, show)
            if status:
                if batch.has_begun:
                    show.line(
                        f"{progress.done} of {progress.total} rows are done, and kept in {files.journal}: {GO_ON}"
                    )
                return status
        batch.finish()
        show.summary(progress)
        return _status(files, progress, show)


def _answer_rows(batch: Batch, target: _Target, show: _Show) -> int:
    """0 when every row has its answer. Raises what is wrong before the first is sent."""

    async def run() -> int:
        task = asyncio.current_task()
        if task is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
        async with target.open() as ready:
            batch.begin(ready.settings, _now())
            most = target.max_concurrency or ready.max_concurrency
            show.began(batch.num_pending, f"{most} at a time: {ready.words}")
            try:
                await batch.run(ready.send, max_concurrency=most, seed=ready.seed, on_progress=show.progress)
            except (BatchError, EngineError) as exc:
                show.end()
                report_error(exc)
                return 1
        return 0

    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        show.end()
        show.line("interrupted")
        return INTERRUPTED
    finally:
        show.end()


def _now() -> int:
    """When a batch begins, in seconds since the epoch. Source: reproducible-builds.org, SOURCE_DATE_EPOCH."""
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    return int(given) if given.isascii() and given.isdigit() else int(time.time())


class _Files:
    """Where everything lies. Raises ConfigError for names that fall together, and folders that are not there."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.source, self.output = Path(args.input).expanduser(), Path(args.output).expanduser()
        if self.output.is_dir() or not self.output.name:
            raise ConfigError(f"--output: {str(self.output)!r} is a folder: name a file in it")
        if not self.output.parent.is_dir():
            raise ConfigError(f"--output: there is no folder {str(self.output.parent)!r}")
        ending = self.output.suffix
        self.errors = self.output.with_name(f"{self.output.name.removesuffix(ending)}.errors{ending or '.jsonl'}")
        self.journal = self.output.with_name(f"{self.output.name}.journal")
        self.results = ResultFiles(self.output, self.errors)
        for path in (self.output, self.errors, self.journal):
            if path.exists() and self.source.exists() and path.samefile(self.source):
                raise ConfigError(f"the input {str(self.source)!r} would be written over: give another --output")


def _status(files: _Files, progress: Progress, show: _Show) -> int:
    if not progress.failed:
        return 0
    show.line(f"rows that failed: {progress.failed}, in {files.errors}")
    return 1


# -- what answers rows -------------------------------------------------------------------------------------------------
class _Ready(NamedTuple):
    """What answers rows, and may be used now. settings: all that decides its answers. seed: for rows that bring none.
    words: about it."""

    send: Send
    settings: dict[str, Any]
    max_concurrency: int
    seed: int | None
    words: str


class _Target(NamedTuple):
    """What shall answer rows. max_concurrency: None for its own number."""

    open: Callable[[], contextlib.AbstractAsyncContextManager[_Ready]]
    max_concurrency: int | None


def _target(args: argparse.Namespace) -> _Target:
    """Raises ConfigError."""
    most = args.max_concurrency
    if most is not None and most < 1:
        raise ConfigError(f"--max-concurrency={most} is too small: the least is 1")
    given = EngineConfig.given_in(args)
    others = {name: getattr(args, name) for name in OF_SERVERS if getattr(args, name) is not None}
    if args.url is not None:
        for name in (*given, *others):
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect with --url, where no engine is started: remove it"
            )
        return _Target(lambda: _at_server(_base_url(args.url), _key(args.api_key)), most)
    if args.api_key is not None:
        raise ConfigError("--api-key has no effect without --url: remove it")
    for name, why in WITHOUT_EFFECT.items():
        if given.get(name):
            raise ConfigError(f"--{name.replace('_', '-')}: {why}; remove it")
    config = EngineConfig.from_kwargs(**{**DEFAULTS, **given})
    return _Target(lambda: _with_engine(config, others), most)


def _base_url(given: str) -> str:
    """Without the /v1 that is in the rows. Raises ConfigError."""
    if not given.startswith(("http://", "https://")):
        raise ConfigError(f"--url={given!r} must begin with http:// or https://")
    return given.rstrip("/").removesuffix("/v1").rstrip("/")


def _key(given: str | None) -> str | None:
    return given or os.environ.get("OPENAI_API_KEY") or os.environ.get("MOOLI_API_KEY") or None


@contextlib.asynccontextmanager
async def _with_engine(config: EngineConfig, others: dict[str, Any]) -> AsyncIterator[_Ready]:
    """An engine in a process of its own. Raises as `start_service`."""
    set_up_logging(config.log_level)
    from mooli.engine.child import EngineChild

    with EngineChild() as child:  # it comes up while the next lines import
        from mooli.engine.facts import device_words
        from mooli.server.app import build_app
        from mooli.server.bring_up import start_service, watch
        from mooli.server.config import ServerConfig
        from mooli.server.keys import KeyRing

        server = ServerConfig.from_kwargs(skip_server_warmup=True, **others)
        service, engine = await start_service(server, config, (), time.perf_counter(), child, KeyRing(server))
        watching = asyncio.ensure_future(watch(service, engine))
        try:
            # How an answer reads as a message would depend on what was answered before it.
            service.own_answers = None
            facts = service.facts
            yield _Ready(
                send=_in_process(build_app(service), engine),
                settings=_settings(service),
                max_concurrency=facts.max_running_requests,
                seed=None if "seed" in config.preferred_sampling else config.random_seed,
                words=f"{service.model_name} on {device_words(facts.backend)}, KV cache of"
                f" {facts.max_total_num_tokens} tokens",
            )
        finally:
            watching.cancel()
            await engine.close()


def _settings(service: Service) -> dict[str, Any]:
    config, facts = service.engine_config, service.facts
    return {
        "model": service.model_name,
        "cache_namespace": facts.cache_namespace,
        "context_length": facts.context_length,
        **{name: getattr(config, name) for name in _OF_ANSWERS},
        "sampling_defaults": dict(service.sampling_defaults),
        "default_chat_template_kwargs": service.config.chat_template_kwargs,
    }


def _in_process(app: App, engine: EngineClient) -> Send:
    """Rows as requests of an ASGI application. Raises EngineDeadError when its engine is."""
    import msgspec

    from mooli.server.http import asked

    async def send(url: str, body: dict[str, Any]) -> tuple[int, Any]:
        status, answer = await asked(app, url, body)
        if status >= 500 and not engine.is_alive:
            raise engine.error or EngineDeadError("the engine has ended")
        return status, msgspec.json.decode(answer)

    return send


@contextlib.asynccontextmanager
async def _at_server(base_url: str, key: str | None) -> AsyncIterator[_Ready]:
    """A server that runs already. Raises BatchError where there is none, or it refuses the key."""
    import aiohttp

    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_LIMIT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        await _look(session, base_url)
        yield _Ready(_over_http(session, base_url), {"url": base_url}, AT_A_SERVER, None, base_url)


async def _look(session: aiohttp.ClientSession, base_url: str) -> None:
    """Whether there is anybody. Raises BatchError."""
    import aiohttp

    try:
        limit = aiohttp.ClientTimeout(total=_ASK_LIMIT_S)
        async with session.get(f"{base_url}/v1/models", timeout=limit) as response:
            _check_key(base_url, response.status)
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as exc:
        raise BatchError(f"there is no server at {base_url}: {_words(exc)}; check --url") from exc


def _over_http(session: aiohttp.ClientSession, base_url: str) -> Send:
    """Rows as requests over HTTP. Raises BatchError for a refused key."""
    import aiohttp
    import msgspec

    async def send(url: str, body: dict[str, Any]) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json"}
        try:
            async with session.post(
                base_url + url, data=msgspec.json.encode(body), headers=headers, allow_redirects=False
            ) as response:
                received = await response.read()
        except (aiohttp.ClientError, asyncio.TimeoutError) as exc:
            raise ConnectionError(_words(exc)) from exc
        _check_key(base_url, response.status)
        try:
            return response.status, msgspec.json.decode(received)
        except (msgspec.DecodeError, ValueError):
            return response.status, received.decode("utf-8", "replace")

    return send


def _check_key(base_url: str, status: int) -> None:
    if status in (401, 403):
        raise BatchError(f"{base_url} refuses the key: HTTP {status}; give --api-key, or set OPENAI_API_KEY")


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


# -- what is said ------------------------------------------------------------------------------------------------------
class _Show:
    """Tells of the progress on `stream`: in one line that changes where that is a terminal, otherwise in a line now and
    then. A stream that takes nothing any more ends no batch. clock: seconds that only grow."""

    BAR_EVERY_S = 0.2
    LINE_EVERY_S = 10.0
    BAR_CHARS = 24

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._is_terminal = stream.isatty()
        self._every_s = self.BAR_EVERY_S if self._is_terminal else self.LINE_EVERY_S
        self._start_s = self._last_s = clock()
        self._num_shown = 0
        """Characters of the line that stands there and may change."""

    def line(self, text: str) -> None:
        """Something that stays."""
        self.end()
        self._write(f"{text}\n")

    def began(self, num_pending: int, words: str) -> None:
        """Rows are answered, and time counts, from now on. words: by what."""
        self.line(f"{num_pending} rows to answer, {words}")
        self._start_s = self._last_s = self._clock()

    def progress(self, progress: Progress) -> None:
        """Called as often as one likes."""
        now_s = self._clock()
        if now_s - self._last_s < self._every_s:
            return
        self._last_s = now_s
        text = self._text(progress, now_s - self._start_s)
        if not self._is_terminal:
            self._write(f"{text}\n")
            return
        full = round(self.BAR_CHARS * progress.done / max(progress.total, 1))
        text = f"[{'#' * full}{'.' * (self.BAR_CHARS - full)}] {text}"
        text = text[: shutil.get_terminal_size().columns - 1]  # a line that is broken cannot be written over
        self._write(f"\r{text:<{self._num_shown}}")
        self._num_shown = len(text)

    def end(self) -> None:
        """The line that stands there changes no more."""
        if self._num_shown:
            self._write("\n")
            self._num_shown = 0

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()

    def summary(self, progress: Progress) -> None:
        """What the run came to."""
        took_s = self._clock() - self._start_s
        num_new = progress.done - progress.already
        self.line(
            f"{progress.total} rows, {num_new} of them in {duration_words(took_s)}, {progress.sent} computed;"
            f" {progress.prompt_tokens} prompt tokens, {_share(progress)} of them from the cache,"
            f" {progress.completion_tokens} generated"
        )

    def _text(self, progress: Progress, elapsed_s: float) -> str:
        num_new = progress.done - progress.already
        rate = num_new / max(elapsed_s, 1e-9)
        parts = [
            f"{progress.done}/{progress.total} rows",
            f"{rate:.1f} rows/s",
            f"{progress.completion_tokens / max(elapsed_s, 1e-9):.0f} tokens/s",
            f"{_share(progress)} cached",
        ]
        if progress.failed:
            parts.append(f"{progress.failed} failed")
        if num_new:
            parts.append(f"{duration_words((progress.total - progress.done) / max(rate, 1e-9))} left")
        return ", ".join(parts)


def _share(progress: Progress) -> str:
    return f"{100 * progress.cached_tokens / max(progress.prompt_tokens, 1):.0f}%"


def duration_words(seconds: float) -> str:
    """Such as 42 s, 3 min 20 s, 5 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
