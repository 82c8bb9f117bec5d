"""How much memory this process may use on the host.

Owns reading /proc/meminfo, the control group limits (v1 and v2) and those of the process. Never decides what to do with
the answer.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from mooli.backends.base import MemoryInfo
from mooli.backends.claims import untouched_bytes
from mooli.errors import BackendUnavailableError
from mooli.shared_folder import shared_folder


def host_memory(
    meminfo: Path = Path("/proc/meminfo"),
    process_cgroup: Path = Path("/proc/self/cgroup"),
    cgroup_root: Path = Path("/sys/fs/cgroup"),
    process: Path = Path("/proc/self"),
    claims: Path | None = None,
) -> MemoryInfo:
    """Total and available bytes of the machine, lowered to the tightest control group limit above this process, and to
    the process's own limit of address space.

    Available counts page cache that the kernel can drop, both on the machine (MemAvailable) and in a group (its limit
    less its usage, inactive file pages counted as free), but not what engines have claimed and not touched yet (in
    `claims`, by default the user's). Without /proc (macOS) half of the physical memory is taken as available. The paths
    are parameters for tests. Raises BackendUnavailableError where neither can be read.
    """
    total, available = _machine_memory(meminfo)
    for limit, used in (*_group_limits(process_cgroup, cgroup_root), *_address_space(process)):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    claimed = untouched_bytes(shared_folder() if claims is None else claims)
    return MemoryInfo(total, max(0, min(available, total) - claimed), claimed)


def _machine_memory(meminfo: Path) -> tuple[int, int]:
    fields = _read_fields(meminfo)
    if "MemTotal" in fields:
        total = fields["MemTotal"] * 1024
        # Kernels before 3.14 have no MemAvailable; free plus cache is the usual stand-in.
        available_kib = fields.get("MemAvailable", fields.get("MemFree", 0) + fields.get("Cached", 0))
        if _read(meminfo.parent / "sys/vm/overcommit_memory").strip() == "2":  # the system promises no more than it has
            available_kib = min(available_kib, max(0, fields["CommitLimit"] - fields["Committed_AS"]))
        return total, available_kib * 1024
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError) as exc:
        raise BackendUnavailableError(
            f"cannot read the size of memory: neither {meminfo} nor sysconf is there. Run on Linux or macOS."
        ) from exc
    return total, total // 2


def _address_space(process: Path) -> list[tuple[int, int]]:
    """(limit, used) in bytes, if there is a limit (`ulimit -v`)."""
    for line in _read(process / "limits").splitlines():
        name, limit = line[:26].strip(), line[26:].split()[:1]
        if name == "Max address space" and limit and limit[0].isdigit():
            return [(int(limit[0]), _read_fields(process / "status").get("VmSize", 0) * 1024)]
    return []


def _group_limits(process_cgroup: Path, cgroup_root: Path) -> list[tuple[int, int]]:
    """(limit, used) in bytes of every group with a limit, from the process's own up to the root."""
    limits = []
    for line in _read(process_cgroup).splitlines():
        # hierarchy-ID:controllers:path; version 2 has ID 0 and no controllers.
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        hierarchy, controllers, path = parts
        if hierarchy == "0" and not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
            root = cgroup_root
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = cgroup_root / "memory"
        else:
            continue
        # Inside a container the path may be the host's while only the own group is mounted at the root: the root,
        # which ends every chain, is then the group that holds the limit.
        group = PurePosixPath("/") / path
        if ".." in group.parts:  # the process lies outside the groups that are visible here
            group = PurePosixPath("/")
        for ancestor in (group, *group.parents):
            folder = root / str(ancestor).lstrip("/")
            limit = _read_int(folder / names[0])
            if limit is None:
                continue
            used = (_read_int(folder / names[1]) or 0) - _read_fields(folder / "memory.stat").get(names[2], 0)
            limits.append((limit, max(0, used)))
    return limits


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _read_int(path: Path) -> int | None:
    """The number in a one-line file; None if there is no such file or it says "max"."""
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read_fields(path: Path) -> dict[str, int]:
    """Lines of "name: 123 unit" or "name 123" as a dict."""
    fields = {}
    for line in _read(path).splitlines():
        parts = line.split()
        if len(parts) >= 2 and parts[1].isdigit():
            fields[parts[0].rstrip(":")] = int(parts[1])
    return fields
