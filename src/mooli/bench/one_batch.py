"""`mooli bench one-batch`: prefill and decode of static batches, on an engine core in this process.

Owns the command's flags, SGLang's lines and keys, and the order of the batches. Timing is in `one_batch_run`. No text,
no thread and no server are between the clock and the engine's steps.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mooli.arguments import CommandParser
from mooli.bench import result_file
from mooli.bench.command import ended, fail, say
from mooli.bench.errors import BenchmarkError
from mooli.bench.in_process import add_engine_args, engine_config, parse_words, refuse_given, show_loading
from mooli.bench.machine import client_machine, engine_facts
from mooli.bench.one_batch_correctness import PROMPTS, differing_answers, read_prompts
from mooli.bench.one_batch_run import BatchTiming, random_prompts, time_batch, why_impossible
from mooli.config import EngineConfig
from mooli.engine.build import BuiltEngine, build_engine
from mooli.errors import MooliError
from mooli.frontend.text_side import open_tokenizer
from mooli.hub.locate import locate

PROGRAM = "mooli bench one-batch"

WARMUP_OUTPUT_LEN = 32
"""The first batch runs once before the clock counts, with answers of at most this length."""

_FIRST_STEPS = 5
"""Decode steps that are always shown."""

_NO_TEXT = "no text is handled here"
_NO_PROFILER = "no profiler is driven from here"
_WITHOUT_EFFECT = {
    "served_model_name": "nobody asks for the model by name here",
    "stream_interval": "nothing is streamed here",
    "incremental_streaming_output": "nothing is streamed here",
    "chat_template": _NO_TEXT,
    "preferred_sampling_params": "answers are greedy",
    "allow_auto_truncate": "a batch that does not fit is left out",
    "schedule_policy": "a batch is computed in one order",
    "disable_radix_cache": "answers go on from what the cache holds of their prompts",
    "speculative_algorithm": "a step gives each answer one token here: nothing is guessed",
}
_OF_LATENCY = ("run_name", "batch_size", "input_len", "result_filename", "log_decode_step", "seed")
_OF_CORRECTNESS = ("cut_len", "prompt_filename")


@dataclass(frozen=True, slots=True, kw_only=True)
class OneBatchOptions:
    """Lengths in tokens. log_decode_step: show every such step besides the first ones; 0 for none."""

    engine: EngineConfig
    run_name: str
    batch_sizes: tuple[int, ...]
    input_lens: tuple[int, ...]
    output_lens: tuple[int, ...]
    result_file: Path
    tests_correctness: bool
    cut_len: int
    prompt_file: Path | None
    log_decode_step: int
    seed: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    try:
        options = parse_one_batch_arguments(sys.argv[1:] if argv is None else argv)
    except MooliError as exc:
        return fail(PROGRAM, exc, status=2)
    run = _run_correctness if options.tests_correctness else _run_latency
    return ended(PROGRAM, lambda: run(options))


def parse_one_batch_arguments(argv: Sequence[str]) -> OneBatchOptions:
    """The options of a command line. Raises BenchmarkError or ConfigError; ends the program for --help."""
    parser = _parser()
    args = parse_words(parser, argv)
    for name in [name for name in vars(args) if name.startswith("profile")]:
        refuse_given(parser, args, name, _NO_PROFILER)
    without_effect = dict(_WITHOUT_EFFECT)
    if args.correctness_test:
        for name in _OF_LATENCY:
            refuse_given(parser, args, name, "belongs to the timing of batches: remove it, or --correctness-test")
        without_effect["skip_tokenizer_init"] = "the prompts are text"
        if len(args.output_len) > 1:
            raise BenchmarkError("--output-len: one length for --correctness-test")
    else:
        for name in _OF_CORRECTNESS:
            refuse_given(parser, args, name, "belongs to --correctness-test")
        without_effect |= {"tokenizer_path": _NO_TEXT, "skip_tokenizer_init": "no tokenizer is loaded in any case"}
    for name in ("batch_size", "input_len", "output_len", "cut_len"):
        for value in getattr(args, name) if name != "cut_len" else [args.cut_len]:
            if value < 1:
                raise BenchmarkError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.log_decode_step < 0:
        raise BenchmarkError(f"--log-decode-step must be at least 0, got {args.log_decode_step}")
    if not 0 <= args.seed < 2**32:
        raise BenchmarkError(f"--seed must be from 0 to 2**32 - 1, got {args.seed}")
    config = dataclasses.replace(engine_config(args, without_effect), speculative_algorithm="none")
    if config.max_running_requests is None:
        config = dataclasses.replace(config, max_running_requests=max(*args.batch_size, len(PROMPTS)))
    return OneBatchOptions(
        engine=config,
        run_name=args.run_name,
        batch_sizes=tuple(args.batch_size),
        input_lens=tuple(args.input_len),
        output_lens=tuple(args.output_len),
        result_file=Path(args.result_filename),
        tests_correctness=args.correctness_test,
        cut_len=args.cut_len,
        prompt_file=Path(args.prompt_filename) if args.prompt_filename else None,
        log_decode_step=args.log_decode_step,
        seed=args.seed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=PROGRAM,
        description="Measure prefill and decode by batch size on an engine in this process: no server, no text.",
    )
    add = parser.add_argument_group("benchmark").add_argument
    add("--batch-size", type=int, nargs="+", default=[1], help="Requests of a batch; several are tried. Default: 1.")
    add("--input-len", type=int, nargs="+", default=[1024], help="Tokens of each prompt. Default: 1024.")
    add("--output-len", type=int, nargs="+", default=[16], help="Tokens of each answer. Default: 16.")
    add("--run-name", default="default", help="Word to store with the results. Default: %(default)s.")
    add("--result-filename", default="result.jsonl", help="JSON lines file to append to. Default: %(default)s.")
    add("--log-decode-step", type=int, default=0, metavar="N", help="Show every Nth step of decoding too.")
    add("--seed", type=int, default=1, help="Of the prompts. Default: %(default)s.")
    add(
        "--correctness-test",
        action="store_true",
        help="Instead of timing: compare answers to prompts computed whole and in two parts.",
    )
    add("--cut-len", type=int, default=4, help="Tokens of the first part. Default: %(default)s.")
    add("--prompt-filename", default="", help="Text file with one prompt a line. Default: three of Mooli's own.")
    for flag in ("--profile", "--profile-record-shapes"):
        add(flag, action="store_true", help=argparse.SUPPRESS)
    for flag in ("--profile-activities", "--profile-stage", "--profile-prefix", "--profile-filename-prefix"):
        add(flag, nargs="+", help=argparse.SUPPRESS)
    for flag in ("--profile-start-step", "--profile-steps"):
        add(flag, help=argparse.SUPPRESS)
    add_engine_args(parser)
    return parser


def _run_latency(options: OneBatchOptions) -> int:
    with _engine(options.engine) as built:
        num_measured = measure_batches(built, options, say=say, clock=time.perf_counter)
    if not num_measured:
        return fail(PROGRAM, "no batch fits this engine: nothing was measured", status=1)
    say(f"Results appended to {options.result_file}")
    return 0


@contextlib.contextmanager
def _engine(config: EngineConfig) -> Iterator[BuiltEngine]:
    path = locate(config.model_path, needs_weights=config.load_format != "dummy")
    built = build_engine(config, path, progress=show_loading)
    try:
        built.bind_thread()
        say(f"max_total_num_tokens={built.facts.max_total_num_tokens}")
        yield built
    finally:
        built.close()


def measure_batches(
    built: BuiltEngine, options: OneBatchOptions, *, say: Callable[[str], None], clock: Callable[[], float]
) -> int:
    """Time every combination of batch size, input and output length that fits; how many did. Each has its line of JSON
    as soon as it is measured. Raises BenchmarkError."""
    facts = built.facts
    machine, engine = client_machine(), engine_facts({**facts.to_dict(), "model_path": options.engine.model_path})
    num_measured = 0
    for batch_size, input_len, output_len in itertools.product(
        options.batch_sizes, options.input_lens, options.output_lens
    ):
        why = why_impossible(facts, batch_size, input_len, output_len)
        if why is not None:
            say(f"skipping ({batch_size}, {input_len}, {output_len}): {why}")
            continue
        prompts = random_prompts(batch_size, input_len, facts.vocab_size, options.seed)
        if not num_measured:
            say("Warmup ...")
            time_batch(built.core, prompts, min(output_len, WARMUP_OUTPUT_LEN), clock)
        say(f"Benchmark ... batch size {batch_size}, input {input_len}, output {output_len}")
        timing = time_batch(built.core, prompts, output_len, clock)
        for line in timing_lines(timing, log_decode_step=options.log_decode_step):
            say(line)
        result = {**timing_object(timing, options.run_name), "seed": options.seed, "machine": machine, "engine": engine}
        result_file.append_line(options.result_file, result)
        num_measured += 1
    return num_measured


def timing_lines(timing: BatchTiming, *, log_decode_step: int) -> list[str]:
    """SGLang's lines: prefill, the first steps of decoding, their median, and all together."""
    size = timing.batch_size
    lines = [f"Prefill. latency: {timing.prefill_s:6.5f} s, throughput: {_prefill_rate(timing):9.2f} token/s"]
    for i, seconds in enumerate(timing.decode_s):
        if i < _FIRST_STEPS or (log_decode_step and i % log_decode_step == 0):
            lines.append(
                f"Decode {i}. Batch size: {size}, latency: {seconds:6.5f} s, throughput: {_rate(size, seconds):9.2f}"
                " token/s"
            )
    median = timing.median_decode_s
    if median is not None:
        lines.append(f"Decode.  median latency: {median:6.5f} s, median throughput: {_rate(size, median):9.2f} token/s")
    lines.append(f"Total. latency: {timing.total_s:6.3f} s, throughput: {_overall_rate(timing):9.2f} token/s")
    return lines


