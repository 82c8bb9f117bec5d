"""HTTP connections: what is a request, how long each of its phases may take, how much may come before a body, the end.

Owns the rules that have to be kept before there is a request, or after its answer was handed to the socket: uvicorn's
own protocol waits without end for the rest of a header, and for a client that reads nothing. Never looks into a body.

    first byte ─ read_timeout ─ end of the headers ─ answer ─ keep_alive_timeout ─ first byte of the next request
                                                      └ write_timeout while the client takes nothing

Two transports around asyncio's know what a client may still be doing at the end. `LingeringTransport`: a socket that is
closed with bytes unread, or that gets some afterwards, sends a reset, and a reset takes from the client also the part
of the answer that it has not read. `HalfClosedTransport`: a client that only sends no more and one that has gone look
the same, until it is sent something: the system of one that has gone answers with a reset. So the answer is begun, byte
by byte: what is sent is part of any answer, and the answer goes on behind it.

Sources: RFC 9110 (408, 431, 501, 505), RFC 9112 (message parsing; 4: every answer begins so; 7.1: the size of a chunk
may begin with zeros; 9.6: close in stages), RFC 9293, 3.5.3 (reset).
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from mooli.server.logs import HEADER, draw, request_id_of
from mooli.server.protection import DRAINING_RETRY_S, SHUTTING_DOWN
from mooli.server.routing import Scope
from mooli.server.traffic import REFUSAL_KEY, TrafficLog, address

if TYPE_CHECKING:
    from mooli.server.config import ServerConfig

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


MAX_HEADERS = 128

MAX_PIPELINED = 8
"""Requests that may wait on a connection for the one before them."""

MIN_TAKEN_BYTES_PER_S = 16 * 1024
"""What waits for a client may take it `write_timeout` and a second more for each of these."""

_UPGRADE_HEADERS = (b"upgrade", b"http2-settings")

_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
_ABSOLUTE = re.compile(rb"https?://([^/?#]+)(.*)", re.IGNORECASE)

_TOO_LARGE = "The request's headers are larger than this server takes."
_TOO_SLOW = "The request's headers did not arrive in time."
_GARBAGE = "This is not a valid HTTP request."
_VERSION = "This server speaks HTTP 1.1 and 1.0."
_CODING = "This server takes no other transfer coding than chunked, once, and in HTTP 1.1 only."
_NO_HOST = "A request needs exactly one Host header (in HTTP 1.0 at most one), of a host and maybe a port."
_TARGET = "The target of a request is a path, or an http or https URL, without a fragment."


def make_protocol(config: ServerConfig, traffic: TrafficLog) -> type[asyncio.Protocol]:
    """The class of connections with the limits of `config`. traffic: hears of what never becomes a request."""
    attributes = {
        "max_header_bytes": config.max_header_bytes,
        "read_timeout_s": config.read_timeout,
        "write_timeout_s": config.write_timeout,
        "traffic": traffic,
    }
    return type("Connection", (LimitedProtocol,), attributes)


class LimitedProtocol(HttpToolsProtocol):
    """One connection. Made by `make_protocol`."""

    max_header_bytes: int
    read_timeout_s: float
    write_timeout_s: float
    traffic: TrafficLog

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refusal = (400, _GARBAGE)
        """What is answered to what the parser does not take."""
        self._running: RequestResponseCycle | None = None
        """The request that is being answered, or was last."""
        self._is_in_head = self._is_in_message = False
        self._num_headers = 0
        self._header_bytes = 0
        self._idle_bytes = 0
        """Bytes since the last that the parser made something of: part of a header, or of nothing."""
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._write_deadline_s = 0.0
        self._half_closed: HalfClosedTransport | None = None

    # -- the connection, called by asyncio --
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._lingering = LingeringTransport(transport, self.loop, lambda: self._is_in_message)
        super().connection_made(self._lingering)  # type: ignore[arg-type]
        self._arm_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
        self._unset_keepalive_if_required()
        self._leave_running()
        self._lingering.forget()
        if self._half_closed is not None:
            self._half_closed.forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._idle_bytes += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse(*self._refusal)
            return
        if self._idle_bytes > self.max_header_bytes:
            self._refuse(431, _TOO_LARGE)
        elif self._is_waiting_for_head() and (self._is_in_message or self._idle_bytes):
            self._arm_head_timer()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            # The parser reads nothing behind a request to change the protocol, its body included, which Java's client
            # sends with every first request. The server may ignore the wish (RFC 9110, 7.8): a new parser is given the
            # request without it.
            head = self._head_without_upgrade()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            self._feed(head + data[exc.args[0] :])

    def _head_without_upgrade(self) -> bytes:
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                kept = [word for word in value.split(b",") if word.strip().lower() not in _UPGRADE_HEADERS]
                value = b",".join(kept)
            if name not in _UPGRADE_HEADERS and (value or name != b"connection"):
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. Whether the connection stays open, for answers to what it has sent whole."""
        if self._is_in_message and self.pipeline and self.pipeline[0][0] is self.cycle:
            self.pipeline.popleft()  # it will never be whole
        last = self.pipeline[0][0] if self.pipeline else self._running
        if self.transport.is_closing() or last is None or last.response_complete or last.more_body or self._is_tls:
            if self.transport.get_write_buffer_size() and self._write_timer is None:
                self._watch_writing()
            return False
        self._is_in_message = False
        last.keep_alive = False
        self._half_closed = HalfClosedTransport(self._lingering, self.loop, self._has_answer_begun)
        self.transport = self._half_closed  # type: ignore[assignment]
        for cycle in [self._running, *(cycle for cycle, _ in self.pipeline)]:
            if cycle is not None:
                cycle.transport = self._half_closed  # type: ignore[assignment]
        return True

    @property
    def _is_tls(self) -> bool:
        """Then there is no half of a connection: asyncio closes it all."""
        return self.scheme == "https"

    def _has_answer_begun(self) -> bool | None:
        """For `HalfClosedTransport`: an answer with chunks may be begun anew between any two of them."""
        running = self._running
        if running is None or running.response_complete:
            return None
        return (True if running.chunked_encoding else None) if running.response_started else False

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_write_timer()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    # -- the parser's events --
    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = self._is_in_message = True
        self._num_headers = self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_header(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # what stands behind a body says nothing about the request
            super().on_header(name, value)
        self._num_headers += 1
        self._count_header(len(name) + len(value))

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("this server is no proxy")
            return
        self._check_head()
        self._idle_bytes = 0
        super().on_headers_complete()
        self._is_in_head = False
        self._stop_head_timer()
        if self.expect_100_continue:
            # Whether a body still comes once it was refused is the client's choice, which nobody could tell.
            self.cycle.keep_alive = False
        if not self.pipeline:
            self._running = self.cycle
        elif len(self.pipeline) > MAX_PIPELINED:
            self.transport.abort()
        else:
            # uvicorn stops reading here; then it would not see that the client leaves.
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        self._idle_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._idle_bytes = 0
        self._is_in_message = False
        super().on_message_complete()
        if self.cycle.response_complete:
            # The answer did not wait for the body; what was left of it has come now.
            self._stop_head_timer()
            self._start_keep_alive()

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._running, _ = self.pipeline[-1]  # it is taken from there and started
        super().on_response_complete()
        if self.transport.is_closing():
            if self.transport.get_write_buffer_size() and self._write_timer is None:
                self._watch_writing()
        elif self._is_in_head:
            self._arm_head_timer()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    # -- refusals --
    def refuse_unanswered(self) -> None:
        """The server ends: say so to who waits for an answer that has not begun."""
        running = self._running
        if running is not None and not running.response_started and not self.transport.is_closing():
            self._refuse(503, SHUTTING_DOWN, b"retry-after: %d\r\n" % DRAINING_RETRY_S)

    def close_if_idle(self) -> None:
        """Between two requests, when a client has to expect it."""
        if self.cycle is not None and self.cycle.response_complete and not self._is_in_message:
            self.transport.close()

    def _check_head(self) -> None:
        """What llhttp lets pass and a proxy may read in another way (RFC 9112, 3.2 and 6.1)."""
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._reject(505, _VERSION)
        hosts = [value for name, value in self.headers if name == b"host"]
        codings = [value for name, value in self.headers if name == b"transfer-encoding"]
        if codings and (version == "1.0" or len(codings) > 1 or codings[0].lower() != b"chunked"):
            self._reject(501 if version == "1.1" else 400, _CODING)
        if len(hosts) > 1 or (not hosts and version == "1.1") or not all(map(_HOST.fullmatch, hosts)):
            self._reject(400, _NO_HOST)
        if b"#" in self.url:
            self._reject(400, _TARGET)
        if not self.url.startswith((b"/", b"*")):
            self._take_absolute_target()

    def _take_absolute_target(self) -> None:
        """Its host counts, and not that of the header."""
        target = _ABSOLUTE.fullmatch(self.url)
        if target is None or not _HOST.fullmatch(target[1]):
            self._reject(400, _TARGET)
        self.headers[:] = [(name, target[1] if name == b"host" else value) for name, value in self.headers]
        self.url = target[2] if target[2].startswith(b"/") else b"/" + target[2]

    def _reject(self, status: int, message: str) -> NoReturn:
        self._refusal = (status, message)
        raise ValueError(message)

    def _refuse(self, status: int, message: str, headers: bytes = b"") -> None:
        """Answer what is no request, and close."""
        running = self._running
        if running is None or running.response_complete:
            request_id = draw()
            self.traffic.refused(address(self.client), status, request_id)
        elif running.response_started:
            # A second status line would become part of the answer that is being sent.
            self._lingering.close_now()
            return
        else:
            running.scope["state"][REFUSAL_KEY] = status
            request_id = request_id_of(cast("Scope", running.scope))
        kind = "server_error" if status == 503 else "invalid_request_error"
        body = json.dumps({"error": {"message": message, "type": kind, "code": None}}).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(body)
        head += b"%s: %s\r\n%s\r\n" % (HEADER, request_id.encode(), headers)
        self.transport.write(STATUS_LINE[status] + head + body)
        self._leave_running()
        self._lingering.linger()

    def _leave_running(self) -> None:
        """Nobody will read the answer to the request that is being answered."""
        if self._running is not None and not self._running.response_complete:
            # uvicorn tells the newest request alone, not the one that others have been sent behind.
            self._running.disconnected = True
            self._running.message_event.set()

    # -- limits --
    def _count_header(self, num_bytes: int) -> None:
        self._header_bytes += num_bytes
        if self._header_bytes > self.max_header_bytes or self._num_headers > MAX_HEADERS:
            self._reject(431, _TOO_LARGE)

    def _is_waiting_for_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _arm_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.read_timeout_s, self._head_is_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing() or not self._is_waiting_for_head():
            return
        if self._is_in_head:
            self._refuse(408, _TOO_SLOW)
        else:
            self.transport.close()

    def _start_keep_alive(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    @property
    def has_unsent(self) -> bool:
        """Whether the system has not taken all yet that was written."""
        return self.transport.get_write_buffer_size() > 0

    def _watch_writing(self) -> None:
        """Cut the connection if nothing leaves it for `write_timeout_s`, or if all that waits takes too long."""
        size = self.transport.get_write_buffer_size()
        self._write_deadline_s = self.loop.time() + self.write_timeout_s + size / MIN_TAKEN_BYTES_PER_S
        self._write_timer = self.loop.call_later(self.write_timeout_s, self._check_writing, size)

    def _check_writing(self, size_before: int) -> None:
        self._write_timer = None
        size, left_s = self.transport.get_write_buffer_size(), self._write_deadline_s - self.loop.time()
        if size >= size_before or left_s <= 0:
            self.transport.abort()
        else:
            self._write_timer = self.loop.call_later(min(self.write_timeout_s, left_s), self._check_writing, size)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
