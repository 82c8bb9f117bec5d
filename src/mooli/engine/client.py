"""The engine process as the server sees it: send it requests, hand out what comes back, notice its death.

Owns the child process and the link to it, and the promise that every submitted request ends exactly once: with its last
output, or with the error that ended the engine. Lives in one asyncio event loop, whose thread makes all calls. Never
imports what computes: the server's process holds no weights.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol

from mooli.engine import messages
from mooli.engine.endings import EXIT_WAIT_S, error_named, exit_words
from mooli.engine.facts import EngineFacts
from mooli.engine.open_requests import OpenRequests, Sink
from mooli.errors import EngineClosedError, EngineDeadError, EngineError, MooliError, RequestError
from mooli.logs import FirstTimes
from mooli.types import Request, RequestOutput

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

    facts: what building settled. last_report: the newest step, None before the first.
    on_report: called with each step's report, after its outputs were handed out.
    """

    def __init__(self, process: Process, progress: Progress) -> None:
        loop = asyncio.get_running_loop()
        self.facts: EngineFacts
        self.last_report: messages.Outputs | None = None
        self.last_sign_s = time.monotonic()
        self.on_report: Callable[[messages.Outputs], None] = lambda report: None
        self.died: asyncio.Future[MooliError] = loop.create_future()
        """Set with the cause when the process has ended, and was not told to."""
        self._process = process
        self._connection: socket.socket | None = None
        self._progress = progress
        self._frames = messages.Frames(messages.ToServer)
        self._transport: asyncio.WriteTransport | None = None
        self._ready: asyncio.Future[None] = loop.create_future()
        self._open = OpenRequests()
        self._failures = FirstTimes()
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self._error: MooliError | None = None
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
        """Whether requests can be submitted."""
        return self._ready.done() and not self._is_cut and (self._error or self._failure) is None

    @property
    def num_open(self) -> int:
        """Requests submitted whose taker still waits for an output."""
        return len(self._open)

    @property
    def pid(self) -> int:
        return self._process.pid

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> None:
        """Start requests, all in the same step if there is room.

        Raises RequestError if an id is in use by an open request or it is too much at once, EngineClosedError or
        EngineDeadError.
        """
        self._check_alive()
        self._open.check_free(requests)
        num_tokens = sum(len(request.prompt_ids) for request in requests)
        if num_tokens > messages.MAX_SUBMIT_TOKENS:
            raise RequestError(
                f"prompts of {num_tokens} tokens in one request, each sample's counted, are more than the"
                f" {messages.MAX_SUBMIT_TOKENS} that are taken at once: send fewer prompts, or a smaller n"
            )
        # Before anything is noted down: what cannot be written must leave no trace.
        entries = self._open.named(requests, sinks)
        submit = messages.Submit.of((entry.name, entry.request) for entry in entries)
        try:
            frame = messages.encode(submit)
        except RequestError as exc:
            raise RequestError(
                f"the request is too large: {exc}. Send fewer prompts, or shorter lists with each"
            ) from exc
        except (ValueError, OverflowError) as exc:
            raise RequestError(f"the request cannot be sent to the engine: {exc}") from exc
        self._open.add(entries)
        self._send_frame(frame)

    def abort(self, rids: Iterable[str], reason: str) -> None:
        """End requests early. Their sinks get an output with finish reason `abort`. Unknown ids are ignored."""
        names = self._open.names(rids)
        if names:
            self._send(messages.Abort(names, reason))

    def drop(self, requests: Iterable[Request], reason: str) -> None:
        """Like `abort` for requests whose sinks want nothing more."""
        names = [name for request in requests if (name := self._forget(request)) is not None]
        if names:
            self._send(messages.Abort(names, reason))

    def finish(self, request: Request, matched: str) -> None:
        """The text side has ended this request, at a stop string. Its sink wants nothing more."""
        name = self._forget(request)
        if name is not None:
            self._send(messages.Finish({name: matched}))

    @property
    def open_rids(self) -> list[str]:
        return self._open.rids

    async def ask(self, question: str, timeout_s: float) -> Any:
        """One of `messages.QUESTIONS`, answered between two steps.

        Raises EngineError if it cannot be answered, EngineDeadError, or TimeoutError.
        """
        self._check_alive()
        number = next(self._numbers)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._questions[number] = future
        self._send(messages.Ask(number, question))
        try:
            return await asyncio.wait_for(future, timeout_s)
        except asyncio.TimeoutError:
            raise TimeoutError(f"the engine has not answered {question!r} within {timeout_s:g} s") from None
        finally:
            del self._questions[number]

    async def close(self) -> None:
        """Stop the process; open requests end with EngineClosedError. May be called again."""
        if self._error is None:
            self._error = EngineClosedError("the server is shutting down")
            self._end_all(self._error)
        if self._transport is not None:
            self._send(messages.Stop())
            self._transport.close()
        if self._ending is not None:
            await self._ending
        await asyncio.to_thread(self._stop_process)

    def kill(self, why: str) -> None:
        """End a process that does not answer. `why`, after "the engine process", is what open requests are told."""
        self._failure = self._failure or EngineDeadError(f"the engine process {why}")
        self._process.kill()

    # -- the link, called by asyncio --
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.WriteTransport):
            raise EngineError("the link to the engine process is not a stream")
        self._transport = transport

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
        if self._error is None:
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
        self._error = failure = self._failure
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

    def _check_alive(self) -> None:
        error = self._error or self._failure
        if error is not None:
            raise copy_error(error)
        if self._is_cut:
            raise EngineDeadError("the engine process has ended")

    def _forget(self, request: Request) -> str | None:
        """Take its sink away; what still comes about it reaches nobody. Its name, if it was open."""
        name = self._open.name_of(request)
        if name is not None:
            self._open.pop(name)
        return name

    def _take(self, message: Any) -> None:
        if isinstance(message, messages.Outputs):
            for output in message.outputs:
                self._hand_out(output.rid, output, is_last=output.finish is not None)
            self.last_report = message
            try:
                self.on_report(message)
            except Exception as exc:
                if self._failures.is_first("reports", exc):
                    logger.warning("a report of the engine was not taken; this is said once", exc_info=True)
        elif isinstance(message, messages.Refused):
            self._hand_out(message.name, error_named(message.error, message.message), is_last=True)
        elif isinstance(message, messages.Reply):
            future = self._questions.get(message.number)
            if future is not None and not future.done():
                if message.error is None:
                    future.set_result(message.value)
                else:
                    future.set_exception(EngineError(message.error))
        elif isinstance(message, messages.Progress):
            self._progress(message.stage, message.done, message.total)
        elif isinstance(message, messages.Ready):
            self.facts = EngineFacts(**{**message.facts, "eos_ids": tuple(message.facts["eos_ids"])})
            self._ready.set_result(None)
        else:
            self._failure = error_named(message.error, message.message)

    def _hand_out(self, name: str, item: RequestOutput | MooliError, *, is_last: bool) -> None:
        entry = self._open.pop(name) if is_last else self._open.get(name)
        if entry is None:  # dropped
            return
        if isinstance(item, RequestOutput):
            item.rid = entry.request.rid
        try:
            entry.sink(item)
        except BaseException as exc:  # only its request ends
            self.drop([entry.request], "The taker of its output failed.")
            self._open.taker_failed(entry, exc)

    def _end_all(self, error: MooliError) -> None:
        entries = self._open.clear()
        for future in [self._ready, *self._questions.values()]:
            if not future.done():
                future.set_exception(copy_error(error))
                future.exception()  # seen: whoever waited may have gone
        for entry in entries:
            try:
                entry.sink(copy_error(error))
            except BaseException as exc:
                self._open.taker_failed(entry, exc)

    def _stop_process(self) -> int | None:
        """Its exit status; None if it had to be killed here."""
        try:
            return self._process.wait(EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return None


def copy_error(error: MooliError) -> MooliError:
    """One error may end many requests: each raises its own copy, or tracebacks would pile up in it."""
    return type(error)(*error.args)
