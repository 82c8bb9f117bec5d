"""The table that is printed after a run.

Owns labels, order and number formats: the first part is SGLang's, word for word, for scripts that read it; what is ours
follows below its last line. Never computes anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mooli.bench.event_loop_lag import ClientLoad
from mooli.bench.metrics import Distribution, Goodput, Metrics

WIDTH = 50
LABEL_WIDTH = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class TableHeader:
    """request_rate: requests per second, or "trace" where a trace says when."""

    backend: str
    request_rate: float | str
    max_concurrency: int | None


def result_table(header: TableHeader, metrics: Metrics, *, with_cache_report: bool) -> str:
    """SGLang's table. Floats have two decimals, integers none."""
    rows = [
        "{s:{c}^{n}}".format(s=" Serving Benchmark Result ", c="=", n=WIDTH),
        _row("Backend:", header.backend),
        _row("Traffic request rate:", str(header.request_rate)),
        _row("Max request concurrency:", header.max_concurrency or "not set"),
        _row("Successful requests:", metrics.num_completed),
        _row("Benchmark duration (s):", metrics.duration_s),
        _row("Total input tokens:", metrics.total_input),
        _row("Total input text tokens:", metrics.total_input),
        _row("Total generated tokens:", metrics.total_output),
        _row("Total generated tokens (retokenized):", metrics.total_output_retokenized),
        _row("Request throughput (req/s):", metrics.request_throughput),
        _row("Input token throughput (tok/s):", metrics.input_throughput),
        _row("Output token throughput (tok/s):", metrics.output_throughput),
        _row("Peak output token throughput (tok/s):", metrics.peak_output_throughput),
        _row("Peak concurrent requests:", metrics.peak_concurrent_requests),
        _row("Total token throughput (tok/s):", metrics.total_throughput),
        _row("Concurrency:", metrics.concurrency),
    ]
    if metrics.accept_length:
        rows.append(_row("Accept length:", metrics.accept_length))
    if metrics.goodput is not None:
        rows += _goodput_rows(metrics.goodput)
    rows += [
        *_distribution_rows("End-to-End Latency", "E2E Latency", metrics.e2e_latency),
        *_distribution_rows("Time to First Token", "TTFT", metrics.ttft),
        *_distribution_rows("Time per Output Token (excl. 1st token)", "TPOT", metrics.tpot),
        *_distribution_rows("Inter-Token Latency", "ITL", metrics.itl),
        _row("Max ITL (ms):", metrics.itl.max),
    ]
    if with_cache_report:
        rows += _cache_rows(metrics)
    rows.append("=" * WIDTH)
    return "\n".join(rows)


def further_blocks(
    metrics: Metrics,
    *,
    client_load: ClientLoad,
    seed: int,
    dataset_note: str,
    facts: Mapping[str, Any],
    unsent: int = 0,
) -> str:
    """What SGLang's table does not say: failures, cold and warm, how the run was made, who measured whom."""
    rows: list[str] = []
    if metrics.num_failed or metrics.num_interrupted or unsent:
        rows += [_title("Failures"), _row("Failed requests:", metrics.num_failed)]
        rows += [f"  {count} x {reason}" for reason, count in metrics.failures]
        if metrics.num_interrupted:
            rows.append(_row("Cut off by the user:", metrics.num_interrupted))
        if unsent:
            rows.append(_row("Never sent:", unsent))
    rows += _reuse_rows(metrics)
    rows += [
        _title("This run"),
        _row("Seed:", seed),
        _row("Prompts:", dataset_note),
        _row("Client send delay, mean (ms):", metrics.mean_send_delay_ms),
        _row("Client event loop lag, p99 (ms):", client_load.p99_lag_ms),
        _row("Client processor use (cores):", client_load.cpu_share),
        *(_row(f"{name}:", value) for name, value in facts.items()),
        "=" * WIDTH,
    ]
    return "\n".join(rows)


