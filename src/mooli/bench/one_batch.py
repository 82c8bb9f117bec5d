"""`mooli bench one-batch`: prefill and decode of static batches, on an engine core in this process.

Owns the command's flags, SGLang's lines and keys, the order of the batches, the clock around the steps, and
`--correctness-test`: the same answers whether prompts are computed whole or in parts. No text, no thread and no server
are between the clock and the engine's steps.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mooli.arguments import CommandParser
from mooli.bench import results
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
from mooli.bench.errors import BenchmarkError, check_at_least, check_seed
from mooli.bench.results import client_machine, engine_facts
from mooli.config import EngineConfig
from mooli.engine.build import BuiltEngine, build_engine
from mooli.engine.core import EngineCore
from mooli.engine.facts import EngineFacts
from mooli.errors import MooliError
from mooli.frontend.text_side import open_tokenizer
from mooli.frontend.tokenizer import Tokenizer
from mooli.hub.locate import locate
from mooli.types import Request, RequestOutput, SamplingParams

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
    for name in ("batch_size", "input_len", "output_len"):
        check_at_least(*((f"--{name.replace('_', '-')}", value, 1) for value in getattr(args, name)))
    check_at_least(("--cut-len", args.cut_len, 1), ("--log-decode-step", args.log_decode_step, 0))
    check_seed(args.seed)
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
        results.append_line(options.result_file, result)
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


# -- timing ------------------------------------------------------------------------------------------------------------

Ids = NDArray[np.int32]

_LARGEST_ID = 10_000
"""Prompts are drawn from the ids below, as SGLang's benchmark draws them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTiming:
    """Seconds. decode_s: one entry a step; each gives every answer of the batch its next token."""

    batch_size: int
    input_len: int
    output_len: int
    prefill_s: float
    decode_s: list[float]

    @property
    def median_decode_s(self) -> float | None:
        """None for answers of one token, which need no step of their own."""
        return statistics.median(self.decode_s) if self.decode_s else None

    @property
    def total_s(self) -> float:
        return self.prefill_s + sum(self.decode_s)


def random_prompts(batch_size: int, input_len: int, vocab_size: int, seed: int) -> list[Ids]:
    """Prompts that share nothing, the same for the same seed."""
    drawn = np.random.RandomState(seed).randint(0, min(vocab_size, _LARGEST_ID), (batch_size, input_len))
    return list(drawn.astype(np.int32))


