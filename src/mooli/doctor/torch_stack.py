"""torch and torch_npu: which versions, whether they belong together and to CANN, whether they import and compute.

Owns the table of versions, and of NVIDIA's cards the parser of nvidia-smi's list. Imports happen in another process,
and torch is asked there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mooli.doctor.cann import Cann, release_of
from mooli.doctor.failures import explain
from mooli.doctor.findings import PROBLEM, WARNING, Finding, Section
from mooli.doctor.surroundings import StepResult, Surroundings, run_program, run_steps

OLDEST_TORCH = (2, 5, 1)


@dataclass(frozen=True, slots=True)
class Row:
    """Releases of torch, each with its torch_npu, that go with one release of CANN."""

    cann: tuple[int, int]
    name: str
    pairs: tuple[tuple[str, str], ...]


VERSIONS: tuple[Row, ...] = (
    Row((8, 1), "8.1.RC1", (("2.5.1", "2.5.1"),)),
    Row((8, 2), "8.2.RC1", (("2.6.0", "2.6.0"), ("2.5.1", "2.5.1.post1"))),
    Row((8, 3), "8.3", (("2.8.0", "2.8.0"), ("2.7.1", "2.7.1"), ("2.6.0", "2.6.0.post3"))),
    Row(
        (8, 5),
        "8.5",
        (("2.9.0", "2.9.0"), ("2.8.0", "2.8.0.post2"), ("2.7.1", "2.7.1.post2"), ("2.6.0", "2.6.0.post5")),
    ),
    Row((9, 0), "9.0", (("2.10.0", "2.10.0"),)),
    Row((9, 1), "9.1", (("2.10.0", "2.10.0"),)),
)
"""Pairs from 2.5.1 on, newest first: as the releases of torch_npu state them."""

_NUMBERS = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})(?:\.([0-9]{1,4}))?")


def numbers_of(version: str | None) -> tuple[int, int, int] | None:
    """(2, 6, 0) of "2.6.0.post1" or "2.6.0+cpu"; None where there is no such thing."""
    match = _NUMBERS.match(version or "")
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def pythons_of(torch_npu: tuple[int, int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The oldest and the newest Python that a release of torch_npu has packages for."""
    return ((3, 10), (3, 12)) if torch_npu >= (2, 9, 0) else ((3, 9), (3, 11))


def pair_findings(
    torch: str | None, torch_npu: str | None, cann: str | None, python: tuple[int, int] | None = None
) -> list[Finding]:
    """What is wrong with versions that are installed together. None: not installed, or not known."""
    findings: list[Finding] = []
    row = next((row for row in VERSIONS if row.cann == release_of(cann)), None)
    wanted = _install(row)
    ours, theirs = numbers_of(torch), numbers_of(torch_npu)
    if torch is None or torch_npu is None:
        names = {"torch": torch, "torch_npu": torch_npu}
        missing = " and ".join(name for name, version in names.items() if version is None)
        findings.append(
            Finding(
                code="torch-npu-missing",
                found=f"not installed in this Python: {missing}",
                cause="the backend of Ascend computes through torch and torch_npu",
                cure=wanted,
            )
        )
    elif ours and theirs and ours != theirs:
        findings.append(
            Finding(
                code="torch-pair-wrong",
                found=f"torch {torch} with torch_npu {torch_npu}",
                cause="torch_npu is built for exactly the torch of its own number",
                cure=wanted if row else (f"pip install torch=={'.'.join(map(str, theirs))}",),
            )
        )
    elif row and torch_npu is not None and ours and not _is_in(row, ours):
        known = ", ".join(f"torch {a} with torch_npu {b}" for a, b in row.pairs)
        findings.append(
            Finding(
                code="torch-npu-not-for-this-cann",
                found=f"torch_npu {torch_npu} with CANN {cann}",
                cause=f"CANN {row.name} goes with {known}; others miss symbols or give garbled text",
                cure=wanted,
                severity=WARNING if _is_tried(row, ours) else PROBLEM,
            )
        )
    findings += _python_findings(theirs or _numbers_in(row), python, wanted, is_installed=theirs is not None)
    return findings


