"""Carries out one step on a backend: page copies, forward pass, logits, sampling, log-probabilities.

Owns the order of a step and the bound on logits in memory. Never holds anything of a request, sees text, or decides
what runs.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Protocol

import numpy as np

from mooli.backends.base import Array, Backend, SampleResult
from mooli.batch import LogprobRow, PromptLogprobRows, SamplingBatch, ScheduleBatch, StepOutput
from mooli.errors import ConfigError


class CallableModel(Protocol):
    """What of a model is run here."""

    def forward(self, batch: Any) -> Array: ...

    def logits(self, batch: Any, hidden: Array) -> Array: ...


class ModelRunner:
    """Runs steps of one model on one backend."""

    def __init__(self, model: CallableModel, backend: Backend, vocab_size: int, max_logit_rows: int = 48) -> None:
        """`vocab_size`: ids that may be sampled; a head may be padded beyond it.

        `max_logit_rows`: the most rows of logits that exist at one time. Raises ConfigError if it is below 1.
        """
        if max_logit_rows < 1:
            raise ConfigError(f"max_logit_rows must be at least 1, not {max_logit_rows}")
        self._backend = backend
        self._vocab_size = vocab_size
        self._max_logit_rows = max_logit_rows
        self._forward = backend.capture(model.forward)
        self._logits = backend.capture(model.logits)

    def execute(self, batch: ScheduleBatch) -> StepOutput:
        """Compute the step. Its KV is stored when this returns."""
        if batch.copies:
            self._backend.copy_pages(batch.copies)
        if batch.state_copies:
            self._backend.copy_states(batch.state_copies)
        if batch.num_tokens == 0:
            return StepOutput(token_ids=np.empty(0, dtype=np.int32), logprobs=[])
        if not batch.prompt_logprobs and 0 < len(batch.sampling) <= self._max_logit_rows:
            results = [self._backend.run_step(self._forward, self._logits, batch, self._vocab_size)]
            planned = hidden = None
        else:
            planned = self._backend.plan(batch)
            hidden = self._forward(planned)
            results = self._sample(planned, hidden, batch)
        if len(results) == 1:
            token_ids = results[0].token_ids
        else:
            token_ids = np.concatenate([np.empty(0, np.int32), *(result.token_ids for result in results)])
        logprobs = [None if entry is None else LogprobRow(*entry) for result in results for entry in result.logprobs]
        prompt_logprobs = [self._prompt_logprobs(planned, hidden, rows) for rows in batch.prompt_logprobs]
        return StepOutput(token_ids=token_ids, logprobs=logprobs, prompt_logprobs=prompt_logprobs)

    def close(self) -> None:
        """Give the backend's memory and threads back. Nothing can be executed afterwards."""
        self._backend.close()

    def _sample(self, planned: Any, hidden: Array, batch: ScheduleBatch) -> list[SampleResult]:
        """The tokens that sample, as many at a time as there may be logits."""
        tokens, results = batch.sampling_tokens, []
        for begin in range(0, len(tokens), self._max_logit_rows):
            rows = slice(begin, begin + self._max_logit_rows)
            logits = self._logits(*self._backend.take_rows(planned, hidden, tokens[rows]))
            sampling = _take_sampling_rows(batch.sampling, rows)
            results.append(self._backend.sample(logits, sampling, self._vocab_size))
        return results

    def _prompt_logprobs(self, planned: Any, hidden: Array, wanted: PromptLogprobRows) -> list[LogprobRow]:
        result: list[LogprobRow] = []
        for begin in range(0, len(wanted.target_ids), self._max_logit_rows):
            target_ids = wanted.target_ids[begin : begin + self._max_logit_rows]
            first = wanted.first_token + begin
            tokens = np.arange(first, first + len(target_ids), dtype=np.int32)
            logits = self._logits(*self._backend.take_rows(planned, hidden, tokens))
            entries = self._backend.logprobs(logits, target_ids, wanted.num_top, wanted.token_ids, self._vocab_size)
            result += [LogprobRow(*entry) for entry in entries]
        return result


_FLAT_FIELDS = {
    "history_ids": "history_indptr",
    "history_indptr": "history_indptr",
    "bias_ids": "bias_indptr",
    "bias_values": "bias_indptr",
    "bias_indptr": "bias_indptr",
}
"""Ragged fields of a sampling batch and the index pointer that cuts them."""


def _take_sampling_rows(sampling: SamplingBatch, rows: slice) -> SamplingBatch:
    """The sampling inputs of a run of rows, as views."""
    cut: dict[str, Any] = {}
    for field in fields(sampling):
        values = getattr(sampling, field.name)
        if field.name == "masks":
            cut[field.name] = None if values is None else replace(values, rows=values.rows[rows])
            continue
        pointer_name = _FLAT_FIELDS.get(field.name)
        if pointer_name is None:
            cut[field.name] = values[rows]
            continue
        pointer = getattr(sampling, pointer_name)[rows.start : rows.stop + 1]
        cut[field.name] = pointer - pointer[0] if field.name == pointer_name else values[pointer[0] : pointer[-1]]
    return replace(sampling, **cut)
