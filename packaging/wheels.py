"""Wheels that need no compiler, for every Python and processor, made on one Linux machine: `make wheels`.

Owns for what wheels are made, and how. One Clang (the package `ziglang`, with the C libraries of all its targets)
compiles for each of them; of Python only headers are needed. Pure files come from the same backend that builds from
source. `auditwheel` says whether a wheel for Linux keeps to manylinux2014 (glibc 2.17 and later: Linux since 2014), and
names it; of one for macOS the load commands are read (`mach_o`).

    python packaging/wheels.py [--out dist] [--only cp311-x86_64,abi3-macos_arm64] [--headers 3.10=FOLDER]
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
from mach_o import Library, MachOError, read_library

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Machine:
    """name: as in `--only`. target: as Clang has it. system, processor: as CMake has them. platform: in the wheel's
    name; of Linux it is what `auditwheel` must find. soabi: the end of a module's name, behind Python's version."""

    name: str
    target: str
    system: str
    processor: str
    platform: str
    soabi: str


MACHINES = (
    Machine("x86_64", "x86_64-linux-gnu.2.17", "Linux", "x86_64", "manylinux_2_17_x86_64", "x86_64-linux-gnu"),
    Machine("aarch64", "aarch64-linux-gnu.2.17", "Linux", "aarch64", "manylinux_2_17_aarch64", "aarch64-linux-gnu"),
    # The first macOS that runs on Arm.
    Machine("macos_arm64", "aarch64-macos.11.0", "Darwin", "arm64", "macosx_11_0_arm64", "darwin"),
)
MACOS_LIBRARIES = ("/usr/lib/libSystem.B.dylib", "/usr/lib/libc++.1.dylib")
"""What every macOS has, and a module may need."""


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
"""Of 3.10 no package has the headers: made where `--headers` gives them or an interpreter is installed."""


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
            machines = [m for m in MACHINES if not args.only or f"{interpreter.name}-{m.name}" in args.only]
            if not machines:
                continue
            headers = _find_headers(build, interpreter, args.headers)
            if headers is None:
                wanted = interpreter.headers[0]
                print(
                    f"no wheel for {interpreter.name}: no headers of Python {wanted} are here; "
                    f"have python{wanted} on the path, or give --headers {wanted}=FOLDER",
                    file=sys.stderr,
                )
                continue
            version, include = headers
            for machine in machines:
                made.append(_wheel(build, args.out, pure, interpreter, version, include, machine))
    except (MissingPackageError, MachOError) as exc:
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
    known = [f"{interpreter.name}-{machine.name}" for interpreter in INTERPRETERS for machine in MACHINES]
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
    """A copy with one pyconfig.h for every system of 64 bits: Debian has one for each processor beside the headers, and
    they differ in nothing that an extension reads. So does that of macOS, but for the type of thread-local keys."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(include, target, ignore=shutil.ignore_patterns("internal"))
    config = (target / "pyconfig.h").read_text()
    chosen = re.search(r"defined\(__x86_64__\) && defined\(__LP64__\)\s*#\s*include <([^>]+)>", config)
    if chosen:
        config = (include.parent / chosen[1]).read_text()
    keys = r"^(#define PTHREAD_KEY_T_IS_COMPATIBLE_WITH_INT .*)$"
    config = re.sub(keys, r"#ifndef __APPLE__\n\1\n#endif", config, flags=re.MULTILINE)
    (target / "pyconfig.h").write_text(config)
    shutil.copystat(include / "pyconfig.h", target / "pyconfig.h")  # nothing is compiled anew for its sake
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
    build: Path, out: Path, pure: Path, interpreter: Interpreter, version: str, include: Path, machine: Machine
) -> Path:
    """The wheel of one interpreter and one kind of machine, compiled, packed and checked."""
    folder = build / f"{interpreter.name}-{machine.name}"
    cmake = build / f"cmake-{machine.name}"  # one for all interpreters: what computes is compiled once
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
    is_linux = machine.system == "Linux"
    tag = f"{interpreter.tag}-{f'linux_{machine.processor}' if is_linux else machine.platform}"
    lines += ["Root-Is-Purelib: false", f"Tag: {tag}", ""]
    about.write_text("\n".join(lines))
    (folder / "packed").mkdir()
    _run(sys.executable, "-m", "wheel", "pack", "--dest-dir", str(folder / "packed"), str(unpacked))
    (packed,) = (folder / "packed").iterdir()
    if is_linux:
        packed = _audited(packed, folder / "repaired", machine)
    else:
        for library in libraries:
            _check_macos(read_library(library))
    for old in out.glob(f"mooli-*-{interpreter.tag}-*{machine.platform}.whl"):
        old.unlink()
    return Path(shutil.copy2(packed, out))


