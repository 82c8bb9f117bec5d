"""Decode steps as ACL graphs: fixed buffers, one graph for each padded number of rows, new lengths before each replay.

Owns the buffers, the capture and the fall-back to eager steps. Not tried on hardware. Sources: torch_npu's tests of
graph updates, and the rules of its NPUGraph: capture on a side stream, no random numbers, lengths of attention patched
on the host with `update`, which knows the `.out` form of the fused attention.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mooli.backends.ascend.paths import PAGE_SIZE
from mooli.backends.ascend.step import HAS_LENGTHS, AscendStep, Rows
from mooli.backends.base import Limits
from mooli.batch import ScheduleBatch

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Rows that graphs are made for: few, as each takes streams of the device, of which there are about two thousand."""

Function = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """Of one step: hidden states of its rows, and their logits if the graph holds the head too."""

    hidden: Tensor
    logits: Tensor | None


class StaticSteps:
    """Input buffers of decode steps, one set for each size, each filled by one upload."""

    def __init__(self, limits: Limits, spare_page: int, device: torch.device) -> None:
        """`spare_page` is where padding rows store their KV."""
        self._width = limits.max_pages_per_row
        self._spare_page = spare_page
        self._device = device
        self._steps: dict[int, tuple[Tensor, AscendStep]] = {}

    def plan(self, batch: ScheduleBatch) -> AscendStep | None:
        """The step in buffers that a graph can be replayed on; None if it fits no graph."""
        if batch.num_rows == 0 or batch.num_tokens != batch.num_rows or batch.num_rows > SIZES[-1]:
            return None
        if batch.page_table.shape[1] > self._width:
            return None
        turned_to = batch.positions if batch.rope_positions is None else batch.rope_positions
        longest = int(turned_to.max())
        if longest >= self._width * PAGE_SIZE:  # a graph holds the rotary tables of its capture
            return None
        size = SIZES[bisect_left(SIZES, batch.num_rows)]
        if size not in self._steps:
            self._steps[size] = self._new_step(size)
        buffer, step = self._steps[size]
        self._fill(buffer, step, batch, turned_to)
        return replace(step, num_tokens=batch.num_rows, max_rope_position=longest, memo={})

    def _new_step(self, size: int) -> tuple[Tensor, AscendStep]:
        buffer = torch.zeros(size * (3 + self._width), dtype=torch.int32, device=self._device)
        token_ids, rope_positions, slots = buffer[: 3 * size].view(3, size).unbind(0)
        table = buffer[3 * size :].view(size, self._width)
        step = AscendStep(
            num_tokens=size,
            token_ids=token_ids,
            rope_positions=rope_positions,
            slots=slots,
            max_rope_position=0,
            decode=(),
            chunks=(),
            graph_key=(size,),
            rows=Rows(0, [1] * size, [1] * size, table),
            is_static=True,
        )
        return buffer, step

    def _fill(self, buffer: Tensor, step: AscendStep, batch: ScheduleBatch, turned_to: NDArray[np.int32]) -> None:
        """Padding rows are token 0 at position 0 of the spare page; each stores in a slot of its own."""
        if step.rows is None:
            return
        size, count = len(step.rows.lengths), batch.num_rows
        columns = np.zeros((3, size), dtype=np.int32)
        columns[:, :count] = batch.token_ids, turned_to, batch.slots
        columns[2, count:] = self._spare_page * PAGE_SIZE + np.arange(size - count)
        table = np.full((size, self._width), self._spare_page, dtype=np.int32)
        width = batch.page_table.shape[1]
        table[:count, :width] = np.where(batch.page_table < 0, self._spare_page, batch.page_table)
        buffer.copy_(torch.from_numpy(np.concatenate([columns.reshape(-1), table.reshape(-1)])))
        step.rows.kv_lengths[:] = (batch.starts + 1).tolist() + [1] * (size - count)


class DecodeGraphs:
    """Captured decode steps of one model, made at their first use. A failure to capture ends them for good."""

    def __init__(self, api: Any) -> None:
        """api: `torch.npu`."""
        self._api = api
        self._pool: Any = None
        self._captured: dict[tuple[Function, Function | None, int], _Captured] = {}
        self._is_closed = False
        self.failure: str | None = None
        """Why nothing is captured any more."""
        self.num_replays = 0

    @property
    def is_in_use(self) -> bool:
        return not self._is_closed

    def run(self, forward: Function, head: Function | None, step: AscendStep) -> DecodeResult | None:
        """forward(step), and head of it, by a replay; None if that cannot be captured."""
        if self._is_closed or step.rows is None:
            return None
        key = (forward, head, len(step.rows.lengths))
        if key not in self._captured:
            captured = self._capture(forward, head, step)
            if captured is None:
                return None
            self._captured[key] = captured
        self.num_replays += 1
        return self._captured[key].replay(step.num_tokens, step.rows.kv_lengths)

    def close(self) -> None:
        """Let go of every graph."""
        self._captured.clear()
        self._is_closed = True

    def _capture(self, forward: Function, head: Function | None, step: AscendStep) -> _Captured | None:
        memo: dict[Any, Any] = {}

        def run() -> tuple[Tensor, Tensor | None]:
            memo.clear()
            hidden = forward(replace(step, memo=memo))
            return hidden, None if head is None else head(step, hidden)

        try:
            # Workspaces and tables are made in these, and whatever libraries set up at a first run.
            run()
            run()
            self._api.synchronize()
            graph = self._api.NPUGraph()
            if self._pool is None:
                self._pool = self._api.graph_pool_handle()
            with self._api.graph(graph, pool=self._pool, auto_dispatch_capture=True):
                hidden, logits = run()
            return _Captured(graph, hidden, logits, HAS_LENGTHS in memo)
        except (RuntimeError, TypeError, AttributeError) as exc:  # the last two: a torch_npu without these graphs
            self.close()
            self.failure = str(exc)
            logger.warning("capturing a decode step failed, steps run without graphs from here on: %s", exc)
            return None


class _Captured:
    """A graph with its outputs."""

    def __init__(self, graph: Any, hidden: Tensor, logits: Tensor | None, has_lengths: bool) -> None:
        self._graph = graph
        self._hidden = hidden
        self._logits = logits
        self._has_lengths = has_lengths

    def replay(self, num_rows: int, kv_lengths: list[int]) -> DecodeResult:
        if self._has_lengths:
            # One entry serves every layer. The last step is over, as its tokens have been read back.
            self._graph.update(cpu_update_input=[{"actual_seq_lengths_kv": list(kv_lengths)}])
        self._graph.replay()
        return DecodeResult(self._hidden[:num_rows], None if self._logits is None else self._logits[:num_rows])
