"""POST /infill: the text between two others, as llama.cpp's server and the editors that speak to it have it.

Owns its body and the shape of its answers. What stands in the line before the cursor (`prompt`) belongs to what
precedes the middle. Nothing is left out of a prompt that is too long: it is refused.

Source: llama.cpp's server, its README and the fields that llama.vim and llama.vscode send and read.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec

from mooli.frontend.generation import Generation
from mooli.frontend.inputs import CallInputs, GenerateCall
from mooli.frontend.parts import PartReader
from mooli.server.json_body import check_count
from mooli.server.openai import require_tokenizer
from mooli.server.routing import Access, Dialect, EventStream, HttpError, Incoming, Reply, Route, sse
from mooli.server.service import Service

DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
"""llama.cpp's, where neither the request nor the operator say anything."""

NAMES = {
    "max_new_tokens": "n_predict",
    "repetition_penalty": "repeat_penalty",
    "sampling_seed": "seed",
    "input_ids": "input_prefix",
}


class ExtraFile(msgspec.Struct, kw_only=True):
    """Another piece of text that the editor knows."""

    text: str
    filename: str | None = None


class InfillBody(msgspec.Struct, kw_only=True):
    """input_extra: the nearest last. n_predict: negative for as many tokens as the context has room for; 0 computes the
    prompt alone, which is then in the cache. response_fields: of the answer, with "/" between the names of inner ones.
    """

    input_prefix: str
    input_suffix: str
    input_extra: list[ExtraFile] | None = None
    prompt: str | None = None
    n_predict: int = -1
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_fields: Annotated[list[str], msgspec.Meta(max_length=100)] | None = None

    def sampling_params(self) -> dict[str, Any]:
        """What is given, in Mooli's names; `n_predict` is left to who knows the prompt's length."""
        params: dict[str, Any] = {
            "temperature": self.temperature,
            "top_k": -1 if self.top_k is not None and self.top_k <= 0 else self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "sampling_seed": None if self.seed is None or self.seed < 0 else self.seed,
            "stop": self.stop,
            "repetition_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }
        return {name: value for name, value in params.items() if value is not None}


async def fill_in(service: Service, request: Incoming) -> Reply | EventStream:
    """POST /infill. Raises RequestError or EngineError."""
    body: InfillBody = request.body
    require_tokenizer(service)
    check_count("input_extra", len(body.input_extra or ()), service.config.max_request_items)
    infill = service.require_infill("input_prefix")
    files = tuple((file.filename or "file", file.text) for file in body.input_extra or ())
    ids = await service.encode_infill(infill, body.input_prefix + (body.prompt or ""), body.input_suffix, files)
    preferred = service.engine_config.preferred_sampling
    params: dict[str, Any] = {name: value for name, value in DEFAULTS.items() if name not in preferred}
    params |= body.sampling_params() | {"n": 1, "stop_token_ids": infill.stop_token_ids(None)}
    room = service.facts.context_length - len(ids)
    # Without room the rules refuse the prompt itself, with a better reason.
    params["max_new_tokens"] = None if body.n_predict < 0 else min(body.n_predict, room) if room > 0 else 1
    call = GenerateCall(input_ids=ids, sampling_params=params, stream=bool(body.stream))
    inputs = await service.prepare(call, request.client.caller)
    fields = body.response_fields
    del request, body, files
    if inputs.is_stream:
        return EventStream(_events(service, inputs, fields))
    with service.start(inputs) as call_open:
        answer = _Answer(service, call_open.generations[0])
        async for _ in call_open.changes():
            answer.look()
        call_open.raise_if_failed()
        return Reply(_only(fields, answer.whole()))


async def _events(service: Service, inputs: CallInputs, fields: Sequence[str] | None) -> AsyncIterator[bytes]:
    with service.start(inputs) as call:
        generation = call.generations[0]
        answer, reader = _Answer(service, generation), PartReader(generation)
        async for _ in call.changes():
            generation.raise_if_failed()
            answer.look()
            text = "".join(part.text for part in reader.take())
            if text:
                yield sse({"index": 0, "content": text, "tokens": [], "stop": False})
        yield sse(_only(fields, {**answer.whole(), "content": ""}))


def _only(fields: Sequence[str] | None, answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a request wants of its answer, under the names that it uses."""
    if not fields:
        return answer
    found: dict[str, Any] = {}
    for path in fields:
        value: Any = answer
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            found[path] = value
    return found


class _Answer:
    """One sequence, and how long it took."""

    def __init__(self, service: Service, generation: Generation) -> None:
        self._model = service.model_name
        self._generation = generation
        self._start_s = time.perf_counter()
        self._first_s: float | None = None

    def look(self) -> None:
        """Something has come: the first of it ends the time of the prompt."""
        if self._first_s is None:
            self._first_s = time.perf_counter()

    def whole(self) -> dict[str, Any]:
        """Of a sequence that has ended. Raises HttpError for one that was ended from outside."""
        generation, finish = self._generation, self._generation.finish
        if finish is None or finish.type in ("abort", "error"):
            raise HttpError(503, "The request was aborted." if finish is None else finish.message or "Aborted.")
        is_word = isinstance(finish.matched, str)
        now_s = time.perf_counter()
        first_s = now_s if self._first_s is None else self._first_s
        num_new = len(generation.output_ids)
        return {
            "index": 0,
            "content": generation.text,
            "tokens": [],
            "id_slot": -1,
            "stop": True,
            "model": self._model,
            "tokens_predicted": num_new,
            "tokens_evaluated": generation.prompt_tokens,
            "tokens_cached": generation.prompt_tokens + num_new,
            "truncated": False,
            "stop_type": "limit" if finish.type == "length" else "word" if is_word else "eos",
            "stopping_word": finish.matched if is_word else "",
            "timings": {
                "cache_n": generation.cached_tokens,
                **_timings("prompt", generation.prompt_tokens - generation.cached_tokens, first_s - self._start_s),
                **_timings("predicted", num_new, now_s - first_s),
            },
        }


def _timings(what: str, count: int, seconds: float) -> dict[str, Any]:
    seconds = max(seconds, 1e-9)
    return {
        f"{what}_n": count,
        f"{what}_ms": 1000 * seconds,
        f"{what}_per_token_ms": 1000 * seconds / max(count, 1),
        f"{what}_per_second": count / seconds,
    }


ROUTES = (
    Route(
        path="/infill",
        methods=("POST",),
        handler=fill_in,
        access=Access.KEY,
        dialect=Dialect.OPENAI,
        summary="The text between two others (llama.cpp's)",
        body=InfillBody,
        names=NAMES,
        is_generation=True,
    ),
)
