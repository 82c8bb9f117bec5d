"""Weights of eight-bit floats, E4M3, with a scale for each block, row or matrix.

Owns the layout of `quant_method` fp8 and fbgemm_fp8, and the product, which is rounded to bfloat16: as eight-bit floats
have four significant bits, that adds nothing to be seen. Float weights of compressed-tensors are read by it too.

    weight E4M3 (rows, columns); value = weight * scale
    weight_scale_inv or weight_scale: of `weight_block_size` (128 x 128), rounded up at the edges; of rows; or one

Source: DeepSeek-V3's `weight_dequant`; the OCP's 8-bit Floating Point Specification, 1.0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models.fields import short
from mooli.models.quantized.blocks import bfloat16, rounded_to_bfloat16
from mooli.models.quantized.targets import ModuleNames
from mooli.models.quantized.weights import QuantizedWeight, Tensors, WeightFormat, scales_of
from mooli.tensor import RawTensor, TensorType

STORED_AS = "F8_E4M3"
_VALUES_AT_A_TIME = 1 << 22


def _values() -> NDArray[np.float32]:
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    size[codes & 127 == 127] = np.nan
    return np.where(codes < 128, size, -size).astype(np.float32)


VALUES = _values()
"""float32 (256,): of every code of E4M3."""


class Float8(WeightFormat):
    """`quant_method` fp8 and fbgemm_fp8."""

    label = "FP8"
    unused = ("input_scale", "activation_scale", "k_scale", "v_scale", "input_scale_ub")

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._kept = ModuleNames(config.get("modules_to_not_convert"))
        self.block = block_size(config.get("weight_block_size"))

    def expected(self, module: str, columns: int) -> TensorType | None:
        is_kept = module in self._kept or module.rpartition(".")[2] == "lm_head"
        return None if is_kept else TensorType.BF16

    def find(self, tensors: Tensors) -> Iterable[QuantizedWeight]:
        stored = frozenset(tensors.names())
        for name in sorted(stored):
            if name.endswith(".weight") and tensors.info(name).dtype.startswith("F8_"):
                yield float8_weight(tensors, stored, name)

    def read(self, tensors: Tensors, weight: QuantizedWeight) -> RawTensor:
        return read_float8(tensors, weight, self.block)


def block_size(value: Any) -> tuple[int, int] | None:
    """Rows and columns that share a scale, or None where it is not blocks."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(value) != 2 or any(type(n) is not int or n < 1 for n in value):
        raise CheckpointError(f"quantization_config: a block is {short(value)}, not two lengths")
    return value[0], value[1]


def float8_weight(tensors: Tensors, stored: frozenset[str], name: str) -> QuantizedWeight:
    """The weight of that name, with its scales."""
    info = tensors.info(name)
    if info.dtype != STORED_AS:
        raise UnsupportedModelError(f"{name} is {info.dtype}; of eight-bit floats {STORED_AS} is read")
    shape = info.matrix_shape
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{name} has shape {list(info.shape)}, and is no matrix")
    scales = [f"{name}{suffix}" for suffix in ("_scale_inv", "_scale") if f"{name}{suffix}" in stored]
    if not scales:
        raise CheckpointError(f"{name} is {STORED_AS}, and its scales {name}_scale_inv are missing")
    return QuantizedWeight(name, {"weight": name, "scale": scales[0]}, (shape[0], shape[1]), TensorType.BF16)


def read_float8(tensors: Tensors, weight: QuantizedWeight, block: tuple[int, int] | None) -> RawTensor:
    """The product, as bfloat16. A few rows at a time: numbers take four times what codes do."""
    rows, columns = weight.shape
    codes = tensors.codes(weight.parts["weight"]).reshape(rows, columns)
    scales = _scale_rows(scales_of(tensors, weight.parts["scale"]), weight, block)
    height, width = (block or (1, columns)) if len(scales) > 1 or scales.shape[1] > 1 else (rows, columns)
    data = np.empty((rows, columns), np.uint16)
    step = max(1, _VALUES_AT_A_TIME // columns)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        factors = np.repeat(scales[np.arange(begin, end) // height], width, axis=1)[:, :columns]
        data[begin:end] = rounded_to_bfloat16(VALUES[codes[begin:end]] * factors)
    return bfloat16(weight.name, weight.shape, data)


def _scale_rows(
    scales: NDArray[np.float32], weight: QuantizedWeight, block: tuple[int, int] | None
) -> NDArray[np.float32]:
    """(row blocks, column blocks); a row each, or one at all, where the weight is not in blocks."""
    rows, columns = weight.shape
    wanted = [(1, 1), (rows, 1)] if block is None else [(-(-rows // block[0]), -(-columns // block[1]))]
    for shape in wanted:
        if scales.size == shape[0] * shape[1] and (scales.ndim < 2 or block is None or scales.shape == shape):
            return scales.reshape(shape)
    raise CheckpointError(
        f"{weight.parts['scale']} has shape {list(scales.shape)}, which is none of {', '.join(map(str, wanted))}"
    )
