"""NPUs on this machine: the table that `npu-smi info` prints, device files, the PCI bus.

Owns the parser of every layout of that table. Never opens a device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mooli.doctor.failures import explain
from mooli.doctor.findings import PROBLEM, WARNING, Finding, Section
from mooli.doctor.surroundings import Ran, Surroundings, run_program

HUAWEI = "0x19e5"
DEVICE_FILES = ("davinci_manager", "devmm_svm", "hisi_hdc")
MIB = 2**20

TAKEN_SHARE = 0.2
"""A card of which more than this is used before anything of ours runs is taken by somebody: idle ones show 5 %."""

_NPU_AND_NAME = re.compile(r"([0-9]{1,6})\s+(\S.*)")
_CHIP = re.compile(r"([0-9]{1,6})(?:\s+([0-9]{1,6}))?")
_NUMBER = re.compile(r"[0-9]{1,6}")
_BUS = re.compile(r"[0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f]|NA|-")
_PAIR = re.compile(r"([0-9]{1,9})\s*/\s*([0-9]{1,9})")
_DECIMAL = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,4})?")
_VERSION = re.compile(r"npu-smi\s+(\S+)\s+Version:\s*(\S+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """A row pair of the table. Memory in MiB, None where the table has no such column; device: the number that
    programs use, where it is shown."""

    npu: int
    chip: int
    name: str
    health: str
    device: int | None = None
    bus_id: str = ""
    power_w: float | None = None
    temperature_c: float | None = None
    aicore_percent: float | None = None
    memory_used_mib: int | None = None
    memory_total_mib: int | None = None
    hbm_used_mib: int | None = None
    hbm_total_mib: int | None = None

    @property
    def used_mib(self) -> int | None:
        """Of the memory that holds models: HBM where there is any, else the chip's own."""
        return self.hbm_used_mib if self.hbm_total_mib else self.memory_used_mib

    @property
    def total_mib(self) -> int | None:
        return self.hbm_total_mib or self.memory_total_mib


@dataclass(frozen=True, slots=True, kw_only=True)
class NpuProcess:
    """A process on a chip; memory in MiB. container_pid: its number inside the container, with newer drivers."""

    npu: int
    chip: int
    pid: int
    name: str
    memory_mib: int | None = None
    container_pid: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NpuTable:
    """What the tool says. driver: the version it prints for the driver."""

    tool: str = ""
    driver: str = ""
    chips: tuple[Chip, ...] = ()
    processes: tuple[NpuProcess, ...] = ()


def parse_npu_smi(text: str) -> NpuTable:
    """The table of `npu-smi info`, of any driver: with and without HBM, one or more chips to a card, a column for the
    card's number or not. Lines that are no rows are passed over; garbage gives an empty table."""
    chips: list[Chip] = []
    processes: list[NpuProcess] = []
    tool = driver = ""
    above: tuple[int, str, str, str] | None = None
    in_processes = False
    for line in text.splitlines():
        if not tool and (version := _VERSION.search(line)):
            tool, driver = version[1][:40], version[2][:40].rstrip("|")
            continue
        if "|" not in line:
            continue
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if any(cell.startswith("Process id") for cell in cells):
            in_processes = True
        elif in_processes:
            process = _process(cells)
            processes += [process] if process else []
        elif above is not None and (chip := _second_row(above, cells)):
            chips.append(chip)
            above = None
        else:
            above = _first_row(cells) or above
    return NpuTable(tool=tool, driver=driver, chips=tuple(chips), processes=tuple(processes))


def _first_row(cells: Sequence[str]) -> tuple[int, str, str, str] | None:
    """(card, name, health, numbers)"""
    if len(cells) == 4 and _NUMBER.fullmatch(cells[0]) and cells[1]:
        return int(cells[0]), cells[1], cells[2], cells[3]
    if len(cells) == 3 and (match := _NPU_AND_NAME.fullmatch(cells[0])) and not _NUMBER.fullmatch(match[2]):
        return int(match[1]), match[2], cells[1], cells[2]
    return None


def _second_row(above: tuple[int, str, str, str], cells: Sequence[str]) -> Chip | None:
    card, name, health, numbers = above
    if len(cells) == 4 and not cells[0] and not cells[1] and _BUS.fullmatch(cells[2]):
        chip, device, bus, usage = 0, None, cells[2], cells[3]
    elif len(cells) == 3 and (match := _CHIP.fullmatch(cells[0])) and _BUS.fullmatch(cells[1]):
        chip, device, bus, usage = int(match[1]), match[2] and int(match[2]), cells[1], cells[2]
    else:
        return None
    first = numbers.split()
    pairs = [(int(used), int(total)) for used, total in _PAIR.findall(usage)]
    memory = pairs[0] if pairs else (None, None)
    hbm = pairs[1] if len(pairs) > 1 else (None, None)
    return Chip(
        npu=card,
        chip=chip,
        name=name,
        health=health,
        device=device if isinstance(device, int) else None,
        bus_id=bus,
        power_w=_decimal(first[0]) if first else None,
        temperature_c=_decimal(first[1]) if len(first) > 1 else None,
        aicore_percent=_decimal(usage.split()[0]) if usage else None,
        memory_used_mib=memory[0],
        memory_total_mib=memory[1],
        hbm_used_mib=hbm[0],
        hbm_total_mib=hbm[1],
    )


