"""Anthropic's Messages API: POST /v1/messages, whole or as events, and /v1/messages/count_tokens.

Owns its bodies, the way from them to a conversation for the chat template, and the shapes of answers and events. A
field whose effect Mooli does not have is refused by its name, unless its value asks for nothing. Never writes error
bodies, which the HTTP layer does in this API's words.

Usage has the API's meaning: `input_tokens` are the tokens of the prompt that had to be computed, and those from the
cache are in `cache_read_input_tokens` alone; the whole prompt is their sum. Everything computed is cached, marked with
`cache_control` or not, at no price. Where a request marks something so, what was computed and kept of its prompt is
`cache_creation_input_tokens`, as the API has it, and no part of `input_tokens`; otherwise that is 0.

An answer that fills the context ends with `model_context_window_exceeded`; a `max_tokens` larger than the context has
room for is no error. Both are the API's rules for its current models.

Source: Anthropic's API reference, Messages, Streaming messages, Count Message tokens.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import msgspec

from mooli.frontend.cache_report import Inquiry
from mooli.frontend.generation import Generation
from mooli.frontend.inputs import CallInputs, GenerateCall
from mooli.frontend.parts import Part, PartKind, PartReader, WireFormat, parser_for
from mooli.frontend.retention import Mark, Place
from mooli.frontend.tool_messages import choose, make_tool
from mooli.frontend.tools import ToolSet
from mooli.frontend.unsupported import Api, asked, names_of
from mooli.server.anthropic_blocks import PART_SEPARATOR, Block, add_turn, assistant_turn, results_of, texts_of
from mooli.server.cache_diagnostics import Diagnostics, anthropic_diagnostics, anthropic_usage, has_cache_control
from mooli.server.conversation import Conversation, open_conversation, pins_of, prompt_ids, told_of
from mooli.server.json_body import check_count
from mooli.server.openai import require_tokenizer
from mooli.server.openai_chat import effort_arguments, thinking_arguments
from mooli.server.retention import cache_control, marked_blocks
from mooli.server.routing import Access, Dialect, EventStream, HttpError, Incoming, ModelName, Reply, Route, sse
from mooli.server.service import Service

NAMES = {
    "input_ids": "messages",
    "max_new_tokens": "max_tokens",
    "stop": "stop_sequences",
    "continue_final_message": "a last message of the assistant",
}


# -- bodies ----------------------------------------------------------------------------------------------------------
class InputMessage(msgspec.Struct, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Thinking(msgspec.Struct, kw_only=True):
    """Whether to reason; without it the model's template decides, and `adaptive` allows it. budget_tokens bounds it
    where the model reasons, and changes nothing where not. display has no effect: reasoning is always shown, because it
    comes back with the conversation, where the model reads it and the cache finds it."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, msgspec.Meta(ge=1024)] | None = None
    display: str | None = None


class CountTokensBody(msgspec.Struct, kw_only=True):
    """What makes up a prompt."""

    model: ModelName
    messages: Annotated[list[InputMessage], msgspec.Meta(min_length=1)]
    system: str | list[Block] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: dict[str, Any] | None = None


class MessagesBody(CountTokensBody, kw_only=True):
    """A request for an answer. metadata and service_tier change nothing here, as their meaning has it. diagnostics: say
    what of an earlier request's prompt is not the same any more, and remember this one's. cache_control: keep all of
    the prompt for a time; of a block or a tool, all up to its end."""

    max_tokens: Annotated[int, msgspec.Meta(ge=0)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0)] | None = None
    top_p: float | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    output_format: dict[str, Any] | None = None
    diagnostics: Diagnostics | None = None
    cache_control: dict[str, Any] | None = None

    def sampling_params(self) -> dict[str, Any]:
        """What the body says of sampling, in Mooli's names; `max_tokens` is left to who knows the prompt's length."""
        params: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "stop": self.stop_sequences}
        if self.top_k is not None:
            params["top_k"] = self.top_k or -1
        form = (self.output_config or {}).get("format") or self.output_format
        if form:
            params["json_schema"] = _schema(form)
        return {name: value for name, value in params.items() if value is not None}


def _schema(form: Any) -> Any:
    """Of an output's format. Raises HttpError (400) for one of another type."""
    if not isinstance(form, dict) or form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
        raise HttpError(400, "output_config.format must have type 'json_schema' and a schema.", param="output_config")
    return json.dumps(form["schema"])


