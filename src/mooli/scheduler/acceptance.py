"""Which of the tokens that a row sampled belong to the output, and whether the request ends with one of them.

Owns the rule that makes guessing harmless, stop ids and lengths, and what cannot be a token. Never ends a request,
frees a page or counts anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mooli.batch import LogprobRow
from mooli.scheduler.batch_builder import Row
from mooli.scheduler.request_state import RequestState
from mooli.types import FinishReason, TokenLogprobs

NAN_TOKEN = -1
"""Instead of a token id: the logits held NaN (see `StepOutput`)."""

Sample = tuple[int, "LogprobRow | None"]


@dataclass(slots=True)
class Accepted:
    """What a row has added to its request. finish: why it ends; error: why it ends without a token, its KV not to be
    trusted. leaves_nan: a wrong draft has stored NaN after the tokens that count."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    error: FinishReason | None = None
    leaves_nan: bool = False

    @property
    def num_right_drafts(self) -> int:
        return max(0, len(self.token_ids) - 1)


class Acceptance:
    """One per scheduler. computed_in: the type of the computation, said in the error of logits it could not hold."""

    def __init__(self, vocab_size: int, computed_in: str | None) -> None:
        self._vocab_size = vocab_size
        self._computed_in = f", computed in {computed_in}" if computed_in else ""

    def take(self, row: Row, samples: list[Sample]) -> Accepted:
        """Append to the request what was sampled after its last known token, and after drafts while they were right.

        So each token is sampled after exactly those it would follow without drafts, from the same logits, history and
        random number. What was computed for wrong drafts is not counted as computed: later steps write over it.
        """
        state, accepted = row.state, Accepted()
        for (token_id, logprob), draft in zip(samples, [*row.drafts, None], strict=True):
            accepted.error = self.error_of(token_id)
            if accepted.error is not None:
                return accepted
            state.append(token_id)
            state.num_computed = state.num_tokens - 1
            accepted.token_ids.append(token_id)
            if logprob is not None:
                accepted.logprobs.append(TokenLogprobs(token_id, logprob.logprob, logprob.top, logprob.chosen))
            accepted.finish = _finish_of(state, token_id)
            if accepted.finish is not None or draft != token_id:
                break
        accepted.leaves_nan = self.has_error(samples[len(accepted.token_ids) :])
        return accepted

    def has_error(self, samples: list[Sample]) -> bool:
        return any(self.error_of(token_id) is not None for token_id, _ in samples)

    def error_of(self, token_id: int) -> FinishReason | None:
        """Why this cannot be a token, and its request not go on; None for one that can."""
        if token_id == NAN_TOKEN:
            return self.nan_error()
        if not 0 <= token_id < self._vocab_size:
            message = f"the model's output is token id {token_id}, outside the vocabulary of {self._vocab_size} ids"
            return error(message, "InvalidTokenError")
        return None

    def nan_error(self) -> FinishReason:
        return error(f"the model's output holds NaN (not a number) or infinity{self._computed_in}", "NaNError")


def error(message: str, err_type: str) -> FinishReason:
    """The finish reason of a request that could not be computed."""
    return FinishReason("error", message=message, status_code=500, err_type=err_type)


def _finish_of(state: RequestState, token_id: int) -> FinishReason | None:
    if token_id in state.stop_ids and state.num_output_tokens > state.request.sampling.min_new_tokens:
        return FinishReason("stop", matched=token_id)
    if state.num_tokens >= state.max_tokens:
        return FinishReason("length", length=state.num_output_tokens)
    return None
