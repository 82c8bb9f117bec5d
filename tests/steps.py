"""Steps written by hand: what a scheduler would send, from a few plain numbers.

Owns building `ScheduleBatch` and `SamplingBatch` for tests of backends, models and the runner. Never schedules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mooli.backends.base import CacheSpec, Limits, PagedLayer
from mooli.batch import PageCopy, PromptLogprobRows, SamplingBatch, ScheduleBatch, StateSave, TokenMasks

LIMITS = Limits(max_tokens=128, max_rows=16, max_pages_per_row=64)
"""Room for every step that these tests make."""


def uniform_cache(num_layers: int, num_kv_heads: int, head_dim: int, page_size: int, dtype: str) -> CacheSpec:
    """Layers that are all the same, and look back on everything."""
    return CacheSpec((PagedLayer(num_kv_heads, head_dim),) * num_layers, page_size, dtype)


@dataclass
class Row:
    """Tokens `token_ids` at positions start, start + 1, ... of a sequence that lies in `pages`.

    samples: how many of the last ones sample. state: the slot of its recurrent state, -1 for models without. saves:
    after how many of its tokens the state is kept besides, and in which slot.
    """

    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]
    samples: int = 1
    state: int = -1
    saves: tuple[tuple[int, int], ...] = ()


@dataclass
class Choice:
    """How one row samples. `prompt` and `output` are the history that penalties look at; `allowed`: None for any id."""

    temperature: float = 0.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    position: int = 0
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    bias: Mapping[int, float] = field(default_factory=dict)
    num_top: int = -1
    logprob_token_ids: tuple[int, ...] = ()
    allowed: Set[int] | None = None


def token_masks(choices: Sequence[Choice], num_ids: int = 1024) -> TokenMasks | None:
    """The masks of these rows, in words for `num_ids` ids; None where all are free."""
    sets = [choice.allowed for choice in choices]
    wanted = [allowed for allowed in sets if allowed is not None]
    if not wanted:
        return None
    words = np.zeros((len(wanted), num_ids // 32), np.uint32)
    for row, allowed in enumerate(wanted):
        for token_id in allowed:
            words[row, token_id // 32] |= np.uint32(1 << token_id % 32)
    rows = np.cumsum([allowed is not None for allowed in sets], dtype=np.int32) - 1
    return TokenMasks(words, np.where([allowed is None for allowed in sets], np.int32(-1), rows).astype(np.int32))


def sampling_batch(choices: Sequence[Choice]) -> SamplingBatch:
    def floats(name: str) -> Any:
        return np.array([getattr(choice, name) for choice in choices], dtype=np.float32)

    histories = [[*choice.prompt, *choice.output] for choice in choices]
    biases = [list(choice.bias.items()) for choice in choices]
    return SamplingBatch(
        temperature=floats("temperature"),
        top_k=np.array([choice.top_k for choice in choices], dtype=np.int32),
        top_p=floats("top_p"),
        min_p=floats("min_p"),
        frequency_penalty=floats("frequency_penalty"),
        presence_penalty=floats("presence_penalty"),
        repetition_penalty=floats("repetition_penalty"),
        seeds=np.array([choice.seed for choice in choices], dtype=np.uint64),
        positions=np.array([choice.position for choice in choices], dtype=np.int64),
        history_ids=np.array([i for history in histories for i in history], dtype=np.int32),
        history_indptr=np.cumsum([0, *map(len, histories)], dtype=np.int32),
        output_starts=np.array([len(choice.prompt) for choice in choices], dtype=np.int32),
        bias_ids=np.array([i for bias in biases for i, _ in bias], dtype=np.int32),
        bias_values=np.array([value for bias in biases for _, value in bias], dtype=np.float32),
        bias_indptr=np.cumsum([0, *map(len, biases)], dtype=np.int32),
        num_top=np.array([choice.num_top for choice in choices], dtype=np.int32),
        logprob_token_ids=[choice.logprob_token_ids for choice in choices],
        masks=token_masks(choices),
    )


def step(
    rows: Sequence[Row],
    page_size: int,
    *,
    choices: Sequence[Choice] | None = None,
    copies: Sequence[PageCopy] = (),
    prompt_logprobs: Sequence[PromptLogprobRows] = (),
) -> ScheduleBatch:
    """A step of these rows. Without `choices`, rows that sample are greedy."""
    positions = [np.arange(row.start, row.start + len(row.token_ids)) for row in rows]
    slots = [
        np.asarray(row.pages)[where // page_size] * page_size + where % page_size
        for row, where in zip(rows, positions, strict=True)
    ]
    page_table = np.full((len(rows), max(len(row.pages) for row in rows)), -1, dtype=np.int32)
    for index, row in enumerate(rows):
        page_table[index, : len(row.pages)] = row.pages
    if choices is None:
        choices = [Choice() for row in rows for _ in range(row.samples)]
    return ScheduleBatch(
        step=0,
        token_ids=np.concatenate([np.asarray(row.token_ids, dtype=np.int32) for row in rows]),
        positions=np.concatenate(positions).astype(np.int32),
        slots=np.concatenate(slots).astype(np.int32),
        req_indices=np.arange(len(rows), dtype=np.int32),
        starts=np.array([row.start for row in rows], dtype=np.int32),
        lengths=np.array([len(row.token_ids) for row in rows], dtype=np.int32),
        num_samples=np.array([row.samples for row in rows], dtype=np.int32),
        page_table=page_table,
        sampling=sampling_batch(choices),
        copies=list(copies),
        prompt_logprobs=list(prompt_logprobs),
        state_slots=np.array([row.state for row in rows], np.int32) if rows[0].state >= 0 else None,
        state_saves=[StateSave(index, *save) for index, row in enumerate(rows) for save in row.saves],
    )


class Pages:
    """Hands out page numbers in a scrambled order, so that nothing passes by lying in sequence."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self._free: Iterator[int] = iter(np.random.default_rng(3).permutation(num_pages).tolist())

    def take(self, num_tokens: int) -> list[int]:
        return [next(self._free) for _ in range(-(-num_tokens // self.page_size))]
