"""The bodies of OpenAI's requests, as far as they are understood.

Owns names and types; `null` means the same as leaving a field out. Never checks values and knows no defaults: that is
done under the native names (`mooli.frontend.sampling`). Fields that are known but cannot be served are in
`mooli.server.openai_fields`.

Source: OpenAI API reference, completions and chat; SGLang's extensions of both.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from mooli.server.routing import ModelName

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class StreamOptions(msgspec.Struct, kw_only=True):
    """include_usage: a last chunk without choices that has the usage. continuous_usage_stats: each chunk has the usage
    of its choice so far."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(msgspec.Struct, kw_only=True):
    """What completions and chats have in common. `model` is not checked: any name is served."""

    model: ModelName | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    # SGLang's extensions
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    no_stop_trim: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    stream_interval: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
    return_token_ids: bool | None = None
    return_cached_tokens_details: bool | None = None


class CompletionBody(GenerationBody, kw_only=True):
    """POST /v1/completions. prompt: a text, token ids, or a list of either."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    rid: str | list[str] | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    """One message. content: a text or parts, of which only those of type "text" are served."""

    role: Role
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None
    refusal: str | None = None
    audio: Any = None


class ChatBody(GenerationBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    rid: str | None = None
