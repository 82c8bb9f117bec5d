"""What a model takes of a memory, in numbers alone: weights, KV cache, tokens and requests that fit. `mooli plan`.

Owns the arithmetic and how it is printed. Reads configurations and the headers of GGUF files, never a weight, and never
looks at this machine: the same question has the same answer everywhere. The size of the pool is the engine's own rule
(`mooli.engine.pool_size`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mooli.arguments import parse_size
from mooli.backends.ascend.defaults import MAX_RUNNING_REQUESTS
from mooli.config import DTYPES
from mooli.engine.pool_size import GIB, PoolNeeds, context_for, num_pool_pages
from mooli.errors import ConfigError, OutOfMemoryError
from mooli.formats.gguf import GGUFFile
from mooli.hub import resolve
from mooli.models.checkpoint import canonical_name, expected_shapes
from mooli.models.config import ModelConfig
from mooli.models.loader import open_model
from mooli.models.modelslim import described_types, find_description
from mooli.models.sharding import check_size
from mooli.plan_flags import DEVICE_NAMES
from mooli.tensor import TensorType, row_bytes

PAGE_SIZE = 128
"""Tokens of a page: the one size that every attention path of Ascend takes, and a multiple of the CPU's."""

EXAMPLE_CONTEXTS = (1024, 2048, 4096, 8192, 32768)
"""Lengths, in tokens, for which the number of requests is given besides the context asked for."""

_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
_QUANTISED_BYTES = {"int8": 34 / 32, "int4": 18 / 32}
"""Bytes of a weight on the CPU, with its share of the 16-bit scale that 32 weights have in common."""

_TORCH_INT8_BYTES = 36 / 32
"""Bytes of a weight in int8 on the backends of PyTorch: the scale has 32 bits there."""

_EXACT_IN_8_BITS = (TensorType.Q8_0, TensorType.Q5_0, TensorType.Q4_0)
_EXACT_AS_THEY_ARE = (TensorType.Q4_1, TensorType.BF16, TensorType.F16)
"""Stored types of a head whose values the CPU backend keeps; float32 only on some processors."""

_ROW_SCALE_BYTES = 4.0
"""On NPUs a row of int8 weights has one scale."""

_VECTOR_BYTES = 4.0
_AUTO_DTYPES = {"torch": "float32", "cuda": "bfloat16", "ascend": "bfloat16"}
"""What dtype="auto" is on backends that choose it themselves; the CPU takes the checkpoint's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The answer. Bytes are those of one of `tp` devices; tokens and requests are those of all together, which hold
    the same ones.

    device: the backend that is counted for: cpu, torch, cuda or ascend.
    weights: where dtype is "file" the tensors keep the types of a GGUF file. quantization: int8 also where the
    checkpoint has it. num_tokens: what the KV cache holds, in
    whole pages; 0 where the model does not fit, and `problem` says what is lacking.
    requests: context length to the number of requests of that length that fit at the same time, shared prefixes not
    counted: they make it more.
    """

    model: str
    architecture: str
    device: str
    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    tp: int
    memory_bytes: int
    mem_fraction_static: float | None
    weight_bytes: int
    kv_bytes_per_token: int
    page_size: int
    num_tokens: int
    kv_cache_bytes: int
    left_bytes: int
    model_context: int
    context_length: int
    requests: Mapping[int, int]
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the same names, context lengths as strings."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return values | {"requests": {str(length): count for length, count in self.requests.items()}}


