"""The formulas, on records whose numbers can be worked out by hand."""

from __future__ import annotations

import datetime

import pytest

from mooli.bench.errors import BenchmarkError
from mooli.bench.metrics import Distribution, calculate_metrics, parse_slos
from mooli.bench.records import RequestRecord
from mooli.bench.results import (
    TableHeader,
    cache_report,
    default_file_name,
    details,
    further_blocks,
    measured,
    result_table,
    throughput_plot,
)
from mooli.bench.watching import ClientLoad

RECORDS = [
    RequestRecord(
        index=0, prompt_len=10, start_s=100.0, ttft_s=0.2, latency_s=1.2, itl_s=[0.5, 0.5], output_len=3,
        is_output_len_reported=True, generated_text="abc", success=True, server_prompt_tokens=11, cached_tokens=0,
    ),
    RequestRecord(
        index=1, prompt_len=20, start_s=100.5, ttft_s=0.1, latency_s=0.1, output_len=1, is_output_len_reported=True,
        generated_text="x", success=True, server_prompt_tokens=21, cached_tokens=16,
        cached_tokens_details={"device": 12, "host": 4, "storage": 0, "storage_backend": "file"},
    ),
    RequestRecord(index=2, prompt_len=30, start_s=100.0, error="HTTP 400: 31 tokens are too many"),
    RequestRecord(index=3, prompt_len=30, start_s=100.0, error="HTTP 400: 99 tokens are too many"),
    RequestRecord(index=4, prompt_len=30, start_s=101.0, interrupted=True),
]  # fmt: skip

SLOS = {"ttft": 150.0, "tpot": 600.0, "e2el": 2000.0}


def test_totals_and_rates_are_of_successful_requests_over_the_whole_duration() -> None:
    metrics = calculate_metrics(RECORDS, 2.0, len)
    assert (metrics.num_sent, metrics.num_completed, metrics.num_failed, metrics.num_interrupted) == (4, 2, 2, 1)
    assert (metrics.total_input, metrics.total_output, metrics.total_output_retokenized) == (30, 4, 4)
    assert (metrics.request_throughput, metrics.input_throughput, metrics.output_throughput) == (1.0, 15.0, 2.0)
    assert metrics.total_throughput == 17.0
    assert metrics.concurrency == pytest.approx(0.65)


def test_time_per_output_token_leaves_out_answers_of_one_token() -> None:
    metrics = calculate_metrics(RECORDS, 2.0, len)
    assert metrics.tpot.mean == metrics.tpot.max == pytest.approx(500)
    assert metrics.itl.mean == pytest.approx(500)
    assert metrics.ttft.mean == pytest.approx(150)


def test_peaks_are_of_seconds_that_begin_with_the_first_request() -> None:
    metrics = calculate_metrics(RECORDS, 2.0, len)
    # Tokens at 0.2, 0.7 and 1.2 of the first request, at 0.6 of the second.
    assert metrics.output_tokens_per_second == [3, 1, 0]
    assert metrics.requests_per_second == [2, 1, 0]
    assert (metrics.peak_output_throughput, metrics.peak_concurrent_requests) == (3.0, 2)


def test_a_distribution_has_numpys_percentiles_and_the_populations_deviation() -> None:
    values = Distribution.of([0.001, 0.002, 0.003, 0.004])
    assert (values.mean, values.median, values.max) == pytest.approx((2.5, 2.5, 4.0))
    assert values.std == pytest.approx(1.25**0.5)
    assert (values.p90, values.p99) == pytest.approx((3.7, 3.97))


def test_nothing_finished_is_all_zeros_and_no_error() -> None:
    metrics = calculate_metrics(RECORDS[2:], 2.0, len)
    assert (metrics.num_completed, metrics.ttft.p99, metrics.itl.max, metrics.peak_output_throughput) == (0, 0, 0, 0)
    assert metrics.cache is None
    assert calculate_metrics([], 0.0, len).request_throughput == 0.0


def test_goodput_wants_every_objective_and_shares_are_of_all_that_was_sent() -> None:
    goodput = calculate_metrics(RECORDS, 2.0, len, slos_ms=SLOS).goodput
    assert goodput is not None
    assert goodput.requests_per_s == 0.5
    assert goodput.attainment == 0.25
    assert goodput.attainment_by_metric == {"ttft": 0.25, "tpot": 0.5, "e2el": 0.5}


