"""Memory of the machine and of the control groups above the process, from files written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from mooli.backends.base import MemoryInfo
from mooli.backends.host_memory import host_memory

GIB = 1 << 30
MEMINFO = f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 10 kB\nMemAvailable: {8 * GIB // 1024} kB\nHugePages_Total: 0\n"


class Host:
    """A machine of 16 GiB with 8 GiB available, described by files under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write("meminfo", MEMINFO)

    def write(self, path: str, text: str) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def memory(self) -> MemoryInfo:
        return host_memory(self.folder / "meminfo", self.folder / "self", self.folder / "groups")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_without_control_groups_the_machine_counts(host: Host) -> None:
    assert host.memory() == MemoryInfo(16 * GIB, 8 * GIB)


def test_an_old_kernel_has_free_and_cached_memory_only(host: Host) -> None:
    host.write("meminfo", "MemTotal: 1000 kB\nMemFree: 100 kB\nCached: 200 kB\n")
    assert host.memory() == MemoryInfo(1000 * 1024, 300 * 1024)


def test_a_version_2_limit_bounds_both_and_droppable_cache_counts_as_free(host: Host) -> None:
    host.write("self", "0::/\n")
    host.write("groups/memory.max", f"{4 * GIB}\n")
    host.write("groups/memory.current", f"{3 * GIB}\n")
    host.write("groups/memory.stat", f"anon {GIB}\ninactive_file {GIB}\n")
    assert host.memory() == MemoryInfo(4 * GIB, 2 * GIB)


def test_the_tightest_group_up_the_tree_counts(host: Host) -> None:
    host.write("self", "0::/a/b\n")
    host.write("groups/a/b/memory.max", "max\n")
    host.write("groups/a/b/memory.current", "0\n")
    host.write("groups/a/memory.max", f"{2 * GIB}\n")
    host.write("groups/a/memory.current", f"{GIB}\n")
    assert host.memory() == MemoryInfo(2 * GIB, GIB)


@pytest.mark.parametrize("path", ["/docker/1234", "/../../host.slice"])
def test_in_a_container_the_own_group_is_mounted_at_the_root(host: Host, path: str) -> None:
    host.write("self", f"0::{path}\n")
    host.write("groups/memory.max", f"{GIB}\n")
    host.write("groups/memory.current", "0\n")
    assert host.memory() == MemoryInfo(GIB, GIB)


def test_version_1_limits_are_read_from_the_memory_controller(host: Host) -> None:
    host.write("self", "12:cpu,cpuacct:/x\n4:memory:/x\n")
    host.write("groups/memory/x/memory.limit_in_bytes", f"{6 * GIB}\n")
    host.write("groups/memory/x/memory.usage_in_bytes", f"{5 * GIB}\n")
    host.write("groups/memory/x/memory.stat", f"total_inactive_file {2 * GIB}\n")
    host.write("groups/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert host.memory() == MemoryInfo(6 * GIB, 3 * GIB)


def test_a_group_over_its_limit_has_nothing_left(host: Host) -> None:
    host.write("self", "0::/\n")
    host.write("groups/memory.max", f"{GIB}\n")
    host.write("groups/memory.current", f"{2 * GIB}\n")
    assert host.memory() == MemoryInfo(GIB, 0)


def test_without_proc_the_physical_memory_is_asked(host: Host) -> None:
    (host.folder / "meminfo").unlink()
    memory = host.memory()
    assert memory.total_bytes > 0
    assert memory.available_bytes == memory.total_bytes // 2


def test_this_machine_has_memory() -> None:
    memory = host_memory()
    assert 0 < memory.available_bytes <= memory.total_bytes
