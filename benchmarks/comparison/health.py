"""What the machine gives at a moment, so that a reader can tell a slow engine from a slow machine.

Owns the gauges: integer operations a second and bytes read a second (those of the native module), and the time that the
hypervisor gave to others. Never times an engine.
"""

from __future__ import annotations

import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mooli import _native
from mooli.backends import create_backend

HEALTHY = 0.92
"""Share of the best integer gauge of a run that counts as a full machine, as in benchmarks/kernels.py."""

_DOTS, _READINGS, _READS = 600_000, 30, 3
_REGION_BYTES = 256 << 20


@dataclass(frozen=True)
class Reading:
    """ops_s: integer operations a second, median of readings of 0.2 ms. bytes_s: the best of three passes over 256 MiB.
    stolen_s: time that virtual processors waited for a real one, since the machine started (proc_stat(5))."""

    ops_s: float
    bytes_s: float
    stolen_s: float

    def fields(self) -> dict[str, Any]:
        return asdict(self)


class Gauge:
    """Reads with `num_threads` threads; to be used while no engine computes.

    From a thread of its own, which keeps to its processor: the driver's thread moves about, and would share one with
    another of the gauge's threads. (Were the driver's own thread pinned, so were all processes that it starts.)
    """

    def __init__(self, num_threads: int | None = None) -> None:
        self._backend: Any = create_backend("cpu", num_threads=num_threads)
        self._thread = ThreadPoolExecutor(1, initializer=self._backend.bind_thread)
        self._region = _native.FloatBuffer(_REGION_BYTES // 4)
        self._region.array()[:] = 1.0
        self.read()

    @property
    def num_threads(self) -> int:
        return int(self._backend.describe()["num_threads"])

    def read(self) -> Reading:
        return self._thread.submit(self._read).result()

    def _read(self) -> Reading:
        device = self._backend._device
        return Reading(
            ops_s=2 * statistics.median(device.gauge_dots(_DOTS) for _ in range(_READINGS)),
            bytes_s=max(device.gauge_read(self._region) for _ in range(_READS)),
            stolen_s=_stolen_s(),
        )


def _stolen_s() -> float:
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        return int(first[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0