def test_failures_that_differ_in_numbers_only_are_one_reason() -> None:
    assert calculate_metrics(RECORDS, 2.0, len).failures == [("HTTP 400: 31 tokens are too many", 2)]


def test_the_hit_rate_rests_on_what_the_server_counts() -> None:
    report = calculate_metrics(RECORDS, 2.0, len).cache
    assert report is not None
    assert cache_report(report) == {
        "total_prompt_tokens": 32,
        "total_cached_tokens": 16,
        "cache_hit_rate_pct": 50.0,
        "device_cached_tokens": 12,
        "host_cached_tokens": 4,
        "storage_cached_tokens": 0,
        "storage_backend": "file",
    }


@pytest.mark.parametrize(
    "pairs",
    [["itl:10"], ["ttft"], ["ttft:"], ["ttft:fast"], ["ttft:0"], ["ttft:-5"], ["ttft:inf"], ["ttft:1", "ttft:2"]],
)
def test_objectives_that_mean_nothing_are_refused(pairs: list[str]) -> None:
    with pytest.raises(BenchmarkError, match="--goodput"):
        parse_slos(pairs)


def test_objectives_are_milliseconds_by_name() -> None:
    assert parse_slos(["ttft:500", "e2el:20000.5"]) == {"ttft": 500.0, "e2el": 20000.5}


TABLE = """\
============ Serving Benchmark Result ============
Backend:                                 sglang
Traffic request rate:                    inf
Max request concurrency:                 not set
Successful requests:                     2
Benchmark duration (s):                  2.00
Total input tokens:                      30
Total input text tokens:                 30
Total generated tokens:                  4
Total generated tokens (retokenized):    4
Request throughput (req/s):              1.00
Input token throughput (tok/s):          15.00
Output token throughput (tok/s):         2.00
Peak output token throughput (tok/s):    3.00
Peak concurrent requests:                2
Total token throughput (tok/s):          17.00
Concurrency:                             0.65
Accept length:                           1.50
---------------------Goodput----------------------
SLOs (ms):                               ttft:150 tpot:600 e2el:2000
Request goodput (req/s):                 0.50
SLO attainment (%):                      25.00
TTFT SLO attainment (%):                 25.00
TPOT SLO attainment (%):                 50.00
E2EL SLO attainment (%):                 50.00
----------------End-to-End Latency----------------
Mean E2E Latency (ms):                   650.00
Median E2E Latency (ms):                 650.00
P90 E2E Latency (ms):                    1090.00
P95 E2E Latency (ms):                    1145.00
P99 E2E Latency (ms):                    1189.00
---------------Time to First Token----------------
Mean TTFT (ms):                          150.00
Median TTFT (ms):                        150.00
P90 TTFT (ms):                           190.00
P95 TTFT (ms):                           195.00
P99 TTFT (ms):                           199.00
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          500.00
Median TPOT (ms):                        500.00
P90 TPOT (ms):                           500.00
P95 TPOT (ms):                           500.00
P99 TPOT (ms):                           500.00
---------------Inter-Token Latency----------------
Mean ITL (ms):                           500.00
Median ITL (ms):                         500.00
P90 ITL (ms):                            500.00
P95 ITL (ms):                            500.00
P99 ITL (ms):                            500.00
Max ITL (ms):                            500.00
----------------Cache Hit Details-----------------
Total prompt tokens:                     32
Total cached tokens:                     16
  Device:                                12
  Host:                                  4
  Storage (file):                        0
Cache hit rate:                          50.00%
=================================================="""


def test_the_table_is_sglangs_word_for_word() -> None:
    metrics = calculate_metrics(RECORDS, 2.0, len, accept_length=1.5, slos_ms=SLOS)
    header = TableHeader(backend="sglang", request_rate=float("inf"), max_concurrency=None)
    table = result_table(header, metrics, with_cache_report=True)
    assert "\n".join(line.rstrip() for line in table.splitlines()) == TABLE


def test_values_are_padded_to_ten_columns_as_sglangs_are() -> None:
    header = TableHeader(backend="sglang", request_rate=float("inf"), max_concurrency=None)
    table = result_table(header, calculate_metrics(RECORDS, 2.0, len), with_cache_report=False)
    rows = [line for line in table.splitlines() if ":" in line]
    assert {len(row) for row in rows} == {51}


