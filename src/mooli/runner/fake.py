"""A runner without a model, for tests of everything above it.

Owns a KV pool that stores, per slot, which token was put there and for which position, and slots of recurrent states
where it is asked to. The next token is a function of what is read back through the page table, and of the state, and of
nothing else: a wrong page, slot, position, copy or order changes the output. Where a step may begin the next one, it
leaves in the slots of that what a later step must write over. Never looks at anything a real runner would not look at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mooli.batch import LogprobRow, SamplingBatch, ScheduleBatch, StepOutput

UNSET = np.uint64(0)
"""What a slot holds that was never written, or was not copied."""

BEGUN = np.uint64(0xBE6)
"""What a slot holds of a token whose step had only begun."""

_TOKEN_STRIDE = 1 << 32
_ALL_BITS = (1 << 64) - 1


class FakeRunner:
    """A pool of `num_pages` pages and a made-up language model over `vocab_size` ids.

    next_token: overrides what the model says: given the context's ids, the id that is to be most likely, or None.
    favoured_logit: its logit; those of others are in [0, 8).
    gives_nan: given the context's ids, True where the logits are to hold NaN.
    raises: given the batch, an exception to raise before anything is computed, or None.
    num_states: slots of recurrent states; 0 for a model that has none.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        vocab_size: int = 64,
        *,
        next_token: Callable[[list[int]], int | None] | None = None,
        favoured_logit: float = 100.0,
        gives_nan: Callable[[list[int]], bool] | None = None,
        raises: Callable[[ScheduleBatch], BaseException | None] | None = None,
        num_states: int = 0,
    ) -> None:
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.next_token = next_token
        self.favoured_logit = favoured_logit
        self.gives_nan = gives_nan
        self.raises = raises
        self._kv: NDArray[np.uint64] = np.full(num_pages * page_size, UNSET, np.uint64)
        self._states: NDArray[np.uint64] = np.full(num_states, UNSET, np.uint64)
        self._state_after: list[np.uint64] = []
        """Of each token of the step."""

    def execute(self, batch: ScheduleBatch) -> StepOutput:
        """See `Runner.execute`. Raises ValueError for a batch that no backend could carry out."""
        if self.raises is not None and (exc := self.raises(batch)) is not None:
            raise exc
        self._check(batch)
        pages = self._kv.reshape(-1, self.page_size)
        for copy in batch.copies:
            pages[copy.target, : copy.num_tokens] = pages[copy.source, : copy.num_tokens]
            pages[copy.target, copy.num_tokens :] = UNSET
        self._kv[batch.slots] = stored_values(batch.token_ids, batch.positions)
        self._state_after = self._recur(batch) if batch.state_slots is not None else []
        token_ids: list[int] = []
        logprobs: list[LogprobRow | None] = []
        row_of_token = np.repeat(np.arange(batch.num_rows), batch.lengths)
        for token in batch.sampling_tokens.tolist():
            logits = self._logits(batch, int(row_of_token[token]), int(batch.positions[token]) + 1)
            index = len(token_ids)
            masks = batch.sampling.masks
            allowed = None if masks is None else masks.ids_of(index, self.vocab_size)
            if allowed is not None:
                logits = np.where(allowed | np.isnan(logits), logits, -np.inf)
            token_ids.append(-1 if np.isnan(logits).any() else sample(logits, batch.sampling, index))
            num_top = int(batch.sampling.num_top[index])
            chosen = batch.sampling.logprob_token_ids[index]
            logprobs.append(None if num_top < 0 else logprob_row(logits, token_ids[-1], num_top, chosen))
        first_tokens = np.cumsum(batch.lengths) - batch.lengths
        prompt_logprobs = []
        for wanted in batch.prompt_logprobs:
            first = int(batch.starts[wanted.row] + wanted.first_token - first_tokens[wanted.row])
            prompt_logprobs.append(
                [
                    logprob_row(
                        self._logits(batch, wanted.row, first + i + 1), target, wanted.num_top, wanted.token_ids
                    )
                    for i, target in enumerate(wanted.target_ids.tolist())
                ]
            )
        if batch.may_begin_next:
            self._begin_next(batch)
        return StepOutput(np.array(token_ids, np.int32), logprobs, prompt_logprobs)

    def read_pages(self, pages: Sequence[int]) -> NDArray[np.uint8]:
        """See `Backend.read_pages`: 8 bytes a slot."""
        taken: NDArray[np.uint64] = self._kv.reshape(-1, self.page_size)[list(pages)]
        return taken.view(np.uint8)

    def write_pages(self, pages: Sequence[int], data: bytes | memoryview) -> None:
        """See `Backend.write_pages`."""
        self._kv.reshape(-1, self.page_size)[list(pages)] = np.frombuffer(data, np.uint64).reshape(-1, self.page_size)

    def read_state(self, slot: int) -> NDArray[np.uint8]:
        """See `Backend.read_state`: 8 bytes."""
        taken: NDArray[np.uint64] = self._states[slot : slot + 1].copy()
        return taken.view(np.uint8)

    def write_state(self, slot: int, data: bytes | memoryview) -> None:
        """See `Backend.write_state`."""
        self._states[slot : slot + 1] = np.frombuffer(data, np.uint64)

    # What of an `OffloadingBackend` moves pages.
    def allocate_host(self, num_rows: int) -> None:
        self._host: NDArray[np.uint64] = np.full((num_rows, self.page_size), UNSET, np.uint64)

    def back_up(self, pages: Sequence[int], rows: Sequence[int]) -> None:
        self._host[list(rows)] = self._kv.reshape(-1, self.page_size)[list(pages)]

    def load_back(self, pages: Sequence[int], rows: Sequence[int]) -> None:
        self._kv.reshape(-1, self.page_size)[list(pages)] = self._host[list(rows)]

    def host_bytes(self, row: int) -> bytes:
        taken: bytes = self._host[row].tobytes()
        return taken

    def _recur(self, batch: ScheduleBatch) -> list[np.uint64]:
        for copy in batch.state_copies:
            self._states[copy.target] = self._states[copy.source]
        after: list[np.uint64] = []
        values = stored_values(batch.token_ids, batch.positions)
        first = 0
        assert batch.state_slots is not None
        for row, (start, length) in enumerate(zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)):
            slot = int(batch.state_slots[row])
            chain = recurrent_states(values[first : first + length], self._states[slot] if start else UNSET)
            self._states[slot] = chain[-1]
            for save in batch.state_saves:
                if save.row == row:
                    self._states[save.slot] = chain[save.num_tokens - 1]
            after += chain
            first += length
        return after

    def _begin_next(self, batch: ScheduleBatch) -> None:
        positions = batch.starts + batch.lengths
        pages = batch.page_table[np.arange(batch.num_rows), positions // self.page_size]
        if pages.min() < 0 or len(batch.sampling) != batch.num_rows:
            raise ValueError("a step is to go on, and a row has no page or not one token for it")
        self._kv[pages * self.page_size + positions % self.page_size] = BEGUN

    def _check(self, batch: ScheduleBatch) -> None:
        if batch.num_tokens == 0 or len(np.unique(batch.slots)) != batch.num_tokens:
            raise ValueError("a step needs tokens, each with a slot of its own")
        if batch.token_ids.min() < 0 or batch.token_ids.max() >= self.vocab_size:
            raise ValueError("a token is outside the vocabulary")
        if batch.slots.min() < 0 or batch.slots.max() >= len(self._kv):
            raise ValueError("a slot is outside the pool")
        written = set((batch.slots // self.page_size).tolist()) | {copy.target for copy in batch.copies}
        if any(copy.source in written for copy in batch.copies):
            raise ValueError("a page is copied from and written in the same step")
        self._check_states(batch)
        ends = np.cumsum(batch.lengths)
        for wanted in batch.prompt_logprobs:
            first, last = wanted.first_token, wanted.first_token + len(wanted.target_ids)
            if not ends[wanted.row] - batch.lengths[wanted.row] <= first < last <= ends[wanted.row]:
                raise ValueError("a log-probability is asked for where the step computes nothing of that row")

    def _check_states(self, batch: ScheduleBatch) -> None:
        if (batch.state_slots is not None) != bool(len(self._states)):
            raise ValueError("a model with states has them in every step, and one without never")
        if batch.state_slots is None:
            return
        written = [*batch.state_slots.tolist(), *(save.slot for save in batch.state_saves)]
        if len(batch.state_slots) != batch.num_rows or len(set(written)) != len(written):
            raise ValueError("two states of a step are written to one slot")
        copied = [slot for copy in batch.state_copies for slot in (copy.source, copy.target)]
        if not all(0 <= slot < len(self._states) for slot in [*written, *copied]):
            raise ValueError("a state is outside the slots")
        if any(not 0 < save.num_tokens <= batch.lengths[save.row] for save in batch.state_saves):
            raise ValueError("a state is kept where its row computes nothing")

    def _logits(self, batch: ScheduleBatch, row: int, num_tokens: int) -> NDArray[np.float64]:
        """The model's logits (vocab,) after the first `num_tokens` tokens of a row, as its pages hold them."""
        positions = np.arange(num_tokens)
        pages = batch.page_table[row, positions // self.page_size]
        if pages.min() < 0:
            raise ValueError("a row has too few pages for its tokens")
        values: NDArray[np.uint64] = self._kv[pages * self.page_size + positions % self.page_size]
        if self._state_after:
            first = int(batch.lengths[:row].sum()) - int(batch.starts[row])
            values = np.append(values, self._state_after[first + num_tokens - 1])
        logits: NDArray[np.float64] = fake_logits(values, self.vocab_size)
        if self.next_token is not None or self.gives_nan is not None:
            context = [int(value) % _TOKEN_STRIDE - 1 for value in values[:num_tokens]]
            favoured = self.next_token(context) if self.next_token is not None else None
            if favoured is not None:
                logits[favoured] = self.favoured_logit
            if self.gives_nan is not None and self.gives_nan(context):
                logits[0] = np.nan
        return logits


def stored_values(token_ids: NDArray[np.int32], positions: NDArray[np.int32]) -> NDArray[np.uint64]:
    """What the pool holds for tokens at positions: (n,) uint64, never UNSET."""
    values: NDArray[np.uint64] = positions.astype(np.uint64) * np.uint64(_TOKEN_STRIDE)
    values += token_ids.astype(np.uint64) + np.uint64(1)
    return values


def recurrent_states(values: NDArray[np.uint64], before: np.uint64 = UNSET) -> list[np.uint64]:
    """The state after each of these stored values, of a sequence that had the state `before`.

    `_mixed` in Python's integers: each value needs the one before, and an array of one costs forty times as much.
    """
    state, states = int(before), []
    for value in values.tolist():
        state = ((state ^ value) + 0x9E3779B97F4A7C15) & _ALL_BITS
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _ALL_BITS
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _ALL_BITS
        state ^= state >> 31
        states.append(np.uint64(state))
    return states


def fake_logits(values: NDArray[np.uint64], vocab_size: int) -> NDArray[np.float64]:
    """Logits in [0, 8) from the stored values of a context: float64 (vocab,)."""
    context = int(np.bitwise_xor.reduce(_mixed(values)))
    ids = np.arange(1, vocab_size + 1, dtype=np.uint64) * np.uint64(0xA24BAED4963EE407)
    logits: NDArray[np.float64] = _unit(_mixed(ids + np.uint64(context))) * 8.0
    return logits


def sample(logits: NDArray[np.float64], sampling: SamplingBatch, index: int) -> int:
    """The token of sampling row `index`: penalties, bias, then greedy or the Gumbel trick on hashed (seed, position);
    -1 where no id is left. `logits` are -inf where the row's mask does not allow.

    Penalties and filters in the order and meaning of the public API (temperature, then top_k, top_p, min_p).
    """
    logits = logits.copy()
    history = sampling.history_ids[sampling.history_indptr[index] : sampling.history_indptr[index + 1]]
    if len(history):
        counts = np.bincount(history[sampling.output_starts[index] :], minlength=len(logits))
        repetition, seen = float(sampling.repetition_penalty[index]), np.unique(history)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / repetition, logits[seen] * repetition)
        logits -= counts * float(sampling.frequency_penalty[index])
        logits -= (counts > 0) * float(sampling.presence_penalty[index])
    biased = slice(int(sampling.bias_indptr[index]), int(sampling.bias_indptr[index + 1]))
    np.add.at(logits, sampling.bias_ids[biased], sampling.bias_values[biased])
    temperature = float(sampling.temperature[index])
    if np.isneginf(logits).all():
        return -1
    if temperature == 0.0:
        return int(logits.argmax())
    logits /= temperature
    order = np.argsort(-logits, kind="stable")
    ranked = np.exp(logits[order] - logits[order[0]])
    ranked /= ranked.sum()
    top_k = int(sampling.top_k[index])
    keep = np.arange(len(ranked)) < (top_k if top_k > 0 else len(ranked))
    keep &= np.cumsum(ranked) - ranked < float(sampling.top_p[index])
    keep &= ranked >= float(sampling.min_p[index]) * ranked[0]
    draw = np.uint64(int(sampling.seeds[index])) ^ _mixed(sampling.positions[index : index + 1].astype(np.uint64))[0]
    ids = np.arange(1, len(logits) + 1, dtype=np.uint64) * np.uint64(0x9FB21C651E98DF25)
    uniform = np.maximum(_unit(_mixed(ids ^ draw)), 1e-300)
    scores = np.where(keep, logits[order] - np.log(-np.log(uniform[order])), -np.inf)
    return int(order[scores.argmax()])


def logprob_row(logits: NDArray[np.float64], target: int, num_top: int, token_ids: Sequence[int]) -> LogprobRow:
    """Log-softmax of `logits` at `target`, at the `num_top` best (ties: lower id first) and at `token_ids`."""
    logprobs = logits - logits.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    best = [i for i in np.argsort(-logprobs, kind="stable")[:num_top].tolist() if logprobs[i] > -np.inf]
    return LogprobRow(
        float(logprobs[target]),
        [(float(logprobs[token_id]), token_id) for token_id in best],
        [(float(logprobs[token_id]), token_id) for token_id in token_ids],
    )


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijective scrambling of 64-bit values, wrapping (Steele et al., SplitMix, OOPSLA 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def _unit(values: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Hashes as float64 in [0, 1)."""
    unit: NDArray[np.float64] = (values >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return unit
