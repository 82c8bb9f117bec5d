"""One run of `bench_serving`, from the first contact with the server to the numbers.

Owns the order of things: contact, tokenizer, prompts, warm-up, flush, load, numbers (`measure`); then the table and the
file (`report`); and where the tokenizer that counts a run's tokens is looked for, never on the network. Never parses
arguments.
"""

from __future__ import annotations

import asyncio
import datetime
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from mooli.bench import results
from mooli.bench.apis import Api
from mooli.bench.arguments import BenchOptions
from mooli.bench.client import Client, ServerContact, UnreachableError, accept_length, open_session
from mooli.bench.command import say, status, stopping_on_ctrl_c
from mooli.bench.datasets import Dataset, DatasetOptions, Randoms, load_dataset
from mooli.bench.errors import BenchmarkError
from mooli.bench.load import LoadResult, arrival_times, put_under_load
from mooli.bench.metrics import Metrics, calculate_metrics
from mooli.bench.records import BenchRequest, RequestRecord
from mooli.bench.report_page import write_page
from mooli.bench.report_runs import run_of
from mooli.bench.results import TableHeader, client_machine, engine_facts, further_blocks, result_table, throughput_plot
from mooli.bench.watching import LATE_MS, ClientLoad, EventLoopLag, Progress
from mooli.errors import ModelError
from mooli.frontend.tokenizer import Tokenizer, load_tokenizer
from mooli.hub import resolve

WARMUP_OUTPUT_LEN = 32
SETTLE_S = 1.0
"""Rest between warm-up and run, as SGLang's client has it."""

LATE_SHARE = 0.2
"""From this share of the mean TTFT on, the time before a request is on the wire is worth a note."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Everything a run brought. notes: what the reader of the numbers should know."""

    load: LoadResult
    metrics: Metrics
    client_load: ClientLoad
    server_info: dict[str, Any]
    dataset: Dataset
    model: str
    tokenizer_place: str
    notes: tuple[str, ...]


async def measure_and_report(
    program: str,
    options: BenchOptions,
    load: Callable[[DatasetOptions, Tokenizer, Randoms], Dataset] = load_dataset,
) -> int:
    """One run against a server, its table and its line of JSON; the exit status. Raises BenchmarkError."""
    progress_out = sys.stderr if options.show_progress else None
    run = await measure(options, stopping=stopping_on_ctrl_c(), say=say, progress_out=progress_out, load=load)
    file = report(options, run, say)
    if file is not None:
        say(f"Result appended to {file}")
    return status(program, run.metrics, is_interrupted=run.load.is_interrupted, is_server_gone=run.load.is_server_gone)


async def measure(
    options: BenchOptions,
    *,
    stopping: AbstractContextManager[asyncio.Event],
    say: Callable[[str], None],
    progress_out: TextIO | None,
    clock: Callable[[], float] = time.perf_counter,
    load: Callable[[DatasetOptions, Tokenizer, Randoms], Dataset] = load_dataset,
) -> Measurement:
    """Measure a server.

    stopping: entered while the server is under load; setting its event ends the run early, and what finished is
        measured. say: takes lines for the user. clock: of all times of requests. load: makes the prompts.
    Raises BenchmarkError when the run cannot begin; once it has begun, failures are part of the measurement.
    """
    randoms = Randoms.seeded(options.seed)
    async with open_session(options.headers) as session:
        contact = ServerContact(session, options.base_url, say)
        first_model = await contact.wait_until_ready(options.ready_check_timeout_s)
        model = options.model or first_model
        if model is None:
            raise BenchmarkError(f"{options.base_url}/v1/models names no model; give --model")
        tokenizer, place = find_tokenizer(options.tokenizer, await contact.model_info(), model)

        def count_tokens(text: str) -> int:
            return len(tokenizer.encode(text, add_special_tokens=False))

        dataset = load(options.data, tokenizer, randoms)
        _say_dataset(dataset, say)
        times = arrival_times(dataset.requests, request_rate=options.request_rate, generator=randoms.numpy)
        client = Client(
            session,
            options.base_url,
            options.backend,
            options.request,
            model=options.served_model_name or model,
            clock=clock,
            salt=secrets.token_hex(8) if options.force_miss else None,
            count_tokens=count_tokens,
        )
        await _warm_up(client, dataset.requests[0], options.warmup_requests, say)
        if options.flush_cache:
            await contact.flush_cache(options.flush_cache_timeout_s)
        await asyncio.sleep(SETTLE_S)

        async def send(index: int, request: BenchRequest, records: list[RequestRecord]) -> None:
            first = len(records)
            try:
                await client.converse(index, request, records)
            finally:
                if options.print_requests:
                    _say_request(request, [r for r in records[first:] if r.index == index], say)

        records: list[RequestRecord] = []
        num_answers = sum(1 + len(request.later_turns) for request in dataset.requests)
        with stopping as stop:
            async with EventLoopLag() as lag, Progress(records, num_answers, progress_out):
                load_result = await put_under_load(
                    dataset.requests,
                    times,
                    send,
                    max_concurrency=options.max_concurrency,
                    clock=clock,
                    stop=stop,
                    records=records,
                )
        server_info = {} if load_result.is_server_gone else await contact.server_info()
    metrics = calculate_metrics(
        load_result.records,
        load_result.duration_s,
        count_tokens,
        accept_length=accept_length(server_info),
        is_openai=options.backend.api is not Api.NATIVE,
        slos_ms=dict(options.slos_ms),
    )
    client_load = lag.load()
    return Measurement(
        load=load_result,
        metrics=metrics,
        client_load=client_load,
        server_info=server_info,
        dataset=dataset,
        model=model,
        tokenizer_place=place,
        notes=_notes(options, metrics, client_load),
    )


