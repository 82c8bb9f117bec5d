"""CANN as installed: driver, toolkit, kernels and NNAL, their versions, whether set_env.sh was sourced, what opens.

Owns the places and the formats of Ascend's version files, and the list of libraries. Libraries are opened in another
process, never in this one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mooli.doctor.failures import SET_ENV, SET_ENV_NNAL, explain
from mooli.doctor.findings import PROBLEM, WARNING, Finding, Section
from mooli.doctor.surroundings import StepResult, Surroundings, run_steps

_LINE = re.compile(r"^\s*([A-Za-z][\w.-]{0,60})\s*=\s*(.{0,200}?)\s*$", re.MULTILINE)
_RUNNING = re.compile(r"\[[^\]:]{0,60}:([^\]]{1,60})\]")
_RELEASE = re.compile(r"([0-9]{1,3})\.([0-9]{1,3})(?:\.([0-9A-Za-z]{1,20}))?")

TOOLKIT_VARIABLES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
TOOLKIT_FOLDERS = (
    "/usr/local/Ascend/ascend-toolkit/latest",
    "/usr/local/Ascend/cann",
    "/usr/local/Ascend/latest",
)
NNAL_FOLDERS = ("/usr/local/Ascend/nnal/atb/latest",)
DRIVER_FOLDER = "/usr/local/Ascend/driver"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cann:
    """Versions, None where there is no such part; folders as found; whether the shell has what set_env.sh sets."""

    driver: str | None = None
    toolkit: str | None = None
    kernels: str | None = None
    nnal: str | None = None
    toolkit_folder: Path | None = None
    nnal_folder: Path | None = None
    is_sourced: bool = False
    is_nnal_sourced: bool = False


def parse_version_file(text: str) -> dict[str, str]:
    """Keys in lower case, of version.info, version.cfg and ascend_*_install.info alike. Never raises."""
    return {match[1].lower(): match[2].strip("\"'") for match in _LINE.finditer(text[:100_000])}


def version_in(text: str) -> str | None:
    """The release that a version file states, such as 8.2.RC1; None where it states none."""
    fields = parse_version_file(text)
    for key in ("version", "package_version"):
        if _RELEASE.search(fields.get(key, "")):
            return fields[key][:60]
    for key, value in fields.items():
        if "running_version" in key and (match := _RUNNING.search(value)) and _RELEASE.search(match[1]):
            return match[1]
    return None


def release_of(version: str | None) -> tuple[int, int] | None:
    """(8, 2) of "8.2.RC1"; None where there is no such thing."""
    match = _RELEASE.match(version or "")
    return (int(match[1]), int(match[2])) if match else None


def probe_cann(surroundings: Surroundings, *, is_wanted: bool) -> tuple[Section, Cann]:
    """is_wanted: without CANN, that is a problem."""
    cann = find_cann(surroundings)
    section = Section("cann", is_there=cann.toolkit_folder is not None)
    section.facts.update(
        {
            "driver": cann.driver,
            "toolkit": cann.toolkit or ("of unknown version" if cann.toolkit_folder else None),
            "kernels": cann.kernels,
            "nnal": cann.nnal or ("of unknown version" if cann.nnal_folder else None),
            "set_env.sh sourced": cann.is_sourced,
            "nnal set_env.sh sourced": cann.is_nnal_sourced,
        }
    )
    if cann.toolkit_folder is not None:
        section.facts["toolkit folder"] = str(cann.toolkit_folder)
    if is_wanted:
        section.findings += cann_findings(cann)
        section.findings += environment_findings(surroundings)
    return section, cann


def find_cann(surroundings: Surroundings) -> Cann:
    environ = surroundings.environ
    toolkit = _first_folder(surroundings, TOOLKIT_VARIABLES, (*TOOLKIT_FOLDERS, *_home_folders(environ)))
    nnal = _first_folder(surroundings, ("ATB_HOME_PATH",), NNAL_FOLDERS)
    paths = environ.get("LD_LIBRARY_PATH", "").split(":")
    homes = [environ[name] for name in TOOLKIT_VARIABLES if environ.get(name)]
    homes += [] if toolkit is None else [str(toolkit), str(toolkit.resolve())]
    return Cann(
        driver=_version(surroundings, [surroundings.path(DRIVER_FOLDER) / "version.info"]),
        toolkit=None if toolkit is None else _version(surroundings, _toolkit_files(toolkit)),
        kernels=None if toolkit is None else _version(surroundings, _kernel_files(toolkit)),
        nnal=None if nnal is None else _version(surroundings, _nnal_files(nnal)),
        toolkit_folder=toolkit,
        nnal_folder=nnal,
        is_sourced=any(path.startswith(home.rstrip("/")) for home in homes for path in paths),
        is_nnal_sourced=bool(environ.get("ATB_HOME_PATH")),
    )


def cann_findings(cann: Cann) -> list[Finding]:
    findings = []
    if cann.toolkit_folder is None:
        findings.append(
            Finding(
                code="cann-missing",
                found="there is no CANN toolkit in /usr/local/Ascend nor where ASCEND_TOOLKIT_HOME points",
                cause="CANN, Ascend's runtime with libhccl.so and libascendcl.so, is not installed",
                cure=(
                    "bash Ascend-cann-toolkit_8.2.RC1_linux-$(uname -m).run --full",
                    "bash Ascend-cann-kernels-910b_8.2.RC1_linux-$(uname -m).run --install",
                    "bash Ascend-cann-nnal_8.2.RC1_linux-$(uname -m).run --install",
                    f"{SET_ENV} && {SET_ENV_NNAL}",
                    "or a container image of the family ascend/cann:8.2.rc1-910b-ubuntu22.04-py3.11",
                ),
            )
        )
        return findings
    if not cann.is_sourced:
        folder = cann.toolkit_folder
        scripts = [path for path in (folder / "set_env.sh", folder.parent / "set_env.sh") if path.is_file()]
        findings.append(
            Finding(
                code="set-env-not-sourced",
                found=f"CANN is in {cann.toolkit_folder}, but LD_LIBRARY_PATH does not name it",
                cause="set_env.sh was not sourced in this shell, so libhccl.so and the others are not found",
                cure=(f"source {scripts[-1]}" if scripts else SET_ENV, "for every shell: put that line in ~/.bashrc"),
            )
        )
    if cann.kernels is None:
        findings.append(
            Finding(
                code="kernels-missing",
                found=f"no kernels package in {cann.toolkit_folder}",
                cause="the toolkit alone has no compiled operations: they fail with error code 500001 or EH9999",
                cure=(
                    f"bash Ascend-cann-kernels-<chip, such as 910b>_{cann.toolkit or '<version of the toolkit>'}"
                    "_linux-$(uname -m).run --install",
                ),
                severity=WARNING,  # from 8.5 on the files may lie elsewhere
            )
        )
    if cann.nnal_folder is None:
        findings.append(
            Finding(
                code="nnal-missing",
                found="there is no NNAL in /usr/local/Ascend/nnal nor where ATB_HOME_PATH points",
                cause="the attention kernels of ATB (libatb.so) are not installed",
                cure=(
                    f"bash Ascend-cann-nnal_{cann.toolkit or '<version of CANN>'}_linux-$(uname -m).run --install",
                    SET_ENV_NNAL,
                ),
            )
        )
    elif not cann.is_nnal_sourced:
        findings.append(
            Finding(
                code="nnal-set-env-not-sourced",
                found=f"NNAL is in {cann.nnal_folder}, but ATB_HOME_PATH is not set",
                cause="its set_env.sh was not sourced in this shell, so libatb.so is not found",
                cure=(SET_ENV_NNAL,),
            )
        )
    findings += _mismatches(cann)
    return findings


def _mismatches(cann: Cann) -> Iterator[Finding]:
    for part, version in (("kernels", cann.kernels), ("NNAL", cann.nnal)):
        ours, theirs = release_of(cann.toolkit), release_of(version)
        if ours and theirs and ours != theirs:
            yield Finding(
                code="cann-parts-differ",
                found=f"{part} is {version}, the toolkit is {cann.toolkit}",
                cause="parts of different releases give undefined symbols, error 500001 or wrong answers",
                cure=(f"install {part} of version {cann.toolkit}",),
                subject=part,
            )


def environment_findings(surroundings: Surroundings) -> list[Finding]:
    """Variables that are wrong by themselves."""
    environ = surroundings.environ
    findings = []
    for name in (*TOOLKIT_VARIABLES, "ASCEND_OPP_PATH", "ATB_HOME_PATH"):
        value = environ.get(name)
        if value and not _is_folder(Path(value)):
            findings.append(
                _variable(name, value, "there is no such folder: torch_npu refuses to load", f"unset {name}", SET_ENV)
            )
    rules = (
        ("TASK_QUEUE_ENABLE", lambda v: v == "2", "graphs cannot be captured with 2", "export TASK_QUEUE_ENABLE=1"),
        (
            "ASCEND_LAUNCH_BLOCKING",
            lambda v: v == "1",
            "every operation waits for the one before: slow, and no graphs. It is for finding errors",
            "unset ASCEND_LAUNCH_BLOCKING",
        ),
        (
            "INF_NAN_MODE_ENABLE",
            lambda v: v == "0",
            "numbers that overflow are cut instead of shown, which gives garbled text on a 910B",
            "unset INF_NAN_MODE_ENABLE",
        ),
        (
            "STREAMS_PER_DEVICE",
            lambda v: v not in ("8", "32"),
            "only 8 and 32 are possible",
            "unset STREAMS_PER_DEVICE",
        ),
        (
            "PYTORCH_NPU_ALLOC_CONF",
            lambda v: (
                "expandable_segments:True" in v and ("max_split_size_mb" in v or "garbage_collection_threshold" in v)
            ),
            "expandable_segments cannot be combined with max_split_size_mb or garbage_collection_threshold",
            "export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True",
        ),
    )
    for name, is_wrong, why, cure in rules:
        value = environ.get(name)
        if value and is_wrong(value):
            findings.append(_variable(name, value, why, cure))
    if environ.get("PYTORCH_ALLOC_CONF") and environ.get("PYTORCH_NPU_ALLOC_CONF"):
        value = environ["PYTORCH_ALLOC_CONF"]
        cause = "PYTORCH_NPU_ALLOC_CONF is set too; newer releases of torch_npu refuse both"
        findings.append(_variable("PYTORCH_ALLOC_CONF", value, cause, "unset PYTORCH_ALLOC_CONF"))
    return findings


def _variable(name: str, value: str, cause: str, *cure: str) -> Finding:
    severity = PROBLEM if name.endswith(("_PATH", "_HOME")) or name == "INF_NAN_MODE_ENABLE" else WARNING
    return Finding(
        code="environment-variable-wrong",
        found=f"{name}={value}"[:300],
        cause=cause,
        cure=cure,
        severity=severity,
        subject=name,
    )


def _first_folder(surroundings: Surroundings, variables: tuple[str, ...], folders: tuple[str, ...]) -> Path | None:
    named = [Path(surroundings.environ[name]) for name in variables if surroundings.environ.get(name)]
    for folder in (*named, *map(surroundings.path, folders)):
        if _is_folder(folder):
            return folder
    return None


def _home_folders(environ: Mapping[str, str]) -> tuple[str, ...]:
    home = environ.get("HOME", "")
    return (f"{home}/Ascend/ascend-toolkit/latest", f"{home}/Ascend/cann") if home.startswith("/") else ()


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _version(surroundings: Surroundings, files: list[Path]) -> str | None:
    for file in files:
        version = version_in(surroundings.text(file) or "")
        if version:
            return version
    return None


def _toolkit_files(folder: Path) -> list[Path]:
    return [
        *_glob(folder, "*-linux/ascend_toolkit_install.info"),
        folder / "version.cfg",
        folder / "version.info",
        folder / "runtime" / "version.info",
        folder / "compiler" / "version.info",
    ]


def _kernel_files(folder: Path) -> list[Path]:
    return [
        folder / "opp_kernel" / "version.info",
        *_glob(folder, "*-linux/ascend_*kernels*_install.info"),
        *_glob(folder, "ascend_*kernels*_install.info"),
    ]


def _nnal_files(folder: Path) -> list[Path]:
    # ATB_HOME_PATH names a folder below the one with the version, one for each C++ ABI.
    return [place / "version.info" for place in (folder, folder.parent, folder.parent.parent)]


def _glob(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


# -- shared libraries --------------------------------------------------------------------------------------------------

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