def _audited(packed: Path, folder: Path, machine: Machine) -> Path:
    """The wheel by the name of the oldest C library that it runs with."""
    # Of another processor it knows only "auto".
    _run(*(sys.executable, "-m", "auditwheel", "repair", "--plat", "auto"), *("--wheel-dir", str(folder), str(packed)))
    (repaired,) = folder.iterdir()
    if machine.platform not in repaired.name:
        raise MissingPackageError(f"{repaired.name} needs a newer C library than {machine.platform} has")
    if any(".libs/" in name for name in _names(repaired)):
        raise MissingPackageError(f"{repaired.name} would need libraries of its own beside it")
    return repaired


def _check_macos(module: Library) -> None:
    """Raise MissingPackageError for one that no Mac with an Arm processor could load."""
    name = module.path.name
    beyond = sorted(set(module.needs) - set(MACOS_LIBRARIES))
    if beyond:
        raise MissingPackageError(f"{name} needs {', '.join(beyond)}, which macOS does not have")
    if module.oldest_system > (11, 0):
        raise MissingPackageError(f"{name} needs macOS {'.'.join(map(str, module.oldest_system))}")
    start = f"_PyInit_{name.partition('.')[0]}"
    if start not in module.exports:
        raise MissingPackageError(f"{name} has no {start}")
    if not module.is_signed:
        raise MissingPackageError(f"{name} is not signed, and would not be loaded")
    others = sorted(one for one in module.looked_up if not one.startswith(("_Py", "__Py"))) + sorted(module.unbound)
    if others or not module.looked_up:
        raise MissingPackageError(
            f"{name} looks for {', '.join(others[:5]) or 'no symbol of Python'} in what is loaded"
        )


def _compile(folder: Path, version: str, include: Path, machine: Machine) -> None:
    import nanobind

    tools = _tools(folder / "tools", machine)
    soabi = f"cpython-{version.replace('.', '')}-{machine.soabi}"
    _run(
        *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"),
        *(f"-DCMAKE_SYSTEM_NAME={machine.system}", f"-DCMAKE_SYSTEM_PROCESSOR={machine.processor}"),
        *(f"-DCMAKE_CXX_COMPILER={tools / 'c++'}", f"-DCMAKE_AR={tools / 'ar'}", f"-DCMAKE_RANLIB={tools / 'ranlib'}"),
        *("-DCMAKE_OSX_SYSROOT=", f"-DCMAKE_INSTALL_NAME_TOOL={tools / 'nothing'}"),
        *(f"-DCMAKE_MODULE_PATH={ROOT / 'packaging' / 'cmake'}", f"-Dnanobind_DIR={nanobind.cmake_dir()}"),
        *(f"-DMOOLI_PYTHON_VERSION={version}", f"-DMOOLI_PYTHON_INCLUDE={include}", f"-DPython_SOABI={soabi}"),
    )
    _run("cmake", "--build", str(folder))


def _tools(folder: Path, machine: Machine) -> Path:
    """Programs that CMake takes for a compiler and its tools. Without a level of its own, Clang compiles for the oldest
    processor of a kind, and checks nothing at run time that release builds of others do not."""
    folder.mkdir(parents=True, exist_ok=True)
    zig = f'exec "{sys.executable}" -m ziglang'
    # The levels of Arm have names of their own here.
    translate = (
        'for word do shift; [ "$word" != -march=armv8.2-a+dotprod ] || word=-mcpu=generic+v8_2a+dotprod;'
        ' set -- "$@" "$word"; done\n'
    )
    if machine.system == "Darwin":
        # Python's own symbols are looked up as the module is loaded: the file that names them one by one cannot be
        # read here. The linker of ziglang 0.17.1 crashes then, unless it is told where C++'s library is.
        translate += (
            'for word do shift; case "$word" in -Wl,@*) word=-Wl,-undefined,dynamic_lookup;;'
            f' -bundle) set -- "$@" -shared -nostdlib++; word="{_cpp_library(folder, machine)}";; esac;'
            ' set -- "$@" $word; done\n'
        )
    commands = {
        "c++": f'{translate}{zig} c++ -target {machine.target} -fno-sanitize=all "$@"',
        "nothing": "exit 0",
        "ar": f'{zig} ar "$@"',
        "ranlib": f'{zig} ranlib "$@"',
    }
    for name, command in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{command}\n")
        (folder / name).chmod(0o755)
    return folder


def _cpp_library(folder: Path, machine: Machine) -> str:
    """The archives of C++'s library for that machine, as words of a shell: made where they are not there yet."""
    (folder / "empty.cpp").write_text("int main() {}\n")
    command = [sys.executable, "-m", "ziglang", "c++", "-target", machine.target, "-fno-sanitize=all", "-O3", "-v"]
    done = subprocess.run(
        [*command, "-o", str(folder / "empty"), str(folder / "empty.cpp")], check=True, capture_output=True, text=True
    )
    found = re.findall(r"\S+/libc\+\+(?:abi)?\.a", done.stderr)
    if len(found) != 2:
        raise MissingPackageError(f"ziglang links C++'s library for {machine.target} in another way than is known here")
    return " ".join(found)


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
