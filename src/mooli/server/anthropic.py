"""Anthropic's Messages API: POST /v1/messages, whole or as events, and /v1/messages/count_tokens.

Owns its bodies, the way from them to a conversation for the chat template, and the shapes of answers and events. A
field whose effect Mooli does not have is refused by its name, unless its value asks for nothing. Never writes error
bodies, which the HTTP layer does in this API's words.

Usage has the API's meaning: `input_tokens` are the tokens of the prompt that had to be computed, and those from the
cache are in `cache_read_input_tokens` alone; the whole prompt is their sum. Everything computed is cached, marked with
`cache_control` or not, at no price, so `cache_creation_input_tokens` is 0.

An answer that fills the context ends with `model_context_window_exceeded`; a `max_tokens` larger than the context has
room for is no error. Both are the API's rules for its current models.

Source: Anthropic's API reference, Messages, Streaming messages, Count Message tokens.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from mooli.frontend.generation import Generation
from mooli.frontend.inputs import CallInputs, GenerateCall
from mooli.frontend.parts import Part, PartKind, PartReader, WireFormat, parser_for
from mooli.frontend.unsupported import Api, asked, names_of
from mooli.server.json_body import check_count
from mooli.server.openai import require_chat_template, require_tokenizer
from mooli.server.openai_chat import effort_arguments, thinking_arguments
from mooli.server.routing import Access, Dialect, EventStream, HttpError, Incoming, ModelName, Reply, Route, sse
from mooli.server.service import Service

NAMES = {
    "input_ids": "messages",
    "max_new_tokens": "max_tokens",
    "stop": "stop_sequences",
    "continue_final_message": "a last message of the assistant",
}


# -- bodies ----------------------------------------------------------------------------------------------------------
Block = dict[str, Any]
"""A content block: an object with a `type`. {"type": "text", "text": …} is served, and of the assistant's
{"type": "thinking", "thinking": …}; a signature is left aside, as none is given out."""

PART_SEPARATOR = "\n"
"""Between the blocks of a message, and between messages of one role that become one turn."""


class InputMessage(msgspec.Struct, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Thinking(msgspec.Struct, kw_only=True):
    """Whether to reason; without it the model's template decides, and `adaptive` allows it. How much is not bounded:
    budget_tokens is checked as the API has it, and has no effect. Nor has display: reasoning is always shown, because
    it comes back with the conversation, where the model reads it and the cache finds it."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, msgspec.Meta(ge=1024)] | None = None
    display: str | None = None


class CountTokensBody(msgspec.Struct, kw_only=True):
    """What makes up a prompt."""

    model: ModelName
    messages: Annotated[list[InputMessage], msgspec.Meta(min_length=1)]
    system: str | list[Block] | None = None
    thinking: Thinking | None = None
    output_config: dict[str, Any] | None = None


class MessagesBody(CountTokensBody, kw_only=True):
    """A request for an answer. metadata and service_tier change nothing here, as their meaning has it."""

    max_tokens: Annotated[int, msgspec.Meta(ge=0)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0)] | None = None
    top_p: float | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    output_format: dict[str, Any] | None = None

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


def conversation(body: CountTokensBody, max_items: int) -> tuple[list[dict[str, str]], bool]:
    """Messages for a chat template, and whether the last one is to be continued (it is the assistant's).

    Messages of one role in a row become one turn, as the API has it. Raises HttpError (400) for a block that is not
    text or, of the assistant's, reasoning, and for more than `max_items` messages and blocks together.
    """
    blocks = [body.system, *(message.content for message in body.messages)]
    count = len(body.messages) + sum(len(content) for content in blocks if isinstance(content, list))
    check_count("messages", count, max_items)
    turns: list[tuple[str, list[str], list[str]]] = []
    if body.system:
        turns.append(("system", _texts(body.system, "system", {"text": []})["text"], []))
    for index, message in enumerate(body.messages):
        found: dict[str, list[str]] = {"text": [], "thinking": []} if message.role == "assistant" else {"text": []}
        _texts(message.content, f"messages[{index}].content", found)
        texts, reasoning = [PART_SEPARATOR.join(found["text"])], found.get("thinking", [])
        if turns and turns[-1][0] == message.role:
            turns[-1][1].extend(texts)
            turns[-1][2].extend(reasoning)
        else:
            turns.append((message.role, texts, reasoning))
    told = []
    for role, texts, reasoning in turns:
        told.append({"role": role, "content": PART_SEPARATOR.join(texts)})
        if reasoning:
            told[-1]["reasoning_content"] = PART_SEPARATOR.join(reasoning)
    return told, told[-1]["role"] == "assistant"


