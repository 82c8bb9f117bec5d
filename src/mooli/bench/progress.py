"""How far a run is, on one line.

Owns that line. Writes to a terminal several times a second and to anything else every ten seconds. Never counts
anything that ends up in a result.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TextIO

from mooli.bench.records import RequestRecord

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
