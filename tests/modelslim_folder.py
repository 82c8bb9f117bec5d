"""Writes a model folder as msmodelslim does: int8 weights, what belongs to them, and the description."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mooli.backends.dequant import dequantize
from mooli.models.checkpoint import DummyCheckpoint
from mooli.models.llama import LlamaConfig
from mooli.tensor import RawTensor, TensorType

CONFIG = LlamaConfig(
    family="qwen2",
    architecture="Qwen2ForCausalLM",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    qkv_bias=True,
    max_position_embeddings=512,
)
HF_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
    "quantize": "w8a8_dynamic",
    "quantization_config": {"model_quant_type": "W8A8_DYNAMIC"},
}
INPUT_SCALE, INPUT_OFFSET = np.float32(0.0625), 3

Tensors = dict[str, NDArray[Any]]
_DTYPES = {"float32": "F32", "float16": "F16", "int8": "I8", "int32": "I32", "int64": "I64"}


class FloatCheckpoint(DummyCheckpoint):
    """The float model that a folder's int8 weights stand for: each is its code times its scale."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(CONFIG, seed=3)
        self._tensors = tensors

    def tensor(self, name: str) -> RawTensor:
        scale = self._tensors.get(name.removesuffix("weight") + "weight_scale")
        if scale is None:
            return super().tensor(name)
        values = (self._tensors[name] * scale).astype(np.float32)
        return RawTensor(name, TensorType.F32, values.shape, values.view(np.uint8))


def quantised() -> tuple[Tensors, dict[str, str]]:
    """Tensors and description of a dynamic checkpoint: linear layers W8A8_DYNAMIC; embedding, head, norms and the
    first layer's down projection FLOAT."""
    source = DummyCheckpoint(CONFIG, seed=3)
    tensors: Tensors = {}
    description = {"model_quant_type": "W8A8_DYNAMIC", "version": "1.0.0"}
    for name in source.names():
        values = dequantize(source.tensor(name))
        is_linear = values.ndim == 2 and "layers" in name and "layers.0.mlp.down_proj" not in name
        kind = "W8A8_DYNAMIC" if is_linear else "FLOAT"
        tensors[name], description[name] = values, kind
        if is_linear:
            scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
            tensors[name] = np.round(values / scale).astype(np.int8)
            for suffix, numbers in (("scale", scale), ("offset", np.zeros_like(scale))):
                tensors[f"{name}_{suffix}"], description[f"{name}_{suffix}"] = numbers, kind
    return tensors, description


def made_static(tensors: Tensors, description: dict[str, str], *, is_float16: bool = False) -> None:
    """Turn every int8 layer into a static one, its bias inside quant_bias."""
    for name in [name for name, kind in description.items() if name.endswith(".weight") and kind != "FLOAT"]:
        layer = name.removesuffix(".weight")
        scale = tensors.pop(f"{name}_scale")[:, 0]
        del tensors[f"{name}_offset"], description[f"{name}_scale"], description[f"{name}_offset"]
        deq_scale = INPUT_SCALE * scale
        bias = tensors.pop(f"{layer}.bias", np.zeros(len(scale), np.float32))
        description.pop(f"{layer}.bias", None)
        sums = tensors[name].sum(axis=1, dtype=np.int64)
        parts = {
            "input_scale": np.array([INPUT_SCALE]),
            "input_offset": np.array([INPUT_OFFSET], np.int8),
            "quant_bias": (np.round(bias / deq_scale) - INPUT_OFFSET * sums).astype(np.int32),
            "deq_scale": deq_scale.view(np.int32).astype(np.int64) if is_float16 else deq_scale,
        }
        description[name] = "W8A8"
        for suffix, numbers in parts.items():
            tensors[f"{layer}.{suffix}"], description[f"{layer}.{suffix}"] = numbers, "W8A8"


def write(folder: Path, tensors: Tensors, description: dict[str, Any], **config: Any) -> Path:
    """The folder of a model, in two files of weights. `config` replaces keys of config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | config))
    (folder / "quant_model_description.json").write_text(json.dumps(description))
    names = sorted(tensors)
    for part, chosen in enumerate((names[::2], names[1::2]), start=1):
        header, data = {}, b""
        for name in chosen:
            values = np.ascontiguousarray(tensors[name])
            place = [len(data), len(data) + values.nbytes]
            header[name] = {"dtype": _DTYPES[str(values.dtype)], "shape": values.shape, "data_offsets": place}
            data += values.tobytes()
        text = json.dumps(header).encode()
        path = folder / f"quant_model_weight_w8a8_dynamic-{part:05}-of-00002.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder
