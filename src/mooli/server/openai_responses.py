"""OpenAI's Responses API: POST /v1/responses, whole or as events, and /v1/responses/input_tokens.

Owns its body, what of it is refused, and the way from it to an answer. Nothing is kept from one request to the next: a
client sends its whole conversation, whose beginning is found in the cache. Only where the operator wants it are
responses kept (`mooli.server.responses_kept`). What items and tools mean is in `mooli.server.responses_items`, what an
answer looks like in `mooli.server.responses_events`.

Clients send more than is known here. A field that only its vendor can give a meaning changes nothing; what would leave
a part of the conversation out is refused.

Source: OpenAI API reference, responses.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from mooli.errors import BusyError, ContextLengthError
from mooli.frontend.cache_report import Inquiry
from mooli.frontend.generation import Generation
from mooli.frontend.inputs import CallInputs, GenerateCall
from mooli.frontend.parts import Part, PartReader, WireFormat, parser_for
from mooli.frontend.retention import Mark, Place
from mooli.server import responses_kept
from mooli.server.cache_diagnostics import openai_diagnostics
from mooli.server.conversation import (
    Conversation,
    OpenedConversation,
    open_conversation,
    pins_of,
    prompt_ids,
    told_of,
)
from mooli.server.errors import CONTEXT_LENGTH_EXCEEDED, is_for_client, problem_of
from mooli.server.json_body import check_count
from mooli.server.openai import comparison_id, require_tokenizer
from mooli.server.openai_chat import chat_logprobs, effort_arguments
from mooli.server.responses_events import ResponseWriter
from mooli.server.responses_items import CalledTool, Item, read_messages, read_tools, without_oldest
from mooli.server.responses_kept import NOTHING_KEPT, SEND_ALL, Keep, all_items, keeper
from mooli.server.retention import openai_marks
from mooli.server.routing import Access, Dialect, EventStream, HttpError, Incoming, ModelName, Reply, Route, sse
from mooli.server.service import Service

logger = logging.getLogger(__name__)

NAMES = {
    "input_ids": "input", "messages": "input", "max_new_tokens": "max_output_tokens", "json_schema": "text.format",
    "response_format": "text.format", "top_logprobs_num": "top_logprobs", "sampling_seed": "seed",
}  # fmt: skip

MAX_CUTS = 8
"""How often a conversation is made shorter that was found too long."""

ROOM = 0.25
"""Of the context, for the answer to a conversation that was cut."""

LOGPROBS = "message.output_text.logprobs"
"""In `include`: log-probabilities of the words."""

_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "stop",
    "seed",
)  # fmt: skip


# -- bodies ------------------------------------------------------------------------------------------------------------
class ResponsesBody(msgspec.Struct, kw_only=True):
    """POST /v1/responses. Of what has no effect here the answer repeats what came: `store`, `metadata`,
    `max_tool_calls`, `prompt_cache_key` and the like, `verbosity` of `text`."""

    input: str | list[Item]
    model: ModelName | None = None
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    tools: list[Item] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: list[str] | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    truncation: Any = None
    store: bool | None = None
    metadata: Any = None
    max_tool_calls: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: Any = None
    user: Any = None
    # Extensions, as chats have them
    stop: str | list[str] | None = None
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    cache_salt: str | None = None
    priority: int | None = None
    session_id: str | None = None
    pin: dict[str, Any] | list[dict[str, Any]] | None = None

    @property
    def has_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())


def _refuse(service: Service, body: ResponsesBody) -> None:
    """Raises HttpError (400) for what names a conversation, or a prompt, that only its vendor's server has."""
    if body.previous_response_id and service.responses is None:
        raise HttpError(
            400, f"previous_response_id is not supported, {NOTHING_KEPT}: {SEND_ALL}", param="previous_response_id"
        )
    for name, why in (
        ("conversation", f"this server keeps no conversations: {SEND_ALL}"),
        ("prompt", "this server keeps no prompts: send instructions and input"),
        ("background", "this server answers on the connection that asks: leave it out, or set stream"),
    ):
        if getattr(body, name):
            raise HttpError(400, f"{name} is not supported, {why}", param=name)


def _sampling(body: ResponsesBody) -> dict[str, Any]:
    """Under native names; without the length, which the prompt's length decides. Raises HttpError."""
    given = {name: getattr(body, name) for name in _SAMPLING}
    form = (body.text or {}).get("format")
    if form is not None:
        given["json_schema"] = _schema(form)
    return {name: value for name, value in given.items() if value is not None}


