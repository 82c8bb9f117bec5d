"""Ollama's API, its answers: POST /api/chat and /api/generate, whole or as lines of JSON.

Owns their bodies, what options mean under Mooli's names, the way to a conversation, and the shape of answers. Never
loads or unloads a model: a request without words is answered as if it had been done.

What is asked for and would be left aside in silence is refused, but for options that tune a runner: those, num_ctx
among them, belong to the server. Sampling that neither the request nor the model's files name is Ollama's.

Sources: Ollama's API documentation; the types and defaults of its Go client, of version 0.33.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from mooli.frontend.generation import Generation
from mooli.frontend.inputs import CallInputs, GenerateCall, Ids
from mooli.frontend.parts import PLAIN_TEXT, Part, PartReader, WireFormat, parser_for
from mooli.frontend.tool_messages import read_tools
from mooli.server.conversation import Conversation, open_conversation
from mooli.server.json_body import check_count
from mooli.server.ollama_models import timestamp
from mooli.server.openai import require_tokenizer
from mooli.server.openai_chat import chat_logprobs, effort_arguments, thinking_arguments
from mooli.server.routing import (
    JSON_LINES,
    Access,
    Client,
    Dialect,
    EventStream,
    HttpError,
    Incoming,
    ModelName,
    Reply,
    Route,
    json_line,
)
from mooli.server.service import Service

NAMES = {
    "max_new_tokens": "num_predict",
    "repetition_penalty": "repeat_penalty",
    "sampling_seed": "seed",
    "top_logprobs_num": "top_logprobs",
    "json_schema": "format",
}

DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
"""Ollama's, where neither the request nor the model's files nor the operator say anything."""

ROLES = ("system", "user", "assistant", "tool")

LEVELS = ("low", "medium", "high", "max")
"""Of `think`, which true and false say too."""

_NO_TIME = re.compile(r"[+-]?0+(\.0*)?[a-zµ]*")
"""A duration of nothing: 0, 0s, 0.0m."""


# -- bodies ------------------------------------------------------------------------------------------------------------
class Options(msgspec.Struct, kw_only=True):
    """What of `options` has an effect. num_predict: negative for as many tokens as the context has room for. seed:
    negative draws one. top_k: 0 for all tokens."""

    num_predict: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def sampling_params(self) -> dict[str, Any]:
        """What is given, in Mooli's names; `num_predict` is left to who knows the prompt's length."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        params: dict[str, Any] = {
            "temperature": self.temperature,
            "top_k": -1 if self.top_k is not None and self.top_k <= 0 else self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "stop": [text for text in stop or () if text] or None,
            "sampling_seed": None if self.seed is None or self.seed < 0 else self.seed,
            "repetition_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }
        return {name: value for name, value in params.items() if value is not None}


class AnswerBody(msgspec.Struct, kw_only=True):
    """What chat and generate have in common. model: any name is served. stream: true unless false. format: "json" or a
    JSON schema. think: whether, or how much. keep_alive: changes nothing, but for 0 without words."""

    model: ModelName | None = None
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: Options | None = None
    think: bool | str | None = None
    keep_alive: float | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class Message(msgspec.Struct, kw_only=True):
    """tool_calls: each a `function` with its name and an object of arguments. tool_name, tool_call_id: of a result,
    whose it is."""

    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: list[Any] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class ChatBody(AnswerBody, kw_only=True):
    """POST /api/chat."""

    messages: list[Message] | None = None
    tools: list[Any] | None = None


