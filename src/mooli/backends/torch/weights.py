"""Weights on a device: stored tensors turned into torch tensors, and linear weights that multiply themselves.

Owns the conversion, a few rows at a time so that no whole matrix exists twice, and int8 packing. Never chooses a type
or a device, and keeps no reference to the bytes of a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from mooli.backends.base import Activation
from mooli.backends.dequant import dequantize
from mooli.backends.sizes import INT8_GROUP
from mooli.errors import OutOfMemoryError, UnsupportedModelError
from mooli.tensor import BLOCK, RawTensor, TensorType

VALUES_AT_A_TIME = 1 << 24
"""Values converted at one time, while loading and where int8 weights are expanded to be multiplied."""


class LinearWeight(Protocol):
    """What `linear` needs of a weight, however it is packed."""

    def matmul(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias for x (T, columns), in the type of x."""
        ...

    def num_bytes(self) -> int:
        """Bytes on the device."""
        ...


@dataclass(frozen=True, slots=True)
class FloatLinear:
    """values (rows, columns) and bias (rows,), in the type of the computation."""

    values: Tensor
    bias: Tensor | None

    def matmul(self, x: Tensor) -> Tensor:
        return F.linear(x, self.values, self.bias)

    def num_bytes(self) -> int:
        return tensor_bytes(self.values) + (0 if self.bias is None else tensor_bytes(self.bias))


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """codes int8 (rows, groups, INT8_GROUP), scales float32 (rows, groups, 1); columns past `num_columns` are padding.

    A weight is code * scale. Rows are expanded to the type of x as they are multiplied, VALUES_AT_A_TIME at a time:
    that halves what a weight takes, but reads and writes it once more for every step.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    num_columns: int

    def matmul(self, x: Tensor) -> Tensor:
        num_rows = len(self.codes)
        step = max(1, VALUES_AT_A_TIME // (self.codes.shape[1] * INT8_GROUP))
        parts = [F.linear(x, self.expand(begin, begin + step, x.dtype)) for begin in range(0, num_rows, step)]
        product = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return product if self.bias is None else product + self.bias

    def expand(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """The weights of some rows: (rows, columns)."""
        values = (self.codes[begin:end].float() * self.scales[begin:end]).to(dtype)
        return values.flatten(1)[:, : self.num_columns]

    def num_bytes(self) -> int:
        return sum(tensor_bytes(x) for x in (self.codes, self.scales, self.bias) if x is not None)


@dataclass(frozen=True, slots=True)
class GatedLinear:
    """Gate and up projection stacked, so that one product makes both."""

    stacked: LinearWeight
    activation: Activation


def tensor_bytes(values: Tensor) -> int:
    size: int = values.numel() * values.element_size()
    return size


def check_type(tensor: RawTensor) -> None:
    """Raise UnsupportedModelError for a tensor whose rows are not whole blocks of a type that is known."""
    if tensor.type not in BLOCK or tensor.num_columns % BLOCK[tensor.type][0]:
        raise UnsupportedModelError(
            f"tensor {tensor.name}: {tensor.type.name} rows of {tensor.num_columns} values are not supported"
        )


def row_chunks(tensor: RawTensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a tensor in host memory: floats as the file has them, all else dequantised to float32."""
    step = max(1, VALUES_AT_A_TIME // tensor.num_columns)
    for begin in range(0, tensor.num_rows, step):
        yield begin, _host_rows(tensor, begin, min(begin + step, tensor.num_rows))


def _host_rows(tensor: RawTensor, begin: int, end: int) -> Tensor:
    # A copy: the file is mapped read-only, which torch cannot express, and is closed after loading.
    data = np.array(tensor.data[begin:end], order="C")
    if tensor.type == TensorType.F32:
        return torch.from_numpy(data.view(np.float32))
    if tensor.type == TensorType.F16:
        return torch.from_numpy(data.view(np.float16))
    if tensor.type == TensorType.BF16:
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    scales = None if tensor.scales is None else tensor.scales[begin:end]
    rows = RawTensor(tensor.name, tensor.type, (end - begin, tensor.num_columns), data, scales)
    return torch.from_numpy(dequantize(rows))


def load_matrix(tensors: Sequence[RawTensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Tensors of equal width stacked along rows: (sum of rows, columns)."""
    num_rows = sum(tensor.num_rows for tensor in tensors)
    result = _new((num_rows, tensors[0].num_columns), dtype, device)
    first_row = 0
    for tensor in tensors:
        for begin, rows in row_chunks(tensor):
            result[first_row + begin : first_row + begin + len(rows)].copy_(rows)
        first_row += tensor.num_rows
    return result


def load_vector(tensors: Sequence[RawTensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Vectors one after the other."""
    values = np.concatenate([dequantize(tensor).reshape(-1) for tensor in tensors])
    return torch.from_numpy(values).to(device=device, dtype=dtype)


def load_int8(tensors: Sequence[RawTensor], bias: Tensor | None, device: torch.device) -> Int8Linear:
    """Tensors stacked along rows, each group of INT8_GROUP weights rounded to steps of its largest value / 127."""
    num_rows, num_columns = sum(tensor.num_rows for tensor in tensors), tensors[0].num_columns
    num_groups = -(-num_columns // INT8_GROUP)
    codes = _new((num_rows, num_groups, INT8_GROUP), torch.int8, device)
    scales = _new((num_rows, num_groups, 1), torch.float32, device)
    first_row = 0
    for tensor in tensors:
        if tensor.scales is not None:
            where = slice(first_row, first_row + tensor.num_rows)
            _keep_int8(tensor, codes[where], scales[where])
            first_row += tensor.num_rows
            continue
        for begin, rows in row_chunks(tensor):
            padded = F.pad(rows.to(device).float(), (0, num_groups * INT8_GROUP - num_columns))
            groups = padded.view(len(rows), num_groups, INT8_GROUP)
            scale = groups.abs().amax(dim=-1, keepdim=True) / 127
            where = slice(first_row + begin, first_row + begin + len(rows))
            # A group of zeros has scale zero, and any code.
            codes[where].copy_((groups / torch.where(scale > 0, scale, 1.0)).round())
            scales[where].copy_(scale)
        first_row += tensor.num_rows
    return Int8Linear(codes, scales, bias, num_columns)


def _keep_int8(tensor: RawTensor, codes: Tensor, scales: Tensor) -> None:
    """Fill codes (rows, groups, INT8_GROUP) and scales (rows, groups, 1) with those of an I8 tensor: nothing is rounded
    a second time."""
    stored = torch.from_numpy(np.array(tensor.data).view(np.int8))
    codes.zero_().flatten(1)[:, : tensor.num_columns] = stored.to(codes.device)
    scales.copy_(torch.from_numpy(np.array(tensor.scales))[:, None, None].expand_as(scales))


def holds_same(values: Tensor, tensor: RawTensor) -> bool:
    """Whether `values` is what loading `tensor` in its type would give (a head tied to the embedding)."""
    if tuple(values.shape) != (tensor.num_rows, tensor.num_columns):
        return False
    return all(
        torch.equal(values[begin : begin + len(rows)], rows.to(device=values.device, dtype=values.dtype))
        for begin, rows in row_chunks(tensor)
    )


def _new(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError as exc:  # of which torch's own out-of-memory error is one
        raise OutOfMemoryError(
            f"no memory on {device} for a weight of {' x '.join(map(str, shape))} values "
            f"({str(exc).splitlines()[0]}): use a smaller model or quantization='int8'"
        ) from exc
