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
from mooli.config import DTYPES
from mooli.engine.pool_size import GIB, PoolNeeds, context_for, num_pool_pages
from mooli.errors import ConfigError, OutOfMemoryError
from mooli.formats.gguf import GGUFFile
from mooli.hub import resolve
from mooli.models.checkpoint import canonical_name, expected_shapes
from mooli.models.config import ModelConfig
from mooli.models.loader import open_model
from mooli.tensor import TensorType, row_bytes

PAGE_SIZE = 128
"""Tokens of a page: the one size that every attention path of Ascend takes, and a multiple of the CPU's."""

EXAMPLE_CONTEXTS = (1024, 2048, 4096, 8192, 32768)
"""Lengths, in tokens, for which the number of requests is given besides the context asked for."""

_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
_QUANTISED_BYTES = {"int8": 34 / 32, "int4": 18 / 32}
"""Bytes of a weight, with its share of the 16-bit scale that 32 weights have in common."""

_VECTOR_BYTES = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The answer. Bytes are those of one of `tp` devices; tokens and requests are those of all together, which hold
    the same ones.

    weights: where dtype is "file" the tensors keep the types of a GGUF file. num_tokens: what the KV cache holds, in
    whole pages; 0 where the model does not fit, and `problem` says what is lacking.
    requests: context length to the number of requests of that length that fit at the same time, shared prefixes not
    counted: they make it more.
    """

    model: str
    architecture: str
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
    dtype: str = "auto",
    quantization: str | None = None,
    tp: int = 1,
    context_length: int | None = None,
    mem_fraction_static: float | None = None,
    stored_types: Mapping[str, TensorType] | None = None,
) -> MemoryPlan:
    """How `memory_bytes` of each of `tp` devices are used by a model of this configuration.

    dtype: of weights that are not quantised; auto takes the checkpoint's. quantization: None, int8 or int4.
    stored_types: types by canonical tensor name, of a GGUF file, which its weights keep where nothing else is asked.
    mem_fraction_static: share of the memory for weights and KV cache; None is the engine's own rule, which takes half
    of what the weights leave and no more than 48 requests can use.
    Raises ConfigError for numbers that mean nothing.
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
    keeps_file = stored_types is not None and dtype == "auto" and quantization is None
    computed = config.dtype if dtype == "auto" else dtype
    weights = weight_bytes(
        config, computed, quantization=quantization, tp=tp, stored_types=stored_types if keeps_file else None
    )
    kv_dtype = "bfloat16" if dtype == "auto" else dtype
    per_token = kv_bytes_per_token(config, kv_dtype, tp=tp)
    needs = PoolNeeds(
        available_bytes=memory_bytes,
        weight_bytes=weights,
        bytes_per_page=per_token * PAGE_SIZE,
        page_size=PAGE_SIZE,
        model_context=config.max_position_embeddings,
        max_running_requests=48,
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
        dtype="file" if keeps_file else computed,
        quantization=quantization,
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
    quantization: str | None = None,
    tp: int = 1,
    stored_types: Mapping[str, TensorType] | None = None,
) -> int:
    """Bytes of the weights on one of `tp` devices, rounded up.

    Linear layers, embedding and head are cut in `tp` parts (a key and value head that several devices need is on each
    of them); norms are on every device. The head is a matrix of its own also where it is tied to the embedding, since
    the one is read by rows and the other packed. Quantised are the linear layers, and the head to 8 bits.
    """
    total = 0.0
    shapes = expected_shapes(config)
    head = shapes.pop("lm_head.weight", shapes["model.embed_tokens.weight"])
    for name, shape in (*shapes.items(), ("lm_head.weight", head)):
        source = "model.embed_tokens.weight" if name == "lm_head.weight" and config.tie_word_embeddings else name
        if len(shape) == 1:
            total += shape[0] * _VECTOR_BYTES
            continue
        copies = _kv_copies(config, tp) if name.endswith(("k_proj.weight", "v_proj.weight")) else 1
        if stored_types is not None and source in stored_types:
            matrix = float(shape[0] * row_bytes(stored_types[source], shape[1]))
        else:
            kind = "int8" if quantization and name == "lm_head.weight" else quantization
            is_table = name == "model.embed_tokens.weight"
            per_value = _BYTES[dtype] if kind is None or is_table else _QUANTISED_BYTES[kind]
            matrix = shape[0] * shape[1] * per_value
        total += matrix * copies / tp
    return int(total) + (total > int(total))


def kv_bytes_per_token(config: ModelConfig, dtype: str, *, tp: int = 1) -> int:
    """Bytes of keys and values that one token takes on one of `tp` devices."""
    heads = config.num_kv_heads * _kv_copies(config, tp) // tp
    return int(2 * config.num_layers * heads * config.head_dim * _BYTES[dtype])


def check_tp(config: ModelConfig, tp: int) -> None:
    """ConfigError unless the model's heads can be cut in `tp` equal parts."""
    if tp < 1 or config.num_heads % tp or config.intermediate_size % tp:
        raise ConfigError(
            f"tp={tp} does not divide the {config.num_heads} heads and {config.intermediate_size} columns of the model"
        )
    if config.num_kv_heads % tp and tp % config.num_kv_heads:
        raise ConfigError(f"tp={tp} and the {config.num_kv_heads} key and value heads of the model do not divide")


def _kv_copies(config: ModelConfig, tp: int) -> int:
    return max(1, tp // config.num_kv_heads)


def read_model(name: str) -> tuple[ModelConfig, dict[str, TensorType] | None]:
    """Configuration of the model that `name` means, and the types of its tensors if it is a GGUF file.

    A name as `mooli.hub.resolve` takes it, or a config.json alone. Raises any ModelError.
    """
    given = Path(name).expanduser()
    path = given.parent if given.name == "config.json" and given.is_file() else resolve(name)
    config, checkpoint = open_model(path, load_format="dummy")
    checkpoint.close()
    if path.is_dir():
        return config, None
    with GGUFFile(path) as file:
        return config, {canonical_name(tensor): info.type for tensor, info in file.tensors.items()}


def plan_table(plan: MemoryPlan) -> str:
    """The plan for people."""
    each = "" if plan.tp == 1 else f" on each of {plan.tp} devices"
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


def add_plan_args(parser: argparse.ArgumentParser) -> None:
    """The flags of `mooli plan`, named as the engine's."""
    parser.add_argument(
        "--model", "--model-path", required=True, help="Model folder, GGUF file, config.json or model name."
    )
    parser.add_argument(
        "--memory",
        required=True,
        help="Memory of one device that programs can use, such as 61GiB (what an Ascend card of 64 GB reports).",
    )
    parser.add_argument("--dtype", default="auto", choices=tuple(DTYPES), help="Default: the checkpoint's.")
    parser.add_argument("--quantization", default="none", choices=("none", "int8", "int4"), help="Default: none.")
    parser.add_argument("--tp", "--tp-size", type=int, default=1, help="Devices that share the model. Default: 1.")
    parser.add_argument("--context-length", help="Longest text, prompt and answer together. Default: the model's.")
    parser.add_argument("--mem-fraction-static", type=float, help="Share of the memory for weights and KV cache.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def run_plan(args: argparse.Namespace) -> int:
    """Print the plan; 0 if the model fits, 1 if it does not. Raises ConfigError or any ModelError."""
    config, stored_types = read_model(args.model)
    plan = plan_memory(
        config,
        parse_memory(args.memory),
        model=args.model,
        dtype=DTYPES[args.dtype],
        quantization=None if args.quantization == "none" else args.quantization,
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
