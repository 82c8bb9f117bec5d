"""Makes the server process of the end-to-end tests importable."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("unit", "e2e", "attacks")]
