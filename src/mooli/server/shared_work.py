"""Work that is done once for all who ask for it at the same time.

Owns when it is done. What anybody may ask for, however often, costs others no more than one asker would. Never knows
what the work is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


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
