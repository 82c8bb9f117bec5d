"""How many processors may be used: the affinity mask and the control groups' quota, from files made up here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mooli.backends.cpu.processors import cpu_quota, default_num_threads, usable_cpus


class Groups:
    """A control group file system and the file that says where in it this process is."""

    def __init__(self, folder: Path) -> None:
        self._process = folder / "cgroup"
        self._root = folder / "fs"
        self._root.mkdir()

    def process(self, *lines: str) -> None:
        self._process.write_text("".join(f"{line}\n" for line in lines))

    def file(self, path: str, text: str) -> None:
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def quota(self) -> float | None:
        return cpu_quota(self._process, self._root)


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


@pytest.mark.parametrize(
    ("text", "quota"),
    [
        ("max 100000\n", None),
        ("200000 100000\n", 2.0),
        ("150000 100000", 1.5),
        ("50000 100000", 0.5),
        ("1000 1000000", 0.001),
    ],
)
def test_version_2_gives_quota_by_period(groups: Groups, text: str, quota: float | None) -> None:
    groups.process("0::/box")
    groups.file("box/cpu.max", text)
    assert groups.quota() == quota


@pytest.mark.parametrize("text", ["", "\n", "max", "200000", "fast 100000", "200000 0", "1 2 3", "200000 slow", "\0\0"])
def test_a_file_that_makes_no_sense_sets_no_limit(groups: Groups, text: str) -> None:
    groups.process("0::/box")
    groups.file("box/cpu.max", text)
    assert groups.quota() is None


def test_the_tightest_group_above_the_process_counts(groups: Groups) -> None:
    groups.process("0::/a/b/c")
    groups.file("a/b/c/cpu.max", "max 100000")
    groups.file("a/b/cpu.max", "300000 100000")
    groups.file("a/cpu.max", "800000 100000")
    groups.file("other/cpu.max", "100000 100000")
    assert groups.quota() == 3.0
    groups.file("a/cpu.max", "120000 100000")
    assert groups.quota() == 1.2


def test_a_container_sees_its_limit_at_the_root(groups: Groups) -> None:
    groups.process("0::/")
    groups.file("cpu.max", "250000 100000")
    assert groups.quota() == 2.5


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
def test_version_1_gives_quota_by_period(groups: Groups, controllers: str) -> None:
    groups.process("9:memory:/box", f"4:{controllers}:/box/inner", "1:name=systemd:/box")
    groups.file("cpu/box/inner/cpu.cfs_quota_us", "-1\n")
    groups.file("cpu/box/inner/cpu.cfs_period_us", "100000\n")
    assert groups.quota() is None
    groups.file("cpu/box/cpu.cfs_quota_us", "350000\n")
    groups.file("cpu/box/cpu.cfs_period_us", "100000\n")
    assert groups.quota() == 3.5


@pytest.mark.parametrize(("quota", "period"), [("0", "100000"), ("200000", "0"), ("", "100000"), ("200000", "x")])
def test_version_1_files_that_make_no_sense_set_no_limit(groups: Groups, quota: str, period: str) -> None:
    groups.process("4:cpu:/box")
    groups.file("cpu/box/cpu.cfs_quota_us", quota)
    groups.file("cpu/box/cpu.cfs_period_us", period)
    assert groups.quota() is None


def test_version_1_without_its_period_sets_no_limit(groups: Groups) -> None:
    groups.process("4:cpu:/box")
    groups.file("cpu/box/cpu.cfs_quota_us", "200000")
    assert groups.quota() is None


def test_both_versions_at_once_give_the_tighter(groups: Groups) -> None:
    groups.process("4:cpu:/box", "0::/box")
    groups.file("cpu/box/cpu.cfs_quota_us", "400000")
    groups.file("cpu/box/cpu.cfs_period_us", "100000")
    groups.file("box/cpu.max", "300000 100000")
    assert groups.quota() == 3.0


def test_controllers_that_only_begin_like_cpu_are_not_it(groups: Groups) -> None:
    groups.process("4:cpuset:/box", "5:cpuacct:/box")
    groups.file("cpu/box/cpu.cfs_quota_us", "100000")
    groups.file("cpu/box/cpu.cfs_period_us", "100000")
    assert groups.quota() is None


@pytest.mark.parametrize("line", ["", "0", "0:", "nonsense", "::::", "0::", "x:cpu", "0::/missing/group"])
def test_lines_that_make_no_sense_set_no_limit(groups: Groups, line: str) -> None:
    groups.process(line)
    groups.file("elsewhere/cpu.max", "100000 100000")
    assert groups.quota() is None


def test_a_path_may_hold_colons(groups: Groups) -> None:
    groups.process("0::/user:1/box")
    groups.file("user:1/box/cpu.max", "200000 100000")
    assert groups.quota() == 2.0


def test_a_path_never_leads_out_of_the_file_system(groups: Groups, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000")
    groups.process("0::/../../box")
    assert groups.quota() is None
    groups.file("cpu.max", "200000 100000")
    assert groups.quota() == 2.0


def test_a_group_may_have_a_name_that_is_no_text(tmp_path: Path) -> None:
    group = os.fsencode(tmp_path) + b"/fs/b\xff\xe9x"
    try:
        os.makedirs(group)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    with open(group + b"/cpu.max", "w") as file:
        file.write("200000 100000")
    (tmp_path / "cgroup").write_bytes(b"0::/b\xff\xe9x\n")
    assert cpu_quota(tmp_path / "cgroup", tmp_path / "fs") == 2.0


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "missing", tmp_path) is None
    assert cpu_quota(tmp_path, tmp_path) is None


@pytest.mark.parametrize(
    ("cpus", "quota", "threads"),
    [
        ([0, 1, 2, 3], None, 4),
        ([5], None, 1),
        ([0, 1, 2, 3], 2.0, 2),
        ([0, 1, 2, 3], 1.5, 2),
        ([0, 1, 2, 3], 0.2, 1),
        ([0, 1], 64.0, 2),
        ([7, 9, 11], 3.0, 3),
    ],
)
def test_threads_are_as_many_as_affinity_and_quota_allow(cpus: list[int], quota: float | None, threads: int) -> None:
    assert default_num_threads(cpus, quota) == threads


def test_a_system_without_a_mask_counts_its_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert usable_cpus() == []
    assert default_num_threads([], None) == 6
    assert default_num_threads([], 4.0) == 4
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert default_num_threads([], None) == 1


def test_the_mask_of_this_process_is_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {9, 3, 12}, raising=False)
    assert usable_cpus() == [3, 9, 12]
