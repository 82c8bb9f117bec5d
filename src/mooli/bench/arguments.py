"""The command line of `bench_serving`: SGLang's flags and a few of ours, checked, as options.

Owns names, help, SGLang's defaults, abbreviations, and refusing what this client cannot do: a flag that would change
nothing is an error, with its reason, as soon as it is given another value than its default.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mooli.bench.apis import BACKENDS, REFUSED_BACKENDS, Api, Backend, RequestOptions
from mooli.bench.datasets import REFUSED_DATASETS, DatasetOptions, MooncakeOptions, SharedPrefixOptions
from mooli.bench.errors import BenchmarkError, check_at_least, check_seed, json_object
from mooli.bench.metrics import parse_slos

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


# -- checked -----------------------------------------------------------------------------------------------------------

_GSP = ("generated-shared-prefix",)
_RANDOM = ("random", "random-ids")
_MOONCAKE = ("mooncake",)
_CONVERSATIONS = ("sharegpt", "custom")

DATASETS_OF_FLAG = {
    "dataset_path": ("sharegpt", "custom", "openai", "random", "mooncake"),
    "num_prompts": tuple(name for name in DATASETS if name not in _GSP),
    "sharegpt_output_len": (*_CONVERSATIONS, "openai"),
    "sharegpt_context_len": _CONVERSATIONS,
    "prompt_suffix": _CONVERSATIONS,
    "apply_chat_template": _CONVERSATIONS,
    "tokenize_prompt": _RANDOM,
    "random_input_len": _RANDOM,
    "random_output_len": _RANDOM,
    "random_range_ratio": _RANDOM,
    "use_trace_timestamps": _MOONCAKE,
    **{f"gsp_{field}": _GSP for field in SharedPrefixOptions.__dataclass_fields__},
    **{f"mooncake_{field}": _MOONCAKE for field in MooncakeOptions.__dataclass_fields__},
}
"""Which datasets look at a flag; given with another dataset it is refused. --num-prompts alone is let through."""

_NO_IMAGES = "images cannot be sent"
_NO_LORA = "requests for adapters (LoRA) cannot be made"
_NO_PROFILER = "no profiler is driven from here"
_NO_PD = "servers that split prefill from decode are not handled"

REFUSED_FLAGS = {
    "image_count": _NO_IMAGES,
    "image_resolution": _NO_IMAGES,
    "image_format": _NO_IMAGES,
    "image_content": _NO_IMAGES,
    "random_image_count": _NO_IMAGES,
    "lora_name": _NO_LORA,
    "lora_request_distribution": _NO_LORA,
    "lora_zipf_alpha": _NO_LORA,
    "profile": _NO_PROFILER,
    "profile_activities": _NO_PROFILER,
    "profile_start_step": _NO_PROFILER,
    "profile_steps": _NO_PROFILER,
    "profile_num_steps": _NO_PROFILER,
    "profile_by_stage": _NO_PROFILER,
    "profile_stages": _NO_PROFILER,
    "profile_output_dir": _NO_PROFILER,
    "profile_prefix": _NO_PROFILER,
    "profile_prefill_url": _NO_PROFILER,
    "profile_decode_url": _NO_PROFILER,
    "pd_separated": _NO_PD,
    "fake_prefill": _NO_PD,
    "rust_client": "there is one client, in Python",
    "rust_worker_threads": "there is one client, in Python",
    "dataset_offset": "the dataset it belongs to, agentic-trace, is not read",
    "agentic_max_turns": "the dataset it belongs to, agentic-trace, is not read",
    "speed_bench_category": "the dataset it belongs to, speed-bench, is not read",
    "speed_bench_output_len": "the dataset it belongs to, speed-bench, is not read",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """A run as it was asked for, checked. Times in seconds, rates per second.

    base_url: without a slash at its end. output_file: None takes the name SGLang gives.
    report_file: None writes no report.
    """

    backend: Backend
    base_url: str
    headers: Mapping[str, str]
    model: str | None
    served_model_name: str | None
    tokenizer: str | None
    ready_check_timeout_s: float
    data: DatasetOptions
    use_trace_timestamps: bool
    request_rate: float
    max_concurrency: int | None
    warmup_requests: int
    flush_cache: bool
    flush_cache_timeout_s: float
    request: RequestOptions
    force_miss: bool
    seed: int
    slos_ms: Mapping[str, float]
    tag: str | None
    output_file: Path | None
    output_details: bool
    cache_report: bool
    print_requests: bool
    plot_throughput: bool
    show_progress: bool
    explain: bool
    report_file: Path | None = None


def parse_arguments(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> BenchOptions:
    """The options that `argv` asks for. Prints help and exits 0 for --help.

    environment: OPENAI_API_KEY is sent as a bearer token, else API_KEY as it stands.
    Raises BenchmarkError for anything that cannot be used.
    """
    parser = bench_parser()
    args = parser.parse_args(expand_abbreviations(argv, parser))
    _refuse(parser, args)
    return _options(args, environment)


_HARMLESS = {
    "image_count": "1",
    "image_resolution": "1080p",
    "image_format": "jpeg",
    "image_content": "random",
    "lora_request_distribution": "uniform",
    "lora_zipf_alpha": "1.5",
    "speed_bench_output_len": "512",
    "profile_activities": ["CPU", "GPU"],
    "dataset_offset": "0",
}
"""SGLang's defaults of refused flags: scripts that spell them out ask for nothing."""