def _schema(form: Any) -> str | None:
    """Of `text.format`; None for free text. A schema is always enforced, whatever `strict` says."""
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return json.dumps({"type": "object"})
    if kind != "json_schema":
        shown = str(form if kind is None else kind)[:80]
        raise HttpError(
            400, f"text.format.type={shown!r} is none of text, json_object, json_schema", param="text.format"
        )
    if not isinstance(form.get("schema"), (dict, bool)):
        raise HttpError(400, "text.format.schema must be a JSON schema, an object", param="text.format")
    return json.dumps(form["schema"])


def _template_arguments(body: ResponsesBody) -> dict[str, Any]:
    """What the template is told of reasoning. Raises HttpError."""
    effort = (body.reasoning or {}).get("effort")
    return {} if effort is None else effort_arguments(effort, "reasoning.effort")


# -- answers -----------------------------------------------------------------------------------------------------------
async def count_input_tokens(service: Service, request: Incoming) -> Reply:
    """POST /v1/responses/input_tokens: the tokens of the prompt, cached or not. Raises as `create_response`."""
    conversation, _ = await _conversation(service, request)
    return Reply({"object": "response.input_tokens", "input_tokens": len(await prompt_ids(service, conversation))})


async def _conversation(service: Service, request: Incoming) -> tuple[Conversation, Mapping[str, CalledTool]]:
    """With the tools as the client knows them. Raises HttpError, RequestError."""
    body: ResponsesBody = request.body
    _refuse(service, body)
    require_tokenizer(service)
    items = await all_items(service, request.client, body.input, body.previous_response_id)
    check_count("input", _num_items(items), service.config.max_request_items)
    check_count("tools", len(body.tools or ()), service.config.max_request_items)
    offered = read_tools(body.tools or (), items, body.tool_choice, parallel=body.parallel_tool_calls is not False)
    conversation = Conversation(
        messages=read_messages(items, body.instructions),
        tools=offered.tools,
        template_arguments=_template_arguments(body),
        owner=service.owner_of(request.client.caller, body.cache_salt),
    )
    return conversation, offered.called


async def _open(
    service: Service, body: ResponsesBody, conversation: Conversation
) -> tuple[OpenedConversation, Conversation]:
    """Also the conversation as it was opened. With `truncation` "auto" one that is too long loses its oldest turns, so
    many that an answer has some room. Raises as `open_conversation`."""
    params, context_length = {**_sampling(body), "n": 1}, service.facts.context_length
    for _ in range(MAX_CUTS if body.truncation == "auto" else 0):
        try:
            opened = await open_conversation(service, conversation, params)
            num_tokens = len(opened.input_ids)
        except ContextLengthError as exc:
            num_tokens = exc.prompt_tokens or 2 * context_length
        if num_tokens < context_length:
            return opened, conversation
        shorter = without_oldest(conversation.messages, 1 - (1 - ROOM) * context_length / num_tokens)
        if shorter is None:
            break
        conversation = replace(conversation, messages=shorter)
    return await open_conversation(service, conversation, params), conversation


async def create_response(service: Service, request: Incoming) -> Reply | EventStream:
    """Raises HttpError for a request that is wrong, RequestError, and what `Call.changes` raises."""
    body: ResponsesBody = request.body
    told, called = await _conversation(service, request)
    marks = _marks(body, told)
    opened, conversation = await _open(service, body, told)
    if conversation is not told:
        marks = [replace(mark, place=None) for mark in marks]
    response_id = f"resp_{uuid.uuid4().hex}"
    call = GenerateCall(
        input_ids=opened.input_ids,
        sampling_params=_with_length(service, opened.sampling_params, len(opened.input_ids), body.max_output_tokens),
        return_logprob=body.has_logprobs,
        top_logprobs_num=body.top_logprobs if body.has_logprobs else None,
        stream=bool(body.stream),
        rid=response_id,
        priority=body.priority,
        cache_salt=body.cache_salt,
        return_cache_report=body.prompt_cache_options is not None,
        session_id=body.session_id,
        pin=await pins_of(service, marks, conversation, own=body.pin),
    )
    inputs = await service.prepare(call, request.client.caller)
    if _is_kept(service, body) and not body.session_id:
        for sequence in inputs.requests:
            sequence.session, sequence.previous = response_id, body.previous_response_id or ""
    inquiry = None
    if body.prompt_cache_options is not None:
        inquiry = await service.inquire(
            inputs,
            request.client.caller,
            told_of(service, conversation),
            model=body.model,
            previous_id=comparison_id(body.prompt_cache_options),
        )
    as_summary = bool((body.reasoning or {}).get("summary") or (body.reasoning or {}).get("generate_summary"))
    writer = ResponseWriter(response_id, _echo(service, body, inputs), called, as_summary=as_summary)
    has_logprobs, wire_format, keep = body.has_logprobs, opened.wire_format, None
    if _is_kept(service, body):
        keep = keeper(service, request.client, response_id, body.input, body.previous_response_id)
    del request, body, told, conversation, opened, call
    if inputs.is_stream:
        return EventStream(_events(service, inputs, wire_format, writer, has_logprobs, keep, inquiry))
    with service.start(inputs, wire_format=wire_format) as answering:
        await answering.wait()
        answering.generations[0].raise_if_failed()
        answer = _Answer(service, answering.generations[0], wire_format, writer, has_logprobs, inquiry)
        await answer.read()
        if keep is not None:
            keep(writer.response)
        return Reply(writer.response)


