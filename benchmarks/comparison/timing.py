"""What a run of a workload brought: the times of every request, and the figures that follow from them.

Owns the formulas and the check that the work was the work asked for. Never talks to an engine.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from comparison.child import EngineError
from comparison.workloads import Workload


@dataclass(frozen=True)
class TurnTimes:
    """One request; times in seconds from the beginning of the run."""

    conversation: int
    turn: int
    prompt_len: int
    output_len: int
    sent_s: float
    first_s: float
    end_s: float


def from_fields(fields: Any) -> TurnTimes:
    """Raises EngineError when `fields` is not what a worker answers with."""
    try:
        return TurnTimes(**fields)
    except TypeError as exc:
        raise EngineError(f"answered something else than times: {exc}") from exc


def check_work(workload: Workload, turns: Sequence[TurnTimes]) -> None:
    """Raises EngineError unless every request of `workload` was answered once, with the exact lengths."""
    got = {(turn.conversation, turn.turn): turn for turn in turns}
    for conversation, number, prompt_len in workload.expected():
        turn = got.pop((conversation, number), None)
        if turn is None:
            raise EngineError(f"did not answer turn {number} of conversation {conversation}")
        if (turn.prompt_len, turn.output_len) != (prompt_len, workload.output_len):
            raise EngineError(
                f"answered {turn.prompt_len} tokens with {turn.output_len} instead of {prompt_len} with "
                f"{workload.output_len} in turn {number} of conversation {conversation}"
            )
    if got or len(turns) != len({(turn.conversation, turn.turn) for turn in turns}):
        raise EngineError("answered more often than it was asked")


def figures(workload: Workload, turns: Sequence[TurnTimes]) -> dict[str, float]:
    """ttft_ms and ms_per_token (medians of the requests), total_tok_s (prompt and answer tokens over the wall time)."""
    wall_s = max(turn.end_s for turn in turns) - min(turn.sent_s for turn in turns)
    return {
        "ttft_ms": 1e3 * statistics.median(turn.first_s - turn.sent_s for turn in turns),
        "ms_per_token": 1e3 * statistics.median((turn.end_s - turn.first_s) / (turn.output_len - 1) for turn in turns),
        "total_tok_s": workload.total_tokens() / wall_s,
        "wall_s": wall_s,
    }