def plan_memory(
    config: ModelConfig,
    memory_bytes: int,
    *,
    model: str = "",
    device: str = "cpu",
    dtype: str = "auto",
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
    tp: int = 1,
    context_length: int | None = None,
    mem_fraction_static: float | None = None,
    stored_types: Mapping[str, TensorType] | None = None,
) -> MemoryPlan:
    """How `memory_bytes` of each of `tp` devices are used by a model of this configuration.

    device: cpu, torch, cuda or ascend (NPUs); what a weight takes differs.
    dtype: of weights that are not quantised; auto takes the device's own choice. quantization: None, int8 or int4.
    kv_cache_dtype: of keys and values; auto is that of the computation, int8 is for CPUs alone.
    stored_types: types by canonical tensor name, of a GGUF file or of int8 weights, where there are such.
    mem_fraction_static: share of the memory for weights and KV cache; None is the engine's own rule, which takes half
    of what the weights leave and no more than the requests that run by default can use.
    Raises ConfigError for numbers that mean nothing, and for what the device cannot honour.
    """
    if memory_bytes < 1:
        raise ConfigError(f"memory is {memory_bytes} bytes: give a size such as 64GiB")
    if mem_fraction_static is not None and not 0 < mem_fraction_static <= 1:
        raise ConfigError(f"mem_fraction_static={mem_fraction_static} is not in (0, 1]")
    if context_length is not None and not 2 <= context_length <= config.max_position_embeddings:
        raise ConfigError(
            f"context_length={context_length} is not between 2 and the {config.max_position_embeddings} positions of"
            " the model"
        )
    check_tp(config, tp)
    computed = auto_dtype(config, device) if dtype == "auto" else dtype
    _check_quantization(device, quantization, computed)
    int8 = {name: kind for name, kind in (stored_types or {}).items() if kind == TensorType.I8}
    keeps_file = stored_types is not None and not int8 and (device, dtype, quantization) == ("cpu", "auto", None)
    weights = weight_bytes(
        config,
        computed,
        device=device,
        quantization=quantization,
        tp=tp,
        stored_types=stored_types if keeps_file else int8,
    )
    kv_dtype = _kv_dtype(device, dtype, kv_cache_dtype)
    per_token = kv_bytes_per_token(config, kv_dtype, tp=tp)
    needs = PoolNeeds(
        available_bytes=memory_bytes,
        weight_bytes=weights,
        bytes_per_page=per_token * PAGE_SIZE,
        page_size=PAGE_SIZE,
        model_context=config.max_position_embeddings,
        max_running_requests=MAX_RUNNING_REQUESTS if device == "ascend" else 48,
        context_length=context_length,
        mem_fraction_static=mem_fraction_static,
    )
    problem, num_pages = None, 0
    try:
        num_pages = num_pool_pages(needs)
    except OutOfMemoryError as exc:
        problem = str(exc)
    num_tokens = num_pages * PAGE_SIZE
    context = context_for(needs, num_pages) if num_pages else context_length or config.max_position_embeddings
    lengths = sorted({*(n for n in EXAMPLE_CONTEXTS if n < context), context})
    return MemoryPlan(
        model=model,
        architecture=config.architecture,
        device=device,
        dtype="file" if keeps_file else computed,
        quantization=quantization or ("int8" if int8 else None),
        kv_cache_dtype=kv_dtype,
        tp=tp,
        memory_bytes=memory_bytes,
        mem_fraction_static=mem_fraction_static,
        weight_bytes=weights,
        kv_bytes_per_token=per_token,
        page_size=PAGE_SIZE,
        num_tokens=num_tokens,
        kv_cache_bytes=num_tokens * per_token,
        left_bytes=memory_bytes - weights - num_tokens * per_token,
        model_context=config.max_position_embeddings,
        context_length=context,
        requests={length: num_pages // -(-length // PAGE_SIZE) for length in lengths},
        problem=problem,
    )


def weight_bytes(
    config: ModelConfig,
    dtype: str,
    *,
    device: str = "cpu",
    quantization: str | None = None,
    tp: int = 1,
    stored_types: Mapping[str, TensorType] | None = None,
) -> int:
    """Bytes of the weights on one of `tp` devices, rounded up.

    Linear layers, embedding and head are cut in `tp` parts (a key and value head that several devices need is on each
    of them); norms are on every device. On the CPU a tied embedding is read from the packed head, unless packing
    changes its values. `stored_types` as `plan_memory` takes it.
    """
    total = 0.0
    shapes = expected_shapes(config)
    head = shapes.pop("lm_head.weight", shapes["model.embed_tokens.weight"])
    for name, shape in (*shapes.items(), ("lm_head.weight", head)):
        is_tied = name == "lm_head.weight" and config.tie_word_embeddings
        if len(shape) == 1:
            total += shape[0] * _VECTOR_BYTES
            continue
        copies = _kv_copies(config, tp) if name.endswith(("k_proj.weight", "v_proj.weight")) else 1
        stored = (stored_types or {}).get("model.embed_tokens.weight" if is_tied else name)
        is_table = name == "model.embed_tokens.weight"
        if device == "cpu" and is_table and _is_in_the_head(config, dtype, quantization, stored):
            continue
        if device == "cpu":
            matrix = _cpu_matrix(name, shape, dtype, quantization, stored)
        else:
            matrix = _device_matrix(name, shape, dtype, device, quantization, stored, is_tied=is_tied)
        total += matrix * copies / tp
    return int(total) + (total > int(total))


def _is_in_the_head(config: ModelConfig, dtype: str, quantization: str | None, stored: TensorType | None) -> bool:
    """Whether the CPU backend reads the embedding from the head: they are tied, and packing changes no value."""
    if not config.tie_word_embeddings:
        return False
    if stored is None:
        return quantization is None and dtype == config.dtype
    return stored in _EXACT_IN_8_BITS or (quantization is None and stored in _EXACT_AS_THEY_ARE)


def _cpu_matrix(
    name: str, shape: tuple[int, ...], dtype: str, quantization: str | None, stored: TensorType | None
) -> float:
    """Bytes as the CPU backend packs it: quantised are the linear layers, and the head to 8 bits."""
    if stored == TensorType.I8 and quantization is None:
        return shape[0] * shape[1] * _QUANTISED_BYTES["int8"]
    if stored is not None and quantization is None:
        return float(shape[0] * row_bytes(stored, shape[1]))
    kind = "int8" if quantization and name == "lm_head.weight" else quantization
    is_table = name == "model.embed_tokens.weight"
    return shape[0] * shape[1] * (_BYTES[dtype] if kind is None or is_table else _QUANTISED_BYTES[kind])


def _device_matrix(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    device: str,
    quantization: str | None,
    stored: TensorType | None,
    *,
    is_tied: bool,
) -> float:
    """Bytes as the backends of PyTorch hold it: floats of one type, int8 with a scale for 32 weights, or a row of them
    on NPUs, whose head stays in floats unless the checkpoint has it in int8."""
    count = float(shape[0] * shape[1])
    is_table = name == "model.embed_tokens.weight"
    if device == "ascend":
        is_int8 = stored == TensorType.I8 or (quantization == "int8" and name != "lm_head.weight")
        if is_int8 and not is_table and dtype != "float32":
            return count + shape[0] * _ROW_SCALE_BYTES
    elif quantization == "int8" and not is_table:
        return count * _TORCH_INT8_BYTES
    return 0.0 if is_tied else count * _BYTES[dtype]


def _check_quantization(device: str, quantization: str | None, dtype: str) -> None:
    """ConfigError, as the backends raise it, for what they cannot quantise to."""
    if device == "cpu" or quantization is None:
        return
    if quantization != "int8":
        raise ConfigError(
            f"the {device} backend cannot quantise to {quantization}: use quantization='int8', or backend 'cpu'"
        )
    if device == "ascend" and dtype == "float32":
        raise ConfigError("quantization='int8' computes in float16 or bfloat16 on an NPU: leave dtype='float32' out")


def auto_dtype(config: ModelConfig, device: str) -> str:
    """What dtype="auto" is for a model of this configuration."""
    return _AUTO_DTYPES.get(device, config.dtype)


def kv_bytes_per_token(config: ModelConfig, dtype: str, *, tp: int = 1) -> int:
    """Bytes of keys and values that one token takes on one of `tp` devices."""
    heads = config.num_layers * config.num_kv_heads * _kv_copies(config, tp) // tp
    if dtype == "int8":  # a scale beside each head's values, and one base of the keys for 32 tokens in whole lines
        return heads * (2 * (config.head_dim + 4) + -(-(config.head_dim + 4) // 64) * 2)
    return int(2 * heads * config.head_dim * _BYTES[dtype])


def _kv_dtype(device: str, dtype: str, kv_cache_dtype: str) -> str:
    if kv_cache_dtype == "int8" and device != "cpu":
        raise ConfigError(f"kv_cache_dtype='int8' is not possible on {device}, only on a CPU")
    if kv_cache_dtype != "auto":
        return kv_cache_dtype
    if dtype != "auto":
        return dtype
    return "float32" if device == "torch" else "bfloat16"


def check_tp(config: ModelConfig, tp: int) -> None:
    """ConfigError unless the model's heads can be cut in `tp` equal parts."""
    if tp < 1:
        raise ConfigError(f"tp_size={tp} is no number of devices")
    check_size(config, tp)


def _kv_copies(config: ModelConfig, tp: int) -> int:
    return max(1, tp // config.num_kv_heads)


def read_model(name: str) -> tuple[ModelConfig, dict[str, TensorType] | None]:
    """Configuration of the model that `name` means, and types of tensors: all of a GGUF file, int8 ones of a folder.

    A name as `mooli.hub.resolve` takes it, or a config.json alone. Raises any ModelError.
    """
    given = Path(name).expanduser()
    path = given.parent if given.name == "config.json" and given.is_file() else resolve(name)
    config, checkpoint = open_model(path, load_format="dummy")
    checkpoint.close()
    if path.is_dir():
        description = find_description(path)
        return config, None if description is None else described_types(description)
    with GGUFFile(path) as file:
        return config, {canonical_name(tensor): info.type for tensor, info in file.tensors.items()}


def plan_table(plan: MemoryPlan) -> str:
    """The plan for people."""
    each = f" ({plan.device})" if plan.tp == 1 else f" on each of {plan.tp} devices ({plan.device})"
    share = "the engine's default" if plan.mem_fraction_static is None else f"{plan.mem_fraction_static:g} of it"
    stored = "types of the file" if plan.dtype == "file" else plan.dtype
    kinds = stored if plan.quantization is None else f"{plan.quantization}, embedding {stored}"
    rows = [
        ("model", f"{plan.model} ({plan.architecture}, context {plan.model_context:,} tokens)"),
        ("memory", f"{_gib(plan.memory_bytes)}{each}; for weights and KV cache: {share}"),
        ("weights", f"{_gib(plan.weight_bytes)} ({kinds})"),
        ("KV cache", f"{_gib(plan.kv_cache_bytes)} ({plan.kv_cache_dtype}, {plan.kv_bytes_per_token:,} bytes a token)"),
        ("tokens", f"{plan.num_tokens:,} in pages of {plan.page_size}"),
        ("left", f"{_gib(plan.left_bytes)} for activations, graphs and everything else"),
    ]
    lines = [f"{name:<10}{text}" for name, text in rows]
    if plan.problem is not None:
        return "\n".join([*lines, "", f"It does not fit: {plan.problem}"])
    lines += ["", "requests at the same time, each with a text of its own (shared prefixes count once):"]
    lines += [
        f"{length:>10,} tokens: {count:,}{' (the longest context)' if length == plan.context_length else ''}"
        for length, count in plan.requests.items()
    ]
    return "\n".join(lines)


def run_plan(args: argparse.Namespace) -> int:
    """Print the plan; 0 if the model fits, 1 if it does not. Raises ConfigError or any ModelError."""
    config, stored_types = read_model(args.model)
    plan = plan_memory(
        config,
        parse_memory(args.memory),
        model=args.model,
        device=DEVICE_NAMES[args.device],
        dtype=DTYPES[args.dtype],
        quantization=None if args.quantization == "none" else args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        tp=args.tp,
        context_length=None if args.context_length is None else _size("--context-length", args.context_length),
        mem_fraction_static=args.mem_fraction_static,
        stored_types=stored_types,
    )
    print(json.dumps(plan.to_dict(), indent=2) if args.json else plan_table(plan))
    return 0 if plan.problem is None else 1


def parse_memory(text: str) -> int:
    """Bytes from 64GiB, 64Gi, 64GB, 64G or a plain number. ConfigError otherwise."""
    return _size("--memory", text.strip().removesuffix("B").removesuffix("b"))


def _size(flag: str, text: str) -> int:
    try:
        return parse_size(text)
    except (ValueError, OverflowError) as exc:
        raise ConfigError(f"{flag}: {exc}") from exc


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
