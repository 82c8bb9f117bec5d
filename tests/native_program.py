"""`tests/native/kernel_check.cpp` with all of `native/` but its bindings, compiled without CMake and without Python.

Owns the compiler's flags for each instruction set level. Runs nothing.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=gnu++17", "-ffp-contract=off", "-fno-math-errno", f"-I{ROOT / 'native'}"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
LEVEL_FLAGS: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "kernels_scalar.cpp": [],
        "kernels_avx2.cpp": AVX2,
        "kernels_avx512.cpp": AVX512,
        "kernels_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    },
    # optimised as it is shipped: nothing else here tests what the compiler makes of it
    "aarch64": {
        "kernels_scalar.cpp": [],
        "kernels_neon.cpp": ["-march=armv8.2-a+dotprod", "-fno-schedule-insns", "-O3"],
    },
}
"""The same as in CMakeLists.txt, which cannot be used as it wants Python for the target machine."""


class CompilerError(Exception):
    """What the compiler said."""


def this_machine() -> str:
    """As a key of `LEVEL_FLAGS`, if it is one."""
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def build(compiler: str, machine: str, options: Sequence[str], folder: Path) -> Path:
    """The program that checks the kernels, compiled for `machine`. Raises CompilerError."""
    levels = dict(LEVEL_FLAGS[machine])
    if machine == "x86_64" and _accepts(compiler, "-mavxvnni"):
        levels["kernels_avx2_vnni.cpp"] = [*AVX2, "-mavxvnni"]
        options = [*options, "-DMOOLI_AVX2_VNNI"]
    sources = [ROOT / "tests" / "native" / "kernel_check.cpp"]
    for source in sorted((ROOT / "native").glob("*.cpp")):
        for_python = source.name in ("bindings.cpp", "gguf_strings.cpp")
        if not for_python and (source.name in levels or not source.name.startswith("kernels_")):
            sources.append(source)

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        _run([compiler, *FLAGS, *options, *levels.get(source.name, []), "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    program = folder / "kernel_check"
    _run([compiler, *options, *map(str, objects), "-pthread", "-o", str(program)])
    return program


def _accepts(compiler: str, flag: str) -> bool:
    return subprocess.run([compiler, flag, "-E", "-x", "c++", "/dev/null"], capture_output=True).returncode == 0


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise CompilerError(done.stderr[:4000])
