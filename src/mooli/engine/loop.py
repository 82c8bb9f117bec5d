"""The thread that owns an `EngineCore`: it steps while there is work and sleeps while there is none.

Owns the only thread that touches the core, the commands that reach it, and the promise that every open request ends
exactly once: with its last output, or with an error that says why the engine stopped. Never looks inside a request.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from mooli.errors import EngineClosedError, EngineDeadError, MooliError, RequestError
from mooli.types import Request, RequestOutput

logger = logging.getLogger(__name__)

Sink = Callable[["RequestOutput | MooliError"], None]
"""Takes what happens to one request. Called on the engine's thread, so it must be quick and must not call the loop's
blocking methods. An error, or an output with `finish`, is the last thing it gets."""

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
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Reentrant for the same reason.
        self._lock = threading.RLock()
        self._sinks: dict[str, Sink] = {}
        self._calls: set[concurrent.futures.Future[Any]] = set()
        self._unheard: collections.Counter[str] = collections.Counter()
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
        return len(self._sinks)

    @property
    def num_unheard(self) -> int:
        """Requests that were dropped and whose last output is still to come."""
        return len(self._unheard)

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> None:
        """Start requests, all in the same step if there is room.

        Raises RequestError if an id is in use by an open request, EngineClosedError or EngineDeadError.
        """
        self.check_process()
        with self._lock:
            self._check_alive()
            for request in requests:
                if request.rid in self._sinks:
                    raise RequestError(f"rid {request.rid!r} belongs to a request that is still running: use another")
            self._sinks.update((request.rid, sink) for request, sink in zip(requests, sinks, strict=True))
            self._commands.put(lambda: self._add(requests))

    def abort(self, rids: Iterable[str]) -> None:
        """End requests early. Their sinks get an output with finish reason `abort`. Unknown ids are ignored."""
        names = list(rids)
        self._commands.put(lambda: self._abort(names))

    def drop(self, rids: Iterable[str]) -> None:
        """Like `abort` for requests whose sinks want nothing more. Never blocks; finalisers may call it."""
        self._forget(dict.fromkeys(rids, self._core.abort))

    def finish(self, matched: Mapping[str, str]) -> None:
        """The text side has ended these requests: rid to stop string. Their sinks want nothing more. Never blocks."""
        self._forget({rid: functools.partial(self._core.finish, matched=text) for rid, text in matched.items()})

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the engine's thread between two steps and return its result.

        Raises what it raises, EngineClosedError or EngineDeadError.
        """
        self.check_process()
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as exc:  # it is raised in the caller's thread
                future.set_exception(exc)

        with self._lock:
            self._check_alive()
            self._calls.add(future)
            self._commands.put(run)
        try:
            return future.result()
        finally:
            with self._lock:
                self._calls.discard(future)

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

    def _forget(self, ends: Mapping[str, Callable[[str], bool]]) -> None:
        if not self._is_here:
            return
        # The sinks go now, so that the ids can be used again at once; the core ends the requests after its step.
        with self._lock:
            known = {rid: end for rid, end in ends.items() if self._sinks.pop(rid, None) is not None}
        if known:
            self._commands.put(lambda: self._end_unheard(known))

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

    def _add(self, requests: Sequence[Request]) -> None:
        for request in requests:
            try:
                self._core.add(request)
            except MooliError as exc:
                self._send(request.rid, exc)

    def _abort(self, rids: Sequence[str]) -> None:
        for rid in rids:
            self._core.abort(rid)

    def _end_unheard(self, ends: Mapping[str, Callable[[str], bool]]) -> None:
        """End requests nobody listens to. Their last output is still to come, and must not reach a later request that
        has the same id."""
        for rid, end in ends.items():
            if end(rid):
                self._unheard[rid] += 1

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            self._send(output.rid, output)

    def _send(self, rid: str, item: RequestOutput | MooliError) -> None:
        is_last = isinstance(item, MooliError) or item.finish is not None
        if rid in self._unheard:
            self._unheard[rid] -= is_last
            if not self._unheard[rid]:
                del self._unheard[rid]
            return
        with self._lock:
            sink = self._sinks.pop(rid, None) if is_last else self._sinks.get(rid)
        if sink is None:
            return
        try:
            sink(item)
        except Exception:
            # The taker is gone, an event loop that was closed for example. Only its request ends.
            logger.warning("request %s is aborted: its taker failed", rid, exc_info=True)
            if not is_last:
                with self._lock:
                    self._sinks.pop(rid, None)
                self._end_unheard({rid: self._core.abort})

    def _end(self, error: MooliError) -> None:
        with self._lock:
            self._error = error
            sinks, self._sinks = self._sinks, {}
            calls = [future for future in self._calls if not future.done()]
        for future in calls:
            future.set_exception(error)
        for sink in sinks.values():
            try:
                sink(error)
            except Exception:
                logger.warning("a taker failed at the end of the engine", exc_info=True)


def _raise(error: EngineDeadError) -> None:
    raise error


def _death_of(cause: BaseException) -> EngineDeadError:
    """What the open requests are told."""
    if isinstance(cause, EngineDeadError):
        error = EngineDeadError(f"{cause}. Make a new engine.")
    else:
        error = EngineDeadError(f"the engine has died of {type(cause).__name__}: {cause}. Make a new one.")
    error.__cause__ = cause
    return error
