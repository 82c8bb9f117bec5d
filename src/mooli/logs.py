"""How log lines look, and who prints them; and the one line in which a command says what went wrong.

Owns the format, and what need not be printed again. A process of our own sets logging up; inside another program only
what it has not set up is added.
"""

from __future__ import annotations

import logging
import sys

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_up_logging(level: str) -> None:
    """For a process that is ours: everything to standard error, of Mooli from `level` on (debug, info, …)."""
    logging.basicConfig(format=LOG_FORMAT)
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