def _is_in(row: Row, torch: tuple[int, int, int]) -> bool:
    return any(numbers_of(pair[0]) == torch for pair in row.pairs)


def _is_tried(row: Row, torch: tuple[int, int, int]) -> bool:
    # A development build for 2.7.1 has shipped with CANN 8.2 in vllm-ascend 0.10.
    return row.cann == (8, 2) and torch == (2, 7, 1)


def _numbers_in(row: Row | None) -> tuple[int, int, int] | None:
    return numbers_of(row.pairs[0][1]) if row else None


def _python_findings(
    torch_npu: tuple[int, int, int] | None,
    python: tuple[int, int] | None,
    install: tuple[str, ...],
    *,
    is_installed: bool,
) -> list[Finding]:
    if torch_npu is None or python is None or is_installed:
        return []
    oldest, newest = pythons_of(torch_npu)
    if oldest <= python <= newest:
        return []
    name = ".".join(map(str, torch_npu))
    return [
        Finding(
            code="wrong-python",
            found=f"Python {python[0]}.{python[1]}; torch_npu {name}, which this CANN needs, has packages for"
            f" {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}",
            cause="pip finds no torch_npu for this Python",
            cure=("conda create -n mooli python=3.11 -y && conda activate mooli", "pip install mooli", *install),
        )
    ]


def _install(row: Row | None) -> tuple[str, ...]:
    if row is None:
        return ("pip install torch==<version> torch_npu==<version>   # as the version of CANN demands",)
    torch, torch_npu = row.pairs[0]
    return (
        f"pip install torch=={torch} --index-url https://download.pytorch.org/whl/cpu",
        f"pip install torch_npu=={torch_npu}   # the pair for CANN {row.name}",
        "pip install 'mooli[ascend]'" + ("" if row.cann > (8, 2) else " 'numpy<2'"),
    )


def probe_torch(
    surroundings: Surroundings, cann: Cann, python: tuple[int, int], *, is_wanted: bool, for_npu: bool
) -> Section:
    """is_wanted: without torch, that is a problem; for_npu: without torch_npu."""
    section = Section("torch")
    found = run_steps(surroundings, ["version:torch", "version:torch_npu", "version:numpy"], environ=_QUIET)
    torch, torch_npu, _ = (found[f"version:{name}"].value for name in ("torch", "torch_npu", "numpy"))
    torch = torch if isinstance(torch, str) else None
    torch_npu = torch_npu if isinstance(torch_npu, str) else None
    section.facts.update({"torch": torch, "torch_npu": torch_npu})
    if for_npu:
        for row in VERSIONS:
            section.facts[f"for CANN {row.name}"] = "; ".join(f"torch {a} with torch_npu {b}" for a, b in row.pairs)
        section.findings += pair_findings(torch, torch_npu, cann.toolkit, python)
    if torch is None:
        section.is_there = False
        section.findings += [_no_torch()] if is_wanted else []
        return section
    ours = numbers_of(torch)
    if ours and ours < OLDEST_TORCH:
        section.findings.append(_old_torch(torch))
    plain = run_steps(surroundings, ["import:torch"])["import:torch"]
    section.facts["import torch"] = "works" if plain.ok else plain.error[:600]
    section.findings += import_findings(plain, "torch")
    if torch_npu is not None:
        _probe_torch_npu(surroundings, section)
    return section