def check_served(given: Mapping[str, Any]) -> None:
    """Raise HttpError (400) that names the field if one asks for what is not served."""
    name = asked(given, Api.ANTHROPIC)
    if name is not None:
        raise HttpError(400, f"{name} is not supported yet: leave it out.", param=name)


def template_arguments(body: CountTokensBody) -> dict[str, Any]:
    """What the chat template is told of reasoning. Raises HttpError."""
    thinking, effort = body.thinking, (body.output_config or {}).get("effort")
    told: dict[str, Any] = {}
    if effort is not None:
        told["reasoning_effort"] = effort_arguments(effort, "output_config.effort")["reasoning_effort"]
    if thinking is None:
        return told
    limit = body.max_tokens if isinstance(body, MessagesBody) else None
    if thinking.type == "enabled" and limit is not None and limit <= (thinking.budget_tokens or 0):
        raise HttpError(
            400,
            f"max_tokens={limit} must be greater than thinking.budget_tokens={thinking.budget_tokens}.",
            param="max_tokens",
        )
    return {**told, **thinking_arguments(thinking.type != "disabled")}


def tools_of(body: CountTokensBody) -> ToolSet | None:
    """The functions that a client calls by itself. Those of a type that only Anthropic knows (web_search_…, bash_…) are
    left aside: a conversation does not depend on them. Raises RequestError."""
    tools = []
    for index, given in enumerate(body.tools or ()):
        if given.get("type") in (None, "custom"):
            at = f"tools[{index}]"
            schema = given.get("input_schema")
            tools.append(
                make_tool(
                    given.get("name"), given.get("description"), schema, where=at, parameters_name="input_schema",
                    strict=given.get("strict"),
                )
            )  # fmt: skip
    choice = body.tool_choice or {}
    return choose(tools, choice.get("type") and choice, not choice.get("disable_parallel_tool_use"))


def conversation(body: CountTokensBody, service: Service) -> Conversation:
    """The body's, in the shape that all dialects share.

    Messages of one role in a row become one turn, as the API has it. Those of the system become part of the system
    prompt, wherever they stand: templates have one place for it. What a tool returned stands before what the user says
    with it. Raises HttpError (400) for a block that this model cannot read, and for too many messages and blocks.
    """
    blocks = [body.system, *(message.content for message in body.messages)]
    count = len(body.messages) + sum(len(content) for content in blocks if isinstance(content, list))
    check_count("messages", count, service.config.max_request_items)
    tools = tools_of(body)
    marks, marked_turns = _head_marks(body), list[tuple[int, float]]()
    check_count("tools", 0 if tools is None else len(tools.for_template()), service.config.max_request_items)
    system = [PART_SEPARATOR.join(texts_of(body.system, "system", "text"))] if body.system else []
    turns: list[dict[str, Any]] = []
    for index, message in enumerate(body.messages):
        where = f"messages[{index}].content"
        if message.role == "system":
            system += texts_of(message.content, where, "text")
        elif message.role == "assistant":
            add_turn(turns, assistant_turn(message.content, where))
        else:
            turns += results_of(message.content, where)
            said = texts_of(message.content, where, "text", beside=("tool_result",))
            if said or not isinstance(message.content, list) or not message.content:
                add_turn(turns, {"role": "user", "content": PART_SEPARATOR.join(said)})
        seconds = marked_blocks(message.content, where)
        if seconds is not None:
            marked_turns.append((0 if message.role == "system" else len(turns), seconds))
    if not turns:
        raise HttpError(400, "messages has only messages of the system: one must be the user's.", param="messages")
    continues = turns[-1]["role"] == "assistant"
    if continues and "tool_calls" in turns[-1]:
        raise HttpError(400, "messages ends with a tool_use: send its tool_result behind it.", param="messages")
    told = [{"role": "system", "content": PART_SEPARATOR.join(system)}, *turns] if system else turns
    arguments = template_arguments(body)
    for num_turns, seconds in marked_turns:
        marks.append(Mark(seconds, Place("message", max(0, len(told) - len(turns) + num_turns - 1))))
    return Conversation(messages=told, tools=tools, template_arguments=arguments, continues=continues, marks=marks)


def _head_marks(body: CountTokensBody) -> list[Mark]:
    """Of all there is of the prompt, of tools that the model hears of, and of the system prompt. Raises HttpError."""
    found: list[tuple[float | None, Place | None]] = []
    if isinstance(body, MessagesBody):
        found.append((cache_control(body.cache_control, "cache_control"), None))
    num_shown = 0
    for index, tool in enumerate(body.tools or ()):
        num_shown += tool.get("type") in (None, "custom")
        seconds = cache_control(tool.get("cache_control"), f"tools[{index}].cache_control")
        found.append((seconds, Place("tool", max(0, num_shown - 1))))
    found.append((marked_blocks(body.system, "system"), Place("message", 0)))
    return [Mark(seconds, place) for seconds, place in found if seconds is not None]


