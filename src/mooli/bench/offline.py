"""`mooli bench offline`: the throughput of an engine in this process, all prompts at once.

Owns the command's flags, the run, SGLang's table and keys, and looking at the engine's counter of generated tokens once
a second, on a thread of its own. Never changes what the engine does. Prompts come from the datasets of `bench_serving`.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mooli.arguments import CommandParser
from mooli.bench import results
from mooli.bench.arguments import DATASETS_OF_FLAG, add_data, add_shared_prefix, dataset_options
from mooli.bench.command import (
    add_engine_args,
    ended,
    engine_config,
    fail,
    parse_words,
    refuse_given,
    say,
    show_loading,
)
from mooli.bench.datasets import (
    REFUSED_DATASETS,
    Dataset,
    DatasetOptions,
    Randoms,
    check_file,
    load_dataset,
)
from mooli.bench.errors import BenchmarkError, check_at_least, check_seed, json_object
from mooli.bench.records import BenchRequest
from mooli.bench.results import WIDTH, client_machine, engine_facts, row
from mooli.config import EngineConfig
from mooli.errors import MooliError
from mooli.frontend.engine import Answer, Engine

PROGRAM = "mooli bench offline"

WARMUP_REQUESTS, WARMUP_INPUT_LEN, WARMUP_OUTPUT_LEN = 16, 256, 16
"""As in SGLang's benchmark; shorter where the context holds no more."""

_REFUSED_DATASETS = {
    **REFUSED_DATASETS,
    "openai": "it holds chats, which go to a chat route; use `mooli bench serving --backend sglang-oai-chat`",
    "mooncake": "a trace says when requests come, and here all come at once; use `mooli bench replay`",
}
_WITHOUT_EFFECT = {
    "skip_tokenizer_init": "the prompts are made with the tokenizer",
    "served_model_name": "nobody asks for the model by name here",
    "stream_interval": "nothing is streamed here",
    "incremental_streaming_output": "nothing is streamed here",
}
_REFUSED = {
    "profile": "no profiler is driven from here",
    "do_not_exit": "it is for a profiler that watches this process",
    "gsp_send_routing_key": "there is no router in this process",
    "gsp_num_turns": "later turns need a chat route; measure a server",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineOptions:
    """extra_params: laid over each request's sampling parameters."""

    engine: EngineConfig
    data: DatasetOptions
    ignore_eos: bool
    extra_params: dict[str, Any]
    seed: int
    skip_warmup: bool
    result_file: Path | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    try:
        options = parse_offline_arguments(sys.argv[1:] if argv is None else argv)
        check_file(options.data)
    except MooliError as exc:
        return fail(PROGRAM, exc, status=2)
    return ended(PROGRAM, lambda: _run(options))


def parse_offline_arguments(argv: Sequence[str]) -> OfflineOptions:
    """The options of a command line. Raises BenchmarkError or ConfigError; ends the program for --help."""
    parser = _parser()
    args = parse_words(parser, argv)
    for name, why in _REFUSED.items():
        refuse_given(parser, args, name, why)
    if args.dataset_name in _REFUSED_DATASETS:
        raise BenchmarkError(f"--dataset-name {args.dataset_name}: {_REFUSED_DATASETS[args.dataset_name]}")
    for name, belongs in DATASETS_OF_FLAG.items():
        if hasattr(args, name) and args.dataset_name not in belongs and name != "num_prompts":
            refuse_given(parser, args, name, f"belongs to --dataset-name {' or '.join(belongs)}")
    check_at_least(("--num-prompts", args.num_prompts, 1))
    check_seed(args.seed)
    return OfflineOptions(
        engine=engine_config(args, _WITHOUT_EFFECT),
        data=dataset_options(args),
        ignore_eos=not args.disable_ignore_eos,
        extra_params=json_object("--extra-request-body", args.extra_request_body),
        seed=args.seed,
        skip_warmup=args.skip_warmup,
        result_file=Path(args.result_filename) if args.result_filename else None,
    )


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=PROGRAM,
        description="Measure the throughput of an engine in this process: all prompts at once, no server.",
    )
    bench = parser.add_argument_group("benchmark")
    add_data(bench)
    add_shared_prefix(bench)
    parser.set_defaults(seed=1)
    add = bench.add_argument
    add("--disable-ignore-eos", action="store_true", help="let answers end by themselves")
    add("--extra-request-body", metavar="JSON", help="an object to lay over each request's sampling parameters")
    add("--skip-warmup", action="store_true", help="do not run 16 short prompts first")
    add("--result-filename", default="", help="JSON lines file to append to")
    add("--profile", action="store_true", help=argparse.SUPPRESS)
    add("--do-not-exit", action="store_true", help=argparse.SUPPRESS)
    add_engine_args(parser)
    return parser


def _run(options: OfflineOptions) -> int:
    with Engine(server_args=options.engine, progress=show_loading) as engine:
        tokenizer = engine.tokenizer_manager.tokenizer
        dataset = load_dataset(options.data, tokenizer, Randoms.seeded(options.seed))
        say(f"Prompts: {dataset.note}")
        for remark in dataset.remarks:
            say(f"note: {remark}")
        if not options.skip_warmup:
            say("\nWarmup...")
            _warm_up(engine, options)
        say("\nBenchmark...")
        result = measure_offline(engine, dataset, options, clock=time.perf_counter)
    say("\n" + offline_table(result))
    if options.result_file is not None:
        results.append_line(options.result_file, result)
        say(f"Result appended to {options.result_file}")
    if result["failures"]:
        first = result["failures"][0]
        num = sum(failure["count"] for failure in result["failures"])
        return fail(PROGRAM, f"{num} of {len(dataset.requests)} requests failed: {first['reason']}", status=1)
    return 0


