"""POST /v1/completions: prompts in, texts out, in OpenAI's shape.

Owns what is particular to completions: the forms of a prompt, `suffix`, `echo`, the default length, and the shape of a
choice.
Source: OpenAI API reference, completions; the echo of log-probabilities is what lm-evaluation-harness reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mooli.frontend.detokenizer import IncrementalDetokenizer
from mooli.frontend.generation import Generation
from mooli.frontend.inputs import CallInputs, GenerateCall
from mooli.frontend.parts import Part
from mooli.frontend.tokenizer import Tokenizer
from mooli.server.conversation import pins_of
from mooli.server.json_body import check_count
from mooli.server.openai import (
    COMMON_NAMES,
    LOWEST,
    UNSUPPORTED,
    AnswerShape,
    GenerationBody,
    answer,
    cache_salt,
    finish_fields,
    inquiry_of,
    refuse_unsupported,
    require_tokenizer,
    sampling_params,
)
from mooli.server.retention import openai_marks
from mooli.server.routing import Access, Client, Dialect, EventStream, HttpError, Incoming, Reply, Route
from mooli.server.service import Service
from mooli.types import Request, TokenLogprobs

DEFAULT_MAX_TOKENS = 16


class CompletionBody(GenerationBody, kw_only=True):
    """POST /v1/completions. prompt: a text, token ids, or a list of either. suffix: what comes behind the answer, of a
    model that fills in."""

    prompt: str | list[str | int | list[int]]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    rid: str | list[str] | None = None


async def completions(service: Service, request: Incoming) -> Reply | EventStream:
    """Raises HttpError for a request that is wrong, and what `Call.changes` raises."""
    body: CompletionBody = request.body
    refuse_unsupported(request.unsupported)
    tokenizer = require_tokenizer(service)
    _check_best_of(body)
    inputs = await _prepare(service, body, request.client)
    texts = await _echoed(service, tokenizer, body, inputs) if body.echo else None
    shape = AnswerShape.of(service, body, has_logprobs=body.logprobs is not None)
    shape = replace(shape, inquiry=await inquiry_of(service, body, inputs, request.client))
    is_text = _given_texts(body) is not None
    del request, body

    def open_choice(index: int, generation: Generation) -> CompletionChoice:
        echoed = None if texts is None else texts[index // generation.request.sampling.n]
        logprobs = None
        if shape.has_logprobs:
            logprobs = LegacyLogprobs(tokenizer, generation.request, echoed=echoed, is_given=is_text)
        return CompletionChoice(service, shape, index, generation, echoed, logprobs)

    return await answer(service, inputs, shape, "text_completion", open_choice)


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
    if body.suffix:
        texts, ids = None, await _infilled(service, body, texts, params)
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
        no_store=bool(body.no_store),
        return_cache_report=bool(body.return_cache_report),
        session_id=body.session_id,
        pin=await pins_of(service, openai_marks(body.prompt_cache_retention, body.prompt_cache_options), own=body.pin),
    )
    inputs = await service.prepare(call, client.caller)
    if limit is not None:
        _limit(inputs, limit)
    return inputs


async def _infilled(
    service: Service, body: CompletionBody, texts: str | list[Any] | None, params: dict[str, Any]
) -> list[Any]:
    """The ids of a prompt with a suffix; what ends a middle is added to `params`. Raises HttpError."""
    given = [texts] if isinstance(texts, str) else texts
    # Of several each would have the suffix: a short body could ask for any number of tokens.
    if given is None or len(given) != 1:
        raise HttpError(400, "suffix needs one prompt that is a text, not token ids nor several", param="suffix")
    if body.echo:
        raise HttpError(400, "echo and suffix exclude each other: the answer stands between the two", param="echo")
    suffix = body.suffix or ""
    infill = service.require_infill("suffix")
    params["stop_token_ids"] = infill.stop_token_ids(params.get("stop_token_ids"))
    ids = await service.encode_infill(infill, given[0], suffix)
    return ids if isinstance(texts, str) else [ids]


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
        self.reader = shape.reader(service, generation)
        self._threads = service.text_threads
        self._shape = shape
        self._index = index
        self._generation = generation
        self._echoed = echoed
        self._logprobs = logprobs

    async def take(self) -> list[dict[str, Any]]:
        parts = self.reader.take()
        return [await self._entry(parts)] if parts else []

    async def whole(self) -> dict[str, Any]:
        return await self._entry(self.reader.take())

    async def _entry(self, parts: Sequence[Part]) -> dict[str, Any]:
        is_first, is_last = parts[0].kind == "begin", parts[-1].kind == "end"
        text = "".join(part.text for part in parts)
        is_echoed = is_first and self._echoed is not None
        logprobs = None
        if self._logprobs is not None:
            items = [item for part in parts for item in part.logprobs]
            logprobs = await self._lists(self._logprobs, items, is_echoed)
        choice: dict[str, Any] = {
            "index": self._index,
            "text": f"{self._echoed}{text}" if is_echoed else text,
            "logprobs": logprobs,
            **finish_fields(self._generation.finish if is_last else None),
        }
        if self._shape.returns_ids:
            choice["token_ids"] = [token_id for part in parts for token_id in part.token_ids]
            if is_first:
                choice["prompt_token_ids"] = self._generation.request.prompt_ids.tolist()
        return choice

    async def _lists(
        self, shape: LegacyLogprobs, items: Sequence[TokenLogprobs], is_echoed: bool
    ) -> dict[str, list[Any]]:
        num_each = 1 + self._generation.request.num_top_logprobs
        if not is_echoed:
            return await self._threads.run(len(items) * num_each, lambda: shape.more(items))
        prompt = self._generation.prompt_logprobs
        num_entries = (len(prompt) + len(items)) * num_each
        return await self._threads.run(num_entries, lambda: joined(shape.prompt(prompt), shape.more(items)))


# -- log-probabilities ------------------------------------------------------------------------------------------------
class TextOffsets:
    """Where each token of a sequence begins in its text, in characters.

    start: length of the text before the sequence. spelled: the text itself, where it was given and not made of the ids;
    a special token has a place in it only where it is written out.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, start: int = 0, skip_special_tokens: bool = True, spelled: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._spelled = spelled
        self._position = start
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=skip_special_tokens or spelled is not None
        )

    def next(self, token_id: int) -> int:
        """The offset of the next token. One that goes on with a character begins where that begins."""
        offset = self._position
        self._position += len(self._detokenizer.push([token_id]))
        if self._spelled is not None and token_id in self._tokenizer.special_ids:
            text = self._tokenizer.token_text(token_id)
            if text and self._spelled.startswith(text, offset):
                self._position += len(text)
        return offset


