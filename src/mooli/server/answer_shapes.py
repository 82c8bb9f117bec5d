"""What each route answers with, for the OpenAPI document: the shape of a 200, and of each event of a stream.

Owns the types of answers that handlers write as plain dicts; where a route has types of its own, those are named. They
are read by `mooli.server.app` alone, and no answer is made of them: that a real one fits is tested. Fields beside those
named may come. A field that is not always there is `| UnsetType`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from mooli.server import cache_routes, cache_shapes

Details = dict[str, Any]


class _Shape(msgspec.Struct):
    """Base of all."""


# -- native ------------------------------------------------------------------------------------------------------------
class FinishReason(_Shape):
    """type: stop (`matched` is a token id or a stop string), length, abort or error."""

    type: Literal["stop", "length", "abort", "error"]
    matched: int | str | UnsetType | None = UNSET
    length: int | UnsetType | None = UNSET
    message: str | UnsetType | None = UNSET
    status_code: int | UnsetType | None = UNSET
    err_type: str | UnsetType | None = UNSET


class CachedDetails(_Shape):
    """Cached tokens by where they were. storage: of those that came from disk, where there are some."""

    device: int
    host: int
    storage: int | UnsetType = UNSET
    storage_backend: str | UnsetType = UNSET


LogprobTriple = tuple[float | None, int, str | None]
"""Log-probability, token id, and its text where that was asked for."""


class CacheReport(_Shape):
    """Why no more of a prompt was in the cache. had, has: texts of a few tokens there, and here. divergence_index: of
    the first token that was not there. message: the place, in words. previous_id: of the request that this one goes
    on."""

    reason: str
    matched_tokens: int
    lost_tokens: int
    divergence_index: int | None
    message: str | None
    had: str | None
    has: str | None
    previous_id: str | None
    advice: str | None


class MetaInfo(_Shape):
    """finish_reason: null in a stream before its end. Log-probabilities are there where they were asked for."""

    id: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int
    cached_tokens_details: CachedDetails
    weight_version: str
    num_retractions: int
    e2e_latency: float | UnsetType = UNSET
    response_sent_to_client_ts: float | UnsetType = UNSET
    input_token_logprobs: list[LogprobTriple] | UnsetType = UNSET
    output_token_logprobs: list[LogprobTriple] | UnsetType = UNSET
    input_top_logprobs: list[list[LogprobTriple] | None] | UnsetType = UNSET
    output_top_logprobs: list[list[LogprobTriple] | None] | UnsetType = UNSET
    spec_accept_length: float | UnsetType = UNSET
    cache_report: CacheReport | UnsetType | None = UNSET


class Generated(_Shape):
    """text: missing without a tokenizer. index: of the sequence, where there are several."""

    output_ids: list[int]
    meta_info: MetaInfo
    text: str | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    message: Details | UnsetType = UNSET
    index: int | UnsetType = UNSET


class Tokenized(_Shape):
    """Of several texts, a list for each."""

    tokens: list[int | list[int]]
    count: int | list[int]
    max_model_len: int


class Detokenized(_Shape):
    text: str | list[str]


class ServedModel(_Shape):
    model_path: str
    tokenizer_path: str
    served_model_name: str
    is_generation: bool
    weight_version: str
    reasoning_parser: str | None
    tool_call_parser: str | None
    architectures: list[str]
    max_model_len: int


class ServerInfo(_Shape):
    """All arguments of the server and the engine by their names beside these; keys are never shown."""

    model_path: str
    launch_command: str
    startup_time: float
    internal_states: list[Details]
    version: str
    context_length: int
    page_size: int
    num_pages: int
    max_total_num_tokens: int
    max_running_requests: int
    cache_namespace: str


class Load(_Shape):
    """The sections that were asked for are there; the numbers are of the section `core`."""

    dp_rank: int
    num_running_reqs: int | UnsetType = UNSET
    num_waiting_reqs: int | UnsetType = UNSET
    num_used_tokens: int | UnsetType = UNSET
    num_total_tokens: int | UnsetType = UNSET
    max_total_num_tokens: int | UnsetType = UNSET
    token_usage: float | UnsetType = UNSET
    gen_throughput: float | UnsetType = UNSET
    cache_hit_rate: float | UnsetType = UNSET
    utilization: float | UnsetType = UNSET
    memory: Details | UnsetType = UNSET
    spec: Details | UnsetType | None = UNSET
    queues: Details | UnsetType = UNSET


class Loads(_Shape):
    timestamp: str
    version: str
    accelerator: str
    num_accelerators: int
    loads: list[Load]


class RankLoad(_Shape):
    dp_rank: int
    num_reqs: int
    num_waiting_reqs: int
    num_tokens: int


class SeparatedReasoning(_Shape):
    reasoning_text: str
    text: str


class ParsedCall(_Shape):
    """parameters: as JSON."""

    tool_index: int
    name: str
    parameters: str


class ParsedCalls(_Shape):
    normal_text: str
    calls: list[ParsedCall]


# -- OpenAI's ----------------------------------------------------------------------------------------------------------
class PromptDetails(_Shape):
    """Of the prompt. cached_tokens: those that the cache had. cache_write_tokens: those computed, and in it since."""

    cached_tokens: int
    cache_write_tokens: int


class Usage(_Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    reasoning_tokens: int


OpenAIFinish = Literal["stop", "length", "tool_calls", "function_call", "content_filter", "abort"] | None


class CompletionChoice(_Shape):
    index: int
    text: str
    logprobs: Details | None
    finish_reason: OpenAIFinish
    matched_stop: int | str | None


class Completion(_Shape):
    """In a stream each chunk is one, the last with `usage` where it was asked for and no choice."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class ChatMessage(_Shape):
    """tool_calls, function_call: what the model calls."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None
    tool_calls: list[Details] | UnsetType = UNSET
    function_call: Details | UnsetType = UNSET


class ChatChoice(_Shape):
    index: int
    message: ChatMessage
    logprobs: Details | None
    finish_reason: OpenAIFinish
    matched_stop: int | str | None


class ChatCompletion(_Shape):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(_Shape):
    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType | None = UNSET
    tool_calls: list[Details] | UnsetType = UNSET
    function_call: Details | UnsetType = UNSET


class ChatChunkChoice(_Shape):
    index: int
    delta: ChatDelta
    logprobs: Details | None
    finish_reason: OpenAIFinish
    matched_stop: int | str | None


class ChatChunk(_Shape):
    """A stream's event; the last with `usage` where it was asked for and no choice."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class ModelCard(_Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelCards(_Shape):
    """To clients of Anthropic's API the same list is told in its shape."""

    data: list[Details]


