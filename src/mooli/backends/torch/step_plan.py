"""A step as the torch operations take it: index tensors on the device, lengths on the host.

Owns which rows are attended together and the one upload of a step. Never reads a device tensor back: whatever decides
shapes is known on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mooli.batch import ScheduleBatch

GATHERED_TOKENS = 1 << 16
"""Tokens whose keys and values are gathered at one time for rows of length 1. A longer row is gathered alone."""

SHORT_ROW = 256
"""Rows of length 1 with no more keys than this are attended together: padding them costs less than another call."""

STATE_CHUNK = 64
"""Tokens of a row whose recurrence is computed together."""

CHUNKS_AT_A_TIME = 32
"""Chunks that are prepared together, unless one wave has more: what is made of them is many times their size."""

Upload = Callable[[NDArray[Any]], Tensor]
"""One copy from the host to the device. The array is the callee's from then on."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows of length 1 that are attended in one call.

    tokens: int64 (G,), their tokens in the step; None if they are the step's tokens in order. page_table: int64 (G, W).
    positions: int64 (G,). num_keys: the most keys any of them has, itself included. is_even: all have that many.
    """

    tokens: Tensor | None
    page_table: Tensor
    positions: Tensor
    num_keys: int
    is_even: bool


@dataclass(frozen=True, slots=True)
class ChunkRow:
    """A row of several tokens: `first_token` .. `first_token + length` of the step, at positions `start` and on.

    pages: int64 (W,).
    """

    first_token: int
    start: int
    length: int
    pages: Tensor


@dataclass(frozen=True, slots=True)
class StateRow:
    """A row whose recurrent state goes on from the one in `slot`, or from zeros where it `begins`.

    kept: after how many tokens of the row it is to be in which slot, ascending; the last one after all.
    """

    first_token: int
    begins: bool
    slot: int
    kept: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class SingleStates:
    """Rows of one token, whose states go on together. tokens: int64 (G,), None if they are the step's tokens in order.
    slots: int64 (G,). goes_on: float32 (G,), 0 where a row begins, else 1; None if all go on."""

    tokens: Tensor | None
    slots: Tensor
    goes_on: Tensor | None


@dataclass(frozen=True, slots=True)
class Wave:
    """The n-th chunks of all rows that have so many, `count` of them from chunk `first` on: those of the first rows, in
    their order. rows, slots: int64 (N,), which of these rows' states are then to be in which slots; None for none."""

    first: int
    count: int
    rows: Tensor | None
    slots: Tensor | None


@dataclass(frozen=True, slots=True)
class StateChunks:
    """Rows cut into chunks of up to STATE_CHUNK tokens: at positions that are multiples of it, and where a state is
    kept. Rows with more chunks come first, and chunks by waves.

    tokens: int64 (chunks * width,), of the step; a chunk with less has its last one again. is_token: float32 (chunks,
    1, width), 0 for those. targets: int64 (N,), all tokens of these rows; places: int64 (N,), where they are in
    `tokens`. slots, goes_on: of each row as in `SingleStates`. spans: waves that are computed together.
    """

    tokens: Tensor
    is_token: Tensor
    targets: Tensor
    places: Tensor
    slots: Tensor
    goes_on: Tensor | None
    spans: tuple[tuple[Wave, ...], ...]


@dataclass(frozen=True, slots=True)
class StateRows:
    """All rows of a step of a model with recurrent layers. chunks: `rows` as recurrences take them."""

    single: SingleStates | None
    rows: tuple[StateRow, ...]
    chunks: StateChunks | None


