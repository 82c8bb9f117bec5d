"""The listening socket: its address, its TLS, and connections as many at a time as there are file descriptors for.

Owns what is tried before a model is loaded (address, certificate), the words of what is wrong with it, and when a
connection is taken and begun. asyncio's own server tries again 2,048 times in a row when there is no descriptor left,
with a traceback each. Here the others wait in the system's queue until there is one. A few are kept free: the server
opens files while it serves. Never asks for a password: a server has no terminal.

The system's queue is first come, first served: one client that connects without end would be in front of all others. So
it is emptied quickly, who has left already is let go, and the rest are begun in turn by address.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import os
import resource
import socket
import ssl
import time
from collections.abc import Callable

from mooli.errors import ConfigError
from mooli.server.config import ServerConfig


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """None without a certificate. Raises ConfigError if the files cannot be used together."""
    if config.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    password = config.ssl_keyfile_password
    was_asked = False

    def give_password() -> str:
        nonlocal was_asked
        was_asked = True
        return password or ""

    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, give_password)
    except (ssl.SSLError, OSError, ValueError) as exc:
        pair = f"ssl_keyfile={config.ssl_keyfile!r} and ssl_certfile={config.ssl_certfile!r}"
        if was_asked and password is None:
            hint = "the key is encrypted: give ssl_keyfile_password"
        elif was_asked:
            hint = "ssl_keyfile_password is not the password of the key"
        elif getattr(exc, "reason", None) == "KEY_VALUES_MISMATCH":
            hint = "the key is not that of the certificate"
        else:
            hint = f"both must be PEM files that this process may read ({exc})"
        raise ConfigError(f"{pair} cannot be used: {hint}") from exc
    if config.ssl_ca_certs is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except (ssl.SSLError, OSError) as exc:
            raise ConfigError(
                f"ssl_ca_certs={config.ssl_ca_certs!r} cannot be used: it must hold certificates in PEM ({exc})"
            ) from exc
    return context


def bound_socket(config: ServerConfig) -> socket.socket:
    """At the address that will be listened on, taken before a model is loaded in vain. Raises ConfigError."""
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as exc:
        raise ConfigError(f"host={config.host!r} is no address of this machine: {exc}") from exc
    family, _, _, _, address = found[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as exc:
        listener.close()
        hint = "choose another --port, or stop what listens there" if config.port else "check --host"
        raise ConfigError(f"cannot listen on {config.host}:{config.port}: {exc.strerror or exc}; {hint}") from exc
    return listener


def allow_many_connections() -> None:
    """Each connection is an open file, and the usual limit of 1,024 is a soft one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a system that has no more to give keeps what it has
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


logger = logging.getLogger(__name__)

BACKLOG = 2048
"""Connections that may wait in the system's queue."""

TAKEN_AT_ONCE = 64
"""Connections that are taken from the system before anything else is done: a hundredth of a millisecond each."""

BEGUN_AT_ONCE = 2
"""Of them, those that are begun before anything else is done: a flood of them waits, and not those who have one."""

RESERVED = 16
"""Descriptors that are left free, or a quarter of the limit where that is less."""

LOOK_AGAIN_S = 0.1
SAY_AGAIN_S = 60.0


class Acceptor:
    """Takes connections from `listener` from `start` on. tls: None for plain HTTP. make_room: asked to end connections
    that nobody needs while others wait."""

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        tls: ssl.SSLContext | None,
        make_room: Callable[[], None],
    ) -> None:
        self._listener = listener
        self._make_protocol = make_protocol
        self._tls = tls
        self._make_room = make_room
        self._loop = asyncio.get_running_loop()
        self._taken: collections.OrderedDict[str, collections.deque[socket.socket]] = collections.OrderedDict()
        """Not begun yet, by address; the address whose turn it is comes first."""
        self._next: asyncio.Handle | None = None
        self._opening: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._told_s = -SAY_AGAIN_S

    def start(self) -> None:
        self._listener.setblocking(False)
        self._listener.listen(BACKLOG)
        self._loop.add_reader(self._listener.fileno(), self._take)

    def close(self) -> None:
        """Take no more, and begin with those that were taken. The socket stays its owner's."""
        if self._timer is not None:
            self._timer.cancel()
        if self._next is not None:
            self._next.cancel()
        self._loop.remove_reader(self._listener.fileno())
        while self._taken:
            self._begin_one()

    async def wait_closed(self) -> None:
        """There is nothing to wait for; asyncio's servers have it too."""

    def _take(self) -> None:
        for _ in range(TAKEN_AT_ONCE):
            try:
                connection, address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                break
            except ConnectionAbortedError:
                continue
            except OSError as exc:  # no descriptor, or no memory
                self._wait(exc.strerror or str(exc))
                break
            is_last = connection.fileno() >= _usable()
            if _has_left(connection):
                connection.close()
            else:
                host = address[0] if isinstance(address, tuple) else ""
                self._taken.setdefault(host, collections.deque()).append(connection)
            if is_last:
                self._wait("nearly all file descriptors are in use")
                break
        if self._next is None:
            self._begin()

    def _begin(self) -> None:
        """With some of those that were taken, and with the next ones when everything else had its turn."""
        num_begun = 0
        while self._taken and num_begun < BEGUN_AT_ONCE:
            num_begun += self._begin_one()
        self._next = self._loop.call_soon(self._begin) if self._taken else None

    def _begin_one(self) -> bool:
        """The oldest of the address whose turn it is. False if it has left meanwhile."""
        host, connections = self._taken.popitem(last=False)
        connection = connections.popleft()
        if connections:
            self._taken[host] = connections
        if _has_left(connection):
            connection.close()
            return False
        opening = self._loop.create_task(self._open(connection))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)
        return True

    async def _open(self, connection: socket.socket) -> None:
        try:
            connection.setblocking(False)
            await self._loop.connect_accepted_socket(self._make_protocol, connection, ssl=self._tls)
        except OSError as exc:  # the client has left, or speaks no TLS
            connection.close()
            logger.debug("a connection was not made: %s", exc)

    def _wait(self, reason: str) -> None:
        now_s = time.monotonic()
        if now_s - self._told_s >= SAY_AGAIN_S:
            self._told_s = now_s
            logger.warning(
                "new connections wait until others end: %s (the limit is %d: raise it with ulimit -n, or LimitNOFILE="
                " of a unit)",
                reason,
                _limit(),
            )
        self._loop.remove_reader(self._listener.fileno())
        self._timer = self._loop.call_later(LOOK_AGAIN_S, self._look_again)

    def _look_again(self) -> None:
        if self._has_room():
            self._loop.add_reader(self._listener.fileno(), self._take)
        else:
            self._make_room()
            self._timer = self._loop.call_later(LOOK_AGAIN_S, self._look_again)

    def _has_room(self) -> bool:
        """Descriptors are given out lowest first."""
        try:
            lowest = os.dup(self._listener.fileno())
        except OSError:
            return False
        os.close(lowest)
        return lowest < _usable()


def _has_left(connection: socket.socket) -> bool:
    """Whether the client has cut the connection: nobody would read an answer."""
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0


def _limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 2**31


def _usable() -> int:
    """Connections get descriptors below this one."""
    limit = _limit()
    return limit - min(RESERVED, limit // 4)
