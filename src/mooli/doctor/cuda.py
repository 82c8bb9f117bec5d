"""NVIDIA's cards: what nvidia-smi lists and what torch.cuda says.

Owns the parser of nvidia-smi's list. torch is asked in another process.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mooli.doctor.children import StepResult, run_steps
from mooli.doctor.findings import Finding, Section
from mooli.doctor.surroundings import Surroundings, run_program
from mooli.doctor.torch_stack import device_words

QUERY = "name,driver_version,memory.total,memory.used"


@dataclass(frozen=True, slots=True)
class Gpu:
    """Memory in MiB."""

    name: str
    driver: str
    total_mib: int
    used_mib: int


def parse_nvidia_smi(text: str) -> tuple[Gpu, ...]:
    """Cards from `nvidia-smi --query-gpu=… --format=csv,noheader,nounits`; other lines are passed over."""
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 4 and cells[0] and all(re.fullmatch(r"[0-9]{1,9}", cell) for cell in cells[2:]):
            gpus.append(Gpu(cells[0], cells[1], int(cells[2]), int(cells[3])))
    return tuple(gpus)


def probe_cuda(surroundings: Surroundings, *, is_wanted: bool) -> tuple[Section, tuple[Gpu, ...]]:
    """is_wanted: without a card, that is a problem."""
    section = Section("cuda")
    gpus: tuple[Gpu, ...] = ()
    tool = surroundings.program("nvidia-smi")
    if tool is not None:
        command = [tool, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
        ran = run_program(command, surroundings.environ, surroundings.timeout_s)
        gpus = parse_nvidia_smi(ran.output)
        section.facts["nvidia-smi"] = tool
        for number, gpu in enumerate(gpus):
            section.facts[f"gpu {number}"] = f"{gpu.name}, {gpu.used_mib} of {gpu.total_mib} MiB used"
        if gpus:
            section.facts["driver"] = gpus[0].driver
        else:
            said = f"{ran.output}\n{ran.errors}".strip()
            section.findings.append(_tool_fails(ran.ending(), said.splitlines()[-1][:200] if said else "nothing"))
    else:
        section.facts["nvidia-smi"] = None
    section.is_there = bool(gpus)
    if is_wanted and tool is None:
        section.findings.append(_no_gpu())
    if gpus or is_wanted:
        steps = ["import:torch", "torch:", "cuda:"]
        results = run_steps(surroundings, steps, environ={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
        section.facts["torch.cuda"] = device_words(results["cuda:"])
        section.findings += torch_findings(results["import:torch"], results["torch:"].value, results["cuda:"], gpus)
    return section, gpus


def torch_findings(imported: StepResult, facts: Any, cuda: StepResult, gpus: Sequence[Gpu]) -> list[Finding]:
    """What keeps torch from cards that are there. Without torch nothing is said here: that is another probe's."""
    if not imported.ok:
        return []
    built_for = facts.get("cuda") if isinstance(facts, dict) else None
    if gpus and not built_for:
        return [
            Finding(
                code="torch-without-cuda",
                found=f"torch {facts.get('version') if isinstance(facts, dict) else '?'} is a build without CUDA",
                cause="pip has installed the build for CPUs",
                cure=("pip uninstall -y torch", "pip install torch   # from the index that has builds for CUDA"),
                backends=("cuda",),
            )
        ]
    available = cuda.ok and isinstance(cuda.value, dict) and cuda.value.get("available")
    if gpus and not available:
        why = cuda.value.get("why") if cuda.ok and isinstance(cuda.value, dict) else cuda.error
        return [
            Finding(
                code="cuda-not-available",
                found=f"torch.cuda does not work: {str(why)[:600]}",
                cause=f"driver {gpus[0].driver} is too old for the CUDA {built_for} of torch, or the cards are hidden",
                cure=("unset CUDA_VISIBLE_DEVICES", "update the driver, or install a torch for an older CUDA"),
                backends=("cuda",),
            )
        ]
    return []


def _tool_fails(ending: str, said: str) -> Finding:
    return Finding(
        code="nvidia-smi-fails",
        found=f"nvidia-smi: {ending}; it says: {said}",
        cause="the driver does not answer",
        cure=("nvidia-smi", "reinstall the driver, then reboot; in a container: docker run --gpus all …"),
        backends=("cuda",),
    )


def _no_gpu() -> Finding:
    return Finding(
        code="no-gpu",
        found="nvidia-smi is not on PATH",
        cause="there is no NVIDIA card here, no driver, or a container was given no card",
        cure=("docker run --gpus all …   # in a container", "without a card: --backend cpu"),
        backends=("cuda",),
    )
