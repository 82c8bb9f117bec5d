"""What stops a measurement, and the checks of values that several commands make.

Owns the type and the words. Never looks at what a value means.
"""

from __future__ import annotations

import json
from typing import Any

from mooli.errors import MooliError


class BenchmarkError(MooliError, RuntimeError):
    """A measurement cannot start or go on: no server, no data, or arguments that do not fit together."""


def check_at_least(*values: tuple[str, float | None, float]) -> None:
    """Raise BenchmarkError for a flag whose value is below its least. values: (flag, value or None, least) each."""
    for flag, value, least in values:
        if value is not None and not value >= least:
            raise BenchmarkError(f"{flag} must be at least {least}, got {value}")


def check_seed(seed: int) -> None:
    """Raise BenchmarkError for what NumPy takes for no seed."""
    if not 0 <= seed < 2**32:
        raise BenchmarkError(f"--seed must be from 0 to 2**32 - 1, got {seed}")


def json_object(flag: str, text: str | None) -> dict[str, Any]:
    """What a flag's text says, nothing for none. Raises BenchmarkError for what is no object of JSON."""
    try:
        value = json.loads(text or "{}")
    except ValueError as exc:
        raise BenchmarkError(f"{flag} is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise BenchmarkError(f"{flag} must be a JSON object, got {str(text)[:80]}")
    return value
