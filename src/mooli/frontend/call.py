"""One call of `generate`: its requests, the mailbox their outputs come to, and the iterators over them.

Owns the hand-over from the engine's thread to the caller, and that requests nobody waits for any more are aborted: when
an iterator is closed or collected, a task is cancelled, or an exception passes through. Synchronous and asynchronous
callers share everything but how they wait.

`asyncio` is imported inside functions: who uses it has it already, and for others it is a tenth of what is imported.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mooli.engine.loop import EngineLoop
from mooli.errors import MooliError
from mooli.frontend.generation import Generation
from mooli.logs import FirstTimes
from mooli.types import Request, RequestOutput

if TYPE_CHECKING:
    import asyncio

logger = logging.getLogger(__name__)

_Item = tuple[int, "RequestOutput | MooliError"]


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


class Call:
    """The requests of one call, submitted when it is made. `wake` tells the reader that there is something to take.

    A call that is collected aborts what is not finished.
    """

    def __init__(self, loop: EngineLoop, generations: Sequence[Generation], wake: Callable[[], None]) -> None:
        self._open = set(range(len(generations)))
        self._loop = loop
        self._generations = generations
        self._mailbox = Mailbox(wake)
        self._failures = FirstTimes()
        sinks = [functools.partial(self._mailbox.put, index) for index in self._open]
        try:
            loop.submit([generation.request for generation in generations], sinks)
        except BaseException:  # Ctrl-C, when they had begun
            self.close()
            raise

    @property
    def is_done(self) -> bool:
        return not self._open

    def advance(self) -> list[Generation]:
        """Bring text up to date with what has come; the generations that changed, in order.

        Raises what ended the whole call, after aborting what is left of it.
        """
        changed: set[int] = set()
        stopped: list[tuple[Request, str]] = []
        self.check_process()
        try:
            for index, item in self._mailbox.take():
                generation = self._generations[index]
                if isinstance(item, MooliError):
                    # One error may end many calls: each raises its own copy, or tracebacks would pile up in it.
                    raise type(item)(*item.args) from item.__cause__
                stop_string = self._update(generation, item)
                if stop_string is not None:
                    stopped.append((generation.request, stop_string))
                changed.add(index)
            if stopped:
                self._loop.finish(stopped)
            self._open.difference_update([index for index in changed if self._generations[index].finish is not None])
        except BaseException:
            self.close()
            raise
        return [self._generations[index] for index in sorted(changed)]

    def _update(self, generation: Generation, output: RequestOutput) -> str | None:
        """The stop string that has ended the text, if one has. A text that cannot be made ends its own request only."""
        try:
            return generation.update(output)
        except Exception as exc:
            words = f"its text could not be made: {type(exc).__name__}: {exc}"
            shown = exc if self._failures.is_first("text", exc) else None
            logger.error("request %s ends here: %s", generation.rid, words, exc_info=shown)
            generation.fail(words, exc)
            self._loop.drop([generation.request])
            return None

    def check_process(self) -> None:
        """Raise EngineClosedError where nothing will ever come: in a child that was forked meanwhile."""
        self._loop.check_process()

    def chunks(self) -> list[dict[str, Any]]:
        """The chunks of a stream that have become due."""
        return [generation.chunk() for generation in self.advance() if generation.is_due()]

    def results(self) -> list[dict[str, Any]]:
        """The whole answers, once `is_done`."""
        if len(self._generations) == 1:
            # Of several, the others' answers are worth more than an exception: there, finish_reason tells.
            self._generations[0].raise_if_failed()
        return [generation.result() for generation in self._generations]

    def close(self) -> None:
        """Abort what is not finished. May be called at any time, from a finaliser too."""
        if self._open:
            self._loop.drop([self._generations[index].request for index in self._open])
            self._open = set()

    def __del__(self) -> None:
        self.close()


def run(loop: EngineLoop, generations: Sequence[Generation]) -> list[dict[str, Any]]:
    """Submit and wait for all answers. Any thread; a running event loop in it is simply blocked."""
    bell = Bell()
    call = Call(loop, generations, bell.ring)
    try:
        while not call.is_done:
            bell.wait()
            call.advance()
        return call.results()
    finally:
        call.close()


async def run_async(loop: EngineLoop, generations: Sequence[Generation]) -> list[dict[str, Any]]:
    """`run` without blocking the event loop; cancelling the task aborts the requests."""
    import asyncio

    event = asyncio.Event()
    call = Call(loop, generations, _waker(event))
    try:
        while not call.is_done:
            await event.wait()
            event.clear()
            call.advance()
        return call.results()
    finally:
        call.close()


class _Stream:
    """What both iterators share: the chunks not handed out yet, and closing."""

    def __init__(self, call: Call, owner: object) -> None:
        """`owner` is kept alive for as long as there is a reader: it ends its requests when it is collected."""
        self._call = call
        self._owner = owner
        self._ready: list[dict[str, Any]] = []

    def _next_ready(self) -> dict[str, Any] | None:
        if not self._ready and not self._call.is_done:
            self._ready = self._call.chunks()
        return self._ready.pop(0) if self._ready else None

    def close(self) -> None:
        """Stop here: abort what is not finished. Nothing further is yielded."""
        self._ready = []
        self._call.close()


class Stream(_Stream):
    """Iterator over chunks. Closing it, dropping it, or an exception while it waits (Ctrl-C, a notebook's Stop) aborts
    the requests: the traceback would keep the iterator for as long as anybody keeps the traceback."""

    def __init__(self, call: Call, bell: Bell, owner: object) -> None:
        super().__init__(call, owner)
        self._bell = bell

    def __iter__(self) -> Stream:
        return self

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

    def __init__(self, call: Call, event: asyncio.Event, owner: object) -> None:
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


def stream_sync(loop: EngineLoop, generations: Sequence[Generation], owner: object) -> Stream:
    """Submit now; the iterator hands out chunks as they come, and keeps `owner` alive."""
    bell = Bell()
    call = Call(loop, generations, bell.ring)
    try:
        return Stream(call, bell, owner)
    except BaseException:  # Ctrl-C: a traceback keeps the call
        call.close()
        raise


def stream_async(loop: EngineLoop, generations: Sequence[Generation], owner: object) -> AsyncStream:
    """`stream_sync` for the running event loop."""
    import asyncio

    event = asyncio.Event()
    return AsyncStream(Call(loop, generations, _waker(event)), event, owner)


def _waker(event: asyncio.Event) -> Callable[[], None]:
    """Sets `event` from another thread."""
    import asyncio

    call_soon = asyncio.get_running_loop().call_soon_threadsafe

    def wake() -> None:
        call_soon(event.set)

    return wake
