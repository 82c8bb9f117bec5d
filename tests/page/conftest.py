"""Makes the fake engine and the servers around it importable."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("unit", "server")]

from live import live  # noqa: E402, F401 - the fixture is found under this module's name
