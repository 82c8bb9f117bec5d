"""Tools of the Messages API: what a template is told of them and of their histories, and a coding agent's request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from fake_engine import CONTEXT, EOS, says
from live import LiveServer

from mooli.frontend.chat_template import ChatTemplate

USER = {"role": "user", "content": "Q"}
TEMPLATE = (
    "{% for t in tools or [] %}<{{ t.function.name }}{% if t.function.parameters.required %}!{% endif %}>{% endfor %}"
    "{% for m in messages %}{{ m.role[0] }}{% if m.name %}.{{ m.name }}{% endif %}:{% if m.reasoning_content %}"
    "({{ m.reasoning_content }}){% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }}{% for k, v in c.function.arguments | items %} {{ k }}={{ v }}{% endfor %}]{% endfor %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
LOOK = {
    "name": "look", "description": "Looks.",
    "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
}  # fmt: skip
FIND = {"name": "find", "type": "custom", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """For tests that leave nothing behind. `prompts`: what came to the model."""
    prompts: list[str] = []
    goes_on = says("Hi", after="\na:")

    def next_token(context: list[int]) -> int | None:
        text = bytes(i for i in context if i < EOS).decode(errors="ignore")
        if text.endswith("\na:"):
            prompts.append(text)
        return goes_on(context)

    server = LiveServer(next_token, engine={"context_length": 400})
    server.service.tokenizer.chat_template = ChatTemplate(TEMPLATE)
    server.prompts = prompts
    yield server
    server.stop()


def ask(server: LiveServer, **body: Any) -> Any:
    server.prompts.clear()
    return server.http.post("/v1/messages", json={"model": "m", "max_tokens": 20, "messages": [USER], **body})


def prompt(server: LiveServer, **body: Any) -> str:
    reply = ask(server, **body)
    assert reply.status_code == 200, reply.text
    (written,) = server.prompts
    return str(written)


# -- tools -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ({}, "<look!><find>"),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, "<look!><find>"),
        ({"tool_choice": {"type": "none"}}, ""),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 3}, LOOK]}, "<look!>"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, ""),
        ({"tools": [{**LOOK, "strict": True, "defer_loading": True, "eager_input_streaming": True}]}, "<look!>"),
    ],
)
def test_a_template_is_told_of_the_tools_that_the_client_calls(server, body, shown):
    assert prompt(server, **{"tools": [LOOK, FIND], **body}) == f"{shown}u:Q\na:"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{**LOOK, "input_schema": {"type": "array"}}]}, "tools[0].input_schema must be a JSON schema"),
        ({"tools": [LOOK, LOOK]}, "two functions of the name 'look'"),
        ({"tools": [LOOK], "tool_choice": {"type": "sometimes"}}, "tool_choice"),
        ({"tools": [LOOK], "tool_choice": {"type": "tool", "name": "find"}}, "tool_choice names 'find'"),
        ({"tools": [LOOK], "tool_choice": {"type": "tool"}}, "tool_choice names no function"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}], "tool_choice": {"type": "any"}}, "tools is empty"),
    ],
)
def test_a_tool_or_a_choice_that_is_wrong_is_named(server, body, named):
    reply = ask(server, **body)
    assert reply.status_code == 400 and named in reply.json()["error"]["message"], reply.text


# -- histories ---------------------------------------------------------------------------------------------------------
def use(name: str, call_id: str, **given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": given}


def result(call_id: str, content: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def said(*blocks: Any) -> list[dict[str, Any]]:
    return [USER, {"role": "assistant", "content": list(blocks)}]


def answered(calls: list[Any], *results: Any) -> list[dict[str, Any]]:
    return [*said(*calls), {"role": "user", "content": list(results)}]


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "xx"}}


@pytest.mark.parametrize(
    ("messages", "lines"),
    [
        (answered([text("hm"), use("look", "1", at="é")], result("1", "seen")), ["a:hm[look at=é]", "t.look:seen"]),
        # Results stand in the order of the calls, before what the user says with them.
        (
            answered(
                [use("look", "1", at="x"), use("find", "2")],
                text("go"), result("2", "B"), result("1", [text("A"), text("a")]),
            ),
            ["a:[look at=x][find]", "t.look:A", "a", "t.find:B", "u:go"],
        ),
        (answered([use("find", "1")], result("1", "no", is_error=True)), ["a:[find]", "t.find:Error: no"]),
        (answered([use("find", "1")], result("1", "An error.", is_error=True)), ["a:[find]", "t.find:An error."]),
        (answered([use("find", "1")], result("1", [text("A"), IMAGE])), ["a:[find]", "t.find:A", "[image]"]),
        (answered([use("find", "1")], result("1")), ["a:[find]", "t.find:"]),
        # One result of two is missing: that is the model's to see.
        (answered([use("look", "1"), use("find", "2")], result("2", "B")), ["a:[look][find]", "t.find:B"]),
        (
            answered([{"type": "thinking", "thinking": "r", "signature": "s"}, use("find", "1")], result("1", "B")),
            ["a:(r)[find]", "t.find:B"],
        ),
        # Tools of Anthropic's own servers leave nothing behind but what was said.
        (
            answered(
                [
                    {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}, text("so"),
                    {"type": "web_search_tool_result", "content": []},
                ],
                text("and"),
            ),
            ["a:so", "u:and"],
        ),
        (
            [*said(text("one")), *answered([use("find", "1")], result("1", "B"))[1:]],
            ["a:one", "[find]", "t.find:B"],
        ),
    ],
)  # fmt: skip
def test_a_history_with_calls_reaches_the_template(server, messages, lines):
    assert prompt(server, messages=messages).splitlines()[1:-1] == lines


def test_messages_of_the_system_are_part_of_the_system_prompt(server):
    messages = [USER, {"role": "system", "content": [text("Mind the date.")]}, {"role": "user", "content": "R"}]
    assert prompt(server, messages=messages, system="Be brief.") == "s:Be brief.\nMind the date.\nu:Q\nR\na:"
    assert prompt(server, messages=messages[:2]) == "s:Mind the date.\nu:Q\na:"


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        (said(use("look", "1")), "ends with a tool_use"),
        (said({"type": "tool_use", "id": "1", "input": {}}), "messages[1].content[0] must have a name"),
        (said({"type": "tool_use", "id": "1", "name": "f", "input": "x"}), "an input, which is an object"),
        (answered([use("f", "1")], result("1", 3)), "messages[2].content[0].content must be"),
        (answered([use("f", "1")], result("1", [{}])), "messages[2].content[0].content[0] has no type"),
        ([{"role": "user", "content": [IMAGE]}], "is of type 'image'"),
        (said({"type": "redacted_thinking", "data": "x"}), "'redacted_thinking'"),
    ],
)  # fmt: skip
def test_a_history_that_is_wrong_is_named(server, messages, named):
    reply = ask(server, messages=messages)
    assert reply.status_code == 400 and named in reply.json()["error"]["message"], reply.text


# -- a coding agent ----------------------------------------------------------------------------------------------------
AGENT = {
    "model": "any-name", "max_tokens": 32000, "stream": True, "metadata": {"user_id": "u"},
    "thinking": {"type": "adaptive", "display": "omitted"}, "output_config": {"effort": "medium"},
    "context_management": {"edits": [{"type": "clear_thinking", "keep": "all"}]},
    "system": [
        text("billing: none"), {**text("You write code."), "cache_control": {"type": "ephemeral"}},
        {**text("Be brief."), "cache_control": {"type": "ephemeral", "ttl": "1h"}},
    ],
    "tools": [
        *({"name": f"T{i}", "description": "d", "input_schema": {"$schema": "x", "type": "object"}} for i in range(11)),
        {**LOOK, "defer_loading": True},
    ],
    "messages": [
        {"role": "user", "content": [text("Fix it."), {**text("Now."), "cache_control": {"type": "ephemeral"}}]},
        {"role": "system", "content": "Mode: plan."},
    ],
}  # fmt: skip
"""The shape of what Claude Code sends: every kind of field, in few words."""

HEADERS = {"anthropic-beta": "claude-code-20250219,context-management-2025-06-27", "authorization": "Bearer x"}


def test_a_coding_agents_request_and_its_second_turn_are_answered(server):
    def post(messages: Any) -> list[Any]:
        server.prompts.clear()
        body = {**AGENT, "messages": messages}
        reply = server.http.post("/v1/messages?beta=true", json=body, headers=HEADERS)
        assert reply.status_code == 200, reply.text
        return [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: ")]

    events = post(AGENT["messages"])
    assert events[-1]["type"] == "message_stop" and events[-2]["delta"]["stop_reason"] == "end_turn"
    shown = "".join(f"<T{i}>" for i in range(11)) + "<look!>"
    opening = f"{shown}s:billing: none\nYou write code.\nBe brief.\nMode: plan.\nu:Fix it.\nNow.\n"
    assert server.prompts == [f"{opening}a:"]
    turn = [{"role": "assistant", "content": [use("look", "toolu_1", at="x")]}]
    turn.append({"role": "user", "content": [result("toolu_1", "File not found", is_error=True)]})
    events = post([*AGENT["messages"], *turn])
    assert server.prompts == [f"{opening}a:[look at=x]\nt.look:Error: File not found\na:"]
    assert events[0]["message"]["usage"]["cache_read_input_tokens"] >= len(f"{opening}a:") // 4 * 4


def test_clients_can_read_how_much_is_too_long(server):
    reply = ask(server, messages=[{"role": "user", "content": "x" * 500}])
    assert reply.json()["error"]["message"] == "prompt is too long: 505 tokens > 399 maximum"
    assert CONTEXT < 400  # what the server was given


def test_anthropics_client_counts_tools_and_histories(server):
    messages: Any = [*said(use("find", "1")), {"role": "user", "content": [result("1", "B")]}]
    with anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0) as client:
        counted = client.messages.count_tokens(model="m", messages=messages, tools=[FIND])  # type: ignore[list-item]
    assert counted.input_tokens == len("<find>u:Q\na:[find]\nt.find:B\na:")
