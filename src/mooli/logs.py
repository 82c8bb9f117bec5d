"""How log lines look, and who prints them; and the one line in which a command says what went wrong.

Owns the format. A process of our own sets logging up; inside another program only what it has not set up is added.
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
