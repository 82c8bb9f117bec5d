"""Flags: SGLang's names, defaults and abbreviations, and a reason for everything that is refused."""

from __future__ import annotations

import math
import shlex
from typing import Any

import pytest

from mooli.bench.apis import Api
from mooli.bench.arguments import OWN_FLAGS, BenchOptions, bench_parser, expand_abbreviations, parse_arguments
from mooli.bench.errors import BenchmarkError


def parse(*argv: str, environment: dict[str, str] | None = None) -> BenchOptions:
    return parse_arguments(argv, environment or {})


SGLANG_DEFAULTS = {
    "backend": "sglang", "base_url": None, "host": "0.0.0.0", "port": None, "model": None, "served_model_name": None,
    "tokenizer": None, "header": None, "ready_check_timeout_sec": 60, "dataset_name": "sharegpt", "dataset_path": "",
    "num_prompts": 1000, "sharegpt_output_len": None, "sharegpt_context_len": None, "random_input_len": 1024,
    "random_output_len": 1024, "random_range_ratio": 0.0, "prompt_suffix": "", "apply_chat_template": False,
    "tokenize_prompt": False, "seed": 42, "gsp_num_groups": 64, "gsp_prompts_per_group": 16,
    "gsp_system_prompt_len": 2048, "gsp_question_len": 128, "gsp_output_len": 256, "gsp_range_ratio": 1.0,
    "gsp_num_turns": 1, "gsp_fast_prepare": False, "gsp_send_routing_key": False, "gsp_ordered": False,
    "gsp_group_distribution": "uniform", "gsp_zipf_alpha": None, "mooncake_slowdown_factor": 1.0,
    "mooncake_num_rounds": 1, "mooncake_workload": "conversation", "use_trace_timestamps": False,
    "request_rate": math.inf, "max_concurrency": None, "warmup_requests": 1, "flush_cache": False,
    "flush_cache_timeout": 60, "disable_stream": False, "disable_ignore_eos": False, "temperature": 0.0, "top_p": 1.0,
    "extra_request_body": None, "return_logprob": False, "top_logprobs_num": 0, "token_ids_logprob": None,
    "logprob_start_len": -1, "return_routed_experts": False, "output_file": None, "output_details": False, "tag": None,
    "goodput": None, "cache_report": False, "print_requests": False, "plot_throughput": False, "disable_tqdm": False,
}  # fmt: skip


def test_defaults_are_sglangs() -> None:
    found = vars(bench_parser().parse_args([]))
    assert {name: found[name] for name in SGLANG_DEFAULTS} == SGLANG_DEFAULTS


def sglang_flags() -> list[str]:
    known = [flag for action in bench_parser()._actions for flag in action.option_strings if flag.startswith("--")]
    return [flag for flag in known if flag not in OWN_FLAGS]


@pytest.mark.parametrize("flag", sglang_flags())
def test_no_flag_of_ours_makes_an_abbreviation_of_sglangs_ambiguous(flag: str) -> None:
    flags = sglang_flags()
    for length in range(3, len(flag)):
        short = flag[:length]
        if short not in flags and [other for other in flags if other.startswith(short)] == [flag]:
            assert expand_abbreviations([short, f"{short}=1"], bench_parser()) == [flag, f"{flag}=1"]


def test_the_guides_command_means_what_it_says() -> None:
    options = parse(
        *shlex.split(
            "--backend sglang --dataset-name random --num-prompt 30 --random-input 128 --random-output=32"
            " --random-range-ratio 0.5 --request-rate 4 --max-concurrency 8"
        )
    )
    assert (options.data.name, options.data.num_prompts) == ("random", 30)
    assert (options.data.random_input_len, options.data.random_output_len) == (128, 32)
    assert (options.request_rate, options.max_concurrency) == (4.0, 8)
    assert options.base_url == "http://0.0.0.0:30000"


