"""POST /v1/chat/completions: a conversation in, the assistant's next message out, in OpenAI's shape.

Owns what is particular to chats: messages and their parts, the template's arguments, the model's own sampling defaults,
and the shape of a choice. Source: OpenAI API reference, chat; SGLang's extensions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import msgspec

from mooli.errors import RequestError
from mooli.frontend.generation import Generation
from mooli.frontend.inputs import CallInputs, GenerateCall
from mooli.frontend.parts import PLAIN_TEXT, Part, PartKind, WireFormat, parser_for
from mooli.frontend.tokenizer import Tokenizer
from mooli.server.errors import in_names
from mooli.server.json_body import check_count, num_entries
from mooli.server.openai import (
    COMMON_NAMES,
    LOWEST,
    UNSUPPORTED,
    AnswerShape,
    GenerationBody,
    answer,
    cache_salt,
    finish_fields,
    refuse_unsupported,
    require_chat_template,
    require_tokenizer,
    sampling_params,
)
from mooli.server.routing import Access, Client, Dialect, EventStream, HttpError, Incoming, Reply, Route
from mooli.server.service import Service
from mooli.types import FinishReason, TokenLogprobs

NAMES = {**COMMON_NAMES, "input_ids": "messages", "top_logprobs_num": "top_logprobs"}

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]

_OWN_ARGUMENTS = frozenset(
    (
        "messages", "conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize",
        "tokenizer", "chat_template", "parse_special_in_content", "self",
    )
)  # fmt: skip
"""What `chat_template_kwargs` must not change: the request has its own fields for it, or it guards the conversation."""


EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""Words of `reasoning_effort`; a number from 0 to 1 says it as well."""


class ChatMessage(msgspec.Struct, kw_only=True):
    """One message. content: a text or parts: texts, and of the assistant's its reasoning ("thinking"). reasoning:
    another name for reasoning_content."""

    role: Role
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None
    refusal: str | None = None
    audio: Any = None


class ChatBody(GenerationBody, kw_only=True):
    """POST /v1/chat/completions.

    reasoning_effort, or `effort` and `enabled` of reasoning: said to the template, which also hears as `thinking` and
    `enable_thinking` whether to reason at all. separate_reasoning: false tells the text as it is. stream_reasoning:
    false gives the reasoning of a stream in one piece.
    """

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | float | None = None
    reasoning: dict[str, Any] | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    rid: str | None = None


async def chat_completions(service: Service, request: Incoming) -> Reply | EventStream:
    """Raises HttpError for a request that is wrong, and what `Call.changes` raises."""
    body: ChatBody = request.body
    refuse_unsupported(request.unsupported)
    require_tokenizer(service)
    inputs = await _prepare(service, body, request.client)
    shape = AnswerShape.of(service, body, has_logprobs=bool(body.logprobs))
    shape = replace(shape, streams_reasoning=body.stream_reasoning is not False)
    wire_format = PLAIN_TEXT if body.separate_reasoning is False else service.wire_format
    wire_format = wire_format.continued if body.continue_final_message else wire_format
    del request, body
    kind = "chat.completion.chunk" if inputs.is_stream else "chat.completion"
    open_choice = functools.partial(ChatChoice, service, shape, wire_format)
    return await answer(service, inputs, shape, kind, open_choice, wire_format)


async def _prepare(service: Service, body: ChatBody, client: Client) -> CallInputs:
    """Raises HttpError."""
    length_name, max_tokens = _length(body)
    if body.top_logprobs and not body.logprobs:
        raise HttpError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    call = GenerateCall(
        input_ids=await conversation_ids(service, body),
        sampling_params=_sampling(service, body, max_tokens),
        return_logprob=bool(body.logprobs),
        top_logprobs_num=body.top_logprobs,
        stream=bool(body.stream),
        rid=body.rid,
        priority=body.priority,
        cache_salt=cache_salt(body),
    )
    try:
        return await service.prepare(call, client.caller)
    except RequestError as exc:
        raise in_names(exc, Dialect.OPENAI, {**NAMES, "max_new_tokens": length_name}) from exc


async def conversation_ids(service: Service, body: ChatBody) -> list[int]:
    """The ids of a conversation, up to where the assistant goes on. Raises HttpError."""
    require_chat_template(service)
    parts = sum(len(message.content) for message in body.messages if isinstance(message.content, list))
    check_count("messages", len(body.messages) + parts, service.config.max_request_items)
    messages = [_template_message(message, f"messages[{i}]") for i, message in enumerate(body.messages)]
    template_arguments = _template_arguments(service, body)
    return await service.encode_chat(messages, **template_arguments)


