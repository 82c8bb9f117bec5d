"""One call of `generate`: its requests on a link to an engine, and the ways to wait for what comes of them.

Owns that text is brought up to date as outputs come, that a stop string ends its request, that a text which cannot be
made ends its own request only, and that requests nobody waits for any more are aborted: when a call or an iterator is
closed or collected, a task is cancelled, or an exception passes through. Never knows what an answer looks like.

`asyncio` is imported inside functions: who uses it has it already, and for others it is a tenth of what is imported.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mooli.errors import MooliError
from mooli.frontend.generation import Generation
from mooli.frontend.native_answer import NativeAnswer
from mooli.link.link import Link, Sink
from mooli.logs import FirstTimes
from mooli.types import RequestOutput

if TYPE_CHECKING:
    import asyncio

logger = logging.getLogger(__name__)

LEFT = "Nobody waits for the answer any more."

CallT = TypeVar("CallT", bound="Call")

_Item = tuple[int, "RequestOutput | MooliError"]


class Listener:
    """Hears of a call's requests. What it raises is said once, and never ends a request."""

    def started(self, generation: Generation) -> None:
        """It is on its way to the engine."""

    def grew(self, generation: Generation, num_tokens: int, elapsed_s: float) -> None:
        """It has `num_tokens` more, so long after the call began."""

    def finished(self, generation: Generation, elapsed_s: float) -> None:
        """It has ended, or without a `finish` nobody waits for it any more."""


class Call:
    """The requests of one call, submitted when it is made; `generations` hold the text and all else there is of each.

    Made and read where the link calls its sinks; `MailedCall` is for other threads. As a context manager: leaving it
    aborts what is not finished.

    no_text: what is said of a text that could not be made; by default why. failures: of texts and listeners, so that
    each kind is logged in full once.
    """

    def __init__(
        self,
        link: Link,
        generations: list[Generation],
        *,
        listeners: Sequence[Listener] = (),
        no_text: str = "",
        failures: FirstTimes | None = None,
    ) -> None:
        self.generations = generations
        self._link = link
        self._listeners = listeners
        self._no_text = no_text
        self._failures = failures or FirstTimes()
        self._open = set(range(len(generations)))
        self._changed: set[int] = set()
        self._error: MooliError | None = None
        self._wake: Callable[[], None] = lambda: None
        self._started_s = time.perf_counter()
        requests = [generation.request for generation in generations]
        try:
            link.submit(requests, [self._sink(index) for index in range(len(generations))])
        except BaseException:  # Ctrl-C, when they had begun
            self._open = set()
            link.drop(requests, LEFT)
            raise
        for generation in generations:
            self._tell(operator.methodcaller("started", generation))

    @property
    def is_done(self) -> bool:
        return not self._open

    def changed(self) -> list[int]:
        """Indices of the generations that changed since they were last asked for. Raises what ended the whole call,
        EngineDeadError for example, after aborting what is left of it."""
        if self._error is not None:
            self.close()
            raise self._error
        changed, self._changed = sorted(self._changed), set()
        return changed

    async def changes(self) -> AsyncIterator[list[int]]:
        """What `changed` returns, whenever there is something, until all have ended. A slow reader gets fewer, larger
        changes. Raises like `changed`."""
        import asyncio

        event = asyncio.Event()
        self._wake = event.set
        while True:
            event.clear()
            changed = self.changed()
            if changed:
                yield changed
            elif self.is_done:
                return
            else:
                await event.wait()

    async def wait(self) -> None:
        """Until all have ended. Raises like `changed`; a single request that failed raises what it failed of."""
        async for _ in self.changes():
            pass
        self.raise_if_failed()

    def raise_if_failed(self) -> None:
        """Raise what a single request failed of. Of several, the others' answers are worth more than an exception:
        there, finish_reason tells."""
        if len(self.generations) == 1:
            self.generations[0].raise_if_failed()

    def close(self, reason: str = LEFT) -> None:
        """Abort what is not finished; what was computed of it stays in the cache. May be called at any time, from a
        finaliser too."""
        if self._open:
            left = sorted(self._open)  # at once: the thread that reads may take from it
            self._link.drop([self.generations[index].request for index in left], reason)
            self._open = set()
            for index in left:
                self._finished(self.generations[index])

    def __enter__(self: CallT) -> CallT:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sink(self, index: int) -> Sink:
        return functools.partial(self._take, index)

    def _take(self, index: int, item: RequestOutput | MooliError) -> None:
        if index not in self._open:
            return
        generation = self.generations[index]
        if isinstance(item, MooliError):
            self._error = self._error or item
        else:
            num_before = len(generation.output_ids)
            stop_string = self._update(generation, item)
            if stop_string is not None:
                self._link.finish(generation.request, stop_string)
            num_new = len(generation.output_ids) - num_before
            if num_new:
                elapsed_s = time.perf_counter() - self._started_s
                self._tell(lambda listener: listener.grew(generation, num_new, elapsed_s))
        if isinstance(item, MooliError) or generation.finish is not None:
            self._open.discard(index)
            self._finished(generation)
        self._changed.add(index)
        self._wake()

    def _update(self, generation: Generation, output: RequestOutput) -> str | None:
        """The stop string that has ended the text, if one has."""
        try:
            return generation.update(output)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as exc:  # what a panic of the tokenizer's library raises is no Exception
            words = f"{type(exc).__name__}: {exc}"
            shown = exc if self._failures.is_first("text", exc) else None
            logger.error("request %s ends here, as its text cannot be made: %s", generation.rid, words, exc_info=shown)
            told = self._no_text or f"its text could not be made: {words}"
            generation.fail(told, exc)
            self._link.drop([generation.request], told)
            return None

    def _finished(self, generation: Generation) -> None:
        elapsed_s = time.perf_counter() - self._started_s
        self._tell(lambda listener: listener.finished(generation, elapsed_s))

    def _tell(self, event: Callable[[Listener], None]) -> None:
        for listener in self._listeners:
            try:
                event(listener)
            except Exception as exc:
                if self._failures.is_first("metrics", exc):
                    logger.error("metrics or request log failed; requests go on, and this is said once", exc_info=exc)


