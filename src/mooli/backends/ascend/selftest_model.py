"""A small decoder of random weights that the self-test runs: whole steps, as an engine sends them.

Owns the model and the writing of steps by hand. Never judges a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mooli.backends.ascend.backend import AscendBackend
from mooli.backends.ascend.paths import PAGE_SIZE
from mooli.backends.base import AttentionSpec, CacheSpec, Limits, PagedLayer, RopeSpec
from mooli.batch import PageCopy, SamplingBatch, ScheduleBatch
from mooli.tensor import RawTensor, TensorType

VOCAB, HIDDEN, WIDE, LAYERS = 96, 128, 256, 2
SPEC = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=64, scale=64**-0.5)
NUM_PAGES = 24
LIMITS = Limits(max_tokens=512, max_rows=8, max_pages_per_row=4)


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens `ids` at positions start, start + 1, ... of a sequence that lies in `pages`."""

    ids: Sequence[int]
    start: int
    pages: Sequence[int]


class SmallModel:
    """Two layers on a backend, with its pool allocated."""

    def __init__(self, backend: AscendBackend) -> None:
        self.backend = backend
        random = np.random.default_rng(0)

        def raw(rows: int, columns: int) -> RawTensor:
            values = (random.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)
            return RawTensor("self-test", TensorType.F32, (rows, columns), values.view(np.uint8))

        def gain() -> Any:
            values = (1 + random.standard_normal((1, HIDDEN)) / 8).astype(np.float32)
            return backend.load_vector(RawTensor("self-test", TensorType.F32, (HIDDEN,), values.view(np.uint8)))

        width = SPEC.num_heads * SPEC.head_dim
        kv_width = SPEC.num_kv_heads * SPEC.head_dim
        self._table = backend.load_embedding(raw(VOCAB, HIDDEN))
        self._layers = [
            (
                gain(),
                backend.load_linear([raw(width + 2 * kv_width, HIDDEN)]),
                backend.load_linear([raw(HIDDEN, width)]),
                gain(),
                backend.load_gated(raw(WIDE, HIDDEN), raw(WIDE, HIDDEN)),
                backend.load_linear([raw(HIDDEN, WIDE)]),
            )
            for _ in range(LAYERS)
        ]
        self._norm, self._head = gain(), backend.load_linear([raw(VOCAB, HIDDEN)], head=True)
        self._rope = RopeSpec(10000.0 ** (-np.arange(0, SPEC.head_dim, 2) / SPEC.head_dim))
        spec = CacheSpec((PagedLayer(SPEC.num_kv_heads, SPEC.head_dim),) * LAYERS, PAGE_SIZE, backend.dtype_name)
        backend.allocate(spec, NUM_PAGES, LIMITS)
        self._forward = backend.capture(self._compute)
        self._logits = backend.capture(
            lambda batch, x: backend.ops.linear(batch, backend.ops.rms_norm(x, self._norm, 1e-6), self._head)
        )

    def _compute(self, batch: Any) -> Any:
        ops = self.backend.ops
        x = ops.embed(batch, self._table)
        for index, (norm, qkv, out, after, gated, down) in enumerate(self._layers):
            packed = ops.rope(batch, ops.linear(batch, ops.rms_norm(x, norm, 1e-6), qkv), SPEC, self._rope)
            x = ops.linear(batch, ops.attend(batch, index, packed, SPEC), out, residual=x)
            x = ops.linear(batch, ops.gated_linear(batch, ops.rms_norm(x, after, 1e-6), gated), down, residual=x)
        return x

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        self.backend.copy_pages([PageCopy(source, target, num_tokens)])

    def greedy(self, parts: Sequence[Part]) -> NDArray[np.int32]:
        """int32 (rows,): the likeliest tokens, by the whole way of an engine's step."""
        return self.backend.sample(self._of_last(parts), _greedy_sampling(len(parts)), VOCAB).token_ids

    def logits(self, parts: Sequence[Part]) -> NDArray[np.float32]:
        """float32 (rows, VOCAB): after the last token of each part."""
        return self.backend.to_host(self._of_last(parts))

    def _of_last(self, parts: Sequence[Part]) -> Any:
        planned = self.backend.plan(step_of(parts))
        return self._logits(*self.backend.take_rows(planned, self._forward(planned), _last_tokens(parts)))


def step_of(parts: Sequence[Part]) -> ScheduleBatch:
    """A step of these rows, which sample nothing."""
    lengths = np.array([len(part.ids) for part in parts], dtype=np.int32)
    starts = np.array([part.start for part in parts], dtype=np.int32)
    table = np.full((len(parts), max(len(part.pages) for part in parts)), -1, dtype=np.int32)
    for index, part in enumerate(parts):
        table[index, : len(part.pages)] = part.pages
    row = np.repeat(np.arange(len(parts)), lengths)
    positions = np.concatenate([np.arange(part.start, part.start + len(part.ids)) for part in parts])
    slots = table[row, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
    return ScheduleBatch(
        step=0,
        token_ids=np.concatenate([np.asarray(part.ids, dtype=np.int32) for part in parts]),
        positions=positions.astype(np.int32),
        slots=slots.astype(np.int32),
        req_indices=np.arange(len(parts), dtype=np.int32),
        starts=starts,
        lengths=lengths,
        num_samples=np.zeros(len(parts), dtype=np.int32),
        page_table=table,
        sampling=_greedy_sampling(0),
    )


def _last_tokens(parts: Sequence[Part]) -> NDArray[np.int32]:
    return (np.cumsum([len(part.ids) for part in parts]) - 1).astype(np.int32)


def _greedy_sampling(num_rows: int) -> SamplingBatch:
    zeros, ones = np.zeros(num_rows, dtype=np.float32), np.ones(num_rows, dtype=np.float32)
    ints, pointer = np.empty(0, dtype=np.int32), np.zeros(num_rows + 1, dtype=np.int32)
    none = np.full(num_rows, -1, dtype=np.int32)
    return SamplingBatch(
        temperature=zeros,
        top_k=none,
        top_p=ones,
        min_p=zeros,
        frequency_penalty=zeros,
        presence_penalty=zeros,
        repetition_penalty=ones,
        seeds=np.zeros(num_rows, dtype=np.uint64),
        positions=np.zeros(num_rows, dtype=np.int64),
        history_ids=ints,
        history_indptr=pointer,
        output_starts=np.zeros(num_rows, dtype=np.int32),
        bias_ids=ints,
        bias_values=np.empty(0, dtype=np.float32),
        bias_indptr=pointer,
        num_top=none,
        logprob_token_ids=[()] * num_rows,
    )