def report(options: BenchOptions, run: Measurement, say: Callable[[str], None]) -> Path | None:
    """Print the table, append the line of JSON and write the report, if one is asked for.

    Returns the file of the line, None when nothing had finished: then no file is written.
    Raises BenchmarkError when a file cannot be written, after the table.
    """
    metrics = run.metrics
    if metrics.num_completed:
        header = TableHeader(
            backend=options.backend.name, request_rate=_rate(options), max_concurrency=options.max_concurrency
        )
        if options.plot_throughput:
            say(throughput_plot(metrics))
        say("\n" + result_table(header, metrics, with_cache_report=options.cache_report))
    facts: dict[str, Any] = {"Model": run.model, "Tokenizer": run.tokenizer_place}
    machine = client_machine()
    facts |= {f"Client {key}": _words(value) for key, value in machine.items()}
    facts |= {f"Server {key}": value for key, value in engine_facts(run.server_info).items()}
    say(
        further_blocks(
            metrics,
            client_load=run.client_load,
            seed=options.seed,
            dataset_note=run.dataset.note,
            facts=facts,
            unsent=run.load.num_unsent,
        )
    )
    for note in run.notes:
        say(f"note: {note}")
    if not metrics.num_completed:
        return None
    file = options.output_file or Path(
        results.default_file_name(
            options.backend.name,
            options.data.name,
            options.data.num_prompts,
            (options.data.random_input_len, options.data.random_output_len),
            datetime.date.today(),
        )
    )
    result = result_object(options, run, machine)
    results.append_line(file, result)
    if options.report_file is not None:
        result |= results.details(run.load.records, run.load.start_s, with_cache=True)
        write_page(options.report_file, [run_of(result, file.stem, place=str(file))])
        say(f"Report written to {options.report_file}")
    return file


def result_object(options: BenchOptions, run: Measurement, machine: dict[str, Any]) -> dict[str, Any]:
    """The line of JSON: SGLang's keys in its order, then ours."""
    result: dict[str, Any] = {
        "tag": options.tag,
        "backend": options.backend.name,
        "dataset_name": options.data.name,
        "request_rate": _rate(options),
        "max_concurrency": options.max_concurrency,
        "sharegpt_output_len": options.data.sharegpt_output_len,
        "random_input_len": options.data.random_input_len,
        "random_output_len": options.data.random_output_len,
        "random_range_ratio": options.data.random_range_ratio,
        "server_info": run.server_info or None,
        **results.measured(run.metrics),
    }
    if options.cache_report and run.metrics.cache is not None:
        result["cache_report"] = results.cache_report(run.metrics.cache)
    result |= results.further(run.metrics)
    result |= {
        "seed": options.seed,
        "num_prompts": len(run.dataset.requests),
        "dataset_note": run.dataset.note,
        "model": run.model,
        "tokenizer": run.tokenizer_place,
        "force_miss": options.force_miss,
        "unsent": run.load.num_unsent,
        "is_interrupted": run.load.is_interrupted,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "client": {
            "machine": machine,
            "mean_send_delay_ms": run.metrics.mean_send_delay_ms,
            "mean_event_loop_lag_ms": run.client_load.mean_lag_ms,
            "p99_event_loop_lag_ms": run.client_load.p99_lag_ms,
            "max_event_loop_lag_ms": run.client_load.max_lag_ms,
            "cpu_share": run.client_load.cpu_share,
        },
        "notes": list(run.notes),
    }
    if options.output_details:
        result |= results.details(run.load.records, run.load.start_s, with_cache=options.cache_report)
    return result


