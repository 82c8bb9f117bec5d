"""The one sheet of data that passes from the deciding column to the computing column, and back.

Owns the layout of a step: host arrays (NumPy) and plain values only. Never refers to a request, a device or text.
There is no prefill mode and no decode mode: a row is (req_index, start, length). A decode step is a row of length 1,
and one that verifies draft tokens a row of a few tokens that all sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy the first `num_tokens` tokens of page `source` to page `target`, in all layers, before the step computes."""

    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StateCopy:
    """Copy the state in slot `source` to slot `target`, of all layers, before the step computes."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class StateSave:
    """The state after the first `num_tokens` tokens of row `row` of this step is stored in `slot` as well."""

    row: int
    num_tokens: int
    slot: int


@dataclass(frozen=True, slots=True)
class PromptLogprobRows:
    """Prompt log-probabilities wanted from one row of this step.

    The hidden state at batch token `first_token + i` predicts `target_ids[i]`.
    first_token: index into the step's flat tokens. target_ids: int32 (count,).
    """

    row: int
    first_token: int
    target_ids: NDArray[np.int32]
    num_top: int = 0
    token_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class TokenMasks:
    """Which ids may be sampled, for those of S sampling tokens that a constraint restricts.

    allowed: uint32 (M, W), W words of 32 ids, at least as many as the vocabulary has: id i may be sampled where bit
    i % 32 of word i // 32 is 1. Bits past the vocabulary mean nothing.
    rows: int32 (S,), which row of `allowed` holds for each token; -1: every id may be sampled.
    """

    allowed: NDArray[np.uint32]
    rows: NDArray[np.int32]

    def ids_of(self, index: int, vocab_size: int) -> NDArray[np.bool_] | None:
        """Whether each id may be the sampling token `index`: bool (vocab_size,); None where all may."""
        row = int(self.rows[index])
        if row < 0:
            return None
        octets = self.allowed[row].astype("<u4").view(np.uint8)
        return np.unpackbits(octets, count=vocab_size, bitorder="little").astype(np.bool_)


@dataclass(slots=True)
class SamplingBatch:
    """Sampling inputs of the tokens that sample, in the order of the step's tokens; S = number of them.

    Ragged fields are flat arrays with an index pointer of S + 1 entries.
    `history_ids` holds prompt and output of entries with any penalty, drafts before the sampled token included (other
    entries: empty); `output_starts[i]` is where the output begins inside entry i's history. Frequency and presence
    penalties count the output, repetition counts both.
    `bias_ids/values` hold logit_bias and, while `min_new_tokens` is not reached, -inf for every stopping id.
    `positions` is the index in the sequence of the token about to be sampled: with `seeds` it determines the draw.
    `num_top`: -1 for no log-probability, 0 for the sampled token's only, k for k alternatives.
    `masks`: None where every token may be any id, which costs nothing. An id that is not allowed is no candidate: it is
    gone before top-k, top-p, min-p and any sum over the vocabulary, that of log-probabilities included.
    """

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int32]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    frequency_penalty: NDArray[np.float32]
    presence_penalty: NDArray[np.float32]
    repetition_penalty: NDArray[np.float32]
    seeds: NDArray[np.uint64]
    positions: NDArray[np.int64]
    history_ids: NDArray[np.int32]
    history_indptr: NDArray[np.int32]
    output_starts: NDArray[np.int32]
    bias_ids: NDArray[np.int32]
    bias_values: NDArray[np.float32]
    bias_indptr: NDArray[np.int32]
    num_top: NDArray[np.int32]
    logprob_token_ids: list[tuple[int, ...]]
    masks: TokenMasks | None = None

    def __len__(self) -> int:
        return len(self.temperature)


@dataclass(slots=True)
class ScheduleBatch:
    """One step of work. R rows, T = sum of lengths tokens, S = sum of num_samples tokens that sample.

    Flat per token, rows one after the other: `token_ids` int32 (T,), `positions` int32 (T,): the index in its sequence,
    `slots` int32 (T,): page * page_size + offset, where the token's KV is stored.
    `rope_positions` int32 (T,): where rotary embeddings say that a token is; None where that is its index. At least 0,
    and below the number of tokens that the pool holds. What a row attends to is decided by `positions` alone.
    Per row: `req_indices`, `starts`, `lengths` int32 (R,); `num_samples` int32 (R,): how many of its last tokens
    sample: 0 where a prompt goes on in the next step, 1 as a rule, 1 + n where the last n tokens are drafts to verify;
    `page_table` int32 (R, max_pages), -1 past a row's pages. A row attends to positions 0 .. its own position.
    `copies` are carried out, in order, before anything is stored, and so are `state_copies`.
    `state_slots` int32 (R,), of models with recurrent layers: where the state is that a row goes on from, and where it
    is afterwards, that of its last token, draft or not. A row that starts at 0 goes on from zeros, whatever the slot
    holds. None for other models. `state_saves`: states that are kept besides, in slots that nothing else of the step
    uses.
    `may_begin_next`: every row samples one token, and the next step will most likely be these rows with that token
    each. Their pages reach that far.
    """

    step: int
    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    slots: NDArray[np.int32]
    req_indices: NDArray[np.int32]
    starts: NDArray[np.int32]
    lengths: NDArray[np.int32]
    num_samples: NDArray[np.int32]
    page_table: NDArray[np.int32]
    sampling: SamplingBatch
    copies: list[PageCopy] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobRows] = field(default_factory=list)
    may_begin_next: bool = False
    rope_positions: NDArray[np.int32] | None = None
    state_slots: NDArray[np.int32] | None = None
    state_copies: list[StateCopy] = field(default_factory=list)
    state_saves: list[StateSave] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_rows(self) -> int:
        return len(self.starts)

    @property
    def sampling_tokens(self) -> NDArray[np.int32]:
        """Indices into the step's tokens of those that sample, in order: int32 (S,)."""
        if len(self.sampling) == self.num_tokens:  # every token samples
            return np.arange(self.num_tokens, dtype=np.int32)
        num_before = np.cumsum(self.num_samples)
        first = np.repeat(np.cumsum(self.lengths) - num_before, self.num_samples)
        return (first + np.arange(len(first))).astype(np.int32)

    @property
    def asked_tokens(self) -> NDArray[np.int32]:
        """Indices into the step's tokens of those whose hidden state is asked for, ascending: int32.

        They sample, or a log-probability of the prompt is wanted there. Of all others only keys and values remain.
        """
        if not self.prompt_logprobs:
            return self.sampling_tokens
        wanted = [np.arange(rows.first_token, rows.first_token + len(rows.target_ids)) for rows in self.prompt_logprobs]
        return np.unique(np.concatenate([self.sampling_tokens, *wanted])).astype(np.int32)


@dataclass(slots=True)
class LogprobRow:
    """Log-probabilities at one position: of the target, of the `num_top` best (descending), of the ids asked for.

    -inf for an id without any chance, which is never among the best: so these may be fewer.
    """

    logprob: float
    top: list[tuple[float, int]] = field(default_factory=list)
    chosen: list[tuple[float, int]] = field(default_factory=list)


@dataclass(slots=True)
class StepOutput:
    """What a step computed.

    token_ids: int32 (S,), in the order of `ScheduleBatch.sampling_tokens`; -1 where the logits held NaN.
    logprobs: S entries, None where not asked for.
    prompt_logprobs: parallel to `ScheduleBatch.prompt_logprobs`, one LogprobRow per target.
    """

    token_ids: NDArray[np.int32]
    logprobs: list[LogprobRow | None]
    prompt_logprobs: list[list[LogprobRow]] = field(default_factory=list)
