"""What the host asked of the simulated device: operations, replays, copies, waits.

Counts only. Never decides anything.
"""

from __future__ import annotations

from collections import Counter


class Operations:
    """Counts since the last `reset`, of the whole process."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.launched = 0
        """Operations started by the host: an eager one, a replay, an update of a captured task are one each."""
        self.by_name: Counter[str] = Counter()
        self.replays = 0
        self.updates = 0
        self.host_to_device = 0
        self.device_to_host = 0
        self.copied_bytes = 0
        self.syncs = 0
        """Times the host waited for the device: reads of values, blocking copies back, synchronize()."""

    def count(self, name: str) -> None:
        self.launched += 1
        self.by_name[name] += 1

    def as_dict(self) -> dict[str, int]:
        """The counts without names, for a log line or a report."""
        return {
            "launched": self.launched,
            "replays": self.replays,
            "updates": self.updates,
            "host_to_device": self.host_to_device,
            "device_to_host": self.device_to_host,
            "copied_bytes": self.copied_bytes,
            "syncs": self.syncs,
        }


operations = Operations()
"""The counts of this process."""
