"""From what was typed to the options of a run.

Owns checking values and refusing what this client cannot do: a flag that would change nothing is an error, with its
reason, as soon as it is given another value than its default. Which flags there are stands in `flags`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mooli.bench.backends import BACKENDS, REFUSED_BACKENDS, Api, Backend, RequestOptions
from mooli.bench.datasets import REFUSED_DATASETS, DatasetOptions, MooncakeOptions, SharedPrefixOptions
from mooli.bench.errors import BenchmarkError
from mooli.bench.flags import DATASETS, bench_parser, expand_abbreviations
from mooli.bench.metrics import parse_slos

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
            extra_body=_json_object(args.extra_request_body),
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
    for flag, value, least in (
        ("--num-prompts", args.num_prompts, 1),
        ("--max-concurrency", args.max_concurrency, 1),
        ("--warmup-requests", args.warmup_requests, 0),
        ("--flush-cache-timeout", args.flush_cache_timeout, 0),
        ("--ready-check-timeout-sec", args.ready_check_timeout_sec, 0),
    ):
        if value is not None and not value >= least:
            raise BenchmarkError(f"{flag} must be at least {least}, got {value}")
    if not args.request_rate > 0:
        raise BenchmarkError(f"--request-rate must be above 0, got {args.request_rate}")
    if not 0 < port < 65536:
        raise BenchmarkError(f"--port must be from 1 to 65535, got {port}")
    if not 0 <= args.seed < 2**32:
        raise BenchmarkError(f"--seed must be from 0 to 2**32 - 1, got {args.seed}")


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


def _json_object(text: str | None) -> dict[str, Any]:
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise BenchmarkError(f"--extra-request-body is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise BenchmarkError(f"--extra-request-body must be a JSON object, got {text[:80]}")
    return value
