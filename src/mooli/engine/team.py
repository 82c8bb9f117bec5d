"""The processes that an engine is built on, in the order of the steps in which several take part; here there is one.

Owns the steps' names and what they are for one process; for several they are in `rank_team`. Never computes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mooli.backends.base import Backend, KVSpec, Limits
from mooli.engine.pool_size import PoolNeeds
from mooli.errors import EngineDeadError
from mooli.runner.base import Runner


class SoloTeam:
    """One process: nobody to ask."""

    def meet(self, backend: Backend) -> int:
        """Available bytes of the device, before anything is loaded."""
        return backend.memory().available_bytes

    def needs(self, own: PoolNeeds) -> list[PoolNeeds]:
        """What decides the size of the pool, for each rank, once all have loaded."""
        return [own]

    def allocate(self, spec: KVSpec, num_pages: int, limits: Limits, vocab_size: int) -> None:
        """Have the other ranks allocate the same."""

    def runner(self, own: Runner) -> Runner:
        """What computes a step on all ranks."""
        return own

    def describe(self, needs: Sequence[PoolNeeds]) -> dict[str, Any]:
        """What there is to say of the ranks."""
        return {}

    def watch(self, callback: Callable[[EngineDeadError], None]) -> None:
        """See `BuiltEngine.watch`."""

    def stop(self) -> None:
        """The engine is about to close."""

    def close(self) -> None:
        """End the other ranks."""
