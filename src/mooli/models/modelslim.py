"""Checkpoints that msmodelslim quantised: int8 weights, and a JSON file that says of every tensor what it is.

Owns the description and what its quantisation types mean. Never packs a weight: an int8 one is given out with a scale
for every row, a float one as it lies there.

W8A8_DYNAMIC has a weight (int8) and a weight_scale. W8A8 ("static") has activations rounded with one scale found in
calibration, and stores the weight's scale and bias multiplied by it:

    deq_scale = input_scale * weight_scale        quant_bias = bias / deq_scale - input_offset * sum of the row

Both are undone here, so that a static checkpoint is computed like a dynamic one. That is nearer to the float model, as
nothing is cut off at the calibrated range. Not compared with the vendor's own engine.

Sources: msModelSlim's document of its weight format; MindIE's pages on W8A8. float16 models have deq_scale as int64,
whose low half holds the bits of a float32.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.formats.files import read_json
from mooli.formats.safetensors import SafetensorsFolder
from mooli.models.checkpoint import as_declared
from mooli.models.config import TensorSpec
from mooli.models.fields import short
from mooli.tensor import RawTensor, TensorType

FLOAT, DYNAMIC, STATIC = "FLOAT", "W8A8_DYNAMIC", "W8A8"

_PARTS = {
    DYNAMIC: ("weight_scale", "weight_offset"),
    STATIC: ("input_scale", "input_offset", "quant_bias", "deq_scale", "weight_scale", "weight_offset"),
}
"""What belongs to a weight besides itself; the offsets, and a static weight's own scale, are not always there."""

_NEEDED = {DYNAMIC: ("weight_scale",), STATIC: ("input_scale", "input_offset", "quant_bias", "deq_scale")}
_QUANTISED_CACHE = ("fa_quant_type", "kv_quant_type", "kv_cache_type")
_WHAT_TO_DO = "use the model that is not quantised, with quantization='int8', which makes W8A8 of it on an NPU"

_ROWS_AT_A_TIME = 1024


