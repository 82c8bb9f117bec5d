"""The properties of the deciding column, over random settings, arrivals, aborts, failures and lengths."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from core_trials import Setting, Trial, run_trial
from hypothesis import given, settings
from hypothesis import strategies as st

from mooli.batch import ScheduleBatch
from mooli.scheduler.batch_builder import BatchBuilder, Plan
from mooli.scheduler.drafts import ForcedSettings

TRIALS_PER_BLOCK = 50


@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.slow) for block in range(1, 42))])
def test_every_output_equals_the_request_run_alone_and_pages_balance_after_every_step(block: int) -> None:
    for seed in range(block * TRIALS_PER_BLOCK, (block + 1) * TRIALS_PER_BLOCK):
        run_trial(seed)


@pytest.mark.slow
def test_a_batch_made_from_the_last_one_is_the_batch_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = penalised = masked = 0
    make_next = BatchBuilder._next

    def both(self: BatchBuilder, step: int, plan: Plan, last: ScheduleBatch) -> ScheduleBatch:
        nonlocal compared, penalised, masked
        batch = make_next(self, step, plan, last)
        compared += 1
        penalised += len(batch.sampling.history_ids) > 0
        anew = self._build(step, Plan(0, 0, 0, rows=plan.rows, may_begin_next=plan.may_begin_next))
        pairs: list[tuple[Any, Any]] = [(batch, anew), (batch.sampling, anew.sampling)]
        if batch.sampling.masks is not None or anew.sampling.masks is not None:
            masked += 1
            pairs.append((batch.sampling.masks, anew.sampling.masks))
        for one, other in pairs:
            for field in fields(one):
                if field.name not in ("sampling", "masks"):
                    a, b = getattr(one, field.name), getattr(other, field.name)
                    assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, field.name
                    assert getattr(a, "dtype", None) == getattr(b, "dtype", None), field.name
        return batch

    monkeypatch.setattr(BatchBuilder, "_next", both)
    for seed in range(100):
        run_trial(seed)
    assert compared > 100 and penalised > 20 and masked > 20, (compared, penalised, masked)


SETTINGS = st.builds(
    Setting,
    page_size=st.integers(1, 32),
    num_pages=st.integers(1, 40),
    max_batch_tokens=st.integers(1, 80) | st.just(-1),
    max_running_requests=st.integers(1, 10),
    context_length=st.integers(2, 90),
    policy=st.sampled_from(["fcfs", "lpm"]),
    enabled=st.booleans(),
    abort_rate=st.sampled_from([0.0, 0.2]),
    is_crowded=st.booleans(),
    whole_pages=st.booleans(),
    priorities=st.booleans(),
    num_clients=st.integers(1, 3),
    constrained=st.booleans(),
    background=st.booleans(),
    forced=st.none() | st.builds(ForcedSettings, st.integers(1, 9), st.integers(1, 12)),
)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1 << 32), setting=SETTINGS, num_requests=st.integers(1, 10))
def test_no_setting_changes_an_output_or_loses_a_page(seed: int, setting: Setting, num_requests: int) -> None:
    Trial(seed, setting).run(num_requests)