class ModelAnswer(_Shape):
    """OpenAI's card of a model, or Anthropic's."""

    id: str


class Response(_Shape):
    """output: items, each with its `type`: message, reasoning, function_call, custom_tool_call."""

    id: str
    object: Literal["response"]
    created_at: int | float
    model: str
    status: Literal["completed", "incomplete", "failed", "in_progress", "cancelled", "queued"]
    error: Details | None
    incomplete_details: Details | None
    output: list[Details]
    usage: Details | None


class ResponseEvent(_Shape):
    """What there is beside these is of its type: `response` from response.created to response.completed, `item`,
    `part`, `delta`, `text`, `arguments` in between."""

    type: str
    sequence_number: int


class InputTokens(_Shape):
    object: Literal["response.input_tokens"]
    input_tokens: int


class Deleted(_Shape):
    id: str
    object: str
    deleted: bool


class Page(_Shape):
    """Some of a list, and whether there is more."""

    object: Literal["list"]
    data: list[Details]
    has_more: bool
    first_id: str | UnsetType | None = UNSET
    last_id: str | UnsetType | None = UNSET


class FileObject(_Shape):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: str


class BatchObject(_Shape):
    id: str
    object: Literal["batch"]
    endpoint: str
    status: str
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    request_counts: Details
    metadata: Details | None


# -- Anthropic's -------------------------------------------------------------------------------------------------------
class AnthropicUsage(_Shape):
    """input_tokens: of the prompt, what had to be computed and is not counted as written to the cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(_Shape):
    """content: blocks, each with its `type`: text, thinking, tool_use."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Details]
    stop_reason: str | None
    stop_sequence: str | None
    usage: AnthropicUsage
    diagnostics: Details | UnsetType | None = UNSET


class AnthropicEvent(_Shape):
    """From message_start to message_stop, with what belongs to its type."""

    type: Literal[
        "message_start", "content_block_start", "ping", "content_block_delta", "content_block_stop", "message_delta",
        "message_stop", "error",
    ]  # fmt: skip


class AnthropicTokens(_Shape):
    input_tokens: int


# -- Ollama's and llama.cpp's ------------------------------------------------------------------------------------------
class OllamaChat(_Shape):
    """A line of a stream, or the whole; what was counted is in the last. Durations are nanoseconds."""

    model: str
    created_at: str
    message: Details
    done: bool
    done_reason: str | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET


class OllamaGenerated(_Shape):
    """The same without roles."""

    model: str
    created_at: str
    response: str
    done: bool
    done_reason: str | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET


class OllamaVersion(_Shape):
    version: str
    mooli: str


class OllamaModels(_Shape):
    models: list[Details]


class OllamaModel(_Shape):
    modelfile: str
    template: str
    details: Details
    model_info: Details
    capabilities: list[str]


class Infilled(_Shape):
    """An event of a stream, or the whole. stop: it is the last."""

    content: str | UnsetType = UNSET
    stop: bool | UnsetType = UNSET
    tokens_predicted: int | UnsetType = UNSET
    tokens_evaluated: int | UnsetType = UNSET
    timings: Details | UnsetType = UNSET