def _marks(body: ResponsesBody, told: Conversation) -> list[Mark]:
    """What of the prompt is to be kept: marks of the body's own items, which stand last. Raises HttpError."""
    items = body.input if isinstance(body.input, list) else []
    contents: list[tuple[Place, Any]] = []
    num_own = -1
    for index, item in enumerate(items):
        content = item.get("content")
        if isinstance(content, list) and any(
            isinstance(part, dict) and part.get("prompt_cache_breakpoint") for part in content
        ):
            num_own = len(read_messages(items, body.instructions)) if num_own < 0 else num_own
            num_behind = num_own - len(read_messages(items[: index + 1], body.instructions))
            is_system = item.get("role") in ("system", "developer")
            contents.append((Place("message", 0 if is_system else len(told.messages) - 1 - num_behind), content))
    return openai_marks(body.prompt_cache_retention, body.prompt_cache_options, contents)


def _num_items(items: str | list[Item]) -> int:
    if isinstance(items, str):
        return 1
    contents = [item.get(name) for item in items for name in ("content", "output", "summary")]
    return len(items) + sum(len(content) for content in contents if isinstance(content, list))


def _with_length(
    service: Service, params: Mapping[str, Any], prompt_tokens: int, max_output_tokens: int | None
) -> dict[str, Any]:
    """An answer that fills the context is incomplete, and no error. Without room for one the rules refuse the prompt
    itself, with a better reason."""
    if max_output_tokens is None:
        return dict(params)
    room = service.facts.context_length - prompt_tokens
    return {**params, "max_new_tokens": min(max_output_tokens, room) if room > 0 else max_output_tokens}


def _is_kept(service: Service, body: ResponsesBody) -> bool:
    return service.responses is not None and body.store is not False


def _echo(service: Service, body: ResponsesBody, inputs: CallInputs) -> dict[str, Any]:
    """What of a response repeats its request."""
    sampling, reasoning = inputs.requests[0].sampling, body.reasoning or {}
    return {
        "created_at": int(time.time()),
        "model": body.model or service.model_name,
        "instructions": body.instructions,
        "tools": body.tools or [],
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "text": {"format": {"type": "text"}, **(body.text or {})},
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "truncation": "auto" if body.truncation == "auto" else "disabled",
        "background": False,
        "store": _is_kept(service, body),
        "previous_response_id": body.previous_response_id,
        "service_tier": "default",
        "metadata": body.metadata or {},
        "prompt_cache_key": body.prompt_cache_key,
        **({} if body.prompt_cache_options is None else {"prompt_cache_options": _cache_options(body)}),
        **({} if body.prompt_cache_retention is None else {"prompt_cache_retention": body.prompt_cache_retention}),
        "safety_identifier": body.safety_identifier,
        "user": body.user,
    }


def _cache_options(body: ResponsesBody) -> dict[str, Any]:
    """As the API repeats them; how long anything is kept is the cache's own affair."""
    return {"mode": "implicit", "ttl": "30m", **(body.prompt_cache_options or {})}


