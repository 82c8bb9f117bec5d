"""What a backend must do besides, to compute one model together with the same backend in other processes.

Owns the protocol and what it takes. Never imports torch and never starts a process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mooli.backends.base import Backend
from mooli.errors import EngineError

COLLECTIVE_TIMEOUT_S = 300.0
"""How long a rank waits in an operation for the others. A dead one is noticed at once; this is for one that hangs."""


class CommunicationError(EngineError):
    """An operation over all ranks failed, mostly because another rank has ended."""


@dataclass(frozen=True, slots=True)
class RankGroup:
    """The processes that compute one model on one machine; this one is `rank` of `size`.

    store: a file, not there yet, in a folder that only this user can enter: the ranks find each other through it.
    """

    rank: int
    size: int
    store: Path
    timeout_s: float = COLLECTIVE_TIMEOUT_S


class ParallelBackend(Backend, Protocol):
    """A backend whose weights may be parts (`RawTensor.part`). Every rank computes the same steps in the same order."""

    def join(self, group: RankGroup) -> None:
        """Meet the other ranks; returns when all are there. Before any weight is loaded.

        Raises CommunicationError, BackendUnavailableError, or ConfigError if this process cannot take part.
        """
        ...

    def barrier(self) -> None:
        """Wait for all ranks. Raises CommunicationError."""
        ...

    def abort(self) -> None:
        """Have operations that wait for a rank that has ended fail. Called on another thread; may be called again."""
        ...
