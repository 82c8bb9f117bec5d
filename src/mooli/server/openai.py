"""What OpenAI's completions and chats have in common: fields of bodies, usage, and the order of what is said.

Owns the names and types of those fields, where `null` means the same as leaving a field out, and the order of a
stream's chunks. Never checks values and knows no defaults: that is done under the native names
(`mooli.frontend.sampling`). Never knows what a choice looks like: the routes' modules do.

Source: OpenAI API reference, completions and chat; SGLang's extensions of both.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from mooli.frontend.cache_report import Inquiry, Told
from mooli.frontend.generation import Generation
from mooli.frontend.inputs import CallInputs
from mooli.frontend.native_answer import WEIGHT_VERSION, cached_details
from mooli.frontend.parts import PLAIN_TEXT, Parser, PartReader, WireFormat
from mooli.frontend.response_format import response_format_params
from mooli.frontend.tokenizer import Tokenizer
from mooli.frontend.unsupported import Api, asked, names_of
from mooli.server.routing import SSE_DONE, Client, EventStream, HttpError, ModelName, Reply, sse
from mooli.server.service import Service
from mooli.types import FinishReason

COMMON_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
"""What both routes call arguments of the native side."""

UNSUPPORTED = frozenset(names_of(Api.OPENAI))

_SAMPLING_NAMES = {
    "min_tokens": "min_new_tokens",
    **{
        name: name
        for name in (
            "n", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
            "repetition_penalty", "stop", "stop_token_ids", "no_stop_trim", "ignore_eos", "skip_special_tokens",
            "spaces_between_special_tokens", "stream_interval", "seed", "logit_bias", "custom_params",
        )
    },
}  # fmt: skip


# -- bodies ----------------------------------------------------------------------------------------------------------
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
    no_store: bool | None = None
    max_thinking_tokens: int | None = None
    thinking_token_budget: int | None = None
    custom_params: dict[str, Any] | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    return_token_ids: bool | None = None
    return_cached_tokens_details: bool | None = None
    return_cache_report: bool | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    session_id: str | None = None
    pin: dict[str, Any] | list[dict[str, Any]] | None = None
    # What the answer is held to, in the words of OpenAI, vLLM and llama.cpp
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    grammar: str | None = None


def refuse_unsupported(given: Mapping[str, Any]) -> None:
    """Raise HttpError (400) naming the first field that asks for what is not served.

    All other names are left aside, as OpenAI's clients expect of newer fields. Some are known to mean nothing here:
    user, metadata, store, service_tier, prompt_cache_key, safety_identifier, verbosity.
    """
    name = asked(given, Api.OPENAI)
    if name is not None:
        raise HttpError(400, f"{name} is not supported by this server: leave it out", param=name)


def require_tokenizer(service: Service) -> Tokenizer:
    """Raises HttpError (400) where there is none."""
    if service.tokenizer is None:
        raise HttpError(400, "this server has no tokenizer: use /generate with input_ids")
    return service.tokenizer


def sampling_params(body: GenerationBody) -> dict[str, Any]:
    """The fields that are given, under their native names. The length of the answer is not among them: its default
    belongs to the route."""
    given = {native: getattr(body, name) for name, native in _SAMPLING_NAMES.items()}
    given.update(_grammar(body))
    given["max_thinking_tokens"] = _thinking_tokens(body)
    return {native: value for native, value in given.items() if value is not None}


def _thinking_tokens(body: GenerationBody) -> int | None:
    """From vLLM's field or SGLang's. Raises HttpError (400) if both are given and differ."""
    given, other = body.max_thinking_tokens, body.thinking_token_budget
    if given is not None and other is not None and given != other:
        raise HttpError(
            400, f"max_thinking_tokens={given} and thinking_token_budget={other} differ: give one",
            param="thinking_token_budget",
        )  # fmt: skip
    return other if given is None else given


_STRUCTURED = {"json": "json_schema", "regex": "regex", "grammar": "ebnf", "structural_tag": "structural_tag"}
"""Of vLLM's `structured_outputs`, and with `guided_` before them of its older fields."""


def _grammar(body: GenerationBody) -> dict[str, Any]:
    """What the answer is held to, under its native name. Raises HttpError (400) if several fields say so."""
    found: list[tuple[str, str, Any]] = [
        (name, name, getattr(body, name)) for name in ("json_schema", "regex", "ebnf", "structural_tag")
    ]
    found.append(("grammar", "ebnf", body.grammar))
    found += [
        (f"guided_{name}", native, getattr(body, f"guided_{name}"))
        for name, native in _STRUCTURED.items()
        if name != "structural_tag"
    ]
    if body.guided_choice:
        found.append(("guided_choice", *_choice("guided_choice", body.guided_choice)))
    found += [("structured_outputs", *pair) for pair in _structured(body.structured_outputs or {})]
    if body.response_format:
        found += [("response_format", *pair) for pair in response_format_params(body.response_format).items()]
    given = [(field, native, value) for field, native, value in found if value not in (None, "", {})]
    if len(given) > 1:
        names = " and ".join(field for field, _, _ in given)
        raise HttpError(400, f"{names} say what the answer is held to: give one of them", param=given[1][0])
    return {native: value for _, native, value in given}