class GenerateBody(AnswerBody, kw_only=True):
    """POST /api/generate. raw: the prompt is the model's whole input. suffix: what comes behind the answer."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[Any] | None = None


# -- requests ----------------------------------------------------------------------------------------------------------
async def chat(service: Service, request: Incoming) -> Reply | EventStream:
    """POST /api/chat. Raises RequestError, ChatTemplateError or EngineError."""
    started_s = time.perf_counter()
    body: ChatBody = request.body
    if not body.messages:
        return _without_words(service, body, {"message": {"role": "assistant", "content": ""}})
    most = service.config.max_request_items
    check_count("messages", sum(1 + len(message.tool_calls or ()) for message in body.messages), most)
    check_count("tools", len(body.tools or ()), most)
    messages = [_told(message, f"messages[{i}]") for i, message in enumerate(body.messages)]
    conversation = Conversation(
        messages=messages,
        tools=read_tools(body.tools),
        template_arguments=_thinking(service, body),
        continues=messages[-1]["role"] == "assistant" and bool(messages[-1]["content"]),
        owner=service.owner_of(request.client.caller),
    )
    opened = await open_conversation(service, conversation, _sampling(service, body))
    del conversation, messages
    return await _answer(service, request.client, body, *opened, is_chat=True, started_s=started_s)


async def generate(service: Service, request: Incoming) -> Reply | EventStream:
    """POST /api/generate. Raises as `chat`."""
    started_s = time.perf_counter()
    body: GenerateBody = request.body
    _check_served(body)
    prompt = body.prompt or ""
    if not prompt and not body.suffix:
        return _without_words(service, body, {"response": ""})
    tokenizer = require_tokenizer(service)
    params = _sampling(service, body)
    wire_format: WireFormat = PLAIN_TEXT
    ids: Ids
    if body.suffix:
        infill = service.require_infill("suffix")
        params["stop_token_ids"] = infill.stop_token_ids(params.get("stop_token_ids"))
        ids = await service.encode_infill(infill, prompt, body.suffix)
    elif body.raw or (tokenizer.chat_template is None and not body.system):
        service.rules.check_length(prompt)
        ids = await service.tokenize(prompt)
    else:
        system = [{"role": "system", "content": body.system}] if body.system else []
        conversation = Conversation(
            messages=[*system, {"role": "user", "content": prompt}],
            template_arguments=_thinking(service, body),
        )
        ids, params, wire_format = await open_conversation(service, conversation, params)
    return await _answer(
        service, request.client, body, ids, params, wire_format, is_chat=False, started_s=started_s
    )  # fmt: skip


def _check_served(body: GenerateBody) -> None:
    """Raises HttpError (400) that names a field which asks for what is not done."""
    if body.raw and (body.template or body.system or body.context):
        raise HttpError(400, "raw mode does not support template, system, or context")
    for name, instead in (
        ("template", "the model's own is used, unless raw is true"),
        ("context", "send the whole conversation to /api/chat"),
        ("images", "only text is read here"),
    ):
        if getattr(body, name):
            raise HttpError(400, f"{name} is not supported by this server: leave it out ({instead})", param=name)


def _told(message: Message, where: str) -> dict[str, Any]:
    """A message in OpenAI's shape. Raises HttpError."""
    role = message.role.lower()
    if role not in ROLES:
        raise HttpError(400, f"{where}.role={message.role[:40]!r} is none of {', '.join(ROLES)}", param="messages")
    if message.images:
        raise HttpError(400, f"{where}.images is not supported by this server: only text is read", param="messages")
    told: dict[str, Any] = {"role": role, "content": message.content or ""}
    for name, value in (
        ("reasoning_content", message.thinking),
        ("tool_calls", message.tool_calls),
        ("name", message.tool_name),
        ("tool_call_id", message.tool_call_id),
    ):
        if value:
            told[name] = value
    return told


def _thinking(service: Service, body: AnswerBody) -> dict[str, Any]:
    """What the template is told of reasoning. Raises HttpError."""
    think = body.think
    if think is None or think == "":
        return {}
    if not isinstance(think, bool) and think not in LEVELS:
        words = ", ".join(LEVELS)
        raise HttpError(400, f"think={think[:40]!r} is none of true, false, {words}", param="think")
    if think and service.wire_format.name is None:
        raise HttpError(400, f"{(body.model or service.model_name)!r} does not support thinking", param="think")
    return thinking_arguments(think) if isinstance(think, bool) else effort_arguments(think, "think")


