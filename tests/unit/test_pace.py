"""How many prompt tokens go beside streams follows from how fast prompts have been."""

from __future__ import annotations

import numpy as np
import pytest

from mooli.cache.kv_cache import KVCache
from mooli.engine import core as engine_core
from mooli.engine.core import EngineCore
from mooli.runner.fake import FakeRunner
from mooli.scheduler.planning import STEP_S, Pace
from mooli.scheduler.scheduler import Scheduler
from mooli.scheduler.stats import StepStats
from mooli.types import Request, SamplingParams


def prompt(tokens: int) -> StepStats:
    return StepStats(prefill_rows=1, prefill_tokens=tokens)


def test_before_anything_is_known_the_number_is_the_least() -> None:
    assert Pace(128, 512).prefill_tokens == 128


@pytest.mark.parametrize(("tokens_per_s", "expected"), [(100, 128), (2000, int(2000 * STEP_S)), (100_000, 512)])
def test_the_number_is_what_fits_the_time_within_its_bounds(tokens_per_s: float, expected: int) -> None:
    pace = Pace(128, 512)
    pace.learn(prompt(512), 512 / tokens_per_s)
    assert abs(pace.prefill_tokens - expected) <= 1


def test_it_follows_a_machine_that_becomes_slower() -> None:
    pace = Pace(128, 512)
    pace.learn(prompt(512), 512 / 10_000)
    for _ in range(20):
        pace.learn(prompt(512), 512 / 1_000)
    assert abs(pace.prefill_tokens - 1_000 * STEP_S) <= 1


def test_short_prompts_beside_a_long_one_do_not_make_it_look_fast() -> None:
    pace = Pace(128, 512)
    for tokens_per_s in [1_000, 3_000] * 20:
        pace.learn(prompt(256), 256 / tokens_per_s)
    assert pace.prefill_tokens < 1_500 * STEP_S


def test_short_steps_and_a_clock_that_stands_still_teach_nothing() -> None:
    pace = Pace(128, 512)
    pace.learn(prompt(8), 1e-6)
    pace.learn(prompt(0), 1e-6)
    pace.learn(prompt(512), 0.0)
    assert pace.prefill_tokens == 128


def test_the_core_gives_what_it_measured_to_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.1  # twice a step
        return now

    monkeypatch.setattr(engine_core.time, "perf_counter", clock)
    cache = KVCache(num_pages=400, page_size=4)
    scheduler = Scheduler(
        cache,
        max_batch_tokens=400,
        max_running_requests=4,
        context_length=900,
        vocab_size=100,
        mixed_prefill_tokens=100,
    )
    core = EngineCore(scheduler, FakeRunner(400, 4, 100), Pace(100, 400))
    ids = np.arange(300, dtype=np.int32) % 100
    core.add(Request(rid="stream", prompt_ids=ids, sampling=SamplingParams(max_new_tokens=50, temperature=0.0)))
    core.step()
    assert scheduler.mixed_prefill_tokens == 400  # 300 tokens took 0.1 s: 450 fit, but a step has 400
    core.add(Request(rid="late", prompt_ids=ids[::-1].copy(), sampling=SamplingParams(max_new_tokens=1)))
    core.step()
    assert core.last_step.decode_rows == 1
    assert core.last_step.prefill_tokens == 300
