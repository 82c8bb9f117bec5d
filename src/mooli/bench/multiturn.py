"""`mooli bench multiturn`: conversations of several rounds against a running server.

Owns the command: one run a rate, what a run amounts to by round and in all, what is printed after each, and the file.
Keys and lines of the summary are those of SGLang's bench_multiturn, with times in seconds as there; the formulas are
those of `metrics`. Each request holds the whole conversation so far, the server's own answers included. What is said
and when is in `multiturn_load`.
"""

from __future__ import annotations

import asyncio
import datetime
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from mooli.bench import results
from mooli.bench.apis import Api
from mooli.bench.client import Client, ServerContact, open_session
from mooli.bench.command import ended, fail, say, status, stopping_on_ctrl_c
from mooli.bench.errors import BenchmarkError
from mooli.bench.load import LoadResult
from mooli.bench.metrics import Metrics, calculate_metrics
from mooli.bench.multiturn_flags import PROGRAM, MultiturnOptions, parse_multiturn_arguments
from mooli.bench.multiturn_load import Conversation, converse_under_load, make_conversations, move_on, pace
from mooli.bench.records import BenchRequest, RequestRecord
from mooli.bench.report_page import write_page
from mooli.bench.report_runs import run_of
from mooli.bench.results import client_machine, engine_facts
from mooli.bench.serving import SETTLE_S, find_tokenizer
from mooli.bench.watching import ClientLoad, EventLoopLag, Progress