async def _events(
    service: Service,
    inputs: CallInputs,
    wire_format: WireFormat,
    writer: ResponseWriter,
    has_logprobs: bool,
    keep: Keep | None,
    inquiry: Inquiry | None,
) -> AsyncIterator[bytes]:
    """The stream begins with the first token: an error until then has a status of its own, one after that is an event
    of this API."""
    with service.start(inputs, wire_format=wire_format) as call:
        answer = _Answer(service, call.generations[0], wire_format, writer, has_logprobs, inquiry)
        try:
            async for _ in call.changes():
                call.generations[0].raise_if_failed()
                await answer.read()
                if answer.is_over and keep is not None:
                    keep(writer.response)
                said = _framed(writer)
                if said:
                    yield said
        except Exception as exc:
            if not answer.has_begun:
                raise
            if not is_for_client(exc):
                logger.error("a response has failed while it was made", exc_info=exc)
            answer.fail(exc)
            yield _framed(writer)


def _framed(writer: ResponseWriter) -> bytes:
    return b"".join(sse(event, event=event["type"]) for event in writer.take())


class _Answer:
    """One sequence, read as a response."""

    def __init__(
        self,
        service: Service,
        generation: Generation,
        wire_format: WireFormat,
        writer: ResponseWriter,
        has_logprobs: bool,
        inquiry: Inquiry | None,
    ) -> None:
        self._inquiry = inquiry
        self._tokenizer = require_tokenizer(service)
        parser = parser_for(wire_format, generation.request, self._tokenizer)
        self._reader = PartReader(generation, parser, stream_interval=service.engine_config.stream_interval)
        self._threads = service.text_threads
        self._generation = generation
        self._writer = writer
        self._has_logprobs = has_logprobs
        self.has_begun = False

    @property
    def is_over(self) -> bool:
        return self._reader.is_over

    async def read(self) -> None:
        """Write what is new. Raises HttpError for a sequence ended from outside: the API has no word for that."""
        for part in self._reader.take():
            if part.kind == "begin":
                if self._inquiry is not None:
                    found = openai_diagnostics(self._inquiry, self._generation)
                    self._writer.repeat(prompt_cache_diagnostics=found)
                self._writer.begin()
                self.has_begun = True
            elif part.kind == "end":
                finish = self._generation.finish
                if finish is None or finish.type in ("abort", "error"):
                    message = None if finish is None else finish.message
                    raise HttpError(503, message or "The request was aborted.")
                if self._inquiry is not None:
                    has_reasoned = self._reader.num_reasoning_tokens > 0
                    self._inquiry.report(self._generation, has_reasoned=has_reasoned)
                self._writer.end(self._usage(), is_cut=finish.type == "length")
            else:
                self._writer.add(part, await self._logprobs(part))

    def fail(self, error: Exception) -> None:
        problem = problem_of(error, Dialect.OPENAI, NAMES)
        code = "server_error"
        if problem.code == CONTEXT_LENGTH_EXCEEDED:
            code = problem.code
        elif isinstance(error, BusyError):
            code = "rate_limit_exceeded"
        elif problem.status < 500:
            code = "invalid_prompt"
        self._writer.fail(code, problem.message, self._usage())

    async def _logprobs(self, part: Part) -> list[dict[str, Any]]:
        if not self._has_logprobs or part.kind != "text" or not part.logprobs:
            return []
        num_entries = len(part.logprobs) * (1 + self._generation.request.num_top_logprobs)
        shown = await self._threads.run(num_entries, lambda: chat_logprobs(self._tokenizer, part.logprobs))
        content: list[dict[str, Any]] = shown["content"]
        return content

    def _usage(self) -> dict[str, Any]:
        generation = self._generation
        return {
            "input_tokens": generation.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": generation.cached_tokens,
                "cache_write_tokens": generation.written_tokens,
            },
            "output_tokens": len(generation.output_ids),
            "output_tokens_details": {"reasoning_tokens": self._reader.num_reasoning_tokens},
            "total_tokens": generation.prompt_tokens + len(generation.output_ids),
        }


ROUTES = (
    Route(
        path="/v1/responses",
        methods=("POST",),
        handler=create_response,
        access=Access.KEY,
        dialect=Dialect.OPENAI,
        summary="OpenAI's Responses API: what follows a conversation, as items",
        body=ResponsesBody,
        names=NAMES,
        is_generation=True,
    ),
    Route(
        path="/v1/responses/input_tokens",
        methods=("POST",),
        handler=count_input_tokens,
        access=Access.KEY,
        dialect=Dialect.OPENAI,
        summary="OpenAI's Responses API: the tokens of a prompt",
        body=ResponsesBody,
        names=NAMES,
    ),
    *responses_kept.ROUTES,
)
