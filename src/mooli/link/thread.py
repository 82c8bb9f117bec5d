"""The thread that owns an `EngineCore`: it steps while there is work and sleeps while there is none.

Owns the only thread that touches the core, the commands that reach it, and the promise that every open request ends
exactly once: with its last output, or with an error that says why the engine stopped. Never looks inside a request.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NoReturn, Protocol, TypeVar

from mooli.engine.core import STUCK_S
from mooli.engine.facts import EngineFacts
from mooli.errors import EngineClosedError, EngineDeadError, MooliError
from mooli.link.link import TAKER_FAILED, OpenRequest, Sink, Sinks
from mooli.types import Request, RequestOutput

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 30.0
"""How long `close` waits for the step that is being computed. The thread is a daemon: it never keeps the process."""

T = TypeVar("T")


class Core(Protocol):
    """What the loop needs of an engine core. None of it is called from two threads."""

    def add(self, request: Request) -> None: ...

    def abort(self, rid: str, message: str) -> bool:
        """End with finish reason `abort`: one more output. False, and no output, for a request that is not there."""
        ...

    def finish(self, rid: str, matched: int | str) -> bool:
        """End with finish reason `stop`; otherwise like `abort`."""
        ...

    def answer(self, question: str, **details: Any) -> object:
        """What is asked by `Link.ask`; raises EngineError if it cannot be answered."""
        ...

    @property
    def has_work(self) -> bool: ...

    def step(self) -> list[RequestOutput]: ...


class EngineLoop:
    """Runs `core` on a thread of its own. All methods may be called from any thread.

    on_thread_start is called first on that thread, for backends that bind the thread which calls them.

    A fork copies no thread but the one that forks: in the child nothing would ever answer, and a lock may be held for
    ever. There, what needs an answer raises EngineClosedError at once and everything else does nothing.
    """

    def __init__(self, core: Core, facts: EngineFacts, *, on_thread_start: Callable[[], None] | None = None) -> None:
        self.facts = facts
        self.last_sign_s = time.monotonic()
        self._core = core
        # SimpleQueue.put is reentrant: a finaliser may abort a request in the middle of another put.
        self._commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._sinks = Sinks(lambda name: core.abort(name, TAKER_FAILED))
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, args=(on_thread_start,), name="mooli-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._sinks.error is None and self._is_here

    @property
    def num_open(self) -> int:
        return len(self._sinks)

    @property
    def open_rids(self) -> list[str]:
        return self._sinks.rids if self._is_here else []

    @property
    def error(self) -> MooliError | None:
        return self._sinks.error

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> None:
        """See `Link`. Sinks are called on the engine's thread, so they must be quick and must not call the loop's
        blocking methods."""
        self.check_process()
        with self._sinks.lock:
            entries = self._sinks.named(requests, sinks)
            self._sinks.add(entries)
            self._commands.put(lambda: self._add(entries))

    def abort(self, rids: Iterable[str], reason: str) -> None:
        if not self._is_here:
            return
        with self._sinks.lock:
            names = self._sinks.names(rids)
            self._commands.put(lambda: self._abort(names, reason))

    def drop(self, requests: Iterable[Request], reason: str) -> None:
        for request in requests if self._is_here else ():
            self._sinks.forget(request, lambda name: self._commands.put(lambda: self._core.abort(name, reason)))

    def finish(self, request: Request, matched: str) -> None:
        if self._is_here:
            self._sinks.forget(request, lambda name: self._commands.put(lambda: self._core.finish(name, matched)))

    def name_of(self, rid: str) -> str | None:
        return self._sinks.name_of(rid)

    async def ask(self, question: str, timeout_s: float, **details: Any) -> Any:
        self.check_process()

        def send(number: int) -> None:
            self._commands.put(lambda: self._answer(number, lambda: self._core.answer(question, **details)))

        return await self._sinks.answered(send, question, timeout_s)

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the engine's thread between two steps and return its result.

        Raises what it raises, EngineClosedError or EngineDeadError.
        """
        self.check_process()
        # A queue, as Ctrl-C inside a future's wait can leave its lock taken, and the engine's thread behind it.
        answer: queue.SimpleQueue[tuple[T, Exception | None]] = queue.SimpleQueue()
        number = self._sinks.ask(lambda value, error: answer.put((value, error)))
        self._commands.put(lambda: self._answer(number, function))
        value, error = answer.get()
        if error is not None:
            raise error
        return value

    def wake(self, function: Callable[[], None]) -> None:
        """Have `function` called on the engine's thread between two steps, which wakes it. Never blocks."""
        self._commands.put(function)

    def fail(self, error: EngineDeadError) -> None:
        """End every request with `error`, after the step that is being computed: what computes is broken. A step that
        does not end is not waited for longer than STUCK_S. Called on a thread that may be kept that long."""
        self._commands.put(functools.partial(_raise, error))
        self._thread.join(STUCK_S)
        if self._thread.is_alive():
            logger.error("the step that was being computed does not end")
            self._sinks.end(_death_of(error))

    def close(self) -> bool:
        """End open requests with EngineClosedError and stop the thread. Returns whether it has stopped.

        May be called again, and from the engine's own thread, where a finaliser can end up: it is then not waited for.
        In a forked child there is no thread to stop, and what it works with belongs to the parent: False.
        """
        if not self._is_here:
            return False
        self._commands.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_TIMEOUT_S)
        return not self._thread.is_alive()

    def check_process(self) -> None:
        """Raise EngineClosedError in a process forked from the one that has the engine's thread."""
        if not self._is_here:
            raise EngineClosedError(
                f"this process ({os.getpid()}) was forked from the one the engine runs in ({self._pid}): make an engine"
                " after the fork, or start processes with the 'spawn' method of multiprocessing"
            )

    @property
    def _is_here(self) -> bool:
        return os.getpid() == self._pid

    # -- below here: on the engine's thread --

    def _run(self, on_thread_start: Callable[[], None] | None) -> None:
        error: MooliError = EngineClosedError("the engine has been shut down: make a new one")
        try:
            if on_thread_start is not None:
                on_thread_start()
            while self._take_commands():
                self.last_sign_s = time.monotonic()
                if self._core.has_work:
                    for output in self._core.step():
                        self._sinks.hand_out(output.rid, output)
        except BaseException as exc:
            logger.exception("the engine loop has died")
            error = _death_of(exc)
        self._sinks.end(error)

    def _take_commands(self) -> bool:
        """Carry out what has been asked for; without work, wait for it. False when the loop is to end."""
        while True:
            try:
                command = self._commands.get(block=not self._core.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            self.last_sign_s = time.monotonic()

    def _add(self, entries: Sequence[OpenRequest]) -> None:
        for entry in entries:
            try:
                self._core.add(replace(entry.request, rid=entry.name))
            except MooliError as exc:
                self._sinks.hand_out(entry.name, exc)

    def _abort(self, names: Sequence[str], reason: str) -> None:
        for name in names:
            self._core.abort(name, reason)

    def _answer(self, number: int, function: Callable[[], object]) -> None:
        try:
            value = function()
        except Exception as exc:  # it is raised where the question came from
            self._sinks.answer(number, None, exc)
        else:
            self._sinks.answer(number, value)


def _raise(error: Exception) -> NoReturn:
    raise error


def _death_of(cause: BaseException) -> EngineDeadError:
    """What the open requests are told."""
    if isinstance(cause, EngineDeadError):
        error = EngineDeadError(f"{cause}. Make a new engine.")
    else:
        error = EngineDeadError(f"the engine has died of {type(cause).__name__}: {cause}. Make a new one.")
    error.__cause__ = cause
    return error
