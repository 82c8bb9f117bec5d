"""Weights of which this process has a part: what makes a whole result of the parts' results.

Owns the three ways to that, chosen by what a tensor says of itself (`RawTensor.part`). Never cuts anything: the parts
come from `mooli.models.sharding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from mooli.backends.torch.communicator import Communicator
from mooli.backends.torch.weights import LinearWeight
from mooli.errors import EngineError
from mooli.tensor import RawTensor

ROWS, COLUMNS = 0, 1


@dataclass(frozen=True, slots=True)
class SummedLinear:
    """A weight cut along its columns: every rank's product is a part of the sum. One rank's part has the bias."""

    part: LinearWeight
    communicator: Communicator

    def matmul(self, x: Tensor) -> Tensor:
        return self.communicator.all_reduce(self.part.matmul(x))

    def num_bytes(self) -> int:
        return self.part.num_bytes()


@dataclass(frozen=True, slots=True)
class GatheredLinear:
    """The output head, cut along its rows: all ranks' logits side by side, `num_rows` of them on every rank."""

    part: LinearWeight
    communicator: Communicator
    num_rows: int

    def matmul(self, x: Tensor) -> Tensor:
        logits = self.communicator.all_gather(self.part.matmul(x))
        return logits.permute(1, 0, 2).reshape(len(x), -1)[:, : self.num_rows]

    def num_bytes(self) -> int:
        return self.part.num_bytes()


@dataclass(frozen=True, slots=True)
class PartTable:
    """Rows `first` and on of an embedding table: (rows, H). The rank that has a token's row gives it, the others 0."""

    rows: Tensor
    first: int
    communicator: Communicator

    def look_up(self, token_ids: Tensor) -> Tensor:
        """The rows at token_ids (T,): (T, H), on every rank."""
        local = token_ids - self.first
        is_here = (local >= 0) & (local < len(self.rows))
        found = F.embedding(local.clamp(0, len(self.rows) - 1), self.rows)
        return self.communicator.all_reduce(found * is_here[:, None].to(found.dtype))


def over_ranks(
    weight: LinearWeight, tensors: Sequence[RawTensor], communicator: Communicator | None, *, is_head: bool
) -> LinearWeight:
    """The packed `weight` of these tensors, so that its product is the whole one where the model needs that.

    Rows of other weights than the head's stay apart: what follows reads this rank's rows alone.
    """
    part = tensors[0].part
    if part is None:
        return weight
    if communicator is None:
        raise EngineError(f"{tensors[0].name} is part {part.index} of {part.count}, and no other rank has been met")
    if part.axis == COLUMNS:
        return SummedLinear(weight, communicator)
    return GatheredLinear(weight, communicator, part.whole) if is_head else weight


def table_over_ranks(rows: Tensor, table: RawTensor, communicator: Communicator | None) -> Tensor | PartTable:
    """The loaded `rows` of an embedding table, so that any token's row can be looked up."""
    part = table.part
    if part is None:
        return rows
    if communicator is None:
        raise EngineError(f"{table.name} is part {part.index} of {part.count}, and no other rank has been met")
    return PartTable(rows, part.index * len(rows), communicator)
