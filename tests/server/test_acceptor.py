"""Connections where file descriptors are short: the others wait, one line says so, and nobody is turned away."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading

import pytest
from fake_engine import says
from gate import wait_until
from route_server import Connection

from mooli.server import listener

ASK = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
LINE = "new connections wait until others end"


@pytest.fixture(autouse=True)
def say_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "SAY_AGAIN_S", 3600.0)


def connections(server) -> int:
    return len(server.http_server._uvicorn.server_state.connections)


def leave_few(server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Client and server share the process: 20 clients take 20 descriptors, and four more are left for the server."""
    with Connection(server.http_server.port) as probe:
        wait_until(lambda: connections(server) == 1)
        lowest = probe.socket.fileno()
    monkeypatch.setattr(listener, "_usable", lambda: lowest + 24)


def test_connections_beyond_the_limit_wait_until_others_end(live, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    server = live(says("Hello"))
    leave_few(server, monkeypatch)
    clients = [Connection(server.http_server.port) for _ in range(20)]
    wait_until(lambda: LINE in caplog.text)
    assert 1 <= connections(server) < 20
    answers = []
    for client in clients:
        client.send(ASK)
    for client in clients:
        answers.append(client.read_to_end())
        client.close()
    assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)
    assert caplog.text.count(LINE) == 1
    assert "Traceback" not in caplog.text


def test_connections_that_are_kept_for_nothing_make_room(live, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    server = live(says("Hello"))
    leave_few(server, monkeypatch)
    clients = []
    for _ in range(20):
        clients.append(Connection(server.http_server.port))
        clients[-1].send(ASK.replace(b"Connection: close\r\n", b"")).read_until(b"\r\n\r\n")
    assert LINE in caplog.text
    for client in clients:
        client.close()


class Listener:
    """A listening socket with connections that wait, by the addresses they came from."""

    def __init__(self, hosts: str) -> None:
        self.hosts = list(hosts)
        self.clients: list[socket.socket] = []

    def accept(self):
        if not self.hosts:
            raise BlockingIOError
        near, far = socket.socketpair()
        self.clients.append(near)
        return far, (self.hosts.pop(0), 1)

    def fileno(self) -> int:
        return -1


@pytest.fixture
def began(monkeypatch):
    """Connections by the place of their client, in the order in which an acceptor begins with them."""

    def run(hosts: str, leave: str = "") -> list[int]:
        order: list[int] = []
        waiting = Listener(hosts)

        async def accept() -> None:
            taker = listener.Acceptor(waiting, asyncio.Protocol, None, lambda: None)

            async def opens(connection: socket.socket) -> None:
                order.append(numbers[connection])
                connection.close()

            numbers: dict[socket.socket, int] = {}
            accepting = waiting.accept

            def accept_one():
                connection, address = accepting()
                numbers[connection] = len(numbers)
                return connection, address

            waiting.accept = accept_one
            monkeypatch.setattr(listener, "_has_left", lambda connection: numbers[connection] < len(leave))
            taker._open = opens
            taker._take()
            for _ in range(2 * len(hosts)):
                await asyncio.sleep(0)

        asyncio.run(accept())
        for client in waiting.clients:
            client.close()
        return order

    return run


def test_addresses_take_turns_whoever_came_first(began):
    assert began("aaaaaaab") == [0, 7, 1, 2, 3, 4, 5, 6]
    assert began("aaabbbc") == [0, 3, 6, 1, 4, 2, 5]


def test_who_has_left_already_is_not_begun_with(began):
    assert began("aaaab", leave="aaa") == [3, 4]


def test_what_was_taken_is_begun_with_when_the_server_ends(live):
    server = live(says("Hello"))
    with Connection(server.http_server.port) as client:
        client.send(ASK)
        server.loop.call_soon_threadsafe(server.http_server.drain)
        assert client.read_to_end()


class Short:
    """A listening socket of a process with no descriptor left."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.is_short = threading.Event()
        self.num_asked = 0

    def __getattr__(self, name: str):
        return getattr(self._listener, name)

    def accept(self):
        self.num_asked += 1
        if self.is_short.is_set():
            raise OSError(errno.EMFILE, "Too many open files")
        return self._listener.accept()


def test_no_descriptor_at_all_is_one_line_and_passes(live, monkeypatch, caplog):
    monkeypatch.setattr(listener, "LOOK_AGAIN_S", 0.01)
    caplog.set_level(logging.INFO)
    made = []

    class Acceptor(listener.Acceptor):
        def __init__(self, listener, *rest) -> None:
            made.append(Short(listener))
            super().__init__(made[0], *rest)

    monkeypatch.setattr("mooli.server.http_server.Acceptor", Acceptor)
    server = live(says("Hello"))
    (short,) = made
    short.is_short.set()
    with Connection(server.http_server.port) as client:
        client.send(ASK)
        wait_until(lambda: short.num_asked >= 5)
        assert caplog.text.count(LINE) == 1 and "Too many open files" in caplog.text
        short.is_short.clear()
        assert client.read_to_end().startswith(b"HTTP/1.1 200 ")
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(("limit", "usable"), [(64, 48), (1024, 1008), (20, 15)])
def test_a_few_descriptors_are_left_for_files(monkeypatch, limit, usable):
    monkeypatch.setattr(listener, "_limit", lambda: limit)
    assert listener._usable() == usable
