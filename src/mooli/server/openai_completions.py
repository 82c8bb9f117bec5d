"""POST /v1/completions: prompts in, texts out, in OpenAI's shape.

Owns what is particular to completions: the forms of a prompt, `echo`, the default length, and the shape of a choice.
Source: OpenAI API reference, completions; the echo of log-probabilities is what lm-evaluation-harness reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mooli.frontend.generation import Generation
from mooli.frontend.inputs import CallInputs, GenerateCall
from mooli.frontend.tokenizer import Tokenizer
from mooli.server.json_body import check_count
from mooli.server.logprob_shapes import LegacyLogprobs, joined, written
from mooli.server.openai_answers import AnswerShape, Delta, Unshown, finish_fields, finished, head, stream, tail
from mooli.server.openai_fields import (
    COMMON_NAMES,
    UNSUPPORTED,
    cache_salt,
    refuse_unsupported,
    require_tokenizer,
    sampling_params,
)
from mooli.server.openai_types import CompletionBody
from mooli.server.routing import Access, Client, Dialect, EventStream, HttpError, Incoming, Reply, Route
from mooli.server.service import Service
from mooli.types import Request

DEFAULT_MAX_TOKENS = 16


async def completions(service: Service, request: Incoming) -> Reply | EventStream:
    """Raises HttpError for a request that is wrong, and what `Call.changes` raises."""
    body: CompletionBody = request.body
    refuse_unsupported(request.unsupported)
    tokenizer = require_tokenizer(service)
    _check_best_of(body)
    inputs = await _prepare(service, body, request.client)
    texts = await _echoed(service, tokenizer, body, inputs) if body.echo else None
    shape = AnswerShape.of(service, body)
    has_logprobs, is_text = body.logprobs is not None, _given_texts(body) is not None
    del request, body

    def open_choice(index: int, generation: Generation) -> CompletionChoice:
        echoed = None if texts is None else texts[index // generation.request.sampling.n]
        logprobs = None
        if has_logprobs:
            logprobs = LegacyLogprobs(tokenizer, generation.request, echoed=echoed, is_given=is_text)
        return CompletionChoice(service, shape, index, generation, echoed, logprobs)

    first_fields = head(inputs, shape, "text_completion")
    if shape.is_stream:
        return EventStream(stream(service, inputs, shape, first_fields, open_choice))
    generations = await finished(service, inputs)
    choices = [choice for i, generation in enumerate(generations) for choice in await open_choice(i, generation).take()]
    return Reply({**first_fields, "choices": choices, **tail(generations, shape)})


def _check_best_of(body: CompletionBody) -> None:
    """Choosing among more samples than are returned is not done here. Raises HttpError."""
    if body.best_of not in (None, 1, body.n or 1):
        raise HttpError(
            400, f"best_of={body.best_of} is not supported: leave it out, or give the same as n", param="best_of"
        )


async def _prepare(service: Service, body: CompletionBody, client: Client) -> CallInputs:
    """Raises HttpError."""
    texts, ids = _prompts(body.prompt, service.config.max_request_items)
    params = sampling_params(body)
    limit = None
    if body.max_tokens is not None:
        params["max_new_tokens"] = body.max_tokens
    elif "max_new_tokens" not in service.engine_config.preferred_sampling:
        limit = DEFAULT_MAX_TOKENS
        if (body.min_tokens or 0) > limit:
            raise HttpError(
                400, f"min_tokens={body.min_tokens} needs max_tokens, which is {limit} unless given", param="min_tokens"
            )
    has_logprobs = body.logprobs is not None
    call = GenerateCall(
        prompt=texts,
        input_ids=ids,
        sampling_params=params,
        return_logprob=has_logprobs,
        logprob_start_len=0 if has_logprobs and body.echo else None,
        top_logprobs_num=body.logprobs,
        stream=bool(body.stream),
        rid=body.rid,
        priority=body.priority,
        cache_salt=cache_salt(body),
    )
    inputs = await service.prepare(call, client.caller)
    if limit is not None:
        _limit(inputs, limit)
    return inputs


def _limit(inputs: CallInputs, max_new_tokens: int) -> None:
    """A default, unlike a number that the client gives, is cut where the context ends."""
    for request in inputs.requests:
        if (request.sampling.max_new_tokens or 0) > max_new_tokens:
            request.sampling = replace(request.sampling, max_new_tokens=max_new_tokens)


def _prompts(
    prompt: str | Sequence[str | int | list[int]], max_items: int
) -> tuple[str | list[Any] | None, list[Any] | None]:
    """`prompt` and `input_ids` of the call, one of which is None. Raises HttpError for mixed lists and for more than
    `max_items` prompts."""
    if isinstance(prompt, str):
        return prompt, None
    if not prompt:
        raise HttpError(400, "prompt is an empty list: give a text, token ids, or a list of them", param="prompt")
    kind = type(prompt[0])
    if any(type(item) is not kind for item in prompt):
        raise HttpError(400, "prompt mixes texts and token ids in one list: give one kind", param="prompt")
    if kind is not int:
        check_count("prompt", len(prompt), max_items)
    return (list(prompt), None) if kind is str else (None, list(prompt))


async def _echoed(service: Service, tokenizer: Tokenizer, body: CompletionBody, inputs: CallInputs) -> list[str]:
    """The text of each prompt: the words of the client where it sent words, otherwise what its ids say."""
    requests = inputs.requests[:: inputs.requests[0].sampling.n]
    given = _given_texts(body)
    skip = body.skip_special_tokens is not False
    longest = service.rules.context_length - 1

    def text(index: int, request: Request) -> str:
        may_be_cut = service.rules.allow_auto_truncate and len(request.prompt_ids) >= longest
        if given is not None and not may_be_cut:
            return given[index]
        return tokenizer.decode(request.prompt_ids.tolist(), skip_special_tokens=skip)

    def texts() -> list[str]:
        return [text(index, request) for index, request in enumerate(requests)]

    return await service.text_threads.run(sum(len(request.prompt_ids) for request in requests), texts)


def _given_texts(body: CompletionBody) -> list[str] | None:
    if isinstance(body.prompt, str):
        return [body.prompt]
    texts = [item for item in body.prompt if isinstance(item, str)]
    return texts or None


class CompletionChoice:
    """One sequence, as `choices` entries: of chunks, or of the whole answer when it has ended.

    index: prompts one after the other, the samples of each together.
    """

    def __init__(
        self,
        service: Service,
        shape: AnswerShape,
        index: int,
        generation: Generation,
        echoed: str | None,
        logprobs: LegacyLogprobs | None,
    ) -> None:
        self._index = index
        self._generation = generation
        self._echoed = echoed
        self._returns_ids = shape.returns_ids
        self._logprobs = logprobs
        self._unshown = Unshown(
            generation,
            stream_interval=service.engine_config.stream_interval,
            shows_tokens=self._returns_ids or self._logprobs is not None,
        )

    async def take(self) -> list[dict[str, Any]]:
        delta = self._unshown.take()
        if delta is None:
            return []
        is_echoed = delta.is_first and self._echoed is not None
        text = f"{self._echoed}{delta.text}" if is_echoed else delta.text
        logprobs = None
        if self._logprobs is not None:
            logprobs = await self._lists(self._logprobs, delta, is_echoed)
        choice: dict[str, Any] = {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            **finish_fields(delta.finish),
        }
        if self._returns_ids:
            choice["token_ids"] = delta.token_ids
            if delta.is_first:
                choice["prompt_token_ids"] = self._generation.request.prompt_ids.tolist()
        return [choice]

    async def _lists(self, shape: LegacyLogprobs, delta: Delta, is_echoed: bool) -> dict[str, list[Any]]:
        num_each = 1 + self._generation.request.num_top_logprobs
        if not is_echoed:
            return await written(lambda: shape.more(delta.logprobs), len(delta.logprobs) * num_each)
        prompt = self._generation.prompt_logprobs
        num_entries = (len(prompt) + len(delta.logprobs)) * num_each
        return await written(lambda: joined(shape.prompt(prompt), shape.more(delta.logprobs)), num_entries)


ROUTES = (
    Route(
        path="/v1/completions",
        methods=("POST",),
        handler=completions,
        access=Access.KEY,
        dialect=Dialect.OPENAI,
        summary="Continue prompts (OpenAI's completions)",
        body=CompletionBody,
        unsupported=UNSUPPORTED,
        names={**COMMON_NAMES, "input_ids": "prompt", "top_logprobs_num": "logprobs"},
        is_generation=True,
    ),
)
