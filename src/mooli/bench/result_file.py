"""The line of JSON a run leaves behind.

Owns its keys: first SGLang's, then, after `max_concurrent_requests`, what is ours. Lines are appended, never replaced.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mooli.bench.errors import BenchmarkError
from mooli.bench.metrics import CacheReport, Distribution, Metrics
from mooli.bench.records import RequestRecord


def measured(metrics: Metrics) -> dict[str, Any]:
    """SGLang's keys for what was measured, in its order."""
    result: dict[str, Any] = {
        "duration": metrics.duration_s,
        "completed": metrics.num_completed,
        "total_input_tokens": metrics.total_input,
        "total_input_text_tokens": metrics.total_input,
        "total_input_vision_tokens": 0,
        "total_output_tokens": metrics.total_output,
        "total_output_tokens_retokenized": metrics.total_output_retokenized,
        "request_throughput": metrics.request_throughput,
        "input_throughput": metrics.input_throughput,
        "output_throughput": metrics.output_throughput,
        "total_throughput": metrics.total_throughput,
    }
    for name in ("e2e_latency", "ttft", "tpot", "itl"):
        result |= _distribution(name, getattr(metrics, name))
    result |= {
        "concurrency": metrics.concurrency,
        "accept_length": metrics.accept_length,
        "max_output_tokens_per_s": metrics.peak_output_throughput,
        "max_concurrent_requests": metrics.peak_concurrent_requests,
    }
    if metrics.goodput is not None:
        result |= {
            "goodput_slos_ms": metrics.goodput.slos_ms,
            "request_goodput": metrics.goodput.requests_per_s,
            "slo_attainment": metrics.goodput.attainment,
            "slo_attainment_by_metric": metrics.goodput.attainment_by_metric,
        }
    return result


def cache_report(report: CacheReport) -> dict[str, Any]:
    """The object under `cache_report`."""
    return {
        "total_prompt_tokens": report.total_prompt_tokens,
        "total_cached_tokens": report.total_cached_tokens,
        "cache_hit_rate_pct": report.hit_rate_pct,
        "device_cached_tokens": report.device_cached_tokens,
        "host_cached_tokens": report.host_cached_tokens,
        "storage_cached_tokens": report.storage_cached_tokens,
        "storage_backend": report.storage_backend,
    }


def further(metrics: Metrics) -> dict[str, Any]:
    """Keys of ours about the requests: failures, the hit rate, cold and warm."""
    result: dict[str, Any] = {
        "max_itl_ms": metrics.itl.max,
        "failed": metrics.num_failed,
        "interrupted": metrics.num_interrupted,
        "failures": [{"reason": reason, "count": count} for reason, count in metrics.failures],
        "output_lens_unreported": metrics.num_output_lens_unreported,
        "cache_hit_rate_pct": metrics.cache.hit_rate_pct if metrics.cache is not None else None,
        "output_tokens_per_second": metrics.output_tokens_per_second,
        "requests_per_second": metrics.requests_per_second,
    }
    for name, count, ttft in (
        ("cold", metrics.num_cold, metrics.cold_ttft),
        ("warm", metrics.num_warm, metrics.warm_ttft),
    ):
        if ttft is not None:
            result[name] = {"requests": count, **_distribution("ttft", ttft)}
    return result


def details(records: Sequence[RequestRecord], run_start_s: float, *, with_cache: bool) -> dict[str, Any]:
    """Lists with one entry a request sent; times in seconds, starts from the start of the run."""
    result: dict[str, Any] = {
        "input_lens": [record.prompt_len for record in records],
        "output_lens": [record.output_len if record.success else 0 for record in records],
        "ttfts": [record.ttft_s for record in records],
        "itls": [record.itl_s for record in records],
        "generated_texts": [record.generated_text for record in records],
        "errors": ["cut off by the user" if record.interrupted else record.error for record in records],
    }
    if with_cache:
        result["cached_tokens"] = [record.cached_tokens for record in records]
        result["cached_tokens_details"] = [record.cached_tokens_details for record in records]
    result |= {
        "request_indices": [record.index for record in records],
        "turns": [record.turn for record in records],
        "start_times": [record.start_s - run_start_s for record in records],
        "latencies": [record.latency_s for record in records],
        "server_prompt_tokens": [record.server_prompt_tokens for record in records],
    }
    return result


def default_file_name(
    backend: str, dataset: str, num_prompts: int, random_lens: tuple[int, int], day: datetime.date
) -> str:
    """SGLang's name for the file of a run."""
    what = f"{random_lens[0]}_{random_lens[1]}" if dataset.startswith("random") else dataset
    return f"{backend}_{day:%m%d}_{num_prompts}_{what}.jsonl"


def append_line(file: Path, result: dict[str, Any]) -> None:
    """Add `result` to `file`. Raises BenchmarkError when it cannot be written."""
    try:
        with file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(result) + "\n")
    except OSError as exc:
        raise BenchmarkError(f"the result cannot be written to {file}: {exc.strerror}; see --output-file") from exc


def _distribution(name: str, values: Distribution) -> dict[str, float]:
    return {f"{kind}_{name}_ms": getattr(values, kind) for kind in ("mean", "median", "std", "p90", "p95", "p99")}
