"""The end of a server that is asked to end: who is waited for, for how long, and what the others are told."""

from __future__ import annotations

import json
import logging
import threading

import httpx
import pytest
from fake_engine import says
from gate import Gate, wait_until
from route_server import Connection, json_request, post

from mooli.server import http_server, launch
from mooli.server.app import ROUTES, build_app
from mooli.server.routing import Reply

BODY = json.dumps({"text": "abc", "sampling_params": {"max_new_tokens": 3, "temperature": 0}}).encode()
REQUEST = json_request("/generate", BODY)


def drain(server) -> None:
    server.loop.call_soon_threadsafe(server.http_server.drain)
    wait_until(lambda: server.service.is_draining)


def tasks(server) -> int:
    return len(server.http_server._uvicorn.server_state.tasks)


def connections(server) -> list:
    return list(server.http_server._uvicorn.server_state.connections)


def admitted(server, request: bytes) -> Connection:
    """A connection with `request`, or a part of it, sent and its head taken."""
    client = Connection(server.http_server.port)
    before = tasks(server)
    client.send(request)
    wait_until(lambda: tasks(server) == before + 1)
    return client


def test_a_request_whose_body_is_still_arriving_is_answered(live, monkeypatch):
    monkeypatch.setattr(http_server, "CLOSE_WAIT_S", 0)
    server = live(says("Hello"))
    with admitted(server, REQUEST[:-10]) as client:
        drain(server)
        refused = server.http.post("/generate", json={"text": "x"})
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        server._thread.join(0.5)
        assert server._thread.is_alive()
        answer = client.send(REQUEST[-10:]).read_to_end()
    assert answer.startswith(b"HTTP/1.1 200 ") and b'"completion_tokens":3' in answer
    assert b"\r\nconnection: close\r\n" in answer
    assert server.stop() == 0


def test_more_work_on_a_connection_that_is_kept_is_refused_and_the_connection_closed(live):
    with Gate() as gate:
        server = live(says("Hello"), runner={"raises": gate})
        with admitted(server, REQUEST), Connection(server.http_server.port) as kept:
            assert b"200 OK" in kept.send(json_request("/tokenize", b'{"prompt":"a"}')).read_until(b"}")
            drain(server)
            answer = kept.send(REQUEST).read_to_end()
            assert answer.startswith(b"HTTP/1.1 503 ") and b"\r\nconnection: close\r\n" in answer
            gate.open()


def test_an_answer_is_waited_for_until_the_system_has_taken_all_of_it(live, monkeypatch):
    """Its last byte was handed over, and its client reads late: later than a server waits for idle connections."""

    async def large(service, request) -> Reply:
        return Reply(b"x" * 20_000_000)

    monkeypatch.setattr(http_server, "CLOSE_WAIT_S", 0)
    monkeypatch.setattr(launch, "build_app", lambda service: build_app(service, [*ROUTES, post("/large", large)]))
    server = live(says("Hello"))
    with Connection(server.http_server.port) as client:
        client.send(json_request("/large"))
        wait_until(lambda: any(connection.has_unsent for connection in connections(server)) and not tasks(server))
        drain(server)
        server._thread.join(0.5)
        assert server._thread.is_alive()
        assert client.read_to_end().endswith(b"\r\n\r\n" + b"x" * 20_000_000)
    assert server.stop() == 0


def test_who_does_not_finish_in_time_is_told(live, monkeypatch):
    monkeypatch.setattr(http_server, "CLOSE_WAIT_S", 5)
    server = live(says("Hello"), shutdown_timeout=0.2)
    with admitted(server, REQUEST[:-10]) as client:
        drain(server)
        answer = client.read_to_end()
    assert answer.startswith(b"HTTP/1.1 503 ") and b"The server is shutting down." in answer
    assert b"\r\nretry-after: 5\r\n" in answer and b"\r\nx-request-id: " in answer
    assert server.stop() == 0


def test_the_second_signal_ends_those_that_are_still_sending(live):
    server = live(says("Hello"), shutdown_timeout=600)
    with admitted(server, REQUEST[:-10]) as client:
        drain(server)
        drain(server)
        assert client.read_to_end().startswith(b"HTTP/1.1 503 ")
    assert server.stop() == 0


@pytest.mark.parametrize("is_idle", [True, False])
def test_the_log_says_that_the_server_was_asked_to_end(live, caplog, is_idle):
    caplog.set_level(logging.INFO, "mooli.server.http_server")
    server = live(says("Hello"))
    if is_idle:
        server.stop()
    else:
        with admitted(server, REQUEST[:-10]) as client:
            drain(server)
            client.send(REQUEST[-10:]).read_to_end()
    expected = "no request is being answered" if is_idle else "requests that have 25 s to finish: 1"
    wait_until(lambda: f"shutting down: {expected}" in caplog.text)


def test_probes_do_not_hold_up_the_end(live):
    """They are answered while the server drains, and asked again and again."""
    server = live(says("Hello"), shutdown_timeout=600)
    stopped = threading.Event()

    def probe() -> None:
        with httpx.Client(base_url=server.url, timeout=20) as http:
            while not stopped.is_set():
                try:
                    http.get("/health/live")
                except httpx.TransportError:
                    return

    probing = threading.Thread(target=probe)
    probing.start()
    try:
        assert server.stop() == 0
    finally:
        stopped.set()
        probing.join()