# -- answers ---------------------------------------------------------------------------------------------------------
async def create_message(service: Service, request: Incoming) -> Reply | EventStream:
    """POST /v1/messages. Raises RequestError, ChatTemplateError or EngineError."""
    body: MessagesBody = request.body
    check_served(request.unsupported)
    given = {**body.sampling_params(), "max_new_tokens": body.max_tokens, "n": 1}
    if body.thinking is not None and body.thinking.budget_tokens is not None and service.rules.has_reasoning:
        given["max_thinking_tokens"] = body.thinking.budget_tokens
    told = replace(conversation(body, service), owner=service.owner_of(request.client.caller))
    ids, params, wire_format = await open_conversation(service, told, given)
    room = service.facts.context_length - len(ids)
    if room > 0:  # otherwise the rules refuse the prompt itself, with a better reason
        params["max_new_tokens"] = min(body.max_tokens, room)
    rid = f"msg_{uuid.uuid4().hex[:24]}"
    call = GenerateCall(
        input_ids=ids,
        sampling_params=params,
        rid=rid,
        stream=bool(body.stream),
        return_cache_report=body.diagnostics is not None,
        pin=await pins_of(service, told.marks, told),
    )
    inputs = await service.prepare(call, request.client.caller)
    inquiry = None
    if body.diagnostics is not None:
        inquiry = await service.inquire(
            inputs,
            request.client.caller,
            told_of(service, told),
            model=body.model,
            previous_id=body.diagnostics.previous_message_id,
        )
    lists = [body.tools, body.system, *(message.content for message in body.messages)]
    shape = _Shape(body.model, 0 < room < body.max_tokens, has_cache_control(body.cache_control, lists), inquiry)
    del request, body
    if inputs.is_stream:
        return EventStream(_events(service, inputs, wire_format, shape))
    with service.start(inputs, wire_format=wire_format) as answering:
        await answering.wait()
        return Reply(_Message(service, answering.generations[0], wire_format, shape).whole())