def _warm_up(engine: Engine, options: OfflineOptions) -> None:
    context = engine.get_server_info()["context_length"]
    output_len = min(WARMUP_OUTPUT_LEN, context // 4)
    data = DatasetOptions(
        name="random",
        path=options.data.path if options.data.name in ("sharegpt", "random") else "",
        num_prompts=min(options.data.num_prompts, WARMUP_REQUESTS),
        random_input_len=min(WARMUP_INPUT_LEN, context // 2),
        random_output_len=output_len,
        random_range_ratio=1.0,
        tokenize_prompt=True,
    )
    tokenizer = engine.tokenizer_manager.tokenizer
    requests = load_dataset(data, tokenizer, Randoms.seeded(options.seed)).requests
    _generate(engine, requests, options)
    engine.flush_cache()


def measure_offline(
    engine: Engine, dataset: Dataset, options: OfflineOptions, *, clock: Callable[[], float]
) -> dict[str, Any]:
    """Generate for all of `dataset` at once: SGLang's keys in its order, then ours. Raises what `generate` raises."""
    requests = dataset.requests
    with GenerationSpeed(engine, clock) as speed:
        start_s = clock()
        answers = _generate(engine, requests, options)
        latency_s = clock() - start_s
    reasons = [_failure(answer) for answer in answers]
    done = [
        (request, answer) for request, answer, reason in zip(requests, answers, reasons, strict=True) if reason is None
    ]
    num_input = sum(request.prompt_len for request, _ in done)
    num_output = sum(answer["meta_info"]["completion_tokens"] for _, answer in done)
    num_prompt = sum(answer["meta_info"]["prompt_tokens"] for _, answer in done)
    num_cached = sum(answer["meta_info"]["cached_tokens"] for _, answer in done)
    per_s = 1 / latency_s if latency_s > 0 else 0.0
    failures = Counter(reason for reason in reasons if reason is not None)
    last = speed.last_tokens_per_s
    return {
        "backend": "engine",
        "successful_requests": len(done),
        "total_latency": latency_s,
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "last_gen_throughput": num_output * per_s if last is None else last,
        "request_throughput": len(done) * per_s,
        "input_throughput": num_input * per_s,
        "output_throughput": num_output * per_s,
        "total_throughput": (num_input + num_output) * per_s,
        "cache_hit_rate_pct": 100 * num_cached / num_prompt if num_prompt else 0.0,
        "failures": [{"reason": reason, "count": count} for reason, count in failures.most_common()],
        "dataset_name": options.data.name,
        "dataset_note": dataset.note,
        "seed": options.seed,
        "machine": client_machine(),
        "engine": engine_facts(engine.get_server_info()),
    }


def _generate(engine: Engine, requests: Sequence[BenchRequest], options: OfflineOptions) -> list[Answer]:
    params: list[Mapping[str, Any]] = [
        {
            "temperature": 0.0,
            "max_new_tokens": request.output_len,
            "ignore_eos": options.ignore_eos,
            **options.extra_params,
        }
        for request in requests
    ]
    prompts: list[Any] = [request.prompt for request in requests]
    has_ids = not isinstance(prompts[0], str)
    inputs = {"input_ids": [list(ids) for ids in prompts]} if has_ids else {"prompt": prompts}
    return cast("list[Answer]", engine.generate(sampling_params=params, **inputs))


def _failure(answer: Answer) -> str | None:
    finish = answer["meta_info"]["finish_reason"]
    return str(finish["message"]) if finish["type"] in ("error", "abort") else None


def offline_table(result: dict[str, Any]) -> str:
    """SGLang's table, with the hit rate below its last line."""
    rows = [
        f"{' Offline Throughput Benchmark Result ':=^{WIDTH}}",
        row("Backend:", result["backend"]),
        row("Successful requests:", result["successful_requests"]),
        row("Benchmark duration (s):", result["total_latency"]),
        row("Total input tokens:", result["total_input_tokens"]),
        row("Total generated tokens:", result["total_output_tokens"]),
        row("Last generation throughput (tok/s):", result["last_gen_throughput"]),
        row("Request throughput (req/s):", result["request_throughput"]),
        row("Input token throughput (tok/s):", result["input_throughput"]),
        row("Output token throughput (tok/s):", result["output_throughput"]),
        row("Total token throughput (tok/s):", result["total_throughput"]),
        "=" * WIDTH,
        row("Cache hit rate (%):", result["cache_hit_rate_pct"]),
    ]
    return "\n".join(rows)


# -- the speed while it works ------------------------------------------------------------------------------------------

_PERIOD_S = 1.0


class GenerationSpeed:
    """Context manager: watches `engine` from `with` to its end."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="mooli-bench-speed")
        self._looks: list[tuple[float, int]] = []

    def __enter__(self) -> GenerationSpeed:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        if sys.stderr.isatty():
            print(file=sys.stderr)

    @property
    def last_tokens_per_s(self) -> float | None:
        """Tokens per second between the last two looks; None for a run in which there was only one."""
        if len(self._looks) < 2:
            return None
        (before_s, before), (after_s, after) = self._looks[-2:]
        return (after - before) / (after_s - before_s) if after_s > before_s else None

    def _watch(self) -> None:
        try:
            while not self._is_over.wait(_PERIOD_S):
                self._look()
                if sys.stderr.isatty():
                    speed = self.last_tokens_per_s or 0.0
                    print(
                        f"\r\x1b[K{self._looks[-1][1]} tokens, {speed:.0f} tok/s", end="", file=sys.stderr, flush=True
                    )
        except MooliError:  # the engine has ended; whoever waits for its answers is told why
            return

    def _look(self) -> None:
        counted = self._engine.get_server_info()["internal_states"][0]["generated_tokens"]
        self._looks.append((self._clock(), counted))
