"""How much a process has grown at most since a moment, from the kernel's own high-water mark.

Source: proc(5), clear_refs and status.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

MAX_GROWTH_MIB = {"server": 512, "engine": 384}
"""More than this, at its peak, is no client's to take.

The server's share is that of the bodies it may read at a time. Half of the engine's are pages of a KV cache of 8,192
tokens, which count when they are first written.
"""


class Growth:
    """Of some processes, by name, since this was made."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = pids
        for pid in pids.values():
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        self._before = {name: _status_mib(pid, "VmRSS") for name, pid in pids.items()}

    def peaks_mib(self) -> dict[str, float]:
        return {name: _status_mib(pid, "VmHWM") - self._before[name] for name, pid in self._pids.items()}

    def faults(self) -> list[str]:
        """Those that grew beyond their bound."""
        return [
            f"{name}: {grew:.0f} MiB, of at most {MAX_GROWTH_MIB[name]}"
            for name, grew in self.peaks_mib().items()
            if grew > MAX_GROWTH_MIB[name]
        ]


def _status_mib(pid: int, name: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024
