"""A model that describes its own messages, over HTTP: reasoning, words and calls, whole and in a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import EOS
from live import LiveServer

from mooli.frontend.chat_template import ChatTemplate
from mooli.frontend.wire_formats.choice import open_wire_format

RESPONSE_TEMPLATE = {
    "start_anchor": "a:",
    "fields": {
        "thinking": {"open": "<t>", "close": "</t>"},
        "content": {},
        "tool_calls": {
            "open_pattern": r"<call (?P<name>\w+)>",
            "close": "</call>",
            "content": "json",
            "content_args": {"unquoted_keys": True},
            "repeats": True,
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
    },
}
ANSWER = "hm</t>\nI look. <call look>{at: 1}</call><call look>{}</call>"
TOOLS: Any = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """The prompt begins the reasoning."""

    def next_token(context: list[int]) -> int | None:
        written = bytes(i if i < EOS else 0 for i in context).rpartition(b"a:<t>")[2]
        return ANSWER.encode()[len(written)] if len(written) < len(ANSWER) else EOS

    server = LiveServer(next_token, engine={"context_length": 400})
    tokenizer = server.service.tokenizer
    tokenizer.chat_template = ChatTemplate("{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}a:<t>")
    tokenizer.response_template = RESPONSE_TEMPLATE
    server.service.wire_format = open_wire_format(server.engine_config, tokenizer)
    yield server
    server.stop()


BODY = {"messages": [{"role": "user", "content": "x"}], "temperature": 0, "tools": TOOLS}


def test_a_whole_answer_has_its_parts(server):
    (choice,) = server.http.post("/v1/chat/completions", json=BODY).json()["choices"]
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "I look.")
    assert choice["finish_reason"] == "tool_calls"
    calls = [call["function"] for call in message["tool_calls"]]
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [("look", {"at": 1}), ("look", {})]


def test_a_stream_has_the_same_parts(server):
    lines = server.http.post("/v1/chat/completions", json={**BODY, "stream": True}).text.splitlines()
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "hm"
    assert "".join(delta.get("content") or "" for delta in deltas) == "I look."
    calls = [call for delta in deltas for call in delta.get("tool_calls") or []]
    assert [call["index"] for call in calls if call.get("id")] == [0, 1]
    assert "".join(call["function"].get("arguments") or "" for call in calls) == '{"at": 1}{}'


def test_a_grammar_beside_the_tools_is_refused_by_name(server):
    reply = server.http.post("/v1/chat/completions", json={**BODY, "response_format": {"type": "json_object"}})
    assert reply.status_code == 400
    assert "response_template says how calls are read, and not how they are written" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "named", [{}, {"reasoning_parser": "response_template", "tool_call_parser": "response_template"}]
)
def test_a_text_that_is_there_already_is_read_by_the_models_own_template(server, named):
    text = "<t>hm</t> a <call look>{at: 1}</call>"
    body = {"text": text, **{key: name for key, name in named.items() if key == "reasoning_parser"}}
    told = server.http.post("/separate_reasoning", json=body).json()
    assert told == {"reasoning_text": "hm", "text": "a <call look>{at: 1}</call>"}
    body = {"text": told["text"], "tools": TOOLS} | {k: name for k, name in named.items() if k == "tool_call_parser"}
    told = server.http.post("/parse_function_call", json=body).json()
    assert told == {"normal_text": "a", "calls": [{"tool_index": 0, "name": "look", "parameters": '{"at": 1}'}]}
