"""Bodies as types: what of them becomes objects, how deep and how many, and how long they are kept."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import threading
import tracemalloc
from typing import Any

import msgspec
import pytest
from fake_engine import CONTEXT, says
from gate import Gate, wait_until
from live import LiveServer
from openai_raw import refusal, user

from mooli.server import json_body
from mooli.server.anthropic import InputMessage, MessagesBody, conversation
from mooli.server.config import ServerConfig
from mooli.server.json_body import LONG_BODY_BYTES, MAX_DEPTH, read_body
from mooli.server.native_generate import GenerateBody
from mooli.server.openai_chat import ChatBody
from mooli.server.openai_completions import CompletionBody
from mooli.server.openai_responses import ResponsesBody
from mooli.server.routing import LONG_VALUE, HttpError

MIB = 2**20
DEFAULT_VALUES = ServerConfig.from_kwargs().max_body_values


class Body(msgspec.Struct):
    text: str = ""
    ids: list[int | list[int]] = []
    tree: Any = None


def read(raw: bytes, *names: str, body: type[msgspec.Struct] = Body, most: int = DEFAULT_VALUES) -> Any:
    return asyncio.run(read_body(raw, body, names, most))


def nested(depth: int) -> bytes:
    """`depth` lists inside each other."""
    return b"[" * depth + b"]" * depth


# -- what is kept ------------------------------------------------------------------------------------------------------
def test_fields_that_nobody_asks_for_are_read_over():
    body, unsupported = read(b'{"text": "a", "more": {"b": [1, 2]}, "tools": [1]}', "tools", "regex")
    assert (body, unsupported) == (Body(text="a"), {"tools": [1]})


@pytest.mark.parametrize("value", ["x" * 300, ["x"] * 300, {"a": "x" * 300}])
def test_of_a_long_value_nothing_is_kept_but_that_it_was_there(value):
    assert read(json.dumps({"tools": value}).encode(), "tools")[1] == {"tools": LONG_VALUE}


def peak_bytes(raw: bytes, **fields: Any) -> int:
    """The most memory that reading takes."""
    read(b"{}")
    tracemalloc.start()
    try:
        read(raw, "tools", **fields)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("value", [b"[" + b"{}," * 8_000_000 + b"0]", b'["' + b'","' * 8_000_000 + b'"]'])
@pytest.mark.parametrize("name", [b"more", b"tools"])
def test_unknown_fields_of_24_mb_take_no_memory(name, value):
    """As objects they take 550 MiB."""
    raw = b'{"' + name + b'":' + value + b"}"
    assert peak_bytes(raw, most=10**9) < 2.5 * len(raw)


@pytest.mark.parametrize(
    ("field", "value", "num_values"),
    [
        (b"ids", b"[]", 2),
        (b"ids", b"1000", 1),
        (b"tree", b'{"a":1000}', 2),
        (b"tree", b'"abc"', 1),
        (b"tree", b"{}", 2),
    ],
)
def test_the_dearest_body_that_is_read_has_a_bound(field, value, num_values):
    raw = b'{"' + field + b'":[' + b",".join([value] * (DEFAULT_VALUES // num_values - 5)) + b"]}"
    assert peak_bytes(raw) < 150 * MIB


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/generate", {"text": ["say>"], "sampling_params": {"max_new_tokens": 5}}, GenerateBody),
        ("/v1/completions", {"prompt": ["say>"]}, CompletionBody),
        ("/v1/chat/completions", {"messages": [user("hi")], "chat_template_kwargs": {"a": [1]}}, ChatBody),
        ("/v1/messages", {"model": "m", "max_tokens": 5, "messages": [user("hi")]}, MessagesBody),
        ("/v1/responses", {"input": [user("hi")]}, ResponsesBody),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_body_is_not_kept_while_its_answer_is_made(live, path, body, kind, is_stream):
    def alive() -> list[Any]:
        gc.collect()
        return [item for item in gc.get_objects() if type(item) is kind]

    with Gate() as gate:
        server = live(says("hello"), runner={"raises": gate})
        statuses: list[int] = []
        asking = threading.Thread(
            target=lambda: statuses.append(server.http.post(path, json={**body, "stream": is_stream}).status_code)
        )
        asking.start()
        wait_until(lambda: server.service.client.num_open == 1)
        assert alive() == []
        gate.open()
        asking.join(30)
    assert statuses == [200]


def test_a_long_body_is_read_on_another_thread(serve_thread_names):
    assert serve_thread_names(LONG_BODY_BYTES) != threading.current_thread().name
    assert serve_thread_names(100) == threading.current_thread().name


@pytest.fixture
def serve_thread_names(monkeypatch):
    """From the length of a body to the name of the thread that reads it; the loop runs on the test's own."""
    names: list[str] = []
    original = json_body._read

    def noting(*args: Any) -> Any:
        names.append(threading.current_thread().name)
        return original(*args)

    monkeypatch.setattr(json_body, "_read", noting)

    def of(num_bytes: int) -> str:
        read(b'{"text":"' + b"a" * num_bytes + b'"}')
        return names.pop()

    return of


