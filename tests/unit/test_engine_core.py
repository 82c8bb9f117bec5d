"""The loop: requests in, outputs out, and what happens when a step fails."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

from mooli.batch import ScheduleBatch, StepOutput
from mooli.cache.kv_cache import KVCache
from mooli.engine.core import EngineCore
from mooli.errors import PromptError
from mooli.runner.fake import FakeRunner
from mooli.scheduler.scheduler import Scheduler
from mooli.types import Request, RequestOutput, SamplingParams

VOCAB = 100


def engine(runner: Any = None, **hooks: Any) -> EngineCore:
    cache = KVCache(num_pages=32, page_size=4)
    scheduler = Scheduler(cache, max_batch_tokens=16, max_running_requests=4, context_length=100, vocab_size=VOCAB)
    return EngineCore(scheduler, runner or FakeRunner(32, 4, VOCAB, **hooks))


def test_a_core_whose_runner_is_released_lets_go_of_it_and_fails_requests() -> None:
    runner = FakeRunner(32, 4, VOCAB)
    gone = weakref.ref(runner)
    core = engine(runner)
    core.release_runner()
    del runner
    assert gone() is None
    core.add(request("a", [1, 2]))
    assert "make a new one" in str(finishes(core)["a"].finish)


def request(rid: str, prompt: list[int], max_new_tokens: int = 3, **fields: Any) -> Request:
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
    return Request(rid=rid, prompt_ids=np.array(prompt, np.int32), sampling=sampling, **fields)


def finishes(core: EngineCore) -> dict[str, RequestOutput]:
    """Run to the end; the last output of each request, which must be its only one with a finish reason."""
    last: dict[str, RequestOutput] = {}
    while core.has_work:
        for out in core.step():
            core.check()
            assert out.rid not in last, "an output after the end"
            if out.finish is not None:
                last[out.rid] = out
    return last


def test_an_idle_engine_has_nothing_to_do() -> None:
    core = engine()
    assert not core.has_work
    assert core.step() == []


def test_outputs_stream_and_the_last_carries_the_reason() -> None:
    core = engine()
    core.add(request("a", [1, 2, 3]))
    outs = [out for _ in range(3) for out in core.step()]
    assert [len(out.new_token_ids) for out in outs] == [1, 1, 1]
    assert [out.completion_tokens for out in outs] == [1, 2, 3]
    assert [out.finish.type if out.finish else None for out in outs] == [None, None, "length"]
    assert not core.has_work


def test_the_end_of_an_aborted_request_comes_out_of_the_next_step() -> None:
    core = engine()
    core.add(request("a", [1, 2, 3], 50))
    core.step()
    assert core.abort("a", "enough")
    assert core.has_work
    (out,) = core.step()
    assert (out.finish.type, out.finish.message) == ("abort", "enough")
    assert not core.abort("a")


def test_a_stop_string_is_not_an_abort() -> None:
    core = engine()
    core.add(request("a", [1, 2, 3], 50))
    core.step()
    core.finish("a", "END")
    assert finishes(core)["a"].finish.to_dict() == {"type": "stop", "matched": "END"}


def test_a_refused_request_has_no_outputs() -> None:
    core = engine()
    with pytest.raises(PromptError):
        core.add(request("a", []))
    assert not core.has_work


def test_a_failing_step_ends_its_requests_with_the_cause_and_no_others() -> None:
    core = engine(raises=lambda batch: RuntimeError("device lost") if 13 in batch.token_ids else None)
    core.add(request("good", [1, 2, 3], 1))
    core.step()
    for rid, prompt in (("bad", [13, 14, 15, 16, 17]), ("same step", [4, 5])):
        core.add(request(rid, prompt))
    last = finishes(core)
    for rid in ("bad", "same step"):
        finish = last[rid].finish
        assert (finish.type, finish.status_code, finish.err_type) == ("error", 500, "RuntimeError")
        assert "device lost" in finish.message
    assert core.stats()["used_pages"] == 0
    core.add(request("after", [1, 2, 3, 4], 2))
    assert finishes(core)["after"].finish.type == "length"


def test_what_a_failed_step_should_have_computed_is_not_cached() -> None:
    failing = [True]
    core = engine(raises=lambda batch: RuntimeError("once") if failing[0] else None)
    core.add(request("a", list(range(10))))
    assert finishes(core)["a"].finish.type == "error"
    failing[0] = False
    core.add(request("b", list(range(10))))
    assert finishes(core)["b"].cached_tokens == 0


def test_an_output_that_does_not_fit_the_batch_is_a_failed_step() -> None:
    class Mute:
        def execute(self, batch: ScheduleBatch) -> StepOutput:
            return StepOutput(np.empty(0, np.int32), [])

    core = engine(Mute())
    core.add(request("a", [1, 2]))
    finish = finishes(core)["a"].finish
    assert (finish.type, finish.err_type) == ("error", "EngineError")


def test_an_interrupt_is_raised_and_leaves_an_engine_that_can_be_used() -> None:
    interrupts = [KeyboardInterrupt()]
    core = engine(raises=lambda batch: interrupts.pop() if interrupts else None)
    core.add(request("a", [1, 2]))
    with pytest.raises(KeyboardInterrupt):
        core.step()
    assert finishes(core)["a"].finish.type == "error"
    core.add(request("b", [1, 2]))
    assert finishes(core)["b"].finish.type == "length"


def test_nan_ends_only_the_request_whose_logits_hold_it_and_is_never_cached() -> None:
    core = engine(gives_nan=lambda context: context[0] == 66 and len(context) == 7)
    core.add(request("nan", [66, 1, 2, 3, 4], 10))
    core.add(request("fine", [67, 1, 2, 3, 4], 10))
    last = finishes(core)
    assert last["fine"].finish.type == "length"
    assert last["nan"].finish.type == "error"
    assert "NaN" in last["nan"].finish.message
    assert last["nan"].completion_tokens == 2
    core.add(request("again", [66, 1, 2, 3, 5], 1))
    assert finishes(core)["again"].cached_tokens == 0


def test_nan_in_prompt_logprobs_is_an_error_too() -> None:
    core = engine(gives_nan=lambda context: len(context) == 2)
    core.add(request("a", [1, 2, 3, 4], 2, logprob_start=0))
    out = finishes(core)["a"]
    assert (out.finish.err_type, out.prompt_logprobs) == ("NaNError", None)


def test_a_token_outside_the_vocabulary_is_an_error() -> None:
    class Wild:
        def execute(self, batch: ScheduleBatch) -> StepOutput:
            return StepOutput(np.array([VOCAB], np.int32), [None])

    core = engine(Wild())
    core.add(request("a", [1]))
    assert "token id 100, outside the vocabulary" in finishes(core)["a"].finish.message


def test_the_cache_is_flushed_only_while_nothing_runs() -> None:
    core = engine()
    core.add(request("a", list(range(10)), 3))
    assert not core.flush_cache()
    finishes(core)
    assert core.stats()["tree_pages"] == 3
    assert core.flush_cache()
    assert core.stats()["free_pages"] == 32


def test_statistics_count_what_happened() -> None:
    core = engine()
    core.add(request("a", list(range(10)), 3))
    core.step()
    assert (core.last_step.prefill_tokens, core.last_step.decode_rows, core.last_step.running) == (10, 0, 1)
    core.step()
    assert (core.last_step.prefill_tokens, core.last_step.decode_rows) == (0, 1)
    finishes(core)
    core.add(request("b", list(range(10)), 3))
    core.step()
    assert (core.last_step.prefill_tokens, core.last_step.cached_tokens) == (1, 9)
    finishes(core)
    stats = core.stats()
    expected = {
        "requests": 2,
        "finished": 2,
        "prompt_tokens": 20,
        "cached_tokens": 9,
        "generated_tokens": 6,
        "steps": 6,
    }
    assert {name: stats[name] for name in expected} == expected
    assert stats["computed_tokens"] == 10 + 2 + 1 + 2


def test_the_fake_model_reads_its_context_back_through_the_page_table() -> None:
    contexts: list[list[int]] = []
    core = engine(next_token=lambda context: contexts.append(context) or 42)
    core.add(request("a", [5, 6, 7, 8, 9], 2))
    finishes(core)
    assert contexts == [[5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 42]]
