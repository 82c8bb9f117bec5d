"""Every dialect, over all ways to cut a sequence: its joined stream is its whole answer."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec
import pytest
from fake_engine import EOS, byte_tokenizer, fake_build
from responses_stream import joined_responses
from wire_formats import BracketFormat

from mooli.config import EngineConfig
from mooli.frontend.parts import PLAIN_TEXT, WireFormat
from mooli.frontend.wire_formats.reasoning import REASONING_FORMATS
from mooli.server import ollama
from mooli.server.anthropic import MessagesBody, create_message
from mooli.server.bring_up import make_service
from mooli.server.config import ServerConfig
from mooli.server.native_generate import GenerateBody, generate
from mooli.server.openai_chat import ChatBody, chat_completions
from mooli.server.openai_completions import CompletionBody, completions
from mooli.server.openai_responses import LOGPROBS, ResponsesBody, create_response
from mooli.server.routing import Client, EventStream, Incoming, Reply
from mooli.server.service import Service
from mooli.types import FinishReason, RequestOutput, TokenLogprobs

FACTS = fake_build(EngineConfig.from_kwargs(model_path="fake")).facts

Handler = Callable[[Service, Incoming], Awaitable["Reply | EventStream"]]


class ScriptedLink:
    """Stands for the engine: says what it is told to, when it is told to."""

    facts = FACTS
    num_open = 0

    def submit(self, requests: Any, sinks: Any) -> None:
        self.requests, self.sinks = requests, sinks

    def say(self, ids: list[int]) -> None:
        """One step: these tokens of each sequence."""
        for request, sink in zip(self.requests, self.sinks, strict=True):
            finish = FinishReason("stop", matched=EOS) if EOS in ids else None
            logprobs = [TokenLogprobs(i, -1.0 - i, top=[(-0.5, 97), (-1.0 - i, i)]) for i in ids]
            prompt = [TokenLogprobs(i, None if n == 0 else -2.0) for n, i in enumerate(request.prompt_ids.tolist())]
            given = prompt if request.logprob_start == 0 else None
            sink(RequestOutput(request.rid, ids, finish, 9, 9, 3, logprobs=logprobs, prompt_logprobs=given))

    def name_of(self, rid: str) -> str:
        return rid

    def finish(self, request: Any, matched: str) -> None: ...

    def drop(self, requests: Any, reason: str) -> None: ...


def steps_of(ids: list[int]) -> Iterator[list[list[int]]]:
    """All ways to cut tokens into steps."""
    for mask in range(2 ** (len(ids) - 1)):
        edges = [0, *(i for i in range(1, len(ids)) if mask >> (i - 1) & 1), len(ids)]
        yield [ids[start:end] for start, end in itertools.pairwise(edges)]


async def answered(handler: Handler, body: Any, steps: list[list[int]], **options: Any) -> str | Any:
    """What comes back, while the engine says `steps`: each is read before the next."""
    wire_format: WireFormat = options.pop("wire_format", PLAIN_TEXT)
    link = ScriptedLink()
    engine_config = EngineConfig.from_kwargs(model_path="fake", random_seed=7, **options)
    service = make_service(ServerConfig(), engine_config, link, byte_tokenizer(), started_s=0.0)  # type: ignore[arg-type]
    service.wire_format = wire_format
    incoming = Incoming(body=body, unsupported={}, query={}, path_params={}, headers={}, client=Client())

    async def whole() -> str:
        reply = await handler(service, incoming)
        if isinstance(reply, Reply):
            return json.dumps(reply.content)
        return b"".join([piece async for piece in reply.pieces]).decode()

    reading = asyncio.ensure_future(whole())
    for step in steps:
        for _ in range(20):  # more than it takes until everything waits
            await asyncio.sleep(0)
        link.say(step)
    return await reading


def events(text: str) -> list[Any]:
    if text.startswith("{"):  # lines of JSON
        return [json.loads(line) for line in text.splitlines()]
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


# -- each dialect's client: one answer from its events -----------------------------------------------------------------
def joined_chat(chunks: list[Any]) -> dict[str, Any]:
    usage = chunks.pop()["usage"]
    message: dict[str, Any] = {"role": None, "content": "", "reasoning_content": ""}
    choice: dict[str, Any] = {"index": 0, "message": message, "logprobs": None, "token_ids": []}
    for (entry,) in [chunk["choices"] for chunk in chunks]:
        delta = entry["delta"]
        message["role"] = delta.get("role", message["role"])
        message["content"] += delta.get("content") or ""
        message["reasoning_content"] += delta.get("reasoning_content") or ""
        assert delta.get("reasoning") == delta.get("reasoning_content")
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if call["index"] == len(calls):
                calls.append({name: call[name] for name in ("id", "type", "function")})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        if entry["logprobs"]:
            shown = choice["logprobs"] = choice["logprobs"] or {"content": [], "refusal": None}
            shown["content"] += entry["logprobs"]["content"]
        choice["token_ids"] += entry.get("token_ids", [])
        choice.update(
            {name: entry[name] for name in ("finish_reason", "matched_stop", "prompt_token_ids") if name in entry}
        )
    message["reasoning_content"] = message["reasoning_content"] or None
    if message["reasoning_content"]:
        message["reasoning"] = message["reasoning_content"]
    if "tool_calls" in message:
        message["content"] = message["content"] or None
    return {"choices": [choice], "usage": usage}


def joined_completions(chunks: list[Any]) -> dict[str, Any]:
    usage = chunks.pop()["usage"]
    choice: dict[str, Any] = {}
    for (entry,) in [chunk["choices"] for chunk in chunks]:
        if not choice:
            choice = entry
            continue
        choice["text"] += entry["text"]
        choice["token_ids"] += entry["token_ids"]
        for name, items in entry["logprobs"].items():
            choice["logprobs"][name] += items
        choice.update({name: entry[name] for name in ("finish_reason", "matched_stop")})
    return {"choices": [choice], "usage": usage}


def joined_anthropic(given: list[Any]) -> dict[str, Any]:
    kinds = [event["type"] for event in given]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    message = given[0]["message"]
    arguments: dict[int, str] = {}
    open_block = None
    for event in given:
        if event["type"] == "content_block_start":
            assert open_block is None and event["index"] == len(message["content"])
            open_block = event["index"]
            message["content"].append(event["content_block"])
        elif event["type"] == "content_block_delta":
            assert event["index"] == open_block
            kind, delta = event["delta"].pop("type"), event["delta"]
            ((name, text),) = delta.items()
            if kind == "input_json_delta":
                arguments[open_block] = arguments.get(open_block, "") + text
            else:
                message["content"][open_block][name] += text
        elif event["type"] == "content_block_stop":
            assert event["index"] == open_block
            open_block = None
        elif event["type"] == "message_delta":
            message.update(event["delta"])
            message["usage"].update(event["usage"])
    for index, text in arguments.items():
        message["content"][index]["input"] = json.loads(text)
    return message


def joined_ollama(given: list[Any]) -> dict[str, Any]:
    """A client may leave the words of the last line aside."""
    assert [line["done"] for line in given] == [False] * (len(given) - 1) + [True]
    whole = given[-1]
    message = whole.get("message", whole)
    name = "content" if message is not whole else "response"
    assert not message.get(name) and "thinking" not in message and "tool_calls" not in message
    for line in given[:-1]:
        said = line.get("message", line)
        for key in (name, "thinking"):
            if key in said:
                message[key] = message.get(key, "") + said[key]
        if "tool_calls" in said:
            message["tool_calls"] = message.get("tool_calls", []) + said["tool_calls"]
        if "logprobs" in line:
            whole["logprobs"] = whole.get("logprobs", []) + line["logprobs"]
    return whole


def joined_native(chunks: list[Any]) -> dict[str, Any]:
    """Of chunks that hold what is new."""
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole["text"] += chunk["text"]
        whole["output_ids"] += chunk["output_ids"]
        for name, value in chunk["meta_info"].items():
            if isinstance(value, list):
                whole["meta_info"][name] += value
            else:
                whole["meta_info"][name] = value
    return whole


USER = [{"role": "user", "content": "hi"}]
SHOWN = {"stop": ["<c"], "return_token_ids": True, "rid": "r"}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


NATIVE = {
    "text": "say>", "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2, "rid": "r",
    "return_prompt_token_ids": True, "sampling_params": {"stop": ["<c"]},
}  # fmt: skip


def last(chunks: list[Any]) -> Any:
    return chunks[-1]


DIALECTS: dict[str, tuple[Any, ...]] = {
    "chat": (chat_completions, ChatBody, {"messages": USER, **SHOWN}, STREAM, joined_chat, {}),
    "chat with log-probabilities": (
        chat_completions, ChatBody, {"messages": USER, "logprobs": True, "top_logprobs": 2, **SHOWN}, STREAM,
        joined_chat, {},
    ),
    "completions": (
        completions, CompletionBody, {"prompt": "say>", "echo": True, "logprobs": 2, "max_tokens": 99, **SHOWN}, STREAM,
        joined_completions, {},
    ),
    "anthropic": (
        create_message, MessagesBody,
        {"model": "m", "messages": USER, "max_tokens": 50, "stop_sequences": ["<c"]}, {"stream": True},
        joined_anthropic, {},
    ),
    "ollama chat": (
        ollama.chat, ollama.ChatBody,
        {"messages": USER, "options": {"stop": ["<c"]}, "logprobs": True, "top_logprobs": 2, "stream": False},
        {"stream": True}, joined_ollama, {},
    ),
    "ollama generate": (
        ollama.generate, ollama.GenerateBody, {"prompt": "hi", "options": {"stop": "<c"}, "stream": False},
        {"stream": None}, joined_ollama, {},
    ),
    "responses": (
        create_response, ResponsesBody, {"input": "hi", "stop": ["<c"]}, {"stream": True}, joined_responses, {},
    ),
    "responses with log-probabilities": (
        create_response, ResponsesBody,
        {"input": "hi", "stop": ["<c"], "include": [LOGPROBS], "top_logprobs": 2, "reasoning": {"summary": "auto"}},
        {"stream": True}, joined_responses, {},
    ),
    "native": (generate, GenerateBody, NATIVE, {"stream": True}, last, {}),
    "native, incremental": (
        generate, GenerateBody, NATIVE, {"stream": True}, joined_native, {"incremental_streaming_output": True},
    ),
}  # fmt: skip
"""Each a handler, its body, what makes it stream, what a client does with the events, and the engine's arguments."""


