"""How an engine that has no server is driven: one JSON object a line on standard input, one back on standard output.

Owns the lines and the order of requests. Imports nothing but the standard library, for it runs in each peer's own
environment.

The first line out is {"ready": facts}. A line in is a workload: {"conversations", "output_len", "at_once"}; its answer
is {"turns": [{conversation, turn, prompt_len, output_len, sent_s, first_s, end_s}, …]} or {"error": text}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Turns = list[dict[str, Any]]


class Ledger:
    """Which request of a workload comes next, and the times of those that ended.

    A conversation's next prompt is all of it so far and that turn's new tokens.
    """

    def __init__(self, work: dict[str, Any]) -> None:
        self.conversations: list[list[list[int]]] = work["conversations"]
        self.output_len: int = work["output_len"]
        self.at_once: int = work["at_once"]
        self.turns: Turns = []
        self._waiting = list(range(len(self.conversations)))[::-1]
        self._said: list[list[int]] = [[] for _ in self.conversations]
        self._next_turn = [0] * len(self.conversations)
        self._began = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._began

    def begin(self) -> int | None:
        """A conversation that has not begun; None when all have."""
        return self._waiting.pop() if self._waiting else None

    def prompt(self, conversation: int) -> list[int]:
        """All token ids of the conversation's next request."""
        return self._said[conversation] + self.conversations[conversation][self._next_turn[conversation]]

    def answered(self, conversation: int, ids: list[int], sent_s: float, first_s: float, end_s: float) -> bool:
        """Note an answer; whether the conversation goes on."""
        prompt = self.prompt(conversation)
        turn = self._next_turn[conversation]
        self.turns.append(
            {
                "conversation": conversation,
                "turn": turn,
                "prompt_len": len(prompt),
                "output_len": len(ids),
                "sent_s": sent_s,
                "first_s": first_s,
                "end_s": end_s,
            }
        )
        self._said[conversation] = prompt + list(ids)
        self._next_turn[conversation] = turn + 1
        return turn + 1 < len(self.conversations[conversation])


def serve(load: Callable[[], tuple[dict[str, Any], Callable[[Ledger], None]]]) -> None:
    """Load an engine, say so, and run workloads until standard input ends.

    load: gives facts about the engine and what runs a workload.
    """
    # Libraries print where they like; only these lines may reach the driver.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    facts, run = load()
    print(json.dumps({"ready": facts}), file=out, flush=True)
    for line in sys.stdin:
        try:
            ledger = Ledger(json.loads(line))
            run(ledger)
            answer: dict[str, Any] = {"turns": ledger.turns}
        except Exception as exc:  # it is the driver that decides what a failure means
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), file=out, flush=True)
