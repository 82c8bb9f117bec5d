"""All probes, each on its own: one that fails becomes a finding, and the others go on.

Owns the order and who learns what from whom. Never looks at the machine itself.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mooli.doctor.cann import Cann, probe_cann, probe_libraries
from mooli.doctor.failures import FAILURES, OWN_FAILURES, explain
from mooli.doctor.findings import BACKENDS, Finding, Report, Section
from mooli.doctor.host import probe_host, probe_mooli, probe_resources
from mooli.doctor.npu import MIB, NpuTable, probe_npu
from mooli.doctor.surroundings import Surroundings
from mooli.doctor.torch_stack import Gpu, probe_cuda, probe_torch

MAX_LOG_BYTES = 1 << 26

R = TypeVar("R")


def examine(
    surroundings: Surroundings, *, backend: str = "cpu", model_path: str | None = None, log: Path | None = None
) -> Report:
    """Never raises, whatever is broken.

    backend: cpu, torch, cuda or ascend. model_path: a model to check as well. log: a file with what an engine or a
    server has printed, to be searched for known failures.
    """
    report = Report(backend, [])
    sections = report.sections
    on_npu = backend == "ascend"

    def run(name: str, probe: Callable[[], tuple[Section, R]], otherwise: R, *backends: str) -> R:
        try:
            section, result = probe()
        except Exception as exc:  # whatever is broken, the other probes go on
            section, result = Section(name, findings=[_probe_failed(name, exc, backends)]), otherwise
        sections.append(section)
        return result

    run("host", lambda: (probe_host(), None), None, "cpu")
    no_bytes: int | None = None
    host_bytes = run("resources", lambda: probe_resources(surroundings), no_bytes, "cpu")
    run("mooli", lambda: (probe_mooli(surroundings), None), None, "cpu")
    is_whole = not any(finding.code == "package-does-not-import" for finding in report.findings)

    def npu() -> tuple[Section, tuple[NpuTable, bool]]:
        section, table, is_there = probe_npu(surroundings, is_wanted=on_npu)
        return section, (table, is_there)

    table, has_npu = run("npu", npu, (NpuTable(), False), "ascend")
    wants_npu = on_npu or has_npu
    cann = run("cann", lambda: probe_cann(surroundings, is_wanted=wants_npu), Cann(), "ascend")
    if wants_npu or cann.toolkit_folder is not None:
        run("libraries", lambda: (probe_libraries(surroundings, cann), None), None, "ascend")
    python = sys.version_info[:2]
    run(
        "torch",
        lambda: (probe_torch(surroundings, cann, python, is_wanted=backend != "cpu", for_npu=wants_npu), None),
        None,
        *("torch", "cuda", "ascend"),
    )
    no_gpus: tuple[Gpu, ...] = ()
    gpus = run("cuda", lambda: probe_cuda(surroundings, is_wanted=backend == "cuda"), no_gpus, "cuda")
    if model_path is not None:
        free = _free_bytes(backend, table, gpus, host_bytes)
        run("model", lambda: (_probe_model(model_path, backend, free, is_whole), None), None, "cpu")
    if log is not None:
        run("log", lambda: (probe_log(log), None), None, "cpu")
    return report


def _probe_model(model_path: str, backend: str, free_bytes: int | None, is_whole: bool) -> Section:
    if not is_whole:
        # A package that crashed in another process must not be imported in this one.
        return Section("model", {"given": model_path, "examined": "no: a package that this needs does not import"})
    from mooli.doctor.model_folder import probe_model

    return probe_model(model_path, backend, free_bytes)


def probe_log(path: Path) -> Section:
    """Known failures in a log; those in it count for every backend: somebody has asked."""
    section = Section("log")
    section.facts["file"] = str(path)
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - MAX_LOG_BYTES))
            text = file.read(MAX_LOG_BYTES).decode("utf-8", "replace")
    except OSError as exc:
        section.findings.append(
            Finding(
                code="log-unreadable",
                found=f"{path}: {exc.strerror or exc}",
                cause="the file is not there, or this user may not read it",
                cure=("mooli serve … 2>&1 | tee server.log   # then: mooli doctor --log server.log",),
                backends=BACKENDS,
            )
        )
        return section
    found = explain(text, (*FAILURES, *OWN_FAILURES))
    section.findings += [dataclasses.replace(finding, backends=BACKENDS) for finding in found]
    section.facts["known failures"] = len(section.findings)
    return section


def _free_bytes(backend: str, table: NpuTable, gpus: tuple[Gpu, ...], host_bytes: int | None) -> int | None:
    """Of the memory that the backend computes in: on the emptiest card."""
    if backend == "ascend":
        free = [c.total_mib - c.used_mib for c in table.chips if c.total_mib and c.used_mib is not None]
        return max(free) * MIB if free else None
    if backend == "cuda":
        return max(gpu.total_mib - gpu.used_mib for gpu in gpus) * MIB if gpus else None
    return host_bytes


def _probe_failed(name: str, exc: Exception, backends: tuple[str, ...]) -> Finding:
    return Finding(
        code="probe-failed",
        found=f"the examination of {name} failed: {type(exc).__name__}: {exc}"[:600],
        cause="something on this machine is not as the probe expects; the other sections do not depend on it",
        cure=("please report it with the output of: mooli doctor --json",),
        backends=backends,
        subject=name,
    )
