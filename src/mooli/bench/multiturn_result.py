"""What a run of conversations amounts to, by round and in all.

Owns the summary's keys and lines, which are those of SGLang's bench_multiturn, and the rows of the rounds. Times are in
seconds here, as there. The formulas are those of `metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mooli.bench.metrics import Metrics, calculate_metrics
from mooli.bench.records import RequestRecord

_MS = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundMetrics:
    """One round over all conversations. hit_rate: 0 to 1; None where the server does not tell of its cache.

    uncached_tokens: mean tokens of a prompt that had to be computed.
    """

    index: int
    metrics: Metrics
    hit_rate: float | None
    uncached_tokens: float | None


def by_round(
    records: Sequence[RequestRecord], duration_s: float, count_tokens: Callable[[str], int], *, is_openai: bool
) -> list[RoundMetrics]:
    """The rounds of which at least one request succeeded."""
    rounds = []
    for index in sorted({record.turn for record in records}):
        of_round = [record for record in records if record.turn == index]
        metrics = calculate_metrics(of_round, duration_s, count_tokens, is_openai=is_openai)
        if not metrics.num_completed:
            continue
        known = sum(record.success and record.cached_tokens is not None for record in of_round)
        cache = metrics.cache
        uncached = None if cache is None else (cache.total_prompt_tokens - cache.total_cached_tokens) / max(known, 1)
        rounds.append(RoundMetrics(index=index, metrics=metrics, hit_rate=hit_rate(metrics), uncached_tokens=uncached))
    return rounds


def hit_rate(metrics: Metrics) -> float | None:
    """Cached tokens / prompt tokens, as the server reports both; None where it does not."""
    return None if metrics.cache is None else metrics.cache.hit_rate_pct / 100


def summary(metrics: Metrics, request_rate: float) -> dict[str, Any]:
    """The object under `summary`."""
    num = max(metrics.num_completed, 1)
    return {
        "total_requests": metrics.num_completed,
        "request_rate": request_rate,
        "average_prompt_len": metrics.total_input / num,
        "average_output_len": metrics.total_output / num,
        "average_ttft": metrics.ttft.mean / _MS,
        "p90_ttft": metrics.ttft.p90 / _MS,
        "median_ttft": metrics.ttft.median / _MS,
        "average_latency": metrics.e2e_latency.mean / _MS,
        "p90_latency": metrics.e2e_latency.p90 / _MS,
        "median_latency": metrics.e2e_latency.median / _MS,
        "input_token_throughput": metrics.input_throughput,
        "output_token_throughput": metrics.output_throughput,
        "throughput": metrics.request_throughput,
        "cache_hit_rate": hit_rate(metrics),
    }


def rounds_object(rounds: Sequence[RoundMetrics]) -> dict[str, Any]:
    """The object under `round`."""
    return {
        f"round_{one.index}": {
            "average_ttft": one.metrics.ttft.mean / _MS,
            "cache_hit_rate": one.hit_rate,
            "request_count": one.metrics.num_completed,
            "median_ttft": one.metrics.ttft.median / _MS,
            "p90_ttft": one.metrics.ttft.p90 / _MS,
            "p99_ttft": one.metrics.ttft.p99 / _MS,
            "average_latency": one.metrics.e2e_latency.mean / _MS,
            "average_prompt_len": one.metrics.total_input / one.metrics.num_completed,
            "average_uncached_len": one.uncached_tokens,
        }
        for one in rounds
    }


def summary_lines(values: dict[str, Any], rounds: Sequence[RoundMetrics]) -> str:
    """What is printed after a run."""
    lines = [
        "Performance metrics summary:",
        f"  Total requests: {values['total_requests']} at {values['request_rate']} requests per second",
        f"  Average Prompt Length: {values['average_prompt_len']:.2f} tokens",
        f"  Average Output Length: {values['average_output_len']:.2f} tokens",
        f"  Average TTFT: {values['average_ttft']:.2f}",
        f"  P90 TTFT: {values['p90_ttft']:.2f}",
        f"  Median TTFT: {values['median_ttft']:.2f}",
        f"  Average latency: {values['average_latency']:.2f}",
        f"  P90 latency: {values['p90_latency']:.2f}",
        f"  Median latency: {values['median_latency']:.2f}",
        f"  Input token throughput: {values['input_token_throughput']:.2f} tokens per second",
        f"  Output token throughput: {values['output_token_throughput']:.2f} tokens per second",
        f"  Request Throughput: {values['throughput']:.2f} requests per second",
        f"  Cache Hit Rate: {_share(values['cache_hit_rate'])}",
        "Per-round metrics:",
    ]
    for one in rounds:
        ttft = one.metrics.ttft
        computed = "" if one.uncached_tokens is None else f", computed {one.uncached_tokens:.0f} tokens"
        lines.append(
            f"  Round {one.index}: Average TTFT = {ttft.mean / _MS:.3f}s, Cache Hit Rate = {_share(one.hit_rate)}"
            f" ({one.metrics.num_completed} requests; TTFT median {ttft.median / _MS:.3f}s, P99 {ttft.p99 / _MS:.3f}s;"
            f" prompt {one.metrics.total_input / one.metrics.num_completed:.0f} tokens{computed})"
        )
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "not reported" if value is None else f"{value:.6f}"
