"""Where and how often work is done that costs more than a moment: on a few threads, once for all who ask.

Owns the threads of long texts and how long a text is taken to be. They are few, because each takes a core from the
engine while it works; and those of huge texts apart, so that nobody's text of a tenth of a second waits for one that
takes seconds. Owns when shared work is done: what anybody may ask for, however often, costs others no more than one
asker would. Never knows what the work is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

LONG_TEXT_CHARS = 4096
"""Texts from here on leave the event loop: some ten milliseconds of it would hold up every stream."""

HUGE_TEXT_CHARS = 65536

NUM_LONG_THREADS = 2
NUM_HUGE_THREADS = 1

T = TypeVar("T")


class TextThreads:
    """Threads start when they are first needed, and end with the process."""

    def __init__(self) -> None:
        self._long = ThreadPoolExecutor(NUM_LONG_THREADS, "mooli-long-text")
        self._huge = ThreadPoolExecutor(NUM_HUGE_THREADS, "mooli-huge-text")

    async def run(self, num_chars: int, function: Callable[[], T]) -> T:
        """What `function` returns or raises; it works on so many characters or token ids. Cancelled while it waits for
        a thread, it is not called."""
        if num_chars < LONG_TEXT_CHARS:
            return function()
        threads = self._long if num_chars < HUGE_TEXT_CHARS else self._huge
        return await asyncio.get_running_loop().run_in_executor(threads, function)


def num_chars(value: Any) -> int:
    """Characters in all strings of a value made of JSON types, counted no further than it matters; everything in it
    counts one more."""
    total, waiting = 0, [value]
    while waiting and total < HUGE_TEXT_CHARS:
        item = waiting.pop()
        total += 1
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
    return total


class SharedWork(Generic[T]):
    """keep_s: how long a result is good for others. pause_s: the least time from one end of the work to its next
    beginning; who asks meanwhile waits for that, so that nobody is told what was true before he asked.

    Lives in one event loop.
    """

    def __init__(
        self,
        work: Callable[[], Awaitable[T]],
        *,
        keep_s: float = 0.0,
        pause_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work = work
        self._keep_s = keep_s
        self._pause_s = pause_s
        self._clock = clock
        self._running: asyncio.Task[T] | None = None
        self._last: asyncio.Task[T] | None = None
        self._ended_s = -float("inf")

    async def result(self) -> T:
        """Of the work that is being done, or was just done, or is begun now. Raises what the work raised: an error is
        told to all who waited for it, and kept for nobody."""
        if self._running is None:
            if self._last is not None and self._clock() - self._ended_s < self._keep_s:
                return self._last.result()
            self._running = asyncio.ensure_future(self._done())
            self._running.add_done_callback(self._end)
        # One that leaves takes nothing away from the others.
        return await asyncio.shield(self._running)

    async def _done(self) -> T:
        wait_s = self._ended_s + self._pause_s - self._clock()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        return await self._work()

    def _end(self, task: asyncio.Task[T]) -> None:
        self._running = None
        self._ended_s = self._clock()
        # Looking at the error also says that it is no news, if everybody has left.
        self._last = task if not task.cancelled() and task.exception() is None else None
