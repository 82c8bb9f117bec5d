"""A folder of safetensors with quantised weights, in the form of one without.

Owns the choice of format by config.json, and which tensors stand for which weight. Never decides what a backend packs,
and knows no layout: each format has a module of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.formats.safetensors import SafetensorInfo, SafetensorsFolder
from mooli.models.fields import short
from mooli.models.quantized.compressed import CompressedTensors
from mooli.models.quantized.float8 import Float8
from mooli.models.quantized.mxfp4 import MXFP4
from mooli.models.quantized.packed import AWQ, GPTQ
from mooli.models.quantized.weights import QuantizedWeight, WeightFormat
from mooli.tensor import RawTensor, TensorType

_STACKS_KEPT = 2
"""Of a layer of experts, whose inner and outer weights are asked for in turn."""

KEYS = ("quantization_config", "compression_config")
_FORMATS: dict[str, Callable[[Mapping[str, Any]], WeightFormat]] = {
    "awq": AWQ,
    "gptq": GPTQ,
    "compressed-tensors": CompressedTensors,
    "fp8": Float8,
    "fbgemm_fp8": Float8,
    "mxfp4": MXFP4,
}


def take_format(config: dict[str, Any]) -> WeightFormat | None:
    """The format that a config.json names, which is taken out of it; None where nothing is quantised.

    Raises UnsupportedModelError for one that is not read, CheckpointError for what it cannot be.
    """
    given = [value for key in KEYS if (value := config.pop(key, None))]
    if not given:
        return None
    quantization = given[0]
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"quantization_config is {short(quantization)}, not an object")
    method = quantization.get("quant_method", "compressed-tensors" if "config_groups" in quantization else None)
    if method not in _FORMATS:
        raise UnsupportedModelError(
            f"the checkpoint is quantised with {short(method)}, which is not read; read are {', '.join(_FORMATS)};"
            " use the unquantised model (and quantization='int8' or 'int4') or a GGUF file"
        )
    return _FORMATS[method](quantization)


@dataclass(frozen=True, slots=True)
class _Info:
    """What a header would say of a quantised weight, had it one."""

    type: TensorType
    matrix_shape: tuple[int, ...]

    def readable_type(self) -> TensorType:
        return self.type


class QuantizedFolder:
    """All tensors of a folder: quantised weights under the names that they have where nothing is quantised."""

    def __init__(self, folder: SafetensorsFolder, weight_format: WeightFormat, wanted: Container[str]) -> None:
        """Takes over the folder and closes it. wanted: names of the model's tensors; a bias of zeros that is none of
        them is left out, as tools write one where a layer has none.

        Raises as `WeightFormat.find`, and CheckpointError without any quantised weight, as config.json and weights are
        then not of one model.
        """
        self._folder, self._format = folder, weight_format
        self.path = folder.path
        self._stacks: dict[str, RawTensor] = {}
        """Those that were read last."""
        try:
            self._weights = {weight.name: weight for weight in weight_format.find(folder)}
            if not self._weights:
                raise CheckpointError(
                    f"config.json says that {self.path.name} is quantised with {weight_format.label}, and no tensor is:"
                    " configuration and weights are not of one model"
                )
            hidden = {name for weight in self._weights.values() for name in weight.parts.values()}
            kept = (name for name in folder.names() if name not in hidden and not self._is_unused(name))
            self._names = tuple(name for name in kept if name in wanted or not self._is_no_bias(name))
        except BaseException:
            folder.close()
            raise

    def _is_unused(self, name: str) -> bool:
        return name.rpartition(".")[2] in self._format.unused

    def _is_no_bias(self, name: str) -> bool:
        module, _, suffix = name.rpartition(".")
        return suffix == "bias" and f"{module}.weight" in self._weights and not np.any(self._folder.array(name))

    def names(self) -> Iterable[str]:
        return (*self._names, *self._weights)

    def info(self, name: str) -> SafetensorInfo | _Info:
        weight = self._weights.get(name)
        return self._folder.info(name) if weight is None else _Info(weight.type, weight.shape)

    def tensor(self, name: str) -> RawTensor:
        weight = self._weights.get(name)
        if weight is None:
            return self._folder.tensor(name)
        if not weight.is_stack:
            return self._format.read(self._folder, weight)
        if name not in self._stacks:
            while len(self._stacks) >= _STACKS_KEPT:
                del self._stacks[next(iter(self._stacks))]
            self._stacks[name] = self._format.read(self._folder, weight)
        return self._stacks[name]

    def release(self, name: str) -> None:
        for each in self._parts(name):
            self._folder.release(each)

    def close(self) -> None:
        self._stacks.clear()
        self._folder.close()

    def _parts(self, name: str) -> Iterable[str]:
        weight: QuantizedWeight | None = self._weights.get(name)
        return (name,) if weight is None else weight.parts.values()