async def _warm_up(client: Client, request: BenchRequest, num: int, say: Callable[[str], None]) -> None:
    """Send the first request `num` times at once, for short answers. Raises BenchmarkError if none succeeds."""
    if not num:
        return
    say(f"Warming up with {num} request{'' if num == 1 else 's'}")
    records: list[RequestRecord] = []
    output_len = min(request.output_len, WARMUP_OUTPUT_LEN)
    jobs = [client.converse(i, request, records, output_len=output_len) for i in range(num)]
    for outcome in await asyncio.gather(*jobs, return_exceptions=True):
        if isinstance(outcome, BaseException) and not isinstance(outcome, UnreachableError):
            raise outcome
    if not any(record.success for record in records):
        raise BenchmarkError(f"all warm-up requests failed: {records[0].error}")


def _notes(options: BenchOptions, metrics: Metrics, client_load: ClientLoad) -> tuple[str, ...]:
    notes = []
    complaint = client_load.complaint(metrics.itl.median)
    if complaint and metrics.num_completed:
        notes.append(complaint)
    delay_ms = metrics.mean_send_delay_ms
    if delay_ms >= LATE_MS and delay_ms >= LATE_SHARE * metrics.ttft.mean:
        notes.append(
            f"of the mean TTFT of {metrics.ttft.mean:.1f} ms, {delay_ms:.1f} ms passed before the requests were on"
            " the wire (connecting, and this client's work on a burst); a finite --request-rate spreads them"
        )
    if metrics.num_output_lens_unreported:
        notes.append(
            f"{metrics.num_output_lens_unreported} answers came without a token count: what was asked for counts as"
            " their output length (compare the retokenized total)"
        )
    if options.force_miss and metrics.cache is not None and metrics.cache.total_cached_tokens:
        notes.append(f"the server reused {metrics.cache.total_cached_tokens} tokens in spite of --force-miss")
    return tuple(notes)


def _rate(options: BenchOptions) -> float | str:
    return "trace" if options.data.name == "mooncake" else options.request_rate


def _say_dataset(dataset: Dataset, say: Callable[[str], None]) -> None:
    say(f"Prompts: {dataset.note}")
    for remark in dataset.remarks:
        say(f"note: {remark}")
    say(f"#Input tokens: {sum(request.prompt_len for request in dataset.requests)}")
    say(f"#Output tokens: {sum(request.output_len * (1 + len(request.later_turns)) for request in dataset.requests)}")


def _say_request(request: BenchRequest, records: list[RequestRecord], say: Callable[[str], None]) -> None:
    for record in records:
        answer = record.generated_text if record.success else f"failed: {record.error or 'cut off'}"
        prompt = request.prompt if record.turn == 0 else request.later_turns[record.turn - 1]
        say(f"--- request {record.index}, turn {record.turn}\n{prompt}\n--- answer\n{answer}")


def _words(value: Any) -> str:
    return " ".join(str(item) for item in value) if isinstance(value, list) else str(value)


def find_tokenizer(given: str | None, model_info: dict[str, Any], model: str | None) -> tuple[Tokenizer, str]:
    """The tokenizer and where it was found: what the user gave, else what the server says, else the model's name.

    The server's path is of its own machine, so one that does not exist here is passed over.
    Raises BenchmarkError saying what was looked at.
    """
    if given is not None:
        try:
            return _load_tokenizer(given), given
        except ModelError as exc:
            raise BenchmarkError(f"--tokenizer {given}: {exc}") from exc
    said = [model_info.get(key) for key in ("tokenizer_path", "model_path")]
    places = dict.fromkeys(place for place in (*said, model) if isinstance(place, str) and place)
    reasons = []
    for place in places:
        try:
            return _load_tokenizer(place), place
        except ModelError as exc:
            reasons.append(f"{place}: {exc}")
    tried = "; ".join(reasons) if reasons else "the server names none, and no --model was given"
    raise BenchmarkError(
        f"no tokenizer found ({tried}). Give --tokenizer: a folder, a .gguf file, a model's name, or demo"
    )


def _load_tokenizer(place: str) -> Tokenizer:
    # A folder with nothing but a tokenizer is no model, and serves here all the same.
    folder = Path(place).expanduser()
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    return load_tokenizer(resolve(place))