# -- how much ----------------------------------------------------------------------------------------------------------
def test_values_are_counted_outside_of_texts():
    text = json.dumps({"text": '[{,"\\' * 1000, "ids": [1] * 100}).encode()
    assert read(text, most=102)[0].ids == [1] * 100
    with pytest.raises(HttpError) as raised:
        read(text, most=100)
    assert raised.value.status_code == 413 and "100 values" in str(raised.value)


def random_value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(6 if depth else 4)
    if kind == 0:
        return "".join(rng.choice('[]{},:"\\aé\n') for _ in range(rng.randrange(12)))
    if kind < 4:
        return rng.choice([0, -1.5, None, True])
    if kind == 4:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {str(random_value(rng, 0)): random_value(rng, depth - 1) for _ in range(2)}


def depth_of(value: Any) -> int:
    if isinstance(value, (list, dict)):
        return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)
    return 0


@pytest.mark.parametrize("seed", range(200))
def test_depth_is_that_of_the_values_however_a_body_is_cut(monkeypatch, seed):
    rng = random.Random(seed)
    value = {"text": "", "tree": random_value(rng, 7)}
    raw = json.dumps(value, ensure_ascii=bool(seed % 2)).encode()
    monkeypatch.setattr(json_body, "_PIECE_BYTES", rng.choice([1, 3, 7, 1000]))
    monkeypatch.setattr(json_body, "MAX_DEPTH", depth_of(value))
    assert read(raw)[0].tree == value["tree"]
    monkeypatch.setattr(json_body, "MAX_DEPTH", depth_of(value) - 1)
    with pytest.raises(HttpError, match="nested too deeply") as raised:
        read(raw)
    assert raised.value.param in ("tree", None)


@pytest.mark.parametrize("depth", [MAX_DEPTH, 500, 100_000])
def test_what_is_nested_too_deeply_is_named(depth):
    raw = b'{"text": "[[\\"[[", "ids": [[1], [2]], "x": {"tree": 1}, "tree" : ' + nested(depth) + b', "ids": []}'
    with pytest.raises(HttpError, match=r"^tree is nested too deeply: .* 64 ") as raised:
        read(raw)
    assert (raised.value.param, raised.value.status_code) == ("tree", 400)
    assert read(b'{"tree": ' + nested(MAX_DEPTH - 1) + b"}")[0].tree is not None


NESTED = json.loads(nested(500))


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [user("a")], "chat_template_kwargs": {"a": NESTED}}, None),
        ("/v1/chat/completions", {"messages": [user("a")], "tools": NESTED}, None),
        ("/v1/chat/completions", {"messages": [user([{"type": "text", "text": NESTED}])]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": NESTED}]}, "messages"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"a": NESTED}}, None),
        ("/generate", {"text": "a", "sampling_params": {"temperature": NESTED}}, None),
        ("/generate", {"text": "a", "custom_logit_processor": NESTED}, None),
        ("/tokenize", {"messages": [user("a")], "chat_template_kwargs": {"a": NESTED}}, None),
        ("/v1/messages", {"model": "m", "max_tokens": 1, "messages": [user("a")], "metadata": {"a": NESTED}}, None),
        ("/v1/messages", {"model": "m", "max_tokens": 1, "messages": [user("a")], "tools": NESTED}, None),
        ("/v1/responses", {"input": [user("a")], "metadata": {"a": NESTED}}, None),
        ("/v1/responses", {"input": [{"type": "function_call_output", "output": NESTED}]}, "input"),
        ("/abort_request", {"rid": NESTED}, None),
    ],
)
def test_nesting_of_500_is_a_400_that_names_the_field(server, path, body, param):
    error = server.http.post(path, json=body)
    assert error.status_code == 400, error.text
    name = param or [*body][-1]
    assert error.json()["error"]["message"].startswith(f"{name} is nested too deeply")