class Mailbox:
    """Outputs on their way to one reader. `put` may be called from any thread; `wake` is called when it was empty."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._items: list[_Item] = []

    def put(self, index: int, item: RequestOutput | MooliError) -> None:
        with self._lock:
            was_empty = not self._items
            self._items.append((index, item))
        if was_empty:
            self._wake()

    def take(self) -> list[_Item]:
        """Everything that has come, oldest first."""
        with self._lock:
            items, self._items = self._items, []
        return items


class Bell:
    """What a thread waits for; `ring` may be called from any. One lock and no more: Ctrl-C inside the wait of an
    `Event` can leave its lock taken, and the engine's thread would wait for that."""

    def __init__(self) -> None:
        self._silent = threading.Lock()
        self._silent.acquire()

    def ring(self) -> None:
        with contextlib.suppress(RuntimeError):  # it rings already
            self._silent.release()

    def wait(self) -> None:
        """Until it has rung since the last wait."""
        self._silent.acquire()


class MailedCall(Call):
    """A call that is read on another thread than the link's: outputs wait in a mailbox until `changed` takes them.

    wake: tells the reader, on any thread, that there is something to take. A call that is collected aborts what is not
    finished.
    """

    def __init__(self, link: Link, answers: Sequence[NativeAnswer], wake: Callable[[], None]) -> None:
        self._answers = answers
        self._mailbox = Mailbox(wake)
        super().__init__(link, [answer.generation for answer in answers])

    def changed(self) -> list[int]:
        try:
            self.check_process()
            for index, item in self._mailbox.take():
                self._take(index, item)
            return super().changed()
        except BaseException:
            self.close()
            raise

    def check_process(self) -> None:
        """Raise EngineClosedError where nothing will ever come: in a child that was forked meanwhile."""
        self._link.check_process()

    def chunks(self) -> list[dict[str, Any]]:
        """The chunks of a stream that have become due."""
        changed = [self._answers[index] for index in self.changed()]
        return [chunk for answer in changed if (chunk := answer.chunk()) is not None]

    def results(self) -> list[dict[str, Any]]:
        """The whole answers, once `is_done`."""
        self.raise_if_failed()
        return [answer.result() for answer in self._answers]

    def _sink(self, index: int) -> Sink:
        return functools.partial(self._mailbox.put, index)

    def __del__(self) -> None:
        self.close()


