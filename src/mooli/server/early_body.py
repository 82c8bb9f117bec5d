"""The body of a request, read before it is known which engine answers it.

Owns its bounds in bytes and time, which model a body asks for, and how the application of that model's route gets it
as if it came now. Never refuses for what is in it, and never asks who sends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from mooli.server.config import ServerConfig
from mooli.server.http import MIN_BODY_BYTES_PER_S
from mooli.server.json_body import BodyRoom, BodyShare
from mooli.server.routing import HttpError, Receive, Scope

LONG_BODIES = 16
"""So many of the longest bodies may be read at a time."""


class ClientLeftError(Exception):
    """The connection has ended before its request had come. Nobody is there to be told."""


class _Named(msgspec.Struct):
    model: Any = None


def model_of(raw: bytes) -> str:
    """The model that a body asks for; "" if it names none."""
    try:
        found = msgspec.json.decode(raw, type=_Named).model
    except (ValueError, RecursionError):
        return ""
    return found if isinstance(found, str) else ""


class EarlyBodies:
    """Reads bodies for a server of `config`."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._room = BodyRoom(LONG_BODIES * config.max_body_bytes)

    @contextmanager
    def share(self) -> Iterator[BodyShare]:
        """Of the room that all bodies have together; to be held until the application of a route reads the body."""
        with self._room.share() as share:
            yield share

    async def read(self, scope: Scope, receive: Receive, share: BodyShare) -> bytes:
        """All of it; b"" for one that is declared too long, which is refused without. Raises HttpError for one that is
        too long or too slow, ClientLeftError."""
        most = self._config.max_body_bytes
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > most:
            return b""
        loop = asyncio.get_running_loop()
        started_s, received = loop.time(), bytearray()
        while True:
            limit_s = self._config.read_timeout + len(received) / MIN_BODY_BYTES_PER_S
            try:
                message = await asyncio.wait_for(receive(), max(0.0, started_s + limit_s - loop.time()))
            except asyncio.TimeoutError:
                raise HttpError(408, f"The body did not arrive within {limit_s:.0f} s.") from None
            if message["type"] != "http.request":
                raise ClientLeftError
            piece = message.get("body", b"")
            share.take(len(piece))
            received += piece
            if len(received) > most:
                raise HttpError(413, f"The body is larger than the {most} bytes allowed here.")
            if not message.get("more_body", False):
                return bytes(received)


def again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` first, and keeps it no longer."""
    bodies = [body]
    del body

    async def receive_again() -> Any:
        if not bodies:
            return await receive()
        return {"type": "http.request", "body": bodies.pop(), "more_body": False}

    return receive_again