def state_rows(batch: ScheduleBatch, upload: Upload) -> StateRows | None:
    """None for models without recurrent layers."""
    slots = batch.state_slots
    if slots is None:
        return None
    kept: dict[int, list[tuple[int, int]]] = {}
    for save in batch.state_saves:
        kept.setdefault(save.row, []).append((save.num_tokens, save.slot))
    first_tokens = np.cumsum(batch.lengths) - batch.lengths
    is_single = (batch.lengths == 1) & ~np.isin(np.arange(len(slots)), list(kept))
    ones, others = np.flatnonzero(is_single), np.flatnonzero(~is_single)
    single = None
    if len(ones):
        goes_on = batch.starts[ones] > 0
        sent = upload(np.stack([first_tokens[ones], slots[ones], goes_on]).astype(np.int64))
        single = SingleStates(sent[0] if len(others) else None, sent[1], None if goes_on.all() else sent[2].float())
    rows, starts = [], []
    for row in others.tolist():
        length, slot = int(batch.lengths[row]), int(slots[row])
        ends = (*sorted(kept.get(row, [])), (length, slot))
        rows.append(StateRow(int(first_tokens[row]), not batch.starts[row], slot, ends))
        starts.append(int(batch.starts[row]))
    return StateRows(single, tuple(rows), state_chunks(rows, starts, upload) if rows else None)


def state_chunks(rows: Sequence[StateRow], starts: Sequence[int], upload: Upload) -> StateChunks:
    """starts: positions of the rows' first tokens."""
    cuts = [_chunk_ends(row, start) for row, start in zip(rows, starts, strict=True)]
    order = sorted(range(len(rows)), key=lambda index: -len(cuts[index]))
    rows, cuts = [rows[index] for index in order], [cuts[index] for index in order]
    longest = max(int(np.diff(ends, prepend=0).max()) for ends in cuts)
    width = 1 << (longest - 1).bit_length()
    uploads = _Uploads()
    tokens: list[NDArray[np.int64]] = []
    counts: list[int] = []
    waves: list[tuple[int, int, tuple[int, int] | None]] = []
    for number in range(len(cuts[0])):
        members = [index for index, ends in enumerate(cuts) if len(ends) > number]
        saves: list[tuple[int, int]] = []
        first = len(tokens)
        for index in members:
            row, end = rows[index], cuts[index][number]
            begin = cuts[index][number - 1] if number else 0
            tokens.append(row.first_token + np.minimum(np.arange(begin, begin + width), end - 1))
            counts.append(end - begin)
            saves += [(index, slot) for num_tokens, slot in row.kept if num_tokens == end]
        columns = np.array(saves, np.int64).reshape(-1, 2).T
        kept = (uploads.add(columns[0]), uploads.add(columns[1])) if saves else None
        waves.append((first, len(members), kept))
    laid_out = np.stack(tokens)
    is_token = (np.arange(width) < np.array(counts)[:, None]).astype(np.int64)
    places = np.flatnonzero(is_token)
    row_slots, goes_on = [row.slot for row in rows], [not row.begins for row in rows]
    of_rows = (
        laid_out,
        is_token,
        laid_out.reshape(-1)[places],
        places,
        np.array(row_slots),
        np.array(goes_on, np.int64),
    )
    added = [uploads.add(values) for values in of_rows]
    sent = uploads.send(upload)
    spans: list[list[Wave]] = []
    room = 0
    for first, count, kept in waves:
        if count > room:
            spans.append([])
            room = CHUNKS_AT_A_TIME
        room -= count
        spans[-1].append(Wave(first, count, *(None, None) if kept is None else (sent[kept[0]], sent[kept[1]])))
    values = [sent[index] for index in added]
    return StateChunks(
        tokens=values[0].view(-1),
        is_token=values[1].float()[:, None],
        targets=values[2],
        places=values[3],
        slots=values[4],
        goes_on=None if all(goes_on) else values[5].float(),
        spans=tuple(map(tuple, spans)),
    )


def _chunk_ends(row: StateRow, start: int) -> list[int]:
    """After how many tokens of the row a chunk ends, ascending."""
    length = row.kept[-1][0]
    aligned = range(STATE_CHUNK - start % STATE_CHUNK, length, STATE_CHUNK)
    return sorted({*aligned, *(num_tokens for num_tokens, _ in row.kept)})


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """token_ids, rope_positions, slots: int64 (T,). num_tokens: rows of a result that mean something, T unless padded.

    max_rope_position: of any token. `memo` keeps what all layers share, such as the slots of keys: it belongs to one
    run of a model's forward function. `graph_key` names the captured graph that may carry the step out, if any.
    tokens: int32 on the host, those of the step that an operation's rows stand for; None for all of them. states: None
    for models without recurrent layers.
    """

    num_tokens: int
    token_ids: Tensor
    rope_positions: Tensor
    slots: Tensor
    max_rope_position: int
    decode: tuple[DecodeGroup, ...]
    chunks: tuple[ChunkRow, ...]
    graph_key: tuple[int, ...] | None = None
    tokens: NDArray[np.int32] | None = None
    states: StateRows | None = None
    memo: dict[Any, Any] = field(default_factory=dict)


