"""W8A8: int8 weights with a scale for each output, activations rounded to int8 row by row as they come.

Owns the packing at load and the two operations of a product. Not tried on hardware. Sources: the documents of
npu_dynamic_quant and npu_quant_matmul; SGLang and vllm-ascend pack the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mooli.backends.torch.weights import row_chunks, tensor_bytes
from mooli.tensor import RawTensor

FRACTAL_NZ = 29
"""The device's own format of matrices, in 16 x 32 tiles for int8."""


@dataclass(frozen=True, slots=True)
class W8A8Linear:
    """codes int8 (columns, rows): the weight transposed, in FRACTAL_NZ where its sizes fit tiles.

    scales float32 (rows,); bias (rows,) in the type of the computation.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def matmul(self, x: Tensor) -> Tensor:
        rounded, row_scales = torch.ops.npu.npu_dynamic_quant(x.contiguous())
        product: Tensor = torch.ops.npu.npu_quant_matmul(
            # The default type of the result is int8.
            rounded, self.codes, self.scales, pertoken_scale=row_scales, output_dtype=x.dtype
        )  # fmt: skip
        return product if self.bias is None else product + self.bias

    def num_bytes(self) -> int:
        return sum(tensor_bytes(x) for x in (self.codes, self.scales, self.bias) if x is not None)


def load_w8a8(tensors: Sequence[RawTensor], bias: Tensor | None, device: torch.device) -> W8A8Linear:
    """Tensors stacked along rows. Rows of floats are rounded to steps of their largest value / 127, int8 is kept."""
    num_rows, num_columns = sum(tensor.num_rows for tensor in tensors), tensors[0].num_columns
    codes = torch.empty((num_rows, num_columns), dtype=torch.int8)
    scales = torch.empty(num_rows, dtype=torch.float32)
    first_row = 0
    for tensor in tensors:
        if tensor.scales is not None:
            where = slice(first_row, first_row + tensor.num_rows)
            codes[where] = torch.from_numpy(np.array(tensor.data).view(np.int8))
            scales[where] = torch.from_numpy(np.array(tensor.scales))
            first_row += tensor.num_rows
            continue
        for begin, rows in row_chunks(tensor):
            values = rows.float()
            scale = values.abs().amax(dim=1) / 127
            where = slice(first_row + begin, first_row + begin + len(rows))
            # A row of zeros has scale zero, and any code.
            codes[where] = (values / torch.where(scale > 0, scale, 1.0)[:, None]).round().to(torch.int8)
            scales[where] = scale
        first_row += tensor.num_rows
    packed = codes.t().contiguous().to(device)
    if num_columns % 16 == 0 and num_rows % 32 == 0:
        packed = torch.ops.npu.npu_format_cast(packed, FRACTAL_NZ)
    return W8A8Linear(packed, scales.to(device), bias)