def _refuse(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.backend in REFUSED_BACKENDS:
        raise BenchmarkError(f"--backend {args.backend}: {REFUSED_BACKENDS[args.backend]}")
    if args.dataset_name in REFUSED_DATASETS:
        raise BenchmarkError(f"--dataset-name {args.dataset_name}: {REFUSED_DATASETS[args.dataset_name]}")
    given = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    for name in given:
        flag = "--" + name.replace("_", "-")
        if name in REFUSED_FLAGS and given[name] != _HARMLESS.get(name):
            raise BenchmarkError(f"{flag}: {REFUSED_FLAGS[name]}")
        belongs = DATASETS_OF_FLAG.get(name)
        if belongs is not None and args.dataset_name not in belongs and name != "num_prompts":
            raise BenchmarkError(f"{flag} belongs to --dataset-name {' or '.join(belongs)}, not {args.dataset_name}")
    api = BACKENDS[args.backend].api
    for name in (
        "return_logprob",
        "top_logprobs_num",
        "token_ids_logprob",
        "logprob_start_len",
        "return_routed_experts",
    ):
        if name in given and api is not Api.NATIVE:
            raise BenchmarkError(
                f"--{name.replace('_', '-')} is of /generate (--backend sglang); for an OpenAI route say it in"
                " --extra-request-body"
            )
        if name in given and name.endswith(("num", "logprob", "len")) and not args.return_logprob:
            raise BenchmarkError(f"--{name.replace('_', '-')} needs --return-logprob")
    if args.tokenize_prompt and api is Api.CHAT:
        raise BenchmarkError("--tokenize-prompt: a chat route takes no token ids; use --backend sglang or sglang-oai")
    family = BACKENDS[args.backend].family
    if args.flush_cache and family != "sglang":
        raise BenchmarkError(f"--flush-cache: {family} servers have no route for it; use a back-end of sglang")
    if args.force_miss and family == "lmdeploy":
        raise BenchmarkError("--force-miss: lmdeploy servers know no cache salt")


def _options(args: argparse.Namespace, environment: Mapping[str, str]) -> BenchOptions:
    backend = BACKENDS[args.backend]
    port = args.port if args.port is not None else backend.default_port
    host = f"[{args.host}]" if ":" in args.host else args.host
    base_url = (args.base_url or f"http://{host}:{port}").rstrip("/")
    if not base_url.startswith(("http://", "https://")):
        raise BenchmarkError(f"--base-url must begin with http:// or https://, got {base_url!r}")
    _check_counts(args, port)
    return BenchOptions(
        backend=backend,
        base_url=base_url,
        headers=_headers(args.header or (), environment),
        model=args.model,
        served_model_name=args.served_model_name,
        tokenizer=args.tokenizer,
        ready_check_timeout_s=args.ready_check_timeout_sec,
        data=dataset_options(args, is_chat=backend.api is Api.CHAT),
        use_trace_timestamps=args.use_trace_timestamps,
        request_rate=args.request_rate,
        max_concurrency=args.max_concurrency,
        warmup_requests=args.warmup_requests,
        flush_cache=args.flush_cache,
        flush_cache_timeout_s=args.flush_cache_timeout,
        request=RequestOptions(
            stream=not args.disable_stream,
            ignore_eos=not args.disable_ignore_eos,
            temperature=args.temperature,
            top_p=args.top_p,
            return_logprob=args.return_logprob,
            top_logprobs_num=args.top_logprobs_num,
            token_ids_logprob=args.token_ids_logprob,
            logprob_start_len=args.logprob_start_len,
            return_routed_experts=args.return_routed_experts,
            cache_report=args.cache_report,
            extra_body=json_object("--extra-request-body", args.extra_request_body),
        ),
        force_miss=args.force_miss,
        seed=args.seed,
        slos_ms=parse_slos(args.goodput or ()),
        tag=args.tag,
        output_file=Path(args.output_file) if args.output_file else None,
        output_details=args.output_details,
        cache_report=args.cache_report,
        print_requests=args.print_requests,
        plot_throughput=args.plot_throughput,
        show_progress=not args.disable_tqdm,
        explain=args.explain,
        report_file=report_file(args.report),
    )


def dataset_options(args: argparse.Namespace, *, is_chat: bool = False) -> DatasetOptions:
    """What flags of `add_data` and `add_shared_prefix` ask for; Mooncake's, where the parser has them."""
    return DatasetOptions(
        name=args.dataset_name,
        path=args.dataset_path,
        num_prompts=args.num_prompts,
        sharegpt_output_len=args.sharegpt_output_len,
        sharegpt_context_len=args.sharegpt_context_len,
        random_input_len=args.random_input_len,
        random_output_len=args.random_output_len,
        random_range_ratio=args.random_range_ratio,
        prompt_suffix=args.prompt_suffix,
        apply_chat_template=args.apply_chat_template,
        tokenize_prompt=args.tokenize_prompt,
        is_chat=is_chat,
        shared_prefix=SharedPrefixOptions(**_fields(args, "gsp_", SharedPrefixOptions)),
        mooncake=MooncakeOptions(**_fields(args, "mooncake_", MooncakeOptions)),
    )


def _fields(args: argparse.Namespace, prefix: str, kind: type) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: getattr(args, prefix + name) for name in names if hasattr(args, prefix + name)}


