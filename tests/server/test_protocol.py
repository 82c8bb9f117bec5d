"""Connections: what comes in every order, in pieces, too long, too late, or not at all."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import uvicorn
from gate import wait_until
from route_server import Counts, json_request, post
from uvicorn.server import ServerState

from mooli.errors import PromptError
from mooli.server import protocol
from mooli.server.config import ServerConfig
from mooli.server.protocol import make_protocol
from mooli.server.routing import EventStream, Reply
from mooli.server.traffic import TrafficLog


class Body(msgspec.Struct, omit_defaults=True):
    text: str = ""
    count: int | None = None


async def echo(service, request) -> Reply:
    return Reply({"given": request.body or {}})


async def refuse(service, request) -> Reply:
    raise PromptError("x")


def test_a_connection_takes_one_request_after_another(serve):
    server = serve(post("/echo", echo, Body), post("/fail", refuse))
    with server.connect() as client:
        for path, status in [("/echo", b"200"), ("/fail", b"400"), ("/nothing", b"404"), ("/echo", b"200")]:
            assert client.send(json_request(path)).read_until(b"}").startswith(b"HTTP/1.1 " + status)


def test_requests_sent_together_are_answered_in_order(serve):
    async def handler(service, request) -> Reply:
        await asyncio.sleep(0.05 if request.body.count == 0 else 0)
        return Reply(request.body)

    server = serve(post("/echo", handler, Body))
    with server.connect() as client:
        client.send(b"".join(json_request("/echo", b'{"count":%d}' % i) for i in range(4)))
        answer = client.read_until(b'{"count":3}')
    assert [answer.index(b'{"count":%d}' % i) for i in range(4)] == sorted(
        answer.index(b'{"count":%d}' % i) for i in range(4)
    )


@pytest.mark.parametrize("count", [1, 2])
def test_a_client_that_leaves_ends_what_it_sent(serve, count):
    ended = threading.Semaphore(0)
    started = threading.Event()

    async def handler(service, request) -> Reply:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.release()

    server = serve(post("/slow", handler, Body))
    with server.connect() as client:
        client.send(json_request("/slow") * count)
        assert started.wait(60)
    assert ended.acquire(timeout=60)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x01\x02\x03\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: a\r\nX: a\r\n folded\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /echo HTTP/1.1\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: a\r\nhost: b\r\n\r\n",
        b"GET /echo HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: a/b\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: a b\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: a, b\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: me@a\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: a:80:80\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: a\xff\r\n\r\n",
        b"GET /echo#there HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET echo HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET ftp://a/echo HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://me@a/echo HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http:///echo HTTP/1.1\r\nHost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_garbage_is_refused_and_the_connection_closed(serve, garbage, caplog):
    caplog.set_level(logging.CRITICAL)
    server = serve(post("/echo", echo, Body))
    with server.connect() as client:
        answer = client.send(garbage).read_to_end()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert server.http.post("/echo", json={}).status_code == 200


HEAD = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        HEAD + b"Transfer-Encoding: cow, chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: cow\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: cow\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked, cow\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: 'chunked'\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding:\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        HEAD + b" Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"X: a\r\n Transfer-Encoding: chunked\r\n\r\n",
        HEAD + b"X: a\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"X: a\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"X: a\r\n b\r\n\r\n",
        HEAD + b"X: a\x00b\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
        HEAD + b"Content-Length: 2, 2\r\n\r\n{}",
        HEAD + b"Content-Length: +2\r\n\r\n{}",
        HEAD + b"Content-Length: 0x2\r\n\r\n{}",
        HEAD + b"Content-Length: 2 2\r\n\r\n{}",
        HEAD + b"Content-Length: \r\n\r\n{}",
        HEAD + b"Content-Length : 2\r\n\r\n{}",
        HEAD + b"Content-Length: 18446744073709551618\r\n\r\n{}",
        HEAD.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD.replace(b"1.1", b"2.0") + b"Content-Length: 2\r\n\r\n{}",
        HEAD.replace(b"1.1", b"0.9") + b"Content-Length: 2\r\n\r\n{}",
        b"GET /echo\r\n\r\n",
        *(
            CHUNKED + size + b"\r\n{}\r\n0\r\n\r\n"
            for size in (b"0x2", b"+2", b"-2", b" 2", b"2 ", b"", b"g", b"10000000000000002", b"2;a\nb", b"2;")
        ),
        CHUNKED + b"2\n{}\r\n0\r\n\r\n",
        CHUNKED + b"2\r{}\r\n0\r\n\r\n",
        CHUNKED + b"2\r\n{}X\r\n0\r\n\r\n",
        CHUNKED + b"2\r\n{}0\r\n\r\n",
        CHUNKED + b"2\r\n{}\n0\r\n\r\n",
        CHUNKED + b"2\r\n{}\r\n0\r\n\n",
        CHUNKED + b"2\r\n{}\r\n0\r\nContent-Length: 50\r\n\r\n",
    ],
)
def test_a_request_that_could_be_read_in_two_ways_hides_no_other(serve, request_, caplog):
    async def hidden(service, request) -> Reply:
        return Reply("hidden")

    caplog.set_level(logging.CRITICAL)
    server = serve(post("/echo", echo, Body), post("/hidden", hidden, methods=("GET",)))
    with server.connect() as client:
        answer = client.send(request_ + HIDDEN).read_to_end()
    assert answer[:13] in (b"HTTP/1.1 400 ", b"HTTP/1.1 501 ", b"HTTP/1.1 505 ")
    assert b"connection: close" in answer
    assert answer.count(b"HTTP/1.1") == 1 and b"hidden" not in answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /host HTTP/1.1\r\nHost: model.example:8000",
        b"GET /host HTTP/1.1\r\nHost: [::1]:8000",
        b"GET /host HTTP/1.1\r\nHost:",
        b"GET /host HTTP/1.0\r\nX: y",
        b"GET http://model.example/host HTTP/1.1\r\nHost: other.example",
        b"GET HTTPS://[::1]:8000/host?a=b HTTP/1.1\r\nHost: other.example",
    ],
)
def test_the_host_of_a_request_is_that_of_its_target(serve, head):
    async def host(service, request) -> Reply:
        return Reply({"host": request.headers.get("host")})

    server = serve(post("/host", host, methods=("GET",)))
    with server.connect() as client:
        answer = client.send(head + b"\r\nConnection: close\r\n\r\n").read_to_end()
    assert answer.startswith(b"HTTP/1.1 200 ")
    said = json.loads(answer.partition(b"\r\n\r\n")[2])["host"]
    assert said in ("model.example:8000", "model.example", "[::1]:8000", "", None)


def test_what_stands_behind_a_body_is_no_header(serve):
    async def later(service, request) -> Reply:
        return Reply({"headers": request.headers})

    server = serve(post("/later", later, Body))
    head = CHUNKED.replace(b"/echo", b"/later")
    with server.connect() as client:
        client.send(head + b"2\r\n{}\r\n0\r\nX-Api-Key: k\r\nHost: b\r\n\r\n")
        answer = client.read_until(b"}}")
    assert b"x-api-key" not in answer and b'"host":"a"' in answer


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 5000,
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 5000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 200 + b"\r\n",
        b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\n\r\n",
        b"GET /" + b"x" * 5000,
        b"\r\n" * 5000,
    ],
)
def test_heads_over_the_limit_are_refused(serve, head, caplog):
    caplog.set_level(logging.CRITICAL)
    server = serve(post("/echo", echo, Body), max_header_bytes=4000)
    with server.connect() as client:
        assert client.send(head).read_to_end().startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("tail", [b"0\r\nX: " + b"x" * 5000, b"1;" + b"x" * 5000, b"0\r\n" + b"X: a\r\n" * 2000])
def test_a_body_without_end_in_its_frame_is_refused(serve, tail):
    ended = threading.Event()

    async def events():
        try:
            yield b"data: 1\n\n"
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def handler(service, request) -> EventStream:
        return EventStream(events())

    server = serve(post("/stream", handler), max_header_bytes=4000)
    with server.connect() as client:
        client.send(b"POST /stream HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n").read_until(b"data: 1")
        client.send(tail).read_to_end()
    assert ended.wait(60)


def test_a_long_body_in_small_chunks_is_no_header(serve):
    server = serve(post("/echo", echo, Body), max_header_bytes=1024)
    body = json.dumps({"text": "x" * 20_000}).encode()
    pieces = iter([body[i : i + 1] for i in range(3000)] + [body[3000:]])
    assert server.http.post("/echo", content=pieces, headers={"Content-Type": "application/json"}).status_code == 200


@pytest.mark.parametrize("part", [b"", b"\r\n", b"GET", b"GET / HTTP/1.1\r\nHost: a\r\n"])
def test_a_head_that_does_not_come_to_an_end_is_cut(serve, part):
    server = serve(post("/echo", echo, Body), read_timeout=0.2)
    with server.connect() as client:
        answer = client.send(part).read_to_end()
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")


def test_a_second_head_that_does_not_come_to_an_end_is_cut_too(serve):
    server = serve(post("/echo", echo, Body), read_timeout=1.5)
    with server.connect() as client:
        client.send(json_request("/echo")).read_until(b"}}")
        assert b"HTTP/1.1 408 " in client.send(b"POST /ec").read_to_end()


def test_an_idle_connection_is_closed(serve):
    server = serve(post("/echo", echo, Body), keep_alive_timeout=1)
    with server.connect() as client:
        client.send(json_request("/echo")).read_until(b"}}")
        assert client.read_to_end() == b""


def test_a_late_head_behind_a_running_request_does_not_cut_it(serve):
    async def handler(service, request) -> Reply:
        await asyncio.sleep(3)
        return Reply({"done": True})

    server = serve(post("/slow", handler, Body), read_timeout=1.5)
    with server.connect() as client:
        answer = client.send(json_request("/slow") + b"GET /no").read_to_end()
    assert b'{"done":true}' in answer and b"HTTP/1.1 408 " in answer


def test_too_many_requests_sent_together_cut_the_connection(serve):
    async def handler(service, request) -> Reply:
        await asyncio.sleep(60)

    server = serve(post("/slow", handler, Body))
    with server.connect() as client:
        assert client.send(json_request("/slow") * 50).read_to_end() == b""


@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
def test_a_request_to_change_the_protocol_is_answered_in_this_one(serve, upgrade):
    server = serve(post("/echo", echo, Body), post("/get", echo, methods=("GET",)))
    wish = ["Connection: Upgrade, HTTP2-Settings", f"Upgrade: {upgrade}", "HTTP2-Settings: AAMAAABk"]
    first = json_request("/echo", b'{"count":1}', *wish)
    with server.connect() as client:
        for request in (first, json_request("/echo", b'{"count":2}'), first):
            assert b'"count":' + request[-2:-1] in client.send(request).read_until(b"}}")
        client.send(first[:-5]).send(first[-5:])
        assert b'"count":1' in client.read_until(b"}}")
        client.send("\r\n".join(["GET /get HTTP/1.1", "Host: a", *wish, "", ""]).encode())
        assert client.read_until(b"}}").startswith(b"HTTP/1.1 200 ")


def test_a_wish_to_close_is_kept_when_one_to_change_the_protocol_is_not(serve):
    server = serve(post("/echo", echo, Body))
    with server.connect() as client:
        client.send(json_request("/echo", b"{}", "Connection: close, Upgrade", "Upgrade: h2c"))
        assert b"connection: close" in client.read_to_end().lower()


@pytest.mark.parametrize("at", [1, 30, 80, 105, 140])
def test_a_client_may_leave_at_any_moment(serve, at, caplog):
    server = serve(post("/echo", echo, Body))
    request = json_request("/echo", b'{"text": "' + b"x" * 50 + b'"}')
    for _ in range(5):
        with server.connect() as client:
            client.send(request[:at])
    assert server.http.post("/echo", json={}).status_code == 200
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("path", ["/echo", "/nothing"])
def test_a_client_that_asks_first_and_is_refused_gets_a_new_connection(serve, path):
    server = serve(post("/echo", echo, Body), max_body_bytes=1024)
    head, _, _ = json_request(path, b"x" * 2000, "Expect: 100-continue").partition(b"\r\n\r\n")
    with server.connect() as client:
        answer = client.send(head + b"\r\n\r\n").read_to_end()
    assert answer.startswith(b"HTTP/1.1 4") and b"connection: close" in answer


def test_a_body_behind_its_answer_is_passed_over(serve):
    server = serve(post("/echo", echo, Body))
    with server.connect() as client:
        late = json_request("/nothing", b"x" * 500)
        client.send(late[:-100]).read_until(b"}")
        client.send(late[-100:] + json_request("/echo", b'{"count":1}'))
        assert client.read_until(b"}}").startswith(b"HTTP/1.1 200 ")


def test_a_body_behind_its_answer_is_not_waited_for(serve):
    server = serve(post("/echo", echo, Body), read_timeout=0.2)
    with server.connect() as client:
        client.send(json_request("/nothing", b"x" * 500)[:-100]).read_until(b"}")
        assert client.send(b"x").read_to_end() == b""


LATE = json_request("/nothing", b"x" * 500, "Connection: close")


@pytest.mark.parametrize("first", [LATE[:-500], LATE[:-100], b"no request\r\n"], ids=["head", "half", "garbage"])
def test_what_a_client_sends_after_the_last_answer_does_not_cost_it_the_answer(serve, first, monkeypatch):
    monkeypatch.setattr(protocol, "LINGER_S", 30.0)  # so that a slow machine does not end it first
    server = serve(post("/echo", echo, Body))
    with server.connect() as client:
        client.send(first)
        time.sleep(0.2)  # the answer is written by now, and not read
        for _ in range(3):
            client.send(b"x" * 100)
            time.sleep(0.02)
        answer = client.read_until(b"}")
        while piece := client.socket.recv(1000):  # a reset would raise
            answer += piece
    assert answer.startswith(b"HTTP/1.1 4") and answer.endswith(b"}") and b"connection: close" in answer.lower()


def test_a_client_that_sends_without_end_after_the_last_answer_is_cut(serve, monkeypatch):
    monkeypatch.setattr(protocol, "LINGER_S", 0.2)
    server = serve(post("/echo", echo, Body))
    with server.connect() as client, pytest.raises(ConnectionError):
        client.send(LATE[:-500])
        for _ in range(1000):
            client.send(b"x")
            time.sleep(0.01)


def test_a_client_that_stays_silent_in_the_middle_of_its_request_is_cut(serve, monkeypatch):
    monkeypatch.setattr(protocol, "LINGER_S", 0.2)
    server = serve(post("/echo", echo, Body))
    with server.connect() as client:
        assert client.send(LATE[:-100]).read_to_end().endswith(b"}")
        wait_until(lambda: not server.num_connections)


def test_a_client_that_asks_first_is_told_to_go_on(serve):
    server = serve(post("/echo", echo, Body), max_body_bytes=1024)
    head, _, body = json_request("/echo", b'{"count":1}', "Expect: 100-continue").partition(b"\r\n\r\n")
    with server.connect() as client:
        assert client.send(head + b"\r\n\r\n").read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert b'{"count":1}' in client.send(body).read_until(b"}}")


# -- clients that end their side --------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_ends_its_side_gets_its_answer(serve, version, is_stream):
    go_on = threading.Event()

    async def events():
        yield b"data: 1\n\n"
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        yield b"data: 2\n\n"

    async def handler(service, request):
        if is_stream:
            return EventStream(events())
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        return Reply({"done": True})

    server = serve(post("/slow", handler, Body))
    with server.connect() as client:
        client.send(json_request("/slow").replace(b"1.1", version))
        begin = client.read_until(b"data: 1") if is_stream else b""
        client.socket.shutdown(socket.SHUT_WR)
        probed = client.socket.recv(1)  # the server has seen the end
        go_on.set()
        answer = begin + probed + client.read_to_end()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and answer.count(b"HTTP/1.1") == 1
    assert (chunks_of(body) if is_stream else body) == (b"data: 1\n\ndata: 2\n\n" if is_stream else b'{"done":true}')
    wait_until(lambda: not server.num_connections)


def chunks_of(body: bytes) -> bytes:
    """What a body with chunks says."""
    said = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        said, body = said + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return said


def test_all_that_was_asked_before_the_end_is_answered_but_for_what_is_not_whole(serve):
    gate = threading.Event()

    async def handler(service, request) -> Reply:
        while not gate.is_set():
            await asyncio.sleep(0.01)
        return Reply(request.body)

    server = serve(post("/slow", handler, Body))
    with server.connect() as client:
        whole = b"".join(json_request("/slow", b'{"count":%d}' % i) for i in range(2))
        client.send(whole + json_request("/slow", b'{"count":2}')[:-1])
        client.socket.shutdown(socket.SHUT_WR)
        first = client.socket.recv(1)
        gate.set()
        answer = first + client.read_to_end()
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 2
    assert answer.index(b'{"count":0}') < answer.index(b'{"count":1}') and b'"count":2' not in answer


@pytest.mark.parametrize("part", [b"", b"POST /echo HT", json_request("/echo", b"{}")[:-1]])
def test_a_client_that_ends_its_side_too_early_is_not_waited_for(serve, part):
    server = serve(post("/echo", echo, Body))
    with server.connect() as client:
        client.send(part)
        client.socket.shutdown(socket.SHUT_WR)
        assert client.read_to_end() == b""


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_has_gone_is_told_from_one_that_reads_on(serve, is_stream):
    """Both look the same at first, and nothing else is ever sent to this one."""
    started = threading.Event()

    async def events():
        yield b"data: 1\n\n"
        await asyncio.sleep(3600)

    async def handler(service, request):
        if is_stream:
            return EventStream(events())
        started.set()
        await asyncio.sleep(3600)
        return Reply("late")

    server = serve(post("/slow", handler, Body))
    with server.connect() as client:
        client.send(json_request("/slow"))
        if is_stream:
            client.read_until(b"data: 1\n\n\r\n")
        else:
            assert started.wait(20)
            client.socket.shutdown(socket.SHUT_WR)
            assert client.socket.recv(1) == b"H"
    wait_until(lambda: not server.num_tasks)


# -- clients that drip -------------------------------------------------------------------------------------------------
class Clock:
    """An event loop's: calls what is due as time goes on."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.calls: list[tuple[float, Any, tuple[Any, ...]]] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, function: Any, *args: Any) -> Any:
        call = (self.now_s + delay_s, function, args)
        self.calls.append(call)
        return SimpleNamespace(cancel=lambda: call in self.calls and self.calls.remove(call))

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds
        for call in [call for call in self.calls if call[0] <= self.now_s]:
            self.calls.remove(call)
            call[1](*call[2])


