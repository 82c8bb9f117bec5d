"""OpenVINO GenAI on a GGUF file, in process: its continuous batching with prefix caching, one step after the other.

python openvino_worker.py MODEL.gguf NUM_THREADS CACHE_GB
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import openvino_genai
from protocol import Ledger, serve


def load() -> tuple[dict[str, Any], Callable[[Ledger], None]]:
    path, num_threads, cache_gb = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = True
    scheduler.cache_size = cache_gb
    pipeline = openvino_genai.ContinuousBatchingPipeline(path, scheduler, "CPU", {"INFERENCE_NUM_THREADS": num_threads})
    numbers = iter(range(1 << 60))

    def run(ledger: Ledger) -> None:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = ledger.output_len
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        active: dict[int, tuple[Any, list[int], list[float]]] = {}

        def send(conversation: int) -> None:
            prompt = np.array([ledger.prompt(conversation)], np.int64)
            sent_s = ledger.now()
            handle = pipeline.add_request(next(numbers), openvino.Tensor(prompt), config)
            active[conversation] = (handle, [], [sent_s])

        while True:
            while len(active) < ledger.at_once and (fresh := ledger.begin()) is not None:
                send(fresh)
            if not active:
                return
            pipeline.step()
            now = ledger.now()
            for conversation, (handle, ids, times) in list(active.items()):
                while handle.can_read():
                    for output in handle.read().values():
                        ids.extend(output.generated_ids)
                if ids and len(times) == 1:
                    times.append(now)
                if len(ids) >= ledger.output_len:
                    del active[conversation]
                    if ledger.answered(conversation, ids, times[0], times[1], now):
                        send(conversation)

    return {"version": openvino_genai.__version__.split("-")[0]}, run


if __name__ == "__main__":
    serve(load)
