"""What a run leaves behind: its line of JSON, the table that is printed, and the facts of what it was measured on.

Owns keys, labels, order and number formats: first SGLang's, word for word, for scripts that read them, then what is
ours. Lines are appended, never replaced. A fact that is not known is absent, never guessed. Never computes a number.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mooli.bench.errors import BenchmarkError
from mooli.version import __version__

if TYPE_CHECKING:
    from mooli.bench.metrics import CacheReport, Distribution, Goodput, Metrics
    from mooli.bench.records import RequestRecord
    from mooli.bench.watching import ClientLoad

# -- the line of JSON --------------------------------------------------------------------------------------------------


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


# -- the table ---------------------------------------------------------------------------------------------------------

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
        row("Backend:", header.backend),
        row("Traffic request rate:", str(header.request_rate)),
        row("Max request concurrency:", header.max_concurrency or "not set"),
        row("Successful requests:", metrics.num_completed),
        row("Benchmark duration (s):", metrics.duration_s),
        row("Total input tokens:", metrics.total_input),
        row("Total input text tokens:", metrics.total_input),
        row("Total generated tokens:", metrics.total_output),
        row("Total generated tokens (retokenized):", metrics.total_output_retokenized),
        row("Request throughput (req/s):", metrics.request_throughput),
        row("Input token throughput (tok/s):", metrics.input_throughput),
        row("Output token throughput (tok/s):", metrics.output_throughput),
        row("Peak output token throughput (tok/s):", metrics.peak_output_throughput),
        row("Peak concurrent requests:", metrics.peak_concurrent_requests),
        row("Total token throughput (tok/s):", metrics.total_throughput),
        row("Concurrency:", metrics.concurrency),
    ]
    if metrics.accept_length:
        rows.append(row("Accept length:", metrics.accept_length))
    if metrics.goodput is not None:
        rows += _goodput_rows(metrics.goodput)
    rows += [
        *_distribution_rows("End-to-End Latency", "E2E Latency", metrics.e2e_latency),
        *_distribution_rows("Time to First Token", "TTFT", metrics.ttft),
        *_distribution_rows("Time per Output Token (excl. 1st token)", "TPOT", metrics.tpot),
        *_distribution_rows("Inter-Token Latency", "ITL", metrics.itl),
        row("Max ITL (ms):", metrics.itl.max),
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
        rows += [_title("Failures"), row("Failed requests:", metrics.num_failed)]
        rows += [f"  {count} x {reason}" for reason, count in metrics.failures]
        if metrics.num_interrupted:
            rows.append(row("Cut off by the user:", metrics.num_interrupted))
        if unsent:
            rows.append(row("Never sent:", unsent))
    rows += _reuse_rows(metrics)
    rows += [
        _title("This run"),
        row("Seed:", seed),
        row("Prompts:", dataset_note),
        row("Client send delay, mean (ms):", metrics.mean_send_delay_ms),
        row("Client event loop lag, p99 (ms):", client_load.p99_lag_ms),
        row("Client processor use (cores):", client_load.cpu_share),
        *(row(f"{name}:", value) for name, value in facts.items()),
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


def row(label: str, value: object) -> str:
    """A line of a table: floats with two decimals."""
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label:<{LABEL_WIDTH}} {shown:<10}"


def _title(words: str) -> str:
    return f"{words:-^{WIDTH}}"


def _goodput_rows(goodput: Goodput) -> list[str]:
    return [
        _title("Goodput"),
        row("SLOs (ms):", " ".join(f"{name}:{value:g}" for name, value in goodput.slos_ms.items())),
        row("Request goodput (req/s):", goodput.requests_per_s),
        row("SLO attainment (%):", goodput.attainment * 100),
        *(
            row(f"{name.upper()} SLO attainment (%):", share * 100)
            for name, share in goodput.attainment_by_metric.items()
        ),
    ]


def _distribution_rows(title: str, name: str, values: Distribution) -> Iterable[str]:
    yield _title(title)
    yield row(f"Mean {name} (ms):", values.mean)
    yield row(f"Median {name} (ms):", values.median)
    yield row(f"P90 {name} (ms):", values.p90)
    yield row(f"P95 {name} (ms):", values.p95)
    yield row(f"P99 {name} (ms):", values.p99)


def _cache_rows(metrics: Metrics) -> list[str]:
    rows = [_title("Cache Hit Details")]
    report = metrics.cache
    if report is None:
        return [*rows, "The server reports no cached tokens (SGLang's OpenAI routes: --enable-cache-report)"]
    rows += [
        row("Total prompt tokens:", report.total_prompt_tokens),
        row("Total cached tokens:", report.total_cached_tokens),
    ]
    if report.device_cached_tokens is not None:
        rows.append(row("  Device:", report.device_cached_tokens))
    if report.host_cached_tokens is not None:
        rows.append(row("  Host:", report.host_cached_tokens))
    if report.storage_cached_tokens is not None:
        place = f" ({report.storage_backend})" if report.storage_backend else ""
        rows.append(row(f"  Storage{place}:", report.storage_cached_tokens))
    rows.append(row("Cache hit rate:", f"{report.hit_rate_pct:.2f}%"))
    return rows


def _reuse_rows(metrics: Metrics) -> list[str]:
    report = metrics.cache
    if report is None or metrics.cold_ttft is None or metrics.warm_ttft is None:
        return []
    rows = [
        _title("Reuse, cold and warm"),
        row("Prompt tokens by the server's count:", report.total_prompt_tokens),
        row("Cache hit rate (%):", report.hit_rate_pct),
    ]
    for name, count, ttft in (
        ("Cold", metrics.num_cold, metrics.cold_ttft),
        ("Warm", metrics.num_warm, metrics.warm_ttft),
    ):
        rows.append(row(f"{name} requests:", count))
        if count:
            rows += [
                row(f"{name} mean TTFT (ms):", ttft.mean),
                row(f"{name} median TTFT (ms):", ttft.median),
                row(f"{name} P99 TTFT (ms):", ttft.p99),
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


# -- what it was measured on -------------------------------------------------------------------------------------------

_TELLING_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)

_ENGINE_KEYS = (
    "version",
    "model_path",
    "architecture",
    "device",
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "page_size",
    "context_length",
    "max_total_num_tokens",
    "max_running_requests",
    "tp_size",
)


def client_machine() -> dict[str, Any]:
    """This machine: cpu (name), cores, flags (of those that matter for kernels), system, python, mooli."""
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "mooli": __version__,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    fields = _cpu_fields()
    name = fields.get("model name") or platform.processor()
    if name:
        facts["cpu"] = name
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    if flags:
        facts["flags"] = [flag for flag in _TELLING_FLAGS if flag in flags]
    return facts


def engine_facts(server_info: Mapping[str, Any]) -> dict[str, Any]:
    """The telling ones of what /server_info says; a fact may stand at the top or in the first engine's state."""
    states = server_info.get("internal_states")
    state = states[0] if isinstance(states, list) and states and isinstance(states[0], Mapping) else {}
    facts: dict[str, Any] = {}
    for key in _ENGINE_KEYS:
        value = server_info.get(key)
        if value is None:
            value = state.get(key)
        if isinstance(value, (str, int, float)):
            facts[key] = value
    backend = server_info.get("backend")
    if isinstance(backend, Mapping):
        words = [f"{key} {backend[key]}" for key in ("library", "device", "isa", "num_threads") if backend.get(key)]
        if words:
            facts["backend"] = ", ".join(words)
    return facts


def _cpu_fields() -> dict[str, str]:
    """The first processor's entries of Linux's list; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
