"""An engine process whose model takes no time: everything is real but the runner, which samples the same id each time.

Measures what serving costs beside computing. Started by benchmarks/serving_cost.py. STEP_MS in the environment makes
each step last so long, as a model's would, without computing.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np

from mooli.batch import ScheduleBatch, StepOutput
from mooli.cache.kv_cache import KVCache
from mooli.engine import messages, process
from mooli.engine.build import BuiltEngine, Progress, VocabSize
from mooli.engine.core import EngineCore
from mooli.engine.facts import EngineFacts
from mooli.scheduler.scheduler import Scheduler

TOKEN_ID = 260
CONTEXT = 8192
PAGE_SIZE, NUM_PAGES = 32, 8192


class InstantRunner:
    def __init__(self) -> None:
        self._step_s = float(os.environ.get("STEP_MS", "0")) / 1000

    def execute(self, batch: ScheduleBatch) -> StepOutput:
        if self._step_s:
            time.sleep(self._step_s)
        num_sampled = int(batch.num_samples.sum())
        return StepOutput(np.full(num_sampled, TOKEN_ID, np.int32), [None] * num_sampled, [])


def build(start: messages.Start, ask_vocab_size: VocabSize, progress: Progress) -> BuiltEngine:
    vocab_size = ask_vocab_size() or 1000
    scheduler = Scheduler(
        KVCache(NUM_PAGES, PAGE_SIZE),
        max_batch_tokens=512,
        max_running_requests=48,
        context_length=CONTEXT,
        vocab_size=vocab_size,
    )
    facts = EngineFacts(
        resolved_model_path=start.model_path,
        architecture="Instant",
        vocab_size=vocab_size,
        eos_ids=(),
        model_context_length=CONTEXT,
        context_length=CONTEXT,
        dtype="auto",
        kv_cache_dtype="auto",
        quantization=None,
        page_size=PAGE_SIZE,
        num_pages=NUM_PAGES,
        max_total_num_tokens=NUM_PAGES * PAGE_SIZE,
        max_running_requests=48,
        chunked_prefill_size=512,
        weight_bytes=0,
        kv_cache_bytes=0,
        load_time_s=0.0,
        cache_namespace="instant",
        speculative_algorithm=None,
        backend={},
    )
    return BuiltEngine(EngineCore(scheduler, InstantRunner()), None, facts, lambda: None, lambda: None)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(process.main(build))
