"""/separate_reasoning and /parse_function_call: formats by name, those of the model, and what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from live import LiveServer

from mooli.frontend.wire_formats.choice import MessageFormat
from mooli.frontend.wire_formats.hermes import Hermes
from mooli.frontend.wire_formats.reasoning import REASONING_FORMATS

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a":  1, "b": "é"}}\n</tool_call>'


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """Of a model without reasoning, and with calls in Hermes's form."""
    made = LiveServer()
    yield made
    made.stop()


def ask(server: LiveServer, path: str, **body: Any) -> Any:
    reply = server.http.post(path, json=body)
    return reply.json() if reply.status_code == 200 else (reply.status_code, reply.json()["error"]["message"])


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("qwen3", "<think>\nhm\n</think>\n\nyes", ("hm", "yes")),
        ("qwen3", "yes", ("", "yes")),
        ("deepseek-r1", "hm</think>yes", ("hm", "yes")),
        ("gpt-oss", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|message|>yes", ("hm", "yes")),
        ("qwen3", "", ("", "")),
    ],
)  # fmt: skip
def test_a_format_is_found_by_its_name(server, name, text, told):
    answer = ask(server, "/separate_reasoning", text=text, reasoning_parser=name)
    assert (answer["reasoning_text"], answer["text"]) == told


def test_without_a_name_it_is_that_of_the_model(live):
    server = live()
    server.service.wire_format = MessageFormat(REASONING_FORMATS["qwen3"], Hermes("hermes"))
    text = f"<think>hm</think>so {CALL}"
    assert ask(server, "/separate_reasoning", text=text) == {"reasoning_text": "hm", "text": f"so {CALL}"}
    calls = ask(server, "/parse_function_call", text=f"so {CALL}", tools=TOOLS)["calls"]
    assert calls == [{"tool_index": 0, "name": "f", "parameters": '{"a": 1, "b": "é"}'}]


def test_calls_are_found_and_what_is_cut_is_none(server):
    text = f"so\n{CALL}{CALL}{CALL[:40]}"
    answer = ask(server, "/parse_function_call", text=text, tools=TOOLS, tool_call_parser="qwen")
    assert [(call["tool_index"], call["name"]) for call in answer["calls"]] == [(0, "f"), (1, "f")]
    assert answer["normal_text"].startswith("so")
    assert ask(server, "/parse_function_call", text=text, tools=[]) == {"normal_text": text, "calls": []}


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/separate_reasoning", {"text": "x"}, "nothing is known of reasoning in this model's answers"),
        ("/separate_reasoning", {"text": "x", "reasoning_parser": "none"}, "reasoning_parser='none' is none of "),
        ("/separate_reasoning", {"text": 1}, "text"),
        ("/parse_function_call", {"text": "x", "tools": TOOLS, "tool_call_parser": "x"}, "tool_call_parser='x' is"),
        ("/parse_function_call", {"text": "x" * 2**20 + "y", "tools": TOOLS}, "1048577 characters"),
        ("/parse_function_call", {"text": "x", "tools": [{}]}, "tools[0]"),
        ("/parse_function_call", {"text": "x"}, "tools"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(server, path, body, words):
    status, message = ask(server, path, **body)
    assert status == 400 and words in message, message


def test_a_model_whose_calls_nobody_knows(live):
    server = live(engine={"tool_call_parser": "none"})
    status, message = ask(server, "/parse_function_call", text="x", tools=TOOLS)
    assert status == 400 and "nothing is known of how this model writes calls" in message
