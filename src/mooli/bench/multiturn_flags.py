"""The command line of `mooli bench multiturn`: the flags of SGLang's bench_multiturn, with its defaults, and more.

Owns names, defaults, checks and refusals. Never contacts a server.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mooli.arguments import CommandParser
from mooli.bench.apis import BACKENDS, Api
from mooli.bench.arguments import BenchOptions, parse_arguments, report_file
from mooli.bench.errors import BenchmarkError, check_at_least

PROGRAM = "mooli bench multiturn"

AUTO_RATES = (16.0, 14.0, 12.0, 10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)
"""Requests per second of the runs that are made unless --disable-auto-run is given."""

_API_FORMATS = {"sglang": "sglang", "openai": "sglang-oai-chat"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiturnOptions:
    """Lengths in tokens, rates in requests per second.

    target: server, API and key. min_rounds, max_rounds: each conversation draws its number of rounds between them, both
    included. rates: one run each. words: prompts are words (or ShareGPT's text), else running token ids as text.
    report_file: None writes no report.
    """

    target: BenchOptions
    num_clients: int
    max_parallel: int
    request_len: int
    question_len: int
    output_len: int
    min_rounds: int
    max_rounds: int
    distribution: str
    rates: tuple[float, ...]
    ready_queue_policy: str
    has_round_barrier: bool
    words: bool
    dataset_path: str
    log_file: Path
    tag: str
    seed: int
    show_progress: bool
    report_file: Path | None = None

    @property
    def is_chat(self) -> bool:
        return self.target.backend.api is Api.CHAT

    @property
    def can_flush(self) -> bool:
        """The server has a route that makes it forget its cache."""
        return self.target.backend.family == "sglang"


def parse_multiturn_arguments(argv: Sequence[str]) -> MultiturnOptions:
    """The options of a command line. Raises BenchmarkError; ends the program for --help and unreadable words."""
    args = _parser().parse_args(list(argv))
    _check(args)
    target = _target(args)
    rates = (args.request_rate,) if args.disable_auto_run else AUTO_RATES
    if not args.disable_auto_run and target.backend.family != "sglang":
        raise BenchmarkError(
            f"{target.backend.family} servers have no route that empties the cache between the runs of several rates:"
            " give --disable-auto-run"
        )
    num_rounds = 5 if args.num_rounds is None else args.num_rounds
    min_rounds = num_rounds if args.min_rounds is None else args.min_rounds
    max_rounds = max(num_rounds, min_rounds) if args.max_rounds is None else args.max_rounds
    if min_rounds > max_rounds:
        raise BenchmarkError(f"--min-rounds {min_rounds} is more than --max-rounds {max_rounds}")
    return MultiturnOptions(
        target=target,
        num_clients=args.num_clients,
        max_parallel=args.max_parallel,
        request_len=args.request_length,
        question_len=args.sub_question_input_length or args.request_length,
        output_len=args.output_length,
        min_rounds=min_rounds,
        max_rounds=max_rounds,
        distribution=args.distribution or "poisson",
        rates=rates,
        ready_queue_policy=args.ready_queue_policy,
        has_round_barrier=args.enable_round_barrier,
        words=not args.disable_random_sample,
        dataset_path=args.dataset_path,
        log_file=args.log_file,
        tag=args.tag,
        seed=args.seed,
        show_progress=not args.disable_tqdm,
        report_file=report_file(args.report),
    )


def _check(args: argparse.Namespace) -> None:
    check_at_least(
        ("--num-clients", args.num_clients, 1),
        ("--max-parallel", args.max_parallel, 1),
        ("--request-length", args.request_length, 1),
        ("--output-length", args.output_length, 1),
        ("--num-rounds", args.num_rounds, 1),
        ("--min-rounds", args.min_rounds, 1),
        ("--max-rounds", args.max_rounds, 1),
        ("--sub-question-input-length", args.sub_question_input_length, 0),
    )
    if args.num_rounds is not None and (args.min_rounds is not None and args.max_rounds is not None):
        raise BenchmarkError("--num-rounds says nothing beside --min-rounds and --max-rounds: remove it")
    if args.lora_path:
        raise BenchmarkError("--lora-path: requests for adapters (LoRA) cannot be made")
    if args.dataset_path and args.disable_random_sample:
        raise BenchmarkError("--disable-random-sample reads no file: remove it, or --dataset-path")
    if args.request_rate is None and args.disable_auto_run:
        args.request_rate = 1.0
    if args.request_rate is not None and not args.disable_auto_run:
        raise BenchmarkError(
            "--request-rate belongs to --disable-auto-run; without that, rates from 16 to 1 are tried one after another"
        )
    if args.report is not None and not args.disable_auto_run:
        raise BenchmarkError("--report shows one run: give --disable-auto-run, and --request-rate")
    if args.request_rate is not None and not args.request_rate > 0:
        raise BenchmarkError(f"--request-rate must be above 0, got {args.request_rate}")
    if args.request_rate == math.inf and args.distribution is not None:
        raise BenchmarkError("--distribution says nothing where --request-rate is inf: there are no gaps")


def _target(args: argparse.Namespace) -> BenchOptions:
    if args.backend is not None and args.api_format is not None:
        raise BenchmarkError("--api-format is SGLang's word for two of the back-ends: give it or --backend, not both")
    backend = args.backend or _API_FORMATS[args.api_format or "sglang"]
    words = ["--backend", backend, "--host", args.host, "--seed", str(args.seed), "--dataset-name", "random"]
    for flag, value in (
        ("--port", args.port),
        ("--base-url", args.base_url),
        ("--tokenizer", args.model_path),
        ("--served-model-name", args.served_model_name),
        ("--extra-request-body", args.extra_request_body),
        ("--ready-check-timeout-sec", args.ready_check_timeout_sec),
    ):
        if value is not None:
            words.append(f"{flag}={value}")
    if args.header:
        words += ["--header", *args.header]
    return parse_arguments(words)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=PROGRAM,
        description="Measure conversations of several rounds against a running server: TTFT and hit rate by round.",
    )
    server = parser.add_argument_group("server").add_argument
    server("--backend", choices=tuple(BACKENDS), help="API of the server. Default: sglang.")
    server("--api-format", choices=tuple(_API_FORMATS), help="sglang: /generate; openai: /v1/chat/completions.")
    server("--base-url", help="URL of the server, instead of host and port.")
    server("--host", default="localhost", help="Default: %(default)s.")
    server("--port", type=int, help="Default: that of the back-end, 30000 for sglang.")
    server("--model-path", help="Model or folder of the tokenizer. Default: what the server says.")
    server("--served-model-name", help="Name to send in requests. Default: the server's first model.")
    server("--header", nargs="+", metavar="K=V", help="HTTP headers to send.")
    server("--extra-request-body", metavar="JSON", help="An object to lay over each request's body.")
    server("--ready-check-timeout-sec", type=int, help="Seconds to wait for the server. Default: 60.")
    server("--lora-path", default="", help=argparse.SUPPRESS)

    work = parser.add_argument_group("conversations").add_argument
    work("--num-clients", type=int, default=256, help="Conversations. Default: %(default)s.")
    work("--num-rounds", type=int, help="Rounds of each. Default: 5.")
    work("--min-rounds", type=int, help="Least rounds, for conversations of different lengths. Default: --num-rounds.")
    work("--max-rounds", type=int, help="Most rounds. Default: --num-rounds.")
    work("--request-length", type=int, default=512, help="Tokens of the first question. Default: %(default)s.")
    work("--sub-question-input-length", type=int, default=0, help="Of later ones; 0: as the first. Default: 0.")
    work("--output-length", type=int, default=64, help="Tokens of each answer. Default: %(default)s.")
    work("--dataset-path", default="", help="ShareGPT file to take text from. Default: words of Mooli's own list.")
    work("--disable-random-sample", action="store_true", help="Text of running token ids instead of words.")
    work("--seed", type=int, default=1, help="Of prompts, rounds, order and gaps. Default: %(default)s.")

    load = parser.add_argument_group("load").add_argument
    load("--max-parallel", type=int, default=128, help="Requests in progress at once. Default: %(default)s.")
    load("--disable-auto-run", action="store_true", help="One run at --request-rate instead of rates from 16 to 1.")
    load("--request-rate", type=float, help="Requests per second, inf for no gaps. Default: 1.")
    load("--distribution", choices=("poisson", "uniform"), help="Of the gaps between requests. Default: poisson.")
    load(
        "--ready-queue-policy",
        choices=("random", "fifo"),
        default="random",
        help="Which of the conversations that wait goes on. Default: %(default)s.",
    )
    load("--enable-round-barrier", action="store_true", help="Begin a round when all have ended the one before.")

    output = parser.add_argument_group("output").add_argument
    output(
        "--log-file", type=Path, default=Path("performance_metrics.jsonl"), help="Appended to. Default: %(default)s."
    )
    output("--tag", default="", help="Word to store with the result.")
    output("--report", metavar="FILE", help="Also write a page with charts of the run; with --disable-auto-run.")
    output("--disable-tqdm", action="store_true", help="Show no progress.")
    return parser
