"""The flags of `bench_serving`: SGLang's, with its defaults, and a few of ours.

Owns names, defaults, help and abbreviations. Never looks at what a value means.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import NoReturn

from mooli.bench.backends import BACKENDS, REFUSED_BACKENDS
from mooli.bench.datasets import REFUSED_DATASETS
from mooli.bench.errors import BenchmarkError

OWN_FLAGS = ("--explain", "--force-miss", "--mooncake-length-factor", "--report")

DATASETS = ("sharegpt", "custom", "openai", "random", "random-ids", "generated-shared-prefix", "mooncake")


def expand_abbreviations(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Write out the flags that are abbreviated as SGLang knows them, so that a flag of ours makes none ambiguous."""
    known = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    theirs = [flag for flag in known if flag not in OWN_FLAGS]
    written = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        meant = [flag for flag in theirs if flag.startswith(name)]
        is_short = len(name) > 2 and name.startswith("--") and name not in known and len(meant) == 1
        written.append(meant[0] + equals + value if is_short else argument)
    return written


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BenchmarkError(f"{message} (--help lists the flags)")


def bench_parser() -> argparse.ArgumentParser:
    """A parser that raises BenchmarkError where others would end the program, but for --help."""
    parser = _Parser(
        prog="python3 -m mooli.bench_serving",
        usage="%(prog)s [flags]",
        description="Measure a running server: throughput, time to first token, time per token.",
        epilog="Example: python3 -m mooli.bench_serving --backend sglang --dataset-name random --num-prompts 100"
        " --random-input 512 --random-output 128 --request-rate 4",
    )
    _add_target(parser.add_argument_group("server"))
    add_data(parser.add_argument_group("prompts"))
    add_shared_prefix(parser.add_argument_group("generated-shared-prefix"))
    _add_mooncake(parser.add_argument_group("mooncake"))
    _add_load(parser.add_argument_group("load"))
    _add_request(parser.add_argument_group("requests"))
    _add_output(parser.add_argument_group("output"))
    _add_refused(parser.add_argument_group("known, and refused when given"))
    return parser


Group = argparse._ArgumentGroup


def _add_target(group: Group) -> None:
    add = group.add_argument
    add("--backend", default="sglang", choices=[*BACKENDS, *REFUSED_BACKENDS], help="API of the server (sglang)")
    add("--base-url", help="URL of the server, instead of host and port")
    add("--host", default="0.0.0.0", help="host of the server (0.0.0.0, which is this machine)")
    add("--port", type=int, help="port (sglang* 30000, vllm* 8000, lmdeploy* 23333)")
    add("--model", help="name of the model (the first of /v1/models)")
    add("--served-model-name", help="name to send in requests (--model)")
    add("--tokenizer", help="folder, .gguf file or name of the tokenizer (what the server says, else --model)")
    add("--header", nargs="+", metavar="K=V", help="HTTP headers to send")
    add("--ready-check-timeout-sec", type=int, default=60, help="seconds to wait for the server (60)")


def add_data(group: Group) -> None:
    """What to send, and its seed."""
    add = group.add_argument
    add(
        "--dataset-name",
        default="sharegpt",
        choices=[*DATASETS, *REFUSED_DATASETS],
        help="(sharegpt, which needs its file)",
    )
    add("--dataset-path", default="", help="file of the dataset; --dataset-name random needs none")
    add("--num-prompts", type=int, default=1000, help="(1000)")
    add("--sharegpt-output-len", type=int, help="output length, instead of the dataset's")
    add("--sharegpt-context-len", type=int, help="leave out longer conversations")
    add("--random-input-len", type=int, default=1024, help="(1024)")
    add("--random-output-len", type=int, default=1024, help="(1024)")
    add(
        "--random-range-ratio",
        type=float,
        default=0.0,
        help="lengths are drawn from [ratio * length, length]; 0 means about half the length, 1 exactly it (0.0)",
    )
    add("--prompt-suffix", default="", help="put behind every prompt")
    add("--apply-chat-template", action="store_true", help="send prompts as the tokenizer's chat template has them")
    add("--tokenize-prompt", action="store_true", help="send token ids instead of text (sglang, random)")
    add("--seed", type=int, default=42, help="of prompts, lengths and arrivals (42)")


