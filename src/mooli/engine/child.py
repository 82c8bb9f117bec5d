"""The engine's process before anybody has talked to it: it comes up while the server's own parts are imported.

Owns the command, the socket pair and the first moments, until an `EngineClient` takes over. Never imports what serves
or computes, so that nothing has to be waited for before the process is started.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

COMMAND = (sys.executable, "-m", "mooli.engine.process")
"""Becomes the engine process; the number of its socket is appended."""

SERVER_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM})
"""A terminal's Ctrl-C and a service manager's SIGTERM go to all processes of a service. When the engine ends is the
server's decision: it has requests to finish first."""


class EngineChild:
    """A process that waits for its first message. As a context manager: ended on the way out, unless it was taken.

    Raises OSError if `command` cannot be started.
    """

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._connection, theirs = socket.socketpair()
        # Until it can say that it ignores them, the process has them blocked.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SERVER_SIGNALS)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
                )
        except BaseException:
            self._connection.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._is_taken = False

    def take(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """The process and the socket to it, whose end is the caller's business from now on."""
        self._is_taken = True
        return self._process, self._connection

    def __enter__(self) -> EngineChild:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_taken:
            self._process.kill()
            self._process.wait()
            self._connection.close()
