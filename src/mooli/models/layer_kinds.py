"""Which layers of a model are of which kind, as files say it: with a window, with attention, with experts.

Owns the reading of `layer_types`, of patterns, and of what the tensors of a GGUF file show. A window is how many last
positions a token attends to, itself included; 0 stands for all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models.fields import Fields, GGUFSource, HFSource, check_range, short

MAX_LAYERS = 1024


def hf_windows(source: HFSource, window: int, full_every: int) -> tuple[int, ...]:
    """Of each layer, from a config.json. full_every: of so many layers, the last has none where nothing is said."""
    kinds = source.values.get("layer_types")
    if kinds is not None:
        return named_windows(kinds, window)
    every = source.fields.integer("sliding_window_pattern", full_every)
    check_range("sliding_window_pattern", every, 1, 1024)
    return windows_but_every(every, window, source.fields.integer("num_hidden_layers"))


def named_windows(kinds: Any, window: int) -> tuple[int, ...]:
    """Of each layer, from a list of their kinds."""
    return tuple(_named(kinds, {"full_attention": 0, "sliding_attention": window}))


def windows_but_every(full_every: int, window: int, num_layers: int) -> tuple[int, ...]:
    """Of each layer, where of `full_every` layers the last attends to all positions."""
    return tuple(window if (index + 1) % full_every else 0 for index in range(min(num_layers, MAX_LAYERS)))


def check_windows(windows: tuple[int, ...], num_layers: int) -> None:
    """Raise CheckpointError unless there is one for each layer, within its bounds."""
    if len(windows) != num_layers:
        raise CheckpointError(f"{len(windows)} kinds of layers for {num_layers} layers")
    for window in windows:
        check_range("sliding_window", window, 0, 2**31)


def gguf_windows(pattern: Any, window: int, num_layers: int) -> tuple[int, ...] | None:
    """Of each layer, from an array of GGUF metadata that says which have one; None where it does not."""
    if pattern is None:
        return None
    entries = pattern.tolist() if hasattr(pattern, "tolist") else pattern
    if not isinstance(entries, (list, tuple)) or len(entries) != num_layers:
        raise CheckpointError(f"sliding_window_pattern must say of each of {num_layers} layers, got {short(entries)}")
    return tuple(window if entry else 0 for entry in entries)


def hf_attends(kinds: Any, attention: Collection[str], others: Collection[str]) -> tuple[bool, ...]:
    """Of each layer whether it is attention, from a list of their kinds. attention, others: what these are called."""
    return tuple(_named(kinds, dict.fromkeys(attention, True) | dict.fromkeys(others, False)))


def gguf_attends(source: GGUFSource, num_layers: int) -> tuple[bool, ...]:
    """The same, by the tensors of a GGUF file."""
    check_range("block_count", num_layers, 1, MAX_LAYERS)
    return tuple(f"blk.{layer}.attn_q.weight" in source.shapes for layer in range(num_layers))


def gguf_kv_heads(fields: Fields, num_heads: int) -> int:
    """The number of key and value heads of layers with attention: files may have one entry a layer, 0 for others."""
    counts = fields.values.get(f"{fields.prefix}attention.head_count_kv", num_heads)
    kinds = set(np.atleast_1d(np.asarray(counts)).tolist()) - {0}
    if len(kinds) != 1 or not all(isinstance(count, int) for count in kinds):
        raise UnsupportedModelError(f"layers with different numbers of key and value heads: {short(counts)}")
    return int(kinds.pop())


def check_attends(attends: tuple[bool, ...], num_layers: int) -> None:
    """Raise CheckpointError unless there is one for each layer, and attention in one."""
    if len(attends) != num_layers or not any(attends):
        raise CheckpointError(
            f"{sum(attends)} of {len(attends)} layers are attention; there must be {num_layers} layers, and one with"
            " attention"
        )


def first_layers(count: int, num_layers: int) -> tuple[int, ...]:
    """So many first layers of a model, or all. CheckpointError for a number of layers that cannot be."""
    check_range("num_layers", num_layers, 1, MAX_LAYERS)
    return tuple(range(min(count, num_layers)))


def _named(kinds: Any, known: Mapping[str, Any]) -> list[Any]:
    """What each kind of a list stands for."""
    if not isinstance(kinds, list) or not kinds or any(not isinstance(k, str) or k not in known for k in kinds):
        raise CheckpointError(f"config.json: layer_types must be a list of {', '.join(known)}, got {short(kinds)}")
    return [known[kind] for kind in kinds]
