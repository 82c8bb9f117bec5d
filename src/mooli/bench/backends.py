"""The APIs that can be measured, and the body each wants.

Owns the table of back-ends and how a request is written in each API. Never sends anything, never reads an answer.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mooli.bench.errors import BenchmarkError
from mooli.bench.records import BenchRequest, Message, Prompt


class Api(enum.Enum):
    """What a server speaks; the value is the path."""

    NATIVE = "/generate"
    COMPLETIONS = "/v1/completions"
    CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Backend:
    """family: whose extensions the server understands, "sglang", "vllm" or "lmdeploy"."""

    name: str
    api: Api
    family: str
    default_port: int


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("sglang", Api.NATIVE, "sglang", 30000),
        Backend("sglang-native", Api.NATIVE, "sglang", 30000),
        Backend("sglang-oai", Api.COMPLETIONS, "sglang", 30000),
        Backend("sglang-oai-chat", Api.CHAT, "sglang", 30000),
        Backend("vllm", Api.COMPLETIONS, "vllm", 8000),
        Backend("vllm-chat", Api.CHAT, "vllm", 8000),
        Backend("lmdeploy", Api.COMPLETIONS, "lmdeploy", 23333),
        Backend("lmdeploy-chat", Api.CHAT, "lmdeploy", 23333),
    )
}

REFUSED_BACKENDS = {
    "sglang-embedding": "it measures embeddings, and this client measures generation",
    "vllm-embedding": "it measures embeddings, and this client measures generation",
    "trt": "the generate_stream API of Triton is not spoken here; its OpenAI frontend can be measured as vllm",
    "gserver": "its protocol is not public",
    "truss": "the predict API of Truss is not spoken here; its OpenAI routes can be measured as vllm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """What all requests of a run have in common.

    extra_body: laid over each body; `sampling_params` in it is laid over ours instead of replacing it.
    cache_report: also ask SGLang's OpenAI routes where the reused tokens came from.
    """

    stream: bool = True
    ignore_eos: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    return_logprob: bool = False
    top_logprobs_num: int = 0
    token_ids_logprob: Sequence[int] | None = None
    logprob_start_len: int = -1
    return_routed_experts: bool = False
    cache_report: bool = False
    extra_body: dict[str, Any] = field(default_factory=dict)


def request_body(
    backend: Backend,
    request: BenchRequest,
    options: RequestOptions,
    *,
    model: str,
    prompt: Prompt,
    output_len: int,
    salt: str | None = None,
) -> dict[str, Any]:
    """The JSON body that asks for `output_len` tokens after `prompt`.

    salt: requests of different salts share no cached prefix; None leaves sharing to the server.
    Raises BenchmarkError where the API cannot carry such a prompt.
    """
    builder = {Api.NATIVE: _native, Api.COMPLETIONS: _completions, Api.CHAT: _chat}[backend.api]
    body = builder(options, model, prompt, output_len)
    if salt is not None:
        body["cache_salt"] = salt
        if backend.api is Api.NATIVE:
            # SGLang's own route knows the salt by this name only.
            body["extra_key"] = salt
    if backend.api is not Api.NATIVE and options.cache_report and backend.family == "sglang":
        body["return_cached_tokens_details"] = True
    for extra in (options.extra_body, request.extra_body):
        sampling = {**body.get("sampling_params", {}), **(extra.get("sampling_params") or {})}
        body.update(extra)
        if sampling:
            body["sampling_params"] = sampling
    return body


def _native(options: RequestOptions, model: str, prompt: Prompt, output_len: int) -> dict[str, Any]:
    sampling: dict[str, Any] = {
        "temperature": options.temperature,
        "max_new_tokens": output_len,
        "ignore_eos": options.ignore_eos,
    }
    if options.top_p != 1.0:
        sampling["top_p"] = options.top_p
    body: dict[str, Any] = {
        "sampling_params": sampling,
        "stream": options.stream,
        "return_logprob": options.return_logprob,
        "logprob_start_len": options.logprob_start_len,
    }
    if isinstance(prompt, str):
        body["text"] = prompt
    elif _is_ids(prompt):
        body["input_ids"] = list(prompt)
    else:
        raise BenchmarkError("a chat of several messages cannot go to /generate; use --backend sglang-oai-chat")
    if options.top_logprobs_num:
        body["top_logprobs_num"] = options.top_logprobs_num
    if options.token_ids_logprob is not None:
        body["token_ids_logprob"] = list(options.token_ids_logprob)
    if options.return_routed_experts:
        body["return_routed_experts"] = True
    return body


def _completions(options: RequestOptions, model: str, prompt: Prompt, output_len: int) -> dict[str, Any]:
    if not isinstance(prompt, str) and not _is_ids(prompt):
        raise BenchmarkError("a chat of several messages cannot go to /v1/completions; use a back-end with -chat")
    sent = prompt if isinstance(prompt, str) else list(prompt)
    return {
        "model": model,
        "prompt": sent,
        "best_of": 1,
        "max_tokens": output_len,
        "ignore_eos": options.ignore_eos,
        **_openai_common(options),
    }


def _chat(options: RequestOptions, model: str, prompt: Prompt, output_len: int) -> dict[str, Any]:
    if _is_ids(prompt):
        raise BenchmarkError("token ids cannot go to /v1/chat/completions; leave out --tokenize-prompt")
    messages: list[Message]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    return {
        "model": model,
        "messages": messages,
        "max_tokens": output_len,
        "ignore_eos": options.ignore_eos,
        **_openai_common(options),
    }


def _openai_common(options: RequestOptions) -> dict[str, Any]:
    body: dict[str, Any] = {"temperature": options.temperature, "stream": options.stream}
    if options.top_p != 1.0:
        body["top_p"] = options.top_p
    if options.stream:
        # Without it a server counts no tokens, and the time per token would rest on what was asked for.
        body["stream_options"] = {"include_usage": True}
    return body


def _is_ids(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], int)