def throughput_plot(metrics: Metrics, *, width: int = 72, height: int = 8) -> str:
    """Output tokens and open requests over time, drawn with characters."""
    return "\n\n".join(
        (
            _plot("Output tokens per second", metrics.output_tokens_per_second, width, height),
            _plot("Concurrent requests per second", metrics.requests_per_second, width, height),
        )
    )


def _row(label: str, value: object) -> str:
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label:<{LABEL_WIDTH}} {shown:<10}"


def _title(words: str) -> str:
    return f"{words:-^{WIDTH}}"


def _goodput_rows(goodput: Goodput) -> list[str]:
    return [
        _title("Goodput"),
        _row("SLOs (ms):", " ".join(f"{name}:{value:g}" for name, value in goodput.slos_ms.items())),
        _row("Request goodput (req/s):", goodput.requests_per_s),
        _row("SLO attainment (%):", goodput.attainment * 100),
        *(
            _row(f"{name.upper()} SLO attainment (%):", share * 100)
            for name, share in goodput.attainment_by_metric.items()
        ),
    ]


def _distribution_rows(title: str, name: str, values: Distribution) -> Iterable[str]:
    yield _title(title)
    yield _row(f"Mean {name} (ms):", values.mean)
    yield _row(f"Median {name} (ms):", values.median)
    yield _row(f"P90 {name} (ms):", values.p90)
    yield _row(f"P95 {name} (ms):", values.p95)
    yield _row(f"P99 {name} (ms):", values.p99)


def _cache_rows(metrics: Metrics) -> list[str]:
    rows = [_title("Cache Hit Details")]
    report = metrics.cache
    if report is None:
        return [*rows, "The server reports no cached tokens (SGLang's OpenAI routes: --enable-cache-report)"]
    rows += [
        _row("Total prompt tokens:", report.total_prompt_tokens),
        _row("Total cached tokens:", report.total_cached_tokens),
    ]
    if report.device_cached_tokens is not None:
        rows.append(_row("  Device:", report.device_cached_tokens))
    if report.host_cached_tokens is not None:
        rows.append(_row("  Host:", report.host_cached_tokens))
    if report.storage_cached_tokens is not None:
        place = f" ({report.storage_backend})" if report.storage_backend else ""
        rows.append(_row(f"  Storage{place}:", report.storage_cached_tokens))
    rows.append(_row("Cache hit rate:", f"{report.hit_rate_pct:.2f}%"))
    return rows


def _reuse_rows(metrics: Metrics) -> list[str]:
    report = metrics.cache
    if report is None or metrics.cold_ttft is None or metrics.warm_ttft is None:
        return []
    rows = [
        _title("Reuse, cold and warm"),
        _row("Prompt tokens by the server's count:", report.total_prompt_tokens),
        _row("Cache hit rate (%):", report.hit_rate_pct),
    ]
    for name, count, ttft in (
        ("Cold", metrics.num_cold, metrics.cold_ttft),
        ("Warm", metrics.num_warm, metrics.warm_ttft),
    ):
        rows.append(_row(f"{name} requests:", count))
        if count:
            rows += [
                _row(f"{name} mean TTFT (ms):", ttft.mean),
                _row(f"{name} median TTFT (ms):", ttft.median),
                _row(f"{name} P99 TTFT (ms):", ttft.p99),
            ]
    return rows


def _plot(title: str, values: list[int], width: int, height: int) -> str:
    """One column to a second; longer runs have several seconds to a column, shown by their largest."""
    step = max(-(-len(values) // width), 1)
    columns = [max(values[at : at + step]) for at in range(0, len(values), step)]
    top = max(columns, default=0)
    lines = [f"{title} (one column: {step} s)"]
    for level in range(height, 0, -1):
        label = f"{top * level / height:8.0f} |"
        lines.append(label + "".join("█" if top and value >= top * level / height else " " for value in columns))
    lines.append(" " * 9 + "+" + "-" * len(columns))
    return "\n".join(line.rstrip() for line in lines)
