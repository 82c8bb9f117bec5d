"""Memory of the machine and of the control groups above the process, from files written by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mooli.backends.base import MemoryInfo
from mooli.backends.claims import Claim, untouched_bytes
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
        folder = self.folder
        return host_memory(
            folder / "meminfo", folder / "self", folder / "groups", folder / "process", folder / "claims"
        )


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


def test_a_limit_of_address_space_counts_less_what_the_process_has_of_it(host: Host) -> None:
    limits = "Limit                     Soft Limit           Hard Limit           Units     \n"
    row = "Max address space         {:<20} unlimited            bytes     \n"
    host.write("process/status", f"Name:\tpython\nVmSize:\t{GIB // 1024} kB\n")
    host.write("process/limits", limits + row.format("unlimited"))
    assert host.memory() == MemoryInfo(16 * GIB, 8 * GIB)
    host.write("process/limits", limits + row.format(4 * GIB))
    assert host.memory() == MemoryInfo(4 * GIB, 3 * GIB)


def test_a_system_that_promises_no_more_than_it_has_is_taken_at_its_word(host: Host) -> None:
    host.write("meminfo", f"{MEMINFO}CommitLimit: {10 * GIB // 1024} kB\nCommitted_AS: {7 * GIB // 1024} kB\n")
    assert host.memory() == MemoryInfo(16 * GIB, 8 * GIB)
    host.write("sys/vm/overcommit_memory", "2\n")
    assert host.memory() == MemoryInfo(16 * GIB, 3 * GIB)


def test_what_engines_have_claimed_and_do_not_hold_yet_is_not_available(host: Host) -> None:
    claims = host.folder / "claims"
    claim = Claim(5 * GIB, claims)
    held = 5 * GIB - host.memory().claimed_bytes
    assert 0 < held < 4 * GIB, "what this process holds has come out of what the machine says is available"
    assert host.memory().available_bytes == 8 * GIB - host.memory().claimed_bytes
    other = Claim(50 * GIB, claims)
    assert host.memory().available_bytes == 0
    other.release()
    other.release()
    claim.release()
    assert host.memory() == MemoryInfo(16 * GIB, 8 * GIB)
    assert list(claims.iterdir()) == []


def test_the_claims_of_a_process_are_counted_together_less_what_it_holds(tmp_path: Path) -> None:
    claims = [Claim(GIB, tmp_path / "claims") for _ in range(2)]
    status = tmp_path / str(os.getpid()) / "status"
    status.parent.mkdir()
    for held, left in ((0, 2 * GIB), (GIB // 2, 3 * GIB // 2), (3 * GIB, 0)):
        status.write_text(f"Name:\tpython\nRssAnon:\t{held // 1024} kB\nRssFile:\t99 kB\n")
        assert untouched_bytes(tmp_path / "claims", tmp_path) == left
    for claim in claims:
        claim.release()


def test_the_claim_of_a_process_that_was_killed_is_void_and_goes(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from mooli.backends.claims import Claim;"
        f"claim = Claim({GIB}, Path(sys.argv[1])); print('claimed', flush=True); sys.stdin.read()"
    )
    folder = tmp_path / "claims"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"claimed\n"
        assert 0 < untouched_bytes(folder) < GIB
        child.kill()
    assert untouched_bytes(folder) == 0
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("spoiled", ["a file", "writable for others", "a link"])
def test_a_folder_that_others_could_write_to_is_not_believed(tmp_path: Path, spoiled: str) -> None:
    folder, real = tmp_path / "claims", tmp_path / "real"
    if spoiled == "a file":
        folder.write_text("")
    else:
        real.mkdir(mode=0o700)
        folder.symlink_to(real) if spoiled == "a link" else folder.mkdir()
        folder.chmod(0o777) if spoiled == "writable for others" else None
    claim = Claim(GIB, folder)
    assert untouched_bytes(folder) == 0
    claim.release()


def test_without_proc_the_physical_memory_is_asked(host: Host) -> None:
    (host.folder / "meminfo").unlink()
    memory = host.memory()
    assert memory.total_bytes > 0
    assert memory.available_bytes == memory.total_bytes // 2


def test_this_machine_has_memory() -> None:
    memory = host_memory()
    assert 0 < memory.available_bytes <= memory.total_bytes
