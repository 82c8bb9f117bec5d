"""The machine and this Python: system, memory, processors, and whether Mooli's own parts load.

Owns what the CPU backend needs. The native module and the packages are imported in another process.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import mooli
from mooli.doctor.findings import BACKENDS, WARNING, Finding, Section
from mooli.doctor.surroundings import StepResult, Surroundings, run_steps
from mooli.version import __version__

GIB = 2**30
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)

PACKAGES = (
    "numpy",
    "tokenizers",
    "jinja2",
    "msgspec",
    "starlette",
    "uvicorn",
    "httptools",
    "prometheus_client",
    "yaml",
    "aiohttp",
)
"""Modules of the packages that Mooli depends on."""

ARCHITECTURES = ("x86_64", "amd64", "aarch64", "arm64")


def probe_host() -> Section:
    section = Section("host")
    facts = section.facts
    facts["system"] = f"{platform.system()} {platform.release()}"
    facts["python"] = f"{platform.python_version()} ({sys.executable})"
    facts["architecture"] = f"{platform.machine()}, {64 if sys.maxsize > 2**32 else 32} bits"
    section.findings += python_findings(sys.version_info[:2], platform.machine(), is_64_bits=sys.maxsize > 2**32)
    return section


def probe_resources(surroundings: Surroundings) -> tuple[Section, int | None]:
    """Memory and processors, and the bytes that are available: what the engine itself reads, in another process, since
    the modules that do come with the native one and with NumPy, and either may be what is broken."""
    section = Section("resources")
    facts = section.facts
    facts["processors"] = os.cpu_count()
    step = f"resources:{surroundings.root}"
    result = run_steps(surroundings, [step], environ=_own_environ(surroundings))[step]
    if not result.ok or not isinstance(result.value, dict):
        facts["memory"] = f"not read: {result.error[:300]}"
        section.findings.append(
            Finding(
                code="memory-not-read",
                found=result.error[:600] or "no answer",
                cause="the engine cannot tell how much memory it may use, and does not start",
                cure=("see what else is found; in a container or chroot: mount /proc",),
                backends=("cpu",),
            )
        )
        return section, None
    seen = result.value
    available, total, whole = int(seen["available"]), int(seen["total"]), int(seen["machine"])
    facts["memory"] = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    facts["memory limit (cgroup)"] = f"{total / GIB:.1f} GiB" if total < whole else None
    section.findings += memory_findings(available, is_limited=total < whole)
    facts["usable (affinity)"] = _ranges(seen["cpus"]) or None
    facts["processor limit (cgroup)"] = seen["quota"]
    facts["threads of the engine"] = seen["threads"]
    return section, available


def python_findings(version: tuple[int, ...], machine: str, *, is_64_bits: bool) -> list[Finding]:
    found = f"Python {version[0]}.{version[1]} on {machine or 'an unknown processor'}"
    cure = ("conda create -n mooli python=3.11 -y && conda activate mooli", "pip install mooli")
    if version[:2] < OLDEST_PYTHON:
        cause = "Mooli needs Python 3.10 to 3.13: pip finds no package for an older one"
        return [Finding(code="wrong-python", found=found, cause=cause, cure=cure, backends=BACKENDS)]
    if not is_64_bits:
        cause = "this is a Python of 32 bits: it can hold no model"
        return [Finding(code="wrong-python", found=f"{found}, 32 bits", cause=cause, cure=cure, backends=BACKENDS)]
    if version[:2] > NEWEST_PYTHON:
        cause = "it is newer than the 3.13 that Mooli is tested with; packages it needs may be missing"
        return [Finding(code="wrong-python", found=found, cause=cause, cure=cure, backends=BACKENDS, severity=WARNING)]
    if machine.lower() not in ARCHITECTURES:
        cause = f"there are no kernels for it, only for {', '.join(ARCHITECTURES)}: plain loops are used"
        return [
            Finding(
                code="unknown-processor",
                found=found,
                cause=cause,
                cure=("it works, slowly",),
                backends=("cpu",),
                severity=WARNING,
            )
        ]
    return []


def memory_findings(available_bytes: int, *, is_limited: bool) -> list[Finding]:
    if available_bytes >= GIB:
        return []
    limit = "raise the limit of the container: docker run --memory 8g …" if is_limited else "end other programs"
    return [
        Finding(
            code="little-memory",
            found=f"{available_bytes / GIB:.2f} GiB of memory are available",
            cause="the engine keeps one GiB free, so that no model fits",
            cure=(limit, "mooli plan demo --memory 2GiB   # what a model takes"),
            backends=("cpu",),
            severity=WARNING,
        )
    ]


def probe_mooli(surroundings: Surroundings) -> Section:
    section = Section("mooli")
    section.facts["version"] = __version__
    section.facts["folder"] = str(Path(mooli.__file__).parent)
    imports = [f"import:{name}" for name in PACKAGES]
    results = run_steps(surroundings, ["native:", *imports], environ=_own_environ(surroundings), go_on=True)
    native = results["native:"]
    isas = native.value.get("isas") if isinstance(native.value, dict) else None
    section.facts["native module"] = "loads" if native.ok else native.error[:300]
    section.facts["instruction sets"] = isas
    section.findings += native_findings(native, isas, surroundings.environ.get("MOOLI_ISA", ""))
    for name in PACKAGES:
        result = results[f"import:{name}"]
        version = result.value.get("version") if isinstance(result.value, dict) else None
        section.facts[name] = (version or "works") if result.ok else result.error[:300]
        section.findings += package_findings(name, result)
    return section


def _own_environ(surroundings: Surroundings) -> dict[str, str]:
    """So that the other process finds this very package, also where only sys.path named it."""
    own = str(Path(mooli.__file__).resolve().parents[1])
    paths = [*surroundings.environ.get("PYTHONPATH", "").split(os.pathsep), own]
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def native_findings(native: StepResult, isas: Any, forced: str) -> list[Finding]:
    if not native.ok:
        illegal = "SIGILL" in native.error
        return [
            Finding(
                code="native-module-does-not-load",
                found=f"mooli._native: {native.error[:600]}",
                cause=(
                    "it was built for another processor" if illegal else "it was built for another Python or system"
                ),
                cure=("pip install --force-reinstall --no-cache-dir mooli", "until then: --backend reference (slow)"),
                backends=("cpu",),
            )
        ]
    if not isinstance(isas, list):
        return []
    if forced and forced not in isas:
        return [
            Finding(
                code="isa-not-available",
                found=f"MOOLI_ISA={forced}; this processor has {', '.join(map(str, isas))}",
                cause="the variable asks for instructions that the processor lacks",
                cure=("unset MOOLI_ISA",),
                backends=("cpu",),
            )
        ]
    if forced and forced != isas[-1]:
        return [
            Finding(
                code="slow-instruction-set",
                found=f"MOOLI_ISA={forced}; this processor has {isas[-1]}",
                cause="the variable keeps the kernels from what this processor can do",
                cure=("unset MOOLI_ISA",),
                backends=("cpu",),
                severity=WARNING,
            )
        ]
    if isas == ["scalar"]:
        return [
            Finding(
                code="slow-instruction-set",
                found="no vector kernels fit this processor",
                cause="the processor lacks AVX2 (Arm: the dot product of ARMv8.2), or a virtual machine hides it",
                cure=("give the virtual machine the processor of its host (host-passthrough)", "it works, slowly"),
                backends=("cpu",),
                severity=WARNING,
            )
        ]
    return []


def package_findings(name: str, result: StepResult) -> list[Finding]:
    if result.ok:
        return []
    package = {"yaml": "pyyaml", "prometheus_client": "prometheus-client"}.get(name, name)
    return [
        Finding(
            code="package-does-not-import",
            found=f"import {name}: {result.error[:600]}",
            cause="Mooli depends on it, and it is missing, damaged or for another Python",
            cure=(f"{sys.executable} -m pip install --force-reinstall {package}",),
            backends=BACKENDS,
            subject=name,
        )
    ]


def _ranges(numbers: list[int]) -> str:
    """0-3,8 of [0, 1, 2, 3, 8]"""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