_QUIET = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def _probe_torch_npu(surroundings: Surroundings, section: Section) -> None:
    steps = ["import:torch", "torch:", "import:torch_npu", "npu:", "numbers:npu"]
    results = run_steps(surroundings, steps, environ=_QUIET)
    loaded = results["import:torch_npu"]
    section.facts["import torch_npu"] = "works" if loaded.ok else loaded.error[:600]
    facts = results["torch:"].value
    if isinstance(facts, dict) and facts.get("cuda"):
        section.findings += explain("Two accelerators cannot be used at the same time (torch is built for CUDA)")
    if not loaded.ok:
        section.findings += import_findings(loaded, "torch_npu")
        return
    section.facts["cann, as torch_npu sees it"] = facts.get("cann") if isinstance(facts, dict) else None
    npu, numbers = results["npu:"], results["numbers:npu"]
    section.facts["npu"] = device_words(npu)
    section.findings += device_findings(npu, numbers)
    if numbers.ok:
        section.facts["largest error on the npu"] = numbers.value


def device_findings(npu: StepResult, numbers: StepResult) -> list[Finding]:
    """What a device has to say that torch_npu has loaded for."""
    if npu.ok and isinstance(npu.value, dict) and not npu.value.get("available"):
        return explain(str(npu.value.get("why")))
    for result, doing in ((npu, "asking torch.npu for its devices"), (numbers, "a product of two matrices")):
        if not result.ok:
            return explain(result.error) or [
                Finding(
                    code="npu-does-not-compute",
                    found=f"{doing}: {result.error[:600]}",
                    cause="the card, the driver or CANN does not work",
                    cure=(
                        "npu-smi info",
                        "export ASCEND_GLOBAL_LOG_LEVEL=1 ASCEND_SLOG_PRINT_TO_STDOUT=1   # then again: more is said",
                    ),
                )
            ]
    return number_findings(numbers.value)


def number_findings(errors: Any) -> list[Finding]:
    wrong = {k: v for k, v in errors.items() if v != 0} if isinstance(errors, dict) else {}
    if not wrong:
        return []
    return [
        Finding(
            code="garbled-text",
            found=f"a product of small whole numbers comes out wrong on the NPU; largest error: {wrong}",
            cause="CANN, its kernels, the driver and torch_npu are not of one release, or the card is faulty",
            cure=(
                "install the parts of one row of the table of versions: mooli doctor --backend ascend",
                "start with --dtype bfloat16, if only float16 is wrong",
                "npu-smi info -t health -i 0; npu-smi info -t ecc -i 0",
            ),
        )
    ]


def import_findings(result: StepResult, name: str) -> list[Finding]:
    if result.ok:
        return []
    known = explain(result.error)
    if known:
        return known
    backends = ("ascend",) if name == "torch_npu" else ("torch", "cuda", "ascend")
    return [
        Finding(
            code=f"{name.replace('_', '-')}-does-not-import",
            found=f"import {name}: {result.error[:600]}",
            cause="the package or what it needs is damaged, or for another machine",
            cure=(f"pip install --force-reinstall --no-deps {name}==<its version>",),
            backends=backends,
        )
    ]


def device_words(result: StepResult) -> str:
    value = result.value
    if not result.ok or not isinstance(value, dict):
        return result.error[:300] or "no answer"
    if not value.get("available"):
        return f"not available: {value.get('why')}"
    free, total = value.get("free"), value.get("total")
    names = ", ".join(map(str, value.get("devices") or []))
    if not isinstance(free, int) or not isinstance(total, int):
        return names
    return f"{names}; {free / 2**30:.1f} of {total / 2**30:.1f} GiB free on the first"


def _no_torch() -> Finding:
    return Finding(
        code="torch-missing",
        found="torch is not installed in this Python",
        cause="the backends torch, cuda and ascend compute through torch; the cpu backend does not need it",
        cure=("pip install 'mooli[torch]'",),
        backends=("torch", "cuda", "ascend"),
    )


def _old_torch(version: str) -> Finding:
    oldest = ".".join(map(str, OLDEST_TORCH))
    return Finding(
        code="torch-too-old",
        found=f"torch {version}",
        cause=f"torch {oldest} is the oldest that works",
        cure=(f"pip install 'torch>={oldest}'",),
        backends=("torch", "cuda", "ascend"),
    )


# -- NVIDIA's cards ----------------------------------------------------------------------------------------------------

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