@pytest.fixture(scope="module")
def server():
    """One that takes few things at once, for requests that leave nothing behind."""
    server = LiveServer(says("x"), max_request_items=3, max_body_values=2000)
    yield server
    server.stop()


PARTS = [{"type": "text", "text": "a"}] * 2


@pytest.mark.parametrize(
    ("path", "body", "name", "count"),
    [
        ("/tokenize", {"prompt": ["a"] * 4}, "prompt", 4),
        ("/tokenize", {"messages": [user("a")] * 4}, "messages", 4),
        ("/detokenize", {"tokens": [[]] * 4}, "tokens", 4),
        ("/generate", {"text": ["a"] * 4}, "text", 4),
        ("/generate", {"input_ids": [[97]] * 5}, "input_ids", 5),
        ("/v1/completions", {"prompt": ["a"] * 4}, "prompt", 4),
        ("/v1/completions", {"prompt": [[97]] * 4}, "prompt", 4),
        ("/v1/chat/completions", {"messages": [user("a")] * 4}, "messages", 4),
        ("/v1/chat/completions", {"messages": [user(PARTS)] * 2}, "messages", 6),
        (
            "/v1/chat/completions",
            {"messages": [user("a")], "chat_template_kwargs": {"a": [[1], {"b": 2}]}},
            "chat_template_kwargs",
            5,
        ),
        ("/tokenize", {"messages": [user("a")], "chat_template_kwargs": {"a": [1] * 3}}, "chat_template_kwargs", 4),
        ("/v1/messages", {"model": "m", "max_tokens": 1, "messages": [user("a")] * 4}, "messages", 4),
        ("/v1/messages/count_tokens", {"model": "m", "messages": [user(PARTS)], "system": PARTS}, "messages", 5),
        ("/v1/responses", {"input": [user("a")] * 4}, "input", 4),
        ("/v1/responses", {"input": [user(PARTS)] * 2}, "input", 6),
        ("/v1/responses", {"input": [{"type": "function_call_output", "output": PARTS}] * 2}, "input", 6),
        ("/v1/responses", {"input": "a", "tools": [{"type": "x"}] * 4}, "tools", 4),
    ],
)
def test_long_lists_are_refused_by_name_and_number(server, path, body, name, count):
    error = refusal(server, path, body)
    assert error["message"] == f"{name} has {count} entries, and at most 3 are taken in one request: send fewer"
    assert error.get("param", name) == name


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": ["a"] * 3}),
        ("/detokenize", {"tokens": [97] * 1000}),
        ("/detokenize", {"tokens": [[]] * 3}),
        ("/generate", {"input_ids": [97] * (CONTEXT - 8)}),
        ("/v1/completions", {"prompt": [97] * (CONTEXT - 8)}),
        ("/v1/chat/completions", {"messages": [user("a"), user(PARTS[:1])]}),
    ],
)
def test_the_limit_is_of_items_not_of_tokens(server, path, body):
    assert server.http.post(path, json=body).status_code == 200


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/messages"])
def test_too_many_values_are_a_413_that_says_how_many_are_read(server, path):
    reply = server.http.post(path, json={"text": "a", "unknown": [0] * 3000})
    assert reply.status_code == 413
    assert "2000 values" in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_name_that_every_chunk_repeats_is_short(server, path):
    body = {"model": "m" * 2000, "prompt": "a", "messages": [user("a")], "max_tokens": 1, "input": "a"}
    assert refusal(server, path, body)["message"].startswith("model: ")


def test_many_messages_of_one_role_become_one_turn(server):
    body = MessagesBody(model="m", max_tokens=1, messages=[InputMessage(role="user", content="a")] * 3)
    told = conversation(body, server.service)
    assert (told.messages, told.continues) == ([{"role": "user", "content": "a\na\na"}], False)