def _length(body: ChatBody) -> tuple[str, int | None]:
    """The most tokens of the answer, None for what the context leaves, and the name of the field that says so."""
    if body.max_completion_tokens is None:
        return "max_tokens", body.max_tokens
    if body.max_tokens not in (None, body.max_completion_tokens):
        raise HttpError(
            400,
            f"max_completion_tokens={body.max_completion_tokens} and max_tokens={body.max_tokens} differ: give one",
            param="max_tokens",
        )
    return "max_completion_tokens", body.max_completion_tokens


def _sampling(service: Service, body: ChatBody, max_tokens: int | None) -> dict[str, Any]:
    params = service.chat_sampling(sampling_params(body))
    if max_tokens is not None or "max_new_tokens" not in service.engine_config.preferred_sampling:
        params["max_new_tokens"] = max_tokens
    return params


# -- the conversation ------------------------------------------------------------------------------------------------
def _template_message(message: ChatMessage, where: str) -> dict[str, Any]:
    """A message as chat templates know it. Raises HttpError for what cannot be told to this model."""
    for name in ("tool_calls", "function_call", "audio"):
        if getattr(message, name):
            raise HttpError(400, f"{where}.{name} is not supported by this server: leave it out", param="messages")
    content = message.content
    if content is None and message.role == "assistant":
        content = message.refusal  # said instead
    elif content is None:
        raise HttpError(400, f"{where}.content is missing", param="messages")
    # Templates know no developer: it is OpenAI's newer name for who writes the system prompt.
    kinds = ("text", "thinking") if message.role == "assistant" else ("text",)
    told = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _text(content, f"{where}.content", "text", kinds),
    }
    reasoning = message.reasoning_content if message.reasoning_content is not None else message.reasoning
    if reasoning is None and not isinstance(content, str):
        reasoning = _text(content, f"{where}.content", "thinking", kinds) or None
    for name, value in (
        ("name", message.name), ("tool_call_id", message.tool_call_id), ("reasoning_content", reasoning)
    ):  # fmt: skip
        if value is not None:
            told[name] = value
    return told


def _text(content: str | list[dict[str, Any]] | None, where: str, wanted: str, kinds: Sequence[str]) -> str:
    """One text of the parts of the kind that is wanted, put on lines of their own. Raises HttpError for one that is of
    none of `kinds`."""
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content or ()):
        kind = str(part.get("type"))
        if kind not in kinds:
            raise HttpError(
                400, f"{where}[{i}]: a part of type {kind[:80]!r} is not supported, only text is", param="messages"
            )
        if not isinstance(part.get(kind), str):
            raise HttpError(400, f"{where}[{i}].{kind} must be a string", param="messages")
        if kind == wanted:
            texts.append(part[kind])
    return "\n".join(texts)


def _template_arguments(service: Service, body: ChatBody) -> dict[str, Any]:
    given = body.chat_template_kwargs or {}
    check_count("chat_template_kwargs", num_entries(given), service.config.max_request_items)
    for name in given:
        if name in _OWN_ARGUMENTS:
            raise HttpError(
                400, f"chat_template_kwargs must not have {name!r}: it is not the template's to say",
                param="chat_template_kwargs",
            )  # fmt: skip
    is_continued = bool(body.continue_final_message)
    if is_continued and body.add_generation_prompt:
        raise HttpError(
            400, "continue_final_message and add_generation_prompt exclude each other", param="add_generation_prompt"
        )
    return {
        **service.config.chat_template_kwargs,
        **_reasoning_arguments(body),
        **given,
        "continue_final_message": is_continued,
        "add_generation_prompt": not is_continued and body.add_generation_prompt is not False,
    }


def _reasoning_arguments(body: ChatBody) -> dict[str, Any]:
    """What the template is told of reasoning. Raises HttpError."""
    asked: Mapping[str, Any] = body.reasoning or {}
    enabled = asked.get("enabled")
    if enabled is not None and not isinstance(enabled, bool):
        raise HttpError(400, f"reasoning.enabled must be true or false, not {str(enabled)[:80]!r}", param="reasoning")
    if body.reasoning_effort is not None:
        return effort_arguments(body.reasoning_effort, "reasoning_effort")
    if asked.get("effort") is not None and enabled is not False:
        return effort_arguments(asked["effort"], "reasoning")
    return {} if enabled is None else thinking_arguments(enabled)


def effort_arguments(effort: Any, name: str) -> dict[str, Any]:
    """What templates read of how much to reason. name: of the field that says it. Raises HttpError."""
    is_number = isinstance(effort, (int, float)) and not isinstance(effort, bool) and 0 <= effort <= 1
    if not is_number and effort not in EFFORTS:
        words = ", ".join(EFFORTS)
        raise HttpError(400, f"{name}={str(effort)[:80]!r} is none of {words}, nor a number of 0 … 1", param=name)
    return {"reasoning_effort": effort, **thinking_arguments(effort not in ("none", 0))}


def thinking_arguments(is_on: bool) -> dict[str, Any]:
    """Both names under which templates read whether to reason."""
    return {"thinking": is_on, "enable_thinking": is_on}


