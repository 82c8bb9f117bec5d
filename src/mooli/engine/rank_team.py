"""How building an engine on several processes differs from one: the other ranks go through the same steps.

Owns what rank 0 asks of the others while the engine is built, in order: meet, load, allocate. Never computes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from mooli.backends.base import Backend, KVSpec, Limits
from mooli.backends.parallel import ParallelBackend, RankGroup
from mooli.config import EngineConfig
from mooli.engine import rank_messages
from mooli.engine.pool_size import PoolNeeds
from mooli.engine.ranks import RankedRunner, Ranks
from mooli.errors import EngineDeadError
from mooli.runner.base import Runner


class RankTeam:
    """Several processes, of which this is rank 0. The others are started by `meet`."""

    def __init__(self, config: EngineConfig, model_path: Path) -> None:
        self._config = config
        self._model_path = model_path
        self._ranks: Ranks | None = None

    def meet(self, backend: Backend) -> int:
        """Start the other ranks and have all meet: available bytes of this rank's device, before anything is loaded.

        Raises what has broken a rank down.
        """
        # Only backends that are one are let through by the configuration.
        parallel = cast(ParallelBackend, backend)
        self._ranks = ranks = Ranks.start(self._config, self._model_path)
        ranks.tell(rank_messages.Load())
        with ranks.blaming():
            parallel.join(RankGroup(0, ranks.size, ranks.store))
            available_bytes = parallel.memory().available_bytes
            parallel.barrier()
        ranks.watch(lambda error: parallel.abort())
        return available_bytes

    def needs(self, own: PoolNeeds) -> list[PoolNeeds]:
        loaded = self._met.expect(rank_messages.Loaded)
        others = [
            replace(own, available_bytes=message.available_bytes, weight_bytes=message.weight_bytes)
            for message in loaded
        ]
        return [own, *others]

    def allocate(self, spec: KVSpec, num_pages: int, limits: Limits, vocab_size: int) -> None:
        self._met.tell(
            rank_messages.Allocate(
                kv_dtype=spec.dtype,
                page_size=spec.page_size,
                num_pages=num_pages,
                max_tokens=limits.max_tokens,
                max_rows=limits.max_rows,
                max_pages_per_row=limits.max_pages_per_row,
                vocab_size=vocab_size,
            )
        )

    def runner(self, own: Runner) -> Runner:
        self._met.expect(rank_messages.Allocated)
        return RankedRunner(own, self._met)

    def describe(self, needs: Sequence[PoolNeeds]) -> dict[str, Any]:
        return {"tp_size": len(needs), "weight_bytes_of_ranks": [need.weight_bytes for need in needs]}

    def watch(self, callback: Callable[[EngineDeadError], None]) -> None:
        self._met.watch(callback)

    def stop(self) -> None:
        if self._ranks is not None:
            self._ranks.stop()

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.close()

    @property
    def _met(self) -> Ranks:
        if self._ranks is None:
            raise EngineDeadError("no other rank has been started")
        return self._ranks
