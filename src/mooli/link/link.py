"""One link to an engine: what can be asked of it, and the table of those who are to be told.

Owns `Link`, which whoever wants answers holds, and the promise under each implementation: a sink hears of its own
request only, and of its end exactly once, whatever raises. In the engine a request has a name that never comes again,
so nothing that is still on its way, an output or an end, can meet a later request of the same id. Never knows where the
engine runs.

`asyncio` is imported inside functions: who uses it has it already, and for others it is a tenth of what is imported.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mooli.engine.facts import EngineFacts
from mooli.errors import EngineError, MooliError, RequestError
from mooli.logs import FirstTimes
from mooli.types import Request, RequestOutput

logger = logging.getLogger(__name__)

TAKER_FAILED = "The taker of its output failed."

Sink = Callable[["RequestOutput | MooliError"], None]
"""Takes what happens to one request. An error, or an output with `finish`, is the last thing it gets. One that raises
is given an EngineError, and nothing more."""

AnswerSink = Callable[[Any, "Exception | None"], None]
"""Takes the answer to one question, or what was raised instead of it. It must not raise."""


class Link(Protocol):
    """A way to an engine, on a thread or in another process; where sinks are called is the implementation's to say.

    How an engine starts and ends is between it and who owns it; then all that is open hears of the end.
    """

    @property
    def facts(self) -> EngineFacts:
        """What building the engine settled."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether requests can be submitted."""
        ...

    @property
    def num_open(self) -> int:
        """Requests submitted whose sinks have not heard of their end."""
        ...

    @property
    def open_rids(self) -> list[str]: ...

    @property
    def last_sign_s(self) -> float:
        """When the engine last said anything, by `time.monotonic`."""
        ...

    @property
    def error(self) -> MooliError | None:
        """Why nothing can be submitted any more, as far as it is known yet."""
        ...

    def check_process(self) -> None:
        """Raise EngineClosedError in a process where nothing will ever come: one forked from that of the link."""
        ...

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> None:
        """Start requests, all in the same step if there is room.

        Raises RequestError if an id is in use by an open request or it is too much at once, EngineClosedError or
        EngineDeadError. After any other exception, Ctrl-C for one, some may have begun: `drop` ends them.
        """
        ...

    def abort(self, rids: Iterable[str], reason: str) -> None:
        """End requests early. Their sinks get an output with finish reason `abort`. Unknown ids are ignored."""
        ...

    def drop(self, requests: Iterable[Request], reason: str) -> None:
        """Like `abort` for requests whose sinks want nothing more, and whose ids can be used again at once. Never
        blocks; finalisers may call it."""
        ...

    def finish(self, request: Request, matched: str) -> None:
        """The text side has ended this request, at a stop string. Otherwise like `drop`."""
        ...

    def name_of(self, rid: str) -> str | None:
        """How answers to questions call an open request; None for one that is not open."""
        ...

    async def ask(self, question: str, timeout_s: float, **details: Any) -> Any:
        """One of `EngineCore.answer`'s questions with its details, answered between two steps.

        Raises EngineError if it cannot be answered, EngineClosedError, EngineDeadError, or TimeoutError.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class OpenRequest:
    """name: of this submission in the engine."""

    name: str
    request: Request
    sink: Sink


class Sinks:
    """Who is to be told of open requests, by id as callers know them and by name as the engine does, and of questions.

    end: ends a request in the engine, by name; one that has ended there is ignored. `lock` is reentrant, as a finaliser
    may come in the middle of anything; who must have two things done together holds it.
    """

    def __init__(self, end: Callable[[str], object]) -> None:
        self.lock = threading.RLock()
        self.error: MooliError | None = None
        """Why everything has ended."""
        self._end = end
        self._numbers = itertools.count()
        self._by_rid: dict[str, OpenRequest] = {}
        self._by_name: dict[str, OpenRequest] = {}
        self._questions: dict[int, AnswerSink] = {}
        self._failures = FirstTimes()

    def __len__(self) -> int:
        return len(self._by_rid)

    @property
    def rids(self) -> list[str]:
        with self.lock:
            return list(self._by_rid)

    def check_open(self) -> None:
        """Raise what has ended everything, if something has."""
        if self.error is not None:
            raise copy_error(self.error)

    # -- requests --
    def named(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[OpenRequest]:
        """Requests with their names, which are not open before `add`. Raises what has ended everything, or RequestError
        if an id belongs to a request that is open."""
        with self.lock:
            self.check_open()
            for request in requests:
                if request.rid in self._by_rid:
                    raise RequestError(
                        f"rid {request.rid!r} belongs to a request that is still running: use another", argument="rid"
                    )
            return [OpenRequest(str(next(self._numbers)), *pair) for pair in zip(requests, sinks, strict=True)]

    def add(self, entries: Sequence[OpenRequest]) -> None:
        with self.lock:
            for entry in entries:
                self._by_rid[entry.request.rid] = self._by_name[entry.name] = entry

    def names(self, rids: Iterable[str]) -> list[str]:
        """Of those that are open."""
        with self.lock:
            return [self._by_rid[rid].name for rid in rids if rid in self._by_rid]

    def name_of(self, rid: str) -> str | None:
        """Of one that is open."""
        entry = self._by_rid.get(rid)
        return None if entry is None else entry.name

    def forget(self, request: Request, tell: Callable[[str], None]) -> None:
        """`tell` the engine of the end of this very request, not of another with its id, and take its sink away; what
        still comes about it reaches nobody. Does nothing for one that has ended."""
        with self.lock:
            entry = self._by_rid.get(request.rid)
        if entry is not None and entry.request is request:
            # First of all: what Ctrl-C leaves undone here can be asked for again.
            tell(entry.name)
            self._pop(entry.name)

    def hand_out(self, name: str, item: RequestOutput | MooliError) -> None:
        """Give its sink what has come of a request; a sink that raises ends its own request and no other."""
        is_last = isinstance(item, MooliError) or item.finish is not None
        entry = self._pop(name) if is_last else self._by_name.get(name)
        if entry is None:  # dropped
            return
        if isinstance(item, RequestOutput):
            item.rid = entry.request.rid
        try:
            entry.sink(item)
        except BaseException as exc:
            if self._pop(name) is not None:
                self._end(name)
            self._sink_failed(entry, exc)

    def _pop(self, name: str) -> OpenRequest | None:
        """It has ended. None if it was not open any more."""
        with self.lock:
            entry = self._by_name.pop(name, None)
            if entry is not None and self._by_rid.get(entry.request.rid) is entry:
                del self._by_rid[entry.request.rid]
            return entry

    def _sink_failed(self, entry: OpenRequest, error: BaseException) -> None:
        """It has raised `error`: say so, and tell it that its request, which is not open any more, ended with that."""
        rid, words = entry.request.rid, f"{type(error).__name__}: {error}"
        shown = error if self._failures.is_first("a taker", error) else None
        logger.warning("request %s ends here, as its taker failed: %s", rid, words, exc_info=shown)
        try:
            entry.sink(EngineError(f"request {rid} ended early: what takes its output failed with {words}"))
        except BaseException:  # an event loop that was closed, for example: nobody is there
            logger.debug("the taker of request %s could not be told", rid, exc_info=True)

    # -- questions --
    def ask(self, sink: AnswerSink) -> int:
        """The number by which `sink` gets its answer. Raises what has ended everything."""
        with self.lock:
            self.check_open()
            number = next(self._numbers)
            self._questions[number] = sink
            return number

    def answer(self, number: int, value: Any, error: Exception | None = None) -> None:
        """Does nothing for a question that nobody waits for any more."""
        with self.lock:
            sink = self._questions.pop(number, None)
        if sink is not None:
            sink(value, error)

    async def answered(self, send: Callable[[int], None], question: str, timeout_s: float) -> Any:
        """What comes for the question that `send` sends with its number. Raises like `Link.ask`."""
        import asyncio

        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(value: Any, error: Exception | None) -> None:
            if future.done():  # nobody waits any more
                return
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)

        def tell(value: Any, error: Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended, and who asked with it
                loop.call_soon_threadsafe(settle, value, error)

        number = self.ask(tell)
        try:
            send(number)
            return await asyncio.wait_for(future, timeout_s)
        except asyncio.TimeoutError:
            raise TimeoutError(f"the engine has not answered {question!r} within {timeout_s:g} s") from None
        finally:
            with self.lock:
                self._questions.pop(number, None)

    # -- the end --
    def end(self, error: MooliError) -> None:
        """Tell all of `error`, each a copy of its own. Nothing more is taken in."""
        with self.lock:
            self.error = error
            entries, questions = list(self._by_rid.values()), list(self._questions.values())
            self._by_rid, self._by_name, self._questions = {}, {}, {}
        for tell in questions:
            tell(None, copy_error(error))
        for entry in entries:
            try:
                entry.sink(copy_error(error))
            except BaseException as exc:
                self._sink_failed(entry, exc)


def copy_error(error: MooliError) -> MooliError:
    """One error may end many requests: each raises its own copy, or tracebacks would pile up in it."""
    copied = type(error)(*error.args)
    copied.__cause__ = error.__cause__
    return copied