def _sampling(service: Service, body: AnswerBody) -> dict[str, Any]:
    """Raises HttpError for a format that is neither."""
    given = {} if body.options is None else body.options.sampling_params()
    if isinstance(body.format, dict):
        given["json_schema"] = json.dumps(body.format)
    elif body.format == "json":
        given["json_schema"] = json.dumps({"type": "object"})
    elif body.format:
        raise HttpError(400, f"format={body.format[:40]!r} is neither 'json' nor a JSON schema", param="format")
    preferred = service.engine_config.preferred_sampling
    own = {name: value for name, value in DEFAULTS.items() if name not in preferred}
    # The model's own lie over Ollama's, and under what is given.
    return {**own, **service.chat_sampling({**given, "n": 1})}


# -- answers -----------------------------------------------------------------------------------------------------------
def _without_words(service: Service, body: AnswerBody, fields: dict[str, Any]) -> Reply:
    """To who wants the model loaded, or unloaded."""
    is_over = body.keep_alive is not None and _NO_TIME.fullmatch(f"{body.keep_alive}") is not None
    head = {"model": body.model or service.model_name, "created_at": timestamp()}
    return Reply({**head, **fields, "done": True, "done_reason": "unload" if is_over else "load"})


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a body says of its answer. started_s: when the request came, by time.perf_counter."""

    model: str
    is_chat: bool
    has_logprobs: bool
    started_s: float


async def _answer(
    service: Service,
    client: Client,
    body: AnswerBody,
    ids: Ids,
    params: dict[str, Any],
    wire_format: WireFormat,
    *,
    is_chat: bool,
    started_s: float,
) -> Reply | EventStream:
    num_predict = None if body.options is None else body.options.num_predict
    if num_predict is not None:
        room = service.facts.context_length - len(ids)
        # Without room the rules refuse the prompt itself, with a better reason.
        params["max_new_tokens"] = None if num_predict < 0 else min(num_predict, room) if room > 0 else num_predict
    has_logprobs = bool(body.logprobs)
    call = GenerateCall(
        input_ids=ids,
        sampling_params=params,
        return_logprob=has_logprobs,
        top_logprobs_num=body.top_logprobs if has_logprobs else None,
        stream=body.stream is not False,
    )
    inputs = await service.prepare(call, client.caller)
    shape = _Shape(body.model or service.model_name, is_chat, has_logprobs, started_s)
    if inputs.is_stream:
        return EventStream(_lines(service, inputs, wire_format, shape), JSON_LINES)
    with service.start(inputs, wire_format=wire_format) as answering:
        answer = _Answer(service, answering.generations[0], wire_format, shape)
        async for _ in answering.changes():
            answer.look()
        answering.raise_if_failed()
        return Reply(await answer.whole())


async def _lines(service: Service, inputs: CallInputs, wire_format: WireFormat, shape: _Shape) -> AsyncIterator[bytes]:
    """The last line says why it ended, and has no words: not all clients read some there."""
    with service.start(inputs, wire_format=wire_format) as call:
        answer = _Answer(service, call.generations[0], wire_format, shape)
        async for _ in call.changes():
            call.generations[0].raise_if_failed()
            answer.look()
            said = b"".join([json_line(entry) for entry in await answer.take()])
            if said:
                yield said


class _Answer:
    """One sequence, as lines or as a whole."""

    def __init__(self, service: Service, generation: Generation, wire_format: WireFormat, shape: _Shape) -> None:
        self._tokenizer = require_tokenizer(service)
        self._reader = PartReader(
            generation,
            parser_for(wire_format, generation.request, self._tokenizer),
            stream_interval=service.engine_config.stream_interval,
            shows_tokens=shape.has_logprobs,
        )
        self._threads = service.text_threads
        self._generation = generation
        self._shape = shape
        self._call = Part("call_begin")
        self._arguments = ""
        self._submitted_s = time.perf_counter()
        self._first_s: float | None = None

    def look(self) -> None:
        """Something has come: the first of it ends the time of the prompt."""
        if self._first_s is None and self._generation.output_ids:
            self._first_s = time.perf_counter()

    async def take(self) -> list[dict[str, Any]]:
        """The lines that are due."""
        parts = self._reader.take()
        lines = []
        words = self._words(parts)
        if words or (self._shape.has_logprobs and any(part.logprobs for part in parts)):
            lines.append({**self._head(words), **await self._logprobs(parts), "done": False})
        if parts and parts[-1].kind == "end":
            lines.append({**self._head({}), **self._end()})
        return lines

    async def whole(self) -> dict[str, Any]:
        """Of a sequence that has ended; instead of `take`."""
        parts = self._reader.take()
        return {**self._head(self._words(parts)), **await self._logprobs(parts), **self._end()}

    def _words(self, parts: Sequence[Part]) -> dict[str, Any]:
        """What parts say, by Ollama's names. A call is told when it is whole."""
        words: dict[str, Any] = {}
        for part in parts:
            if part.kind in ("text", "reasoning") and part.text:
                name = "content" if part.kind == "text" else "thinking"
                words[name] = words.get(name, "") + part.text
            elif part.kind == "call_begin":
                self._call, self._arguments = part, ""
            elif part.kind == "arguments":
                self._arguments += part.text
            elif part.kind == "call_end":
                function = {"index": part.call, "name": self._call.text, "arguments": _object(self._arguments)}
                words.setdefault("tool_calls", []).append({"id": self._call.call_id, "function": function})
        return words

    def _head(self, words: dict[str, Any]) -> dict[str, Any]:
        said: dict[str, Any]
        if self._shape.is_chat:
            said = {"message": {"role": "assistant", "content": "", **words}}
        else:
            said = {"response": words.get("content", "")}
            if "thinking" in words:
                said["thinking"] = words["thinking"]
        return {"model": self._shape.model, "created_at": timestamp(), **said}

    async def _logprobs(self, parts: Sequence[Part]) -> dict[str, Any]:
        if not self._shape.has_logprobs:
            return {}
        items = [item for part in parts for item in part.logprobs]
        num_entries = len(items) * (1 + self._generation.request.num_top_logprobs)
        shown = await self._threads.run(num_entries, lambda: chat_logprobs(self._tokenizer, items))
        return {"logprobs": shown["content"]}

    def _end(self) -> dict[str, Any]:
        """Why, and how long it took: in nanoseconds, of which clients make tokens a second. Raises HttpError for an
        answer that was ended from outside: the API has no word for it."""
        generation, now_s = self._generation, time.perf_counter()
        finish = generation.finish
        if finish is None or finish.type in ("abort", "error"):
            raise HttpError(503, "The request was aborted." if finish is None else finish.message or "Aborted.")
        first_s = now_s if self._first_s is None else self._first_s
        return {
            "done": True,
            "done_reason": finish.type,
            "total_duration": _nanoseconds(now_s - self._shape.started_s),
            "load_duration": _nanoseconds(self._submitted_s - self._shape.started_s),
            "prompt_eval_count": generation.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(first_s - self._submitted_s),
            "eval_count": len(generation.output_ids),
            "eval_duration": _nanoseconds(now_s - first_s),
        }


def _object(arguments: str) -> Any:
    """Of a call. An empty object where the model wrote none."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return {}


def _nanoseconds(seconds: float) -> int:
    return max(1, round(seconds * 1e9))


ROUTES = tuple(
    Route(
        path=path,
        methods=("POST",),
        handler=handler,
        access=Access.KEY,
        dialect=Dialect.OLLAMA,
        summary=summary,
        body=body,
        names={**NAMES, "input_ids": prompt},
        is_generation=True,
    )
    for path, handler, body, prompt, summary in (
        ("/api/chat", chat, ChatBody, "messages", "The next message of a conversation (Ollama's)"),
        ("/api/generate", generate, GenerateBody, "prompt", "Answer or continue a prompt (Ollama's)"),
    )
)