@pytest.mark.parametrize(
    ("argv", "url"),
    [
        (["--backend", "vllm-chat"], "http://0.0.0.0:8000"),
        (["--backend", "lmdeploy", "--host", "::1"], "http://[::1]:23333"),
        (["--port", "81", "--host", "here"], "http://here:81"),
        (["--base-url", "https://x/y/"], "https://x/y"),
    ],
)
def test_the_server_is_where_the_flags_say(argv: list[str], url: str) -> None:
    assert parse(*argv).base_url == url


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--backend", "trt"], "Triton"),
        (["--backend", "gserver"], "not public"),
        (["--backend", "truss"], "Truss"),
        (["--backend", "sglang-embedding"], "embeddings"),
        (["--backend", "nothing"], "invalid choice"),
        (["--dataset-name", "mmmu"], "images"),
        (["--dataset-name", "agentic-trace"], "not read"),
        (["--image-count", "2"], "images"),
        (["--random-image-count"], "images"),
        (["--lora-name", "a", "b"], "LoRA"),
        (["--lora-zipf-alpha", "2"], "LoRA"),
        (["--profile"], "profiler"),
        (["--profile-steps", "3"], "profiler"),
        (["--pd-separated"], "prefill"),
        (["--fake-prefill"], "prefill"),
        (["--rust-client"], "one client"),
        (["--agentic-max-turns", "3"], "agentic-trace"),
        (["--speed-bench-output-len", "3"], "speed-bench"),
        (["--random-input-len", "5"], "belongs to --dataset-name random or random-ids, not sharegpt"),
        (["--dataset-name", "random", "--gsp-ordered"], "belongs to --dataset-name generated-shared-prefix"),
        (["--use-trace-timestamps"], "belongs to --dataset-name mooncake"),
        (["--dataset-name", "random", "--apply-chat-template"], "belongs to"),
        (["--backend", "vllm", "--return-logprob"], "of /generate"),
        (["--top-logprobs-num", "2"], "needs --return-logprob"),
        (["--backend", "vllm", "--flush-cache"], "no route"),
        (["--backend", "lmdeploy", "--force-miss"], "salt"),
        (["--backend", "vllm-chat", "--dataset-name", "random", "--tokenize-prompt"], "no token ids"),
        (["--goodput", "itl:3"], "--goodput"),
        (["--header", "nothing"], "KEY=VALUE"),
        (["--extra-request-body", "[1]"], "JSON object"),
        (["--extra-request-body", "{"], "not JSON"),
        (["--request-rate", "0"], "above 0"),
        (["--request-rate", "nan"], "above 0"),
        (["--max-concurrency", "0"], "at least 1"),
        (["--num-prompts", "0"], "at least 1"),
        (["--warmup-requests", "-1"], "at least 0"),
        (["--port", "70000"], "65535"),
        (["--seed", "-1"], "--seed"),
        (["--base-url", "localhost:30000"], "http://"),
        (["--no-such-flag"], "no-such-flag"),
        (["--num-prompts", "many"], "invalid int"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(argv: list[str], words: str) -> None:
    with pytest.raises(BenchmarkError, match=words):
        parse(*argv)


@pytest.mark.parametrize(
    "argv", [["--image-count", "1"], ["--lora-request-distribution", "uniform"], ["--lora-zipf-alpha", "1.5"]]
)
def test_a_refused_flag_with_sglangs_own_default_asks_for_nothing(argv: list[str]) -> None:
    assert parse(*argv).backend.name == "sglang"


def test_everything_for_requests_reaches_them() -> None:
    options = parse(
        *shlex.split(
            "--disable-stream --disable-ignore-eos --temperature 0.7 --top-p 0.9 --return-logprob --top-logprobs-num 3"
            " --token-ids-logprob 5 6 --logprob-start-len 2 --return-routed-experts --cache-report"
            """ --extra-request-body '{"priority": 1}'"""
        )
    )
    request = options.request
    assert (request.stream, request.ignore_eos, request.temperature, request.top_p) == (False, False, 0.7, 0.9)
    assert (request.return_logprob, request.top_logprobs_num, request.token_ids_logprob) == (True, 3, [5, 6])
    assert (request.logprob_start_len, request.return_routed_experts, request.cache_report) == (2, True, True)
    assert request.extra_body == {"priority": 1}


@pytest.mark.parametrize(
    ("environment", "headers"),
    [
        ({}, {}),
        ({"OPENAI_API_KEY": "k", "API_KEY": "other"}, {"Authorization": "Bearer k"}),
        ({"API_KEY": "raw"}, {"Authorization": "raw"}),
    ],
)
def test_keys_come_from_the_environment(environment: dict[str, str], headers: dict[str, str]) -> None:
    assert parse("--backend", "vllm", environment=environment).headers == headers


def test_headers_are_keys_and_values() -> None:
    assert parse("--header", "A=1", "B=x=y").headers == {"A": "1", "B": "x=y"}


@pytest.mark.parametrize(("backend", "is_chat"), [("sglang", False), ("vllm-chat", True)])
def test_datasets_know_whether_they_feed_a_chat(backend: str, is_chat: bool) -> None:
    options: Any = parse("--backend", backend)
    assert options.data.is_chat is is_chat is (options.backend.api is Api.CHAT)
