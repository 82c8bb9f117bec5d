"""Tensors that files have one behind the other in a larger one, as those of experts mostly are.

Owns the description of such a place, which of several ways a file has a tensor, and cutting one out: a view where the
file's order allows it. Never opens a file.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mooli.errors import CheckpointError
from mooli.tensor import BLOCK, RawTensor


@dataclass(frozen=True, slots=True)
class Stacked:
    """Where a tensor lies in the tensor `name` of a file: entry `index` of `count` along its first axis.

    parts: each entry has the rows of so many tensors, of which this is `part`; one behind the other, or row by row in
    turn where it is `interleaved`. is_transposed: entries are (columns, rows), of a type whose values stand alone.
    """

    name: str
    index: int
    count: int
    part: int = 0
    parts: int = 1
    interleaved: bool = False
    is_transposed: bool = False

    def shape(self, whole: tuple[int, ...], wanted: int) -> tuple[int, ...]:
        """Of the tensor, in a file's tensor of shape `whole`, which may have its first two axes in one. wanted: 1 for a
        vector, 2 for a matrix. CheckpointError where entries are not equal."""
        rows, columns = (1, *whole)[-2:]
        if rows % self.count:
            raise CheckpointError(f"{self.name} has {rows} rows, which are not {self.count} equal parts")
        rows //= self.count
        if self.is_transposed:
            rows, columns = columns, rows
        # The rows of a stack of vectors are the vectors.
        values = columns if wanted == 1 else rows
        if values % self.parts or (wanted == 1 and rows != 1):
            raise CheckpointError(f"{self.name} has entries of {rows} x {columns} values, not {self.parts} parts each")
        return (columns // self.parts,) if wanted == 1 else (rows // self.parts, columns)

    def cut(self, whole: RawTensor, name: str, wanted: int) -> RawTensor:
        """The tensor, called `name`, of the file's."""
        shape = self.shape(whole.shape, wanted)
        rows = whole.num_rows // self.count
        data = whole.data[self.index * rows : (self.index + 1) * rows]
        if self.is_transposed or (wanted == 1 and self.parts > 1):
            size = BLOCK[whole.type][1]
            if BLOCK[whole.type][0] != 1:
                raise CheckpointError(f"{self.name} is {whole.type.name}, whose values do not stand alone")
            values = data.reshape(rows, -1, size).swapaxes(0, 1)  # the parts are rows now
            values = np.ascontiguousarray(values[self._rows(len(values))])
            data = values.reshape(1, -1) if wanted == 1 else values.reshape(len(values), -1)
        else:
            data = data[self._rows(rows)]
        return dataclasses.replace(whole, name=name, shape=shape, data=data)

    def _rows(self, count: int) -> slice:
        if self.interleaved:
            return slice(self.part, None, self.parts)
        size = count // self.parts
        return slice(self.part * size, (self.part + 1) * size)


@dataclass(frozen=True, slots=True)
class Rows:
    """Where a tensor lies in the tensor `name` of a file, which has `num_rows` rows: its own begin at `first`."""

    name: str
    first: int
    size: int
    num_rows: int

    def shape(self, whole: tuple[int, ...], wanted: int) -> tuple[int, ...]:
        """As of `Stacked`; of a vector, rows are values."""
        if len(whole) != wanted or whole[0] != self.num_rows:
            raise CheckpointError(f"{self.name} has shape {list(whole)}, and it should have {self.num_rows} rows")
        return (self.size, *whole[1:])

    def cut(self, whole: RawTensor, name: str, wanted: int) -> RawTensor:
        """The tensor, called `name`, of the file's, as a view. A vector must not be quantised."""
        shape, end = self.shape(whole.shape, wanted), self.first + self.size
        if wanted == 1:
            size = BLOCK[whole.type][1]
            if BLOCK[whole.type][0] != 1:
                raise CheckpointError(f"{self.name} is {whole.type.name}, whose values do not stand alone")
            return dataclasses.replace(
                whole, name=name, shape=shape, data=whole.data[:, self.first * size : end * size]
            )
        scales = None if whole.scales is None else whole.scales[self.first : end]
        return dataclasses.replace(whole, name=name, shape=shape, data=whole.data[self.first : end], scales=scales)


class Places:
    """Which tensors of a file are which of a model's, under the model's names."""

    def __init__(
        self, own: Mapping[str, str], stacks: Mapping[str, tuple[Stacked | Rows, ...]], in_file: Iterable[str]
    ) -> None:
        """own: the name that a file has for each of the model's tensors, on its own. stacks: where else it may be. What
        has no place in the model keeps its name."""
        names = dict.fromkeys(in_file)
        self.files: dict[str, str] = {}
        """The file's name of the tensor that each is, or lies in."""
        self.stacked: dict[str, Stacked | Rows] = {}
        for name, file_name in own.items():
            if file_name in names:
                self.files[name] = file_name
                continue
            for place in stacks.get(name, ()):
                if place.name in names:
                    self.files[name], self.stacked[name] = place.name, place
                    break
        self._left = Counter(self.files.values())
        """Of each of the file's tensors, how many of the model's have not been released."""
        self.files |= {name: name for name in names if name not in self._left}

    def released(self, name: str) -> str | None:
        """This tensor has been packed: the file's tensor that is not needed any more, None while others in it are."""
        file_name = self.files.get(name, name)
        self._left[file_name] -= 1
        return file_name if self._left[file_name] <= 0 else None
