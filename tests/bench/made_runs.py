"""Results of runs that never took place, out of drawn times, as `bench_serving` writes them."""

from __future__ import annotations

from typing import Any

import numpy as np

from mooli.bench import results
from mooli.bench.metrics import calculate_metrics
from mooli.bench.records import RequestRecord

SERVER_INFO = {"version": "0.1.0", "model_path": "m/small", "dtype": "bfloat16", "api_key": "sk-never-shown"}


def made_result(
    num: int = 100,
    *,
    seed: int = 1,
    speed: float = 1.0,
    rate: float = 5.0,
    output_len: int = 24,
    num_failed: int = 0,
    with_cache: bool = True,
    with_details: bool = True,
    **keys: Any,
) -> dict[str, Any]:
    """A line of JSON. speed: of the server. rate: requests per second. keys: replace those of the result."""
    draw = np.random.default_rng(seed)
    starts = np.cumsum(draw.exponential(1 / rate, num))
    records = []
    for i, start in enumerate(starts):
        is_warm = with_cache and i > 10 and draw.random() < 0.7
        ttft = float(draw.gamma(4, 0.012 if is_warm else 0.05) / speed)
        gaps = (0.012 + draw.gamma(2, 0.002, output_len - 1)) / speed
        gaps[draw.random(output_len - 1) < 0.01] += 0.15 / speed
        records.append(
            RequestRecord(
                index=i, prompt_len=256, start_s=100 + float(start), ttft_s=ttft, itl_s=[float(gap) for gap in gaps],
                latency_s=ttft + float(gaps.sum()), generated_text=f"Answer {i} about the sea and the land " * 4,
                output_len=output_len, is_output_len_reported=True, success=True,
                server_prompt_tokens=256 if with_cache else None,
                cached_tokens=(int(draw.integers(140, 250)) if is_warm else 0) if with_cache else None,
            )
        )  # fmt: skip
    for record in records[3 : 3 + num_failed]:
        record.success, record.error, record.output_len = False, "HTTP 503: the queue is full", 0
    duration = max(record.start_s + record.latency_s for record in records) - records[0].start_s
    metrics = calculate_metrics(records, duration, len)
    result: dict[str, Any] = {
        "tag": None, "backend": "sglang", "dataset_name": "random", "request_rate": rate, "max_concurrency": None,
        "random_input_len": 256, "random_output_len": output_len, "random_range_ratio": 1.0,
        "server_info": SERVER_INFO, **results.measured(metrics), **results.further(metrics),
        "seed": 42, "num_prompts": num, "dataset_note": "random words of the package's list", "model": "small",
        "tokenizer": "m/small", "force_miss": False, "unsent": 0, "is_interrupted": False,
        "date": "2025-01-02T03:04:05+00:00",
        "client": {
            "machine": {"system": "Linux 6.1 x86_64", "cores": 2, "cpu": "A Processor", "flags": ["avx2", "avx512f"]},
            "mean_send_delay_ms": 0.4, "p99_event_loop_lag_ms": 1.2, "cpu_share": 0.2,
        },
        "notes": [],
    }  # fmt: skip
    if with_details:
        result |= results.details(records, records[0].start_s, with_cache=True)
    return result | keys
