"""What a user types: lines with history, messages of several lines, and what Ctrl-C means before one is sent.

Owns reading from a terminal or a pipe. Never knows what a message is for.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

QUOTES = '"""'
"""Begins and ends a message of several lines."""

MAX_HISTORY_LINES = 2000

PROMPT, MORE = "> ", "… "


def history_file() -> Path | None:
    """Where lines are kept between conversations; None where the user has no home."""
    state = os.environ.get("XDG_STATE_HOME")
    try:
        return (Path(state) if state else Path.home() / ".local" / "state") / "mooli" / "chat_history"
    except RuntimeError:
        return None


def messages(history: Path | None) -> Iterator[str]:
    """What is typed, message by message, until the end. Messages of a pipe are its lines.

    Pasted lines are one message where the terminal tells that they are pasted; so are lines between \"\"\" and \"\"\".
    Ctrl-C takes back what is typed; at once again it is the end, as Ctrl-D is.
    history: a file of earlier lines, which is added to; None keeps none.
    """
    if sys.stdin is None:
        return
    if not sys.stdin.isatty():
        yield from _joined(line.rstrip("\r\n") for line in sys.stdin)
        return
    with _editing(history):
        yield from _typed()


def _typed() -> Iterator[str]:
    was_interrupted = False
    while True:
        try:
            message = next(_joined(_lines()), None)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            if was_interrupted:
                return
            was_interrupted = True
            print("Ctrl-C again, Ctrl-D or /exit leaves.", file=sys.stderr)
            continue
        if message is None:
            print(file=sys.stderr)
            return
        was_interrupted = False
        yield message


def _lines() -> Iterator[str]:
    prompt = PROMPT
    with contextlib.suppress(EOFError):
        while True:
            yield input(prompt)
            prompt = MORE


def _joined(lines: Iterator[str]) -> Iterator[str]:
    """Messages of lines: one each, or all between quotes. What is not closed ends with the lines."""
    for line in lines:
        head, quotes, rest = line.partition(QUOTES)
        if not quotes or head.strip():
            yield line.strip()
            continue
        parts = []
        while QUOTES not in rest:
            parts.append(rest)
            following = next(lines, None)
            if following is None:
                break
            rest = following
        else:
            parts.append(rest[: rest.index(QUOTES)])
        yield "\n".join(parts).strip("\n")


@contextlib.contextmanager
def _editing(history: Path | None) -> Iterator[None]:
    """Lines can be edited and recalled, where Python has that."""
    try:
        import readline
    except ImportError:
        yield
        return
    if "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind("set enable-bracketed-paste on")
    before = _recall(readline, history)
    try:
        yield
    finally:
        _keep(readline, history, before)


def _recall(readline: ModuleType, history: Path | None) -> int:
    """Read earlier lines; how many there are."""
    readline.set_history_length(MAX_HISTORY_LINES)
    if history is not None:
        with contextlib.suppress(OSError):  # there is none yet, or it is unreadable: then there is no history
            readline.read_history_file(str(history))
    return int(readline.get_current_history_length())


def _keep(readline: ModuleType, history: Path | None, before: int) -> None:
    """Write all lines, if there are more than `before`. A history that cannot be kept is no failure."""
    if history is None:
        return
    with contextlib.suppress(OSError):
        history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(history, os.O_CREAT | os.O_WRONLY, 0o600))
        if readline.get_current_history_length() <= before:
            return
        readline.write_history_file(str(history))
        os.chmod(history, 0o600)
