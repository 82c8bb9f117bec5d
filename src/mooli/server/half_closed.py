"""A client that has ended its side of the connection, and may still be waiting for its answer.

Owns finding out whether it is there. A client that only sends no more and one that has gone look the same, until it is
sent something: the system of one that has gone answers with a reset. So the answer is begun, byte by byte: what is sent
here is part of any answer, and the answer goes on behind it. Never decides what is answered.

Sources: RFC 9112, 4 (every answer begins so), 7.1 (the size of a chunk may begin with zeros); RFC 9293, 3.5.3 (reset).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from mooli.server.lingering import LingeringTransport

ANSWER_BEGINS = b"HTTP/1.1 "
CHUNK_BEGINS = b"0"

FIRST_LOOK_S = 0.01
"""After which a reset is looked for. Each wait is `GROWTH` times as long as the one before, with a byte each."""

GROWTH = 3


class HalfClosedTransport:
    """A connection's transport from the end of the client's side on. Everything not named here is the transport's own.

    has_begun: whether the head of the running answer was sent; None where nothing can be sent before the rest of it.
    """

    def __init__(
        self,
        transport: LingeringTransport,
        loop: asyncio.AbstractEventLoop,
        has_begun: Callable[[], bool | None],
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._has_begun = has_begun
        self._num_sent = 0
        """Bytes of the next answer's head that the client has."""
        self._wait_s = FIRST_LOOK_S
        self._timer: asyncio.TimerHandle | None = None
        self._ask()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._num_sent:
            data, self._num_sent = data[self._num_sent :], 0
        self._transport.write(data)

    def forget(self) -> None:
        """The connection is lost."""
        if self._timer is not None:
            self._timer.cancel()

    def _ask(self) -> None:
        """Send a byte, and look later what became of it."""
        has_begun = self._has_begun()
        if has_begun:
            self._transport.write(CHUNK_BEGINS)
        elif has_begun is not None and self._num_sent < len(ANSWER_BEGINS):
            self._transport.write(ANSWER_BEGINS[self._num_sent : self._num_sent + 1])
            self._num_sent += 1
        self._timer = self._loop.call_later(self._wait_s, self._look)
        self._wait_s *= GROWTH

    def _look(self) -> None:
        if self._transport.is_closing():
            return
        # Nothing is read any more, so the loop does not see a reset.
        if self._transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._transport.abort()
        else:
            self._ask()