# -- the answer ------------------------------------------------------------------------------------------------------
class ChatChoice:
    """One sequence as the `choices` entries of chunks: who speaks, what is said, why it ended."""

    def __init__(
        self, service: Service, shape: AnswerShape, wire_format: WireFormat, index: int, generation: Generation
    ) -> None:
        self._tokenizer = require_tokenizer(service)
        parser = parser_for(wire_format, generation.request, self._tokenizer)
        self.reader = shape.reader(service, generation, parser)
        self._threads = service.text_threads
        self._shape = shape
        self._index = index
        self._generation = generation
        self._has_calls = False

    async def take(self) -> list[dict[str, Any]]:
        """The entries that are due: the first says who speaks, the last why it ended."""
        entries = []
        for part in self.reader.take():
            if part.kind == "begin":
                role = {"role": "assistant", "content": "", "reasoning_content": None}
                entries.append({**self._entry("delta", role), **self._prompt_ids()})
            elif part.kind == "end":
                entries.append(self._entry("delta", {"reasoning_content": None}, self._generation.finish))
            elif part.text or self._shape.shows_tokens:
                self._has_calls |= part.kind == "call_begin"
                entries.append({**self._entry("delta", _said(part)), **await self._token_fields([part])})
        return entries

    async def whole(self) -> dict[str, Any]:
        parts = self.reader.take()
        calls: list[dict[str, Any]] = []
        for part in parts:
            if part.kind == "call_begin":
                calls.append(_call(part))
            elif part.kind == "arguments":
                calls[-1]["function"]["arguments"] += part.text
        self._has_calls = bool(calls)
        reasoning = _joined(parts, "reasoning")
        message: dict[str, Any] = {
            "role": "assistant",
            "content": _joined(parts, "text") or (None if calls else ""),
            **(_reasoning(reasoning) if reasoning else {"reasoning_content": None}),
        }
        if calls:
            message["tool_calls"] = calls
        fields = await self._token_fields(parts)
        return {**self._entry("message", message, self._generation.finish), **self._prompt_ids(), **fields}

    def _entry(self, name: str, words: dict[str, Any], finish: FinishReason | None = None) -> dict[str, Any]:
        return {
            "index": self._index, name: words, "logprobs": None, **finish_fields(finish, has_calls=self._has_calls),
        }  # fmt: skip

    async def _token_fields(self, parts: Sequence[Part]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self._shape.has_logprobs:
            items = [item for part in parts for item in part.logprobs]
            num_entries = len(items) * (1 + self._generation.request.num_top_logprobs)
            fields["logprobs"] = await self._threads.run(num_entries, lambda: chat_logprobs(self._tokenizer, items))
        if self._shape.returns_ids:
            fields["token_ids"] = [token_id for part in parts for token_id in part.token_ids]
        return fields

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._generation.request.prompt_ids.tolist()} if self._shape.returns_ids else {}


def _said(part: Part) -> dict[str, Any]:
    """The delta of a part between the first and the last."""
    if part.kind == "reasoning":
        return _reasoning(part.text)
    if part.kind == "call_begin":
        return {"tool_calls": [{"index": part.call, **_call(part)}]}
    if part.kind == "arguments":
        return {"tool_calls": [{"index": part.call, "function": {"arguments": part.text}}]}
    return {"content": part.text, "reasoning_content": None}


def _reasoning(text: str) -> dict[str, Any]:
    """Under SGLang's name, and under the one that vLLM's clients read."""
    return {"reasoning_content": text, "reasoning": text}


def _call(part: Part) -> dict[str, Any]:
    return {"id": part.call_id, "type": "function", "function": {"name": part.text, "arguments": ""}}


def _joined(parts: Sequence[Part], kind: PartKind) -> str:
    return "".join(part.text for part in parts if part.kind == kind)


def chat_logprobs(tokenizer: Tokenizer, items: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Log-probabilities in the shape of chats."""
    content = []
    for item in items:
        entry = _chat_entry(tokenizer, item.token_id, item.logprob)
        entry["top_logprobs"] = [_chat_entry(tokenizer, token_id, logprob) for logprob, token_id in item.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def _chat_entry(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    text = tokenizer.token_text(token_id)
    raw: list[int] | None
    if tokenizer.is_byte_level:
        raw = list(tokenizer.token_bytes(token_id))
    else:
        raw = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": LOWEST if logprob is None else max(logprob, LOWEST), "bytes": raw}


ROUTES = (
    Route(
        path="/v1/chat/completions",
        methods=("POST",),
        handler=chat_completions,
        access=Access.KEY,
        dialect=Dialect.OPENAI,
        summary="Continue a conversation (OpenAI's chat completions)",
        body=ChatBody,
        unsupported=UNSUPPORTED - {"reasoning_effort", "reasoning"},
        names=NAMES,
        is_generation=True,
    ),
)
