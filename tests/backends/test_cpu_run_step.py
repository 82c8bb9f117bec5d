"""A whole step in one call gives what its parts give, one by one: tokens of any rows, and which step may follow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cpu_ops import allocate, cpu_backend, random, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from mooli.backends.base import SampleResult
from mooli.batch import ScheduleBatch
from steps import Choice, Row, step

VOCAB, WIDTH = 101, 64
TWINS = (3, 40, 70, 100)
"""Rows of the head that are the same: their logits are equal, and the lowest id counts."""


class Head:
    """A model of an embedding and a head, on a backend. `spoilt`: a value for one weight of the head's row 66.
    `is_cut`: what is left of its forward pass is what is asked for. `cap`: of logits; it makes many of them equal."""

    def __init__(self, backend: Any, spoilt: float = 0.0, *, is_cut: bool = True, cap: float = 0.0) -> None:
        head = random(5, VOCAB, WIDTH)
        head[list(TWINS)] = head[3] * 2
        if spoilt != 0.0:
            head[66, 7] = spoilt
        weight, table = backend.load_linear([stored(head)]), backend.load_embedding(stored(random(6, VOCAB, WIDTH)))
        allocate(backend)
        self.backend = backend
        cut = backend.ops.asked_rows if is_cut else lambda batch, x: x
        self.forward = backend.capture(lambda batch: cut(batch, backend.ops.embed(batch, table)))
        capped = (lambda x: backend.ops.soft_cap(x, cap)) if cap else (lambda x: x)
        self.logits = backend.capture(lambda batch, hidden: capped(backend.ops.linear(batch, hidden, weight)))

    def at_once(self, batch: ScheduleBatch, vocab_size: int) -> SampleResult:
        return self.backend.run_step(self.forward, self.logits, batch, vocab_size)

    def in_parts(self, batch: ScheduleBatch, vocab_size: int) -> SampleResult:
        planned = self.backend.plan(batch)
        logits = self.logits(*self.backend.take_rows(planned, self.forward(planned), batch.sampling_tokens))
        return self.backend.sample(logits, batch.sampling, vocab_size)


MASKS: list[frozenset[int]] = [
    frozenset(range(0, VOCAB, 2)),
    frozenset({1, 33, 66, 99}),
    frozenset(range(64)),
    frozenset(),
]
GREEDY = st.builds(Choice, allowed=st.none() | st.sampled_from(MASKS) | st.sets(st.integers(0, VOCAB), max_size=5))
OTHERS = st.sampled_from(
    [
        *(Choice(temperature=0.8, seed=3), Choice(bias={9: 50.0}), Choice(num_top=2)),
        *(Choice(num_top=2, allowed=mask, temperature=0.8) for mask in MASKS),
    ]
)
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)
ROWS = st.lists(st.tuples(TOKENS, GREEDY), min_size=1, max_size=7) | st.lists(
    st.tuples(TOKENS, GREEDY | OTHERS), min_size=1, max_size=7
)


@pytest.mark.parametrize("spoilt", [0.0, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(
    ("num_threads", "is_cut", "cap"), [(1, True, 0), (2, True, 0), (3, True, 0), (2, False, 0), (2, True, 0.5)]
)
def test_a_step_in_one_call_samples_what_its_parts_do(
    num_threads: int, is_cut: bool, cap: float, spoilt: float
) -> None:
    with cpu_backend(num_threads=num_threads) as backend:
        model = Head(backend, spoilt, is_cut=is_cut, cap=cap)

        @given(ROWS, st.sampled_from([VOCAB, 100, 67, 66, 64, 33, 2, 1]))
        @settings(max_examples=40, deadline=None)
        def check(rows: list[tuple[list[int], Choice]], vocab_size: int) -> None:
            places = [Row(ids, 0, [index]) for index, (ids, _) in enumerate(rows)]
            batch = step(places, 32, choices=[choice for _, choice in rows])
            expected, result = model.in_parts(batch, vocab_size), model.at_once(batch, vocab_size)
            assert result.token_ids.tolist() == expected.token_ids.tolist()
            assert result.logprobs == expected.logprobs

        check()


def test_of_equal_logits_the_lowest_id_is_taken() -> None:
    with cpu_backend(num_threads=3) as backend:
        model = Head(backend)
        taken = [model.at_once(step([Row([token], 0, [0])], 32), VOCAB).token_ids[0] for token in range(VOCAB)]
        assert TWINS[0] in taken and not set(TWINS[1:]) & set(taken)


def test_what_is_no_head_is_refused() -> None:
    with cpu_backend() as backend:
        model = Head(backend)
        batch = step([Row([1, 2], 0, [0])], 32)
        with pytest.raises(ValueError, match="last linear"):
            model.at_once(batch, VOCAB + 1)
        no_head = backend.capture(lambda batch, hidden: backend.ops.asked_rows(batch, hidden))
        with pytest.raises(ValueError, match="last linear"):
            backend.run_step(model.forward, no_head, batch, WIDTH)
        assert model.at_once(batch, VOCAB).token_ids.tolist() == model.in_parts(batch, VOCAB).token_ids.tolist()
