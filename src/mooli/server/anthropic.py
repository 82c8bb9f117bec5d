"""Anthropic's Messages API: POST /v1/messages, whole or as events, and /v1/messages/count_tokens.

Owns the shapes of its answers and events. Never reads what the fields of a body mean (`mooli.server.anthropic_types`)
and never writes error bodies, which the HTTP layer does in this API's words.

Usage has the API's meaning: `input_tokens` are the tokens of the prompt that had to be computed, and those from the
cache are in `cache_read_input_tokens` alone; the whole prompt is their sum. Everything computed is cached, marked with
`cache_control` or not, at no price, so `cache_creation_input_tokens` is 0.

An answer that fills the context ends with `model_context_window_exceeded`; a `max_tokens` larger than the context has
room for is no error. Both are the API's rules for its current models.

Source: Anthropic's API reference, Messages, Streaming messages, Count Message tokens.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

from mooli.frontend.generation import Generation
from mooli.frontend.inputs import CallInputs, GenerateCall
from mooli.frontend.unsupported import Api, names_of
from mooli.server.anthropic_types import CountTokensBody, MessagesBody, check_served, conversation
from mooli.server.openai_fields import require_chat_template
from mooli.server.routing import Access, Dialect, EventStream, HttpError, Incoming, Reply, Route, sse
from mooli.server.service import Service

NAMES = {
    "input_ids": "messages",
    "max_new_tokens": "max_tokens",
    "stop": "stop_sequences",
    "continue_final_message": "a last message of the assistant",
}


async def create_message(service: Service, request: Incoming) -> Reply | EventStream:
    """POST /v1/messages. Raises RequestError, ChatTemplateError or EngineError."""
    body: MessagesBody = request.body
    ids = await _prompt_ids(service, request)
    room = service.facts.context_length - len(ids)
    params = _sampling(service, body)
    # Without room the rules refuse the prompt itself, with a better reason.
    params["max_new_tokens"] = min(body.max_tokens, room) if room > 0 else body.max_tokens
    rid = f"msg_{uuid.uuid4().hex[:24]}"
    call = GenerateCall(input_ids=ids, sampling_params=params, rid=rid, stream=bool(body.stream))
    inputs = await service.prepare(call, request.client.caller)
    is_cut = 0 < room < body.max_tokens
    model = body.model
    del request, body
    if inputs.is_stream:
        return EventStream(_events(service, inputs, model, is_cut))
    with service.start(inputs) as answering:
        await answering.wait()
        return Reply(_message(answering.generations[0], model, is_cut))


async def count_tokens(service: Service, request: Incoming) -> Reply:
    """POST /v1/messages/count_tokens: the tokens of the prompt, cached or not. Raises as `create_message`."""
    return Reply({"input_tokens": len(await _prompt_ids(service, request))})


def _sampling(service: Service, body: MessagesBody) -> dict[str, Any]:
    """The body's parameters over the model's own; those that the operator prefers go between the two."""
    preferred = service.engine_config.preferred_sampling
    defaults = {name: value for name, value in service.sampling_defaults.items() if name not in preferred}
    return {**defaults, **body.sampling_params(), "n": 1}


async def _prompt_ids(service: Service, request: Incoming) -> list[int]:
    body: CountTokensBody = request.body
    check_served(request.unsupported)
    require_chat_template(service)
    messages, continues = conversation(body, service.config.max_request_items)
    last = {"add_generation_prompt": not continues, "continue_final_message": continues}
    return await service.encode_chat(messages, **{**service.config.chat_template_kwargs, **last})


async def _events(service: Service, inputs: CallInputs, model: str, is_cut: bool) -> AsyncIterator[bytes]:
    """The stream begins with the first token: by then it is known what of the prompt came from the cache, and an error
    until then has a status of its own."""
    interval = service.engine_config.stream_interval
    with service.start(inputs) as call:
        generation = call.generations[0]
        num_chars = num_tokens = 0
        has_begun = False
        async for _ in call.changes():
            finish = generation.finish
            generation.raise_if_failed()
            if not has_begun:
                has_begun = True
                yield _opening(generation, model)
            elif finish is None and len(generation.output_ids) - num_tokens < interval:
                continue
            num_tokens = len(generation.output_ids)
            if len(generation.text) > num_chars:
                new, num_chars = generation.text[num_chars:], len(generation.text)
                yield _event("content_block_delta", index=0, delta={"type": "text_delta", "text": new})
            if finish is not None:
                yield _closing(generation, is_cut)


def _opening(generation: Generation, model: str) -> bytes:
    message = {
        **_head(generation, model), "content": [], "stop_reason": None, "stop_sequence": None,
        "usage": {**_usage(generation), "output_tokens": 0},
    }  # fmt: skip
    return (
        _event("message_start", message=message)
        + _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        + _event("ping")
    )


def _closing(generation: Generation, is_cut: bool) -> bytes:
    return (
        _event("content_block_stop", index=0)
        + _event("message_delta", delta=_stop(generation, is_cut), usage=_usage(generation))
        + _event("message_stop")
    )


def _event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, event=kind)


def _message(generation: Generation, model: str, is_cut: bool) -> dict[str, Any]:
    return {
        **_head(generation, model),
        "content": [{"type": "text", "text": generation.text}],
        **_stop(generation, is_cut),
        "usage": _usage(generation),
    }


def _head(generation: Generation, model: str) -> dict[str, Any]:
    return {"id": generation.rid, "type": "message", "role": "assistant", "model": model}


def _stop(generation: Generation, is_cut: bool) -> dict[str, Any]:
    """Raises HttpError for an answer that was ended from outside: the API has no word for it.
    is_cut: the context had less room than `max_tokens`."""
    finish = generation.finish
    if finish is None or finish.type in ("abort", "error"):
        message = "The request was aborted." if finish is None or finish.message is None else finish.message
        raise HttpError(503, message)
    if finish.type == "length":
        return {"stop_reason": "model_context_window_exceeded" if is_cut else "max_tokens", "stop_sequence": None}
    if isinstance(finish.matched, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": finish.matched}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _usage(generation: Generation) -> dict[str, int]:
    return {
        "input_tokens": generation.prompt_tokens - generation.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": generation.cached_tokens,
        "output_tokens": len(generation.output_ids),
    }


ROUTES = (
    Route(
        path="/v1/messages",
        methods=("POST",),
        handler=create_message,
        access=Access.KEY,
        dialect=Dialect.ANTHROPIC,
        summary="Anthropic's Messages API: the next message of a conversation.",
        body=MessagesBody,
        unsupported=frozenset(names_of(Api.ANTHROPIC)),
        names=NAMES,
        is_generation=True,
    ),
    Route(
        path="/v1/messages/count_tokens",
        methods=("POST",),
        handler=count_tokens,
        access=Access.KEY,
        dialect=Dialect.ANTHROPIC,
        summary="Anthropic's Messages API: the tokens of a prompt.",
        body=CountTokensBody,
        unsupported=frozenset(names_of(Api.ANTHROPIC)),
        names=NAMES,
    ),
)
