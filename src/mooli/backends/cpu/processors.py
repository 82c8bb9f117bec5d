"""Which processors this process may use, and how many threads are worth starting.

Owns reading affinity and control group quota. Never starts a thread.
"""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath


def usable_cpus() -> list[int]:
    """Processor numbers in this process's affinity mask; empty where the system has no such mask (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return []


def cpu_quota(
    process_cgroup: Path = Path("/proc/self/cgroup"), cgroup_root: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """Processors' worth of time the tightest control group above this process allows; None if there is no limit.

    Reads cpu.max (version 2) or cpu.cfs_quota_us and cpu.cfs_period_us (version 1). The paths are parameters for tests.
    """
    quotas = []
    try:
        # names of groups are bytes: they go back to the file system as they came
        lines = os.fsdecode(process_cgroup.read_bytes()).splitlines()
    except OSError:
        return None
    for line in lines:
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        hierarchy, controllers, path = parts
        if hierarchy == "0" and not controllers:
            root, read = cgroup_root, _quota_v2
        elif "cpu" in controllers.split(","):
            root, read = cgroup_root / "cpu", _quota_v1
        else:
            continue
        group = PurePosixPath("/") / path
        if ".." in group.parts:
            group = PurePosixPath("/")
        for ancestor in (group, *group.parents):
            quota = read(root / str(ancestor).lstrip("/"))
            if quota is not None:
                quotas.append(quota)
    return min(quotas) if quotas else None


def default_num_threads(cpus: list[int], quota: float | None) -> int:
    """One thread for each processor that may be used, fewer under a quota: two processors' worth means two threads."""
    available = len(cpus) or os.cpu_count() or 1
    return max(1, available if quota is None else min(available, math.ceil(quota)))


def _quota_v2(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(group: Path) -> float | None:
    try:
        quota = int((group / "cpu.cfs_quota_us").read_text())
        period = int((group / "cpu.cfs_period_us").read_text())
        return None if quota <= 0 else quota / period
    except (OSError, ValueError, ZeroDivisionError):
        return None