def decode_groups(num_keys: Sequence[int]) -> list[list[int]]:
    """Indices of rows to attend together, by their numbers of keys: the longest rows come first.

    A group pads all its rows to the longest one. Rows join unless they would be padded to more than twice their length
    (short rows aside) or the group would gather more than GATHERED_TOKENS.
    """
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(num_keys)), key=lambda i: -num_keys[i]):
        fits = groups and (len(groups[-1]) + 1) * longest <= GATHERED_TOKENS
        if fits and longest <= max(SHORT_ROW, 2 * num_keys[index]):
            groups[-1].append(index)
        else:
            groups.append([index])
            longest = num_keys[index]
    return groups


def plan_step(batch: ScheduleBatch, page_size: int, upload: Upload) -> ForwardBatch:
    """Index tensors of a step, uploaded together."""
    uploads = _Uploads()
    rope_positions = batch.positions if batch.rope_positions is None else batch.rope_positions
    tokens = [uploads.add(values) for values in (batch.token_ids, rope_positions, batch.slots)]
    first_tokens = np.cumsum(batch.lengths) - batch.lengths
    num_keys = (batch.starts + batch.lengths).tolist()
    ones = np.flatnonzero(batch.lengths == 1)

    groups = decode_groups([num_keys[row] for row in ones])
    planned_groups = []
    for members in groups:
        is_whole_step = len(groups) == 1 and len(ones) == batch.num_rows
        rows = ones if is_whole_step else ones[members]
        longest = max(num_keys[row] for row in rows)
        planned_groups.append(
            (
                None if is_whole_step else uploads.add(first_tokens[rows]),
                uploads.add(batch.page_table[rows, : -(-longest // page_size)]),
                uploads.add(batch.starts[rows]),
                longest,
                all(num_keys[row] == longest for row in rows),
            )
        )
    planned_chunks = [
        (
            int(first_tokens[row]),
            int(batch.starts[row]),
            int(batch.lengths[row]),
            uploads.add(batch.page_table[row, : -(-num_keys[row] // page_size)]),
        )
        for row in np.flatnonzero(batch.lengths > 1)
    ]

    sent = uploads.send(upload)
    return ForwardBatch(
        num_tokens=batch.num_tokens,
        token_ids=sent[tokens[0]],
        rope_positions=sent[tokens[1]],
        slots=sent[tokens[2]],
        max_rope_position=int(rope_positions.max(initial=0)),
        decode=tuple(
            DecodeGroup(None if where is None else sent[where], sent[table], sent[positions], longest, is_even)
            for where, table, positions, longest, is_even in planned_groups
        ),
        chunks=tuple(ChunkRow(first, start, length, sent[pages]) for first, start, length, pages in planned_chunks),
        states=state_rows(batch, upload),
    )


class _Uploads:
    """Integer arrays that travel as one."""

    def __init__(self) -> None:
        self._arrays: list[NDArray[np.integer[Any]]] = []

    def add(self, array: NDArray[np.integer[Any]]) -> int:
        """The index the array will have in what `send` gives."""
        self._arrays.append(array)
        return len(self._arrays) - 1

    def send(self, upload: Upload) -> list[Tensor]:
        flat = np.concatenate([array.reshape(-1).astype(np.int64) for array in self._arrays])
        sent, begin, tensors = upload(flat), 0, []
        for array in self._arrays:
            tensors.append(sent[begin : begin + array.size].view(array.shape))
            begin += array.size
        return tensors
