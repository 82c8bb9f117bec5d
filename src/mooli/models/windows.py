"""Windows that only some layers have: which, as files say it.

Owns the reading of `layer_types` and of patterns. A window is how many last positions a token attends to, itself
included; 0 stands for all.
"""

from __future__ import annotations

from typing import Any

from mooli.errors import CheckpointError
from mooli.models.fields import HFSource, check_range, short


def hf_windows(source: HFSource, window: int, full_every: int) -> tuple[int, ...]:
    """Of each layer, from a config.json. full_every: of so many layers, the last has none where nothing is said."""
    num_layers = source.fields.integer("num_hidden_layers")
    kinds = source.values.get("layer_types")
    if kinds is None:
        every = source.fields.integer("sliding_window_pattern", full_every)
        check_range("sliding_window_pattern", every, 1, 1024)
        return windows_but_every(every, window, min(num_layers, 1024))
    known = {"full_attention": 0, "sliding_attention": window}
    if not isinstance(kinds, list) or any(not isinstance(kind, str) or kind not in known for kind in kinds):
        raise CheckpointError(f"config.json: layer_types must be a list of {', '.join(known)}, got {short(kinds)}")
    return tuple(known[kind] for kind in kinds)


def windows_but_every(full_every: int, window: int, num_layers: int) -> tuple[int, ...]:
    """Of each layer, where of `full_every` layers the last attends to all positions."""
    return tuple(window if (index + 1) % full_every else 0 for index in range(num_layers))


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
