"""Forced calls, formats behind reasoning and bounds on reasoning over HTTP: what a model wants and what it may say."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import EOS
from live import LiveServer

from mooli.frontend.chat_template import ChatTemplate

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'tools' if tools else '' }}"
    "a:{% if enable_thinking is false %}<think>\n\n</think>\n\n{% elif enable_thinking %}<think>\n{% endif %}"
)
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["x"],
    "additionalProperties": False,
}
WANTED = "hm, hm</think>\n\nno call"


def tool(name: str, parameters: Any = POINT, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


TOOLS = [tool("look"), tool("find", {"type": "object", "properties": {"s": {"enum": ["é"]}}, "required": ["s"]})]
FORM = {"type": "json_schema", "json_schema": {"name": "p", "schema": POINT}}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """A model that wants to say WANTED where its prompt opens reasoning, and anything at all elsewhere."""

    def next_token(context: list[int]) -> int | None:
        written = bytes(i if i < EOS else 0 for i in context)
        _, opened, said = written.rpartition(b"<think>\n")
        return WANTED.encode()[len(said)] if opened and len(said) < len(WANTED) else None

    options = {"context_length": 400, "reasoning_parser": "qwen3", "tool_call_parser": "hermes"}
    server = LiveServer(next_token, engine=options)
    server.service.tokenizer.chat_template = ChatTemplate(TEMPLATE)
    yield server
    server.stop()


def ask(server: LiveServer, **body: Any) -> Any:
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    asked = {"messages": [{"role": "user", "content": "q"}], "temperature": 1.5, "max_tokens": 150, "seed": 1}
    reply = server.http.post(CHAT, json={**asked, **thinking, **body})
    return reply.json()["choices"][0] if reply.status_code == 200 else (reply.status_code, reply.json()["error"])


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "find"}}])
def test_a_forced_call_comes_behind_the_reasoning_and_is_of_its_schema(server, thinks, choice):
    answer = ask(
        server, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False,
        chat_template_kwargs={"enable_thinking": thinks},
    )  # fmt: skip
    assert answer["finish_reason"] == "tool_calls"
    message = answer["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm, hm" if thinks else None, None)
    (call,) = message["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert arguments["s"] == "é" if call["function"]["name"] == "find" else arguments["x"] in range(10)
    assert call["function"]["name"] == "find" or choice == "required"


@pytest.mark.parametrize(
    ("form", "right"),
    [
        ({"response_format": FORM}, lambda text: json.loads(text)["x"] in range(10)),
        ({"guided_regex": "[ab]{3}"}, lambda text: len(text) == 3 and set(text) <= {*"ab"}),
        ({"ebnf": 'root ::= "x" "y"'}, "xy".__eq__),
        ({"structured_outputs": {"choice": ["no", "yes"]}}, lambda text: text in ("no", "yes")),
    ],
)
@pytest.mark.parametrize("thinks", [True, False])
def test_a_form_holds_behind_reasoning_and_at_once_where_there_is_none(server, form, right, thinks):
    answer = ask(server, **form, chat_template_kwargs={"enable_thinking": thinks})
    assert answer["finish_reason"] == "stop"
    assert answer["message"]["reasoning_content"] == ("hm, hm" if thinks else None)
    assert right(answer["message"]["content"])


def test_a_form_beside_tools_is_for_answers_that_are_no_calls(server):
    # Frameworks say in every turn which form the last answer has.
    forced = ask(server, tools=TOOLS, tool_choice="required", response_format=FORM)
    assert forced["message"]["tool_calls"]
    status, error = ask(server, tools=TOOLS, tool_choice="required", regex="a+")
    assert status == 400 and "a tool must be called" in error["message"]
    answer = ask(server, tools=TOOLS, response_format=FORM)
    calls = answer["message"].get("tool_calls")
    assert calls or json.loads(answer["message"]["content"])["x"] in range(10)


def test_a_schema_that_cannot_be_enforced_is_refused_with_its_place_and_function(server):
    wrong = [*TOOLS, tool("bad", {"type": "object", "properties": {"y": {"uniqueItems": True}}})]
    status, error = ask(server, tools=wrong, tool_choice="required")
    assert (status, error["param"]) == (400, "tools")
    assert "uniqueItems cannot be enforced (at #/properties/y/uniqueItems)" in error["message"]
    assert '"bad"' in error["message"]
    assert ask(server, tools=wrong)["finish_reason"] in ("stop", "length"), "free calls are held to nothing"


@pytest.mark.parametrize(
    "fields",
    [{"max_thinking_tokens": 4}, {"thinking_token_budget": 4}, {"custom_params": {"thinking_budget": 4}}],
)
def test_a_bound_on_reasoning(server, fields):
    answer = ask(server, **fields, response_format=FORM)
    assert answer["message"]["reasoning_content"] == "hm, "[:4].strip()
    assert json.loads(answer["message"]["content"])["x"] in range(10)
    assert ask(server, **fields, max_tokens=20)["message"]["reasoning_content"] == "hm,"


def test_a_bound_in_the_other_routes(server):
    body = {"text": "<think>\n", "max_thinking_tokens": 4, "sampling_params": {"max_new_tokens": 12}}
    assert server.http.post("/generate", json=body).json()["text"] == "hm, </think>"
    claude = {
        "model": "m", "messages": [{"role": "user", "content": "q"}], "max_tokens": 1100,
        "thinking": {"type": "enabled", "budget_tokens": 1024}, "temperature": 0,
    }  # fmt: skip
    answer = server.http.post(MESSAGES, json=claude).json()
    assert answer["content"][0] == {"type": "thinking", "thinking": "hm, hm"}
    status, error = ask(server, max_thinking_tokens=1, thinking_token_budget=2)
    assert status == 400 and error["param"] == "thinking_token_budget"


def test_a_bound_where_there_is_no_reasoning_is_refused():
    server = LiveServer()
    try:
        reply = server.http.post("/v1/completions", json={"prompt": "a", "max_thinking_tokens": 5})
        assert reply.status_code == 400 and "nothing is known of reasoning" in reply.json()["message"]
    finally:
        server.stop()


def test_a_form_that_becomes_too_large_in_the_middle_is_the_sender_s_error(monkeypatch):
    monkeypatch.setattr("mooli.grammar.language.MAX_LEXER_STATES", 60)
    letters = random.Random(1).choices(b"ab", k=400)
    has_begun = threading.Event()

    def waits(batch: Any) -> None:
        if max(batch.positions) >= len("user: q\nassistant: ") + 3:
            has_begun.wait(120)  # the client has seen a part: what fails before is answered with a status

    server = LiveServer(lambda context: letters[len(context)], runner={"raises": waits})
    body = {"messages": [{"role": "user", "content": "q"}], "regex": "(a|b)*a(a|b){9}x", "max_tokens": 100}
    try:
        with server.http.stream("POST", CHAT, json={**body, "stream": True}) as reply:
            chunks: list[Any] = []
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    chunks.append(json.loads(line[6:]))
                    if "choices" in chunks[-1] and chunks[-1]["choices"][0]["delta"].get("content"):
                        has_begun.set()
        said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks[:-1])
        assert said and set(said) <= {*"ab"}, "what there is of it is told"
        assert "became too large" in chunks[-1]["error"]["message"] and chunks[-1]["error"]["code"] is None
        assert chunks[-1]["error"]["type"] == "invalid_request_error"
        whole = server.http.post(CHAT, json=body)
        assert whole.status_code == 400, whole.text
        assert "became too large" in whole.json()["message"]
    finally:
        server.stop()
