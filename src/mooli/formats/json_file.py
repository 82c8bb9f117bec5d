"""Strict JSON objects from files: bounded size, no duplicate keys, no NaN.

Owns the wording of what is wrong with a JSON file. Knows no schema.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from mooli.errors import CheckpointError
from mooli.formats.regular_file import read_text_file


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object in UTF-8 `text`. CheckpointError naming `what` for anything else."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply") from None
    except ValueError as exc:
        raise CheckpointError(f"{what} is not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must hold a JSON object, not a {type(value).__name__}")
    return value


def read_json(path: Path, max_bytes: int = 1 << 26) -> dict[str, Any]:
    """The JSON object in a file of at most `max_bytes` of a model folder (`read_text_file`)."""
    return parse_json(read_text_file(path, max_bytes), path.name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"duplicate key {twice[:80]!r}")
    return result


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
