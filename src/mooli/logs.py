"""How log lines look, and who prints them; and the one line in which a command says what went wrong.

Owns the format, the way of a line to standard error, and what need not be printed again. A process of our own sets
logging up; inside another program only what it has not set up is added. Never lets what reads the log hold up or end
what writes it: a line that cannot be written is dropped, and the next one that can be says how many were.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import stat
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

PATIENCE_S = 0.1
"""For which a line waits for who reads it to go on. The lines behind one that was lost wait no more."""

PATIENCE_SHARE = 0.01
"""Of all time may go into such waits: a flood of lines that is read too slowly must not hold up who writes it."""

_IS_OBJECT = "mooli_is_object"


def set_up_logging(level: str) -> None:
    """For a process that is ours: everything to standard error, of Mooli from `level` on (debug, info, …)."""
    handler = _handler()
    handler.setFormatter(_LineFormatter(LOG_FORMAT))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("mooli").setLevel(level.upper())


def add_log_level(level: str) -> None:
    """For an engine inside somebody's program: our level, and a handler only where that program has none.

    Below warnings, Python prints nothing for a program that has not set up logging, which is most scripts.
    """
    package = logging.getLogger("mooli")
    package.setLevel(level.upper())
    if package.isEnabledFor(logging.INFO) and not package.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        package.addHandler(handler)


def report_error(error: object) -> None:
    """What went wrong, in one line on standard error."""
    print(f"mooli: error: {' '.join(str(error).split())}", file=sys.stderr)


class FirstTimes:
    """Which failures were not there before, so that one that comes with each request or step is shown in full once."""

    def __init__(self) -> None:
        self._known: set[tuple[str, type[BaseException]]] = set()

    def is_first(self, what: str, error: BaseException) -> bool:
        """Whether nothing of this kind has failed in `what`."""
        kind = (what, type(error))
        is_first = kind not in self._known
        self._known.add(kind)
        return is_first


def log_object(logger: logging.Logger, fields: Mapping[str, Any]) -> None:
    """A line that is a JSON object and nothing else: `fields`, after the time."""
    line = json.dumps({"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), **fields})
    logger.info("%s", line, extra={_IS_OBJECT: True})


class _LineFormatter(logging.Formatter):
    """Puts time, level and name before a line, but not before those of `log_object`."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if getattr(record, _IS_OBJECT, False) else super().format(record)


class LineHandler(logging.Handler):
    """Writes lines to a descriptor, as far as that takes them."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = _without_waiting(descriptor)
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._most_bytes = sys.maxsize if is_file else select.PIPE_BUF
        """At once: a pipe that is ready takes so many without waiting, a file whatever there is."""
        self._patience_s, self._patience_of_s = PATIENCE_S, time.monotonic()
        self._num_lost = 0
        self._is_cut = False
        """Whether the last line is there in part."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode(errors="backslashreplace") + b"\n"
        except Exception:
            self.handleError(record)
            return
        if self._num_lost:
            line = self._loss() + line
        try:
            is_written = self._write(line)
        except OSError:  # closed, a full disk, …: there is nowhere to say so
            is_written = False
        self._num_lost = 0 if is_written else self._num_lost + 1

    def _loss(self) -> bytes:
        end = b"\n" if self._is_cut else b""
        return end + b"WARNING mooli.logs: %d lines of the log could not be written\n" % self._num_lost

    def _write(self, line: bytes) -> bool:
        """Whether all of it is written."""
        rest = memoryview(line)
        while rest and (self._poll.poll(0) or self._wait()):
            num_bytes = os.write(self._descriptor, rest[: self._most_bytes])
            self._is_cut = num_bytes < len(rest)
            rest = rest[num_bytes:]
        return not rest

    def _wait(self) -> bool:
        """Whether the descriptor takes something, after as long as there is patience."""
        if self._num_lost:
            return False
        now_s = time.monotonic()
        saved_s = (now_s - self._patience_of_s) * PATIENCE_SHARE
        left_s = min(PATIENCE_S, self._patience_s + saved_s)
        is_ready = bool(self._poll.poll(left_s * 1000))
        self._patience_of_s = time.monotonic()
        self._patience_s = max(0.0, left_s - (self._patience_of_s - now_s))
        return is_ready


def _without_waiting(descriptor: int) -> int:
    """The same pipe opened again, for writes that never wait: another process may fill it after it was found ready.
    Changing `descriptor` itself would change it for all who share it."""
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        with contextlib.suppress(OSError):  # no /proc, or another user's pipe
            return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK)
    return descriptor


def _handler() -> logging.Handler:
    try:
        return LineHandler(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):  # there is none, or it is none of the system's
        return logging.StreamHandler()