def _process(cells: Sequence[str]) -> NpuProcess | None:
    if len(cells) < 3 or not (where := _CHIP.fullmatch(cells[0])) or not re.fullmatch(r"[0-9]{1,9}", cells[1]):
        return None
    numbers = [int(cell) if re.fullmatch(r"[0-9]{1,9}", cell) else None for cell in cells[3:5]]
    return NpuProcess(
        npu=int(where[1]),
        chip=int(where[2] or 0),
        pid=int(cells[1]),
        name=cells[2],
        memory_mib=numbers[0] if numbers else None,
        container_pid=numbers[1] if len(numbers) > 1 else None,
    )


def _decimal(text: str) -> float | None:
    return float(text) if _DECIMAL.fullmatch(text) else None


def probe_npu(surroundings: Surroundings, *, is_wanted: bool) -> tuple[Section, NpuTable, bool]:
    """Section, table, and whether there is any sign of an NPU. is_wanted: without one, that is a problem."""
    on_bus = _on_bus(surroundings)
    files = _device_files(surroundings)
    tool = surroundings.program("npu-smi", "/usr/local/sbin", "/usr/local/bin", "/usr/local/Ascend/driver/tools")
    section, table = Section("npu"), NpuTable()
    if surroundings.environ.get("MOOLI_SIMULATE_ASCEND", "0") not in ("", "0"):
        section.facts["engines here"] = (
            "compute on a SIMULATED NPU (MOOLI_SIMULATE_ASCEND is set); below is what is real"
        )
    if tool is not None:
        ran = run_program([tool, "info"], surroundings.environ, surroundings.timeout_s)
        table = parse_npu_smi(ran.output)
        section.facts["npu-smi"] = tool
        section.findings += tool_findings(ran, table)
    is_there = section.is_there = bool(on_bus or files or tool)
    section.facts["cards on the PCI bus"] = on_bus
    section.facts["device files"] = ", ".join(files) or "none"
    if table.driver:
        section.facts["driver"] = table.driver
    for chip in table.chips:
        section.facts[f"chip {chip.npu}.{chip.chip}"] = chip_words(chip)
    section.findings += chip_findings(table)
    if is_there:
        section.findings += device_file_findings(files, bool(table.chips))
        section.findings += visible_findings(surroundings.environ, table)
        if tool is None:
            section.findings.append(_no_tool(on_bus))
    elif is_wanted:
        section.findings.append(_no_npu())
    return section, table, is_there


def chip_words(chip: Chip) -> str:
    memory = "" if chip.total_mib is None else f", {chip.used_mib} of {chip.total_mib} MiB used"
    device = "" if chip.device is None else f", device {chip.device}"
    return f"{chip.name}, {chip.health}{memory}{device}"


def tool_findings(ran: Ran, table: NpuTable) -> list[Finding]:
    """What is wrong with the tool's own run. It may print a complaint, end with a status and still show its table."""
    said = f"{ran.output}\n{ran.errors}".strip()
    known = [] if table.chips else explain(said)
    if table.chips or known:
        return known
    last = said.splitlines()[-1][:200] if said else "nothing"
    return [
        Finding(
            code="npu-smi-fails",
            found=f"npu-smi info: {ran.ending()}; it says: {last}",
            cause="the driver does not answer, or this container does not have the devices",
            cure=(
                "on the host: npu-smi info; if it fails there too, reinstall driver and firmware and reboot",
                "dmesg | tail -50",
                _CONTAINER,
            ),
        )
    ]


