"""Where work on texts is done: in the event loop where it is short, on one of a few threads where it is long.

Owns those threads, and how long a text is taken to be. Few, because each takes a core from the engine while it works;
and those of huge texts apart, so that nobody's text of a tenth of a second waits for one that takes seconds. Never
knows what is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

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
