"""What happens between a socket and a handler: bodies, their types, answers, streams, errors, deadlines."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator

import msgspec
import pytest
from gate import wait_until
from route_server import json_request, post

from mooli.errors import (
    EngineDeadError,
    PromptError,
)
from mooli.server.routing import JSON_LINES, Access, Dialect, EventStream, Reply, json_line, sse


class Message(msgspec.Struct):
    role: str


class Body(msgspec.Struct, omit_defaults=True):
    text: str = ""
    count: int | None = None
    messages: list[Message] = []
    bias: dict[str, float] = {}


class Needy(msgspec.Struct):
    model: str


async def echo(service, request) -> Reply:
    return Reply({"given": request.body or {}, "query": request.query})


def raises(error: Exception):
    async def handler(service, request):
        raise error

    return handler


def streams(*pieces):
    """A stream of pieces; an exception among them is raised."""

    async def events():
        for piece in pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def handler(service, request) -> EventStream:
        return EventStream(events())

    return handler


# -- bodies ------------------------------------------------------------------------------------------------------------
def test_a_handler_gets_the_object_and_the_query(serve):
    server = serve(post("/echo", echo, Body))
    answer = server.http.post("/echo?a=1&a=2&b=", json={"text": "é", "unknown": 1})
    assert answer.status_code == 200
    assert answer.json() == {"given": {"text": "é"}, "query": {"a": "2", "b": ""}}


def test_the_last_of_two_equal_keys_counts(serve):
    server = serve(post("/echo", echo, Body))
    answer = server.http.post(
        "/echo", content=b'{"text": "a", "text": "b"}', headers={"Content-Type": "application/json"}
    )
    assert answer.json()["given"] == {"text": "b"}


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b" ",
        b"{} {}",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"count": NaN}',
        b"{'text': 1}",
        b'{"bias": ' + b'{"a":' * 100_000,
        b'{"x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(serve, body):
    server = serve(post("/echo", echo, Body))
    answer = server.http.post("/echo", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "JSON" in answer.json()["message"]


@pytest.mark.parametrize("body", [b'{"count": 1' + b"0" * 5000 + b"}", b'{"count": 1e400}', b'{"count": -0.5}'])
def test_numbers_no_type_can_hold_are_refused(serve, body):
    server = serve(post("/echo", echo, Body))
    answer = server.http.post("/echo", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"count": "1"}, "count", "count: Expected integer | null, got string"),
        ({"count": True}, "count", "count: Expected integer | null, got boolean"),
        ({"count": 1.5}, "count", "count: Expected integer | null, got number"),
        ({"messages": [{"role": "a"}, {"role": 2}]}, "messages", "messages[1].role: Expected string, got integer"),
        ({"messages": [{}]}, "messages", "messages[0]: Object missing required field role"),
        ({"bias": {"a": "b"}}, "bias", "bias[...]: Expected number, got string"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(serve, body, param, words):
    server = serve(post("/echo", echo, Body, dialect=Dialect.OPENAI))
    answer = server.http.post("/echo", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert answer.json()["error"]["message"] == words


def test_a_missing_field_is_named(serve):
    server = serve(post("/echo", echo, Needy, dialect=Dialect.OPENAI))
    answer = server.http.post("/echo", json={})
    assert answer.json()["error"]["param"] == "model"
    assert "missing required field model" in answer.json()["error"]["message"]


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8", "application/x+json"])
def test_json_content_types_are_read(serve, content_type):
    server = serve(post("/echo", echo, Body))
    assert server.http.post("/echo", content=b"{}", headers={"Content-Type": content_type}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{}, {"Content-Type": "application/x-www-form-urlencoded"}, {"Content-Type": "text/plain; application/json"}],
)
def test_other_content_types_are_refused(serve, headers):
    server = serve(post("/echo", echo, Body))
    answer = server.http.post("/echo", content=b"{}", headers=headers)
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["message"]


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/x-www-form-urlencoded"}])
def test_ollama_s_clients_need_not_name_the_type_and_other_sites_stay_out(serve, headers):
    server = serve(post("/echo", echo, Body, dialect=Dialect.OLLAMA))
    assert server.http.post("/echo", content=b"{}", headers=headers).status_code == 200
    assert server.http.post("/echo", content=b"a=1", headers=headers).status_code == 400
    foreign = {**headers, "Origin": "https://elsewhere.example"}
    assert server.http.post("/echo", content=b"{}", headers=foreign).status_code == 403


def test_a_compressed_body_is_refused(serve):
    server = serve(post("/echo", echo, Body))
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert server.http.post("/echo", content=b"\x1f\x8b", headers=headers).status_code == 415


def test_an_empty_body_is_refused_where_one_is_needed(serve):
    server = serve(post("/needed", echo, Body), post("/optional", echo, Body, needs_body=False))
    assert server.http.post("/needed").status_code == 400
    assert server.http.post("/optional").json()["given"] == {}


def test_a_body_nobody_wants_is_not_read(serve):
    server = serve(post("/none", echo), max_body_bytes=1024)
    assert server.http.post("/none", content=b"x" * 100_000).json()["given"] == {}
    assert server.http.post("/none").status_code == 200


def test_a_body_over_the_limit_is_refused_however_it_is_sent(serve):
    server = serve(post("/echo", echo, Body), max_body_bytes=2000)
    body = json.dumps({"text": "x" * 3000}).encode()
    headers = {"Content-Type": "application/json"}
    assert server.http.post("/echo", content=body, headers=headers).status_code == 413
    chunked = server.http.post("/echo", content=iter([body[:500], body[500:]]), headers=headers)
    assert chunked.status_code == 413
    assert "2000 bytes" in chunked.json()["message"]
    assert server.http.post("/echo", json={"text": "x" * 1900}).status_code == 200


def test_a_body_that_is_declared_too_long_is_not_waited_for(serve):
    server = serve(post("/echo", echo, Body), max_body_bytes=2000)
    head = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99999999999999\r\n\r\n"
    with server.connect() as client:
        assert client.send(head).read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come_ends_with_408(serve):
    server = serve(post("/echo", echo, Body), read_timeout=0.2)
    with server.connect() as client:
        answer = client.send(json_request("/echo")[:-1]).read_to_end()
    assert answer.startswith(b"HTTP/1.1 408 ")
    wait_until(lambda: not server.num_tasks)
    assert server.counts.responses == [("/echo", "POST", 408)]


# -- answers -----------------------------------------------------------------------------------------------------------
def test_a_reply_has_its_status_type_and_headers(serve):
    async def handler(service, request) -> Reply:
        return Reply(b"hello", status=201, media_type="text/plain; charset=utf-8", headers={"X-Name": "value"})

    answer = serve(post("/reply", handler)).http.post("/reply")
    assert (answer.status_code, answer.text, answer.headers["x-name"]) == (201, "hello", "value")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"


def test_unknown_paths_and_methods_are_told(serve):
    server = serve(post("/echo", echo, Body), post("/echo", echo, methods=("GET",)), post("/items/{name:path}", echo))
    missing, wrong = server.http.post("/nothing"), server.http.put("/echo", json={})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_url")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, HEAD, POST")
    assert server.http.get("/echo").status_code == server.http.head("/echo").status_code == 200
    assert server.http.head("/echo").content == b""
    assert server.http.post("/items/a/b").status_code == 200
    assert server.http.post("/echo/").status_code == 404


def test_a_root_path_is_not_part_of_the_route(serve):
    server = serve(post("/echo", echo, Body), fastapi_root_path="/llm")
    assert server.http.post("/echo", json={}).status_code == 200


def test_metrics_hear_of_each_request_once(serve):
    server = serve(post("/echo", echo, Body), post("/fail", raises(PromptError("x"))), post("/items/{name}", echo))
    for path in ("/echo", "/fail", "/items/secret-name", "/nothing"):
        server.http.post(path, json={})
    paths = ["/echo", "/fail", "/items/{name}", "unmatched"]
    assert server.counts.requests == [(path, "POST") for path in paths]
    wait_until(lambda: len(server.counts.responses) == 4)
    statuses = dict(zip(paths, [200, 400, 200, 404], strict=True))
    assert sorted(server.counts.responses) == sorted((path, "POST", status) for path, status in statuses.items())


# -- streams -----------------------------------------------------------------------------------------------------------
def test_a_stream_has_its_pieces_and_headers(serve):
    answer = serve(post("/stream", streams(b"data: 1\n\n", b"data: 2\n\n"))).http.post("/stream")
    assert answer.content == b"data: 1\n\ndata: 2\n\n"
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"


def test_a_stream_may_be_framed_in_another_way(serve):
    async def handler(service, request) -> EventStream:
        async def lines() -> AsyncIterator[bytes]:
            yield json_line({"a": "1\n"})

        return EventStream(lines(), JSON_LINES)

    answer = serve(post("/stream", handler)).http.post("/stream")
    assert answer.content == b'{"a":"1\\n"}\n'
    assert answer.headers["content-type"] == "application/x-ndjson"


def test_an_empty_stream_is_one(serve):
    answer = serve(post("/stream", streams())).http.post("/stream")
    assert (answer.status_code, answer.content) == (200, b"")


def test_an_error_before_the_first_piece_has_its_own_status(serve):
    answer = serve(post("/stream", streams(PromptError("empty")))).http.post("/stream")
    assert (answer.status_code, answer.json()["message"]) == (400, "empty")


@pytest.mark.parametrize(
    ("dialect", "event"),
    [
        (
            Dialect.NATIVE,
            sse(
                {
                    "error": {
                        "message": "died",
                        "type": "server_error",
                        "param": None,
                        "code": 503,
                        "retryable": True,
                    }
                }
            )
            + b"data: [DONE]\n\n",
        ),
        (
            Dialect.OPENAI,
            sse({"error": {"message": "died", "type": "server_error", "param": None, "code": None}})
            + b"data: [DONE]\n\n",
        ),
        (
            Dialect.ANTHROPIC,
            sse({"type": "error", "error": {"type": "overloaded_error", "message": "died"}}, event="error"),
        ),
        (Dialect.OLLAMA, b'{"error":"died"}\n'),
    ],
)
def test_an_error_after_the_first_piece_is_an_event(serve, dialect, event):
    server = serve(post("/stream", streams(b"data: 1\n\n", EngineDeadError("died")), dialect=dialect))
    answer = server.http.post("/stream")
    assert (answer.status_code, answer.content) == (200, b"data: 1\n\n" + event)
    assert server.http.post("/stream").status_code == 200


def test_a_bug_in_a_stream_is_logged_and_not_shown(serve, caplog):
    answer = serve(post("/stream", streams(b"data: 1\n\n", KeyError("a secret")))).http.post("/stream")
    assert "secret" not in answer.text and "Internal server error" in answer.text
    assert "a secret" in caplog.text


# -- deadlines ---------------------------------------------------------------------------------------------------------
def test_a_request_over_its_time_is_answered_and_ended(serve):
    ended = threading.Event()

    async def handler(service, request) -> Reply:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    answer = serve(post("/slow", handler), request_timeout=0.2).http.post("/slow")
    assert answer.status_code == 504
    assert ended.wait(60)


def test_a_stream_over_its_time_ends_with_an_event(serve):
    ended = threading.Event()

    async def events():
        try:
            yield b"data: 1\n\n"
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def handler(service, request) -> EventStream:
        return EventStream(events())

    answer = serve(post("/slow", handler), request_timeout=1.5).http.post("/slow")
    assert answer.text.startswith("data: 1\n\ndata: {") and answer.text.endswith("data: [DONE]\n\n")
    assert "longer than 1.5 s" in answer.text
    assert ended.wait(60)


def test_a_client_that_takes_nothing_is_cut_and_its_stream_closed(serve):
    ended = threading.Event()

    async def events():
        try:
            while True:
                yield b"data: " + b"x" * 65536 + b"\n\n"
                await asyncio.sleep(0)
        finally:
            ended.set()

    async def handler(service, request) -> EventStream:
        return EventStream(events())

    server = serve(post("/stream", handler), post("/echo", echo, Body), write_timeout=1.5)
    with server.connect() as client:
        client.send(json_request("/stream")).read_until(b"data: ")
        assert ended.wait(20)
        assert server.http.post("/echo", json={}).status_code == 200


def test_a_slow_client_holds_up_nobody(serve):
    async def events():
        while True:
            yield b"data: " + b"x" * 65536 + b"\n\n"
            await asyncio.sleep(0)

    async def handler(service, request) -> EventStream:
        return EventStream(events())

    server = serve(post("/stream", handler), post("/echo", echo, Body))
    with server.connect() as client:
        client.send(json_request("/stream")).read_until(b"data: ")
        for _ in range(20):
            assert server.http.post("/echo", json={}).status_code == 200


@pytest.mark.parametrize("access", list(Access))
def test_every_kind_of_route_answers_without_keys(serve, access):
    server = serve(post("/echo", echo, Body, access=access))
    assert server.http.post("/echo", json={}).status_code == 200