def add_shared_prefix(group: Group) -> None:
    """The groups of generated-shared-prefix."""
    add = group.add_argument
    add("--gsp-num-groups", type=int, default=64, help="(64)")
    add("--gsp-prompts-per-group", type=int, default=16, help="(16)")
    add("--gsp-system-prompt-len", type=int, default=2048, help="tokens a group shares (2048)")
    add("--gsp-question-len", type=int, default=128, help="(128)")
    add("--gsp-output-len", type=int, default=256, help="(256)")
    add("--gsp-range-ratio", type=float, default=1.0, help="as --random-range-ratio (1.0)")
    add("--gsp-num-turns", type=int, default=1, help="questions a conversation; above 1 only with a chat back-end (1)")
    add("--gsp-fast-prepare", action="store_true", help="do not count the tokens of the prompts")
    add("--gsp-send-routing-key", action="store_true", help="send X-SMG-Routing-Key, one to a group")
    add("--gsp-ordered", action="store_true", help="group after group instead of shuffled")
    add("--gsp-group-distribution", default="uniform", choices=("uniform", "zipf"), help="(uniform)")
    add("--gsp-zipf-alpha", type=float, help="weights of groups are 1/rank**alpha, rank starts at 1")


def _add_mooncake(group: Group) -> None:
    add = group.add_argument
    add("--mooncake-slowdown-factor", type=float, default=1.0, help="2.0 replays at half the speed (1.0)")
    add("--mooncake-num-rounds", type=int, default=1, help="rounds a session (1)")
    add(
        "--mooncake-workload",
        default="conversation",
        choices=("mooncake", "conversation", "synthetic", "toolagent"),
        help="which trace of the folder --dataset-path (conversation)",
    )
    add("--use-trace-timestamps", action="store_true", help="what mooncake does in any case")
    add(
        "--mooncake-length-factor",
        type=float,
        metavar="FACTOR",
        help="[Mooli] give prompts and answers the trace's lengths times this, and the same sharing; without it the"
        " text is SGLang's, of other lengths",
    )


def _add_load(group: Group) -> None:
    add = group.add_argument
    add(
        "--request-rate", type=float, default=math.inf, help="requests per second, Poisson; inf sends all at once (inf)"
    )
    add("--max-concurrency", type=int, help="requests in progress at once (no limit)")
    add("--warmup-requests", type=int, default=1, help="(1)")
    add("--flush-cache", action="store_true", help="make the server forget its cache before the run")
    add("--flush-cache-timeout", type=float, default=60.0, help="seconds the server may take for it (60)")
    add("--force-miss", action="store_true", help="[Mooli] give every request a salt, so that none reuses a prefix")


def _add_request(group: Group) -> None:
    add = group.add_argument
    add("--disable-stream", action="store_true", help="ask for whole answers")
    add("--disable-ignore-eos", action="store_true", help="let answers end by themselves")
    add("--temperature", type=float, default=0.0, help="(0.0)")
    add("--top-p", type=float, default=1.0, help="(1.0)")
    add("--extra-request-body", metavar="JSON", help="an object to lay over each request's body")
    add("--return-logprob", action="store_true", help="ask for log-probabilities (/generate)")
    add("--top-logprobs-num", type=int, default=0, help="(0)")
    add("--token-ids-logprob", type=int, nargs="+", help="ids whose log-probabilities to ask for")
    add("--logprob-start-len", type=int, default=-1, help="(-1)")
    add("--return-routed-experts", action="store_true", help="ask for routed experts (/generate)")


def _add_output(group: Group) -> None:
    add = group.add_argument
    add("--output-file", help="JSON lines file to append to (BACKEND_MMDD_NUM_….jsonl)")
    add("--output-details", action="store_true", help="also write what each request did")
    add("--report", metavar="FILE", help="[Mooli] also write a page with charts of this run (report.html)")
    add("--tag", help="word to store with the result")
    add("--goodput", nargs="+", metavar="NAME:MS", help="objectives, such as ttft:500 tpot:50 e2el:20000")
    add("--cache-report", action="store_true", help="show where reused tokens came from")
    add("--print-requests", action="store_true", help="print each request and its answer as it ends")
    add("--plot-throughput", action="store_true", help="draw throughput over time with characters")
    add("--disable-tqdm", action="store_true", help="show no progress")
    add("--explain", action="store_true", help="[Mooli] print the formulas of all numbers and end")


def _add_refused(group: Group) -> None:
    add = group.add_argument
    hidden = argparse.SUPPRESS
    for flag in ("random-image-count", "profile", "profile-by-stage", "pd-separated", "fake-prefill", "rust-client"):
        add(f"--{flag}", action="store_true", help=hidden)
    for flag in ("profile-activities", "profile-stages", "lora-name", "profile-prefill-url", "profile-decode-url"):
        add(f"--{flag}", nargs="*", help=hidden)
    for flag in (
        "image-count",
        "image-resolution",
        "image-format",
        "image-content",
        "lora-request-distribution",
        "lora-zipf-alpha",
        "profile-start-step",
        "profile-steps",
        "profile-num-steps",
        "profile-output-dir",
        "profile-prefix",
        "rust-worker-threads",
        "dataset-offset",
        "agentic-max-turns",
        "speed-bench-category",
        "speed-bench-output-len",
    ):
        add(f"--{flag}", help=hidden)
