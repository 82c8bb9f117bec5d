"""What a conversation looks like: answers as they come, and Markdown where the terminal can show it.

Owns what goes to standard output and standard error while a model answers. Never decides what is answered.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from typing import TYPE_CHECKING, Protocol

from mooli.chat.replies import Piece

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

_FENCE = re.compile(r" {0,3}(```+|~~~+)")


class Screen(Protocol):
    """Where one answer is shown."""

    def show(self, piece: Piece) -> None: ...

    def end(self) -> None:
        """The answer is over, or broken off."""
        ...


def open_screen(*, is_plain: bool) -> Screen:
    """Markdown on a terminal where `rich` is installed, text everywhere else."""
    if is_plain or not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        return PlainScreen()
    return MarkdownScreen()


class PlainScreen:
    """Text as it is. Reasoning goes to standard error, dim on a terminal, and ends its line before the answer."""

    def __init__(self) -> None:
        self._is_reasoning = False

    def show(self, piece: Piece) -> None:
        if piece.kind == "reasoning":
            self._is_reasoning = True
            dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
            print(f"{dim}{piece.text}{plain}", end="", file=sys.stderr, flush=True)
            return
        self._end_reasoning()
        sys.stdout.write(piece.text)
        sys.stdout.flush()

    def end(self) -> None:
        self._end_reasoning()
        print(flush=True)

    def _end_reasoning(self) -> None:
        if self._is_reasoning:
            print(file=sys.stderr, flush=True)
        self._is_reasoning = False


class MarkdownScreen:
    """Finished blocks are printed for good; the one that grows is drawn anew below them."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self._console = console or Console()
        self._reasoning = PlainScreen()
        self._pending = ""
        self._live: Live | None = None
        self._has_reasoned = False

    def show(self, piece: Piece) -> None:
        if piece.kind == "reasoning":
            self._has_reasoned = True
            self._reasoning.show(piece)
            return
        if self._has_reasoned:
            print(file=sys.stderr, flush=True)
            self._has_reasoned = False
        self._pending += piece.text
        done = finished_blocks(self._pending)
        if done:
            self._print(self._pending[:done])
            self._pending = self._pending[done:]
        self._draw()

    def end(self) -> None:
        self._print(self._pending)
        self._pending = ""

    def _draw(self) -> None:
        from rich.live import Live
        from rich.markdown import Markdown

        if not self._pending.strip():
            return
        if self._live is None:
            self._live = Live(console=self._console, transient=True, refresh_per_second=8)
            self._live.start()
        self._live.update(Markdown(self._pending))

    def _print(self, text: str) -> None:
        from rich.markdown import Markdown

        if self._live is not None:
            self._live.stop()
            self._live = None
        if text.strip():
            self._console.print(Markdown(text))


def finished_blocks(text: str) -> int:
    """How much of a growing Markdown text is whole blocks: up to the last empty line outside of fenced code."""
    end, at, fence = 0, 0, ""
    for line in text.splitlines(keepends=True):
        at += len(line)
        if not line.endswith("\n"):
            break
        mark = _FENCE.match(line)
        if fence:
            if mark is not None and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        elif mark is not None:
            fence = mark[1]
        elif not line.strip():
            end = at
    return end