class LegacyLogprobs:
    """Lists that grow token by token: the shape of completions.

    echoed: the prompt's text, if it is part of the answer. is_given: that text came from the client as it is.
    """

    def __init__(self, tokenizer: Tokenizer, request: Request, *, echoed: str | None, is_given: bool = False) -> None:
        skip = request.sampling.skip_special_tokens
        self._tokenizer = tokenizer
        self._prompt_offsets = TextOffsets(tokenizer, skip_special_tokens=skip, spelled=echoed if is_given else None)
        self._offsets = TextOffsets(tokenizer, start=len(echoed or ""), skip_special_tokens=skip)

    def prompt(self, items: Sequence[TokenLogprobs]) -> dict[str, list[Any]]:
        """The lists for the tokens of an echoed prompt. Once, before the first `more`."""
        return self._lists(items, self._prompt_offsets)

    def more(self, items: Sequence[TokenLogprobs]) -> dict[str, list[Any]]:
        """The lists for the next tokens of the answer."""
        return self._lists(items, self._offsets)

    def _lists(self, items: Sequence[TokenLogprobs], offsets: TextOffsets) -> dict[str, list[Any]]:
        return {
            "tokens": [legacy_text(self._tokenizer, item.token_id) for item in items],
            "token_logprobs": [None if item.logprob is None else max(item.logprob, LOWEST) for item in items],
            "top_logprobs": [self._alternatives(item) for item in items],
            "text_offset": [offsets.next(item.token_id) for item in items],
        }

    def _alternatives(self, item: TokenLogprobs) -> dict[str, float] | None:
        """The likeliest tokens and the one that is there. Of tokens with the same text the likeliest counts."""
        if item.logprob is None:
            return None
        found: dict[str, float] = {}
        for logprob, token_id in [*item.top, (item.logprob, item.token_id)]:
            found.setdefault(legacy_text(self._tokenizer, token_id), max(logprob, LOWEST))
        return found


def joined(first: dict[str, list[Any]], second: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: first[name] + second[name] for name in first}


def legacy_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of a token as a key: part of a character is written as "bytes:\\xe4", so that tokens stay apart."""
    text = tokenizer.token_text(token_id)
    if "\ufffd" in text and tokenizer.is_byte_level:
        raw = tokenizer.token_bytes(token_id)
        if raw != text.encode():
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return text


ROUTES = (
    Route(
        path="/v1/completions",
        methods=("POST",),
        handler=completions,
        access=Access.KEY,
        dialect=Dialect.OPENAI,
        summary="Continue prompts (OpenAI's completions)",
        body=CompletionBody,
        unsupported=UNSUPPORTED - {"suffix"},
        names={**COMMON_NAMES, "input_ids": "prompt", "top_logprobs_num": "logprobs"},
        is_generation=True,
    ),
)