def _check_counts(args: argparse.Namespace, port: int) -> None:
    check_at_least(
        ("--num-prompts", args.num_prompts, 1),
        ("--max-concurrency", args.max_concurrency, 1),
        ("--warmup-requests", args.warmup_requests, 0),
        ("--flush-cache-timeout", args.flush_cache_timeout, 0),
        ("--ready-check-timeout-sec", args.ready_check_timeout_sec, 0),
    )
    if not args.request_rate > 0:
        raise BenchmarkError(f"--request-rate must be above 0, got {args.request_rate}")
    if not 0 < port < 65536:
        raise BenchmarkError(f"--port must be from 1 to 65535, got {port}")
    check_seed(args.seed)


def report_file(name: str | None) -> Path | None:
    """The file that --report names, or None. Raises BenchmarkError now for what would only fail after the run."""
    if name is None:
        return None
    file = Path(name)
    if not name or file.is_dir() or not file.parent.is_dir():
        raise BenchmarkError(f"--report takes the name of a file in a folder that exists, got {name!r}")
    return file


def _headers(pairs: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    headers = {}
    if environment.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {environment['OPENAI_API_KEY']}"
    elif environment.get("API_KEY"):
        headers["Authorization"] = environment["API_KEY"]
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise BenchmarkError(f"--header takes KEY=VALUE, got {pair!r}")
        headers[name.strip()] = value.strip()
    return headers
