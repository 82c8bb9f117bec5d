"""The properties of the deciding column, over random settings, arrivals, aborts, failures and lengths."""

from __future__ import annotations

import pytest
from core_trials import Setting, Trial, run_trial
from hypothesis import given, settings
from hypothesis import strategies as st

TRIALS_PER_BLOCK = 100


@pytest.mark.parametrize("block", range(21))
def test_every_output_equals_the_request_run_alone_and_pages_balance_after_every_step(block: int) -> None:
    for seed in range(block * TRIALS_PER_BLOCK, (block + 1) * TRIALS_PER_BLOCK):
        run_trial(seed)


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
)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1 << 32), setting=SETTINGS, num_requests=st.integers(1, 10))
def test_no_setting_changes_an_output_or_loses_a_page(seed: int, setting: Setting, num_requests: int) -> None:
    Trial(seed, setting).run(num_requests)
