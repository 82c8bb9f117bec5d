"""How late the client itself is.

Owns watching the event loop and the processor time of this process during a run. Never measures a server.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import numpy as np

_PERIOD_S = 0.01

BUSY_SHARE = 0.8
"""From this share of one core on, the client has nothing left for bursts."""

LATE_MS = 5.0
"""A 99th percentile of lateness below this is never called late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLoad:
    """lag: how much later than due the event loop woke, in milliseconds. cpu_share: 1.0 is one core."""

    mean_lag_ms: float
    p99_lag_ms: float
    max_lag_ms: float
    cpu_share: float

    def complaint(self, median_itl_ms: float) -> str | None:
        """Why the numbers may be the client's own, in one line; None when they are the server's.

        Late is a 99th percentile of lateness of at least 5 ms and of half the median gap between tokens.
        """
        if self.cpu_share >= BUSY_SHARE:
            return (
                f"the client itself was the bottleneck: it used {self.cpu_share:.0%} of a core; measure with a lower "
                "rate, a lower --max-concurrency, or from another machine"
            )
        if self.p99_lag_ms >= max(LATE_MS, median_itl_ms / 2):
            return (
                f"the client itself was late: its event loop woke {self.p99_lag_ms:.1f} ms (p99) after it was due; "
                "times of this size are not the server's alone; give the client a core of its own"
            )
        return None


class EventLoopLag:
    """Context manager: watches the running event loop from `async with` to its end, then `load()` tells."""

    def __init__(self) -> None:
        self._lags_s: list[float] = []
        self._task: asyncio.Task[None] | None = None
        self._start = self._end = (0.0, 0.0)

    async def __aenter__(self) -> EventLoopLag:
        self._start = self._end = (time.perf_counter(), time.process_time())
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end = (time.perf_counter(), time.process_time())
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def load(self) -> ClientLoad:
        elapsed, busy = self._end[0] - self._start[0], self._end[1] - self._start[1]
        lags_ms = np.asarray(self._lags_s or [0.0]) * 1000
        return ClientLoad(
            mean_lag_ms=float(lags_ms.mean()),
            p99_lag_ms=float(np.percentile(lags_ms, 99)),
            max_lag_ms=float(lags_ms.max()),
            cpu_share=busy / elapsed if elapsed > 0 else 0.0,
        )

    async def _watch(self) -> None:
        due = time.perf_counter()
        while True:
            due += _PERIOD_S
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            now = time.perf_counter()
            self._lags_s.append(max(now - due, 0.0))
            due = now
