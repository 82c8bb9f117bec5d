"""Wheels that need no compiler, for every Python and processor, made on one Linux machine: `make wheels`.

Owns for what wheels are made, and how. One Clang (the package `ziglang`, with the C libraries of all its targets)
compiles for each of them; of Python only headers are needed. Pure files come from the same backend that builds from
source. `auditwheel` says whether a wheel keeps to manylinux2014 (glibc 2.17 and later: Linux since 2014), and names it.

    python packaging/wheels.py [--out dist] [--only cp311-x86_64,abi3-aarch64] [--headers 3.10=FOLDER]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from debian import SUITES, Debian, MissingPackageError

ROOT = Path(__file__).resolve().parents[1]
GLIBC = "2.17"
PLATFORM = "manylinux_2_17"
MACHINES = ("x86_64", "aarch64")


@dataclass(frozen=True)
class Interpreter:
    """name: as in `--only`. headers: versions of Python whose headers will do, the best first.
    tag: of interpreter and ABI, in the name of the wheel."""

    name: str
    headers: tuple[str, ...]
    tag: str


INTERPRETERS = (
    Interpreter("cp310", ("3.10",), "cp310-cp310"),
    Interpreter("cp311", ("3.11",), "cp311-cp311"),
    # Nanobind keeps to the stable ABI of 3.12, whichever later headers it finds.
    Interpreter("abi3", ("3.13", "3.12", "3.14"), "cp312-abi3"),
)
WITHOUT_SOURCE = "cp310"
"""Of which no package has the headers: made where `--headers` gives them or an interpreter is installed."""


def main() -> int:
    """Make the wheels; the exit status."""
    args = _arguments()
    build = ROOT / "build" / "wheels"
    build.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        pure = _pure_wheel(build / "pure")
        made = []
        for interpreter in INTERPRETERS:
            machines = [m for m in MACHINES if not args.only or f"{interpreter.name}-{m}" in args.only]
            if not machines:
                continue
            headers = _find_headers(build, interpreter, args.headers)
            if headers is None:
                print(
                    f"no wheel for {interpreter.name}: no headers of Python {interpreter.headers[0]} are here; "
                    f"give them with --headers {interpreter.headers[0]}=FOLDER",
                    file=sys.stderr,
                )
                continue
            version, include = headers
            for machine in machines:
                made.append(_wheel(build, args.out, pure, interpreter, version, include, machine))
    except MissingPackageError as exc:
        print(exc, file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as exc:
        print(f"{exc}\n{exc.stdout or ''}{exc.stderr or ''}", file=sys.stderr)
        return 1
    for path in made:
        print(
            f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}: {path.stat().st_size} bytes"
        )
    return 0 if made else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="Where the wheels go. Default: dist.")
    parser.add_argument("--only", default="", help="Of INTERPRETER-MACHINE, by commas. Default: all.")
    parser.add_argument("--headers", action="append", default=[], metavar="VERSION=FOLDER", help="Where a Python.h is.")
    args = parser.parse_args()
    args.only = [word for word in args.only.split(",") if word]
    known = [f"{interpreter.name}-{machine}" for interpreter in INTERPRETERS for machine in MACHINES]
    for word in args.only:
        if word not in known:
            parser.error(f"--only {word}: there are {', '.join(known)}")
    for word in args.headers:
        folder = word.partition("=")[2]
        if not (Path(folder) / "Python.h").is_file():
            parser.error(f"--headers {word}: there is no {folder or 'FOLDER'}/Python.h")
    args.headers = {word.partition("=")[0]: Path(word.partition("=")[2]) for word in args.headers}
    return args


# -- headers --


def _find_headers(build: Path, interpreter: Interpreter, given: dict[str, Path]) -> tuple[str, Path] | None:
    """(version, folder with Python.h) of what is given, of this machine's interpreters, of Debian; None if nowhere."""
    for version in interpreter.headers:
        found = given.get(version) or _installed_headers(version)
        if found is not None:
            return version, _staged(build / "headers" / version, found)
    for version in (version for version in interpreter.headers if version in SUITES):
        system = Debian(build / "debian", version, "amd64").unpack(f"libpython{version}-dev", alone=True)
        return version, _staged(build / "headers" / version, system / "usr" / "include" / f"python{version}")
    return None


def _installed_headers(version: str) -> Path | None:
    """Those of this interpreter, or of the one that a shell finds by name."""
    if "{}.{}".format(*sys.version_info) == version:
        include = sysconfig.get_path("include", vars={"installed_base": sys.base_prefix, "base": sys.base_prefix})
    else:
        program = shutil.which(f"python{version}")
        asked = program and subprocess.run(
            [program, "-c", "import sysconfig; print(sysconfig.get_path('include'))"], capture_output=True, text=True
        )
        include = asked.stdout.strip() if asked and asked.returncode == 0 else ""
    return Path(include) if include and (Path(include) / "Python.h").is_file() else None


