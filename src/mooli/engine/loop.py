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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NoReturn, Protocol, TypeVar

from mooli.engine.open_requests import OpenRequest, OpenRequests, Sink
from mooli.errors import EngineClosedError, EngineDeadError, MooliError
from mooli.types import Request, RequestOutput

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 30.0
"""How long `close` waits for the step that is being computed. The thread is a daemon: it never keeps the process."""

STUCK_S = 30.0
"""How long a step may still take after the engine has failed."""

T = TypeVar("T")


class Core(Protocol):
    """What the loop needs of an engine core. None of it is called from two threads."""

    def add(self, request: Request) -> None: ...

    def abort(self, rid: str) -> bool:
        """End with finish reason `abort`: one more output. False, and no output, for a request that is not there."""
        ...

    def finish(self, rid: str, matched: int | str) -> bool:
        """End with finish reason `stop`; otherwise like `abort`."""
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

    def __init__(self, core: Core, *, on_thread_start: Callable[[], None] | None = None) -> None:
        self._core = core
        # SimpleQueue.put is reentrant: a finaliser may abort a request in the middle of another put.
        self._commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        # Reentrant for the same reason.
        self._lock = threading.RLock()
        self._open = OpenRequests()
        # Queues, as Ctrl-C inside a future's wait can leave its lock taken, and the engine's thread behind it.
        self._calls: set[queue.SimpleQueue[Callable[[], Any]]] = set()
        self._error: MooliError | None = None
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, args=(on_thread_start,), name="mooli-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests can still be submitted."""
        return self._error is None and self._is_here

    @property
    def num_open(self) -> int:
        """Requests submitted and not ended."""
        return len(self._open)

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> None:
        """Start requests, all in the same step if there is room. Sinks are called on the engine's thread, so they must
        be quick and must not call the loop's blocking methods.

        Raises RequestError if an id is in use by an open request, EngineClosedError or EngineDeadError. After any
        other exception, Ctrl-C for one, some may have begun: `drop` ends them.
        """
        self.check_process()
        with self._lock:
            self._check_alive()
            self._open.check_free(requests)
            entries = self._open.named(requests, sinks)
            self._open.add(entries)
            self._commands.put(lambda: self._add(entries))

    def abort(self, rids: Iterable[str]) -> None:
        """End requests early. Their sinks get an output with finish reason `abort`. Unknown ids are ignored."""
        if not self._is_here:
            return
        with self._lock:
            names = self._open.names(rids)
            self._commands.put(lambda: self._abort(names))

    def drop(self, requests: Iterable[Request]) -> None:
        """Like `abort` for requests whose sinks want nothing more. Never blocks; finalisers may call it."""
        self._forget([(request, self._core.abort) for request in requests])

    def finish(self, matched: Iterable[tuple[Request, str]]) -> None:
        """The text side has ended these requests, each at a stop string. Their sinks want nothing more. Never
        blocks."""
        self._forget([(request, functools.partial(self._core.finish, matched=text)) for request, text in matched])

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the engine's thread between two steps and return its result.

        Raises what it raises, EngineClosedError or EngineDeadError.
        """
        self.check_process()
        answer: queue.SimpleQueue[Callable[[], T]] = queue.SimpleQueue()

        def run() -> None:
            try:
                value = function()
            except Exception as exc:  # it is raised in the caller's thread
                answer.put(functools.partial(_raise, exc))
            else:
                answer.put(lambda: value)

        with self._lock:
            self._check_alive()
            self._calls.add(answer)
            self._commands.put(run)
        try:
            return answer.get()()
        finally:
            with self._lock:
                self._calls.discard(answer)

    def fail(self, error: EngineDeadError) -> None:
        """End every request with `error`, after the step that is being computed: what computes is broken. A step that
        does not end is not waited for longer than STUCK_S. Called on a thread that may be kept that long."""
        self._commands.put(functools.partial(_raise, error))
        self._thread.join(STUCK_S)
        if self._thread.is_alive():
            logger.error("the step that was being computed does not end")
            self._end(_death_of(error))

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

    def _forget(self, ends: Sequence[tuple[Request, Callable[[str], object]]]) -> None:
        """Their ids can be used again at once; the core ends them after its step."""
        if not self._is_here:
            return
        for request, end in ends:
            with self._lock:
                name = self._open.name_of(request)
            if name is not None:
                # The command first: what Ctrl-C leaves undone here can be asked for again.
                self._commands.put(functools.partial(end, name))
                with self._lock:
                    self._open.pop(name)

    def _check_alive(self) -> None:
        if isinstance(self._error, EngineDeadError):
            raise EngineDeadError(str(self._error)) from self._error.__cause__
        if self._error is not None:
            raise EngineClosedError(str(self._error))

    # -- below here: on the engine's thread --

    def _run(self, on_thread_start: Callable[[], None] | None) -> None:
        error: MooliError = EngineClosedError("the engine has been shut down: make a new one")
        try:
            if on_thread_start is not None:
                on_thread_start()
            while self._take_commands():
                if self._core.has_work:
                    self._deliver(self._core.step())
        except BaseException as exc:
            logger.exception("the engine loop has died")
            error = _death_of(exc)
        self._end(error)

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

    def _add(self, entries: Sequence[OpenRequest]) -> None:
        for entry in entries:
            try:
                self._core.add(replace(entry.request, rid=entry.name))
            except MooliError as exc:
                self._send(entry.name, exc, is_last=True)

    def _abort(self, names: Sequence[str]) -> None:
        for name in names:
            self._core.abort(name)

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            self._send(output.rid, output, is_last=output.finish is not None)

    def _send(self, name: str, item: RequestOutput | MooliError, *, is_last: bool) -> None:
        with self._lock:
            entry = self._open.pop(name) if is_last else self._open.get(name)
        if entry is None:  # dropped
            return
        if isinstance(item, RequestOutput):
            item.rid = entry.request.rid
        try:
            entry.sink(item)
        except BaseException as exc:  # only its request ends
            with self._lock:
                self._open.pop(name)
            self._core.abort(name)
            self._open.taker_failed(entry, exc)

    def _end(self, error: MooliError) -> None:
        with self._lock:
            self._error = error
            entries = self._open.clear()
            calls = list(self._calls)
        for answer in calls:
            answer.put(functools.partial(_raise, error))
        for entry in entries:
            try:
                entry.sink(error)
            except BaseException as exc:
                self._open.taker_failed(entry, exc)


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
