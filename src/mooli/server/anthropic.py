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
from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec

from mooli.frontend.generation import Generation
from mooli.frontend.inputs import CallInputs, GenerateCall
from mooli.frontend.parts import Part, PartKind, PartReader, WireFormat, parser_for
from mooli.frontend.tool_messages import choose, make_tool
from mooli.frontend.tools import ToolSet
from mooli.frontend.unsupported import Api, asked, names_of
from mooli.server.conversation import Conversation, open_conversation, prompt_ids
from mooli.server.json_body import check_count
from mooli.server.openai import require_tokenizer
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
"""A content block: an object with a `type`. Texts are served; of the assistant's reasoning too (a signature is left
aside, as none is given out) and calls (`tool_use`); of the user's what they returned (`tool_result`)."""

PART_SEPARATOR = "\n"
"""Between the blocks of a message, and between messages of one role that become one turn."""


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
    check_count("tools", 0 if tools is None else len(tools.for_template()), service.config.max_request_items)
    system = [PART_SEPARATOR.join(_texts(body.system, "system", "text"))] if body.system else []
    turns: list[dict[str, Any]] = []
    for index, message in enumerate(body.messages):
        where = f"messages[{index}].content"
        if message.role == "system":
            system += _texts(message.content, where, "text")
        elif message.role == "assistant":
            _add(turns, _assistant(message.content, where))
        else:
            turns += _results(message.content, where)
            said = _texts(message.content, where, "text", beside=("tool_result",))
            if said or not isinstance(message.content, list) or not message.content:
                _add(turns, {"role": "user", "content": PART_SEPARATOR.join(said)})
    if not turns:
        raise HttpError(400, "messages has only messages of the system: one must be the user's.", param="messages")
    continues = turns[-1]["role"] == "assistant"
    if continues and "tool_calls" in turns[-1]:
        raise HttpError(400, "messages ends with a tool_use: send its tool_result behind it.", param="messages")
    told = [{"role": "system", "content": PART_SEPARATOR.join(system)}, *turns] if system else turns
    arguments = template_arguments(body)
    return Conversation(messages=told, tools=tools, template_arguments=arguments, continues=continues)


def _add(turns: list[dict[str, Any]], turn: dict[str, Any]) -> None:
    """As one with the last turn where both are of one role."""
    last = turns[-1] if turns else None
    if last is None or last["role"] != turn["role"]:
        turns.append(turn)
        return
    for name in ("content", "reasoning_content"):
        texts = [value[name] for value in (last, turn) if name in value]
        if texts:
            last[name] = PART_SEPARATOR.join(texts)
    if "tool_calls" in turn:
        last["tool_calls"] = [*last.get("tool_calls", ()), *turn["tool_calls"]]


_OF_OTHERS = ("server_tool_use", "mcp_tool_use", "_tool_result")
"""How types of blocks end that tell of tools which Anthropic's servers call."""


def _assistant(content: str | Sequence[Block], where: str) -> dict[str, Any]:
    """A turn. What Anthropic's own tools did, and returned, is left aside."""
    blocks = content if isinstance(content, str) else [
        block for block in content if not str(block.get("type")).endswith(_OF_OTHERS)
    ]  # fmt: skip
    turn: dict[str, Any] = {
        "role": "assistant",
        "content": PART_SEPARATOR.join(_texts(blocks, where, "text", beside=("thinking", "tool_use"))),
    }
    reasoning = [] if isinstance(blocks, str) else _texts(blocks, where, "thinking", beside=("text", "tool_use"))
    if reasoning:
        turn["reasoning_content"] = PART_SEPARATOR.join(reasoning)
    calls = []
    for index, block in enumerate(() if isinstance(content, str) else content):
        if block.get("type") == "tool_use":
            name, given, at = block.get("name"), block.get("input"), f"{where}[{index}]"
            if not isinstance(name, str) or not name or not isinstance(given, (dict, type(None))):
                raise HttpError(400, f"{at} must have a name and an input, which is an object.", param="messages")
            function = {"name": name, "arguments": given or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
    if calls:
        turn["tool_calls"] = calls
    return turn


def _results(content: str | Sequence[Block], where: str) -> list[dict[str, Any]]:
    """What tools returned, each as a message. What is no text is a note: the model may know what it asked for."""
    found = []
    for index, block in enumerate(() if isinstance(content, str) else content):
        if block.get("type") != "tool_result":
            continue
        said = block.get("content")
        if isinstance(said, list):
            texts = [_result_text(item, f"{where}[{index}].content[{i}]") for i, item in enumerate(said)]
            said = PART_SEPARATOR.join(texts)
        if not isinstance(said, (str, type(None))):
            raise HttpError(400, f"{where}[{index}].content must be a string or blocks.", param="messages")
        said = said or ""
        if block.get("is_error") and "error" not in said[:20].lower():
            said = f"Error: {said}"
        found.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": said})
    return found


def _result_text(block: Any, where: str) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(kind, str):
        raise HttpError(400, f"{where} has no type: a text is {{'type': 'text', 'text': …}}.", param="messages")
    if kind != "text":
        return f"[{kind[:40]}]"
    if not isinstance(block.get("text"), str):
        raise HttpError(400, f"{where}.text must be a string.", param="messages")
    return str(block["text"])


def _texts(content: str | Sequence[Block], where: str, wanted: str, beside: Sequence[str] = ()) -> list[str]:
    """The texts of the blocks of type `wanted`. Raises HttpError for a type that is neither that nor in `beside`."""
    if isinstance(content, str):
        return [content]
    texts = []
    for index, block in enumerate(content):
        at, kind = f"{where}[{index}]", block.get("type")
        if not isinstance(kind, str):
            raise HttpError(400, f"{at} has no type: a text is {{'type': 'text', 'text': …}}.", param=at)
        if kind == wanted:
            if not isinstance(block.get(kind), str):
                raise HttpError(400, f"{at}.{kind} must be a string.", param=at)
            texts.append(block[kind])
        elif kind not in beside:
            raise HttpError(400, f"{at} is of type {kind[:40]!r}, but only text is supported yet.", param=at)
    return texts


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
    call = GenerateCall(input_ids=ids, sampling_params=params, rid=rid, stream=bool(body.stream))
    inputs = await service.prepare(call, request.client.caller)
    is_cut = 0 < room < body.max_tokens
    model = body.model
    del request, body
    if inputs.is_stream:
        return EventStream(_events(service, inputs, wire_format, model, is_cut))
    with service.start(inputs, wire_format=wire_format) as answering:
        await answering.wait()
        return Reply(_Message(service, answering.generations[0], wire_format, model, is_cut).whole())


async def count_tokens(service: Service, request: Incoming) -> Reply:
    """POST /v1/messages/count_tokens: the tokens of the prompt, cached or not. Raises as `create_message`."""
    check_served(request.unsupported)
    ids = await prompt_ids(service, conversation(request.body, service))
    return Reply({"input_tokens": len(ids)})


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
