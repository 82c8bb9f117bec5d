"""Checkpoints of compressed-tensors (LLM Compressor): packed integers, int8 and eight-bit floats.

Owns the reading of `config_groups`, and these layouts of a linear layer of (rows, columns):

    pack-quantized    weight_packed int32 (rows, columns * bits / 32): code + 2^(bits - 1), the lowest bits first
                      weight_scale (rows, groups); weight_zero_point, packed along rows; weight_shape
    int-quantized     weight int8, weight_scale (rows, groups), weight_zero_point int8
    float-quantized   weight E4M3, weight_scale of the matrix, of rows or of blocks
    value = scale * (code - zero)

What activations and caches were calibrated with is not used: activations are quantised as for every other model.
Source: the compressors of the compressed-tensors package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models.fields import Fields, short
from mooli.models.quantized.blocks import from_codes, type_of_codes
from mooli.models.quantized.float8 import STORED_AS, block_size, float8_weight, read_float8
from mooli.models.quantized.targets import Targets, first_of
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

_FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("mixed-precision", "dense"),
)
_WHAT_TO_DO = "take the model that is not quantised, with quantization='int8' or 'int4', or a GGUF file of it"


@dataclass(frozen=True, slots=True)
class _Weights:
    """`weights` of a group. group: columns that share a scale; 0 for all of a row."""

    kind: str
    bits: int
    is_symmetric: bool
    strategy: str
    group: int
    block: tuple[int, int] | None


class CompressedTensors(WeightFormat):
    """`quant_method` compressed-tensors."""

    label = "compressed-tensors"
    unused = (
        *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
        *("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point"),
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        _refuse(config)
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise CheckpointError("quantization_config of compressed-tensors has no config_groups")
        self._groups = [_group(name, group) for name, group in groups.items()]
        self._ignored = Targets(config.get("ignore") or [], "quantization_config: ignore")

    def expected(self, module: str, columns: int) -> TensorType | None:
        weights = None if module in self._ignored else first_of(self._groups, module)
        if weights is None:
            return None
        if weights.kind == "float":
            return TensorType.BF16
        groups = max(1, columns // weights.group) if weights.group else 1
        return type_of_codes(weights.bits, columns, groups, weights.is_symmetric)

    def find(self, tensors: Tensors) -> Iterable[QuantizedWeight]:
        stored = frozenset(tensors.names())
        for name in sorted(stored):
            module, _, suffix = name.rpartition(".")
            if suffix == "weight_packed" or (suffix == "weight" and tensors.info(name).dtype == "I8"):
                yield self._integers(tensors, stored, module, name)
            elif suffix == "weight" and tensors.info(name).dtype.startswith("F8_"):
                self._weights(module, "float")
                yield float8_weight(tensors, stored, name)

    def _weights(self, module: str, kind: str) -> _Weights:
        """What is said of a module. CheckpointError where that is not what is stored."""
        weights: _Weights | None = first_of(self._groups, module)
        if module in self._ignored or weights is None:
            raise CheckpointError(f"{module} is quantised, and quantization_config says that it is not")
        if weights.kind != kind:
            raise CheckpointError(f"{module} is stored as {kind}, and quantization_config says {weights.kind}")
        return weights

    def _integers(self, tensors: Tensors, stored: frozenset[str], module: str, name: str) -> QuantizedWeight:
        weights, info = self._weights(module, "int"), tensors.info(name)
        is_packed = name.endswith("_packed")
        suffixes = ["weight_scale"] + ([] if weights.is_symmetric else ["weight_zero_point"])
        parts = {suffix: part(self.label, stored, module, suffix) for suffix in suffixes}
        parts["weight"] = name
        for suffix in ("weight_shape", "weight_g_idx", "weight_zero_point"):
            if f"{module}.{suffix}" in stored:
                parts[suffix] = f"{module}.{suffix}"
        if len(info.shape) != 2 or 0 in info.shape or info.dtype != ("I32" if is_packed else "I8"):
            raise UnsupportedModelError(
                f"{name} is {info.dtype[:40]} of shape {list(info.shape)}: of {self.label}, int32 words and int8"
                f" matrices are read; {_WHAT_TO_DO}"
            )
        rows, columns = info.shape
        if is_packed:
            columns = columns * 32 // weights.bits
            if "weight_shape" in parts:
                rows, columns = (int(n) for n in checked(tensors, parts["weight_shape"], (2,)))
        if rows != info.shape[0] or (-(-columns * weights.bits // 32) != info.shape[1] and is_packed):
            raise CheckpointError(f"{name} has shape {list(info.shape)}, which does not hold {rows} x {columns} codes")
        kind = type_of_codes(weights.bits, columns, _groups_of(weights, module, columns), weights.is_symmetric)
        return QuantizedWeight(f"{module}.weight", parts, (rows, columns), kind)

    def read(self, tensors: Tensors, weight: QuantizedWeight) -> RawTensor:
        module = weight.name.removesuffix(".weight")
        if tensors.info(weight.parts["weight"]).dtype == STORED_AS:
            return read_float8(tensors, weight, self._weights(module, "float").block)
        weights = self._weights(module, "int")
        rows, columns = weight.shape
        groups = _groups_of(weights, module, columns)
        scales = scales_of(tensors, weight.parts["weight_scale"])
        if scales.size == 1 and groups == 1:
            scales = np.full((rows, 1), scales.reshape(-1)[0], np.float32)
        if scales.shape != (rows, groups):
            raise CheckpointError(
                f"{weight.parts['weight_scale']} has shape {list(scales.shape)} instead of {[rows, groups]}"
            )
        if "weight_g_idx" in weight.parts:
            order = checked(tensors, weight.parts["weight_g_idx"], (columns,))
            if not np.array_equal(order, np.arange(columns) // (columns // groups)):
                raise UnsupportedModelError(
                    f"{weight.parts['weight_g_idx']}: columns are in groups by importance (actorder), not one after the"
                    f" other, which is not read; {_WHAT_TO_DO}"
                )
        stored = tensors.codes if not weight.parts["weight"].endswith("_packed") else None
        if stored is not None:
            codes = stored(weight.parts["weight"]) ^ np.uint8(128)
        else:
            codes = unpacked(tensors.array(weight.parts["weight"]), weights.bits)[:, :columns]
        zeros = self._zeros(tensors, weight, weights, groups)
        return from_codes(weight.name, weights.bits, codes, scales, zeros, is_symmetric=weights.is_symmetric)

    def _zeros(self, tensors: Tensors, weight: QuantizedWeight, weights: _Weights, groups: int) -> NDArray[np.int16]:
        """int16 (rows, groups), of codes that begin at 0."""
        rows, middle = weight.shape[0], 1 << (weights.bits - 1)
        if "weight_zero_point" not in weight.parts:
            return np.full((rows, groups), middle, np.int16)
        name = weight.parts["weight_zero_point"]
        if tensors.info(name).dtype == "I32":
            words = checked(tensors, name, (-(-rows * weights.bits // 32), groups))
            stored: NDArray[np.int16] = unpacked(per_row(words), weights.bits)[:, :rows].T.astype(np.int16)
            return stored
        values = np.asarray(tensors.array(name), np.int16).reshape(-1)
        if values.size not in (1, rows * groups):
            raise CheckpointError(f"{name} has {values.size} numbers instead of {[rows, groups]}")
        moved: NDArray[np.int16] = np.broadcast_to(values + np.int16(middle), (rows * groups,))
        return moved.reshape(rows, groups)


def _groups_of(weights: _Weights, module: str, columns: int) -> int:
    if not weights.group:
        return 1
    if columns % weights.group:
        raise CheckpointError(f"{module} has {columns} columns, which are not whole groups of {weights.group}")
    return columns // weights.group


def _refuse(config: Mapping[str, Any]) -> None:
    """What changes the meaning of weights and is not implemented."""
    name = config.get("format")
    if name is not None and name not in _FORMATS:
        raise UnsupportedModelError(
            f"compressed-tensors in the format {short(name)} is not read; read are {', '.join(_FORMATS)}; {_WHAT_TO_DO}"
        )
    sparsity = config.get("sparsity_config") or {}
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") not in ("dense", None):
        raise UnsupportedModelError(
            f"compressed-tensors with sparse weights ({short(sparsity.get('format'))}) is not read; {_WHAT_TO_DO}"
        )
    transform = config.get("transform_config") or {}
    if isinstance(transform, Mapping) and transform.get("config_groups"):
        raise UnsupportedModelError(f"compressed-tensors with rotations (transform_config) is not read; {_WHAT_TO_DO}")


def _group(name: str, group: Any) -> tuple[Targets, _Weights | None]:
    where = f"quantization_config: {name[:80]}"
    if not isinstance(group, Mapping):
        raise CheckpointError(f"{where} is {short(group)}, not an object")
    form = group.get("format")
    if form is not None and form not in _FORMATS:
        raise UnsupportedModelError(f"{where} has the format {short(form)}, which is not read; {_WHAT_TO_DO}")
    targets, weights = Targets(group.get("targets"), f"{where}: targets"), group.get("weights")
    if weights is None:  # activations alone
        return targets, None
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{where}: weights is {short(weights)}, not an object")
    fields = Fields(weights, f"{where}: weights")
    kind, bits = str(weights.get("type", "int")), fields.integer("num_bits", 8)
    strategy = str(weights.get("strategy") or ("group" if weights.get("group_size") else "tensor"))
    if kind not in ("int", "float") or bits not in ((2, 4, 8) if kind == "int" else (8,)):
        raise UnsupportedModelError(f"{where}: {short(kind)} weights of {bits} bits are not read; {_WHAT_TO_DO}")
    possible = ("group", "channel", "tensor") if kind == "int" else ("channel", "tensor", "block")
    if strategy not in possible:
        raise UnsupportedModelError(
            f"{where}: {kind} weights with a scale for each {short(strategy)} are not read; {_WHAT_TO_DO}"
        )
    group_size = fields.integer("group_size", 0) if strategy == "group" and weights.get("group_size") else 0
    if group_size < 0 or (strategy == "group" and group_size == 0):
        raise CheckpointError(f"{where}: group_size is {short(weights.get('group_size'))}")
    block = block_size(weights.get("block_structure")) if strategy == "block" else None
    is_symmetric = weights.get("symmetric", True) is not False
    return targets, _Weights(kind, bits, is_symmetric, strategy, group_size, block)
