"""What is kept of every HTTP request, answered or refused, by whatever layer: its id, a count, a line."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading

import msgspec
import pytest
from gate import wait_until
from route_server import json_request, post

from mooli.server import traffic
from mooli.server.protection import KeyCheck
from mooli.server.routing import Reply


class Body(msgspec.Struct):
    text: str = ""


async def answer(service, request) -> Reply:
    return Reply({"done": True})


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == traffic.__name__]


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, traffic.__name__)
    return caplog


REFUSALS = [
    (json_request("/done", b"{}"), 401, "/done"),
    (json_request("/nothing", b"{}", "X-Api-Key: k"), 404, "unmatched"),
    (b"PUT /done HTTP/1.1\r\nHost: a\r\nX-Api-Key: k\r\n\r\n", 405, "unmatched"),
    (json_request("/done", b"{}" + b" " * 2000, "X-Api-Key: k"), 413, "/done"),
    (json_request("/done", b"[]", "X-Api-Key: k"), 400, "/done"),
    (b"no request\r\n\r\n", 400, "unmatched"),
    (b"GET /done HTTP/1.1\r\n\r\n", 400, "unmatched"),
    (b"GET /done HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 3000, 431, "unmatched"),
    (b"GET /done HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: cow, chunked\r\n\r\n", 501, "unmatched"),
    (b"GET /done HTTP/2.0\r\nHost: a\r\n\r\n", 505, "unmatched"),
    (b"POST /done HTTP/1.1\r\nHost: a\r\nX-Api-Key: k\r\nTransfer-Encoding: chunked\r\n\r\ng\r\n", 400, "/done"),
    (b"GET /done HTTP/1.1\r\nHost: a\r\n", 408, "unmatched"),
]


@pytest.mark.parametrize(("request_", "status", "endpoint"), REFUSALS)
def test_every_refusal_is_counted_logged_and_has_an_id(serve, caplog, request_, status, endpoint):
    server = serve(
        post("/done", answer, Body), api_key="k", max_body_bytes=1024, max_header_bytes=2048,
        read_timeout=0.2 if status == 408 else 30,
    )  # fmt: skip
    with server.connect() as client:
        host, port = client.socket.getsockname()
        said = client.send(request_).read_until(b"\r\n\r\n")
        assert said.startswith(b"HTTP/1.1 %d " % status)
        request_id = re.search(rb"x-request-id: ([0-9a-f]{32})\r\n", said)[1].decode()
        wait_until(lambda: lines(caplog))
    ((counted, method, counted_status),) = server.counts.responses
    assert (counted, counted_status) == (endpoint, status)
    assert server.counts.requests == [(counted, method)]
    (line,) = lines(caplog)
    assert line.startswith(f"{host}:{port} {method} ") and line.endswith(f" request_id={request_id}")
    assert f" {status} " in line


def test_too_many_requests_are_counted_and_logged(serve, caplog):
    started, go_on = threading.Event(), threading.Event()

    async def wait(service, request) -> Reply:
        started.set()
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        return Reply("done")

    server = serve(post("/wait", wait), max_concurrent_requests=1)
    with server.connect() as client:
        client.send(json_request("/wait"))
        assert started.wait(20)
        assert server.http.post("/wait").status_code == 429
        go_on.set()
        client.read_until(b"done")
    wait_until(lambda: len(lines(caplog)) == 2)
    assert [status for *_, status in server.counts.responses] == [429, 200]
    assert [line.split()[2:4] for line in lines(caplog)] == [["/wait", "429"], ["/wait", "200"]]


def test_a_layer_that_fails_is_an_answer_like_others(serve, caplog, monkeypatch):
    async def fails(self, scope, receive, send) -> None:
        raise KeyError("a secret")

    monkeypatch.setattr(KeyCheck, "__call__", fails)
    server = serve(post("/done", answer))
    said = server.http.post("/done", headers={"X-Request-Id": "mine"})
    assert (said.status_code, said.headers["x-request-id"]) == (500, "mine")
    assert "secret" not in said.text and "a secret" in caplog.text
    wait_until(lambda: server.counts.responses)
    assert server.counts.responses == [("/done", "POST", 500)]


def test_a_client_that_left_is_counted_once_and_logged(serve, caplog):
    started = threading.Event()

    async def wait(service, request) -> Reply:
        started.set()
        await asyncio.sleep(3600)
        return Reply("late")

    server = serve(post("/wait", wait))
    with server.connect() as client:
        client.send(json_request("/wait"))
        assert started.wait(20)
    wait_until(lambda: lines(caplog))
    assert server.counts.responses == [("/wait", "POST", 499)]
    assert len(lines(caplog)) == 1


def test_cross_origin_answers_are_counted_and_carry_the_id(serve, caplog):
    server = serve(post("/done", answer), cors_allow_origins="https://page.example")
    headers = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    asked = server.http.options("/done", headers=headers)
    done = server.http.post("/done", headers={"Origin": "https://page.example"})
    assert asked.status_code == done.status_code == 200
    assert asked.headers["x-request-id"] and "X-Request-Id" in done.headers["access-control-expose-headers"]
    wait_until(lambda: len(server.counts.responses) == 2)


@pytest.mark.parametrize("given", ["a", "0af7651916cd43dd8448eb211c80319c", "req_1/2:3=+@a.b-c", "x" * 128])
def test_a_clients_id_is_taken(serve, caplog, given):
    server = serve(post("/done", answer))
    said = server.http.post("/done", headers={"X-Request-Id": given})
    assert said.headers["x-request-id"] == given
    wait_until(lambda: lines(caplog))
    assert lines(caplog)[0].endswith(f" request_id={given}")


@pytest.mark.parametrize(
    "given", [b"", b"a b", b'a"b', b"a\xffb", b"x" * 129, b"a\tb", b"a;b", b"a\r\nX-Request-Id: b"]
)
def test_an_id_that_could_not_stand_in_a_log_is_replaced(serve, given):
    server = serve(post("/done", answer))
    with server.connect() as client:
        head = b"POST /done HTTP/1.1\r\nHost: a\r\nX-Request-Id: " + given + b"\r\n\r\n"
        said = client.send(head).read_until(b"\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 200 ")
    assert re.search(rb"\r\nx-request-id: [0-9a-f]{32}\r\n", said) and said.count(b"x-request-id") == 1


def test_two_requests_have_two_ids(serve):
    server = serve(post("/done", answer))
    assert len({server.http.post("/done").headers["x-request-id"] for _ in range(3)}) == 3


def test_a_line_has_what_an_operator_asks_for(serve, caplog):
    server = serve(post("/items/{name}", answer))
    server.http.post("/items/secret?key=secret", headers={"X-Request-Id": "r1"})
    wait_until(lambda: lines(caplog))
    assert re.fullmatch(r"127\.0\.0\.1:\d+ POST /items/\{name\} 200 \d+\.\d{3} s request_id=r1", lines(caplog)[0])


def test_a_path_cannot_forge_a_line(serve, caplog):
    server = serve(post("/done", answer))
    server.http.get("/x%0A127.0.0.1:1 POST /done 200 0.001 s request_id=r1" + "y" * 1000)
    wait_until(lambda: lines(caplog))
    (line,) = lines(caplog)
    assert "\n" not in line and r'GET "/x\n127.0.0.1:1 POST /done' in line and len(line) < 500


def test_lines_can_be_json(serve, caplog):
    server = serve(post("/done", answer), log_requests_format="json")
    server.http.post("/done", headers={"X-Request-Id": "r1"})
    server.http.post("/nothing", headers={"X-Request-Id": "r2"})
    wait_until(lambda: len(lines(caplog)) == 2)
    done, nothing = map(json.loads, lines(caplog))
    assert set(done) == {
        "time", "event", "client", "method", "route", "path", "status", "duration_s", "request_id",
    }  # fmt: skip
    assert (done["route"], done["path"], done["status"], done["request_id"]) == ("/done", None, 200, "r1")
    assert (nothing["route"], nothing["path"], nothing["status"]) == (None, "/nothing", 404)


def test_an_answer_of_a_server_that_drains_is_the_last_on_its_connection(serve):
    server = serve(post("/info", answer))
    assert "connection" not in server.http.post("/info").headers
    server.service.is_draining = True
    assert server.http.post("/info").headers["connection"] == "close"