def run(link: Link, answers: Sequence[NativeAnswer]) -> list[dict[str, Any]]:
    """Submit and wait for all answers. Any thread; a running event loop in it is simply blocked."""
    bell = Bell()
    with MailedCall(link, answers, bell.ring) as call:
        while not call.is_done:
            bell.wait()
            call.changed()
        return call.results()


async def run_async(link: Link, answers: Sequence[NativeAnswer]) -> list[dict[str, Any]]:
    """`run` without blocking the event loop; cancelling the task aborts the requests."""
    import asyncio

    event = asyncio.Event()
    with MailedCall(link, answers, _waker(event)) as call:
        while not call.is_done:
            await event.wait()
            event.clear()
            call.changed()
        return call.results()


class _Stream:
    """What both iterators share: the chunks not handed out yet, and closing."""

    def __init__(self, call: MailedCall, owner: object) -> None:
        """`owner` is kept alive for as long as there is a reader: it ends its requests when it is collected."""
        self._call = call
        self._owner = owner
        self._ready: list[dict[str, Any]] = []

    def _next_ready(self) -> dict[str, Any] | None:
        if not self._ready and not self._call.is_done:
            self._ready = self._call.chunks()
        ready = self._ready  # which another thread may close
        return ready.pop(0) if ready else None

    def close(self) -> None:
        """Stop here: abort what is not finished. Nothing further is yielded."""
        self._ready = []
        self._call.close()


class Stream(_Stream):
    """Iterator over chunks. Closing it, dropping it, or an exception while it waits (Ctrl-C, a notebook's Stop) aborts
    the requests: the traceback would keep the iterator for as long as anybody keeps the traceback."""

    def __init__(self, call: MailedCall, bell: Bell, owner: object) -> None:
        super().__init__(call, owner)
        self._bell = bell

    def __iter__(self) -> Stream:
        return self

    def close(self) -> None:
        """Stop here, on any thread: one that waits for a chunk is told that there are no more."""
        super().close()
        self._bell.ring()

    def __next__(self) -> dict[str, Any]:
        try:
            # First of all: in a forked child nothing else must be touched.
            self._call.check_process()
            while True:
                chunk = self._next_ready()
                if chunk is not None:
                    return chunk
                if self._call.is_done:
                    break
                self._bell.wait()
        except BaseException:
            self.close()
            raise
        raise StopIteration


class AsyncStream(_Stream):
    """Asynchronous iterator over chunks. Closing it, cancelling the task that waits, or dropping it aborts."""

    def __init__(self, call: MailedCall, event: asyncio.Event, owner: object) -> None:
        super().__init__(call, owner)
        self._event = event

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> dict[str, Any]:
        try:
            while True:
                self._event.clear()
                chunk = self._next_ready()
                if chunk is not None:
                    return chunk
                if self._call.is_done:
                    break
                await self._event.wait()
        except BaseException:  # the task was cancelled
            self.close()
            raise
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.close()


def stream_sync(link: Link, answers: Sequence[NativeAnswer], owner: object) -> Stream:
    """Submit now; the iterator hands out chunks as they come, and keeps `owner` alive."""
    bell = Bell()
    call = MailedCall(link, answers, bell.ring)
    try:
        return Stream(call, bell, owner)
    except BaseException:  # Ctrl-C: a traceback keeps the call
        call.close()
        raise


def stream_async(link: Link, answers: Sequence[NativeAnswer], owner: object) -> AsyncStream:
    """`stream_sync` for the running event loop."""
    import asyncio

    event = asyncio.Event()
    return AsyncStream(MailedCall(link, answers, _waker(event)), event, owner)


def _waker(event: asyncio.Event) -> Callable[[], None]:
    """Sets `event` from another thread."""
    import asyncio

    call_soon = asyncio.get_running_loop().call_soon_threadsafe

    def wake() -> None:
        call_soon(event.set)

    return wake
