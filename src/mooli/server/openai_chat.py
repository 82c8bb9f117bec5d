"""POST /v1/chat/completions: a conversation in, the assistant's next message out, in OpenAI's shape.

Owns what is particular to chats: messages and their parts, the template's arguments, the model's own sampling defaults,
and the shape of a choice. Source: OpenAI API reference, chat; SGLang's extensions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import msgspec

from mooli.errors import RequestError
from mooli.frontend.cache_report import Told
from mooli.frontend.generation import Generation
from mooli.frontend.inputs import CallInputs, GenerateCall
from mooli.frontend.parts import Part, PartKind, WireFormat, parser_for
from mooli.frontend.retention import Mark, Place
from mooli.frontend.tokenizer import Tokenizer
from mooli.frontend.tool_messages import read_tools, text_argument
from mooli.frontend.tools import ToolSet
from mooli.server.conversation import Conversation, open_conversation, pins_of, told_of
from mooli.server.errors import in_names
from mooli.server.json_body import check_count, num_entries
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
from mooli.types import FinishReason, TokenLogprobs

NAMES = {**COMMON_NAMES, "input_ids": "messages", "top_logprobs_num": "top_logprobs"}

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]

_OWN_ARGUMENTS = frozenset(
    (
        "messages", "conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize",
        "tokenizer", "chat_template", "parse_special_in_content", "self",
    )
)  # fmt: skip
"""What `chat_template_kwargs` must not change: the request has its own fields for it, or it guards the conversation."""


EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""Words of `reasoning_effort`; a number from 0 to 1 says it as well."""


class ChatMessage(msgspec.Struct, kw_only=True):
    """One message. content: a text or parts: texts, and of the assistant's its reasoning ("thinking"). reasoning:
    another name for reasoning_content."""

    role: Role
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None
    function_call: dict[str, Any] | None = None
    refusal: str | None = None
    audio: Any = None

    def as_mapping(self) -> dict[str, Any]:
        """What was said of it, in OpenAI's shape."""
        said = {name: getattr(self, name) for name in self.__struct_fields__ if name not in ("reasoning", "audio")}
        if self.reasoning_content is None:
            said["reasoning_content"] = self.reasoning
        return {name: value for name, value in said.items() if value is not None}


class ChatBody(GenerationBody, kw_only=True):
    """POST /v1/chat/completions.

    reasoning_effort, or `effort` and `enabled` of reasoning: said to the template, which also hears as `thinking` and
    `enable_thinking` whether to reason at all. separate_reasoning: false tells the text as it is. stream_reasoning:
    false gives the reasoning of a stream in one piece. functions, function_call: OpenAI's older names for tools and the
    choice between them; the answer then has the older shape too.
    """

    messages: list[ChatMessage]
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | float | None = None
    reasoning: dict[str, Any] | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    rid: str | None = None


async def chat_completions(service: Service, request: Incoming) -> Reply | EventStream:
    """Raises HttpError for a request that is wrong, and what `Call.changes` raises."""
    body: ChatBody = request.body
    refuse_unsupported(request.unsupported)
    require_tokenizer(service)
    tools = read_functions(body)
    inputs, wire_format, told = await _prepare(service, body, tools, request.client)
    shape = AnswerShape.of(service, body, has_logprobs=bool(body.logprobs))
    inquiry = await inquiry_of(service, body, inputs, request.client, told)
    shape = replace(shape, streams_reasoning=body.stream_reasoning is not False, inquiry=inquiry)
    writer = _FunctionCalls() if body.functions else _ToolCalls(tools)
    del request, body
    kind = "chat.completion.chunk" if inputs.is_stream else "chat.completion"
    open_choice = functools.partial(ChatChoice, service, shape, wire_format, writer)
    return await answer(service, inputs, shape, kind, open_choice, wire_format)


