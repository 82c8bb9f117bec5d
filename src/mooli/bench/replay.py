"""`mooli bench replay`: send what a trace recorded, when it says, to a running server.

Owns the command's flags and the choice of the trace, a file or a made-up one. Which text a record becomes is in
`mooncake`; all that is measured is what `bench_serving` measures.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mooli.arguments import CommandParser
from mooli.bench.arguments import BenchOptions, bench_parser, expand_abbreviations, parse_arguments
from mooli.bench.command import ended, fail
from mooli.bench.datasets import Dataset, DatasetOptions, Randoms
from mooli.bench.errors import BenchmarkError, check_at_least
from mooli.bench.metrics import FORMULAS
from mooli.bench.serving import measure_and_report
from mooli.bench.traces import WORKLOADS, check_factors, possible_reuse, read_trace, replayed, synthetic_trace
from mooli.frontend.tokenizer import Tokenizer

_PROGRAM = "mooli bench replay"

SYNTHETIC_LENGTH_FACTOR = 1 / 16
"""Blocks of 512 tokens become 32: prompts of about 700 tokens, which a laptop can answer."""

SYNTHETIC_REQUESTS = 100

_REPLACED = {
    "--dataset-name": "a replay has one dataset, its trace",
    "--dataset-path": "use --trace",
    "--num-prompts": "use --max-requests",
    "--request-rate": "the trace says when; use --slowdown",
    "--use-trace-timestamps": "a replay does so in any case",
    "--mooncake-slowdown-factor": "use --slowdown",
    "--mooncake-length-factor": "use --length-factor",
    "--mooncake-num-rounds": "a record is one request",
    "--mooncake-workload": "use --trace",
}
_OF_OTHERS = ("--random-", "--gsp-", "--sharegpt-", "--prompt-suffix", "--apply-chat-template", "--tokenize-prompt")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """trace: a file; None makes one up after `synthetic`. context_len: longer requests are left out. Lengths in tokens
    after scaling. bench: all that a replay has in common with other runs."""

    trace: Path | None
    synthetic: str | None
    slowdown: float
    length_factor: float
    max_requests: int | None
    context_len: int | None
    save_trace: Path | None
    bench: BenchOptions


def main(argv: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    try:
        options = parse_replay_arguments(argv)
    except BenchmarkError as exc:
        return fail(_PROGRAM, exc, status=2)
    if options.bench.explain:
        print(FORMULAS, end="")
        return 0
    return ended(_PROGRAM, lambda: _replay(options))


def parse_replay_arguments(argv: Sequence[str]) -> ReplayOptions:
    """The options of a command line. Raises BenchmarkError; ends the program for --help and unreadable words."""
    args, rest = _parser().parse_known_args(list(argv))
    words = expand_abbreviations(rest, bench_parser())
    for word in words:
        flag = word.partition("=")[0]
        if flag in _REPLACED:
            raise BenchmarkError(f"{flag}: {_REPLACED[flag]}")
        if flag.startswith(_OF_OTHERS):
            raise BenchmarkError(f"{flag} belongs to other datasets: a replay's prompts follow from its trace")
    is_synthetic = args.synthetic is not None
    factor = args.length_factor
    if factor is None:
        factor = SYNTHETIC_LENGTH_FACTOR if is_synthetic else 1.0
    max_requests = args.max_requests
    if max_requests is None and is_synthetic:
        max_requests = SYNTHETIC_REQUESTS
    check_factors(args.slowdown, factor, "--slowdown", "--length-factor")
    check_at_least(("--max-requests", max_requests, 1), ("--context-length", args.context_length, 1))
    if args.save_trace is not None and not is_synthetic:
        raise BenchmarkError("--save-trace belongs to --synthetic: the trace given by --trace is a file already")
    return ReplayOptions(
        trace=args.trace,
        synthetic=args.synthetic,
        slowdown=args.slowdown,
        length_factor=factor,
        max_requests=max_requests,
        context_len=args.context_length,
        save_trace=args.save_trace,
        bench=_from_a_cold_cache(parse_arguments(["--dataset-name", "mooncake", *words]), words),
    )


def _from_a_cold_cache(bench: BenchOptions, words: Sequence[str]) -> BenchOptions:
    """The warm-up sends the trace's first prompt, which must not count as reused later: the cache is emptied behind it,
    or there is no warm-up where a server has no route for that."""
    if bench.backend.family == "sglang":
        return dataclasses.replace(bench, flush_cache=True)
    if any(word.partition("=")[0] == "--warmup-requests" for word in words):
        return bench
    return dataclasses.replace(bench, warmup_requests=0)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=_PROGRAM,
        description="Replay a trace of arrivals, lengths and shared prefixes against a running server.",
        epilog="All flags of `mooli bench serving` for the server, the requests and the output work here too.",
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, metavar="FILE", help="JSON lines as Mooncake publishes them.")
    source.add_argument(
        "--synthetic", choices=tuple(WORKLOADS), help="Make a trace up, with the averages of the published one."
    )
    parser.add_argument("--slowdown", type=float, default=1.0, help="2 replays at half the speed. Default: 1.")
    parser.add_argument(
        "--length-factor",
        type=float,
        metavar="FACTOR",
        help="Lengths are the trace's times this, a block of 512 tokens included, so that what prompts share stays the"
        " same. Default: 1 for a file, 0.0625 (blocks of 32) for a synthetic trace.",
    )
    parser.add_argument(
        "--max-requests", type=int, metavar="N", help="Send the first N only. Default: all; 100 of a synthetic trace."
    )
    parser.add_argument(
        "--context-length",
        type=int,
        metavar="TOKENS",
        help="Leave out requests whose prompt and answer, scaled, are longer together.",
    )
    parser.add_argument("--save-trace", type=Path, metavar="FILE", help="Write the synthetic trace to a file.")
    return parser


def _replay(options: ReplayOptions) -> int:
    seed = options.bench.seed
    if options.synthetic is not None:
        trace = synthetic_trace(WORKLOADS[options.synthetic], options.max_requests or SYNTHETIC_REQUESTS, seed)
        source = f"synthetic {options.synthetic}"
    elif options.trace is not None:
        trace = read_trace(options.trace, options.max_requests)
        source = f"trace {options.trace}"
    else:
        raise BenchmarkError("give --trace or --synthetic")
    if options.save_trace is not None:
        _save(trace, options.save_trace)
    fitting = [record for record in trace if _fits(record, options)]
    if not fitting:
        raise BenchmarkError(f"{source} has no request that fits the arguments")
    note = (
        f"{source}, {len(fitting)} requests, lengths x {options.length_factor:g}, times x {options.slowdown:g},"
        f" reusable {100 * possible_reuse(fitting):.1f}% of prompt tokens"
    )
    remarks: tuple[str, ...] = ()
    if len(fitting) < len(trace):
        left_out = len(trace) - len(fitting)
        remarks = (f"{left_out} of {len(trace)} requests are left out: longer than {options.context_len} tokens",)

    def load(data: DatasetOptions, tokenizer: Tokenizer, _: Randoms) -> Dataset:
        return replayed(fitting, data, tokenizer, note=note, remarks=remarks)

    cake = dataclasses.replace(
        options.bench.data.mooncake, slowdown_factor=options.slowdown, length_factor=options.length_factor
    )
    data = dataclasses.replace(options.bench.data, num_prompts=len(fitting), mooncake=cake)
    bench = dataclasses.replace(options.bench, data=data)
    return asyncio.run(measure_and_report(_PROGRAM, bench, load))


def _fits(record: dict[str, Any], options: ReplayOptions) -> bool:
    length = (record["input_length"] + record["output_length"]) * options.length_factor
    return options.context_len is None or length <= options.context_len


def _save(trace: list[dict[str, Any]], file: Path) -> None:
    try:
        file.write_text("".join(json.dumps(record) + "\n" for record in trace), encoding="utf-8")
    except OSError as exc:
        raise BenchmarkError(f"the trace cannot be written to {file}: {exc.strerror}; see --save-trace") from exc
