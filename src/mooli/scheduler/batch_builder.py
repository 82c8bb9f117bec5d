"""Turns the rows of a step into a ScheduleBatch.

Owns the tables indexed by req_index: page table and sampling values, kept between steps so that a decode step is a few
NumPy gathers. Never decides which rows run.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mooli.batch import PageCopy, PromptLogprobRows, SamplingBatch, ScheduleBatch, StateCopy, StateSave, TokenMasks
from mooli.scheduler.constraint import holds_no_other
from mooli.scheduler.request_state import RequestState

UINT64_MASK = (1 << 64) - 1


@dataclass(slots=True)
class Row:
    """Compute tokens [start, start + length) of one request, and sample the next if `samples`.

    drafts: a guess at the tokens that will be sampled next. They are the last of the row, and after each of them a
    token is sampled too. num_forced: how many of them, from the first on, a constraint forces. states: after how many
    tokens of the row its recurrent state is kept besides, and the slot.
    """

    state: RequestState
    start: int
    length: int
    samples: bool
    drafts: Sequence[int] = ()
    num_forced: int = 0
    states: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        return 1 + len(self.drafts) if self.samples else 0

    @property
    def continues_output(self) -> bool:
        """Computes the token sampled last and what is guessed to follow it."""
        return self.samples and self.length - len(self.drafts) == 1 and self.start >= self.state.num_prompt_tokens

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """The row's tokens, int32 (length,)."""
        known = self.state.tokens[self.start : self.start + self.length - len(self.drafts)]
        return np.concatenate([known, np.array(self.drafts, np.int32)]) if self.drafts else known


