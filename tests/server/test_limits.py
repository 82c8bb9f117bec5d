"""How much a server takes at once, and what it takes while it ends."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import msgspec
import pytest
from route_server import json_request, message_of, post

from mooli.server import protection
from mooli.server.json_body import BodyRoom
from mooli.server.routing import Access, Dialect, HttpError, Reply


class Gate:
    """A handler that answers once `open` is called."""

    def __init__(self) -> None:
        self.num_waiting = threading.Semaphore(0)
        self._is_open = False

    async def __call__(self, service, request) -> Reply:
        self.num_waiting.release()
        while not self._is_open:
            await asyncio.sleep(0.01)
        return Reply("done")

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self.num_waiting.acquire(timeout=60)

    def open(self) -> None:
        self._is_open = True


async def answer(service, request) -> Reply:
    return Reply("done")


class Body(msgspec.Struct):
    text: str = ""


@pytest.mark.parametrize("dialect", list(Dialect))
def test_more_requests_than_allowed_are_asked_to_come_again(serve, dialect):
    gate = Gate()
    probe = post("/health", answer, methods=("GET",), access=Access.OPEN)
    server = serve(post("/wait", gate), post("/done", answer, dialect=dialect), probe, max_concurrent_requests=2)
    clients = [server.connect().send(json_request("/wait")) for _ in range(2)]
    gate.wait_for(2)
    refused = server.http.post("/done")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert "2 requests already" in message_of(refused)
    assert server.http.post("/nothing").status_code == 429
    assert server.http.get("/health").status_code == 200
    gate.open()
    for client in clients:
        client.read_until(b"done")
        client.close()
    assert server.http.post("/done").status_code == 200


def test_clients_that_leave_make_room(serve):
    gate = Gate()
    server = serve(post("/wait", gate), post("/done", answer), max_concurrent_requests=1)
    for _ in range(5):
        with server.connect() as client:
            client.send(json_request("/wait"))
            gate.wait_for(1)
        while server.num_tasks:
            time.sleep(0.01)
    assert server.http.post("/done").status_code == 200


def test_a_flood_of_probes_is_limited_too(serve, monkeypatch):
    monkeypatch.setattr(protection, "MAX_PROBES", 1)
    gate = Gate()
    server = serve(post("/health", gate, access=Access.OPEN), post("/done", answer))
    with server.connect() as client:
        client.send(json_request("/health"))
        gate.wait_for(1)
        assert server.http.post("/health").status_code == 429
        assert server.http.post("/done").status_code == 200
        gate.open()
        client.read_until(b"done")


def test_a_server_that_drains_takes_no_new_generation(serve):
    server = serve(post("/generate", answer, is_generation=True), post("/info", answer))
    server.service.is_draining = True
    refused = server.http.post("/generate")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert refused.headers["connection"] == "close"
    assert server.http.post("/info").status_code == 200


def test_many_long_bodies_at_a_time_are_refused(serve):
    server = serve(post("/body", answer, Body), max_body_bytes=1024)
    room = 16 * 1024
    body = json.dumps({"text": "x" * 1000}).encode()
    clients = [server.connect().send(json_request("/body", body)[:-1]) for _ in range(room // 1000)]
    statuses = set()
    for _ in range(100):
        statuses.add(server.http.post("/body", content=body, headers={"Content-Type": "application/json"}).status_code)
        if 503 in statuses:
            break
    assert 503 in statuses
    for client in clients:
        client.close()
    while server.num_tasks:
        time.sleep(0.01)
    assert server.http.post("/body", json={"text": "x" * 900}).status_code == 200


def test_what_a_body_took_is_given_back():
    room = BodyRoom(100)
    with pytest.raises(HttpError) as caught, room.share() as first, room.share() as second:
        first.take(60)
        second.take(40)
        first.take(1)
    assert caught.value.status_code == 503
    assert room.num_bytes == 0
