"""`mooli doctor` as a whole: sections, exit status, JSON, and that nothing takes it down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import npu_tables as tables
import pytest
from fake_machine import torch_source
from hypothesis import given
from hypothesis import strategies as st

import mooli
from mooli import cli
from mooli.doctor import examination, host
from mooli.doctor.examination import examine
from mooli.doctor.findings import PROBLEM, WARNING, Finding, Report, Section, printable, report_json, report_table
from mooli.doctor.host import native_findings, probe_mooli, probe_resources, python_findings
from mooli.doctor.surroundings import Ran, StepResult, Surroundings, parse_lines, run_program, run_steps
from mooli.doctor.torch_stack import parse_nvidia_smi, probe_cuda

SOURCE = Path(mooli.__file__).parents[1]


@pytest.fixture
def quick(machine, monkeypatch):
    """A machine with a light torch, where Mooli's own packages are taken as good."""
    monkeypatch.setattr(host, "PACKAGES", ("msgspec",))
    machine.package("torch", torch_source("2.13.0"), "2.13.0")
    return machine


def codes(report):
    return [finding.code for finding in report.findings]


def test_a_machine_that_can_run_the_cpu_backend_is_well(quick):
    report = examine(quick.surroundings())
    assert report.exit_status == 0
    assert report.findings == []
    assert [section.name for section in report.sections] == [
        "host", "resources", "mooli", "npu", "cann", "torch", "cuda",
    ]  # fmt: skip


def test_an_npu_in_trouble_counts_only_where_it_was_asked_for(quick):
    quick.devices()
    quick.program("npu-smi", "dcmi module initialize failed. ret is -8005", ends="exit 1")
    for backend, status in (("cpu", 0), ("ascend", 1)):
        report = examine(quick.surroundings(), backend=backend)
        assert report.exit_status == status
        assert "device-held-by-another" in codes(report)
        assert "cann-missing" in codes(report)


def test_one_thing_that_several_probes_see_is_one_finding(quick):
    quick.package("torch_npu", "raise ImportError('libhccl.so: cannot open shared object file')", "2.13.0")
    found = codes(examine(quick.surroundings(), backend="ascend"))
    assert found.count("cann-library-not-found") == 1


def test_json_has_every_fact_and_finding(quick):
    quick.devices()
    quick.program("npu-smi", tables.ATLAS_A3)
    report = json.loads(report_json(examine(quick.surroundings(), backend="ascend")))
    assert (report["schema"], report["backend"], report["status"], report["exit_status"]) == (
        1,
        "ascend",
        "problems",
        1,
    )
    assert report["sections"]["npu"]["chip 0.1"] == "Ascend910, OK, 2886 of 65536 MiB used, device 1"
    for finding in report["findings"]:
        assert {"code", "found", "cause", "cure", "backends", "severity", "counts"} <= set(finding)
        assert finding["cure"]


def test_the_table_says_what_was_found_why_and_what_to_do():
    finding = Finding(code="x", found="f\x1b[31m", cause="c", cure=("do this", "then that"), backends=("cpu",))
    text = report_table(Report("cpu", [Section("host", {"a": True, "bb": None, "c": ["x", "y"]}, [finding])]))
    assert "host: PROBLEM\n  a   yes\n  bb  none\n  c   x, y\n" in text
    assert "1. [problem] x\n   found: f [31m\n   cause: c\n   cure:  do this\n          then that" in text
    assert text.endswith("1 problem for backend cpu, see above.")


@pytest.mark.parametrize(
    ("findings", "is_there", "mark"),
    [
        ([], True, "ok"),
        ([], False, "not here"),
        ([("cpu", WARNING)], True, "ok, 1 to note"),
        ([("cuda", PROBLEM)], True, "problem, only for cuda"),
        (
            [("cuda", PROBLEM), ("ascend", PROBLEM), ("cpu", WARNING)],
            False,
            "problem, only for ascend, cuda, 1 to note",
        ),
        ([("cuda", PROBLEM), ("cpu", PROBLEM)], True, "PROBLEM"),
    ],
)
def test_nothing_is_ok_that_is_not_there_or_does_not_work(findings, is_there, mark):
    made = [
        Finding(code=str(i), found="f", cause="c", cure=("x",), backends=(backend,), severity=severity)
        for i, (backend, severity) in enumerate(findings)
    ]
    assert f"\n\nnpu: {mark}\n" in report_table(Report("cpu", [Section("npu", {}, made, is_there)]))


def test_a_machine_without_devices_and_torch_says_that_they_are_not_here(quick, monkeypatch):
    nothing = {name: StepResult(name, error="not found") for name in ("torch", "torch_npu", "numpy")}
    versions = {f"version:{name}": result for name, result in nothing.items()}
    monkeypatch.setattr("mooli.doctor.torch_stack.run_steps", lambda *_, **__: versions)
    report = examine(quick.surroundings())
    assert {section.name for section in report.sections if not section.is_there} == {"npu", "cann", "torch", "cuda"}
    assert json.loads(report_json(report))["not_here"] == [s.name for s in report.sections if not s.is_there]
    assert "\nnpu: not here\n" in report_table(report)