def chip_findings(table: NpuTable) -> list[Finding]:
    findings = []
    for chip in table.chips:
        name = f"NPU {chip.npu} chip {chip.chip} ({chip.name})"
        if chip.health.upper() not in ("OK", "NA", ""):
            findings.append(
                Finding(
                    code="npu-unhealthy",
                    found=f"{name}: health is {chip.health}",
                    cause="the card reports a fault",
                    cure=(
                        f"npu-smi info -t health -i {chip.npu}",
                        f"npu-smi set -t reset -i {chip.npu} -c {chip.chip}   # ends what runs on it",
                    ),
                    severity=WARNING if chip.health.upper() == "WARNING" else PROBLEM,
                    subject=name,
                )
            )
        if chip.used_mib is not None and chip.total_mib and chip.used_mib > TAKEN_SHARE * chip.total_mib:
            users = [p for p in table.processes if (p.npu, p.chip) == (chip.npu, chip.chip)]
            who = ", ".join(f"{p.name} (pid {p.pid}, {p.memory_mib} MiB)" for p in users[:5]) or "no process shown here"
            findings.append(
                Finding(
                    code="npu-memory-taken",
                    found=f"{name}: {chip.used_mib} of {chip.total_mib} MiB are used: {who}",
                    cause="another program holds the memory, and the engine would run out of it (NPU out of memory)",
                    cure=(
                        "npu-smi info   # end the program, or take a free card:",
                        "export ASCEND_RT_VISIBLE_DEVICES=<number of a free card>",
                        "or give the engine less: --mem-fraction-static 0.5",
                    ),
                    severity=WARNING,
                    subject=name,
                )
            )
    return findings


def device_file_findings(files: Sequence[str], has_chips: bool) -> list[Finding]:
    missing = [name for name in DEVICE_FILES if name not in files]
    if not any(re.fullmatch(r"davinci[0-9]+", name) for name in files):
        missing.insert(0, "davinci0")
    if not missing:
        return []
    return [
        Finding(
            code="device-files-missing",
            found=f"there is no {', '.join(f'/dev/{name}' for name in missing)}",
            cause=(
                "npu-smi sees the cards, but programs here cannot open them"
                if has_chips
                else "the driver is not loaded, or the devices were not given to this container"
            ),
            cure=("lsmod | grep -i drv_   # on the host: are the driver's modules loaded?", _CONTAINER),
        )
    ]


def visible_findings(environ: Mapping[str, str], table: NpuTable) -> list[Finding]:
    value = environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if value is None:
        return []
    numbers = [part.strip() for part in value.split(",")]
    known = len(table.chips) or None
    wrong = [n for n in numbers if not _NUMBER.fullmatch(n) or (known is not None and int(n) >= known)]
    if not wrong:
        return []
    last = "" if known is None else f" There are {known}: 0 to {known - 1}."
    return [
        Finding(
            code="visible-devices-wrong",
            found=f"ASCEND_RT_VISIBLE_DEVICES={value!r} names {', '.join(map(repr, wrong))}",
            cause=f"there is no such device, so torch_npu sees none that is available.{last}",
            cure=("unset ASCEND_RT_VISIBLE_DEVICES", "or: export ASCEND_RT_VISIBLE_DEVICES=0"),
        )
    ]


_CONTAINER = (
    "docker run --device /dev/davinci0 --device /dev/davinci_manager --device /dev/devmm_svm --device /dev/hisi_hdc"
    " -v /usr/local/dcmi:/usr/local/dcmi -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi"
    " -v /usr/local/Ascend/driver/lib64:/usr/local/Ascend/driver/lib64"
    " -v /usr/local/Ascend/driver/version.info:/usr/local/Ascend/driver/version.info"
    " -v /etc/ascend_install.info:/etc/ascend_install.info …   # in a container: all of these are needed"
)


def _no_tool(on_bus: int) -> Finding:
    return Finding(
        code="npu-smi-missing",
        found=f"npu-smi is not on PATH nor in /usr/local/sbin or /usr/local/bin; cards on the PCI bus: {on_bus}",
        cause="the driver is not installed, or a container was started without the tool",
        cure=("install driver and firmware of the card (HDK), then: npu-smi info", _CONTAINER),
    )


def _no_npu() -> Finding:
    return Finding(
        code="no-npu",
        found="no NPU: nothing on the PCI bus, no /dev/davinci*, no npu-smi",
        cause="this machine has no Ascend card, or it is a virtual machine or container that was given none",
        cure=("lspci -d 19e5:   # on the host: is there a card?", _CONTAINER, "without a card: --backend cpu"),
    )


def _on_bus(surroundings: Surroundings) -> int:
    """Huawei's processing accelerators (class 0x12) on the PCI bus."""
    count = 0
    try:
        for folder in surroundings.path("/sys/bus/pci/devices").iterdir():
            vendor, kind = (surroundings.text(folder / name) or "" for name in ("vendor", "class"))
            count += vendor.strip() == HUAWEI and kind.startswith("0x12")
    except OSError:
        return count
    return count


def _device_files(surroundings: Surroundings) -> list[str]:
    try:
        names = sorted(path.name for path in surroundings.path("/dev").iterdir())
    except OSError:
        return []
    return [name for name in names if name.startswith("davinci") or name in DEVICE_FILES]
