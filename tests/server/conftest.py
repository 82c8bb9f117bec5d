"""Makes the fake engine importable and gives every test the `live` fixture."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "unit"), str(Path(__file__).resolve().parent)]

from live import live  # noqa: E402, F401 - the fixture is found under this module's name
from route_server import serve  # noqa: E402, F401 - likewise
