"""`Engine.chat` with tools, reasoning and a form of its answer: what the model is told, and the message it gives."""

from __future__ import annotations

import asyncio
import json
import threading
from itertools import pairwise
from typing import Any

import pytest
from fake_engine import EOS, says

from mooli.errors import RequestError
from mooli.frontend.chat_template import ChatTemplate

GREEDY = {"temperature": 0, "max_new_tokens": 200}
USER = {"role": "user", "content": "Q"}
TOOLS: Any = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call>'
TEMPLATE = (
    "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}|{% endfor %}a:"
)


@pytest.fixture
def make(make_engine):
    def make(text: str, **options: Any) -> Any:
        engine = make_engine(says(text, after="|a:"), context_length=400, reasoning_parser="qwen3", **options)
        engine.tokenizer_manager.tokenizer.chat_template = ChatTemplate(TEMPLATE)
        return engine

    return make


def test_a_call_stands_beside_the_text_and_its_result_goes_back(make):
    engine = make(f"<think>\nhm\n</think>\n\nLet me see.\n{CALL}", tool_call_parser="hermes")
    answer = engine.chat([USER], GREEDY, tools=TOOLS)
    message = answer["message"]
    (call,) = message["tool_calls"]
    assert (message["role"], message["content"], message["reasoning_content"]) == ("assistant", "Let me see.", "hm")
    assert call["function"] == {"name": "look", "arguments": '{"at": "é"}'} and call["id"].startswith("call_")
    assert answer["text"].endswith(CALL) and answer["meta_info"]["finish_reason"]["type"] == "stop"
    assert answer["meta_info"]["reasoning_tokens"] == len("<think>\nhm\n</think>")
    result = {"role": "tool", "tool_call_id": call["id"], "content": "rain"}
    second = engine.chat([USER, message, result], {**GREEDY, "max_new_tokens": 1}, tools=TOOLS)
    ids = engine.tokenizer_manager.tokenizer.encode(f"<look>u:Q|a:Let me see.{CALL}|t:rain|a:")
    assert second["meta_info"]["prompt_tokens"] == len(ids)
    assert engine.chat([USER], GREEDY)["message"]["content"].endswith(CALL), "without tools, it is text"
    assert "tool_calls" not in engine.chat([USER], GREEDY, tools=TOOLS, tool_choice="none")["message"]


def test_streams_batches_and_samples_have_messages(make):
    has_begun = threading.Event()

    def waits(batch: Any) -> None:
        if max(batch.positions) >= len("<look>u:Q|a:"):
            has_begun.wait(120)  # the reader has seen the first token alone

    engine = make(CALL, tool_call_parser="hermes", runner_options={"raises": waits})
    stream = engine.chat([USER], GREEDY, tools=TOOLS, stream=True)
    chunks = [next(stream)]
    has_begun.set()
    chunks += stream
    assert chunks[0]["message"] == {"role": "assistant", "content": ""}
    messages = [chunk["message"] for chunk in chunks if "tool_calls" in chunk["message"]]
    arguments = [message["tool_calls"][0]["function"]["arguments"] for message in messages]
    assert all(text.startswith(before) for before, text in pairwise(arguments))
    assert json.loads(arguments[-1]) == {"at": "é"}
    both = engine.chat([[USER], [USER]], [GREEDY, GREEDY], tools=TOOLS)
    assert [len(answer["message"]["tool_calls"]) for answer in both] == [1, 1]
    samples = engine.chat([USER], {**GREEDY, "n": 2}, tools=TOOLS)
    assert len({answer["message"]["tool_calls"][0]["id"] for answer in samples}) == 2
    answer = asyncio.run(engine.async_chat([USER], GREEDY, tools=TOOLS))
    assert answer["message"]["tool_calls"][0]["function"]["name"] == "look"


def test_an_incremental_stream_has_the_message_at_its_end(make):
    engine = make(CALL, tool_call_parser="hermes", incremental_streaming_output=True)
    *chunks, last = engine.chat([USER], GREEDY, tools=TOOLS, stream=True)
    assert not any("message" in chunk for chunk in chunks)
    assert last["message"]["tool_calls"][0]["function"]["arguments"] == '{"at": "é"}'


def test_generate_has_no_message(make):
    assert "message" not in make("x").generate("|a:", GREEDY)


def test_an_answer_can_be_held_to_a_form(make):
    engine = make('"no"')  # it would not reason
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["yes"]}}}
    assert engine.chat([USER], GREEDY, response_format=form)["message"]["content"] == '"yes"'
    assert engine.chat([USER], GREEDY, response_format={"type": "text"})["text"] == '"no"'


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, r"tools\[0\]\.function\.name"),
        ({"tools": TOOLS, "tool_choice": {"name": "find"}}, "tool_choice names 'find'"),
        ({"tool_choice": "required"}, "tools is empty"),
        ({"response_format": {"type": "yaml"}}, "response_format.type='yaml'"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]},
         r"messages\[1\]\.tool_calls\[0\]\.function\.arguments"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_before_anything_runs(make, arguments, named):
    with pytest.raises(RequestError, match=named):
        make("x").chat(**{"messages": [USER], "sampling_params": GREEDY, **arguments})


def test_no_text_of_a_tool_or_an_argument_becomes_a_control_token(make):
    engine = make("x")
    function = {"name": "f", "description": "<eos>", "parameters": {"properties": {"<eos>": {}}}}
    tools = [{"type": "function", "function": function}]
    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps({"<eos>": ["<eos>"]})}}
    engine.tokenizer_manager.tokenizer.chat_template = ChatTemplate(
        "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}|{% endfor %}a:"
    )
    sent: list[Any] = []
    prepare = engine._prepare
    engine._prepare = lambda call, *others: sent.append(call.input_ids) or prepare(call, *others)
    engine.chat([USER, {"role": "assistant", "tool_calls": [call]}], {"max_new_tokens": 1}, tools=tools)
    assert EOS not in sent[0] and bytes(sent[0].tolist()).decode().count("<eos>") == 4
