"""POST /generate: SGLang's own route, the arguments of `Engine.generate` as JSON.

Owns the body's fields and the shape of the answer: one object, a list for a batch or n > 1, or events. Arguments are
checked where `Engine.generate` checks them.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import msgspec

from mooli.frontend.call import Call
from mooli.frontend.generation import Generation
from mooli.frontend.inputs import CallInputs, GenerateCall
from mooli.frontend.unsupported import Api, names_of, refuse_unsupported
from mooli.server.json_body import check_count
from mooli.server.logprob_shapes import written
from mooli.server.routing import SSE_DONE, Access, Client, Dialect, EventStream, HttpError, Incoming, Reply, Route, sse
from mooli.server.service import Service

Start = Callable[[], AbstractContextManager[Call]]


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
    priority: int | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
    log_metrics: bool = True


async def generate(service: Service, request: Incoming) -> Reply | EventStream:
    body: GenerateBody = request.body
    refuse_unsupported(request.unsupported, Api.GENERATE)
    inputs = await _prepare(service, body, request.client)
    start = _starter(service, inputs, body)
    del request, body
    if inputs.is_stream:
        return EventStream(_events(start))
    with start() as call:
        async for _ in call.changes():
            pass
    if inputs.is_single:
        return Reply(await _whole(call.generations[0]))
    return Reply([await _shown(generation, generation.result) for generation in call.generations])


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
        sampling_params=body.sampling_params,
        rid=body.rid,
        return_logprob=body.return_logprob or False,
        logprob_start_len=body.logprob_start_len,
        top_logprobs_num=body.top_logprobs_num,
        token_ids_logprob=body.token_ids_logprob,
        priority=body.priority,
        cache_salt=body.cache_salt or body.extra_key,
        stream=body.stream,
    )
    return await service.prepare(call, client.caller)


def _starter(service: Service, inputs: CallInputs, body: GenerateBody) -> Start:
    """What starts the call; it keeps nothing of the body but what the answer's shape needs."""
    is_counted = body.log_metrics
    shows_texts, shows_prompt_ids = body.return_text_in_logprobs, body.return_prompt_token_ids

    @contextlib.contextmanager
    def start() -> Iterator[Call]:
        with service.start(inputs, is_counted=is_counted) as call:
            for generation in call.generations:
                generation.shows_logprob_texts = shows_texts
                generation.shows_prompt_ids = shows_prompt_ids
            yield call

    return start


async def _shown(generation: Generation, answer: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`result` or `chunk` of a sequence. One that has not ended goes on, so that is looked at here; its chunks have few
    log-probabilities beside those of its last."""
    if generation.finish is None:
        return answer()
    request = generation.request
    num_each = 1 + request.num_top_logprobs + len(request.logprob_token_ids)
    return await written(answer, (len(generation.prompt_logprobs) + len(generation.logprobs)) * num_each)


async def _whole(generation: Generation) -> dict[str, Any]:
    """The answer to a single prompt. Raises HttpError if the engine refused it or failed; an abort on demand is an
    answer like any other."""
    finish = generation.finish
    if finish is not None and finish.status_code is not None:
        raise HttpError(finish.status_code, f"request {generation.rid} failed: {finish.message}")
    return await _shown(generation, generation.result)


async def _events(start: Start) -> AsyncIterator[bytes]:
    with start() as call:
        ended: set[int] = set()
        async for changed in call.changes():
            events = []
            for index in changed:
                generation = call.generations[index]
                # One may have gone on, to its end even, while another was written.
                if index in ended or not generation.is_due():
                    continue
                if generation.finish is not None:
                    ended.add(index)
                events.append(sse(await _shown(generation, generation.chunk)))
            if events:
                yield b"".join(events)
    yield SSE_DONE


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
)
