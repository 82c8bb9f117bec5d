"""Calls of tools over HTTP: what a model writes in its own format becomes calls in OpenAI's and Anthropic's shape.

Whole and in streams; and both clients' second turn reaches the model as it wrote the first.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from fake_engine import EOS
from live import LiveServer

from mooli.frontend.chat_template import ChatTemplate

TEMPLATE = (
    "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}|{% endfor %}a:"
)


def called(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


SCRIPTS = {
    "one": called("look", at="Oslo"),
    "two": f"Let me see.\n{called('look', at='é')}\n{called('look', at='b', n=12345678901234567890)}",
    "none": "No need.",
    "text": called("write", input='a "b"\nc'),
    "cut": '<tool_call>\n{"name": "look", "arguments": {"at": "O',
    "thought": f"<think>\nhm\n</think>\n\n{called('look')}",
    "held": called("look", at="Oslo"),
}
LOOK = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {"at": {}}}}
TOOLS: Any = [{"type": "function", "function": LOOK}]
WRITE: Any = {"type": "custom", "custom": {"name": "write", "description": "Writes."}}
CLAUDE_TOOLS: Any = [{"name": "look", "description": "Looks.", "input_schema": LOOK["parameters"]}]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """The user says which script the model follows. `prompts`: what came to it. go: what the script "held" waits for
    in the middle of its arguments."""
    prompts: list[str] = []
    go = threading.Event()

    def next_token(context: list[int]) -> int | None:
        written = bytes(i if i < EOS else 0 for i in context)
        prompt, _, answer = written.rpartition(b"a:")
        if not answer:
            prompts.append(prompt.decode())
        key = prompt.decode().split("u:")[-1].split("|")[0]
        if key == "held" and answer.endswith(b'"Os') and not go.wait(60):
            raise TimeoutError("nothing of the arguments has been told")
        text = SCRIPTS.get(key, "Done.").encode()
        return text[len(answer)] if len(answer) < len(text) else EOS

    options = {"context_length": 700, "reasoning_parser": "qwen3", "tool_call_parser": "hermes"}
    server = LiveServer(next_token, engine=options)
    server.service.tokenizer.chat_template = ChatTemplate(TEMPLATE)
    server.prompts, server.go = prompts, go
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0) as client:
        yield client


def post(server: LiveServer, script: str, **body: Any) -> Any:
    server.prompts.clear()
    messages = [{"role": "user", "content": script}]
    reply = server.http.post("/v1/chat/completions", json={"messages": messages, "temperature": 0, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def chunks(server: LiveServer, script: str, **body: Any) -> list[Any]:
    messages = [{"role": "user", "content": script}]
    asked = {"messages": messages, "temperature": 0, "stream": True, **body}
    lines = server.http.post("/v1/chat/completions", json=asked).text.splitlines()
    return [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]


# -- OpenAI's chats ----------------------------------------------------------------------------------------------------
def test_calls_are_told_apart_from_the_words(server):
    (choice,) = post(server, "two", tools=TOOLS)["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me see."
    calls = choice["message"]["tool_calls"]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [
        {"at": "é"}, {"at": "b", "n": 12345678901234567890},
    ]  # fmt: skip
    assert len({call["id"] for call in calls}) == 2 and all(call["id"].startswith("call_") for call in calls)
    assert post(server, "one", tools=TOOLS)["choices"][0]["message"]["content"] is None
    (choice,) = post(server, "none", tools=TOOLS)["choices"]
    assert (choice["finish_reason"], choice["message"]) == (
        "stop", {"role": "assistant", "content": "No need.", "reasoning_content": None},
    )  # fmt: skip


@pytest.mark.parametrize("body", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_a_text_is_a_text(server, body):
    (choice,) = post(server, "one", **body)["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", SCRIPTS["one"])
    assert "tool_calls" not in choice["message"] and server.prompts == ["u:one|"]


def test_a_stream_has_the_name_first_and_then_pieces_of_the_arguments(server):
    got = chunks(server, "two", tools=TOOLS)
    assert got[0]["delta"]["role"] == "assistant"
    deltas = [call for choice in got for call in choice["delta"].get("tool_calls", ())]
    begun = [delta for delta in deltas if "id" in delta]
    assert [(delta["index"], delta["type"], delta["function"]) for delta in begun] == [
        (0, "function", {"name": "look", "arguments": ""}), (1, "function", {"name": "look", "arguments": ""}),
    ]  # fmt: skip
    for index, expected in enumerate([{"at": "é"}, {"at": "b", "n": 12345678901234567890}]):
        pieces = [delta["function"]["arguments"] for delta in deltas if delta["index"] == index]
        assert json.loads("".join(pieces)) == expected and pieces[0] == ""
    assert "".join(choice["delta"].get("content") or "" for choice in got) == "Let me see."
    assert [choice["finish_reason"] for choice in got if choice["finish_reason"]] == ["tool_calls"]


@pytest.mark.parametrize(("path", "tools"), [("/v1/chat/completions", TOOLS), ("/v1/messages", CLAUDE_TOOLS)])
def test_arguments_are_told_while_the_model_writes_them(server, path, tools):
    body = {"model": "m", "messages": [{"role": "user", "content": "held"}], "tools": tools, "max_tokens": 300}
    server.go.clear()
    told = ""
    with server.http.stream("POST", path, json={**body, "temperature": 0, "stream": True}) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                told += piece_of_arguments(json.loads(line[6:]))
            if told:
                server.go.set()
    assert json.loads(told) == {"at": "Oslo"}


def piece_of_arguments(event: Any) -> str:
    """In an event of either API."""
    if "choices" in event:
        calls = event["choices"][0]["delta"].get("tool_calls", ())
        return "".join(call["function"]["arguments"] for call in calls)
    return event.get("delta", {}).get("partial_json", "")


@pytest.mark.parametrize(("body", "reason"), [({"max_tokens": 50}, "length"), ({}, "stop"), ({"stop": ['"O']}, "stop")])
def test_a_call_that_is_cut_is_no_reason_to_end(server, body, reason):
    (choice,) = post(server, "cut", tools=TOOLS, **body)["choices"]
    assert choice["finish_reason"] == reason
    assert '{"at": "O'.startswith(choice["message"]["tool_calls"][0]["function"]["arguments"])
    assert chunks(server, "cut", tools=TOOLS, **body)[-1]["finish_reason"] == reason


def test_an_answer_that_is_cut_behind_a_call_says_that_it_is_cut(server):
    (choice,) = post(server, "two", tools=TOOLS, max_tokens=90)["choices"]
    assert (choice["finish_reason"], len(choice["message"]["tool_calls"])) == ("length", 1)


def test_samples_log_probabilities_and_reasoning_stand_beside_calls(server):
    answer = post(server, "thought", tools=TOOLS, n=2, logprobs=True, temperature=1)
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["tool_calls", "tool_calls"]
    for choice in answer["choices"]:
        message = choice["message"]
        assert (message["reasoning_content"], message["tool_calls"][0]["function"]["arguments"]) == ("hm", "{}")
        assert "".join(item["token"] for item in choice["logprobs"]["content"]).startswith(SCRIPTS["thought"])
    ids = [choice["message"]["tool_calls"][0]["id"] for choice in answer["choices"]]
    assert ids[0] != ids[1]
    plain = post(server, "thought", tools=TOOLS, separate_reasoning=False)["choices"][0]["message"]
    assert plain["content"].startswith("<think>\nhm") and plain["tool_calls"][0]["function"]["name"] == "look"
    got = chunks(server, "thought", tools=TOOLS, logprobs=True, return_token_ids=True)
    assert bytes(i for choice in got for i in choice.get("token_ids", ()) if i < EOS).decode() == SCRIPTS["thought"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_openais_client_calls_and_sends_the_result(server, client, is_stream):
    messages: list[Any] = [{"role": "user", "content": "one"}]
    if is_stream:
        with client.chat.completions.stream(model="m", messages=messages, tools=TOOLS, temperature=0) as stream:
            message = stream.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.create(model="m", messages=messages, tools=TOOLS).choices[0].message
    (call,) = message.tool_calls or ()
    assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"at": "Oslo"})
    messages += [
        message,
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
        {"role": "user", "content": "x"},
    ]
    server.prompts.clear()
    answer = client.chat.completions.create(model="m", messages=messages, tools=TOOLS)
    assert server.prompts == [f"<look>u:one|a:{SCRIPTS['one']}|t:rain|u:x|"]
    assert answer.choices[0].message.content == "Done."
    # All that is not new was in the cache, the model's own words too; pages are of 4 tokens, matches of single ones.
    first_turn = len(f"<look>u:one|a:{SCRIPTS['one']}".encode())
    assert answer.usage.prompt_tokens_details.cached_tokens >= first_turn


def test_a_choice_of_one_tool_tells_of_all_that_there_are(server):
    choice = {"type": "function", "function": {"name": "look"}}
    post(server, "none", tools=[*TOOLS, WRITE], tool_choice=choice, max_tokens=1)
    assert server.prompts == ["<look><write>u:none|"]


def test_a_custom_tool_is_given_a_text(server):
    (choice,) = post(server, "text", tools=[*TOOLS, WRITE])["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["custom"]) == ("custom", {"name": "write", "input": 'a "b"\nc'})
    got = chunks(server, "text", tools=[*TOOLS, WRITE])
    deltas = [call for entry in got for call in entry["delta"].get("tool_calls", ())]
    assert [delta["custom"] for delta in deltas] == [{"name": "write", "input": ""}, {"input": 'a "b"\nc'}]
    assert got[-1]["finish_reason"] == "tool_calls"


def test_older_clients_have_functions(server):
    functions = {"functions": [LOOK], "function_call": "auto"}
    (choice,) = post(server, "two", **functions)["choices"]
    call = choice["message"]["function_call"]
    assert (call["name"], json.loads(call["arguments"])) == ("look", {"at": "é"}) and "tool_calls" not in choice[
        "message"
    ]
    assert choice["finish_reason"] == "function_call"
    got = [
        entry["delta"]["function_call"]
        for entry in chunks(server, "two", **functions)
        if "function_call" in entry["delta"]
    ]
    assert got[0] == {"name": "look", "arguments": ""}
    assert json.loads("".join(delta["arguments"] for delta in got)) == {"at": "é"}


# -- Anthropic's messages ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("is_stream", [False, True])
def test_anthropics_client_calls_and_sends_the_result(server, claude, is_stream):
    messages: list[Any] = [{"role": "user", "content": "two"}]
    fields: Any = {"model": "m", "max_tokens": 300, "tools": CLAUDE_TOOLS}
    if is_stream:
        with claude.messages.stream(messages=messages, **fields) as stream:
            message = stream.get_final_message()
    else:
        message = claude.messages.create(messages=messages, **fields)
    assert message.stop_reason == "tool_use"
    text, first, second = message.content
    assert text.text == "Let me see." and (first.name, first.input, second.input["at"]) == ("look", {"at": "é"}, "b")
    assert first.id != second.id
    results: Any = [
        {"type": "tool_result", "tool_use_id": block.id, "content": block.input["at"]} for block in (second, first)
    ]
    messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    server.prompts.clear()
    claude.messages.create(messages=[*messages, {"role": "user", "content": "x"}], **fields)
    calls = SCRIPTS["two"].removeprefix("Let me see.\n").replace("</tool_call>\n", "</tool_call>")
    assert server.prompts == [f"<look>u:two|a:Let me see.{calls}|t:é|t:b|u:x|"]


def test_a_stream_of_anthropics_has_a_block_for_each_call(server):
    body = {"model": "m", "max_tokens": 300, "tools": CLAUDE_TOOLS, "stream": True, "temperature": 0}
    body["messages"] = [{"role": "user", "content": "thought"}]
    lines = server.http.post("/v1/messages", json=body).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    begun = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [block["type"] for block in begun] == ["thinking", "tool_use"] and begun[1]["input"] == {}
    pieces = [
        event["delta"]["partial_json"] for event in events if event.get("delta", {}).get("type") == "input_json_delta"
    ]
    assert "".join(pieces) == "{}"
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
