"""AWQ and GPTQ: codes of a linear layer packed in words of 32 bits, the outputs along columns.

Owns both layouts. They differ in what a word holds:

    AWQ    qweight int32 (inputs, outputs / 8): eight outputs, in the order 0 2 4 6 1 3 5 7
    GPTQ   qweight int32 (inputs * bits / 32, outputs): inputs, one after the other
    both   qzeros int32 (groups, outputs * bits / 32), packed as outputs are; GPTQ's first version has zero - 1
           scales (groups, outputs); value = scale * (code - zero)

Sources: AutoAWQ's `WQLinear_GEMM`; AutoGPTQ and GPTQModel on `checkpoint_format`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models.fields import Fields, short
from mooli.models.quantized.blocks import from_codes, type_of_codes
from mooli.models.quantized.targets import ModuleNames
from mooli.models.quantized.weights import (
    QuantizedWeight,
    Tensors,
    WeightFormat,
    checked,
    part,
    per_row,
    scales_of,
    unpacked,
)
from mooli.tensor import RawTensor, TensorType

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Outputs of a word, from its lowest bits on."""

_WHAT_TO_DO = "take the model that is not quantised, with quantization='int4', or a GGUF file of it"


class _PackedFormat(WeightFormat):
    """What both have in common. bits of a code; group: inputs that share a scale, -1 for all."""

    def __init__(self, config: Mapping[str, Any], bits: tuple[int, ...], is_symmetric: bool) -> None:
        fields = Fields(config, f"quantization_config of {self.label}")
        self.bits = fields.integer("bits", 4)
        self.group = fields.integer("group_size", 128)
        self.is_symmetric = is_symmetric
        self._kept = ModuleNames(config.get("modules_to_not_convert"))
        if self.bits not in bits:
            raise UnsupportedModelError(
                f"{self.label} with {self.bits} bits is not read; read are {', '.join(map(str, bits))}; {_WHAT_TO_DO}"
            )
        if self.group != -1 and self.group < 1:
            raise CheckpointError(f"quantization_config: group_size is {self.group}")

    def expected(self, module: str, columns: int) -> TensorType | None:
        if module in self._kept or module.rpartition(".")[2] == "lm_head":
            return None
        groups = 1 if self.group == -1 else max(1, columns // self.group)
        return type_of_codes(self.bits, columns, groups, self.is_symmetric)

    def find(self, tensors: Tensors) -> Iterable[QuantizedWeight]:
        stored = frozenset(tensors.names())
        for name in sorted(stored):
            module, _, suffix = name.rpartition(".")
            if suffix == "qweight":
                yield self._weight(tensors, stored, module)

    def _weight(self, tensors: Tensors, stored: frozenset[str], module: str) -> QuantizedWeight:
        suffixes = ["qweight", "scales", "qzeros"]
        if f"{module}.g_idx" in stored:
            suffixes.append("g_idx")
        parts = {suffix: part(self.label, stored, module, suffix) for suffix in suffixes}
        shape = tensors.info(parts["qweight"]).shape
        if len(shape) != 2 or 0 in shape or tensors.info(parts["qweight"]).dtype != "I32":
            raise CheckpointError(f"{parts['qweight']} is no matrix of int32 but has shape {list(shape)}")
        rows, columns = self._outputs_and_inputs(shape)
        groups = self._groups(module, columns)
        kind = type_of_codes(self.bits, columns, groups, self.is_symmetric)
        return QuantizedWeight(f"{module}.weight", parts, (rows, columns), kind)

    def _groups(self, module: str, columns: int) -> int:
        if self.group == -1:
            return 1
        if columns % self.group:
            raise CheckpointError(f"{module} has {columns} inputs, which are not whole groups of {self.group}")
        return columns // self.group

    def read(self, tensors: Tensors, weight: QuantizedWeight) -> RawTensor:
        rows, columns = weight.shape
        groups = self._groups(weight.name, columns)
        words = rows * self.bits // 32
        scales = scales_of(tensors, weight.parts["scales"])
        if scales.shape != (groups, rows):
            raise CheckpointError(
                f"{weight.parts['scales']} has shape {list(scales.shape)} instead of {[groups, rows]}"
            )
        if "g_idx" in weight.parts:
            self._check_order(weight, checked(tensors, weight.parts["g_idx"], (columns,)), columns // groups)
        zeros = self._zeros(checked(tensors, weight.parts["qzeros"], (groups, words)))
        codes = self._codes(tensors.array(weight.parts["qweight"]))
        return from_codes(
            weight.name, self.bits, codes, per_row(scales), per_row(zeros), is_symmetric=self.is_symmetric
        )

    def _check_order(self, weight: QuantizedWeight, order: NDArray[Any], group: int) -> None:
        if not np.array_equal(order, np.arange(weight.shape[1]) // group):
            raise UnsupportedModelError(
                f"{weight.parts['g_idx']}: inputs are in groups by importance (desc_act), not one after the other,"
                f" which is not read; {_WHAT_TO_DO}"
            )

    def _outputs_and_inputs(self, words: tuple[int, ...]) -> tuple[int, int]:
        raise NotImplementedError

    def _codes(self, words: NDArray[np.int32]) -> NDArray[np.uint8]:
        """uint8 (outputs, inputs)"""
        raise NotImplementedError

    def _zeros(self, words: NDArray[np.int32]) -> NDArray[np.int16]:
        """int16 (groups, outputs)"""
        raise NotImplementedError


class AWQ(_PackedFormat):
    """`quant_method` awq, in the layout of its matrix kernels."""

    label = "AWQ"

    def __init__(self, config: Mapping[str, Any]) -> None:
        version = str(config.get("version", "gemm")).lower()
        if version != "gemm":
            raise UnsupportedModelError(f"AWQ of version {short(version)} is not read; read is gemm; {_WHAT_TO_DO}")
        super().__init__(config, (4,), is_symmetric=config.get("zero_point") is False)

    def _outputs_and_inputs(self, words: tuple[int, ...]) -> tuple[int, int]:
        return words[1] * 8, words[0]

    def _codes(self, words: NDArray[np.int32]) -> NDArray[np.uint8]:
        inputs, words_of = len(words), words.shape[1]
        pairs = per_row(words).view(np.uint8).reshape(words_of, inputs, 4)
        codes = np.empty((words_of, 8, inputs), np.uint8)
        for byte in range(4):
            codes[:, _AWQ_ORDER[2 * byte]] = pairs[:, :, byte] & 15
            codes[:, _AWQ_ORDER[2 * byte + 1]] = pairs[:, :, byte] >> 4
        return codes.reshape(8 * words_of, inputs)

    def _zeros(self, words: NDArray[np.int32]) -> NDArray[np.int16]:
        zeros: NDArray[np.int16] = per_row(self._codes(words)).astype(np.int16)
        return zeros


class GPTQ(_PackedFormat):
    """`quant_method` gptq, with zeros of either version."""

    label = "GPTQ"

    def __init__(self, config: Mapping[str, Any]) -> None:
        version = str(config.get("checkpoint_format") or "gptq")
        if version not in ("gptq", "gptq_v2"):
            raise UnsupportedModelError(
                f"GPTQ with checkpoint_format {short(version)} is not read; read are gptq and gptq_v2; {_WHAT_TO_DO}"
            )
        if config.get("dynamic"):
            raise UnsupportedModelError(
                f"GPTQ with settings of its own for some layers (dynamic) is not read; {_WHAT_TO_DO}"
            )
        self._less = 1 if version == "gptq" else 0
        super().__init__(config, (2, 4, 8), is_symmetric=config.get("sym") is not False)

    def _outputs_and_inputs(self, words: tuple[int, ...]) -> tuple[int, int]:
        return words[1], words[0] * 32 // self.bits

    def _codes(self, words: NDArray[np.int32]) -> NDArray[np.uint8]:
        return unpacked(per_row(words), self.bits)

    def _zeros(self, words: NDArray[np.int32]) -> NDArray[np.int16]:
        zeros: NDArray[np.int16] = unpacked(words, self.bits).astype(np.int16)
        zeros += self._less
        return zeros
