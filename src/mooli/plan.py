"""What a model takes of a memory, in numbers alone: weights, KV cache, tokens and requests that fit. `mooli plan`.

Owns the question and how the answer is printed, and restates nothing: models say which weights they have
(`create_model`), backends what those take (`mooli.backends.sizes`), and the size of the pool is the engine's own rule
(`mooli.engine.pool_size`). Reads configurations and the headers of GGUF files, never a weight. Of this machine it looks
at one thing: whether its processor multiplies bfloat16, which float32 weights are packed as on a CPU then.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mooli.arguments import model_word, parse_size
from mooli.config import DTYPES
from mooli.engine.pool_size import DRAFT_STEP_TOKENS, GIB, PoolNeeds, context_for, kv_type, num_pool_pages, state_room
from mooli.engine.weight_sizes import loaded_bytes, sizes_of
from mooli.errors import ConfigError, OutOfMemoryError
from mooli.hub import resolve
from mooli.models.config import ModelConfig
from mooli.models.loader import open_model, stored_types
from mooli.models.sharding import check_size
from mooli.plan_flags import DEVICE_NAMES
from mooli.tensor import TensorType

EXAMPLE_CONTEXTS = (1024, 2048, 4096, 8192, 32768)
"""Lengths, in tokens, for which the number of requests is given besides the context asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The answer. Bytes are those of one of `tp` devices; tokens and requests are those of all together, which hold
    the same ones.

    device: the backend that is counted for: cpu, torch, cuda or ascend.
    weights: where dtype is "file" the tensors keep the types of a GGUF file. quantization: int8 also where the
    checkpoint has it. num_tokens: what the KV cache holds, in
    whole pages; 0 where the model does not fit, and `problem` says what is lacking. state_bytes: of one recurrent
    state, of which there is room for num_states, running requests' and kept ones; 0 for most models.
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
    state_bytes: int = 0
    num_states: int = 0
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
    sizes = sizes_of(device, dtype, quantization)
    stored_types = stored_types or {}
    weights = loaded_bytes(config, sizes, tp, stored_types)
    kv_dtype = kv_type(kv_cache_dtype, dtype, sizes.auto_dtype)
    page_size = sizes.default_page_size
    spec = config.part(tp).cache_spec(page_size, kv_dtype)
    page_bytes = sizes.kv_bytes_per_page(spec)
    needs = PoolNeeds(
        available_bytes=memory_bytes,
        weight_bytes=weights,
        bytes_per_page=page_bytes,
        page_size=page_size,
        model_context=config.max_position_embeddings,
        max_running_requests=sizes.default_max_running_requests,
        context_length=context_length,
        mem_fraction_static=mem_fraction_static,
        state_bytes=spec.state_bytes,
        num_tried=DRAFT_STEP_TOKENS if device == "cpu" else 0,  # where tokens are guessed if nothing is said
    )
    states = state_room(needs)
    num_states = 0 if states is None else states.num_slots
    problem, num_pages = None, 0
    try:
        num_pages = num_pool_pages(needs)
    except OutOfMemoryError as exc:
        problem = str(exc)
    context = context_for(needs, num_pages) if num_pages else context_length or config.max_position_embeddings
    has_int8 = TensorType.I8 in stored_types.values()
    chooses = dtype != "auto" or quantization is not None or sizes.auto_dtype is not None
    keeps_file = bool(stored_types) and not has_int8 and not chooses
    lengths = sorted({*(n for n in EXAMPLE_CONTEXTS if n < context), context})
    return MemoryPlan(
        model=model,
        architecture=config.architecture,
        device=device,
        dtype="file" if keeps_file else auto_dtype(config, device) if dtype == "auto" else dtype,
        quantization=quantization or ("int8" if has_int8 else None),
        kv_cache_dtype=kv_dtype,
        tp=tp,
        memory_bytes=memory_bytes,
        mem_fraction_static=mem_fraction_static,
        weight_bytes=weights,
        kv_bytes_per_token=-(-page_bytes // page_size),
        page_size=page_size,
        num_tokens=num_pages * page_size,
        kv_cache_bytes=num_pages * page_bytes,
        left_bytes=memory_bytes - weights - num_pages * page_bytes - num_states * spec.state_bytes,
        model_context=config.max_position_embeddings,
        context_length=context,
        requests={
            length: min(num_pages // -(-length // page_size), states.num_running if states else num_pages)
            for length in lengths
        },
        state_bytes=spec.state_bytes,
        num_states=num_states,
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
    """Bytes of the weights on the first of `tp` devices, as its backend would have them: it is asked, and the model.
    `stored_types` as `plan_memory` takes it."""
    return loaded_bytes(config, sizes_of(device, dtype, quantization), tp, stored_types or {})


def auto_dtype(config: ModelConfig, device: str) -> str:
    """What dtype="auto" is for a model of this configuration."""
    return sizes_of(device, "auto", None).auto_dtype or config.dtype


def check_tp(config: ModelConfig, tp: int) -> None:
    """ConfigError unless the model's heads can be cut in `tp` equal parts."""
    if tp < 1:
        raise ConfigError(f"tp_size={tp} is no number of devices")
    check_size(config, tp)


def read_model(name: str) -> tuple[ModelConfig, dict[str, TensorType] | None]:
    """Configuration of the model that `name` means, and types of tensors: all of a GGUF file, int8 ones of a folder.

    A name as `mooli.hub.resolve` takes it, or a config.json alone. Raises any ModelError.
    """
    given = Path(name).expanduser()
    path = given.parent if given.name == "config.json" and given.is_file() else resolve(name)
    config, checkpoint = open_model(path, load_format="dummy")
    checkpoint.close()
    return config, stored_types(path, config)


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
        *(
            [
                (
                    "states",
                    f"{_gib(plan.num_states * plan.state_bytes)} ({plan.num_states:,} of {plan.state_bytes:,} bytes)",
                )
            ]
            if plan.num_states
            else []
        ),
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
    model = model_word(args, "--model", args.model)
    if model is None:
        raise ConfigError("which model? Name it: mooli plan MODEL --memory 64GiB")
    config, stored_types = read_model(model)
    plan = plan_memory(
        config,
        parse_memory(args.memory),
        model=model,
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
