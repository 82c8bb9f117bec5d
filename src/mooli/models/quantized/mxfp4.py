"""MXFP4 as gpt-oss has it: experts in `…_blocks` and `…_scales`.

Owns that layout, which becomes GGUF's type of the same name: the same codes in another order, so nothing is rounded.

    blocks uint8 (experts, rows, groups, 16): 32 codes of E2M1, an even one in the low half of a byte, the next above it
    scales uint8 (experts, rows, groups): value = code's value * 2^(scale - 127)

A tensor keeps the name of its blocks: without quantisation these models have their experts the other way round, so the
one must not pass for the other. Its rows are those of all experts. Source: OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mooli.errors import CheckpointError
from mooli.models.quantized.blocks import GROUP
from mooli.models.quantized.weights import QuantizedWeight, Tensors, WeightFormat
from mooli.tensor import BLOCK, RawTensor, TensorType

_BLOCKS, _SCALES = "_blocks", "_scales"


class MXFP4(WeightFormat):
    """`quant_method` mxfp4."""

    label = "MXFP4"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Nothing of it is needed: what is quantised has names of its own."""

    def expected(self, module: str, columns: int) -> TensorType | None:
        return TensorType.MXFP4 if ".experts." in f"{module}." else None

    def find(self, tensors: Tensors) -> Iterable[QuantizedWeight]:
        stored = frozenset(tensors.names())
        for name in sorted(stored):
            if name.endswith(_BLOCKS):
                yield _weight(tensors, stored, name)

    def read(self, tensors: Tensors, weight: QuantizedWeight) -> RawTensor:
        rows, columns = weight.shape
        codes = tensors.codes(weight.parts["blocks"]).reshape(rows, columns // GROUP, GROUP // 2)
        blocks = np.empty((*codes.shape[:2], BLOCK[TensorType.MXFP4][1]), np.uint8)
        blocks[:, :, 0] = tensors.codes(weight.parts["scales"]).reshape(rows, -1)
        first, last = codes[:, :, :8], codes[:, :, 8:]  # pairs of the first and of the last 16
        blocks[:, :, 1::2] = first & 15 | last << 4
        blocks[:, :, 2::2] = first >> 4 | last & 0xF0
        return RawTensor(weight.name, TensorType.MXFP4, weight.shape, blocks.reshape(rows, -1))


def _weight(tensors: Tensors, stored: frozenset[str], name: str) -> QuantizedWeight:
    scales = name.removesuffix(_BLOCKS) + _SCALES
    if scales not in stored:
        raise CheckpointError(f"{name} is there, and its {scales} is missing; download the model again")
    shape, groups = tensors.info(name).shape, tensors.info(scales).shape
    types = tensors.info(name).dtype, tensors.info(scales).dtype
    if len(shape) < 3 or 0 in shape or shape[-1] != GROUP // 2 or groups != shape[:-1] or types != ("U8", "U8"):
        raise CheckpointError(
            f"{name} is {types[0]} of shape {list(shape)} and {scales} {types[1]} of {list(groups)}: they are not 32"
            " codes of four bits for each scale"
        )
    rows = int(np.prod(shape[:-2], dtype=np.int64))
    parts = {"blocks": name, "scales": scales}
    return QuantizedWeight(name, parts, (rows, shape[-2] * GROUP), TensorType.MXFP4, is_stack=len(shape) > 3)