def _texts(content: str | Sequence[Block], where: str, found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Adds the texts of blocks to those of their type. Raises HttpError for a type that is not in `found`."""
    if isinstance(content, str):
        found["text"].append(content)
        return found
    for index, block in enumerate(content):
        at, kind = f"{where}[{index}]", block.get("type")
        if not isinstance(kind, str):
            raise HttpError(400, f"{at} has no type: a text is {{'type': 'text', 'text': …}}.", param=at)
        if kind not in found:
            raise HttpError(400, f"{at} is of type {kind[:40]!r}, but only text is supported yet.", param=at)
        text = block.get(kind)
        if not isinstance(text, str):
            raise HttpError(400, f"{at}.{kind} must be a string.", param=at)
        found[kind].append(text)
    return found


# -- answers ---------------------------------------------------------------------------------------------------------
async def create_message(service: Service, request: Incoming) -> Reply | EventStream:
    """POST /v1/messages. Raises RequestError, ChatTemplateError or EngineError."""
    body: MessagesBody = request.body
    ids = await _prompt_ids(service, request)
    room = service.facts.context_length - len(ids)
    params = service.chat_sampling({**body.sampling_params(), "n": 1})
    # Without room the rules refuse the prompt itself, with a better reason.
    params["max_new_tokens"] = min(body.max_tokens, room) if room > 0 else body.max_tokens
    rid = f"msg_{uuid.uuid4().hex[:24]}"
    call = GenerateCall(input_ids=ids, sampling_params=params, rid=rid, stream=bool(body.stream))
    inputs = await service.prepare(call, request.client.caller)
    is_cut = 0 < room < body.max_tokens
    continues = body.messages[-1].role == "assistant"
    wire_format = service.wire_format.continued if continues else service.wire_format
    model = body.model
    del request, body
    if inputs.is_stream:
        return EventStream(_events(service, inputs, wire_format, model, is_cut))
    with service.start(inputs, wire_format=wire_format) as answering:
        await answering.wait()
        return Reply(_Message(service, answering.generations[0], wire_format, model, is_cut).whole())


async def count_tokens(service: Service, request: Incoming) -> Reply:
    """POST /v1/messages/count_tokens: the tokens of the prompt, cached or not. Raises as `create_message`."""
    return Reply({"input_tokens": len(await _prompt_ids(service, request))})


async def _prompt_ids(service: Service, request: Incoming) -> list[int]:
    body: CountTokensBody = request.body
    check_served(request.unsupported)
    require_chat_template(service)
    messages, continues = conversation(body, service.config.max_request_items)
    last = {"add_generation_prompt": not continues, "continue_final_message": continues}
    arguments = {**service.config.chat_template_kwargs, **template_arguments(body), **last}
    return await service.encode_chat(messages, **arguments)


async def _events(
    service: Service, inputs: CallInputs, wire_format: WireFormat, model: str, is_cut: bool
) -> AsyncIterator[bytes]:
    """The stream begins with the first token: by then it is known what of the prompt came from the cache, and an error
    until then has a status of its own."""
    with service.start(inputs, wire_format=wire_format) as call:
        message = _Message(service, call.generations[0], wire_format, model, is_cut)
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
    """One sequence as the message that answers: blocks, each for a run of parts of one kind, whole or as events.

    is_cut: the context had less room than `max_tokens`.
    """

    def __init__(
        self, service: Service, generation: Generation, wire_format: WireFormat, model: str, is_cut: bool
    ) -> None:
        parser = parser_for(wire_format, generation.request, require_tokenizer(service))
        self.reader = PartReader(generation, parser, stream_interval=service.engine_config.stream_interval)
        self._generation = generation
        self._model = model
        self._is_cut = is_cut
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
        generation = self._generation
        return {**self._head(), "content": blocks, **self._stop(), "usage": _usage(generation)}

    def events(self, part: Part) -> bytes:
        """What a part adds to the stream; "" for one that says nothing."""
        if part.kind == "begin":
            usage = {**_usage(self._generation), "output_tokens": 0}
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
        return (
            _event("content_block_stop", index=self._num_blocks - 1)
            + _event("message_delta", delta=self._stop(), usage=_usage(self._generation))
            + _event("message_stop")
        )

    def _begun(self, part: Part) -> dict[str, Any] | None:
        """The block that begins with this part, if one does. A message without words has an empty one."""
        if part.kind == "call_begin":
            self._open, self._has_calls = part.kind, True
            return {"type": "tool_use", "id": part.call_id, "name": part.text, "input": {}}
        kind: PartKind = "text" if part.kind == "end" else part.kind
        if kind not in ("text", "reasoning") or kind == self._open:
            return None
        if not part.text and (self._open is not None or part.kind != "end"):
            return None  # markers, half a character
        self._open = kind
        return {"type": "text", "text": ""} if kind == "text" else {"type": "thinking", "thinking": ""}

    def _head(self) -> dict[str, Any]:
        return {"id": self._generation.rid, "type": "message", "role": "assistant", "model": self._model}

    def _stop(self) -> dict[str, Any]:
        """Raises HttpError for an answer that was ended from outside: the API has no word for it."""
        finish = self._generation.finish
        if finish is None or finish.type in ("abort", "error"):
            message = "The request was aborted." if finish is None or finish.message is None else finish.message
            raise HttpError(503, message)
        reason, sequence = "end_turn", None
        if finish.type == "length":
            reason = "model_context_window_exceeded" if self._is_cut else "max_tokens"
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


def _usage(generation: Generation) -> dict[str, int]:
    return {
        "input_tokens": generation.prompt_tokens - generation.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": generation.cached_tokens,
        "output_tokens": len(generation.output_ids),
    }


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
