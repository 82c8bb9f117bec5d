"""How fast an engine in this process generates while it works.

Owns looking at the engine's counter of generated tokens once a second, on a thread of its own, and showing it on a
terminal. Never changes what the engine does.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from mooli.errors import MooliError
from mooli.frontend.engine import Engine

_PERIOD_S = 1.0


class GenerationSpeed:
    """Context manager: watches `engine` from `with` to its end."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="mooli-bench-speed")
        self._looks: list[tuple[float, int]] = []

    def __enter__(self) -> GenerationSpeed:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        if sys.stderr.isatty():
            print(file=sys.stderr)

    @property
    def last_tokens_per_s(self) -> float | None:
        """Tokens per second between the last two looks; None for a run in which there was only one."""
        if len(self._looks) < 2:
            return None
        (before_s, before), (after_s, after) = self._looks[-2:]
        return (after - before) / (after_s - before_s) if after_s > before_s else None

    def _watch(self) -> None:
        try:
            while not self._is_over.wait(_PERIOD_S):
                self._look()
                if sys.stderr.isatty():
                    speed = self.last_tokens_per_s or 0.0
                    print(
                        f"\r\x1b[K{self._looks[-1][1]} tokens, {speed:.0f} tok/s", end="", file=sys.stderr, flush=True
                    )
        except MooliError:  # the engine has ended; whoever waits for its answers is told why
            return

    def _look(self) -> None:
        counted = self._engine.get_server_info()["internal_states"][0]["generated_tokens"]
        self._looks.append((self._clock(), counted))
