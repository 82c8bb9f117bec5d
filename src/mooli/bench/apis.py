"""The APIs that can be measured: the body each wants, what its answers say, and the times in them.

Owns the table of back-ends, how a request is written in each API, cutting bytes into the payloads of server-sent
events, and the rules of time to first token, gaps and latency, one reader to an API. Never sends anything, never reads
a clock.

Source of the events: the HTML standard, section "Server-sent events"; one of several data lines is given as several
payloads, for none of the servers sends one.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mooli.bench.errors import BenchmarkError
from mooli.bench.records import BenchRequest, Message, Prompt, RequestRecord


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


# -- answers -----------------------------------------------------------------------------------------------------------

DONE = b"[DONE]"


class EventStream:
    """Takes bytes as they come from the network and gives payloads as soon as their line is whole."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The payloads that `piece` completes, in order, without surrounding white space."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return [payload for line in lines if (payload := _payload(line))]

    def close(self) -> list[bytes]:
        """What a stream without a last line break still held."""
        payload, self._rest = _payload(self._rest), b""
        return [payload] if payload else []


def _payload(line: bytes) -> bytes:
    return line[5:].strip() if line.startswith(b"data:") else b""


class AnswerError(Exception):
    """The server ended the answer with an error; the message is its own."""


class Answer:
    """Fills a record piece by piece. `record.start_s` must be set.

    A piece is a parsed event of a stream, or the whole body of an answer that is not streamed.
    """

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self.is_finished = False
        self._last_token_s: float | None = None
        self._num_pieces = 0

    def piece(self, data: Any, at_s: float) -> None:
        """Take one piece that came at `at_s`. Raises AnswerError if it is an error."""
        if not isinstance(data, Mapping):
            raise AnswerError(f"the server sent {str(data)[:200]!r} where an object belongs")
        if data.get("error") or data.get("object") == "error":
            raise AnswerError(error_message(data))
        self._num_pieces += 1
        self.record.latency_s = at_s - self.record.start_s
        self._read(data, at_s)

    def done(self, at_s: float) -> None:
        """The mark that ends a stream came at `at_s`."""
        self.is_finished = True
        self.record.latency_s = at_s - self.record.start_s

    def close(self) -> None:
        """Nothing more comes. Raises AnswerError unless the answer came whole."""
        if not self._num_pieces:
            raise AnswerError("the server sent an empty answer")
        if not self.is_finished:
            raise AnswerError(f"the answer broke off after {self._num_pieces} pieces")
        record = self.record
        if self._last_token_s is None:
            # Nothing but tokens without a text came: the earliest that anybody could see is the end.
            record.ttft_s = record.latency_s
        record.success = True

    def _read(self, data: Mapping[str, Any], at_s: float) -> None:
        raise NotImplementedError

    def _first_token(self, at_s: float) -> None:
        self.record.ttft_s = at_s - self.record.start_s
        self._last_token_s = at_s

    def _finish(self, reason: Any) -> None:
        kind = reason.get("type") if isinstance(reason, Mapping) else reason
        if kind in ("abort", "error"):
            said = reason.get("message") if isinstance(reason, Mapping) else None
            raise AnswerError(f"the server ended the request with {kind}" + (f": {said}" if said else ""))
        if kind is not None:
            self.is_finished = True


class NativeAnswer(Answer):
    """`/generate`: every piece holds the whole text so far and how many tokens that is."""

    def __init__(self, record: RequestRecord) -> None:
        super().__init__(record)
        self._num_tokens = 0

    def _read(self, data: Mapping[str, Any], at_s: float) -> None:
        record = self.record
        meta = _mapping(data.get("meta_info"))
        text = data.get("text")
        if isinstance(text, str) and text:
            record.generated_text = text
        count = meta.get("completion_tokens")
        if isinstance(count, int):
            record.output_len, record.is_output_len_reported = count, True
        # A server without a tokenizer sends ids and no text at all.
        if text or (text is None and data.get("output_ids")):
            num_tokens = count if isinstance(count, int) else self._num_tokens + 1
            self._tokens(num_tokens, at_s)
        if isinstance(meta.get("prompt_tokens"), int):
            record.server_prompt_tokens = meta["prompt_tokens"]
        if isinstance(meta.get("cached_tokens"), int):
            record.cached_tokens = meta["cached_tokens"]
        if isinstance(meta.get("cached_tokens_details"), Mapping):
            record.cached_tokens_details = dict(meta["cached_tokens_details"])
        self._finish(meta.get("finish_reason"))

    def _tokens(self, num_tokens: int, at_s: float) -> None:
        new = num_tokens - self._num_tokens
        if self._last_token_s is None:
            self._first_token(at_s)
        elif new > 0:
            self.record.itl_s += [(at_s - self._last_token_s) / new] * new
            self._last_token_s = at_s
        self._num_tokens = max(num_tokens, self._num_tokens)


class OpenAIAnswer(Answer):
    """Completions and chats: every piece holds new text; token counts come once, at the end."""

    def _read(self, data: Mapping[str, Any], at_s: float) -> None:
        record = self.record
        choices = data.get("choices")
        choice = _mapping(choices[0]) if isinstance(choices, list) and choices else {}
        text = _choice_text(choice)
        if text:
            if self._last_token_s is None:
                self._first_token(at_s)
            else:
                record.itl_s.append(at_s - self._last_token_s)
                record.chunk_texts.append(text)
                self._last_token_s = at_s
            record.generated_text += text
        self._usage(_mapping(data.get("usage")))
        details = _mapping(data.get("sglext")).get("cached_tokens_details")
        if isinstance(details, Mapping):
            record.cached_tokens_details = dict(details)
        self._finish(choice.get("finish_reason"))

    def _usage(self, usage: Mapping[str, Any]) -> None:
        record = self.record
        if isinstance(usage.get("completion_tokens"), int):
            record.output_len, record.is_output_len_reported = usage["completion_tokens"], True
        if isinstance(usage.get("prompt_tokens"), int):
            record.server_prompt_tokens = usage["prompt_tokens"]
        cached = _mapping(usage.get("prompt_tokens_details")).get("cached_tokens")
        if isinstance(cached, int):
            record.cached_tokens = cached


def answer_reader(api: Api, record: RequestRecord) -> Answer:
    """A reader of that API's answers into `record`."""
    return NativeAnswer(record) if api is Api.NATIVE else OpenAIAnswer(record)


def error_message(data: Any) -> str:
    """The words of an error body, whichever of the usual shapes it has."""
    if isinstance(data, Mapping):
        for key in ("error", "message", "detail"):
            if data.get(key):
                return error_message(data[key])
    return " ".join(str(data).split())[:500]


def _choice_text(choice: Mapping[str, Any]) -> str:
    """All that a choice adds for a reader: text, reasoning, the arguments of tool calls."""
    if "text" in choice:
        return choice["text"] or ""
    message = _mapping(choice.get("delta") or choice.get("message"))
    # Some servers send the reasoning under both names.
    parts = [message.get("reasoning_content") or message.get("reasoning"), message.get("content")]
    for call in message.get("tool_calls") or ():
        function = _mapping(_mapping(call).get("function"))
        parts += [function.get("name"), function.get("arguments")]
    return "".join(part for part in parts if isinstance(part, str))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
