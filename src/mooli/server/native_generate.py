"""SGLang's own routes for text: /generate, the arguments of `Engine.generate` as JSON; /tokenize and /detokenize.

Owns the bodies' fields and the shape of answers; of /generate one object, a list for a batch or n > 1, or events.
Arguments are checked where `Engine.generate` checks them. How text is split is the tokenizer's, what a conversation
becomes the chat route's.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import msgspec

from mooli.frontend.call import Call
from mooli.frontend.generation import Generation
from mooli.frontend.inputs import CallInputs, GenerateCall
from mooli.frontend.native_answer import NativeAnswer, native_answers
from mooli.frontend.tokenizer import Tokenizer
from mooli.frontend.unsupported import Api, names_of, refuse_unsupported
from mooli.server.conversation import prompt_ids
from mooli.server.json_body import check_count
from mooli.server.openai import require_tokenizer
from mooli.server.openai_chat import ChatBody, ChatMessage, conversation_of
from mooli.server.routing import SSE_DONE, Access, Client, Dialect, EventStream, HttpError, Incoming, Reply, Route, sse
from mooli.server.service import Service

T = TypeVar("T")


class GenerateBody(msgspec.Struct, kw_only=True):
    """What /generate takes. Give `text` or `input_ids`; a list of them is a batch.

    Names that are not here are left aside, but for those of things that Mooli does not have, which are refused.
    """

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any] | None] | None = None
    rid: str | list[str] | None = None
    stream: bool = False
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int | None] | None = None
    top_logprobs_num: int | list[int | None] | None = None
    token_ids_logprob: list[int | list[int] | None] | None = None
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False
    require_reasoning: bool = False
    max_thinking_tokens: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
    no_store: bool = False
    log_metrics: bool = True
    return_cache_report: bool = False
    session_id: str | list[str] | None = None
    pin: dict[str, Any] | list[dict[str, Any]] | None = None


async def generate(service: Service, request: Incoming) -> Reply | EventStream:
    body: GenerateBody = request.body
    refuse_unsupported(request.unsupported, Api.GENERATE)
    inputs = await _prepare(service, body, request.client)
    start = functools.partial(service.start, inputs, is_counted=body.log_metrics)
    answers_of = functools.partial(
        native_answers,
        tokenizer=service.tokenizer,
        config=service.engine_config,
        is_single=inputs.is_single,
        shows_token_texts=body.return_text_in_logprobs,
        shows_prompt_ids=body.return_prompt_token_ids,
        reasoning=service.wire_format if body.require_reasoning else None,
        inquiries=(
            service.explainer.inquire_all(
                inputs.requests, tenant=request.client.caller.tenant, model=service.model_name
            )
            if body.return_cache_report
            else None
        ),
    )
    del request, body
    if inputs.is_stream:
        return EventStream(_events(service, start, answers_of))
    with start() as call:
        async for _ in call.changes():
            pass
    answers = answers_of(call.generations)
    if inputs.is_single:
        return Reply(await _whole(service, answers[0]))
    return Reply([await _written(service, answer, answer.result) for answer in answers])


async def _prepare(service: Service, body: GenerateBody, client: Client) -> CallInputs:
    """Checked requests. Raises RequestError."""
    for name in ("text", "input_ids"):
        prompts = getattr(body, name)
        if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int):
            check_count(name, len(prompts), service.config.max_request_items)
    if (body.text is None) == (body.input_ids is None):
        raise HttpError(
            400, "give either text or input_ids" + ("" if body.text is None else ", not both"), param="text"
        )
    if body.cache_salt and body.extra_key and body.cache_salt != body.extra_key:
        raise HttpError(400, "cache_salt and extra_key mean the same here and differ: give one", param="extra_key")
    if body.return_text_in_logprobs and service.tokenizer is None:
        message = "return_text_in_logprobs needs a tokenizer, and this server has none"
        raise HttpError(400, message, param="return_text_in_logprobs")
    call = GenerateCall(
        prompt=body.text,
        input_ids=body.input_ids,
        sampling_params=_sampling_params(body),
        rid=body.rid,
        return_logprob=body.return_logprob or False,
        logprob_start_len=body.logprob_start_len,
        top_logprobs_num=body.top_logprobs_num,
        token_ids_logprob=body.token_ids_logprob,
        require_reasoning=body.require_reasoning,
        priority=body.priority,
        cache_salt=body.cache_salt or body.extra_key,
        no_store=body.no_store,
        session_id=body.session_id,
        pin=body.pin,
        stream=body.stream,
        return_cache_report=body.return_cache_report,
    )
    return await service.prepare(call, client.caller)


def _sampling_params(body: GenerateBody) -> Any:
    """Those of the body, with what SGLang has beside them."""
    limit, given = body.max_thinking_tokens, body.sampling_params
    if limit is None:
        return given
    if isinstance(given, list):
        return [{"max_thinking_tokens": limit, **(item or {})} for item in given]
    return {"max_thinking_tokens": limit, **(given or {})}


async def _written(service: Service, answer: NativeAnswer, write: Callable[[], T]) -> T:
    """`result` or `chunk` of an answer. One that has not ended goes on, so that is looked at here; its chunks have few
    log-probabilities beside those of its last."""
    generation = answer.generation
    if generation.finish is None or answer.is_over:
        return write()
    request = generation.request
    num_each = 1 + request.num_top_logprobs + len(request.logprob_token_ids)
    num_entries = (len(generation.prompt_logprobs) + len(generation.logprobs)) * num_each
    return await service.text_threads.run(num_entries, write)


async def _whole(service: Service, answer: NativeAnswer) -> dict[str, Any]:
    """The answer to a single prompt. Raises HttpError if the engine refused it or failed; an abort on demand is an
    answer like any other."""
    finish = answer.generation.finish
    if finish is not None and finish.status_code is not None:
        raise HttpError(finish.status_code, f"request {answer.generation.rid} failed: {finish.message}")
    return await _written(service, answer, answer.result)


async def _events(
    service: Service,
    start: Callable[[], AbstractContextManager[Call]],
    answers_of: Callable[[list[Generation]], list[NativeAnswer]],
) -> AsyncIterator[bytes]:
    with start() as call:
        answers = answers_of(call.generations)
        async for changed in call.changes():
            # One may have gone on, to its end even, while another was written.
            chunks = [await _written(service, answers[index], answers[index].chunk) for index in changed]
            if any(chunks):
                yield b"".join(sse(chunk) for chunk in chunks if chunk is not None)
    yield SSE_DONE


# -- texts and token ids -----------------------------------------------------------------------------------------------
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
    return list(await prompt_ids(service, conversation_of(service, conversation)))


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


ROUTES = (
    Route(
        path="/generate",
        methods=("POST", "PUT"),
        handler=generate,
        access=Access.KEY,
        dialect=Dialect.NATIVE,
        summary="Generate from text or token ids (SGLang's native API)",
        body=GenerateBody,
        unsupported=frozenset(names_of(Api.GENERATE)),
        names={"prompt": "text"},
        is_generation=True,
    ),
    *(
        Route(
            path=path,
            methods=("POST",),
            handler=handler,
            access=Access.KEY,
            dialect=Dialect.NATIVE,
            summary=summary,
            body=body,
        )
        for handler, body, summary in (
            (tokenize, TokenizeBody, "Token ids of a text or of a conversation"),
            (detokenize, DetokenizeBody, "The text of token ids"),
        )
        for path in (f"/{handler.__name__}", f"/v1/{handler.__name__}")
    ),
)