async def _prepare(
    service: Service, body: ChatBody, tools: ToolSet | None, client: Client
) -> tuple[CallInputs, WireFormat, Told]:
    """Also what the template was told. Raises HttpError."""
    length_name, max_tokens = _length(body)
    if body.top_logprobs and not body.logprobs:
        raise HttpError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    given = sampling_params(body)
    if max_tokens is not None:
        given["max_new_tokens"] = max_tokens
    owner = service.owner_of(client.caller, cache_salt(body))
    conversation = replace(conversation_of(service, body, tools), owner=owner)
    opened = await open_conversation(service, conversation, given)
    call = GenerateCall(
        input_ids=opened.input_ids,
        sampling_params=opened.sampling_params,
        return_logprob=bool(body.logprobs),
        top_logprobs_num=body.top_logprobs,
        stream=bool(body.stream),
        rid=body.rid,
        priority=body.priority,
        cache_salt=cache_salt(body),
        no_store=bool(body.no_store),
        return_cache_report=bool(body.return_cache_report),
        session_id=body.session_id,
        pin=await pins_of(service, _marks(body), conversation, own=body.pin),
    )
    told = told_of(service, conversation)
    try:
        return await service.prepare(call, client.caller), opened.wire_format, told
    except RequestError as exc:
        raise in_names(exc, Dialect.OPENAI, {**NAMES, "max_new_tokens": length_name}) from exc


def _marks(body: ChatBody) -> list[Mark]:
    """What of the prompt is to be kept. Raises HttpError."""
    contents = ((Place("message", i), message.content) for i, message in enumerate(body.messages))
    return openai_marks(body.prompt_cache_retention, body.prompt_cache_options, contents)


def read_functions(body: ChatBody) -> ToolSet | None:
    """The tools of a body, or its functions. Raises RequestError."""
    if not body.functions and body.function_call in (None, "none", "auto"):
        return read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    if body.tools:
        raise HttpError(400, "functions is an older name for tools: give one of them", param="functions")
    functions = [{"type": "function", "function": function} for function in body.functions or ()]
    return read_tools(
        functions, body.function_call, parallel=False, tools_name="functions", choice_name="function_call"
    )


