"""What the engine asks of whatever computes a step.

Owns the protocol and the check that a runner kept to it.
"""

from __future__ import annotations

from typing import Protocol

from mooli.batch import ScheduleBatch, StepOutput
from mooli.errors import EngineError


class Runner(Protocol):
    """Computes steps. Keeps the KV pool; knows page numbers, never requests."""

    def execute(self, batch: ScheduleBatch) -> StepOutput:
        """Carry out the copies, store K and V of every token in its slot, and sample the rows that ask for it.

        Any exception ends the requests of this batch, and only those, with finish reason `error`.
        """
        ...


def check_output(batch: ScheduleBatch, output: StepOutput) -> None:
    """Raise EngineError if `output` has not one entry for everything `batch` asked for."""
    counts = (len(output.token_ids), len(output.logprobs), [len(rows) for rows in output.prompt_logprobs])
    num_sampled = len(batch.sampling)
    expected = (num_sampled, num_sampled, [len(rows.target_ids) for rows in batch.prompt_logprobs])
    if counts != expected:
        raise EngineError(f"the runner returned {counts} tokens, logprobs and prompt logprobs instead of {expected}")
