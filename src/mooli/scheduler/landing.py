"""The third room of the scheduler: a step lands, and requests end.

Owns which of the tokens that a row sampled belong to the output, stop ids and lengths, what cannot be a token, and what
is said of a request to the outside. Never decides what runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import isnan

from mooli.batch import LogprobRow, PromptLogprobRows, StepOutput
from mooli.cache.kv_cache import KVCache
from mooli.scheduler.admission import AdmissionControl, Tier
from mooli.scheduler.batch_builder import Row
from mooli.scheduler.request_state import RequestState
from mooli.scheduler.running import Running
from mooli.scheduler.stats import Counters
from mooli.types import FinishReason, RequestOutput, TokenLogprobs

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
    """The rule that makes guessing harmless. It never ends a request, frees a page or counts anything.

    computed_in: the type of the computation, said in the error of logits it could not hold.
    """

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
        if state.constrained is not None and (accepted.finish is None or accepted.finish.type == "length"):
            # An output that is complete with its last token is complete, however long it could have become.
            accepted.finish = state.constrained.advance(accepted.token_ids) or accepted.finish
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


@dataclass(slots=True, eq=False)
class Landing:
    """What a step means for each of its requests, and the end of every request.

    open_requests: by rid, all that have not ended; who ends is taken out of it. verifies_drafts: say how they fared.
    tiers: where pages are kept besides the pool. outputs: not handed out yet.
    """

    cache: KVCache
    running: Running
    admission: AdmissionControl
    open_requests: dict[str, RequestState]
    counters: Counters
    acceptance: Acceptance
    verifies_drafts: bool
    tiers: list[Tier]
    outputs: list[RequestOutput] = field(default_factory=list)

    def land(self, rows: list[Row], prompt_logprobs: Sequence[PromptLogprobRows], output: StepOutput) -> None:
        """Take in what a step computed for its `rows`, and the log-probabilities that were asked for of prompts."""
        nan_rows = set()
        for wanted, logprob_rows in zip(prompt_logprobs, output.prompt_logprobs, strict=True):
            if any(isnan(logprob_row.logprob) for logprob_row in logprob_rows):
                nan_rows.add(wanted.row)
            else:
                rows[wanted.row].state.collect_prompt_logprobs(wanted.target_ids, logprob_rows)
        sampled = zip(output.token_ids.tolist(), output.logprobs, strict=True)
        for index, row in enumerate(rows):
            state = row.state
            state.num_computed = row.start + row.length - len(row.drafts)
            samples = list(islice(sampled, row.num_samples))
            if state.pages is not None:
                self.cache.drop_copy_source(state.pages)
            if index in nan_rows:
                self._end_untrusted(state, self.acceptance.nan_error())
            elif state.pending_finish is not None:
                self._end_step(state)
                end = self._end_untrusted if self.acceptance.has_error(samples) else self.end
                end(state, state.pending_finish)
            elif samples:
                self._take_samples(row, samples)
            elif not state.wants_tokens and state.num_missing == 0:
                self.end(state, FinishReason("length", length=0))
            else:
                self.running.share_computed(state)

    def fail(self, rows: list[Row], exc: BaseException) -> None:
        """The step raised: end its requests. What was being computed is not kept, as nobody knows what is in its
        pages."""
        for row in rows:
            state = row.state
            finish = state.pending_finish or error(f"the step failed: {type(exc).__name__}: {exc}", type(exc).__name__)
            self.end(state, finish, keep=False)

    def _take_samples(self, row: Row, samples: list[Sample]) -> None:
        """The row has sampled: its request has more tokens now, and may end."""
        state = row.state
        accepted = self.acceptance.take(row, samples)
        goes_on = self._end_step(state)
        self.counters.generated_tokens += len(accepted.token_ids)
        num_forced = min(row.num_forced, accepted.num_right_drafts)
        self.counters.forced_tokens += num_forced
        if self.verifies_drafts and row.continues_output:
            self._count_drafts(row, accepted.num_right_drafts - num_forced)
        out = self._output(state, accepted.finish or accepted.error)
        out.new_token_ids, out.logprobs = accepted.token_ids, accepted.logprobs
        if accepted.error is not None:
            self._end_untrusted(state, accepted.error, out)
        elif accepted.finish is not None:
            self.end(state, accepted.finish, out)
        else:
            self.running.share_computed(state)
            if self.tiers and state.num_output_tokens == len(accepted.token_ids):
                for tier in self.tiers:
                    tier.computed(state)
            self.outputs.append(out)
            if accepted.leaves_nan or not goes_on:
                self.admission.preempt(state)  # NaN would spread: even what has no weight is multiplied

    def _end_step(self, state: RequestState) -> bool:
        """How many of its tokens are computed is known. False if no recurrent state of so many was kept."""
        return state.pages is None or self.cache.end_step(state.pages, state.num_computed)

    def _count_drafts(self, row: Row, num_right: int) -> None:
        num_guessed = len(row.drafts) - row.num_forced
        row.state.drafts.learn(num_guessed, num_right)
        self.counters.proposed_drafts += num_guessed
        self.counters.correct_drafts += num_right
        self.counters.verify_steps += 1

    def end(
        self, state: RequestState, finish: FinishReason, out: RequestOutput | None = None, *, keep: bool = True
    ) -> None:
        """The one place where a request ends: its pages go, its last output is queued."""
        for tier in self.tiers:
            if keep and finish.type != "error" and (state.num_output_tokens or not state.wants_tokens):
                tier.computed(state)
            tier.ended(state)
        self.admission.remove(state, keep=keep)
        del self.open_requests[state.rid]
        self.counters.finished += 1
        self.outputs.append(out or self._output(state, finish))

    def _end_untrusted(self, state: RequestState, finish: FinishReason, out: RequestOutput | None = None) -> None:
        """End a request whose KV may hold NaN: others must not find it in the cache."""
        held = state.pages
        for tier in self.tiers:
            tier.distrusted(state)
        if held is not None:
            self.cache.forget(held)
        self.end(state, state.pending_finish or finish, out, keep=False)

    def _output(self, state: RequestState, finish: FinishReason | None) -> RequestOutput:
        num_prompt_computed = min(state.num_computed, state.num_prompt_tokens)
        is_kept = self.cache.enabled and state.cached_tokens >= 0
        return RequestOutput(
            rid=state.rid,
            finish=finish,
            prompt_tokens=state.num_prompt_tokens,
            completion_tokens=state.num_output_tokens,
            cached_tokens=max(0, state.cached_tokens),
            loaded_tokens=max(0, state.loaded_tokens),
            host_tokens=max(0, min(state.host_tokens, state.cached_tokens - max(0, state.loaded_tokens))),
            written_tokens=max(0, num_prompt_computed - state.cached_tokens) if is_kept else 0,
            num_preemptions=state.num_preemptions,
            prompt_logprobs=state.take_prompt_logprobs(),
            drafts=state.drafts.counts if self.verifies_drafts else None,
            cache_end=state.take_cache_end(),
        )