def _staged(target: Path, include: Path) -> Path:
    """A copy with one pyconfig.h for every Linux of 64 bits: Debian has one for each processor beside the headers, and
    they differ in nothing that an extension reads."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(include, target, ignore=shutil.ignore_patterns("internal"))
    config = (target / "pyconfig.h").read_text()
    chosen = re.search(r"defined\(__x86_64__\) && defined\(__LP64__\)\s*#\s*include <([^>]+)>", config)
    if chosen:
        (target / "pyconfig.h").write_bytes((include.parent / chosen[1]).read_bytes())
    return target


# -- wheels --


def _pure_wheel(folder: Path) -> Path:
    """All that is not compiled, as the build from source has it."""
    shutil.rmtree(folder, ignore_errors=True)
    _run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--config-settings", "wheel.cmake=false", "--config-settings", "wheel.py-api=py3"),
        *("--wheel-dir", str(folder), str(ROOT)),
    )
    (wheel,) = folder.glob("mooli-*.whl")
    return wheel


def _wheel(
    build: Path, out: Path, pure: Path, interpreter: Interpreter, version: str, include: Path, machine: str
) -> Path:
    """The wheel of one interpreter and one kind of processor, compiled, packed and checked."""
    folder = build / f"{interpreter.name}-{machine}"
    cmake = build / f"cmake-{machine}"  # one for all interpreters: what computes is compiled once
    _compile(cmake, version, include, machine)
    for name in ("installed", "unpacked", "packed", "repaired"):
        shutil.rmtree(folder / name, ignore_errors=True)
    _run("cmake", "--install", str(cmake), "--prefix", str(folder / "installed"))
    _run(sys.executable, "-m", "wheel", "unpack", "--dest", str(folder / "unpacked"), str(pure))
    (unpacked,) = (folder / "unpacked").iterdir()
    libraries = list((folder / "installed" / "mooli").glob("*.so"))
    for library in libraries:
        shutil.copy2(library, unpacked / "mooli")
    (about,) = unpacked.glob("*.dist-info/WHEEL")
    lines = [line for line in about.read_text().splitlines() if line and not line.startswith(("Root-Is", "Tag:"))]
    lines += ["Root-Is-Purelib: false", f"Tag: {interpreter.tag}-linux_{machine}", ""]
    about.write_text("\n".join(lines))
    (folder / "packed").mkdir()
    _run(sys.executable, "-m", "wheel", "pack", "--dest-dir", str(folder / "packed"), str(unpacked))
    (packed,) = (folder / "packed").iterdir()
    # Names the wheel by the oldest C library that it runs with. Of another processor it knows only "auto".
    _run(
        *(sys.executable, "-m", "auditwheel", "repair", "--plat", "auto"),
        *("--wheel-dir", str(folder / "repaired"), str(packed)),
    )
    (repaired,) = (folder / "repaired").iterdir()
    if f"{PLATFORM}_{machine}" not in repaired.name:
        raise MissingPackageError(f"{repaired.name} needs a newer C library than {PLATFORM} has")
    if any(".libs/" in name for name in _names(repaired)):
        raise MissingPackageError(f"{repaired.name} would need libraries of its own beside it")
    for old in out.glob(f"mooli-*-{interpreter.tag}-*{machine}.whl"):
        old.unlink()
    return Path(shutil.copy2(repaired, out))


def _compile(folder: Path, version: str, include: Path, machine: str) -> None:
    import nanobind

    tools = _tools(folder / "tools", machine)
    soabi = f"cpython-{version.replace('.', '')}-{machine}-linux-gnu"
    _run(
        *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"),
        *("-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={machine}"),
        *(f"-DCMAKE_CXX_COMPILER={tools / 'c++'}", f"-DCMAKE_AR={tools / 'ar'}", f"-DCMAKE_RANLIB={tools / 'ranlib'}"),
        *(f"-DCMAKE_MODULE_PATH={ROOT / 'packaging' / 'cmake'}", f"-Dnanobind_DIR={nanobind.cmake_dir()}"),
        *(f"-DMOOLI_PYTHON_VERSION={version}", f"-DMOOLI_PYTHON_INCLUDE={include}", f"-DPython_SOABI={soabi}"),
    )
    _run("cmake", "--build", str(folder))


def _tools(folder: Path, machine: str) -> Path:
    """Programs that CMake takes for a compiler and its tools. Without a level of its own, Clang compiles for the oldest
    processor of a kind, and checks nothing at run time that release builds of others do not."""
    folder.mkdir(parents=True, exist_ok=True)
    zig = f'exec "{sys.executable}" -m ziglang'
    # The levels of Arm have names of their own here.
    translate = (
        'for word do shift; [ "$word" != -march=armv8.2-a+dotprod ] || word=-mcpu=generic+v8_2a+dotprod;'
        ' set -- "$@" "$word"; done\n'
    )
    commands = {
        "c++": f'{translate}{zig} c++ -target {machine}-linux-gnu.{GLIBC} -fno-sanitize=all "$@"',
        "ar": f'{zig} ar "$@"',
        "ranlib": f'{zig} ranlib "$@"',
    }
    for name, command in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{command}\n")
        (folder / name).chmod(0o755)
    return folder


def _names(wheel: Path) -> list[str]:
    import zipfile

    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def _run(*command: str) -> None:
    # The tools of this environment come before the system's.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PATH": path})


if __name__ == "__main__":
    sys.exit(main())
