"""Connections from the listening socket, as many at a time as there are file descriptors for.

Owns when a connection is taken. asyncio's own server tries again 2,048 times in a row when there is no descriptor left,
with a traceback each. Here the others wait in the system's queue until there is one. A few are kept free: the server
opens files while it serves.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import ssl
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

BACKLOG = 2048
"""Connections that may wait in the system's queue."""

AT_ONCE = 2
"""Connections that are taken before anything else is done: a flood of them waits in the system's queue, and not those
who have one."""

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
        self._opening: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._told_s = -SAY_AGAIN_S

    def start(self) -> None:
        self._listener.setblocking(False)
        self._listener.listen(BACKLOG)
        self._loop.add_reader(self._listener.fileno(), self._take)

    def close(self) -> None:
        """Take no more. The socket stays its owner's."""
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._listener.fileno())

    async def wait_closed(self) -> None:
        """There is nothing to wait for; asyncio's servers have it too."""

    def _take(self) -> None:
        for _ in range(AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as exc:  # no descriptor, or no memory
                self._wait(exc.strerror or str(exc))
                return
            is_last = connection.fileno() >= _usable()
            opening = self._loop.create_task(self._open(connection))
            self._opening.add(opening)
            opening.add_done_callback(self._opening.discard)
            if is_last:
                self._wait("nearly all file descriptors are in use")
                return

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


def _limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 2**31


def _usable() -> int:
    """Connections get descriptors below this one."""
    limit = _limit()
    return limit - min(RESERVED, limit // 4)
