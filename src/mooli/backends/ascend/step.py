"""A step as the NPU's operations take it: int32 indices on the device, lengths on the host.

Owns the one upload of an eager step. Never reads a device tensor back, and never chooses an operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mooli.backends.torch.step_plan import ChunkRow, ForwardBatch, Upload, state_rows
from mooli.batch import ScheduleBatch

HAS_LENGTHS = "has lengths"
"""Set in a static step's memo by a function that gave an operation the lengths of its rows."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that lie one after the other in a step, from token `first_token` on, for one call.

    lengths: new tokens of each. kv_lengths: all tokens of each, the new ones included. block_table: int32 (rows, W).
    """

    first_token: int
    lengths: list[int]
    kv_lengths: list[int]
    block_table: Tensor

    @property
    def tokens(self) -> slice:
        return slice(self.first_token, self.first_token + sum(self.lengths))

    def part(self, begin: int, end: int) -> Rows:
        """Rows begin .. end of these."""
        first = self.first_token + sum(self.lengths[:begin])
        part = slice(begin, end)
        return Rows(first, self.lengths[part], self.kv_lengths[part], self.block_table[part])


@dataclass(frozen=True, slots=True)
class AscendStep(ForwardBatch):
    """token_ids, rope_positions, slots: int32 (T,). rows: all of them. is_static: its tensors stay where they are, so
    that a graph may be captured on them; `rows.kv_lengths` is then changed in place from step to step."""

    rows: Rows | None = None
    is_static: bool = False


def plan_rows(batch: ScheduleBatch, upload: Upload) -> AscendStep:
    """Everything of a step in one upload."""
    num_tokens = batch.num_tokens
    turned_to = batch.positions if batch.rope_positions is None else batch.rope_positions
    columns = np.stack([batch.token_ids, turned_to, batch.slots]).astype(np.int32)
    # Entries past a row's pages are not read, but must be pages.
    table = np.maximum(batch.page_table, 0).astype(np.int32)
    sent = upload(np.concatenate([columns.reshape(-1), table.reshape(-1)]))
    token_ids, rope_positions, slots = sent[: 3 * num_tokens].view(3, num_tokens).unbind(0)
    rows = Rows(
        0,
        batch.lengths.tolist(),
        (batch.starts + batch.lengths).tolist(),
        sent[3 * num_tokens :].view(table.shape),
    )
    return AscendStep(
        num_tokens=num_tokens,
        token_ids=token_ids,
        rope_positions=rope_positions,
        slots=slots,
        max_rope_position=int(turned_to.max(initial=0)),
        decode=(),
        chunks=chunk_rows(rows),
        rows=rows,
        states=state_rows(batch, upload),
    )


def cut(step: AscendStep) -> AscendStep:
    """A step in a graph's buffers, without its padding and to be run without the graph."""
    count = step.num_tokens
    rows = None if step.rows is None else step.rows.part(0, count)
    return replace(
        step,
        token_ids=step.token_ids[:count],
        rope_positions=step.rope_positions[:count],
        slots=step.slots[:count],
        chunks=() if rows is None else chunk_rows(rows),
        graph_key=None,
        rows=rows,
        is_static=False,
        memo={},
    )


def chunk_rows(rows: Rows) -> tuple[ChunkRow, ...]:
    """The rows as plain torch attends to them."""
    made, first = [], rows.first_token
    for index, (length, kv_length) in enumerate(zip(rows.lengths, rows.kv_lengths, strict=True)):
        made.append(ChunkRow(first, kv_length - length, length, rows.block_table[index]))
        first += length
    return tuple(made)


def int32(values: Sequence[int]) -> NDArray[np.int32]:
    return np.array(values, dtype=np.int32)
