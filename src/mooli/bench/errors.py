"""What stops a measurement. Owns the type and nothing else."""

from __future__ import annotations

from mooli.errors import MooliError


class BenchmarkError(MooliError, RuntimeError):
    """A measurement cannot start or go on: no server, no data, or arguments that do not fit together."""