async def count_tokens(service: Service, request: Incoming) -> Reply:
    """POST /v1/messages/count_tokens: the tokens of the prompt, cached or not. Raises as `create_message`."""
    check_served(request.unsupported)
    told = replace(conversation(request.body, service), owner=service.owner_of(request.client.caller))
    ids = await prompt_ids(service, told)
    return Reply({"input_tokens": len(ids)})


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a body says of its answer. is_cut: the context had less room than `max_tokens`. counts_writes: what the
    cache took in is told apart. inquiry: makes the diagnostics."""

    model: str
    is_cut: bool
    counts_writes: bool
    inquiry: Inquiry | None


async def _events(service: Service, inputs: CallInputs, wire_format: WireFormat, shape: _Shape) -> AsyncIterator[bytes]:
    """The stream begins with the first token: by then it is known what of the prompt came from the cache, and an error
    until then has a status of its own."""
    with service.start(inputs, wire_format=wire_format) as call:
        message = _Message(service, call.generations[0], wire_format, shape)
        async for _ in call.changes():
            call.generations[0].raise_if_failed()
            parts = message.reader.take()
            said = b"".join(message.events(part) for part in parts)
            if said:
                yield said
            if parts and parts[-1].kind == "end":
                yield message.closing()


_DELTAS: dict[PartKind, tuple[str, str]] = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "arguments": ("input_json_delta", "partial_json"),
}
"""By kind of part, the type of its delta and the field that has its text."""


class _Message:
    """One sequence as the message that answers: blocks, each for a run of parts of one kind, whole or as events."""

    def __init__(self, service: Service, generation: Generation, wire_format: WireFormat, shape: _Shape) -> None:
        parser = parser_for(wire_format, generation.request, require_tokenizer(service))
        self.reader = PartReader(generation, parser, stream_interval=service.engine_config.stream_interval)
        self._generation = generation
        self._shape = shape
        self._open: PartKind | None = None
        self._num_blocks = 0
        self._has_calls = False

    def whole(self) -> dict[str, Any]:
        """Of a sequence that has ended; instead of `events`."""
        blocks: list[dict[str, Any]] = []
        arguments: dict[int, str] = {}
        for part in self.reader.take():
            block = self._begun(part)
            if block is not None:
                blocks.append(block)
            if part.kind == "arguments":
                arguments[len(blocks) - 1] = arguments.get(len(blocks) - 1, "") + part.text
            elif part.kind in _DELTAS and part.text:
                blocks[-1][_DELTAS[part.kind][1]] += part.text
        for index, text in arguments.items():
            blocks[index]["input"] = _input(text)
        self._note()
        return {**self._head(), "content": blocks, **self._stop(), "usage": self._usage()}

    def events(self, part: Part) -> bytes:
        """What a part adds to the stream; "" for one that says nothing."""
        if part.kind == "begin":
            usage = {**self._usage(), "output_tokens": 0}
            message = {**self._head(), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
            return _event("message_start", message=message)
        said = b""
        block = self._begun(part)
        if block is not None:
            if self._num_blocks:
                said += _event("content_block_stop", index=self._num_blocks - 1)
            said += _event("content_block_start", index=self._num_blocks, content_block=block)
            if not self._num_blocks:
                said += _event("ping")
            self._num_blocks += 1
        if part.kind in _DELTAS and part.text:
            kind, field = _DELTAS[part.kind]
            said += _event("content_block_delta", index=self._num_blocks - 1, delta={"type": kind, field: part.text})
        return said

    def closing(self) -> bytes:
        """The last events."""
        self._note()
        return (
            _event("content_block_stop", index=self._num_blocks - 1)
            + _event("message_delta", delta=self._stop(), usage=self._usage())
            + _event("message_stop")
        )

    def _begun(self, part: Part) -> dict[str, Any] | None:
        """The block that begins with this part, if one does. A message without words has an empty one."""
        self._has_calls |= part.kind == "call_end"
        if part.kind == "call_begin":
            self._open = part.kind
            return {"type": "tool_use", "id": part.call_id, "name": part.text, "input": {}}
        kind: PartKind = "text" if part.kind == "end" else part.kind
        if kind not in ("text", "reasoning") or kind == self._open:
            return None
        if not part.text and (self._open is not None or part.kind != "end"):
            return None  # markers, half a character
        self._open = kind
        return {"type": "text", "text": ""} if kind == "text" else {"type": "thinking", "thinking": ""}

    def _head(self) -> dict[str, Any]:
        shape = self._shape
        head: dict[str, Any] = {
            "id": self._generation.rid,
            "type": "message",
            "role": "assistant",
            "model": shape.model,
        }
        if shape.inquiry is not None:
            head["diagnostics"] = anthropic_diagnostics(shape.inquiry, self._generation)
        return head

    def _note(self) -> None:
        """The answer is whole: what a later request may find of it."""
        if self._shape.inquiry is not None:
            has_reasoned = self.reader.num_reasoning_tokens > 0
            self._shape.inquiry.report(self._generation, has_reasoned=has_reasoned)

    def _usage(self) -> dict[str, int]:
        return anthropic_usage(self._generation, counts_writes=self._shape.counts_writes)

    def _stop(self) -> dict[str, Any]:
        """Raises HttpError for an answer that was ended from outside: the API has no word for it."""
        finish = self._generation.finish
        if finish is None or finish.type in ("abort", "error"):
            message = "The request was aborted." if finish is None or finish.message is None else finish.message
            raise HttpError(503, message)
        reason, sequence = "end_turn", None
        if finish.type == "length":
            reason = "model_context_window_exceeded" if self._shape.is_cut else "max_tokens"
        elif self._has_calls:
            reason = "tool_use"
        elif isinstance(finish.matched, str):
            reason, sequence = "stop_sequence", finish.matched
        return {"stop_reason": reason, "stop_sequence": sequence}


def _input(arguments: str) -> Any:
    """The object that a call's arguments are; an empty one where the call was cut short."""
    try:
        return msgspec.json.decode(arguments)
    except msgspec.DecodeError:
        return {}


def _event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, event=kind)


_UNSUPPORTED = frozenset(names_of(Api.ANTHROPIC))

ROUTES = (
    Route(
        path="/v1/messages",
        methods=("POST",),
        handler=create_message,
        access=Access.KEY,
        dialect=Dialect.ANTHROPIC,
        summary="Anthropic's Messages API: the next message of a conversation.",
        body=MessagesBody,
        unsupported=_UNSUPPORTED,
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
        unsupported=_UNSUPPORTED,
        names=NAMES,
    ),
)
