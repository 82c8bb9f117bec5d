"""Child processes: how they start, and what their end means.

They start with a link, without the current folder, and out of reach of the terminal's signals. Owns the command, the
socket pair and the first moments, until an `EngineClient` (or `Ranks`) takes over; the engine's process comes up while
the server's own parts are imported. Owns the words for an exit status too. Never imports what serves or computes, so
that nothing has to be waited for before the process is started.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import mooli.errors
from mooli.entry import fill_standard_descriptors
from mooli.errors import EngineDeadError, MooliError


def command_of(module: str) -> tuple[str, ...]:
    """Becomes a process in which the `main` of one of our modules runs; the number of its socket is appended."""
    return sys.executable, str(Path(__file__).with_name("first_lines.py")), module


COMMAND = command_of("mooli.engine.process")
"""Becomes the engine process."""

SERVER_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM})
"""A terminal's Ctrl-C and a service manager's SIGTERM go to all processes of a service. When the engine ends is the
server's decision: it has requests to finish first."""

CLOSE_DISK_S = 5.0
"""How long the end of an engine may take for pages that are not on disk yet."""

EXIT_WAIT_S = 2.0
"""How long a process whose link has ended may take to leave an exit status, and a stopped one to stop."""


def start_child(command: Sequence[str], *words: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A process, and the socket to it, whose other end's number comes behind the command and before `words`.

    It must ignore SERVER_SIGNALS and unblock them. Raises OSError if the command cannot be started.
    """
    fill_standard_descriptors()  # otherwise the socket may take the number of one
    ours, theirs = socket.socketpair()
    # Until it can say that it ignores them, the process has them blocked.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SERVER_SIGNALS)
    try:
        with theirs:
            number = theirs.fileno()
            process = subprocess.Popen([*command, str(number), *words], pass_fds=[number], stdin=subprocess.DEVNULL)
    except BaseException:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return process, ours


class EngineChild:
    """A process that waits for its first message. As a context manager: ended on the way out, unless it was taken.

    Raises OSError if `command` cannot be started.
    """

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._process, self._connection = start_child(command)
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


def error_named(name: str, message: str) -> MooliError:
    """An error of `mooli.errors` by the name of its class; EngineDeadError for any other exception."""
    kind = getattr(mooli.errors, name, None)
    if isinstance(kind, type) and issubclass(kind, MooliError):
        return kind(message)
    return EngineDeadError(f"the engine has died of {name}: {message}")


def exit_words(status: int) -> str:
    """What an exit status of `subprocess` says."""
    if status >= 0:
        return f"has ended with exit status {status}"
    name = signal.Signals(-status).name if -status in {int(item) for item in signal.Signals} else "unknown"
    hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
    return f"was killed by signal {-status} ({name}){hint}"
