"""A fake runner that takes a step only when the test lets it: no stream depends on who is faster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any


class Gate:
    """Goes into the runner as its `raises`. Leaving it as a context manager lets everything through."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self._is_open = False

    def __call__(self, batch: Any) -> BaseException | None:
        if not self._is_open and not self._permits.acquire(timeout=120):
            return TimeoutError("the test has let no step through")
        return None

    def let(self, num_steps: int = 1) -> None:
        self._permits.release(num_steps)

    def open(self) -> None:
        self._is_open = True
        self._permits.release()

    def close(self) -> None:
        """From here on no step without `let`. To be called while nothing runs."""
        self._is_open = False
        while self._permits.acquire(blocking=False):
            pass

    def __enter__(self) -> Gate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open()


def wait_until(condition: Callable[[], object]) -> None:
    """Look again and again; fails after two minutes."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "what was waited for has not happened"
        time.sleep(0.01)
