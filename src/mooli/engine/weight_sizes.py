"""What a model's weights take on a device, before any is loaded.

Owns the counting (models say which weights they have, backends what those take) and the refusal of a model whose
weights alone are larger than the memory. Never reads a weight and never allocates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from mooli.backends.base import Backend
from mooli.backends.sizes import AscendSizes, CudaSizes, Sizes, TorchSizes
from mooli.config import EngineConfig
from mooli.errors import ConfigError, OutOfMemoryError
from mooli.models.checkpoint import ShapesCheckpoint
from mooli.models.config import ModelConfig
from mooli.models.loader import stored_types
from mooli.models.registry import create_model
from mooli.models.sharding import Place, part_checkpoint
from mooli.tensor import TensorType

GIB = 2**30
_MOST_BYTES_OF_A_VALUE = 4.5
"""Of a weight in memory: float32, and what is stored beside it."""


def sizes_of(device: str, dtype: str, quantization: str | None) -> Sizes:
    """What knows how the backend of a device holds weights. Raises ConfigError for what that cannot quantise to."""
    if device == "cpu":
        from mooli.backends.cpu.packing import CpuSizes  # here: importing the native module is for who asks

        return CpuSizes(dtype, quantization)
    return {"torch": TorchSizes, "cuda": CudaSizes, "ascend": AscendSizes}[device](dtype, quantization)


def loaded_bytes(config: ModelConfig, sizes: Sizes, tp: int, types: Mapping[str, TensorType]) -> int:
    """Bytes of the weights on the first of `tp` devices. types: by name, where they are not of the model's dtype."""
    checkpoint = part_checkpoint(config, ShapesCheckpoint(config, types), Place(0, tp))
    # Of a backend, loading a model uses no more than what `Sizes` has.
    create_model(config.part(tp), checkpoint, cast(Backend, sizes))
    return sizes.weight_bytes()


def check_weights_fit(config: EngineConfig, model: ModelConfig, path: Path, available_bytes: int) -> None:
    """Raise OutOfMemoryError, saying what would fit, if the weights of the model at `path` are more than that.

    Models that are far smaller cost nothing: their values are counted, and no more.
    """
    values = sum(math.prod(spec.shape) for spec in model.tensors().values())
    if values * _MOST_BYTES_OF_A_VALUE / config.tp_size < available_bytes or config.backend_name == "reference":
        return
    types = {} if config.load_format == "dummy" else stored_types(path, model) or {}
    need = _bytes_with(config, model, types, config.quantization)
    if need is None or need <= available_bytes:
        return
    others = [kind for kind in ("int8", "int4") if kind != config.quantization]
    sizes = {kind: size for kind in others if (size := _bytes_with(config, model, types, kind)) is not None}
    fitting = [f"{kind} ({_gib(size)})" for kind, size in sizes.items() if size < available_bytes]
    if fitting:
        advice = f"with quantization {' or '.join(fitting)} they would fit, beside a small KV cache"
    else:
        least = _gib(min((need, *sizes.values())))
        advice = f"the least they can take here is {least}: take a smaller model or more memory"
    raise OutOfMemoryError(
        f"the weights of {path.name} take {_gib(need)} as they would be loaded, and {_gib(available_bytes)} are"
        f" available: {advice}. `mooli plan {path} --memory {available_bytes // 2**20}Mi` counts it for other"
        " settings. Nothing was loaded."
    )


def _bytes_with(
    config: EngineConfig, model: ModelConfig, types: Mapping[str, TensorType], quantization: str | None
) -> int | None:
    """None where the backend cannot quantise so."""
    try:
        sizes = sizes_of(config.backend_name, config.dtype, quantization)
    except ConfigError:
        return None
    return loaded_bytes(model, sizes, config.tp_size, types)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