def timing_object(timing: BatchTiming, run_name: str) -> dict[str, Any]:
    """SGLang's keys: seconds, and tokens per second."""
    result: dict[str, Any] = {
        "run_name": run_name,
        "batch_size": timing.batch_size,
        "input_len": timing.input_len,
        "output_len": timing.output_len,
        "prefill_latency": timing.prefill_s,
        "prefill_throughput": _prefill_rate(timing),
    }
    median = timing.median_decode_s
    if median is not None:
        result |= {
            "median_decode_latency": median,
            "median_decode_throughput": _rate(timing.batch_size, median),
        }
    return result | {"total_latency": timing.total_s, "overall_throughput": _overall_rate(timing)}


def _prefill_rate(timing: BatchTiming) -> float:
    return _rate(timing.batch_size * timing.input_len, timing.prefill_s)


def _overall_rate(timing: BatchTiming) -> float:
    return _rate(timing.batch_size * (timing.input_len + timing.output_len), timing.total_s)


def _rate(num_tokens: int, seconds: float) -> float:
    return num_tokens / seconds if seconds > 0 else 0.0


def _run_correctness(options: OneBatchOptions) -> int:
    prompts = list(PROMPTS) if options.prompt_file is None else read_prompts(options.prompt_file)
    path = locate(options.engine.model_path, needs_weights=options.engine.load_format != "dummy")
    tokenizer = open_tokenizer(options.engine, path)
    if tokenizer is None:
        raise BenchmarkError("--correctness-test needs a tokenizer")
    with _engine(options.engine) as built:
        differing = differing_answers(
            built.core, tokenizer, prompts, cut_len=options.cut_len, output_len=options.output_lens[0], say=say
        )
    if differing:
        numbers = ", ".join(str(number) for number in differing)
        return fail(
            PROGRAM, f"computed in parts, other prompts beside it, the answer differs: prompt {numbers}", status=1
        )
    say("The answers are the same, computed whole and alone or in parts and together.")
    return 0
