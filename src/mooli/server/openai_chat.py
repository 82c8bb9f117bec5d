"""POST /v1/chat/completions: a conversation in, the assistant's next message out, in OpenAI's shape.

Owns what is particular to chats: messages and their parts, the template's arguments, the model's own sampling defaults,
and the shape of a choice. Source: OpenAI API reference, chat; SGLang's extensions.
"""

from __future__ import annotations

from typing import Any

from mooli.errors import RequestError
from mooli.frontend.generation import Generation
from mooli.frontend.inputs import CallInputs, GenerateCall
from mooli.frontend.tokenizer import Tokenizer
from mooli.server.errors import in_names
from mooli.server.json_body import check_count, num_entries
from mooli.server.logprob_shapes import chat_logprobs, written
from mooli.server.openai_answers import AnswerShape, Delta, Unshown, finish_fields, finished, head, stream, tail
from mooli.server.openai_fields import (
    COMMON_NAMES,
    UNSUPPORTED,
    cache_salt,
    refuse_unsupported,
    require_chat_template,
    require_tokenizer,
    sampling_params,
)
from mooli.server.openai_types import ChatBody, ChatMessage
from mooli.server.routing import Access, Client, Dialect, EventStream, HttpError, Incoming, Reply, Route
from mooli.server.service import Service
from mooli.types import FinishReason

NAMES = {**COMMON_NAMES, "input_ids": "messages", "top_logprobs_num": "top_logprobs"}

_OWN_ARGUMENTS = frozenset(
    (
        "messages", "conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize",
        "tokenizer", "chat_template", "parse_special_in_content", "self",
    )
)  # fmt: skip
"""What `chat_template_kwargs` must not change: the request has its own fields for it, or it guards the conversation."""


async def chat_completions(service: Service, request: Incoming) -> Reply | EventStream:
    """Raises HttpError for a request that is wrong, and what `Call.changes` raises."""
    body: ChatBody = request.body
    refuse_unsupported(request.unsupported)
    tokenizer = require_tokenizer(service)
    inputs = await _prepare(service, body, request.client)
    shape = AnswerShape.of(service, body)
    has_logprobs = bool(body.logprobs)
    del request, body

    def open_choice(index: int, generation: Generation) -> ChatChoice:
        return ChatChoice(service, tokenizer, shape, index, generation, has_logprobs=has_logprobs)

    if shape.is_stream:
        first_fields = head(inputs, shape, "chat.completion.chunk")
        return EventStream(stream(service, inputs, shape, first_fields, open_choice))
    generations = await finished(service, inputs)
    choices = [await open_choice(index, generation).whole() for index, generation in enumerate(generations)]
    return Reply({**head(inputs, shape, "chat.completion"), "choices": choices, **tail(generations, shape)})


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
    """The request's parameters over the model's own; those that the operator prefers go between the two."""
    preferred = service.engine_config.preferred_sampling
    defaults = {name: value for name, value in service.sampling_defaults.items() if name not in preferred}
    params = {**defaults, **sampling_params(body)}
    if max_tokens is not None or "max_new_tokens" not in preferred:
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
    told = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _text(content, f"{where}.content"),
    }
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            told[name] = value
    return told


def _text(content: str | list[dict[str, Any]] | None, where: str) -> str:
    """One text; parts are put on lines of their own."""
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content or ()):
        kind = part.get("type")
        if kind != "text":
            raise HttpError(
                400, f"{where}[{i}]: a part of type {str(kind)[:80]!r} is not supported, only text is", param="messages"
            )
        if not isinstance(part.get("text"), str):
            raise HttpError(400, f"{where}[{i}].text must be a string", param="messages")
        texts.append(part["text"])
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
        **given,
        "continue_final_message": is_continued,
        "add_generation_prompt": not is_continued and body.add_generation_prompt is not False,
    }


# -- the answer ------------------------------------------------------------------------------------------------------
class ChatChoice:
    """One sequence as the `choices` entries of chunks: who speaks, what is said, why it ended."""

    def __init__(
        self,
        service: Service,
        tokenizer: Tokenizer,
        shape: AnswerShape,
        index: int,
        generation: Generation,
        *,
        has_logprobs: bool,
    ) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._generation = generation
        self._has_logprobs = has_logprobs
        self._returns_ids = shape.returns_ids
        self._shows_tokens = self._has_logprobs or self._returns_ids
        self._unshown = Unshown(
            generation, stream_interval=service.engine_config.stream_interval, shows_tokens=self._shows_tokens
        )

    async def take(self) -> list[dict[str, Any]]:
        """The entries that are due: the first says who speaks, the last why it ended."""
        delta = self._unshown.take()
        if delta is None:
            return []
        entries = []
        if delta.is_first:
            role = {"role": "assistant", "content": "", "reasoning_content": None}
            entries.append({**self._entry("delta", role), **self._prompt_ids()})
        if delta.text or (self._shows_tokens and delta.token_ids):
            said = {"content": delta.text, "reasoning_content": None}
            entries.append({**self._entry("delta", said), **await self._token_fields(delta)})
        if delta.finish is not None:
            entries.append(self._entry("delta", {"reasoning_content": None}, delta.finish))
        return entries

    async def whole(self) -> dict[str, Any]:
        """The choice of an answer that has ended; instead of `take`."""
        delta = self._unshown.take()
        if delta is None:
            raise ValueError("a choice is whole when its sequence has ended, and once")
        message = {"role": "assistant", "content": delta.text, "reasoning_content": None}
        fields = await self._token_fields(delta)
        return {**self._entry("message", message, delta.finish), **self._prompt_ids(), **fields}

    def _entry(self, name: str, words: dict[str, Any], finish: FinishReason | None = None) -> dict[str, Any]:
        return {"index": self._index, name: words, "logprobs": None, **finish_fields(finish)}

    async def _token_fields(self, delta: Delta) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self._has_logprobs:
            num_entries = len(delta.logprobs) * (1 + self._generation.request.num_top_logprobs)
            fields["logprobs"] = await written(lambda: chat_logprobs(self._tokenizer, delta.logprobs), num_entries)
        if self._returns_ids:
            fields["token_ids"] = delta.token_ids
        return fields

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._generation.request.prompt_ids.tolist()} if self._returns_ids else {}


ROUTES = (
    Route(
        path="/v1/chat/completions",
        methods=("POST",),
        handler=chat_completions,
        access=Access.KEY,
        dialect=Dialect.OPENAI,
        summary="Continue a conversation (OpenAI's chat completions)",
        body=ChatBody,
        unsupported=UNSUPPORTED,
        names=NAMES,
        is_generation=True,
    ),
)
