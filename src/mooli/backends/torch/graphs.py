"""Captured graphs of decode steps: fixed shapes, fixed buffers, one replay a step.

Owns which steps fit a graph, the buffers their inputs are copied to, and the padding to a few sizes. Never captures
anything itself: a device brings a `GraphRecorder`. What does not fit, or fails to be captured, runs eagerly.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mooli.backends.base import Limits
from mooli.backends.torch.step_plan import GATHERED_TOKENS, DecodeGroup, ForwardBatch
from mooli.batch import ScheduleBatch

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows that graphs are made for. A step is padded to the next size, so each is at most half padding."""

LEAST_KEYS = 256
"""The shortest sequences graphs are made for, in tokens; longer ones double."""


class Recorded(Protocol):
    """A captured run: `replay` computes it again from the same input buffers into `output`."""

    @property
    def output(self) -> Tensor: ...

    def replay(self) -> None: ...


class GraphRecorder(Protocol):
    """What a device needs for its steps to be captured."""

    def record(self, run: Callable[[], Tensor]) -> Recorded:
        """Capture `run`, which may be called several times. Raises RuntimeError if that is not possible."""
        ...

    def upload_into(self, target: Tensor, values: NDArray[np.int64]) -> None:
        """Copy to the device, before whatever is started next."""
        ...


class StaticSteps:
    """Input buffers of decode steps, one set for each size, each filled by one upload."""

    def __init__(self, recorder: GraphRecorder, limits: Limits, page_size: int, spare_page: int, device: torch.device):
        """`spare_page` is where padding rows store their KV."""
        self._recorder = recorder
        self._limits = limits
        self._page_size = page_size
        self._spare_page = spare_page
        self._device = device
        self._steps: dict[tuple[int, ...], tuple[Tensor, ForwardBatch]] = {}

    def plan(self, batch: ScheduleBatch) -> ForwardBatch | None:
        """The step in buffers that a graph can be replayed on; None if it fits no graph."""
        key = self.key_of(batch)
        if key is None or not self._turns_by_table(batch):
            return None
        if key not in self._steps:
            self._steps[key] = self._new_step(*key)
        buffer, step = self._steps[key]
        self._recorder.upload_into(buffer, self._fill(batch, *key))
        return replace(step, num_tokens=batch.num_tokens, memo={})

    def key_of(self, batch: ScheduleBatch) -> tuple[int, int] | None:
        """(rows, keys) of the smallest graph that holds the step: rows of length 1 alone, not too many keys in all."""
        if batch.num_rows == 0 or batch.num_tokens != batch.num_rows or batch.num_rows > BATCH_SIZES[-1]:
            return None
        num_rows = BATCH_SIZES[bisect_left(BATCH_SIZES, batch.num_rows)]
        num_keys, wanted = LEAST_KEYS, int(batch.starts.max()) + 1
        while num_keys < wanted:
            num_keys *= 2
        num_keys = max(wanted, min(num_keys, self._limits.max_pages_per_row * self._page_size))
        return (num_rows, num_keys) if num_rows * num_keys <= GATHERED_TOKENS else None

    def _turns_by_table(self, batch: ScheduleBatch) -> bool:
        """Whether rotary tables that are not made longer reach this far: a graph holds those of its capture."""
        longest = self._limits.max_pages_per_row * self._page_size
        return batch.rope_positions is None or int(batch.rope_positions.max()) < longest

    def _new_step(self, num_rows: int, num_keys: int) -> tuple[Tensor, ForwardBatch]:
        width = -(-num_keys // self._page_size)
        buffer = torch.zeros(num_rows * (4 + width), dtype=torch.int64, device=self._device)
        token_ids, rope_positions, slots, positions = buffer[: 4 * num_rows].view(4, num_rows)
        page_table = buffer[4 * num_rows :].view(num_rows, width)
        step = ForwardBatch(
            num_tokens=num_rows,
            token_ids=token_ids,
            rope_positions=rope_positions,
            slots=slots,
            max_rope_position=num_keys - 1,
            decode=(DecodeGroup(None, page_table, positions, num_keys, is_even=False),),
            chunks=(),
            graph_key=(num_rows, num_keys),
        )
        return buffer, step

    def _fill(self, batch: ScheduleBatch, num_rows: int, num_keys: int) -> NDArray[np.int64]:
        """What goes into the buffer. Padding rows are token 0 at position 0 of the spare page."""
        count = batch.num_rows
        columns = np.zeros((4, num_rows), dtype=np.int64)
        rope_positions = batch.positions if batch.rope_positions is None else batch.rope_positions
        columns[:, :count] = batch.token_ids, rope_positions, batch.slots, batch.positions
        columns[2, count:] = self._spare_page * self._page_size
        table = np.full((num_rows, -(-num_keys // self._page_size)), self._spare_page, dtype=np.int64)
        width = min(table.shape[1], batch.page_table.shape[1])
        table[:count, :width] = batch.page_table[:, :width]
        return np.concatenate([columns.reshape(-1), table.reshape(-1)])


class GraphedFunction:
    """A function of a planned step, or of rows of hidden states, replayed wherever its argument fits a graph."""

    def __init__(self, function: Callable[..., Tensor], recorder: GraphRecorder, max_rows: int = 32) -> None:
        """`max_rows`: the most hidden states that graphs are made for."""
        self._function = function
        self._recorder = recorder
        self._max_rows = max_rows
        self._recorded: dict[tuple[object, ...], tuple[Recorded, Tensor | None]] = {}
        self._gave_up = False

    def __call__(self, batch: ForwardBatch, hidden: Tensor | None = None) -> Tensor:
        """The result is overwritten by the next replay."""
        return self._step(batch) if hidden is None else self._rows(batch, hidden)

    def close(self) -> None:
        """Let go of every graph."""
        self._recorded.clear()
        self._gave_up = True

    def _step(self, batch: ForwardBatch) -> Tensor:
        key = batch.graph_key
        if key is None:
            return self._function(batch)
        if key not in self._recorded and not self._record(key, lambda: self._function(replace(batch, memo={})), None):
            return self._function(batch)[: batch.num_tokens]
        recorded, _ = self._recorded[key]
        recorded.replay()
        return recorded.output[: batch.num_tokens]

    def _rows(self, batch: ForwardBatch, hidden: Tensor) -> Tensor:
        num_rows, width = hidden.shape
        if not 0 < num_rows <= self._max_rows:
            return self._function(batch, hidden)
        key = ("rows", BATCH_SIZES[bisect_left(BATCH_SIZES, num_rows)], width, hidden.dtype)
        if key not in self._recorded:
            rows = torch.zeros((key[1], width), dtype=hidden.dtype, device=hidden.device)
            if not self._record(key, lambda: self._function(batch, rows), rows):
                return self._function(batch, hidden)
        recorded, buffer = self._recorded[key]
        if buffer is not None:
            buffer[:num_rows].copy_(hidden)
        recorded.replay()
        return recorded.output[:num_rows]

    def _record(self, key: tuple[object, ...], run: Callable[[], Tensor], buffer: Tensor | None) -> bool:
        if self._gave_up:
            return False
        try:
            self._recorded[key] = (self._recorder.record(run), buffer)
        except RuntimeError as exc:
            self._gave_up = True
            logger.warning("capturing a graph for %s failed: steps run without graphs from here on (%s)", key, exc)
            return False
        return True
