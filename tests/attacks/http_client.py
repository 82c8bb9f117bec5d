"""Sends attacks over bare sockets, and says what was wrong with what came back.

Owns the reading of answers, a strict one: an answer that a client could misread is a fault of its own. Knows nothing of
how the server is built.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from malformed_http import Attack, Expected

REFUSALS = (501, 505)
"""Of the statuses from 500 those that are the client's doing: a coding or a version that the server does not know."""

PATIENCE_S = 90
"""A server that has neither answered nor closed by then hangs."""


@dataclass
class Answer:
    status: int
    body: bytes


class Malformed(Exception):
    """What came is no HTTP answer."""


def read_answers(received: bytes, is_over: bool) -> list[Answer] | None:
    """Those that are whole; None while the last is not. Raises Malformed."""
    answers = []
    while received:
        top, mark, rest = received.partition(b"\r\n\r\n")
        if not mark:
            if is_over:
                raise Malformed(f"an answer without an end of its head: {received[:200]!r}")
            return None
        first, *lines = top.split(b"\r\n")
        found = re.fullmatch(rb"HTTP/1\.1 ([1-5]\d\d) [ -~]*", first)
        if found is None:
            raise Malformed(f"no status line: {first[:200]!r}")
        status = int(found[1])
        fields = {}
        for line in lines:
            name, colon, value = line.partition(b":")
            if not colon or not re.fullmatch(rb"[-!#$%&'*+.^_`|~0-9A-Za-z]+", name):
                raise Malformed(f"no header: {line[:200]!r}")
            fields[name.lower()] = value.strip()
        if 100 <= status < 200:
            received = rest
            continue
        if b"chunked" in fields.get(b"transfer-encoding", b""):
            body = b""
            while True:
                size, mark, rest = rest.partition(b"\r\n")
                if not mark:
                    return _unfinished(received, is_over)
                length = int(size, 16)
                if len(rest) < length + 2:
                    return _unfinished(received, is_over)
                body, rest = body + rest[:length], rest[length + 2 :]
                if length == 0:
                    break
        else:
            length = int(fields.get(b"content-length", b"0"))
            if len(rest) < length:
                return _unfinished(received, is_over)
            body, rest = rest[:length], rest[length:]
        answers.append(Answer(status, body))
        received = rest
    return answers


def _unfinished(received: bytes, is_over: bool) -> None:
    if is_over:
        raise Malformed(f"an answer that is cut: {received[-200:]!r}")


def faults(attacks: list[Attack], port: int) -> list[str]:
    """Send all of them, several at a time; what was wrong with the answers."""
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda attack: run(attack, port), attacks)
        return [f"{attack.name}: {fault}" for attack, fault in zip(attacks, found, strict=True) if fault is not None]


def run(attack: Attack, port: int) -> str | None:
    """Send it; what was wrong with what came back, or None."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):  # it may close before everything is sent
            for step in attack.steps:
                if step is None:
                    client.shutdown(socket.SHUT_WR)
                else:
                    client.sendall(step)
        if attack.expected is Expected.NOTHING:
            if attack.resets:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return None
        try:
            answers, is_closed = _receive(client, attack)
        except Malformed as exc:
            return str(exc)
        except TimeoutError:
            return f"neither an answer nor a close within {PATIENCE_S} s"
    return _verdict(attack, answers, is_closed)


def _receive(client: socket.socket, attack: Attack) -> tuple[list[Answer], bool]:
    """All answers of a connection that must be closed; otherwise as many as there may be."""
    received = b""
    while True:
        answers = read_answers(received, is_over=False)
        enough = attack.expected is not Expected.REFUSED and answers is not None
        if enough and answers and (len(answers) >= attack.num_requests or attack.expected is Expected.FAULT):
            return answers, False
        try:
            piece = client.recv(65536)
        except ConnectionError:
            piece = b""
        if not piece:
            return read_answers(received, is_over=True) or [], True
        received += piece


def _verdict(attack: Attack, answers: list[Answer], is_closed: bool) -> str | None:
    statuses = [answer.status for answer in answers]
    said = f"answered {statuses}" + (" and closed" if is_closed else "")
    if any(status >= 500 and status not in REFUSALS for status in statuses):
        return said
    if attack.expected is Expected.REFUSED:
        return None if len(statuses) <= 1 and all(status >= 400 for status in statuses) else said
    if attack.expected is Expected.FAULT:
        return None if len(statuses) == 1 and 400 <= statuses[0] < 500 else said
    if attack.expected is Expected.SERVED:
        return None if statuses == [200] * attack.num_requests else said
    return None if 1 <= len(statuses) <= attack.num_requests or (is_closed and not statuses) else said