def _structured(given: Mapping[str, Any]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in given.items():
        if value in (None, False, "", [], {}):
            continue
        if name in _STRUCTURED:
            pairs.append((_STRUCTURED[name], value))
        elif name == "choice":
            pairs.append(_choice("structured_outputs.choice", value))
        elif name == "json_object":
            pairs.append(("json_schema", {"type": "object"}))
        else:
            raise HttpError(
                400, f"structured_outputs.{name} is not supported by this server: leave it out",
                param="structured_outputs",
            )  # fmt: skip
    return pairs


def _choice(name: str, texts: Any) -> tuple[str, str]:
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise HttpError(400, f"{name} must be a list of texts that are not empty", param=name.partition(".")[0])
    return "ebnf", "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


async def inquiry_of(
    service: Service, body: GenerationBody, inputs: CallInputs, client: Client, told: Told | None = None
) -> Inquiry | None:
    """Of a body that asks for a report on the cache; None of others. The request that it goes on may be named as
    OpenAI's Responses have it: `prompt_cache_options.comparison_response_id`. Raises HttpError (400)."""
    if not body.return_cache_report:
        return None
    previous_id = comparison_id(body.prompt_cache_options)
    return await service.inquire(inputs, client.caller, told, model=body.model, previous_id=previous_id)


def comparison_id(options: Mapping[str, Any] | None) -> str | None:
    """Of `prompt_cache_options`. Raises HttpError (400) for what is no text."""
    given = (options or {}).get("comparison_response_id")
    if given is not None and not isinstance(given, str):
        raise HttpError(
            400, "prompt_cache_options.comparison_response_id must be a string", param="prompt_cache_options"
        )
    return given


def cache_salt(body: GenerationBody) -> str | None:
    """What separates this request's cache from others'. SGLang's `extra_key` is another name for it.

    Raises HttpError (400) if both are given and differ.
    """
    if body.extra_key and body.cache_salt and body.extra_key != body.cache_salt:
        raise HttpError(400, "extra_key and cache_salt mean the same here and differ: give one", param="extra_key")
    return body.cache_salt or body.extra_key


# -- answers ---------------------------------------------------------------------------------------------------------
LOWEST = -9999.0
"""Stands for a log-probability of minus infinity, which JSON cannot write; OpenAI's API has the same."""


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """What a body says of the answer's shape: so much of it is kept while the answer is made.

    has_usage_chunk, is_continuous: of a stream, whether usage comes at its end and in each chunk. returns_ids: token
    ids too. has_logprobs: log-probabilities too. returns_cache_details: where cached tokens came from, in SGLang's
    `sglext`. streams_reasoning: otherwise it comes in one piece. inquiry: makes the report on the cache of the first
    prompt, which is in `sglext` too.
    """

    model: str
    has_usage_chunk: bool
    is_continuous: bool
    returns_ids: bool
    has_logprobs: bool
    returns_cache_details: bool
    streams_reasoning: bool = True
    inquiry: Inquiry | None = None

    @classmethod
    def of(cls, service: Service, body: GenerationBody, *, has_logprobs: bool) -> AnswerShape:
        options = body.stream_options or StreamOptions()
        has_usage_chunk = options.include_usage
        if has_usage_chunk is None:
            has_usage_chunk = service.config.stream_response_default_include_usage
        return cls(
            model=body.model or service.model_name,
            has_usage_chunk=has_usage_chunk,
            is_continuous=bool(options.continuous_usage_stats),
            returns_ids=bool(body.return_token_ids),
            has_logprobs=has_logprobs,
            returns_cache_details=bool(body.return_cached_tokens_details),
        )

    def reader(self, service: Service, generation: Generation, parser: Parser = PLAIN_TEXT) -> PartReader:
        """A choice's cursor."""
        interval = service.engine_config.stream_interval
        return PartReader(
            generation, parser, stream_interval=interval, shows_tokens=self.shows_tokens,
            streams_reasoning=self.streams_reasoning,
        )  # fmt: skip

    @property
    def shows_tokens(self) -> bool:
        """Then those without a text of their own are worth a chunk."""
        return self.returns_ids or self.has_logprobs


class Choice(Protocol):
    """One sequence in the shape of its route, read through `reader`."""

    reader: PartReader

    async def take(self) -> list[dict[str, Any]]:
        """The `choices` entries of the chunks that are due, in order."""
        ...

    async def whole(self) -> dict[str, Any]:
        """The entry of an answer that has ended; instead of `take`."""
        ...


OpenChoice = Callable[[int, Generation], Choice]
"""From the place in the answer and the sequence."""


def _prompts(choices: Sequence[Choice]) -> list[list[Generation]]:
    """The samples of each prompt, which stand together."""
    generations = [choice.reader.generation for choice in choices]
    n = generations[0].request.sampling.n
    return [generations[start : start + n] for start in range(0, len(generations), n)]


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Token counts of an answer. Samples of one prompt stand together, and their prompt counts once; as cached counts
    what was in the cache before the first of them."""
    generations = [choice.reader.generation for choice in choices]
    groups = _prompts(choices)
    prompt_tokens = sum(group[0].prompt_tokens for group in groups)
    completion_tokens = sum(len(generation.output_ids) for generation in generations)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(min(generation.cached_tokens for generation in group) for group in groups),
            "cache_write_tokens": sum(max(generation.written_tokens for generation in group) for group in groups),
        },
        "reasoning_tokens": sum(choice.reader.num_reasoning_tokens for choice in choices),
    }


def cache_details(shape: AnswerShape, choices: Sequence[Choice]) -> dict[str, Any]:
    """SGLang's extension: where the cached tokens of `usage` came from. Ours beside it: why there were no more. Empty
    where neither was asked for."""
    details: dict[str, Any] = {}
    if shape.returns_cache_details:
        least = [min(group, key=_cached_tokens) for group in _prompts(choices)]
        cached = sum(map(_cached_tokens, least))
        loaded, host = sum(each.loaded_tokens for each in least), sum(each.host_tokens for each in least)
        details["cached_tokens_details"] = cached_details(cached, loaded, host)
    if shape.inquiry is not None:
        reader = choices[0].reader
        details["cache_report"] = shape.inquiry.report(reader.generation, has_reasoned=reader.num_reasoning_tokens > 0)
    return details


def _cached_tokens(generation: Generation) -> int:
    return generation.cached_tokens


def finish_fields(finish: FinishReason | None, *, called: str | None = None) -> dict[str, Any]:
    """called: the reason why a message with calls stopped, if it did."""
    reason = None if finish is None else finish.type
    return {
        "finish_reason": called if called is not None and reason == "stop" else reason,
        "matched_stop": None if finish is None else finish.matched,
    }


async def answer(
    service: Service,
    inputs: CallInputs,
    shape: AnswerShape,
    kind: str,
    open_choice: OpenChoice,
    wire_format: WireFormat = PLAIN_TEXT,
) -> Reply | EventStream:
    """The whole answer, or its events. kind: what each object is. wire_format: by which choices read.

    Raises RequestFailedError for a sequence that failed, and what `Call.changes` raises.
    """
    # The id is that of the first sequence, so that it can be aborted.
    first_fields = {"id": inputs.requests[0].rid, "object": kind, "created": int(time.time()), "model": shape.model}
    if inputs.is_stream:
        return EventStream(_stream(service, inputs, shape, first_fields, open_choice, wire_format))
    with service.start(inputs, wire_format=wire_format) as call:
        await call.wait()
        for generation in call.generations:
            generation.raise_if_failed()
    choices = [open_choice(index, generation) for index, generation in enumerate(call.generations)]
    entries = [await choice.whole() for choice in choices]
    metadata = {"weight_version": WEIGHT_VERSION}
    content = {**first_fields, "choices": entries, "usage": usage(choices), "metadata": metadata}
    if details := cache_details(shape, choices):
        content["sglext"] = details
    return Reply(content)


async def _stream(
    service: Service,
    inputs: CallInputs,
    shape: AnswerShape,
    first_fields: dict[str, Any],
    open_choice: OpenChoice,
    wire_format: WireFormat,
) -> AsyncIterator[bytes]:
    """Everything that came since the last piece is in one piece."""
    with service.start(inputs, wire_format=wire_format) as call:
        choices = [open_choice(index, generation) for index, generation in enumerate(call.generations)]
        async for changed in call.changes():
            events: list[bytes] = []
            for index in changed:
                call.generations[index].raise_if_failed()
                for entry in await choices[index].take():
                    chunk = {**first_fields, "choices": [entry]}
                    if shape.is_continuous:
                        chunk["usage"] = usage([choices[index]])
                    events.append(sse(chunk))
            if events:
                yield b"".join(events)
        last = []
        if details := cache_details(shape, choices):
            last.append(sse({**first_fields, "choices": [], "sglext": details}))
        if shape.has_usage_chunk:
            last.append(sse({**first_fields, "choices": [], "usage": usage(choices)}))
        yield b"".join([*last, SSE_DONE])
