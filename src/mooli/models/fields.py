"""Typed, bounded access to values that came out of a file: JSON objects and GGUF metadata.

Owns the wording of the errors for missing, mistyped and out-of-range values. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mooli.errors import CheckpointError, UnsupportedModelError


class Fields:
    """Typed access to a dictionary that came from a file; CheckpointError names the key and what was found."""

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.values, self.source, self.prefix = values, source, prefix

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.optional_integer(key, default)
        if value is None:
            raise CheckpointError(f"{self.source} has no {self.prefix}{key}")
        return value

    def optional_integer(self, key: str, default: int | None = None) -> int | None:
        value = self.values.get(self.prefix + key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, np.integer))):
            raise CheckpointError(f"{self.source}: {self.prefix}{key} must be a whole number, got {short(value)}")
        return None if value is None else int(value)

    def per_layer(self, key: str, default: int | None = None) -> int:
        """A number that GGUF may also write as one entry per layer; they must agree."""
        value = self.values.get(self.prefix + key)
        if not isinstance(value, (list, tuple, np.ndarray)):
            return self.integer(key, default)
        entries = {v if isinstance(v, (int, np.integer)) else None for v in value}
        if len(entries) != 1 or None in entries:
            raise UnsupportedModelError(f"layers with different {self.prefix}{key} are not implemented")
        return int(entries.pop())  # type: ignore[arg-type]

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(self.prefix + key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.source} has no {self.prefix}{key}")
        return number(value, f"{self.source}: {self.prefix}{key}")

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(self.prefix + key)
        value = default if value is None else value
        if not isinstance(value, (bool, np.bool_)):
            raise CheckpointError(f"{self.source}: {self.prefix}{key} must be true or false, got {short(value)}")
        return bool(value)


def number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise CheckpointError(f"{what} must be a number, got {short(value)}")
    # A float32 stands for the decimal that was written, 1e-06, not for the digits of its binary form.
    result = float(str(value)) if isinstance(value, np.float32) else float(min(value, 1e300))
    if not math.isfinite(result):
        raise CheckpointError(f"{what} must be finite, got {value}")
    return result


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise CheckpointError(f"{name} is {short(value)}, which is not between {low} and {high}")