@given(st.text(), st.none() | st.integers(1, 50))
def test_nothing_that_is_shown_moves_the_cursor(text, most):
    shown = printable(text, most)
    assert shown.isprintable() or not shown
    assert most is None or len(shown) <= most


@pytest.mark.parametrize(
    "name", ["probe_host", "probe_resources", "probe_mooli", "probe_npu", "probe_cann", "probe_torch"]
)
def test_a_probe_that_fails_is_a_finding_and_the_others_go_on(quick, monkeypatch, name):
    def fails(*args, **options):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(examination, name, fails)
    report = examine(quick.surroundings())
    assert codes(report) == ["probe-failed"]
    assert "ZeroDivisionError: on purpose" in report.findings[0].found
    assert report.exit_status == int("cpu" in report.findings[0].backends)
    assert len(report.sections) == 7


def test_an_interpreter_that_does_not_start_is_a_finding(machine):
    report = examine(Surroundings(root=machine.root, environ=machine.environ, python="/nowhere/python"))
    assert "native-module-does-not-load" in codes(report)
    assert report.exit_status == 1


# -- Python and Mooli's own parts --


@pytest.mark.parametrize(
    ("version", "machine_name", "bits", "expected"),
    [
        ((3, 9), "x86_64", True, ["wrong-python"]),
        ((3, 10), "x86_64", True, []),
        ((3, 13), "aarch64", True, []),
        ((3, 14), "x86_64", True, ["wrong-python"]),
        ((3, 11), "x86_64", False, ["wrong-python"]),
        ((3, 11), "riscv64", True, ["unknown-processor"]),
    ],
)
def test_the_python_that_works(version, machine_name, bits, expected):
    findings = python_findings(version, machine_name, is_64_bits=bits)
    assert [finding.code for finding in findings] == expected
    if "wrong-python" in expected:
        assert "conda create -n mooli python=3.11" in findings[0].cure[0]


def test_a_package_that_is_broken_is_named(machine, monkeypatch):
    monkeypatch.setattr(host, "PACKAGES", ("msgspec", "tokenizers"))
    machine.package("tokenizers", "raise ImportError('wrong ELF class')", None)
    section = probe_mooli(machine.surroundings())
    (finding,) = section.findings
    assert finding.found == "import tokenizers: ImportError: wrong ELF class"
    assert finding.cure[0].endswith("pip install --force-reinstall tokenizers")
    assert section.facts["instruction sets"][0] == "scalar"


@pytest.mark.parametrize(
    ("native", "isas", "forced", "code"),
    [
        (StepResult("", error="ImportError: no such file"), None, "", "native-module-does-not-load"),
        (StepResult("", error="killed by SIGILL", is_crash=True), None, "", "native-module-does-not-load"),
        (StepResult(""), ["scalar", "avx2"], "avx512", "isa-not-available"),
        (StepResult(""), ["scalar", "avx2"], "scalar", "slow-instruction-set"),
        (StepResult(""), ["scalar"], "", "slow-instruction-set"),
    ],
)
def test_what_keeps_the_kernels_from_running_or_makes_them_slow(native, isas, forced, code):
    assert [finding.code for finding in native_findings(native, isas, forced)] == [code]


def test_the_best_instruction_set_is_fine_forced_or_not():
    for forced in ("", "avx2"):
        assert native_findings(StepResult(""), ["scalar", "avx2"], forced) == []


def test_the_limits_of_a_container_are_shown(machine, monkeypatch, tmp_path):
    # What other tests' engines have claimed of this machine is not available either.
    monkeypatch.setattr("mooli.backends.host_memory.shared_folder", lambda: tmp_path / "claims")
    machine.write("proc/self/cgroup", "0::/\n")
    machine.write("sys/fs/cgroup/memory.max", str(2**29))
    machine.write("sys/fs/cgroup/memory.current", "0")
    machine.write("sys/fs/cgroup/cpu.max", "150000 100000")
    section, available = probe_resources(machine.surroundings())
    assert available == 2**29
    assert section.facts["memory limit (cgroup)"] == "0.5 GiB"
    assert section.facts["processor limit (cgroup)"] == 1.5
    assert [finding.code for finding in section.findings] == ["little-memory"]
    assert "docker run --memory" in section.findings[0].cure[0]


def test_doctor_runs_where_a_package_of_the_others_crashes(machine):
    """Started as a module it needs nothing but Python."""
    machine.package("numpy", "import os, signal\nos.kill(os.getpid(), signal.SIGILL)", None)
    environ = {**machine.environ, "PYTHONPATH": f"{machine.packages}:{SOURCE}", "HOME": str(machine.root)}
    machine.package("torch", torch_source(), "2.6.0")
    command = [sys.executable, "-m", "mooli.doctor", "--json", "demo"]
    ran = run_program(command, environ, 100)
    report = json.loads(ran.output)
    assert ran.status == 1
    assert "package-does-not-import" in [finding["code"] for finding in report["findings"]]


