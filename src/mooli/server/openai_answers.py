"""What completions and chats have in common on the way back: usage, what a stream has not shown yet, the stream itself.

Owns the order of a stream's chunks. Never knows what a choice looks like: the routes' modules do.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mooli.frontend.generation import WEIGHT_VERSION, Generation
from mooli.frontend.inputs import CallInputs
from mooli.server.openai_types import GenerationBody, StreamOptions
from mooli.server.routing import SSE_DONE, sse
from mooli.server.service import Service
from mooli.types import FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """What a body says of the answer's shape: so much of it is kept while the answer is made.

    has_usage_chunk, is_continuous: of a stream, whether usage comes at its end and in each chunk. returns_ids: token
    ids too. returns_cache_details: where cached tokens came from, in SGLang's `sglext`.
    """

    model: str
    is_stream: bool
    has_usage_chunk: bool
    is_continuous: bool
    returns_ids: bool
    returns_cache_details: bool

    @classmethod
    def of(cls, service: Service, body: GenerationBody) -> AnswerShape:
        options = body.stream_options or StreamOptions()
        has_usage_chunk = options.include_usage
        if has_usage_chunk is None:
            has_usage_chunk = service.config.stream_response_default_include_usage
        return cls(
            model=body.model or service.model_name,
            is_stream=bool(body.stream),
            has_usage_chunk=has_usage_chunk,
            is_continuous=bool(options.continuous_usage_stats),
            returns_ids=bool(body.return_token_ids),
            returns_cache_details=bool(body.return_cached_tokens_details),
        )


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of a sequence. finish: set in the last one."""

    text: str
    token_ids: list[int]
    logprobs: Sequence[TokenLogprobs]
    is_first: bool
    finish: FinishReason | None


class Unshown:
    """What the client has not seen yet of one sequence.

    stream_interval: tokens between two chunks, unless the request has its own. shows_tokens: tokens without a text of
    their own (half a character, or what could begin a stop string) are worth a chunk.
    """

    def __init__(self, generation: Generation, *, stream_interval: int, shows_tokens: bool) -> None:
        self._generation = generation
        self._interval = generation.request.sampling.stream_interval or stream_interval
        self._shows_tokens = shows_tokens
        self._num_chars = 0
        self._num_tokens = 0
        self._is_first = True
        self._is_over = False

    def take(self) -> Delta | None:
        """What is new, if it is time: at the first token, then at the interval, and at the end."""
        generation, first_token = self._generation, self._num_tokens
        finish, num_new = generation.finish, len(generation.output_ids) - first_token
        if self._is_over or (finish is None and num_new < (1 if self._is_first else self._interval)):
            return None
        text = generation.text[self._num_chars :]
        if finish is None and not text and not self._shows_tokens:
            return None
        delta = Delta(
            text, generation.output_ids[first_token:], generation.logprobs[first_token:], self._is_first, finish
        )
        self._num_chars += len(text)
        self._num_tokens += num_new
        self._is_first, self._is_over = False, finish is not None
        return delta


class Choice(Protocol):
    """One sequence in the shape of its route."""

    async def take(self) -> list[dict[str, Any]]:
        """The `choices` entries of the chunks that are due, in order."""
        ...


OpenChoice = Callable[[int, Generation], Choice]
"""From the place in the answer and the sequence."""


def head(inputs: CallInputs, shape: AnswerShape, kind: str) -> dict[str, Any]:
    """What every object of one answer begins with. The id is that of the first sequence, so that it can be aborted."""
    return {
        "id": inputs.requests[0].rid,
        "object": kind,
        "created": int(time.time()),
        "model": shape.model,
    }


def tail(generations: Sequence[Generation], shape: AnswerShape) -> dict[str, Any]:
    """What a whole answer ends with."""
    fields = {"usage": usage(generations), "metadata": {"weight_version": WEIGHT_VERSION}}
    return {**fields, "sglext": cache_details(generations)} if shape.returns_cache_details else fields


def cache_details(generations: Sequence[Generation]) -> dict[str, Any]:
    """SGLang's extension: where the cached tokens of `usage` came from."""
    return {
        "cached_tokens_details": {"device": usage(generations)["prompt_tokens_details"]["cached_tokens"], "host": 0}
    }


def usage(generations: Sequence[Generation]) -> dict[str, Any]:
    """Token counts of an answer. Samples of one prompt stand together, and their prompt counts once; as cached counts
    what was in the cache before the first of them."""
    n = generations[0].request.sampling.n
    groups = [generations[start : start + n] for start in range(0, len(generations), n)]
    return _usage(
        prompt_tokens=sum(group[0].prompt_tokens for group in groups),
        completion_tokens=sum(len(generation.output_ids) for generation in generations),
        cached_tokens=sum(min(generation.cached_tokens for generation in group) for group in groups),
    )


def _usage(*, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "reasoning_tokens": 0,
    }


def finish_fields(finish: FinishReason | None) -> dict[str, Any]:
    return {
        "finish_reason": None if finish is None else finish.type,
        "matched_stop": None if finish is None else finish.matched,
    }


async def stream(
    service: Service, inputs: CallInputs, shape: AnswerShape, first_fields: dict[str, Any], open_choice: OpenChoice
) -> AsyncIterator[bytes]:
    """The events of a streamed answer; everything that came since the last piece is in one piece.

    first_fields: `head`. Raises RequestFailedError for a sequence that failed, and what `Call.changes` raises.
    """
    with service.start(inputs) as call:
        choices = [open_choice(index, generation) for index, generation in enumerate(call.generations)]
        async for changed in call.changes():
            events: list[bytes] = []
            for index in changed:
                generation = call.generations[index]
                generation.raise_if_failed()
                for choice in await choices[index].take():
                    chunk = {**first_fields, "choices": [choice]}
                    if shape.is_continuous:
                        chunk["usage"] = _usage(
                            prompt_tokens=generation.prompt_tokens,
                            completion_tokens=len(generation.output_ids),
                            cached_tokens=generation.cached_tokens,
                        )
                    events.append(sse(chunk))
            if events:
                yield b"".join(events)
        last = []
        if shape.returns_cache_details:
            last.append(sse({**first_fields, "choices": [], "sglext": cache_details(call.generations)}))
        if shape.has_usage_chunk:
            last.append(sse({**first_fields, "choices": [], "usage": usage(call.generations)}))
        yield b"".join([*last, SSE_DONE])


async def finished(service: Service, inputs: CallInputs) -> list[Generation]:
    """The sequences when all have ended. Raises like `stream`."""
    with service.start(inputs) as call:
        await call.wait()
        for generation in call.generations:
            generation.raise_if_failed()
        return call.generations
