"""Ascend's shared libraries, opened one after the other in another process, in the order in which they need each other.

Owns the list and what it means when one does not open. Never opens a library in this process.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mooli.doctor.cann import DRIVER_FOLDER, Cann
from mooli.doctor.children import StepResult, run_steps
from mooli.doctor.failures import SET_ENV, SET_ENV_NNAL, explain
from mooli.doctor.findings import Finding, Section
from mooli.doctor.surroundings import Surroundings

LIBRARIES = (
    "libascend_hal.so",
    "libascendcl.so",
    "libgraph.so",
    "libge_runner.so",
    "libacl_op_compiler.so",
    "libhccl.so",
    "libatb.so",
)
"""The driver's first, then the runtime's, what torch_npu links to, and NNAL's."""

_NOT_FOUND = re.compile(r"(lib[\w.+-]+): cannot open shared object file")


def probe_libraries(surroundings: Surroundings, cann: Cann) -> Section:
    section = Section("libraries")
    results = run_steps(surroundings, [f"dlopen:{name}" for name in LIBRARIES], go_on=True)
    by_name = {name: results[f"dlopen:{name}"] for name in LIBRARIES}
    for name, result in by_name.items():
        section.facts[name] = "opens" if result.ok else result.error[:300]
    section.findings += library_findings(by_name, where_libraries_lie(surroundings, cann))
    return section


def library_findings(results: Mapping[str, StepResult], on_disk: Mapping[str, Path]) -> list[Finding]:
    """on_disk: libraries that lie in a known place, whether or not the loader looks there.

    Libraries of one package that are not found make one finding.
    """
    findings: dict[tuple[str, str], Finding] = {}
    for name, result in results.items():
        if result.ok:
            continue
        missing = _NOT_FOUND.search(result.error)
        absent = missing[1] if missing else ""
        if result.is_crash:
            finding = Finding(
                code="library-crashes",
                found=f"opening {name}: {result.error[:600]}",
                cause="the library does not fit this machine, the driver or the other libraries",
                cure=("install driver, toolkit and NNAL of releases that belong together", SET_ENV, SET_ENV_NNAL),
                subject=name,
            )
        elif absent in on_disk:
            folder = on_disk[absent].parent
            finding = Finding(
                code=_code(absent),
                found=f"{result.error[:300]}; it lies in {folder}",
                cause="it is installed, but the loader does not look there: set_env.sh was not sourced in this shell",
                cure=(*_sourcing(absent), f"or: export LD_LIBRARY_PATH={folder}:$LD_LIBRARY_PATH"),
            )
        else:
            known = explain(result.error)
            finding = known[0] if known else _unknown(name, absent, result.error)
        key = finding.code, finding.subject
        # libhccl.so is the one whose message people search for.
        if key not in findings or name == "libhccl.so":
            findings[key] = finding
    return list(findings.values())


def where_libraries_lie(surroundings: Surroundings, cann: Cann) -> dict[str, Path]:
    """Those of LIBRARIES that are in the folders of the driver, the toolkit or NNAL."""
    driver = surroundings.path(DRIVER_FOLDER)
    folders = [driver / "lib64", driver / "lib64/driver", driver / "lib64/common"]
    if cann.toolkit_folder is not None:
        folders += [cann.toolkit_folder / "lib64", cann.toolkit_folder / "runtime/lib64"]
        folders += [cann.toolkit_folder / "hccl/lib64", cann.toolkit_folder / "compiler/lib64"]
    if cann.nnal_folder is not None:
        folders += [cann.nnal_folder / "lib", *(cann.nnal_folder / f"atb/cxx_abi_{abi}/lib" for abi in (0, 1))]
        folders += [cann.nnal_folder / f"cxx_abi_{abi}/lib" for abi in (0, 1)]
    found: dict[str, Path] = {}
    for folder in folders:
        for name in LIBRARIES:
            try:
                if name not in found and (folder / name).exists():
                    found[name] = folder / name
            except OSError:
                continue
    return found


def _code(name: str) -> str:
    if name == "libascend_hal.so":
        return "driver-library-not-found"
    return "atb-library-not-found" if name == "libatb.so" else "cann-library-not-found"


def _sourcing(name: str) -> tuple[str, ...]:
    if name == "libascend_hal.so":
        return ()
    return (SET_ENV_NNAL,) if name == "libatb.so" else (SET_ENV,)


def _unknown(name: str, absent: str, error: str) -> Finding:
    cause = f"{absent}, which it needs, is not found" if absent else "the library is damaged, or for another machine"
    return Finding(
        code="library-does-not-open",
        found=f"{name}: {error[:300]}",
        cause=cause,
        cure=(
            SET_ENV,
            f"ldd $(find -L /usr/local/Ascend -name {name} | head -1) | grep 'not found'   # what else is missing",
        ),
        subject=name,
    )
