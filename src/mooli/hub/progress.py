"""How far a pull is: one line that changes on a terminal, a line now and then elsewhere.

Owns the words. Never reads or writes a file of a model.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

_TERMINAL_PERIOD_S = 0.2
_LINE_PERIOD_S = 30.0
_SPEED_WINDOW_S = 10.0


class PullProgress:
    """Counts bytes from several threads. say: where a line goes when `stream` is no terminal."""

    def __init__(
        self,
        label: str,
        total_bytes: int,
        say: Callable[[str], None],
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = label
        self._total = total_bytes
        self._say = say
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream is not None and self._stream.isatty()
        self._clock = clock
        self._guard = threading.Lock()
        self._done = 0
        self._moves: deque[tuple[float, int]] = deque([(clock(), 0)])
        self._received = 0
        self._shown_s = clock()

    def count(self, change: int) -> None:
        """Add bytes that came; a negative number for those thrown away."""
        with self._guard:
            self._done += change
            self._received += change
            now = self._clock()
            if now - self._shown_s < (_TERMINAL_PERIOD_S if self._is_terminal else _LINE_PERIOD_S):
                return
            self._shown_s = now
            self._moves.append((now, self._received))
            while len(self._moves) > 2 and now - self._moves[0][0] > max(_SPEED_WINDOW_S, _LINE_PERIOD_S):
                self._moves.popleft()
            line = self._line(now)
        if self._is_terminal:
            self._stream.write(f"\r\x1b[K{line}")
            self._stream.flush()
        else:
            self._say(line)

    def end(self) -> None:
        """Clear the line of a terminal."""
        if self._is_terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _line(self, now: float) -> str:
        began_s, began = self._moves[0]
        speed = (self._received - began) / (now - began_s) if now > began_s else 0.0
        share = f"{self._label}: {size(self._done)} of {size(self._total)}"
        if speed <= 0:
            return share
        return f"{share}, {size(speed)}/s, {duration((self._total - self._done) / speed)} left"


def size(count: float) -> str:
    """Bytes in the unit that fits: 15.2 GB. Units are decimal."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def duration(seconds: float) -> str:
    """42 s, 3 min 20 s, 2 h 5 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
