"""What is seen of a run while it goes on: how far it is, on one line, and how late this client is.

Owns that line, which is written to a terminal several times a second and to anything else every ten seconds, and
watching the event loop and the processor time of this process. Never measures a server, and counts nothing that ends up
in a result but the client's own lateness.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

import numpy as np

from mooli.bench.records import RequestRecord

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


_TERMINAL_PERIOD_S = 0.25
_FILE_PERIOD_S = 10.0
_WINDOW_S = 3.0
_BAR_WIDTH = 20


class Progress:
    """Async context manager; shows `records` as they fill.

    total: requests to come. out: None shows nothing.
    """

    def __init__(self, records: Sequence[RequestRecord], total: int, out: TextIO | None) -> None:
        self._records = records
        self._total = total
        self._out = out
        self._is_terminal = out is not None and out.isatty()
        self._task: asyncio.Task[None] | None = None
        self._start_s = time.perf_counter()
        self._past: list[tuple[float, int]] = []

    async def __aenter__(self) -> Progress:
        if self._out is not None:
            self._task = asyncio.create_task(self._show_often())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait({self._task})
        self._show()
        if self._is_terminal and self._out is not None:
            self._out.write("\n")

    def line(self, now_s: float) -> str:
        """done/total, failures, open requests, output tokens per second of the last three seconds, time."""
        done = failed = tokens = 0
        for record in self._records:
            tokens += len(record.itl_s) + (record.ttft_s > 0)
            done += record.success
            failed += bool(record.error)
        open_now = len(self._records) - done - failed
        self._past = [(at, count) for at, count in self._past if now_s - at <= _WINDOW_S]
        since, before = self._past[0] if self._past else (self._start_s, 0)
        self._past.append((now_s, tokens))
        rate = (tokens - before) / (now_s - since) if now_s > since else 0.0
        share = min((done + failed) / self._total, 1.0) if self._total else 1.0
        bar = "#" * round(share * _BAR_WIDTH)
        minutes, seconds = divmod(int(now_s - self._start_s), 60)
        failures = f"  {failed} failed" if failed else ""
        return (
            f"[{bar:<{_BAR_WIDTH}}] {done + failed}/{self._total}{failures}  {open_now} open"
            f"  {rate:.0f} tok/s  {minutes:02}:{seconds:02}"
        )

    async def _show_often(self) -> None:
        while True:
            await asyncio.sleep(_TERMINAL_PERIOD_S if self._is_terminal else _FILE_PERIOD_S)
            self._show()

    def _show(self) -> None:
        if self._out is None:
            return
        line = self.line(time.perf_counter())
        try:
            self._out.write(f"\r\x1b[K{line}" if self._is_terminal else line + "\n")
            self._out.flush()
        except (OSError, ValueError):
            self._out = None
