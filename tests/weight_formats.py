"""Writes weights as other tools' formats define them, word by word, with the values that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Parts = dict[str, torch.Tensor]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Written:
    """parts: by what follows the module's name. values: float32 (rows, columns), what they stand for, exactly."""

    parts: Parts
    values: Floats


def rounded_scales(largest: Floats, steps: float, dtype: torch.dtype) -> Floats:
    """Scales as numbers of a type, never zero."""
    scales = torch.tensor(np.maximum(largest, 1e-3) / steps).to(dtype)
    return scales.float().numpy()


def integers(
    weight: Floats, bits: int, group: int, is_symmetric: bool, dtype: torch.dtype = torch.float16
) -> tuple[NDArray[np.int64], Floats, NDArray[np.int64]]:
    """Codes from 0 (rows, columns), scales and zeros (rows, groups) of a plain quantisation."""
    grouped = weight.reshape(len(weight), -1, group)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    if is_symmetric:
        scales = rounded_scales(np.abs(grouped).max(-1), middle - 1 + (bits == 2), dtype)
        zeros = np.full(scales.shape, middle)
    else:
        low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
        scales = rounded_scales(high - low, top, dtype)
        zeros = np.clip(np.rint(-low / scales), 0, top).astype(np.int64)
    codes = np.clip(np.rint(grouped / scales[..., None]) + zeros[..., None], 0, top).astype(np.int64)
    return codes.reshape(weight.shape), scales, zeros


def meant(codes: NDArray[np.int64], scales: Floats, zeros: NDArray[np.int64]) -> Floats:
    group = codes.shape[1] // scales.shape[1]
    steps = codes - np.repeat(zeros, group, axis=1)
    return (steps * np.repeat(scales, group, axis=1).astype(np.float64)).astype(np.float32)


def words(codes: NDArray[np.int64], bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """(n, m) to int32 (n, m * bits / 32): value `order[i]` of each word's is shifted by i times the bits."""
    each = 32 // bits
    order = order or tuple(range(each))
    packed = np.zeros((codes.shape[0], codes.shape[1] // each), np.uint64)
    for position, value in enumerate(order):
        packed |= codes[:, value::each].astype(np.uint64) << np.uint64(bits * position)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def awq(weight: Floats, group: int = 64) -> Written:
    codes, scales, zeros = integers(weight, 4, group, False)
    parts = {
        "qweight": words(codes.T, 4, AWQ_ORDER),
        "qzeros": words(zeros.T, 4, AWQ_ORDER),
        "scales": torch.tensor(scales.T).half(),
    }
    return Written(parts, meant(codes, scales, zeros))


def gptq(weight: Floats, bits: int = 4, group: int = 32, is_symmetric: bool = True, less: int = 1) -> Written:
    codes, scales, zeros = integers(weight, bits, weight.shape[1] if group == -1 else group, is_symmetric)
    zeros = np.maximum(zeros, less)  # none of the first version is 0
    columns = weight.shape[1]
    parts = {
        "qweight": words(codes, bits).T,
        "qzeros": words(zeros.T - less, bits),
        "scales": torch.tensor(scales.T).half(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // (columns if group == -1 else group),
    }
    return Written(parts, meant(codes, scales, zeros))


def pack_quantized(
    weight: Floats, bits: int = 4, group: int = 32, is_symmetric: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Written:
    codes, scales, zeros = integers(weight, bits, weight.shape[1] if group == -1 else group, is_symmetric, dtype)
    parts = {
        "weight_packed": words(codes, bits),
        "weight_scale": torch.tensor(scales).to(dtype),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not is_symmetric:
        parts["weight_zero_point"] = words(zeros.T, bits).T
    return Written(parts, meant(codes, scales, zeros))


def int_quantized(weight: Floats, group: int = -1, is_symmetric: bool = True) -> Written:
    codes, scales, zeros = integers(weight, 8, weight.shape[1] if group == -1 else group, is_symmetric, torch.bfloat16)
    parts = {
        "weight": torch.tensor(codes - 128).to(torch.int8),
        "weight_scale": torch.tensor(scales).bfloat16(),
    }
    if not is_symmetric:
        parts["weight_zero_point"] = torch.tensor(zeros - 128).to(torch.int8)
    return Written(parts, meant(codes, scales, zeros))


def float8(weight: Floats, scale_shape: str, block: int = 32, suffix: str = "weight_scale") -> Written:
    """scale_shape: block, channel, or tensor. values are not rounded."""
    rows, columns = weight.shape
    height, width = {"block": (block, block), "channel": (1, columns), "tensor": (rows, columns)}[scale_shape]
    shape = -(-rows // height), -(-columns // width)
    scales, values = np.empty(shape, np.float32), np.empty_like(weight)
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(shape[0]):
        for j in range(shape[1]):
            at = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            scales[i, j] = np.abs(weight[at]).max() / 448
            codes[at] = torch.tensor(weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
            values[at] = codes[at].float().numpy() * scales[i, j]
    stored = torch.tensor(scales).reshape(()) if scale_shape == "tensor" else torch.tensor(scales)
    return Written({"weight": codes, suffix: stored}, values)


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4(experts: Floats) -> Written:
    """(experts, rows, columns): `_blocks` and `_scales` of all. The parts' names go after the tensor's."""
    grouped = experts.reshape(*experts.shape[:2], -1, 32)
    exponents = np.floor(np.log2(np.abs(grouped).max(-1) + 1e-9)) - 2
    scaled = grouped / 2.0 ** exponents[..., None]
    values = np.array(E2M1 + tuple(-value for value in E2M1))
    codes = np.abs(scaled[..., None] - values).argmin(-1)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    parts = {
        "_blocks": torch.tensor(blocks).to(torch.uint8),
        "_scales": torch.tensor(exponents + 127).to(torch.uint8),
    }
    meant_values = values[codes] * 2.0 ** exponents[..., None]
    return Written(parts, meant_values.reshape(experts.shape).astype(np.float32))


def bfloat16(values: Floats) -> Floats:
    return torch.tensor(values).bfloat16().float().numpy()


def quantise_folder(
    folder: Path,
    quantization: Mapping[str, Any],
    write: Callable[[str, Floats], Written | None],
) -> dict[str, Floats]:
    """Rewrite a folder of Transformers: every linear weight that `write` gives parts for becomes those. Returns what
    each stands for, by name."""
    path = folder / "model.safetensors"
    tensors, values = safetensors.torch.load_file(path), {}
    for name in list(tensors):
        module, _, suffix = name.rpartition(".")
        if suffix != "weight" or tensors[name].ndim != 2 or "embed" in name or "lm_head" in name:
            continue
        written = write(module, tensors[name].float().numpy())
        if written is None:
            continue
        values[name] = written.values
        del tensors[name]
        tensors |= {f"{module}.{part}": tensor.contiguous() for part, tensor in written.parts.items()}
    safetensors.torch.save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": dict(quantization)}))
    return values