def test_blocks_that_were_not_asked_for_are_not_in_the_table() -> None:
    header = TableHeader(backend="vllm", request_rate=4.0, max_concurrency=8)
    table = result_table(header, calculate_metrics(RECORDS, 2.0, len), with_cache_report=False)
    assert "Goodput" not in table and "Accept length" not in table and "Cache Hit" not in table
    assert f"{'Traffic request rate:':<40} 4.0       \n{'Max request concurrency:':<40} 8         \n" in table


def test_what_sglangs_table_does_not_say_follows_it() -> None:
    load = ClientLoad(mean_lag_ms=0.1, p99_lag_ms=0.5, max_lag_ms=2.0, cpu_share=0.25)
    metrics = calculate_metrics(RECORDS, 2.0, len)
    text = further_blocks(
        metrics, client_load=load, seed=42, dataset_note="random", facts={"Server dtype": "bf16"}, unsent=3
    )
    for words in (
        "  2 x HTTP 400: 31 tokens",
        "Cut off by the user:",
        "Never sent:",
        "Cold requests:",
        "Warm requests:",
    ):
        assert words in text
    assert f"{'Seed:':<40} 42" in text
    assert f"{'Server dtype:':<40} bf16" in text


KEYS = [
    "duration",
    "completed",
    "total_input_tokens",
    "total_input_text_tokens",
    "total_input_vision_tokens",
    "total_output_tokens",
    "total_output_tokens_retokenized",
    "request_throughput",
    "input_throughput",
    "output_throughput",
    "total_throughput",
]


def test_the_keys_of_the_file_are_sglangs_in_its_order() -> None:
    kinds = ("mean", "median", "std", "p90", "p95", "p99")
    times = [f"{kind}_{name}_ms" for name in ("e2e_latency", "ttft", "tpot", "itl") for kind in kinds]
    last = ["concurrency", "accept_length", "max_output_tokens_per_s", "max_concurrent_requests"]
    metrics = calculate_metrics(RECORDS, 2.0, len)
    assert list(measured(metrics)) == [*KEYS, *times, *last]
    with_slos = measured(calculate_metrics(RECORDS, 2.0, len, slos_ms=SLOS))
    assert list(with_slos)[-4:] == ["goodput_slos_ms", "request_goodput", "slo_attainment", "slo_attainment_by_metric"]


def test_details_have_one_entry_a_request() -> None:
    lists = details(RECORDS, 100.0, with_cache=True)
    theirs = ["input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors"]
    assert list(lists)[:8] == [*theirs, "cached_tokens", "cached_tokens_details"]
    assert {len(values) for values in lists.values()} == {5}
    assert lists["output_lens"] == [3, 1, 0, 0, 0]
    assert lists["start_times"] == [0.0, 0.5, 0.0, 0.0, 1.0]
    assert lists["errors"][4] == "cut off by the user"


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("random", "sglang_0307_10_512_64.jsonl"),
        ("random-ids", "sglang_0307_10_512_64.jsonl"),
        ("custom", "sglang_0307_10_custom.jsonl"),
    ],
)
def test_the_file_has_sglangs_name(dataset: str, name: str) -> None:
    assert default_file_name("sglang", dataset, 10, (512, 64), datetime.date(2026, 3, 7)) == name


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (ClientLoad(mean_lag_ms=0, p99_lag_ms=0, max_lag_ms=0, cpu_share=0.95), "the client itself was the bottleneck"),
        (ClientLoad(mean_lag_ms=5, p99_lag_ms=40, max_lag_ms=90, cpu_share=0.3), "the client itself was late"),
        (ClientLoad(mean_lag_ms=0.1, p99_lag_ms=1, max_lag_ms=9, cpu_share=0.3), None),
    ],
)
def test_a_client_that_is_in_its_own_way_says_so(load: ClientLoad, words: str | None) -> None:
    complaint = load.complaint(median_itl_ms=20.0)
    assert complaint is None if words is None else complaint is not None and words in complaint


def test_a_plot_has_a_column_for_every_second_of_a_short_run() -> None:
    plot = throughput_plot(calculate_metrics(RECORDS, 2.0, len), height=3)
    assert "Output tokens per second (one column: 1 s)" in plot
    assert "       3 |█\n       2 |█\n       1 |██\n         +---" in plot