# -- CUDA --

GPU = "NVIDIA H200, 570.86, 143771, 512\n"
DEAD = """
class cuda:
    is_available = staticmethod(lambda: False)
    @staticmethod
    def init(): raise RuntimeError("driver too old")
"""


@pytest.mark.parametrize(
    ("torch", "expected"),
    [(torch_source(), ["torch-without-cuda"]), (torch_source(cuda="12.8") + DEAD, ["cuda-not-available"])],
)
def test_a_torch_that_cannot_use_the_gpu_is_named(machine, torch, expected):
    machine.program("nvidia-smi", GPU)
    machine.package("torch", torch, "2.6.0")
    section, (gpu,) = probe_cuda(machine.surroundings(), is_wanted=True)
    assert (gpu.name, gpu.total_mib) == ("NVIDIA H200", 143771)
    assert [finding.code for finding in section.findings] == expected


def test_without_a_gpu_that_is_a_problem_only_where_one_is_wanted(quick):
    assert codes(examine(quick.surroundings(), backend="cuda")) == ["no-gpu"]


def test_a_driver_that_does_not_answer_is_a_finding(machine):
    machine.program("nvidia-smi", "NVIDIA-SMI has failed because it couldn't communicate", ends="exit 9")
    section, gpus = probe_cuda(machine.surroundings(), is_wanted=False)
    assert gpus == ()
    assert "couldn't communicate" in section.findings[0].found


@given(st.text())
def test_no_list_of_gpus_breaks_the_parser(text):
    parse_nvidia_smi(text)


# -- other processes --


def test_steps_behind_a_crash_get_another_process(machine):
    machine.package("bad", "import os\nos._exit(3)", None)
    machine.package("loud", 'print(\'{"end": "import:good"}\')', None)
    machine.package("good", "", None)
    steps = ["import:loud", "import:bad", "import:good"]
    results = run_steps(machine.surroundings(), steps, go_on=True)
    assert [results[step].ok for step in steps] == [True, False, True]
    assert (results["import:bad"].error, results["import:bad"].is_crash) == ("exit status 3", True)
    assert not run_steps(machine.surroundings(), steps)["import:good"].ok


@given(st.text(), st.text())
def test_no_output_of_a_child_breaks_its_reading(output, errors):
    (result, *_) = parse_lines(Ran(status=0, output=output, errors=errors), ["import:x"])
    assert result.step == "import:x"


def test_a_program_that_leaves_children_behind_is_ended_with_them(machine):
    machine.program("tool", "said", ends="/bin/sleep 60 &\nexit 0")
    ran = run_program([str(machine.bin / "tool")], machine.environ, 1.0)
    assert ran.output == "said"
    assert "within 1 s" in ran.trouble


# -- the command --


@pytest.fixture
def command(quick, monkeypatch, capsys):
    surroundings = quick.surroundings()
    monkeypatch.setattr("mooli.doctor.surroundings.Surroundings", lambda: surroundings)

    def run(*argv):
        status = cli.main(["doctor", *argv])
        return status, capsys.readouterr().out

    return run


def test_the_command_prints_a_table_and_ends_with_the_status(command):
    status, out = command()
    assert status == 0
    assert out.endswith("Everything that backend cpu needs is here.\n")
    assert command("demo", "--model-path", "demo")[0] == 2
    status, out = command("--backend", "npu", "--json")
    assert (status, json.loads(out)["backend"]) == (1, "ascend")


def test_the_command_finds_failures_in_a_log(command, tmp_path):
    log = tmp_path / "server.log"
    log.write_bytes(b"\xff\xfe ok\nNPU out of memory. Tried to allocate 2.00 GiB\n")
    status, out = command("--log", str(log), "--backend", "ascend")
    assert status == 1
    assert "npu-out-of-memory" in out
    assert "--mem-fraction-static 0.8" in out


def test_what_a_log_shows_counts_for_every_backend(command, tmp_path):
    log = tmp_path / "server.log"
    log.write_text("NPU out of memory. Tried to allocate 2.00 GiB\n")
    assert command("--log", str(log))[0] == 1


def test_a_log_or_model_that_is_not_there_is_a_problem(command):
    assert command("--log", "/nowhere/x.log")[0] == 1
    status, out = command("/nowhere/model")
    assert status == 1
    assert "model-not-found" in out


def test_the_child_hides_no_module_of_others(machine):
    """Its own folder has names such as `report` and `cuda`."""
    machine.package("cuda", "__version__ = '9'", None)
    assert run_steps(machine.surroundings(), ["import:cuda"])["import:cuda"].value["version"] == "9"


def test_doctor_needs_no_module_of_its_own_to_be_imported_by_mooli():
    code = "import sys, mooli; sys.exit(any(name.startswith('mooli.doctor') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(SOURCE)}).returncode == 0
