"""The engine process as the server sees it: send it requests, hand out what comes back, notice its death.

Owns the child process and the link to it, and the promise that every submitted request ends exactly once: with its last
output, or with the error that ended the engine. Lives in one asyncio event loop, whose thread makes all calls. Never
imports what computes: the server's process holds no weights.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol, cast

from mooli.engine import messages
from mooli.engine.child import CLOSE_DISK_S, EXIT_WAIT_S, error_named, exit_words
from mooli.engine.facts import EngineFacts
from mooli.errors import EngineClosedError, EngineDeadError, EngineError, MooliError, RequestError
from mooli.link.link import TAKER_FAILED, Sink, Sinks, copy_error
from mooli.logs import FirstTimes
from mooli.types import Request, TokenBytes

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


class Process(Protocol):
    """What is needed of a child process; `subprocess.Popen` has it."""

    @property
    def pid(self) -> int: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


class EngineClient(asyncio.Protocol):
    """A running engine process. Make it with `connect`, of a process that `EngineChild` started.

    facts: what building settled. on_report: called with each step's report, after its outputs were handed out.
    """

    def __init__(self, process: Process, progress: Progress) -> None:
        loop = asyncio.get_running_loop()
        self.facts: EngineFacts
        self.last_sign_s = time.monotonic()
        self.on_report: Callable[[messages.Outputs], None] = lambda report: None
        self.died: asyncio.Future[MooliError] = loop.create_future()
        """Set with the cause when the process has ended, and was not told to."""
        self.token_bytes: Callable[[], TokenBytes] | None = None
        """Of the vocabulary: sent before the first request with a grammar. None where there is no tokenizer."""
        self._process = process
        self._connection: socket.socket | None = None
        self._progress = progress
        self._frames = messages.Frames(messages.ToServer)
        self._transport: asyncio.WriteTransport | None = None
        self._ready: asyncio.Future[None] = loop.create_future()
        self._sinks = Sinks(lambda name: self._abort([name], TAKER_FAILED))
        self._failures = FirstTimes()
        self._failure: MooliError | None = None
        self._is_cut = False
        self._ending: asyncio.Task[None] | None = None

    @classmethod
    async def connect(
        cls,
        start: messages.Start,
        process: Process,
        connection: socket.socket,
        *,
        vocab_size: Awaitable[int | None] | None = None,
        progress: Progress = lambda *_: None,
    ) -> EngineClient:
        """Have `process`, which has the other end of `connection`, build the engine of `start`, and wait until it has.

        vocab_size: of the tokenizer, which may be read while the engine loads; None without one.
        Raises what `vocab_size` or building raised (ConfigError, OutOfMemoryError, a ModelError, …), or
        EngineDeadError; the process has ended then.
        """
        client = cls(process, progress)
        client._connection = connection
        try:
            await asyncio.get_running_loop().create_connection(lambda: client, sock=connection)
            client._send(start)
            client._send(messages.Vocabulary(None if vocab_size is None else await vocab_size))
            await client._ready
        except BaseException:
            await client.close()
            raise
        return client

    @property
    def is_alive(self) -> bool:
        return self._ready.done() and not self._is_cut and self.error is None

    @property
    def num_open(self) -> int:
        return len(self._sinks)

    @property
    def open_rids(self) -> list[str]:
        return self._sinks.rids

    @property
    def error(self) -> MooliError | None:
        return self._sinks.error or self._failure

    @property
    def pid(self) -> int:
        return self._process.pid

    def check_process(self) -> None:
        """Nothing to raise: a server does not fork."""

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> None:
        """See `Link`. Sinks are called in the event loop."""
        self._check_alive()
        # Nothing is noted down yet: what cannot be written must leave no trace.
        entries = self._sinks.named(requests, sinks)
        num_tokens = sum(len(request.prompt_ids) for request in requests)
        if num_tokens > messages.MAX_SUBMIT_TOKENS:
            raise RequestError(
                f"prompts of {num_tokens} tokens in one request, each sample's counted, are more than the"
                f" {messages.MAX_SUBMIT_TOKENS} that are taken at once: send fewer prompts, or a smaller n"
            )
        submit = messages.Submit.of((entry.name, entry.request) for entry in entries)
        try:
            frame = messages.encode(submit)
        except RequestError as exc:
            raise RequestError(
                f"the request is too large: {exc}. Send fewer prompts, or shorter lists with each"
            ) from exc
        except (ValueError, OverflowError) as exc:
            raise RequestError(f"the request cannot be sent to the engine: {exc}") from exc
        self._sinks.add(entries)
        if self.token_bytes is not None and any(request.sampling.needs_vocabulary for request in requests):
            self._send(messages.Tokens(self.token_bytes()))
            self.token_bytes = None  # they stay there
        self._send_frame(frame)

    def abort(self, rids: Iterable[str], reason: str) -> None:
        self._abort(self._sinks.names(rids), reason)

    def drop(self, requests: Iterable[Request], reason: str) -> None:
        names: list[str] = []
        for request in requests:
            self._sinks.forget(request, names.append)
        self._abort(names, reason)

    def finish(self, request: Request, matched: str) -> None:
        self._sinks.forget(request, lambda name: self._send(messages.Finish({name: matched})))

    def name_of(self, rid: str) -> str | None:
        return self._sinks.name_of(rid)

    async def ask(self, question: str, timeout_s: float, **details: Any) -> Any:
        self._check_alive()
        return await self._sinks.answered(
            lambda number: self._send(messages.Ask(number, question, details)), question, timeout_s
        )

    async def close(self) -> None:
        """Stop the process; open requests end with EngineClosedError. May be called again."""
        if self._sinks.error is None:
            self._end_all(EngineClosedError("the server is shutting down"))
        if self._transport is not None:
            self._send(messages.Stop())
            self._transport.close()
        if self._ending is not None:
            await self._ending
        await asyncio.to_thread(self._stop_process, CLOSE_DISK_S)

    def kill(self, why: str) -> None:
        """End a process that does not answer. `why`, after "the engine process", is what open requests are told."""
        self._failure = self._failure or EngineDeadError(f"the engine process {why}")
        self._process.kill()

    # -- the link, called by asyncio --
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # By what it can do: uvloop's transports are no subclasses of asyncio's.
        if not hasattr(transport, "write"):
            raise EngineError("the link to the engine process is not a stream")
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        self.last_sign_s = time.monotonic()
        try:
            for message in self._frames.push(data):
                self._take(message)
        except Exception as exc:
            logger.error("what the engine process says cannot be used", exc_info=exc)
            self._failure = self._failure or EngineDeadError(f"the engine process is not understood: {exc}")
            self._process.kill()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._sinks.error is None:
            # From here on nothing can be submitted; what is open waits for the cause.
            self._is_cut = True
            self._read_rest()
            self._ending = asyncio.get_running_loop().create_task(self._find_cause())

    def _read_rest(self) -> None:
        """A write to a process that has just ended cuts the link before its last words are read."""
        while self._connection is not None:
            try:
                data = self._connection.recv(1 << 16)
            except OSError:
                return
            if not data:
                return
            self.data_received(data)

    async def _find_cause(self) -> None:
        try:
            status = await asyncio.to_thread(self._stop_process)
            words = "did not end with its link, and was killed by the server" if status is None else exit_words(status)
        except Exception as exc:  # no more threads, for example: what is open must hear of the end
            words = f"has ended, and why cannot be found out: {exc}"
        if self._failure is None:
            self._failure = EngineDeadError(f"the engine process {words}")
        failure = self._failure
        if self._ready.done():
            logger.error("%s", failure)
        self._end_all(failure)
        if not self.died.done():
            self.died.set_result(failure)

    # -- parts --
    def _send(self, message: messages.Message) -> None:
        self._send_frame(messages.encode(message))

    def _send_frame(self, frame: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    def _abort(self, names: list[str], reason: str) -> None:
        if names:
            self._send(messages.Abort(names, reason))

    def _check_alive(self) -> None:
        self._sinks.check_open()
        if self._failure is not None:
            raise copy_error(self._failure)
        if self._is_cut:
            raise EngineDeadError("the engine process has ended")

    def _take(self, message: Any) -> None:
        if isinstance(message, messages.Outputs):
            for output in message.outputs:
                self._sinks.hand_out(output.rid, output)
            try:
                self.on_report(message)
            except Exception as exc:
                if self._failures.is_first("reports", exc):
                    logger.warning("a report of the engine was not taken; this is said once", exc_info=True)
        elif isinstance(message, messages.Refused):
            self._sinks.hand_out(message.name, error_named(message.error, message.message))
        elif isinstance(message, messages.Reply):
            error = None if message.error is None else EngineError(message.error)
            self._sinks.answer(message.number, message.value, error)
        elif isinstance(message, messages.Progress):
            self._progress(message.stage, message.done, message.total)
        elif isinstance(message, messages.Ready):
            self.facts = EngineFacts(**{**message.facts, "eos_ids": tuple(message.facts["eos_ids"])})
            self._ready.set_result(None)
        else:
            self._failure = error_named(message.error, message.message)

    def _end_all(self, error: MooliError) -> None:
        if not self._ready.done():
            self._ready.set_exception(copy_error(error))
            self._ready.exception()  # seen: whoever waited may have gone
        self._sinks.end(error)

    def _stop_process(self, more_s: float = 0.0) -> int | None:
        """Its exit status; None if it had to be killed here. more_s: that it may take besides, for what it writes."""
        try:
            return self._process.wait(EXIT_WAIT_S + more_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return None
