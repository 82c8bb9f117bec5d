"""What the end of a child process means: its exit status in words, and the error it named.

Owns the words. Never waits for a process.
"""

from __future__ import annotations

import signal

import mooli.errors
from mooli.errors import EngineDeadError, MooliError

EXIT_WAIT_S = 2.0
"""How long a process whose link has ended may take to leave an exit status, and a stopped one to stop."""


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
