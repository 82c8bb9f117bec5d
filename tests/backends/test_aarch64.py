"""The kernels for Arm, cross-compiled and run under emulation: `tests/native/kernel_check.cpp`, without Python.

The same program built for this machine gives the digests to compare with. All but that is skipped where compiler or
emulator is not installed (Debian, Ubuntu: `apt install g++-aarch64-linux-gnu qemu-user-static`). Shows results, never
speed.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from native_program import LEVEL_FLAGS, build, this_machine

ARM_COMPILER = "aarch64-linux-gnu-g++"

Digests = Mapping[str, Mapping[str, str]]
"""Name to digest, for each level."""


def run(*command: str | Path) -> Digests:
    """What the program printed, after it passed its own checks."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[:4000]}"
    digests: dict[str, dict[str, str]] = {}
    for line in done.stdout.splitlines():
        level, name, digest = line.split()
        assert digests.setdefault(level, {}).setdefault(name, digest) == digest
    return digests


@pytest.fixture(scope="module")
def emulator() -> str:
    found = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    return found or pytest.skip("no qemu-aarch64: emulation of Arm is not installed")


@pytest.fixture(scope="module")
def arm_program(emulator: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(ARM_COMPILER)
    if compiler is None:
        pytest.skip(f"no {ARM_COMPILER}: a compiler for Arm is not installed")
    return build(compiler, "aarch64", ["-O1", "-static"], tmp_path_factory.mktemp("arm"))


@pytest.fixture(scope="module")
def arm(emulator: str, arm_program: Path) -> Digests:
    return run(emulator, "-cpu", "max", arm_program)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Digests:
    machine = this_machine()
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or machine not in LEVEL_FLAGS:
        pytest.skip("no C++ compiler for this machine, or a machine without vector kernels")
    return run(build(compiler, machine, ["-O0"], tmp_path_factory.mktemp("here")))


def test_every_level_of_this_machine_passes_them_too(here: Digests) -> None:
    """Needs no emulator, so the program is compiled wherever tests run."""
    assert {"exact/linear/q8", "exact/linear/q4", "exact/linear/q4m"} <= here["scalar"].keys()


def test_vnni_without_avx512_has_the_bits_of_avx2(here: Digests) -> None:
    """Where the processor has no such instruction, the program does its work instead (`vnni_emulation.h`)."""
    if "avx2_vnni" not in here:
        pytest.skip("no AVX2, a compiler that does not know AVX-VNNI, or not Linux")
    assert here["avx2_vnni"] == here["avx2"]


def test_the_arm_level_passes_every_check_of_the_table_and_of_a_tape(arm: Digests) -> None:
    assert list(arm) == ["scalar", "neon"]
    assert arm["neon"].keys() == arm["scalar"].keys()


def test_an_arm_processor_without_the_dot_product_gets_the_scalar_level(
    emulator: str, arm_program: Path, arm: Digests
) -> None:
    assert run(emulator, "-cpu", "cortex-a72", arm_program) == {"scalar": arm["scalar"]}


def test_whole_number_sums_are_the_same_at_every_level_of_both_machines(arm: Digests, here: Digests) -> None:
    expected = {name: digest for name, digest in arm["scalar"].items() if name.startswith("exact/")}
    assert {"exact/linear/q8", "exact/linear/q4", "exact/linear/q4m"} <= expected.keys()
    for level in (*arm.values(), *here.values()):
        assert {name: level[name] for name in expected} == expected


def test_arm_has_the_bits_of_every_fused_level_of_this_machine(arm: Digests, here: Digests) -> None:
    """A level with a bfloat16 dot product, which rounds in its own way, prints no digests of what it computes so."""
    fused = {level: digests for level, digests in here.items() if level != "scalar"}
    if not fused:
        pytest.skip("this processor has only the scalar level")
    for level, digests in fused.items():
        assert {"fused/linear/q8", "fused/linear/q4", "fused/linear/q4m", "fused/linear/f16"} <= digests.keys(), level
        assert digests == {name: arm["neon"][name] for name in digests}, level


def test_the_scalar_level_has_the_same_bits_on_both_machines(arm: Digests, here: Digests) -> None:
    assert here["scalar"] == arm["scalar"]