RESPONSES = ("responses", "responses with log-probabilities")


def said(answer: Any) -> Any:
    """Without what belongs to the moment or to whole answers only."""
    answer = dict(answer)
    if "choices" in answer:
        return {name: answer[name] for name in ("choices", "usage")}
    if "meta_info" in answer:
        moments = ("e2e_latency", "response_sent_to_client_ts")
        meta = {name: value for name, value in answer["meta_info"].items() if name not in moments}
        return {**answer, "meta_info": meta}
    if "done" in answer:
        return {name: value for name, value in answer.items() if name != "created_at" and "duration" not in name}
    if "output" in answer:  # ids of items are made of the answer's
        output = [{**item, "id": re.sub("_.*", "_", item["id"])} for item in answer["output"]]
        answer = {**answer, "output": output, "created_at": 0}
    return {name: value for name, value in answer.items() if name != "id"}


@pytest.mark.parametrize(
    ("handler", "body_type", "body", "streaming", "joined", "options"), DIALECTS.values(), ids=DIALECTS
)
@pytest.mark.parametrize("interval", [1, 3])
def test_a_joined_stream_is_the_whole_answer_whatever_the_cut(
    handler, body_type, body, streaming, joined, options, interval
):
    async def check() -> None:
        ids = [*"é<b".encode(), *b"a", EOS]
        whole = said(json.loads(await answered(handler, msgspec.convert(body, body_type), [ids], **options)))
        for steps in steps_of(ids):
            streamed = msgspec.convert({**body, **streaming}, body_type)
            text = await answered(handler, streamed, steps, stream_interval=interval, **options)
            assert said(joined(events(text))) == whole, steps

    asyncio.run(check())