class Buffer(asyncio.Transport):
    """A transport that is as full as the test says."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.is_cut = False

    def get_write_buffer_size(self) -> int:
        return self.size

    def abort(self) -> None:
        self.is_cut = True

    def is_closing(self) -> bool:
        return self.is_cut


async def no_app(scope, receive, send) -> None:
    """Never called."""


@pytest.mark.parametrize(("bytes_per_s", "is_cut"), [(0, True), (1, True), (8 * 1024, True), (64 * 1024, False)])
def test_what_waits_for_a_client_has_a_least_speed(bytes_per_s, is_cut):
    config = ServerConfig.from_kwargs(write_timeout=5, read_timeout=1e6)
    clock, buffer = Clock(), Buffer(2 * 2**20)
    application = uvicorn.Config(no_app, interface="asgi3", ws="none", lifespan="off", log_config=None)
    made = make_protocol(config, TrafficLog(Counts(), config))
    connection = made(config=application, server_state=ServerState(), app_state={}, _loop=clock)
    connection.connection_made(buffer)
    connection.pause_writing()
    while not buffer.is_cut and buffer.size and clock.now_s < 10_000:
        clock.pass_s(1)
        buffer.size = max(0, buffer.size - bytes_per_s)
    assert buffer.is_cut == is_cut
    assert clock.now_s <= (5 if not bytes_per_s else 5 + 2 * 2**20 // (16 * 1024))
