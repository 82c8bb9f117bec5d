"""Everything a comparison brought, as JSON: samples, gauges, versions and reasons, enough to make every table again.

Owns the file's format. Never computes a figure.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class EngineFacts:
    """One variant as it ran. start_s: from starting its process to its first short answer complete.
    resident_bytes: of its processes after that answer. error: why it did not start."""

    engine: str
    weights: str
    bits: int
    through: str
    version: str
    start_s: float | None = None
    resident_bytes: int | None = None
    error: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One workload on one variant once. figures: of timing.py; error instead when it failed.
    before, after: readings of the gauges (health.py)."""

    model: str
    variant: str
    workload: str
    round: int
    before: dict[str, float]
    after: dict[str, float]
    figures: dict[str, float] | None = None
    error: str | None = None


@dataclass
class Results:
    """variants: by model, then by variant key. missing: reason by peer.
    quality: by model, then by "engine weights": mean_kl, worst_kl, same_top, or error."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    began: str
    variants: dict[str, dict[str, EngineFacts]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    quality: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    is_complete: bool = False

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1), encoding="utf-8")
        part.rename(path)


class ResultsFileError(ValueError):
    """A file that is no result of a comparison."""


def load_results(path: Path) -> Results:
    """Raises ResultsFileError when `path` cannot be read as one."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("schema") != SCHEMA:
            raise ResultsFileError(f"{path} is of another version of this program")
        fields["samples"] = [Sample(**sample) for sample in fields["samples"]]
        fields["variants"] = {
            model: {key: EngineFacts(**facts) for key, facts in variants.items()}
            for model, variants in fields["variants"].items()
        }
        return Results(**fields)
    except OSError as exc:
        raise ResultsFileError(f"cannot read {path}: {exc.strerror}") from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        if isinstance(exc, ResultsFileError):
            raise
        raise ResultsFileError(f"{path} does not hold the results of a comparison: {exc}") from exc