def why_impossible(facts: EngineFacts, batch_size: int, input_len: int, output_len: int) -> str | None:
    """Why an engine cannot hold such a batch at once; None if it can."""
    length = input_len + output_len
    if length > facts.context_length:
        return f"{length} tokens are more than the context of {facts.context_length}"
    if batch_size > facts.max_running_requests:
        return f"at most {facts.max_running_requests} requests run at once"
    # The one page more is what a prompt that ends inside a page is copied to.
    wanted = batch_size * (-(-length // facts.page_size) + 1)
    if wanted > facts.num_pages:
        return f"it needs {wanted} KV pages of {facts.page_size} tokens, and there are {facts.num_pages}"
    return None


def time_batch(core: EngineCore, prompts: Sequence[Ids], output_len: int, clock: Callable[[], float]) -> BatchTiming:
    """Compute `output_len` tokens behind each of the prompts, which are all of one length, with an empty cache.

    Prompts are computed in the engine's own steps (`chunked_prefill_size`) until each has its first token. Answers go
    on from what the cache then holds, so that no prompt is computed beside them. Raises BenchmarkError when a request
    fails, or the batch does not stay together.
    """
    core.flush_cache()
    num, input_len = len(prompts), len(prompts[0])
    start_s = clock()
    first = _first_tokens(core, prompts)
    prefill_s = clock() - start_s
    decode_s: list[float] = []
    if output_len > 1:
        for i, (prompt, token_id) in enumerate(zip(prompts, first, strict=True)):
            core.add(greedy_request(f"decode-{i}", np.append(prompt, np.int32(token_id)), output_len - 1))
        for _ in range(output_len - 1):
            start_s = clock()
            outputs = checked(core.step())
            decode_s.append(clock() - start_s)
            if len(outputs) != num or any(
                len(output.new_token_ids) != 1 or output.cached_tokens != input_len for output in outputs
            ):
                raise BenchmarkError(
                    f"a batch of {num} x {input_len} tokens did not stay together: the KV cache is too small for it"
                )
    return BatchTiming(
        batch_size=num, input_len=input_len, output_len=output_len, prefill_s=prefill_s, decode_s=decode_s
    )


def _first_tokens(core: EngineCore, prompts: Sequence[Ids]) -> list[int]:
    for i, prompt in enumerate(prompts):
        core.add(greedy_request(f"prefill-{i}", prompt, 1))
    first: dict[str, int] = {}
    while core.has_work:
        for output in checked(core.step()):
            if output.new_token_ids:
                first[output.rid] = output.new_token_ids[0]
    return [first[f"prefill-{i}"] for i in range(len(prompts))]


def greedy_request(rid: str, prompt: Ids, num_tokens: int) -> Request:
    """A request for exactly `num_tokens` tokens, the likeliest each."""
    sampling = SamplingParams(max_new_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    return Request(rid=rid, prompt_ids=prompt, sampling=sampling)


def checked(outputs: list[RequestOutput]) -> list[RequestOutput]:
    """`outputs`, unless one of them says that its request failed: then BenchmarkError is raised."""
    for output in outputs:
        if output.finish is not None and output.finish.type in ("error", "abort"):
            raise BenchmarkError(f"the engine ended a request with {output.finish.type}: {output.finish.message}")
    return outputs


# -- --correctness-test ------------------------------------------------------------------------------------------------

PROMPTS = (
    "The capital of France is",
    "The capital of the United Kingdom is",
    "Today is a sunny day and I like",
)


def read_prompts(file: Path) -> list[str]:
    """One prompt a line; empty lines are left out. Raises BenchmarkError."""
    try:
        prompts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as exc:
        raise BenchmarkError(f"cannot read --prompt-filename {file}: {exc}") from exc
    if not prompts:
        raise BenchmarkError(f"--prompt-filename {file} holds no prompt")
    return prompts


def differing_answers(
    core: EngineCore,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    cut_len: int,
    output_len: int,
    say: Callable[[str], None],
) -> list[int]:
    """Answer each prompt alone and whole, then all together on their cached first `cut_len` tokens.

    Greedy, `output_len` tokens each. Returns the numbers of the prompts whose answers differ. Raises BenchmarkError for
    a prompt of no more than `cut_len` tokens, or a request that fails.
    """
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    say(f"input_ids={ids}")
    for prompt, prompt_ids in zip(prompts, ids, strict=True):
        if len(prompt_ids) <= cut_len:
            raise BenchmarkError(
                f"the prompt {prompt[:40]!r} has {len(prompt_ids)} tokens, which is not more than --cut-len {cut_len}"
            )
    whole = []
    for prompt_ids in ids:
        core.flush_cache()
        whole += _answers(core, [prompt_ids], output_len)
    core.flush_cache()
    _answers(core, [prompt_ids[:cut_len] for prompt_ids in ids], 1)
    in_parts = _answers(core, ids, output_len)
    for i, (prompt_ids, answer) in enumerate(zip(ids, in_parts, strict=True)):
        say(f"========== Prompt {i} ==========\n{tokenizer.decode([*prompt_ids, *answer])}\n")
    return [i for i, (one, other) in enumerate(zip(whole, in_parts, strict=True)) if one != other]


def _answers(core: EngineCore, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    answers: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        answers[f"prompt-{i}"] = []
        core.add(greedy_request(f"prompt-{i}", np.asarray(prompt, np.int32), num_tokens))
    while core.has_work:
        for output in checked(core.step()):
            answers[output.rid] += output.new_token_ids
    return list(answers.values())