@dataclass(slots=True)
class Plan:
    """The step being put together. `num_preempted` counts running requests that had to give way, and
    `num_background_preempted` those of them in the background.

    max_tokens: of any step. tokens_left: of this one. beside_answers: of them, what the prompt of one client gets where
    another's ends. may_begin_next: see `ScheduleBatch`. is_held_up: a request waits that could begin otherwise (see
    `Hold`).
    """

    max_tokens: int
    tokens_left: int
    beside_answers: int
    rows: list[Row] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    state_copies: list[StateCopy] = field(default_factory=list)
    num_preempted: int = 0
    num_background_preempted: int = 0
    num_cached_tokens: int = 0
    may_begin_next: bool = False
    is_held_up: bool = False

    def most_for(self, state: RequestState) -> int:
        """How many tokens of a request the step may compute at most. A token whose log-probabilities are asked for has
        a row of logits of its own: of such a prompt a step takes no more than a quarter of what it takes of others.
        What does not end its prompt here has time, and another client waits for this step's first token of an answer.
        """
        most = self.tokens_left
        if state.next_prompt_logprob < state.num_prompt_tokens:
            most = min(most, max(1, self.max_tokens // 4))
        if most < state.num_missing and self._begins_answer_of_another(state.request.client):
            most = min(most, self.beside_answers)
        return most

    def _begins_answer_of_another(self, client: str) -> bool:
        return any(row.samples and not row.continues_output and row.state.request.client != client for row in self.rows)

    def add(self, state: RequestState, length: int) -> None:
        """Add the next `length` tokens of a request. Its last missing token samples, unless it wants no tokens."""
        samples = length == state.num_missing and state.wants_tokens
        self.rows.append(Row(state, state.num_computed, length, samples))
        self.tokens_left -= length

    def add_drafts(self, row: Row, drafts: Sequence[int]) -> None:
        """Let a row that samples verify `drafts` too, behind those it has. Their pages are there."""
        row.drafts = [*row.drafts, *drafts]
        row.length += len(drafts)
        self.tokens_left -= len(drafts)

    def drop(self, state: RequestState) -> None:
        """Take a request's row out again, if it has one."""
        for index, row in enumerate(self.rows):
            if row.state is state:
                self.tokens_left += row.length
                del self.rows[index]
                return


@dataclass(frozen=True, slots=True)
class _Last:
    """The batch built last, where every row continues an output by one token and of its samples' values only histories
    change, which become one token longer."""

    states: list[RequestState]
    batch: ScheduleBatch


@dataclass(slots=True)
class _Bias:
    """Biased ids of one request: always, and while `min_new_tokens` is not reached (stopping ids at -inf)."""

    always: tuple[NDArray[np.int32], NDArray[np.float32]]
    early: tuple[NDArray[np.int32], NDArray[np.float32]]


class BatchBuilder:
    """Tables of `max_rows` running requests with up to `max_pages` pages each."""

    def __init__(self, page_size: int, max_rows: int, max_pages: int) -> None:
        self._page_size = page_size
        self._page_table = np.full((max_rows, max(1, max_pages)), -1, np.int32)
        self._num_pages = np.zeros(max_rows, np.int32)
        self._temperature = np.zeros(max_rows, np.float32)
        self._top_k = np.zeros(max_rows, np.int32)
        self._top_p = np.zeros(max_rows, np.float32)
        self._min_p = np.zeros(max_rows, np.float32)
        self._frequency_penalty = np.zeros(max_rows, np.float32)
        self._presence_penalty = np.zeros(max_rows, np.float32)
        self._repetition_penalty = np.ones(max_rows, np.float32)
        self._seeds = np.zeros(max_rows, np.uint64)
        self._num_top = np.full(max_rows, -1, np.int32)
        self._penalised = np.zeros(max_rows, np.bool_)
        self._biases: dict[int, _Bias] = {}
        self._constrained: set[int] = set()
        self._last: _Last | None = None
        self._pages_changed = False  # since the last batch

    def enter(self, state: RequestState) -> None:
        """A request got its req_index."""
        self._last = None
        row, params = state.req_index, state.request.sampling
        self._temperature[row] = params.temperature
        self._top_k[row] = params.top_k
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._frequency_penalty[row] = params.frequency_penalty
        self._presence_penalty[row] = params.presence_penalty
        self._repetition_penalty[row] = params.repetition_penalty
        self._seeds[row] = params.seed & UINT64_MASK
        self._num_top[row] = state.request.num_top_logprobs if state.request.return_logprob else -1
        self._penalised[row] = bool(
            params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0
        )
        if state.constrained is not None:
            self._constrained.add(row)
        early = state.stop_ids if params.min_new_tokens else frozenset()
        if params.logit_bias or early:
            chosen = {**dict(params.logit_bias), **dict.fromkeys(sorted(early), -np.inf)}
            self._biases[row] = _Bias(_bias_arrays(dict(params.logit_bias)), _bias_arrays(chosen))

    def leave(self, req_index: int) -> None:
        """A req_index is free again."""
        self._last = None
        self._page_table[req_index, : self._num_pages[req_index]] = -1
        self._num_pages[req_index] = 0
        self._biases.pop(req_index, None)
        self._constrained.discard(req_index)

    def set_pages(self, req_index: int, pages: list[int], first: int = 0) -> None:
        """The pages of a request are `pages`; those before `first` are as they were."""
        self._pages_changed = True
        self._page_table[req_index, first : len(pages)] = pages[first:]
        self._num_pages[req_index] = len(pages)

    def grow_pages(self, req_index: int, pages: list[int]) -> None:
        """`pages` may have become longer."""
        first = self._num_pages[req_index]
        if len(pages) > first:
            self.set_pages(req_index, pages, first)

    def build(self, step: int, plan: Plan) -> ScheduleBatch:
        """The batch of `plan`, in the order of its rows, which must not be empty."""
        last = self._last
        if last is not None and _follows(plan, last):
            batch = self._next(step, plan, last.batch)
            self._last = _Last(last.states, batch)
        else:
            batch = self._build(step, plan)
            self._last = self._to_follow(plan, batch)
        self._pages_changed = False
        return batch

    def _to_follow(self, plan: Plan, batch: ScheduleBatch) -> _Last | None:
        if self._biases or len(batch.sampling) != len(plan.rows):
            return None
        if (
            plan.copies
            or plan.state_copies
            or batch.prompt_logprobs
            or not all(row.continues_output and row.samples for row in plan.rows)
        ):
            return None
        return _Last([row.state for row in plan.rows], batch)

    def _next(self, step: int, plan: Plan, last: ScheduleBatch) -> ScheduleBatch:
        """The batch one token after `last`, in as few operations as possible: between two steps this process computes
        nothing else, and finds none of its code in the processor's caches, through which the weights have gone."""
        rows, page_size = plan.rows, self._page_size
        positions = last.positions + 1
        page_table = last.page_table
        if self._pages_changed:
            page_table = self._page_table[:, : max(1, self._num_pages[last.req_indices].max())][last.req_indices]
        if self._pages_changed or any(row.start % page_size == 0 for row in rows):
            slots = page_table[np.arange(len(rows)), positions // page_size] * page_size + positions % page_size
        else:
            slots = last.slots + 1
        sampling = copy(last.sampling)
        sampling.positions = last.sampling.positions + 1
        sampling.masks = self._masks(rows)
        if len(last.sampling.history_ids):
            is_penalised = self._penalised[last.req_indices]
            histories = [
                row.state.tokens for row, penalised in zip(rows, is_penalised.tolist(), strict=True) if penalised
            ]
            sampling.history_ids = np.concatenate(histories)
            sampling.history_indptr = last.sampling.history_indptr.copy()
            sampling.history_indptr[1:] += np.cumsum(is_penalised, dtype=np.int32)
        return ScheduleBatch(
            step=step,
            token_ids=np.array([row.state.tokens[row.start] for row in rows], np.int32),
            positions=positions,
            slots=slots.astype(np.int32, copy=False),
            req_indices=last.req_indices,
            starts=positions,
            lengths=last.lengths,
            num_samples=last.num_samples,
            page_table=page_table,
            sampling=sampling,
            may_begin_next=plan.may_begin_next,
            state_slots=_state_slots(rows),
            state_saves=_state_saves(rows),
        )

    def _build(self, step: int, plan: Plan) -> ScheduleBatch:
        rows = plan.rows
        num_rows = len(rows)
        numbers = np.array([(row.state.req_index, row.start, row.length, row.num_samples) for row in rows], np.int32)
        req_indices, starts, lengths, num_samples = np.ascontiguousarray(numbers.T)
        page_table = self._page_table[:, : max(1, self._num_pages[req_indices].max())][req_indices]
        if num_rows == lengths.sum():
            row_of_token, positions = np.arange(num_rows), starts.copy()
            token_ids = np.array([row.state.tokens[row.start] for row in rows], np.int32)
        else:
            first_tokens = np.cumsum(lengths) - lengths
            row_of_token = np.repeat(np.arange(num_rows), lengths)
            positions = np.arange(len(row_of_token), dtype=np.int32) + (starts - first_tokens)[row_of_token]
            token_ids = np.concatenate([row.token_ids for row in rows])
        slots = page_table[row_of_token, positions // self._page_size] * self._page_size + positions % self._page_size
        return ScheduleBatch(
            step=step,
            token_ids=token_ids,
            positions=positions.astype(np.int32, copy=False),
            slots=slots.astype(np.int32, copy=False),
            req_indices=req_indices,
            starts=starts,
            lengths=lengths,
            num_samples=num_samples,
            page_table=page_table,
            sampling=self._sampling(
                [(row, ahead) for row in rows for ahead in range(row.num_samples)],
                req_indices.repeat(num_samples),
                self._masks(rows),
            ),
            copies=plan.copies,
            prompt_logprobs=_prompt_logprob_rows(rows),
            may_begin_next=plan.may_begin_next,
            state_slots=_state_slots(rows),
            state_copies=plan.state_copies,
            state_saves=_state_saves(rows),
        )

    def _masks(self, rows: list[Row]) -> TokenMasks | None:
        """What constraints leave to the tokens that sample. One that fails ends its request as soon as this step is
        over; what is sampled for it meanwhile does not count."""
        if not self._constrained:
            return None
        held = [row for row in rows if row.samples and row.state.constrained is not None]
        if not held:
            return None
        num_words = max(row.state.constrained.num_words for row in held if row.state.constrained is not None)
        allowed = np.zeros((sum(row.num_samples for row in held), num_words), np.uint32)
        mask_rows: list[int] = []
        num_filled = 0
        for row in rows:
            constrained, last = row.state.constrained, num_filled + row.num_samples
            if constrained is None or not row.samples:
                mask_rows += [-1] * row.num_samples
            elif constrained.masks(row.drafts, allowed[num_filled:last]):
                mask_rows += range(num_filled, last)
                num_filled = last
            else:
                allowed[num_filled:last] = 0
                mask_rows += [-1] * row.num_samples
                row.state.pending_finish = constrained.failure
        return TokenMasks(allowed[:num_filled], np.array(mask_rows, np.int32)) if num_filled else None

    def _sampling(
        self, samples: list[tuple[Row, int]], indices: NDArray[np.int32], masks: TokenMasks | None
    ) -> SamplingBatch:
        """samples: a row, and after how many of its drafts the token is sampled. indices: req_index of each."""
        num_rows = len(samples)
        history_indptr = np.zeros(num_rows + 1, np.int32)
        bias_indptr = np.zeros(num_rows + 1, np.int32)
        output_starts = np.zeros(num_rows, np.int32)
        histories = [np.empty(0, np.int32)]
        bias_ids = [np.empty(0, np.int32)]
        bias_values = [np.empty(0, np.float32)]
        if self._penalised[indices].any():
            for i, (row, ahead) in enumerate(samples):
                if self._penalised[row.state.req_index]:
                    histories += [row.state.tokens, np.array(row.drafts[:ahead], np.int32)]
                    output_starts[i] = row.state.num_prompt_tokens
                    history_indptr[i + 1] = row.state.num_tokens + ahead
            np.cumsum(history_indptr, out=history_indptr)
        if self._biases:
            for i, (row, ahead) in enumerate(samples):
                bias = self._biases.get(row.state.req_index)
                if bias is not None:
                    is_early = row.state.num_output_tokens + ahead < row.state.request.sampling.min_new_tokens
                    if is_early and masks is not None and masks.rows[i] >= 0:
                        # Where the output can only stop, it stops.
                        is_early = not holds_no_other(masks.allowed[masks.rows[i]], row.state.stop_ids)
                    ids, values = bias.early if is_early else bias.always
                    bias_ids.append(ids)
                    bias_values.append(values)
                    bias_indptr[i + 1] = len(ids)
            np.cumsum(bias_indptr, out=bias_indptr)
        requests = [row.state.request for row, _ in samples]
        return SamplingBatch(
            temperature=self._temperature[indices],
            top_k=self._top_k[indices],
            top_p=self._top_p[indices],
            min_p=self._min_p[indices],
            frequency_penalty=self._frequency_penalty[indices],
            presence_penalty=self._presence_penalty[indices],
            repetition_penalty=self._repetition_penalty[indices],
            seeds=self._seeds[indices],
            positions=np.array([row.state.num_tokens + ahead for row, ahead in samples], np.int64),
            history_ids=np.concatenate(histories),
            history_indptr=history_indptr,
            output_starts=output_starts,
            bias_ids=np.concatenate(bias_ids),
            bias_values=np.concatenate(bias_values),
            bias_indptr=bias_indptr,
            num_top=self._num_top[indices],
            logprob_token_ids=[r.logprob_token_ids if r.return_logprob else () for r in requests],
            masks=masks,
        )


def _follows(plan: Plan, last: _Last) -> bool:
    """Whether the rows are those of the last batch, each one token later and nothing else."""
    rows, starts = plan.rows, last.batch.starts
    return (
        len(rows) == len(last.states)
        and not plan.copies
        and not plan.state_copies
        and all(
            row.state is state and row.samples and row.length == 1 and row.start == start + 1
            for row, state, start in zip(rows, last.states, starts.tolist(), strict=True)
        )
    )


def _state_slots(rows: list[Row]) -> NDArray[np.int32] | None:
    """Where the state of each row is; None where the model has none."""
    slots = [row.state.pages.state for row in rows if row.state.pages is not None and row.state.pages.state >= 0]
    return np.array(slots, np.int32) if slots else None


def _state_saves(rows: list[Row]) -> list[StateSave]:
    return [StateSave(index, count, slot) for index, row in enumerate(rows) for count, slot in row.states]


def _bias_arrays(bias: dict[int, float]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    return np.array(list(bias.keys()), np.int32), np.array(list(bias.values()), np.float32)


def _prompt_logprob_rows(rows: list[Row]) -> list[PromptLogprobRows]:
    """The prompt tokens that the hidden states of these rows predict and whose log-probability is still wanted."""
    wanted: list[PromptLogprobRows] = []
    first_token = 0
    for index, row in enumerate(rows):
        state = row.state
        first = state.next_prompt_logprob
        last = min(row.start + row.length + 1, state.num_prompt_tokens)
        if first < last:
            request = state.request
            wanted.append(
                PromptLogprobRows(
                    row=index,
                    first_token=first_token + first - 1 - row.start,
                    target_ids=state.tokens[first:last].copy(),
                    num_top=request.num_top_logprobs,
                    token_ids=request.logprob_token_ids,
                )
            )
        first_token += row.length
    return wanted