@pytest.mark.parametrize("name", ["chat with log-probabilities", "anthropic", "ollama chat", *RESPONSES])
def test_reasoning_and_calls_of_a_wire_format_have_the_dialect_s_shape(name):
    """The dialects write parts; which there are is the format's to say. All cuts of it are tried in test_parts."""
    handler, body_type, body, streaming, joined, _ = DIALECTS[name]

    async def check() -> None:
        ids = [*b"(m)t[f:1]", EOS]
        given = msgspec.convert(body, body_type)
        whole = said(json.loads(await answered(handler, given, [ids], wire_format=BracketFormat())))
        assert shown(whole) == EXPECTED[name]
        for steps in itertools.islice(steps_of(ids), 0, None, 7):
            streamed = msgspec.convert({**body, **streaming}, body_type)
            text = await answered(handler, streamed, steps, wire_format=BracketFormat())
            assert said(joined(events(text))) == whole, steps

    asyncio.run(check())


@pytest.mark.parametrize("name", ["chat with log-probabilities", "anthropic", "ollama chat", "responses"])
@pytest.mark.parametrize("text", ["<think>m</think>\nt", "<think>\nm <", "<think></think>"])
def test_a_joined_stream_with_reasoning_is_the_whole_answer(name, text):
    """A model's format: its markers cut by steps, white space, reasoning that does not end, and an empty one."""
    handler, body_type, body, streaming, joined, _ = DIALECTS[name]
    wire_format = REASONING_FORMATS["qwen3"]

    async def check() -> None:
        ids = [*text.encode(), EOS]
        whole = said(
            json.loads(await answered(handler, msgspec.convert(body, body_type), [ids], wire_format=wire_format))
        )
        assert "<think>" not in json.dumps(whole)
        streamed = msgspec.convert({**body, **streaming}, body_type)
        for size in range(1, len(ids)):
            for first in range(1, size + 1):
                edges = [0, *range(first, len(ids), size), len(ids)]
                steps = [ids[start:end] for start, end in itertools.pairwise(edges)]
                answer = await answered(handler, streamed, steps, wire_format=wire_format)
                assert said(joined(events(answer))) == whole, steps

    asyncio.run(check())