def conversation_of(service: Service, body: ChatBody, tools: ToolSet | None = None) -> Conversation:
    """Raises HttpError."""
    most = service.config.max_request_items
    for i, message in enumerate(body.messages):
        if message.audio:
            raise HttpError(400, f"messages[{i}].audio is not supported by this server: leave it out", param="messages")
    lists = [value for message in body.messages for value in (message.content, message.tool_calls)]
    check_count("messages", len(lists) // 2 + sum(len(value) for value in lists if isinstance(value, list)), most)
    check_count("tools", 0 if tools is None else len(tools.for_template()), most)
    return Conversation(
        messages=[message.as_mapping() for message in body.messages],
        tools=tools,
        template_arguments=_template_arguments(service, body),
        continues=bool(body.continue_final_message),
        tells_reasoning_apart=body.separate_reasoning is not False,
    )


def _length(body: ChatBody) -> tuple[str, int | None]:
    """The most tokens of the answer, None for what the context leaves, and the name of the field that says so."""
    if body.max_completion_tokens is None:
        return "max_tokens", body.max_tokens
    if body.max_tokens not in (None, body.max_completion_tokens):
        raise HttpError(
            400,
            f"max_completion_tokens={body.max_completion_tokens} and max_tokens={body.max_tokens} differ: give one",
            param="max_tokens",
        )
    return "max_completion_tokens", body.max_completion_tokens


# -- the conversation ------------------------------------------------------------------------------------------------
def _template_arguments(service: Service, body: ChatBody) -> dict[str, Any]:
    given = body.chat_template_kwargs or {}
    check_count("chat_template_kwargs", num_entries(given), service.config.max_request_items)
    for name in given:
        if name in _OWN_ARGUMENTS:
            raise HttpError(
                400, f"chat_template_kwargs must not have {name!r}: it is not the template's to say",
                param="chat_template_kwargs",
            )  # fmt: skip
    is_continued = bool(body.continue_final_message)
    if is_continued and body.add_generation_prompt:
        raise HttpError(
            400, "continue_final_message and add_generation_prompt exclude each other", param="add_generation_prompt"
        )
    return {
        **_reasoning_arguments(body),
        **given,
        "add_generation_prompt": not is_continued and body.add_generation_prompt is not False,
    }


def _reasoning_arguments(body: ChatBody) -> dict[str, Any]:
    """What the template is told of reasoning. Raises HttpError."""
    asked: Mapping[str, Any] = body.reasoning or {}
    enabled = asked.get("enabled")
    if enabled is not None and not isinstance(enabled, bool):
        raise HttpError(400, f"reasoning.enabled must be true or false, not {str(enabled)[:80]!r}", param="reasoning")
    if body.reasoning_effort is not None:
        return effort_arguments(body.reasoning_effort, "reasoning_effort")
    if asked.get("effort") is not None and enabled is not False:
        return effort_arguments(asked["effort"], "reasoning")
    return {} if enabled is None else thinking_arguments(enabled)


def effort_arguments(effort: Any, name: str) -> dict[str, Any]:
    """What templates read of how much to reason. name: of the field that says it. Raises HttpError."""
    is_number = isinstance(effort, (int, float)) and not isinstance(effort, bool) and 0 <= effort <= 1
    if not is_number and effort not in EFFORTS:
        words = ", ".join(EFFORTS)
        raise HttpError(400, f"{name}={str(effort)[:80]!r} is none of {words}, nor a number of 0 … 1", param=name)
    return {"reasoning_effort": effort, **thinking_arguments(effort not in ("none", 0))}


def thinking_arguments(is_on: bool) -> dict[str, Any]:
    """Both names under which templates read whether to reason."""
    return {"thinking": is_on, "enable_thinking": is_on}


# -- the answer ------------------------------------------------------------------------------------------------------
class _ToolCalls:
    """Calls as entries of `tool_calls`. One of a tool that takes a text says it when it is whole.

    tools: those that may be called.
    """

    finish_reason = "tool_calls"

    def __init__(self, tools: ToolSet | None) -> None:
        self._texts = frozenset(tool.name for tool in (() if tools is None else tools.tools) if tool.takes_text)

    def begun(self, part: Part) -> dict[str, Any]:
        if part.text in self._texts:
            return {"id": part.call_id, "type": "custom", "custom": {"name": part.text, "input": ""}}
        return {"id": part.call_id, "type": "function", "function": {"name": part.text, "arguments": ""}}

    def delta(self, index: int, entry: dict[str, Any]) -> dict[str, Any]:
        """entry: of `begun`, or {"function": {"arguments": …}}, or the same of a custom tool."""
        return {"tool_calls": [{"index": index, **entry}]}

    def message(self, calls: list[dict[str, Any]]) -> dict[str, Any]:
        return {"tool_calls": calls}


class _FunctionCalls:
    """The one call there can be in OpenAI's older shape, which has no id."""

    finish_reason = "function_call"

    def begun(self, part: Part) -> dict[str, Any]:
        return {"function": {"name": part.text, "arguments": ""}}

    def delta(self, index: int, entry: dict[str, Any]) -> dict[str, Any]:
        return {} if index else {"function_call": entry["function"]}

    def message(self, calls: list[dict[str, Any]]) -> dict[str, Any]:
        return {"function_call": calls[0]["function"]}


class ChatChoice:
    """One sequence as the `choices` entries of chunks: who speaks, what is said, why it ended."""

    def __init__(
        self,
        service: Service,
        shape: AnswerShape,
        wire_format: WireFormat,
        writer: _ToolCalls | _FunctionCalls,
        index: int,
        generation: Generation,
    ) -> None:
        self._tokenizer = require_tokenizer(service)
        parser = parser_for(wire_format, generation.request, self._tokenizer)
        self.reader = shape.reader(service, generation, parser)
        self._threads = service.text_threads
        self._shape = shape
        self._writer = writer
        self._index = index
        self._generation = generation
        self._calls: list[dict[str, Any]] = []
        """Those that have begun: of a function without its arguments, of a custom tool with what there is of them."""
        self._has_whole_call = False

    async def take(self) -> list[dict[str, Any]]:
        """The entries that are due: the first says who speaks, the last why it ended."""
        entries = []
        for part in self.reader.take():
            if part.kind == "begin":
                role = {"role": "assistant", "content": "", "reasoning_content": None}
                entries.append({**self._entry("delta", role), **self._prompt_ids()})
            elif part.kind == "end":
                if (said := self._rest_of_text()) is not None:
                    entries.append(self._entry("delta", said))
                entries.append(self._entry("delta", {"reasoning_content": None}, self._generation.finish))
            elif (said := self._said(part)) is not None or self._shape.shows_tokens:
                delta = {"content": "", "reasoning_content": None} if said is None else said
                entries.append({**self._entry("delta", delta), **await self._token_fields([part])})
        return entries

    async def whole(self) -> dict[str, Any]:
        parts = self.reader.take()
        calls = self._calls
        for part in parts:
            if part.kind == "call_begin":
                calls.append(self._writer.begun(part))
            elif part.kind == "arguments":
                function = calls[-1].get("function")
                if function is not None:
                    function["arguments"] += part.text
                else:
                    calls[-1]["custom"]["input"] += part.text
            self._has_whole_call |= part.kind == "call_end"
        for call in calls:
            if "custom" in call:
                call["custom"]["input"] = text_argument(call["custom"]["input"])
        reasoning = _joined(parts, "reasoning")
        message: dict[str, Any] = {
            "role": "assistant",
            "content": _joined(parts, "text") or (None if calls else ""),
            **(_reasoning(reasoning) if reasoning else {"reasoning_content": None}),
            **(self._writer.message(calls) if calls else {}),
        }
        fields = await self._token_fields(parts)
        return {**self._entry("message", message, self._generation.finish), **self._prompt_ids(), **fields}

    def _said(self, part: Part) -> dict[str, Any] | None:
        """The delta of a part between the first and the last; None for one that says nothing yet."""
        if part.kind == "call_begin":
            self._calls.append(self._writer.begun(part))
            return self._writer.delta(part.call, self._writer.begun(part))
        if part.kind == "call_end":
            self._has_whole_call = True
            return self._rest_of_text()
        if not part.text:
            return None
        if part.kind == "reasoning":
            return _reasoning(part.text)
        if part.kind == "arguments":
            if "custom" not in self._calls[-1]:
                return self._writer.delta(part.call, {"function": {"arguments": part.text}})
            self._calls[-1]["custom"]["input"] += part.text
            return None
        return {"content": part.text, "reasoning_content": None}

    def _rest_of_text(self) -> dict[str, Any] | None:
        """Of a custom tool whose call is over: the text for it."""
        arguments = self._calls[-1].get("custom", {}).pop("input", "") if self._calls else ""
        if not arguments:
            return None
        return self._writer.delta(len(self._calls) - 1, {"custom": {"input": text_argument(arguments)}})

    def _entry(self, name: str, words: dict[str, Any], finish: FinishReason | None = None) -> dict[str, Any]:
        fields = finish_fields(finish, called=self._writer.finish_reason if self._has_whole_call else None)
        return {"index": self._index, name: words, "logprobs": None, **fields}

    async def _token_fields(self, parts: Sequence[Part]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self._shape.has_logprobs:
            items = [item for part in parts for item in part.logprobs]
            num_entries = len(items) * (1 + self._generation.request.num_top_logprobs)
            fields["logprobs"] = await self._threads.run(num_entries, lambda: chat_logprobs(self._tokenizer, items))
        if self._shape.returns_ids:
            fields["token_ids"] = [token_id for part in parts for token_id in part.token_ids]
        return fields

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._generation.request.prompt_ids.tolist()} if self._shape.returns_ids else {}


def _reasoning(text: str) -> dict[str, Any]:
    """Under SGLang's name, and under the one that vLLM's clients read."""
    return {"reasoning_content": text, "reasoning": text}


def _joined(parts: Sequence[Part], kind: PartKind) -> str:
    return "".join(part.text for part in parts if part.kind == kind)


def chat_logprobs(tokenizer: Tokenizer, items: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Log-probabilities in the shape of chats."""
    content = []
    for item in items:
        entry = _chat_entry(tokenizer, item.token_id, item.logprob)
        entry["top_logprobs"] = [_chat_entry(tokenizer, token_id, logprob) for logprob, token_id in item.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def _chat_entry(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    text = tokenizer.token_text(token_id)
    raw: list[int] | None
    if tokenizer.is_byte_level:
        raw = list(tokenizer.token_bytes(token_id))
    else:
        raw = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": LOWEST if logprob is None else max(logprob, LOWEST), "bytes": raw}


ROUTES = (
    Route(
        path="/v1/chat/completions",
        methods=("POST",),
        handler=chat_completions,
        access=Access.KEY,
        dialect=Dialect.OPENAI,
        summary="Continue a conversation (OpenAI's chat completions)",
        body=ChatBody,
        unsupported=UNSUPPORTED - frozenset(ChatBody.__struct_fields__),
        names=NAMES,
        is_generation=True,
    ),
)
