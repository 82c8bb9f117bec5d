"""What holds for all tests: libraries use one thread, no model is fetched, `steps` and `variants` can be imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before NumPy is imported: its library reads these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A name that is not on this machine is an error: no test may reach the real hubs.
os.environ.setdefault("MOOLI_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).resolve().parent))