# -- which route has which ---------------------------------------------------------------------------------------------
TEXT = "text/plain; charset=utf-8"
EVENTS = "text/event-stream; charset=utf-8"
LINES = "application/x-ndjson"


@dataclass(frozen=True, slots=True)
class Answer:
    """json: type of the whole answer. stream: of the data of each event or line, in the framing `framing`; `is_done`:
    the last is the word [DONE]. others: media types of answers that are no JSON."""

    json: Any = None
    stream: Any = None
    framing: str = EVENTS
    is_done: bool = False
    others: tuple[str, ...] = ()


_PROBE = Answer(others=(TEXT,))
_TOKENIZED, _DETOKENIZED = Answer(Tokenized), Answer(Detokenized)
_MODEL, _SERVER = Answer(ServedModel), Answer(ServerInfo)
_REFUSED = Answer()
"""Never 200."""

ANSWERS: Mapping[str, Answer] = {
    "/generate": Answer(Generated | list[Generated], Generated, is_done=True),
    "/tokenize": _TOKENIZED,
    "/v1/tokenize": _TOKENIZED,
    "/detokenize": _DETOKENIZED,
    "/v1/detokenize": _DETOKENIZED,
    "/": _PROBE,
    "/model_info": _MODEL,
    "/get_model_info": _MODEL,
    "/server_info": _SERVER,
    "/get_server_info": _SERVER,
    "/v1/loads": Answer(Loads, others=(TEXT,)),
    "/get_load": Answer(list[RankLoad]),
    "/separate_reasoning": Answer(SeparatedReasoning),
    "/parse_function_call": Answer(ParsedCalls),
    "/health": _PROBE,
    "/health_generate": _PROBE,
    "/health/live": _PROBE,
    "/health/ready": _PROBE,
    "/ready": _PROBE,
    "/ping": _PROBE,
    "/flush_cache": _PROBE,
    "/abort_request": _PROBE,
    "/v1/cache/tree": Answer(cache_shapes.Tree),
    "/v1/cache/nodes/{node_id}": Answer(cache_routes.NodeText),
    "/v1/cache/find": Answer(cache_routes.Found),
    "/v1/cache/events": Answer(stream=cache_shapes.FeedEvent),
    "/v1/status": Answer(cache_routes.Status),
    "/v1/logs": Answer(cache_routes.LogAnswer),
    "/v1/models": Answer(ModelCards),
    "/v1/models/{model_id:path}": Answer(ModelAnswer),
    "/v1/completions": Answer(Completion, Completion, is_done=True),
    "/v1/chat/completions": Answer(ChatCompletion, ChatChunk, is_done=True),
    "/v1/responses": Answer(Response, ResponseEvent),
    "/v1/responses/input_tokens": Answer(InputTokens),
    "GET /v1/responses/{response_id}": Answer(Response),
    "DELETE /v1/responses/{response_id}": Answer(Deleted),
    "/v1/responses/{response_id}/input_items": Answer(Page),
    "POST /v1/files": Answer(FileObject),
    "GET /v1/files": Answer(Page),
    "GET /v1/files/{file_id}": Answer(FileObject),
    "DELETE /v1/files/{file_id}": Answer(Deleted),
    "/v1/files/{file_id}/content": Answer(others=("application/octet-stream",)),
    "POST /v1/batches": Answer(BatchObject),
    "GET /v1/batches": Answer(Page),
    "/v1/batches/{batch_id}": Answer(BatchObject),
    "/v1/batches/{batch_id}/cancel": Answer(BatchObject),
    "/v1/messages": Answer(AnthropicMessage, AnthropicEvent),
    "/v1/messages/count_tokens": Answer(AnthropicTokens),
    "/infill": Answer(Infilled, Infilled),
    "/api/chat": Answer(OllamaChat, OllamaChat, LINES),
    "/api/generate": Answer(OllamaGenerated, OllamaGenerated, LINES),
    "/api/version": Answer(OllamaVersion),
    "/api/tags": Answer(OllamaModels),
    "/api/ps": Answer(OllamaModels),
    "/api/show": Answer(OllamaModel),
    "/api/embed": _REFUSED,
    "/api/embeddings": _REFUSED,
    "/api/pull": _REFUSED,
    "/api/push": _REFUSED,
    "/api/create": _REFUSED,
    "/api/copy": _REFUSED,
    "/api/delete": _REFUSED,
    "/metrics": Answer(others=(TEXT,)),
}
"""By path, or by method and path where methods differ."""


def answer_of(method: str, path: str) -> Answer | None:
    """What a route answers with; None where nothing is said of it here."""
    return ANSWERS.get(f"{method} {path}") or ANSWERS.get(path)
