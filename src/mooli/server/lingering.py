"""The end of a connection whose client may still be sending.

Owns the wait between the last answer and the close: a socket that is closed with bytes unread, or that gets some
afterwards, sends a reset, and a reset takes from the client also the part of the answer that it has not read. Never
decides that a connection ends.

Sources: RFC 9112, 9.6 (close in stages: write side first, read on, then all of it).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

LINGER_S = 1.0
"""For which what a client still sends is read and dropped. Less than the server waits for connections at its end."""


class LingeringTransport:
    """A transport whose `close` gives a client that is still sending time to read what was written.

    is_sending: whether the client is in the middle of a request. Everything not named here is the transport's own.
    """

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, is_sending: Callable[[], bool]
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._is_sending = is_sending
        self._timer: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """True also while only the client's side is still open."""
        return self._timer is not None or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Dropped when closing, as a closed transport does."""
        if self._timer is None:
            self._transport.write(data)

    def close(self) -> None:
        """Send what was written, then close: at once, or when the client has heard of it if it is still sending."""
        if self._is_sending():
            self.linger()
        else:
            self.close_now()

    def linger(self) -> None:
        """End our side; read and drop for `LINGER_S`, or until the client ends its own, then close."""
        if self.is_closing():
            return
        self._timer = self._loop.call_later(LINGER_S, self._transport.close)
        self._transport.resume_reading()
        if self._transport.can_write_eof():  # not over TLS
            self._transport.write_eof()

    def close_now(self) -> None:
        """Send what was written, and close."""
        self.forget()
        self._transport.close()

    def forget(self) -> None:
        """The connection is lost: nothing is waited for."""
        if self._timer is not None:
            self._timer.cancel()