@pytest.mark.parametrize("name", ["completions", "native"])
def test_other_dialects_tell_the_text_as_it_is(name):
    handler, body_type, body, _, _, _ = DIALECTS[name]
    given, ids = msgspec.convert(body, body_type), [*b"(m)t[f:1]", EOS]
    answer = json.loads(asyncio.run(answered(handler, given, [ids], wire_format=BracketFormat())))
    text = answer["choices"][0]["text"] if "choices" in answer else answer["text"]
    assert text.removeprefix("say>") == "(m)t[f:1]"


def shown(answer: Any) -> Any:
    if "output" in answer:
        return answer["output"], answer["status"], answer["usage"]["output_tokens_details"]["reasoning_tokens"]
    if "message" in answer:
        return answer["message"], answer["done_reason"], len(answer["logprobs"])
    if "choices" not in answer:
        return answer["content"], answer["stop_reason"]
    (choice,) = answer["choices"]
    tokens = bytes(i for i in choice["token_ids"] if i != EOS)
    return choice["message"], choice["finish_reason"], tokens, answer["usage"]["reasoning_tokens"]


LOGPROB_OF_T: dict[str, Any] = {
    "token": "t", "bytes": [ord("t")], "logprob": -1.0 - ord("t"), "top_logprobs": [
        {"token": "a", "bytes": [97], "logprob": -0.5},
        {"token": "t", "bytes": [ord("t")], "logprob": -1.0 - ord("t")},
    ],
}  # fmt: skip

EXPECTED: dict[str, Any] = {
    "ollama chat": (
        {
            "role": "assistant", "content": "t", "thinking": "m",
            "tool_calls": [{"id": "call_0", "function": {"index": 0, "name": "f", "arguments": 1}}],
        },
        "stop", 10,
    ),
    "chat with log-probabilities": (
        {
            "role": "assistant", "content": "t", "reasoning_content": "m", "reasoning": "m",
            "tool_calls": [{"id": "call_0", "type": "function", "function": {"name": "f", "arguments": "1"}}],
        },
        "tool_calls", b"(m)t[f:1]", 3,
    ),
    "anthropic": (
        [
            {"type": "thinking", "thinking": "m"}, {"type": "text", "text": "t"},
            {"type": "tool_use", "id": "call_0", "name": "f", "input": 1},
        ],
        "tool_use",
    ),
    **{
        name: (
            [
                {
                    "id": "rs_", "type": "reasoning", "status": "completed", "encrypted_content": None,
                    "summary": [], "content": [{"type": "reasoning_text", "text": "m"}],
                } if name == "responses" else {
                    "id": "rs_", "type": "reasoning", "status": "completed", "encrypted_content": None,
                    "summary": [{"type": "summary_text", "text": "m"}],
                },
                {
                    "id": "msg_", "type": "message", "status": "completed", "role": "assistant", "content": [
                        {"type": "output_text", "text": "t", "annotations": [], "logprobs": logprobs},
                    ],
                },
                {
                    "id": "fc_", "type": "function_call", "status": "completed", "call_id": "call_0", "name": "f",
                    "arguments": "1",
                },
            ],
            "completed", 3,
        )
        for name, logprobs in zip(RESPONSES, ([], [LOGPROB_OF_T]), strict=True)
    },
}  # fmt: skip
