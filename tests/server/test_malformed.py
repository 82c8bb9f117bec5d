"""400 broken requests, each the same every time: every one gets whole answers or none, and the server stays well."""

from __future__ import annotations

import contextlib
import logging
import random
import re
import socket

import msgspec
from route_server import Connection, json_request, post

from mooli.server.routing import Reply

NUM_REQUESTS = 400

WHOLE = [
    json_request("/echo", b'{"text": "abc"}'),
    json_request("/echo", b'{"text": "abc"}', "Connection: close", "X-Request-Id: one"),
    json_request("/echo", b'{"text": "abc"}', "Connection: Upgrade", "Upgrade: h2c"),
    b"GET /get?a=b HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://a/get HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'8\r\n{"text":\r\n6;a=b\r\n"abc"}\r\n0\r\nX-Later: b\r\n\r\n',
]
PIECES = [
    *(bytes([value]) for value in b"\r\n\0 \t:/#?%+,;\xff"),
    b"\r\n", b"%zz", b"\xc3\xa9", b"0x", b"-1", b"chunked", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"A" * 9000,
    b"Host: b\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n",
    b"Expect: 100-continue\r\n", b"Upgrade: websocket\r\n",
]  # fmt: skip


class Body(msgspec.Struct):
    text: str = ""


async def answer(service, request) -> Reply:
    return Reply({"given": request.body})


def broken(draw: random.Random) -> bytes:
    """A whole request, or two, with a few changes."""
    data = b"".join(draw.choices(WHOLE, k=draw.choice([1, 1, 2])))
    for _ in range(draw.randint(1, 4)):
        at, end = sorted(draw.choices(range(len(data) + 1), k=2))
        change = draw.randrange(5)
        if change == 0:
            data = data[:at] + draw.choice(PIECES) + data[at:]
        elif change == 1:
            data = data[:at] + data[min(end, at + 12) :]
        elif change == 2:
            data = data[:at] + data[at : at + 40] * 2 + data[at + 40 :]
        elif change == 3:
            data = data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
        else:
            data = data[:end]
    return data


def rest_of_answer(said: bytes) -> bytes:
    """What stands behind the first answer, which has to be whole."""
    head, end, rest = said.partition(b"\r\n\r\n")
    assert end, said
    status = re.match(rb"HTTP/1\.1 (\d{3}) [A-Z]", head)
    assert status, said
    if status[1] == b"100":
        return rest
    length = int(re.search(rb"(?i)\r\ncontent-length: (\d+)", head)[1])
    assert len(rest) >= length, said
    return rest[length:]


def test_broken_requests_get_whole_answers_and_harm_nobody(serve, caplog):
    caplog.set_level(logging.INFO)
    server = serve(post("/echo", answer, Body), post("/get", answer, methods=("GET",)), max_header_bytes=8192)
    draw = random.Random(18)
    statuses = set()
    for number in range(NUM_REQUESTS):
        data = broken(draw)
        with Connection(server.port) as client:
            client.send(data)
            with contextlib.suppress(OSError):  # it may have been refused and closed already
                client.socket.shutdown(socket.SHUT_WR)
            said = client.read_to_end()
        while said:
            statuses.add(said[9:12])
            said = rest_of_answer(said)
        if number % 50 == 0:
            assert server.http.post("/echo", json={"text": "well"}).json() == {"given": {"text": "well"}}
    assert {b"200", b"400"} <= statuses and not statuses & {b"500", b"502", b"503"}
    assert "Traceback" not in caplog.text
