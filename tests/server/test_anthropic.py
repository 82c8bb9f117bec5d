"""The Messages API, driven by Anthropic's own client."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import pytest
from fake_engine import CONTEXT, says
from live import LiveServer

HELLO = [{"role": "user", "content": "Hello>"}]


def client_of(server: LiveServer, api_key: str = "anything") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=api_key, max_retries=0)


def ask(server: LiveServer, **body: Any) -> Any:
    return server.http.post("/v1/messages", json={"model": "m", "max_tokens": 20, "messages": HELLO, **body})


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it has not happened")


@pytest.fixture(scope="module")
def greeter() -> Iterator[LiveServer]:
    """One server for all tests that leave nothing behind; it says Hi."""
    server = LiveServer(says("Hi", after="assistant: "))
    yield server
    server.stop()


def test_a_message_is_answered(live):
    with client_of(live(says("Hi there", after="assistant: "))) as client:
        message = client.messages.create(model="some-model", max_tokens=20, messages=HELLO)
    assert message.id.startswith("msg_") and message.type == "message" and message.role == "assistant"
    assert message.model == "some-model"
    assert [block.type for block in message.content] == ["text"] and message.content[0].text == "Hi there"
    assert message.stop_reason == "end_turn" and message.stop_sequence is None
    assert message.usage.output_tokens == len("Hi there") + 1


def test_a_stream_is_put_together_by_the_client(live):
    server = live(says("Hi thére", after="assistant: "))
    with client_of(server) as client, client.messages.stream(model="m", max_tokens=20, messages=HELLO) as stream:
        pieces = list(stream.text_stream)
        message = stream.get_final_message()
    assert "".join(pieces) == message.content[0].text == "Hi thére"
    assert message.stop_reason == "end_turn" and message.usage.output_tokens == len("Hi thére".encode()) + 1


def test_a_stream_is_the_events_of_the_reference_in_their_order(live):
    reply = ask(live(says("ab", after="assistant: ")), stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [event.split("\n") for event in reply.text.removesuffix("\n\n").split("\n\n")]
    names = [lines[0].removeprefix("event: ") for lines in events]
    data = [json.loads(lines[1].removeprefix("data: ")) for lines in events]
    assert [item["type"] for item in data] == names
    assert names[:3] == ["message_start", "content_block_start", "ping"]
    assert set(names[3:-3]) == {"content_block_delta"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    start = data[0]["message"]
    assert start["content"] == [] and start["stop_reason"] is None and start["usage"]["output_tokens"] == 0
    assert data[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert data[-2]["usage"] == {**start["usage"], "output_tokens": 3}


def test_a_stream_interval_joins_tokens_and_loses_none(live):
    server = live(says("abcdefgh", after="assistant: "), engine={"stream_interval": 4})
    with client_of(server) as client, client.messages.stream(model="m", max_tokens=20, messages=HELLO) as stream:
        pieces = list(stream.text_stream)
    assert "".join(pieces) == "abcdefgh" and len(pieces) <= 4


def test_tokens_are_counted_as_the_engine_counts_them(live):
    server = live(says("Hi", after="assistant: "))
    with client_of(server) as client:
        counted = client.messages.count_tokens(model="m", messages=HELLO, system="Be brief.").input_tokens
        usage = client.messages.create(model="m", max_tokens=9, messages=HELLO, system="Be brief.").usage
    assert counted == len("system: Be brief.\nuser: Hello>\nassistant: ") == usage.input_tokens


def test_usage_divides_the_prompt_into_computed_and_cached(live):
    server = live(says("Hi", after="assistant: "))
    first, second = (ask(server).json()["usage"] for _ in range(2))
    assert first["cache_read_input_tokens"] == 0 and first["cache_creation_input_tokens"] == 0
    assert second["cache_read_input_tokens"] > 0
    assert second["input_tokens"] + second["cache_read_input_tokens"] == first["input_tokens"]


def test_a_stream_says_what_was_cached_when_it_begins(live):
    server = live(says("Hi", after="assistant: "))
    expected = [ask(server).json()["usage"] for _ in range(2)][1]
    with client_of(server) as client:
        start = next(iter(client.messages.create(model="m", max_tokens=20, messages=HELLO, stream=True)))
    assert start.message.usage.cache_read_input_tokens == expected["cache_read_input_tokens"]
    assert start.message.usage.input_tokens == expected["input_tokens"]


@pytest.mark.parametrize(
    ("body", "reason", "sequence"),
    [
        ({}, "end_turn", None),
        ({"max_tokens": 3}, "max_tokens", None),
        ({"stop_sequences": ["zz", "llo"]}, "stop_sequence", "llo"),
        ({"max_tokens": 0}, "max_tokens", None),
    ],
)
def test_the_stop_reason_says_why(live, body, reason, sequence):
    server = live(says("hello there", after="assistant: "))
    answer = ask(server, **body).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    *_, delta, _, _ = ask(server, stream=True, **body).text.split("\n\n")
    assert json.loads(delta.partition("data: ")[2])["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


def test_more_tokens_than_the_context_holds_end_with_the_context(live):
    server = live(says("y" * CONTEXT, after="assistant: ", then=None))
    answer = ask(server, max_tokens=32000).json()
    usage = answer["usage"]
    assert answer["stop_reason"] == "model_context_window_exceeded"
    assert usage["input_tokens"] + usage["output_tokens"] == CONTEXT


def test_a_last_message_of_the_assistant_is_continued(live):
    server = live(says("lo!", after="assistant: Hel"))
    messages = [{"role": "user", "content": "Greet"}, {"role": "assistant", "content": "Hel"}]
    answer = ask(server, messages=messages).json()
    assert answer["content"][0]["text"] == "lo!"


def test_blocks_of_text_and_turns_of_one_role_are_joined(live):
    prompts: list[bytes] = []

    def next_token(context: list[int]) -> int:
        prompts.append(bytes(context))
        return ord("x")

    cached = {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, cached]},
        {"role": "user", "content": "c"},
    ]
    ask(live(next_token), messages=messages, system=[{"type": "text", "text": "s"}, cached], max_tokens=1)
    assert prompts == [b"system: s\nb\nuser: a\nb\nc\nassistant: "]


def test_a_message_cannot_end_its_turn(greeter):
    body = {"model": "m", "messages": [{"role": "user", "content": "<eos>"}]}
    reply = greeter.http.post("/v1/messages/count_tokens", json=body)
    assert reply.json()["input_tokens"] == len("user: <eos>\nassistant: ")


def test_the_models_sampling_defaults_lie_under_the_bodys(live):
    server = live(says("hello", after="assistant: "))
    server.service.sampling_defaults = {"temperature": 0.0, "top_p": 0.5}
    drawn = []
    start = server.service.start

    def note(inputs: Any, **options: Any) -> Any:
        drawn.append(inputs.requests[0].sampling)
        return start(inputs, **options)

    server.service.start = note
    ask(server)
    ask(server, temperature=1, top_k=5)
    assert [(params.temperature, params.top_p, params.top_k) for params in drawn] == [(0.0, 0.5, -1), (1.0, 0.5, 5)]


@pytest.mark.parametrize(
    "body",
    [
        {"tools": []},
        {"tool_choice": {"type": "auto"}},
        {"thinking": {"type": "disabled"}},
        {"output_config": {}},
        {"output_config": {"effort": "high", "format": None}},
        {"speed": "standard"},
        {"metadata": {"user_id": "u"}, "service_tier": "auto", "temperature": 0.5, "top_k": 0, "top_p": 0.9},
        {"a_field_of_next_year": 1},
    ],
)
def test_what_asks_for_nothing_is_accepted(greeter, body):
    assert ask(greeter, **body).status_code == 200


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://example.org/i.png"}}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config"),
        ({"output_config": {"format": {"type": "xml", "schema": {}}}}, "output_config"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "not cannot be enforced"),
        ({"mcp_servers": [{"name": "s"}]}, "mcp_servers"),
        ({"speed": "fast"}, "speed"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0] is of type 'image'"),
        ({"messages": [{"role": "system", "content": "x"}]}, "one must be the user's"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "document"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"system": [IMAGE]}, "system[0]"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": [str(i) for i in range(99)]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "prompt is too long: 146 tokens > 127 maximum"),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_what_cannot_be_served_is_a_400_that_names_it(greeter, body, named, is_stream):
    reply = ask(greeter, **{"stream": is_stream, **body})
    assert reply.status_code == 400, reply.text
    answer = reply.json()
    assert answer["type"] == "error" and answer["error"]["type"] == "invalid_request_error"
    assert named in answer["error"]["message"]


@pytest.mark.parametrize("missing", ["model", "max_tokens", "messages"])
def test_a_missing_field_is_named(greeter, missing):
    body = {"model": "m", "max_tokens": 5, "messages": HELLO}
    del body[missing]
    reply = greeter.http.post("/v1/messages", json=body)
    assert reply.status_code == 400 and missing in reply.json()["error"]["message"]


def test_the_client_raises_what_the_server_says(live):
    server = live(says("Hi", after="assistant: "), api_key="right")
    with client_of(server, api_key="wrong") as client, pytest.raises(anthropic.AuthenticationError):
        client.messages.create(model="m", max_tokens=5, messages=HELLO)
    with client_of(server, api_key="right") as client:
        with pytest.raises(anthropic.BadRequestError, match=r"tools\[0\].input_schema must be a JSON schema"):
            wrong = {"name": "f", "input_schema": {"type": "string"}}
            client.messages.create(model="m", max_tokens=5, messages=HELLO, tools=[wrong])
        assert client.messages.create(model="m", max_tokens=5, messages=HELLO).content[0].text == "Hi"


@pytest.mark.parametrize("name", ["plain", "Qwen/Qwen2.5-0.5B-Instruct"])
def test_the_client_lists_and_finds_the_model(live, name):
    server = live(engine={"served_model_name": name})
    with client_of(server) as client:
        page = client.models.list(limit=5)
        (listed,) = page.data
        assert (page.has_more, page.first_id, page.last_id) == (False, name, name)
        assert (listed.type, listed.id, listed.display_name) == ("model", name, name)
        assert abs(listed.created_at.timestamp() - time.time()) < 60
        assert listed.max_input_tokens == CONTEXT - 1
        assert [model.id for model in client.models.list()] == [name]
        assert client.models.list(after_id=name).data == []
        assert client.models.retrieve(name) == listed
        with pytest.raises(anthropic.NotFoundError, match="another") as raised:
            client.models.retrieve("another")
        assert raised.value.body["error"]["type"] == "not_found_error"
    assert server.http.get("/v1/models").json()["object"] == "list"


def test_the_client_sees_too_long_a_prompt_in_its_words(greeter):
    with (
        client_of(greeter) as client,
        pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > "),
    ):
        client.messages.create(model="m", max_tokens=5, messages=[{"role": "user", "content": "x" * CONTEXT}])


def test_a_request_that_fails_in_the_engine_is_an_error_without_its_insides(live):
    server = live(runner={"raises": lambda batch: RuntimeError("the pool burst")})
    reply = ask(server)
    assert reply.status_code == 500 and reply.json()["error"]["type"] == "api_error"
    reply = ask(server, stream=True)
    assert reply.status_code == 500 and reply.json()["error"]["type"] == "api_error"


def test_a_stream_that_fails_ends_with_an_error_event(live):
    has_begun = threading.Event()

    def raises(batch: Any) -> Exception | None:
        if max(batch.positions) < 40:
            return None
        has_begun.wait(30)  # the client has seen a part: what fails before is answered with a status
        return RuntimeError("the pool burst")

    server = live(says("y" * CONTEXT, after="assistant: ", then=None), runner={"raises": raises})
    body = {"model": "m", "max_tokens": 60, "messages": HELLO, "stream": True}
    with server.http.stream("POST", "/v1/messages", json=body) as reply:
        assert reply.status_code == 200
        pieces = reply.iter_text()
        text = next(pieces)
        has_begun.set()
        text += "".join(pieces)
    last = text.removesuffix("\n\n").split("\n\n")[-1]
    assert last.startswith("event: error\n") and json.loads(last.partition("data: ")[2])["type"] == "error"
    with client_of(server) as client, pytest.raises(anthropic.APIStatusError):
        for _ in client.messages.create(model="m", max_tokens=60, messages=HELLO, stream=True):
            pass


def test_leaving_a_stream_aborts_its_request(live):
    client_has_left = threading.Event()
    num_calls = itertools.count()

    def next_token(context: list[int]) -> int:
        if next(num_calls) > 5:
            client_has_left.wait(20)
        return ord("y")

    server = live(next_token, engine={"context_length": 600})
    body = {"model": "m", "max_tokens": 500, "messages": HELLO, "stream": True}
    with server.http.stream("POST", "/v1/messages", json=body) as reply:
        next(reply.iter_text())
    wait_until(lambda: server.service.num_active == 0)
    client_has_left.set()
    counted = [line for line in server.http.get("/metrics").text.splitlines() if "num_aborted_requests_total{" in line]
    assert len(counted) == 1 and counted[0].endswith(" 1.0")
