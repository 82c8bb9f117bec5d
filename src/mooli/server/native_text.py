"""/tokenize and /detokenize: text to token ids and back, as this server does it for prompts and answers.

Owns the bodies and answers. How text is split is the tokenizer's, what a conversation becomes the chat route's.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from mooli.frontend.tokenizer import Tokenizer
from mooli.server.json_body import check_count
from mooli.server.openai_chat import conversation_ids
from mooli.server.openai_fields import require_tokenizer
from mooli.server.openai_types import ChatBody, ChatMessage
from mooli.server.routing import Access, Dialect, Handler, HttpError, Incoming, Reply, Route
from mooli.server.service import Service


class TokenizeBody(msgspec.Struct, kw_only=True):
    """prompt: a text, or a list of texts; or instead messages: a conversation, as the chat route reads it, with the
    fields that belong to it. add_special_tokens: of a prompt, put the begin and end tokens where the model has them,
    unless false; in a conversation the template has them."""

    prompt: str | list[str] | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """tokens: ids, or a list of lists of them."""

    tokens: list[int | list[int]]
    skip_special_tokens: bool = True


async def tokenize(service: Service, request: Incoming) -> Reply:
    body: TokenizeBody = request.body
    require_tokenizer(service)
    if (body.prompt is None) == (body.messages is None):
        raise HttpError(
            400, "give either prompt or messages" + ("" if body.prompt is None else ", not both"), param="prompt"
        )
    _check_belonging(body)
    with_special = body.add_special_tokens is not False
    tokens: list[int] | list[list[int]]
    count: int | list[int]
    if isinstance(body.prompt, list):
        check_count("prompt", len(body.prompt), service.config.max_request_items)
        batch = []
        for text in body.prompt:
            batch.append(await service.tokenize(text, add_special_tokens=with_special))
            await asyncio.sleep(0)  # short texts are tokenised here, and everybody waits meanwhile
        tokens, count = batch, [len(ids) for ids in batch]
    else:
        if isinstance(body.prompt, str):
            tokens = await service.tokenize(body.prompt, add_special_tokens=with_special)
        else:
            tokens = await _conversation_ids(service, body)
        count = len(tokens)
    return Reply({"tokens": tokens, "count": count, "max_model_len": service.facts.context_length})


def _check_belonging(body: TokenizeBody) -> None:
    """Raises HttpError for a field that belongs to the other of prompt and messages, and would do nothing."""
    others = ("chat_template_kwargs", "add_generation_prompt", "continue_final_message")
    for name in others if body.messages is None else ("add_special_tokens",):
        if getattr(body, name):
            owner = "messages" if body.messages is None else "a prompt"
            raise HttpError(400, f"{name} belongs to {owner}: leave it out", param=name)


async def _conversation_ids(service: Service, body: TokenizeBody) -> list[int]:
    conversation = ChatBody(
        messages=body.messages or [],
        chat_template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )
    return await conversation_ids(service, conversation)


async def detokenize(service: Service, request: Incoming) -> Reply:
    body: DetokenizeBody = request.body
    tokenizer = require_tokenizer(service)
    is_batch = bool(body.tokens) and isinstance(body.tokens[0], list)
    if is_batch:
        check_count("tokens", len(body.tokens), service.config.max_request_items)
    rows: list[Any] = body.tokens if is_batch else [body.tokens]
    texts = await service.text_threads.run(
        len(rows) + sum(len(ids) for ids in rows if isinstance(ids, list)),
        lambda: _decode(tokenizer, rows, body.skip_special_tokens, is_batch),
    )
    return Reply({"text": texts if is_batch else texts[0]})


def _row(ids: Any, where: str) -> list[int]:
    if not isinstance(ids, list) or any(isinstance(token_id, list) for token_id in ids):
        raise HttpError(400, f"{where} must be ids, or tokens all of it lists of ids", param="tokens")
    return ids


def _decode(tokenizer: Tokenizer, rows: list[Any], skip_special_tokens: bool, is_batch: bool) -> list[str]:
    """Raises HttpError for what is no list of ids, and for an id that the vocabulary does not have."""
    for i, ids in enumerate(rows):
        for token_id in _row(ids, f"tokens[{i}]" if is_batch else "tokens"):
            if not 0 <= token_id < tokenizer.vocab_size:
                raise HttpError(
                    400,
                    f"tokens has {str(token_id)[:80]}, not an id of 0 … {tokenizer.vocab_size - 1}",
                    param="tokens",
                )
    return [tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) for ids in rows]


def _route(path: str, handler: Handler, body: type[msgspec.Struct], summary: str) -> Route:
    return Route(
        path=path,
        methods=("POST",),
        handler=handler,
        access=Access.KEY,
        dialect=Dialect.NATIVE,
        summary=summary,
        body=body,
    )


ROUTES = tuple(
    _route(path, handler, body, summary)
    for name, handler, body, summary in (
        ("tokenize", tokenize, TokenizeBody, "Token ids of a text or of a conversation"),
        ("detokenize", detokenize, DetokenizeBody, "The text of token ids"),
    )
    for path in (f"/{name}", f"/v1/{name}")
)