def main(argv: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    try:
        options = parse_multiturn_arguments(argv)
    except BenchmarkError as exc:
        return fail(PROGRAM, exc, status=2)
    return ended(PROGRAM, lambda: asyncio.run(_run(options)))


async def _run(options: MultiturnOptions) -> int:
    def keep(run: RateRun) -> bool:
        report(options, run, say)
        statuses.append(_status(run))
        return statuses[-1] == 0

    statuses: list[int] = []
    await measure_rates(options, stopping=stopping_on_ctrl_c(), say=say, keep=keep)
    return statuses[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class RateRun:
    """What one rate brought. server_info: empty where the server tells nothing or is gone."""

    request_rate: float
    load: LoadResult
    metrics: Metrics
    rounds: list[RoundMetrics]
    client_load: ClientLoad
    server_info: dict[str, Any]
    model: str


async def measure_rates(
    options: MultiturnOptions,
    *,
    stopping: AbstractContextManager[asyncio.Event],
    say: Callable[[str], None],
    keep: Callable[[RateRun], bool],
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Measure one rate after another.

    stopping: entered before the first; setting its event ends the run early, and what finished is measured. keep: takes
        what a rate brought; False ends it there. clock: of all times of requests.
    Raises BenchmarkError when a run cannot begin; once it has begun, failures are part of the measurement.
    """
    target = options.target
    async with open_session(target.headers) as session:
        contact = ServerContact(session, target.base_url, say)
        first_model = await contact.wait_until_ready(target.ready_check_timeout_s)
        model = target.served_model_name or first_model
        if model is None:
            raise BenchmarkError(f"{target.base_url}/v1/models names no model; give --served-model-name")
        tokenizer, _ = find_tokenizer(target.tokenizer, await contact.model_info(), model)

        def count_tokens(text: str) -> int:
            return len(tokenizer.encode(text, add_special_tokens=False))

        client = Client(session, target.base_url, target.backend, target.request, model=model, clock=clock)
        is_alone = len(options.rates) == 1
        say("Running with specified request rate..." if is_alone else "Auto-running with different request rates...")
        with stopping as stop:
            for rate in options.rates:
                conversations = make_conversations(options, tokenizer)
                if options.can_flush:
                    await contact.flush_cache(target.flush_cache_timeout_s)
                    await asyncio.sleep(SETTLE_S)
                load, client_load = await _load(options, rate, client, conversations, count_tokens, clock, stop)
                is_openai = target.backend.api is not Api.NATIVE
                run = RateRun(
                    request_rate=rate,
                    load=load,
                    metrics=calculate_metrics(load.records, load.duration_s, count_tokens, is_openai=is_openai),
                    rounds=by_round(load.records, load.duration_s, count_tokens, is_openai=is_openai),
                    client_load=client_load,
                    server_info={} if load.is_server_gone else await contact.server_info(),
                    model=model,
                )
                if not keep(run):
                    return


async def _load(
    options: MultiturnOptions,
    rate: float,
    client: Client,
    conversations: Sequence[Conversation],
    count_tokens: Callable[[str], int],
    clock: Callable[[], float],
    stop: asyncio.Event,
) -> tuple[LoadResult, ClientLoad]:
    async def send(conversation: Conversation, records: list[RequestRecord]) -> bool:
        request = BenchRequest(
            prompt=conversation.history, prompt_len=conversation.prompt_len, output_len=options.output_len
        )
        first = len(records)
        try:
            await client.converse(conversation.index, request, records)
        finally:
            # Others may have come behind it; a conversation has one request at a time.
            record = next(record for record in records[first:] if record.index == conversation.index)
            record.turn = conversation.round_index
            record.prompt_len = record.server_prompt_tokens or record.prompt_len
        if record.success:
            move_on(conversation, record, count_tokens)
        return record.success

    how = pace(
        max_parallel=options.max_parallel,
        request_rate=rate,
        distribution=options.distribution,
        policy=options.ready_queue_policy,
        has_round_barrier=options.has_round_barrier,
        seed=options.seed,
    )
    records: list[RequestRecord] = []
    total = sum(len(conversation.questions) for conversation in conversations)
    out = sys.stderr if options.show_progress else None
    async with EventLoopLag() as lag, Progress(records, total, out):
        load = await converse_under_load(conversations, send, how, clock=clock, stop=stop, records=records)
    return load, lag.load()


def report(options: MultiturnOptions, run: RateRun, say: Callable[[str], None]) -> None:
    """Print a run, append its line of JSON and write the report, if one is asked for.

    Raises BenchmarkError when a file cannot be written.
    """
    metrics = run.metrics
    say(f"{metrics.num_completed} requests completed" if run.load.num_unsent else "All requests completed")
    if not metrics.num_completed:
        return
    say(summary_lines(summary(metrics, run.request_rate), run.rounds))
    for reason, count in metrics.failures:
        say(f"  failed: {count} x {reason}")
    complaint = run.client_load.complaint(metrics.itl.median)
    if complaint:
        say(f"note: {complaint}")
    results.append_line(options.log_file, result_object(options, run))
    say(f"Result appended to {options.log_file}")
    if options.report_file is not None:
        place = str(options.log_file)
        write_page(options.report_file, [run_of(report_object(options, run), options.log_file.stem, place=place)])
        say(f"Report written to {options.report_file}")


def report_object(options: MultiturnOptions, run: RateRun) -> dict[str, Any]:
    """What the page of charts reads: the keys of `mooli bench serving`, each request with its round as its turn."""
    return {
        **result_object(options, run),
        "dataset_note": f"{options.num_clients} conversations of {_rounds(options)} rounds",
        "request_rate": run.request_rate,
        "max_concurrency": options.max_parallel,
        "server_info": run.server_info or None,
        "is_interrupted": run.load.is_interrupted,
        "client": {"machine": client_machine()},
        **results.measured(run.metrics),
        **results.further(run.metrics),
        **results.details(run.load.records, run.load.start_s, with_cache=True),
    }


def _rounds(options: MultiturnOptions) -> str:
    least, most = options.min_rounds, options.max_rounds
    return str(least) if least == most else f"{least} to {most}"


def result_object(options: MultiturnOptions, run: RateRun) -> dict[str, Any]:
    """The line of JSON: SGLang's keys, then ours."""
    metrics = run.metrics
    return {
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "tag": options.tag,
        "summary": summary(metrics, run.request_rate),
        "round": rounds_object(run.rounds),
        "backend": options.target.backend.name,
        "model": run.model,
        "num_clients": options.num_clients,
        "rounds": [options.min_rounds, options.max_rounds],
        "max_parallel": options.max_parallel,
        "request_length": options.request_len,
        "sub_question_input_length": options.question_len,
        "output_length": options.output_len,
        "distribution": options.distribution,
        "ready_queue_policy": options.ready_queue_policy,
        "round_barrier": options.has_round_barrier,
        "seed": options.seed,
        "duration": metrics.duration_s,
        "failed": metrics.num_failed,
        "interrupted": metrics.num_interrupted,
        "unsent": run.load.num_unsent,
        "failures": [{"reason": reason, "count": count} for reason, count in metrics.failures],
        "client": client_machine(),
        "engine": engine_facts(run.server_info),
    }


def _status(run: RateRun) -> int:
    return status(PROGRAM, run.metrics, is_interrupted=run.load.is_interrupted, is_server_gone=run.load.is_server_gone)


# -- what a run amounts to ---------------------------------------------------------------------------------------------

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