def find_description(folder: Path) -> Path | None:
    """The description in a model's folder, or None. CheckpointError if there are several."""
    found = sorted(folder.glob("quant_model_description*.json"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{folder.name} has several descriptions of its quantisation ({names}): keep one model")
    return found[0] if found else None


def described_types(description: Path) -> dict[str, TensorType]:
    """Storage types of quantised weights by name, without opening the weights. Errors as `ModelslimCheckpoint`."""
    kinds = _weight_kinds(description.name, read_json(description))
    return {name: TensorType.I8 for name, kind in kinds.items() if kind != FLOAT}


class ModelslimCheckpoint:
    """A folder of safetensors with a description. The biases of static layers are made from what is stored."""

    def __init__(self, folder: Path, description: Path, tensors: Mapping[str, TensorSpec]) -> None:
        """`tensors`: those of the model; a static layer that has no bias there must have none in what it stores.

        Raises UnsupportedModelError for a quantisation that is not read, CheckpointError where description and tensors
        do not agree.
        """
        self._label = description.name
        self._tensors = tensors
        kinds = _weight_kinds(self._label, read_json(description))
        self._folder = SafetensorsFolder(folder)
        try:
            stored = dict.fromkeys(self._folder.names())
            self._kinds = {name: kind for name, kind in kinds.items() if kind != FLOAT}
            for name, kind in self._kinds.items():
                self._check_quantised(name, kind, stored)
            for name in stored:
                self._check_float(name, kinds)
            self._parts = {
                name: [part for suffix in _PARTS[kind] if (part := _sibling(name, suffix)) in stored]
                for name, kind in self._kinds.items()
            }
            self._made_biases = {
                bias: name
                for name, kind in self._kinds.items()
                if kind == STATIC and (bias := _sibling(name, "bias")) not in stored
            }
            self._hidden = {part for parts in self._parts.values() for part in parts}
            self._names = tuple(name for name in stored if name not in self._hidden)
            self._readable = frozenset((*self._names, *self._made_biases))
        except BaseException:
            self._folder.close()
            raise

    def _check_quantised(self, name: str, kind: str, stored: Container[str]) -> None:
        if name == next(iter(self._tensors)):
            raise UnsupportedModelError(
                f"{self._label} says that {name} is {kind}: a quantised embedding is not read; {_WHAT_TO_DO}"
            )
        if name not in stored:
            raise CheckpointError(f"{self._label} says that {name} is {kind}, and there is no such tensor")
        info = self._folder.info(name)
        if info.dtype != "I8" or len(info.shape) != 2 or 0 in info.shape:
            raise CheckpointError(
                f"{self._label} says that {name} is {kind}, and it is {info.dtype[:40]} of shape {list(info.shape)}: it"
                " should be an int8 matrix. Description and weights are not of one model."
            )
        for suffix in _NEEDED[kind]:
            if _sibling(name, suffix) not in stored:
                raise CheckpointError(
                    f"{self._label} says that {name} is {kind}, and its {_sibling(name, suffix)} is missing; download"
                    " the model again"
                )

    def _check_float(self, name: str, kinds: Mapping[str, str]) -> None:
        if name in self._kinds or self._folder.info(name).dtype != "I8" or not name.endswith(".weight"):
            return
        said = f"says that {name} is {FLOAT}" if name in kinds else f"does not name {name}"
        raise CheckpointError(
            f"{self._label} {said}, and it is int8: without its quantisation its numbers mean nothing. Description and"
            " weights are not of one model."
        )

    def names(self) -> Iterable[str]:
        return self._names

    def __contains__(self, name: str) -> bool:
        return name in self._readable

    def shape(self, name: str) -> tuple[int, ...]:
        info = self._folder.info(name)
        if name not in self._kinds:
            info.readable_type()
        return info.shape

    def tensor(self, name: str) -> RawTensor:
        if name in self._made_biases:
            return self._made_bias(name)
        if name not in self._kinds:
            return as_declared(self._folder.tensor(name), self._tensors.get(name))
        codes = self._folder.array(name)
        if _sibling(name, "bias") in self._made_biases and _sibling(name, "bias") not in self._tensors:
            self._check_no_bias(name, codes)
        return RawTensor(name, TensorType.I8, codes.shape, codes.view(np.uint8), self._scales(name, len(codes)))

    def release(self, name: str) -> None:
        if name in self._made_biases:
            return
        for each in (name, *self._parts.get(name, ())):
            self._folder.release(each)

    def close(self) -> None:
        self._folder.close()

    # ------------------------------------------------------------------ numbers beside a weight

    def _scales(self, name: str, num_rows: int) -> NDArray[np.float32]:
        """float32 (rows,): what a code of each row is multiplied by."""
        offset = _sibling(name, "weight_offset")
        if offset in self._hidden and np.any(self._folder.array(offset)):
            raise UnsupportedModelError(f"{offset} is not zero: weights off centre are not read; {_WHAT_TO_DO}")
        if self._kinds[name] == DYNAMIC:
            return self._numbers(_sibling(name, "weight_scale"), num_rows)
        input_scale = self._numbers(_sibling(name, "input_scale"), 1)
        if input_scale[0] == 0:
            raise CheckpointError(f"{_sibling(name, 'input_scale')} is zero")
        return self._numbers(_sibling(name, "deq_scale"), num_rows) / input_scale

    def _made_bias(self, bias: str) -> RawTensor:
        """(quant_bias + input_offset * sum of the row) * deq_scale, as float32."""
        name = self._made_biases[bias]
        steps, _ = self._bias_steps(name, self._folder.array(name))
        values = (steps * self._numbers(_sibling(name, "deq_scale"), len(steps))).astype(np.float32)
        return RawTensor(bias, TensorType.F32, values.shape, values.view(np.uint8).reshape(1, -1))

    def _check_no_bias(self, name: str, codes: NDArray[np.int8]) -> None:
        steps, correction = self._bias_steps(name, codes)
        # Rounding to whole steps, of a product that was computed in float32.
        if (np.abs(steps) > 1 + 1e-6 * np.abs(correction)).any():
            raise UnsupportedModelError(
                f"{_sibling(name, 'quant_bias')} holds a bias, for which this family of models has no place:"
                f" activations were shifted before they were quantised, which is not read; {_WHAT_TO_DO}"
            )

    def _bias_steps(self, name: str, codes: NDArray[np.int8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """A static layer's bias in steps of deq_scale, and what quant_bias has besides. int64 (rows,) each."""
        sums = np.empty(len(codes), np.int64)
        for begin in range(0, len(codes), _ROWS_AT_A_TIME):
            sums[begin : begin + _ROWS_AT_A_TIME] = codes[begin : begin + _ROWS_AT_A_TIME].sum(axis=1, dtype=np.int64)
        correction = int(self._vector(_sibling(name, "input_offset"), 1)[0]) * sums
        return self._vector(_sibling(name, "quant_bias"), len(codes)).astype(np.int64) + correction, correction

    def _numbers(self, name: str, count: int) -> NDArray[np.float32]:
        """Scales: float32 (count,). CheckpointError for another count, or numbers that cannot be scales."""
        stored = self._vector(name, count)
        if stored.dtype == np.int64:
            stored = stored.astype(np.uint32).view(np.float32)
        values = np.array(stored, np.float32)
        if not np.isfinite(values).all() or (values < 0).any():
            raise CheckpointError(f"{name} has numbers that are no scales: negative, infinite or NaN")
        return values

    def _vector(self, name: str, count: int) -> NDArray[Any]:
        values = self._folder.array(name)
        if values.size != count:
            raise CheckpointError(f"{name} has shape {list(values.shape)} instead of [{count}] or [{count}, 1]")
        return values.reshape(-1)


def _weight_kinds(label: str, description: Mapping[str, Any]) -> dict[str, str]:
    """Quantisation type of every `.weight` of the description."""
    for key in _QUANTISED_CACHE:
        if description.get(key):
            raise UnsupportedModelError(
                f"{label}: {key} is {short(description[key])}: a quantised KV cache is not implemented; {_WHAT_TO_DO}"
            )
    kinds = {name: kind for name, kind in description.items() if name.endswith(".weight")}
    if not kinds:
        raise CheckpointError(f"{label} names no weight: it is damaged, or of another tool")
    for name, kind in kinds.items():
        if kind not in (FLOAT, DYNAMIC, STATIC):
            raise UnsupportedModelError(
                f"{label}: {name} is {short(kind)}, which is not read; read are {FLOAT}, {DYNAMIC} and {STATIC};"
                f" {_WHAT_TO_DO}"
            )
    return kinds


def _sibling(weight: str, suffix: str) -> str:
    """The name of what belongs to a weight: `…q_proj.weight` and `bias` give `…q_proj.bias`."""
    return weight.removesuffix("weight") + suffix
