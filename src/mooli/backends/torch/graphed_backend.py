"""The torch backend for devices that capture graphs: planning into fixed buffers and replaying decode steps.

Owns when graphs are used and the switch that turns them off. Never captures: a device brings a recorder.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mooli.backends.base import CacheSpec, Limits
from mooli.backends.parallel import RankGroup
from mooli.backends.torch.backend import TorchBackend
from mooli.backends.torch.graphs import GraphedFunction, GraphRecorder, StaticSteps
from mooli.backends.torch.step_plan import ForwardBatch
from mooli.batch import ScheduleBatch
from mooli.errors import ConfigError

logger = logging.getLogger(__name__)

GRAPHS_SWITCH = "MOOLI_GRAPHS"
"""Environment variable: 0 runs every step without graphs."""


class GraphedBackend(TorchBackend):
    """A torch backend whose decode steps are captured. A device says how with `make_recorder`."""

    def __init__(
        self,
        dtype: str = "auto",
        quantization: str | None = None,
        num_threads: int | None = None,
        rank: int = 0,
    ) -> None:
        super().__init__(dtype, quantization, num_threads, rank)
        switch = os.environ.get(GRAPHS_SWITCH, "1")
        if switch not in ("0", "1"):
            raise ConfigError(f"{GRAPHS_SWITCH}={switch} is neither 0 nor 1")
        self._recorder = self.make_recorder() if switch == "1" else None
        self._steps: StaticSteps | None = None
        self._graphed: list[GraphedFunction] = []

    def make_recorder(self) -> GraphRecorder | None:
        """How this device captures; None if it cannot."""
        return None

    def join(self, group: RankGroup) -> None:
        """Without graphs: nobody has tried yet what captured sums over ranks do when a rank fails."""
        if self._recorder is not None and group.rank == 0:
            logger.info("steps run without graphs: %d ranks compute them together", group.size)
        self._recorder = None
        super().join(group)

    def num_spare_pages(self) -> int:
        return 0 if self._recorder is None else 1

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "graphs": "off" if self._recorder is None else "decode steps"}

    def allocate(self, spec: CacheSpec, num_pages: int, limits: Limits) -> None:
        if (spec.state_layers or self.has_experts) and self._recorder is not None:
            logger.info(
                "steps run without graphs: the model has %s",
                "recurrent layers" if spec.state_layers else "a mixture of experts",
            )
            self._recorder = None
        super().allocate(spec, num_pages, limits)
        if self._recorder is not None:
            # The spare page is the one after the requests' own.
            self._steps = StaticSteps(self._recorder, limits, spec.page_size, num_pages, self.device)

    def plan(self, batch: ScheduleBatch) -> ForwardBatch:
        fixed = None if self._steps is None else self._steps.plan(batch)
        return super().plan(batch) if fixed is None else fixed

    def capture(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if self._recorder is None:
            return super().capture(function)
        graphed = GraphedFunction(function, self._recorder)
        self._graphed.append(graphed)
        return super().capture(graphed)

    def close(self) -> None:
        for graphed in self._graphed:
            graphed.close()
        self._graphed.clear()
        self._steps = None
        super().close()
