"""Reasoning over HTTP: what chats, Anthropic's messages and /generate tell of it, and what templates are told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from fake_engine import EOS, says
from live import LiveServer

from mooli.frontend.chat_template import ChatTemplate
from mooli.frontend.parts import PLAIN_TEXT
from mooli.frontend.wire_formats.reasoning import ReasoningPair

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
USER = [{"role": "user", "content": "Q"}]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}\n{% endfor %}{{ [enable_thinking | default('-'), thinking | default('-'),"
    " reasoning_effort | default('-')] | join(',') }}|{% if enable_thinking %}<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def thinker() -> Iterator[LiveServer]:
    """A server for tests that leave nothing behind. `prompts`: what came to the model."""
    prompts: list[str] = []
    thinks, goes_on = says("<think>\nhé\n</think>\n\nyes", after="|"), says("hé\n</think>\n\nyes", after="<think>\n")

    def next_token(context: list[int]) -> int | None:
        text = bytes(i for i in context if i < EOS).decode(errors="ignore")
        if text.endswith(("|", "|<think>\n")):
            prompts.append(text)
        return (goes_on if "True" in text else thinks)(context)

    server = LiveServer(next_token, engine={"reasoning_parser": "qwen3"})
    server.service.tokenizer.chat_template = ChatTemplate(TEMPLATE)
    server.prompts = prompts
    yield server
    server.stop()


def ask(server: LiveServer, path: str = CHAT, **body: Any) -> Any:
    server.prompts.clear()
    reply = server.http.post(path, json={"model": "m", "messages": USER, "max_tokens": 60, "temperature": 0, **body})
    return reply.json() if reply.status_code == 200 else (reply.status_code, reply.text)


# -- chats -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("effort", [None, "high"])
def test_a_chat_tells_reasoning_apart(thinker, effort):
    """Opened by the model, and by the template."""
    answer = ask(thinker, reasoning_effort=effort)
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant", "content": "yes", "reasoning_content": "hé", "reasoning": "hé",
    }  # fmt: skip
    marked = "hé\n</think>" if effort else "<think>\nhé\n</think>"
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["reasoning_tokens"] == len(marked.encode())
    assert ("<think>" in thinker.prompts[0]) is (effort is not None)


def test_openais_client_streams_it(thinker):
    with openai.OpenAI(base_url=f"{thinker.url}/v1", api_key="-", max_retries=0) as client:
        stream = client.chat.completions.create(model="m", messages=USER, stream=True, temperature=0, max_tokens=60)
        deltas = [chunk.choices[0].delta for chunk in stream]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "hé"
    assert "".join(delta.content or "" for delta in deltas) == "yes"


def test_its_stream_can_have_the_reasoning_in_one_piece(thinker):
    thinker.prompts.clear()
    body = {"messages": USER, "stream": True, "stream_reasoning": False, "temperature": 0, "max_tokens": 60}
    lines = thinker.http.post(CHAT, json=body).text.splitlines()
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
    said = [delta["reasoning"] for delta in deltas if delta.get("reasoning")]
    assert said == ["hé"] and "role" in deltas[0]


def test_it_can_be_told_as_it_is(thinker):
    answer = ask(thinker, separate_reasoning=False)
    assert answer["choices"][0]["message"] == {
        "role": "assistant", "content": "<think>\nhé\n</think>\n\nyes", "reasoning_content": None,
    }  # fmt: skip
    assert answer["usage"]["reasoning_tokens"] == 0


def test_an_answer_that_ends_in_its_reasoning_has_no_words(thinker):
    (choice,) = ask(thinker, max_tokens=len(b"<think>\nh\xc3"))["choices"]
    assert choice["finish_reason"] == "length"
    assert (choice["message"]["content"], choice["message"]["reasoning_content"]) == ("", "h\ufffd")
    stopped = ask(thinker, stop=["é"])["choices"][0]
    assert (stopped["message"]["reasoning_content"], stopped["matched_stop"]) == ("h", "é")


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        (CHAT, {}, "-,-,-"),
        (CHAT, {"reasoning_effort": "none"}, "False,False,none"),
        (CHAT, {"reasoning_effort": "low"}, "True,True,low"),
        (CHAT, {"reasoning_effort": 0.5}, "True,True,0.5"),
        (CHAT, {"reasoning_effort": 0}, "False,False,0.0"),
        (CHAT, {"reasoning": {"effort": "max"}}, "True,True,max"),
        (CHAT, {"reasoning": {"enabled": False, "effort": "max"}}, "False,False,-"),
        (CHAT, {"reasoning": {"enabled": True}}, "True,True,-"),
        (CHAT, {"reasoning_effort": "low", "reasoning": {"enabled": False}}, "True,True,low"),
        (CHAT, {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "high"}, "False,True,high"),
        (CHAT, {"chat_template_kwargs": {"thinking": True}}, "-,True,-"),
        (MESSAGES, {}, "-,-,-"),
        (MESSAGES, {"thinking": {"type": "disabled"}}, "False,False,-"),
        (MESSAGES, {"thinking": {"type": "adaptive", "display": "omitted"}}, "True,True,-"),
        (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 1025}, "True,True,-"),
        (MESSAGES, {"output_config": {"effort": "high"}}, "-,-,high"),
    ],
)
def test_the_template_is_told_whether_and_how_much_to_reason(thinker, path, body, told):
    answer = ask(thinker, path, **body)
    assert isinstance(answer, dict), answer
    assert thinker.prompts[0] == f"u:Q\n{told}|" + ("<think>\n" if told.startswith("True") else "")


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        (CHAT, {"reasoning_effort": "a lot"}, "reasoning_effort='a lot' is none of none, minimal, low"),
        (CHAT, {"reasoning_effort": 2}, "nor a number of 0"),
        (CHAT, {"reasoning_effort": True}, "reasoning_effort"),
        (CHAT, {"reasoning": {"effort": ["x"]}}, "reasoning="),
        (CHAT, {"reasoning": {"enabled": "yes"}}, "reasoning.enabled must be true or false"),
        (CHAT, {"separate_reasoning": "no"}, "separate_reasoning"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "'thinking'"),
        ("/v1/completions", {"prompt": "x", "reasoning_effort": "high"}, "reasoning_effort"),
        (MESSAGES, {"thinking": {"type": "sometimes"}}, "thinking.type"),
        (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 10}}, "thinking.budget_tokens"),
        (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 2048}, "max_tokens": 2048}, "max_tokens=2048"),
        (MESSAGES, {"output_config": {"effort": "enormous"}}, "output_config.effort='enormous'"),
        (
            MESSAGES,
            {"messages": [*USER, {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}]},
            "messages[1].content[0] is of type 'redacted_thinking'",
        ),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "'thinking'"),
        (MESSAGES, {"messages": [*USER, {"role": "assistant", "content": [{"type": "thinking"}]}]}, "[0].thinking"),
    ],
)  # fmt: skip
def test_what_says_nothing_of_reasoning_is_a_400_that_names_it(thinker, path, body, named):
    status, text = ask(thinker, path, **body)
    message = json.loads(text)["error"]["message"]
    assert status == 400 and named in message, message


@pytest.mark.parametrize(
    ("path", "turn"),
    [
        (CHAT, {"content": "A", "reasoning_content": "r"}),
        (CHAT, {"content": "A", "reasoning": "r"}),
        (CHAT, {"content": [{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "A"}]}),
        (
            MESSAGES,
            {"content": [{"type": "thinking", "thinking": "r", "signature": ""}, {"type": "text", "text": "A"}]},
        ),
    ],
)
def test_the_reasoning_of_earlier_turns_reaches_the_template(thinker, path, turn):
    ask(thinker, path, messages=[*USER, {"role": "assistant", **turn}, *USER])
    assert thinker.prompts[0].startswith("u:Q\na:(r)A\nu:Q\n")


def test_an_answer_that_is_continued_does_not_begin_in_its_reasoning(thinker):
    server, before = thinker.service, thinker.service.wire_format
    server.wire_format = ReasoningPair("r1", "<think>", "</think>", starts_inside=True)
    last = {"role": "assistant", "content": "x|"}
    try:
        plain = ask(thinker, continue_final_message=True, messages=[*USER, last], max_tokens=2)
        inside = ask(thinker, max_tokens=9)
    finally:
        server.wire_format = before
    assert plain["choices"][0]["message"]["reasoning_content"] is None
    assert inside["choices"][0]["message"]["reasoning_content"] == "h"


# -- Anthropic's messages ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("is_stream", [False, True])
def test_anthropics_client_has_thinking_blocks_and_sends_them_back(thinker, is_stream):
    asked: dict[str, Any] = {"model": "m", "max_tokens": 60}
    with anthropic.Anthropic(base_url=thinker.url, api_key="-", max_retries=0) as client:
        if is_stream:
            with client.messages.stream(messages=USER, **asked) as stream:
                message = stream.get_final_message()
        else:
            message = client.messages.create(messages=USER, **asked)
        assert [(block.type, getattr(block, block.type)) for block in message.content] == [
            ("thinking", "hé"), ("text", "yes"),
        ]  # fmt: skip
        assert message.stop_reason == "end_turn"
        thinker.prompts.clear()
        second = [*USER, {"role": "assistant", "content": message.content}, *USER]
        counted = client.messages.count_tokens(model="m", messages=second, thinking={"type": "disabled"})
    assert counted.input_tokens == len("u:Q\na:(hé)yes\nu:Q\nFalse,False,-|".encode())


def test_reasoning_that_is_cut_is_a_message_of_one_block(thinker):
    message = ask(thinker, MESSAGES, max_tokens=9)
    assert message["content"] == [{"type": "thinking", "thinking": "h"}]
    assert message["stop_reason"] == "max_tokens"


# -- markers that are special tokens -----------------------------------------------------------------------------------
def test_a_special_token_is_a_marker_for_chats_and_skipped_elsewhere(live):
    ids = [257, *b"hm</m>t", EOS]
    server = live(lambda context: ids[len(context) - len(b"user: Q\nassistant: ")])
    server.prompts = []
    server.service.wire_format = ReasoningPair("marks", "<mark>", "</m>")
    message = ask(server)["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("t", "hm")
    assert ask(server, separate_reasoning=False)["choices"][0]["message"]["content"] == "hm</m>t"
    prompt = {"text": "user: Q\nassistant: ", "sampling_params": {"temperature": 0}}
    assert server.http.post("/generate", json=prompt).json()["text"] == "hm</m>t"


# -- SGLang's native route ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [False, True])
def test_generate_counts_reasoning_where_it_is_asked_to(thinker, stream):
    body = {"text": "say|", "sampling_params": {"temperature": 0, "max_new_tokens": 60}, "stream": stream}
    for asked, count in ((True, len("<think>\nhé\n</think>".encode())), (False, 0)):
        text = thinker.http.post("/generate", json={**body, "require_reasoning": asked}).text
        answers = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")] or [
            json.loads(text)
        ]
        assert answers[-1]["text"] == "<think>\nhé\n</think>\n\nyes"
        counts = [answer["meta_info"]["reasoning_tokens"] for answer in answers]
        assert counts[-1] == count and counts == sorted(counts)


def test_a_model_without_reasoning(live):
    server = live(says("<think>a</think>b", after="assistant: "))
    server.prompts = []
    assert server.service.wire_format.without_calls is PLAIN_TEXT
    assert ask(server)["choices"][0]["message"]["content"] == "<think>a</think>b"
    assert server.http.get("/model_info").json()["reasoning_parser"] is None
    reply = server.http.post("/generate", json={"text": "x", "require_reasoning": True})
    assert reply.status_code == 400 and "nothing is known of reasoning" in reply.text
    assert "reasoning_parser" not in reply.text  # advice is not for clients


def test_the_parser_is_told(thinker):
    assert thinker.http.get("/model_info").json()["reasoning_parser"] == "qwen3"
