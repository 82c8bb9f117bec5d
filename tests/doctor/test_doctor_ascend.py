"""Each way in which Ascend's software is broken in the field, on a machine made of files, and its cure."""

from __future__ import annotations

import re
import shutil

import npu_tables as tables
import pytest
from fake_machine import some_library, torch_source
from hypothesis import given
from hypothesis import strategies as st

from mooli.doctor.cann import (
    LIBRARIES,
    Cann,
    find_cann,
    library_findings,
    parse_version_file,
    probe_cann,
    probe_libraries,
    version_in,
)
from mooli.doctor.failures import FAILURES, explain
from mooli.doctor.npu import probe_npu
from mooli.doctor.surroundings import StepResult
from mooli.doctor.torch_stack import VERSIONS, pair_findings, probe_torch

PYTHON = (3, 11)
READY = """
class npu:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    get_device_name = staticmethod(lambda index: "Ascend910B3")
    mem_get_info = staticmethod(lambda: (60 * 2**30, 61 * 2**30))
"""


def codes(section):
    return [finding.code for finding in section.findings]


def only(section_or_findings, code):
    findings = getattr(section_or_findings, "findings", section_or_findings)
    (finding,) = [finding for finding in findings if finding.code == code]
    return finding


def torch_section(machine, for_npu=True, cann=None):
    cann = cann or find_cann(machine.surroundings())
    return probe_torch(machine.surroundings(), cann, PYTHON, is_wanted=True, for_npu=for_npu)


# -- cards --


def test_a_healthy_card_is_described_and_nothing_is_wrong(machine):
    machine.devices()
    machine.program("npu-smi", tables.DRIVER_26)
    section, table, is_there = probe_npu(machine.surroundings(), is_wanted=True)
    assert is_there
    assert len(table.chips) == 1
    assert section.facts["driver"] == "26.0.rc1"
    assert section.facts["chip 0.0"] == "910B4, OK, 2871 of 32768 MiB used"
    assert section.findings == []


def test_without_any_sign_of_a_card_that_is_a_problem_only_where_one_is_wanted(machine):
    assert codes(probe_npu(machine.surroundings(), is_wanted=True)[0]) == ["no-npu"]
    assert codes(probe_npu(machine.surroundings(), is_wanted=False)[0]) == []


def test_a_simulated_card_is_never_taken_for_a_real_one(machine):
    machine.environ["MOOLI_SIMULATE_ASCEND"] = "8.2"
    section, _, is_there = probe_npu(machine.surroundings(), is_wanted=True)
    assert not is_there
    assert "SIMULATED" in section.facts["engines here"]
    assert codes(section) == ["no-npu"]


def test_a_card_on_the_bus_without_driver_is_seen(machine):
    machine.write("sys/bus/pci/devices/0000:c1:00.0/vendor", "0x19e5\n")
    machine.write("sys/bus/pci/devices/0000:c1:00.0/class", "0x120000\n")
    section, _, is_there = probe_npu(machine.surroundings(), is_wanted=False)
    assert is_there
    assert codes(section) == ["device-files-missing", "npu-smi-missing"]


def test_a_sick_card_and_one_that_another_program_fills_are_named(machine):
    machine.devices()
    machine.program("npu-smi", tables.ATLAS_A2)
    section, _, _ = probe_npu(machine.surroundings(), is_wanted=True)
    assert codes(section) == ["npu-unhealthy", "npu-memory-taken"]
    assert "NPU 1 chip 0 (910B3): health is Alarm" in section.findings[0].found
    assert "python3.11 (pid 485946, 54320 MiB)" in section.findings[1].found


def test_a_container_without_device_files_is_told_how_to_start(machine):
    machine.program("npu-smi", tables.DRIVER_26)
    finding = only(probe_npu(machine.surroundings(), is_wanted=True)[0], "device-files-missing")
    assert "/dev/davinci_manager" in finding.found
    assert "--device /dev/davinci0" in finding.cure[-1]


@pytest.mark.parametrize("said", ["dcmi module initialize failed. ret is -8005", "ret is -8020, device is used"])
def test_a_card_held_by_another_container_is_known(machine, said):
    machine.devices()
    machine.program("npu-smi", said, ends="exit 255")
    assert codes(probe_npu(machine.surroundings(), is_wanted=True)[0]) == ["device-held-by-another"]


def test_a_tool_that_complains_and_fails_but_shows_its_table_is_believed(machine):
    machine.devices()
    machine.program("npu-smi", "DrvMngGetConsoleLogLevel failed\n" + tables.DRIVER_26, ends="exit 1")
    assert codes(probe_npu(machine.surroundings(), is_wanted=True)[0]) == []


@pytest.mark.parametrize(
    ("ends", "timeout_s", "why"),
    [
        ("exec /bin/sleep 600", 0.5, "no answer within 0.5 s"),
        ("kill -SEGV $$", 60.0, "killed by SIGSEGV"),
        ("while :; do /bin/cat $0 $0 $0 $0; done", 0.5, "no answer within|it prints more than"),
    ],
    ids=["hangs", "crashes", "never ends"],
)
def test_a_tool_that_does_not_behave_is_a_finding(machine, ends, timeout_s, why):
    machine.devices()
    machine.program("npu-smi", "", ends=ends)
    section, _, _ = probe_npu(machine.surroundings(timeout_s=timeout_s), is_wanted=True)
    assert re.search(why, only(section, "npu-smi-fails").found)


@pytest.mark.parametrize("value", ["7", "0,9", "all", ""])
def test_a_device_that_is_not_there_is_not_visible(machine, value):
    machine.devices()
    machine.program("npu-smi", tables.DRIVER_26)
    machine.environ["ASCEND_RT_VISIBLE_DEVICES"] = value
    finding = only(probe_npu(machine.surroundings(), is_wanted=True)[0], "visible-devices-wrong")
    assert finding.cure[0] == "unset ASCEND_RT_VISIBLE_DEVICES"


# -- CANN --


def test_versions_are_read_from_the_files_of_the_installers(machine):
    machine.cann()
    machine.write("usr/local/Ascend/driver/version.info", "Version=24.1.0.3\nascendhal_version=7.35.23\n")
    cann = find_cann(machine.surroundings())
    assert (cann.driver, cann.toolkit, cann.kernels, cann.nnal) == ("24.1.0.3", "8.2.RC1", "8.2.RC1", "8.2.RC1")
    assert not cann.is_sourced


def test_cann_that_is_installed_and_sourced_has_no_findings(machine):
    machine.cann()
    machine.source_set_env()
    section, cann = probe_cann(machine.surroundings(), is_wanted=True)
    assert (cann.is_sourced, cann.is_nnal_sourced) == (True, True)
    assert section.findings == []


def test_without_cann_there_is_an_installation_to_follow(machine):
    finding = only(probe_cann(machine.surroundings(), is_wanted=True)[0], "cann-missing")
    assert "Ascend-cann-toolkit_8.2.RC1" in finding.cure[0]


def test_cann_that_is_not_sourced_names_its_own_set_env(machine):
    toolkit = machine.cann()
    section, _ = probe_cann(machine.surroundings(), is_wanted=True)
    assert codes(section) == ["set-env-not-sourced", "nnal-set-env-not-sourced"]
    assert section.findings[0].cure[0] == f"source {toolkit.parent / 'set_env.sh'}"


def test_missing_and_mismatched_parts_are_named_with_the_version_to_install(machine):
    machine.cann(kernels=None, nnal="8.1.RC1")
    machine.source_set_env()
    section, _ = probe_cann(machine.surroundings(), is_wanted=True)
    assert codes(section) == ["kernels-missing", "cann-parts-differ"]
    assert "_8.2.RC1_linux" in section.findings[0].cure[0]
    assert section.findings[1].found == "NNAL is 8.1.RC1, the toolkit is 8.2.RC1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ASCEND_OPP_PATH", "/nowhere"),
        ("TASK_QUEUE_ENABLE", "2"),
        ("ASCEND_LAUNCH_BLOCKING", "1"),
        ("INF_NAN_MODE_ENABLE", "0"),
        ("STREAMS_PER_DEVICE", "7"),
        ("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:64"),
    ],
)
def test_a_variable_that_breaks_things_is_named(machine, name, value):
    machine.cann()
    machine.source_set_env()
    machine.environ[name] = value
    finding = only(probe_cann(machine.surroundings(), is_wanted=True)[0], "environment-variable-wrong")
    assert finding.found == f"{name}={value}"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("Version=8.2.RC1\ntimestamp=20250701", "8.2.RC1"),
        ("package_name=Ascend-cann-toolkit\nversion=8.3.RC2\n", "8.3.RC2"),
        ("# version.cfg\nruntime_running_version=[7.7.0.1:8.5.0]\ncompiler_running_version=[1:8.5.0]", "8.5.0"),
        ("nothing here", None),
        ("", None),
    ],
)
def test_every_format_of_version_file_is_read(text, version):
    assert version_in(text) == version


@given(st.text())
def test_no_version_file_breaks_the_parser(text):
    parse_version_file(text)
    version_in(f"version={text}")


# -- libraries --


def test_libraries_that_open_are_fine(machine):
    machine.cann()
    machine.source_set_env()
    for name in LIBRARIES:
        shutil.copy(some_library(), machine.root / "usr/local/Ascend/ascend-toolkit/latest/lib64" / name)
    section = probe_libraries(machine.surroundings(), find_cann(machine.surroundings()))
    assert set(section.facts.values()) == {"opens"}
    assert section.findings == []


def test_libhccl_not_found_says_to_source_set_env(machine):
    section = probe_libraries(machine.surroundings(), Cann())
    finding = only(section, "cann-library-not-found")
    assert "libhccl.so: cannot open shared object file" in finding.found
    assert finding.cure[0] == "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
    assert "libatb.so: cannot open" in only(section, "atb-library-not-found").found
    assert "libascend_hal.so: cannot open" in only(section, "driver-library-not-found").found


def test_a_library_that_lies_there_but_is_not_found_gives_its_folder(machine):
    folder = machine.cann() / "lib64"
    shutil.copy(some_library(), folder / "libhccl.so")
    finding = only(probe_libraries(machine.surroundings(), find_cann(machine.surroundings())), "cann-library-not-found")
    assert f"export LD_LIBRARY_PATH={folder}:$LD_LIBRARY_PATH" in finding.cure[-1]


def test_a_damaged_library_is_named(machine):
    folder = machine.cann() / "lib64"
    machine.source_set_env()
    (folder / "libatb.so").write_bytes(b"no library")
    finding = only(probe_libraries(machine.surroundings(), find_cann(machine.surroundings())), "library-does-not-open")
    assert finding.found.startswith("libatb.so: ")


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (StepResult("", error="OSError: libatb.so: undefined symbol: aclnnFoo"), "versions-do-not-match"),
        (StepResult("", error="killed by SIGSEGV", is_crash=True), "library-crashes"),
        (StepResult("", error="OSError: libnuma.so.1: cannot open shared object file"), "library-does-not-open"),
    ],
)
def test_other_ends_of_opening_a_library(result, code):
    (finding,) = library_findings({"libatb.so": result}, {})
    assert finding.code == code


# -- torch and torch_npu --


def test_a_pair_of_the_table_has_no_findings():
    for row in VERSIONS:
        for torch, torch_npu in row.pairs:
            assert pair_findings(f"{torch}+cpu", torch_npu, row.name, PYTHON) == []


@pytest.mark.parametrize(
    ("torch", "torch_npu", "cann", "python", "code"),
    [
        ("2.13.0", "2.6.0", "8.2.RC1", PYTHON, "torch-pair-wrong"),
        ("2.13.0", "2.13.0", "8.2.RC1", PYTHON, "torch-npu-not-for-this-cann"),
        ("2.7.1", "2.7.1.dev20250724", "8.2.RC1", PYTHON, "torch-npu-not-for-this-cann"),
        (None, None, "8.2.RC1", PYTHON, "torch-npu-missing"),
        ("2.6.0", None, None, PYTHON, "torch-npu-missing"),
    ],
)
def test_a_wrong_pair_says_which_one_to_install(torch, torch_npu, cann, python, code):
    (finding,) = pair_findings(torch, torch_npu, cann, python)
    assert finding.code == code
    if cann:
        assert any("torch_npu==2.6.0" in line for line in finding.cure)


def test_the_table_of_versions_is_shown_where_it_matters(machine):
    machine.package("torch", torch_source(), "2.6.0")
    assert torch_section(machine).facts["for CANN 8.2.RC1"] == (
        "torch 2.6.0 with torch_npu 2.6.0; torch 2.5.1 with torch_npu 2.5.1.post1"
    )
    assert "for CANN 8.2.RC1" not in torch_section(machine, for_npu=False).facts


def test_a_python_that_torch_npu_has_no_package_for_is_the_wrong_one():
    finding = only(pair_findings("2.6.0", None, "8.2.RC1", (3, 12)), "wrong-python")
    assert "Python 3.12; torch_npu 2.6.0" in finding.found
    assert "conda create -n mooli python=3.11" in finding.cure[0]
    assert [f.code for f in pair_findings("2.9.0", None, "8.5.0", (3, 12))] == ["torch-npu-missing"]


@given(*[st.none() | st.text(max_size=30)] * 3)
def test_no_version_breaks_the_comparison(torch, torch_npu, cann):
    pair_findings(torch, torch_npu, cann, PYTHON)


LIBHCCL = "libhccl.so: cannot open shared object file: No such file or directory"


def test_torch_npu_without_cann_is_explained_and_torch_named_as_broken_too(machine):
    autoload = f"""
import os
if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0":
    try:
        raise ImportError({LIBHCCL!r})
    except ImportError as exc:
        raise RuntimeError("Failed to load the backend extension: torch_npu.") from exc
"""
    machine.package("torch", torch_source() + autoload, "2.6.0")
    machine.package("torch_npu", f"raise ImportError({LIBHCCL!r})", "2.6.0")
    section = torch_section(machine)
    assert section.facts["torch_npu"] == "2.6.0"
    assert set(codes(section)) == {"cann-library-not-found", "backend-extension-does-not-load"}
    assert "torch" in only(section, "backend-extension-does-not-load").backends


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (LIBHCCL, "cann-library-not-found"),
        ("libatb.so: cannot open shared object file", "atb-library-not-found"),
        ("libascend_hal.so: cannot open shared object file", "driver-library-not-found"),
        ("libop_plugin_atb.so: undefined symbol: _ZN3atb7Context", "versions-do-not-match"),
        ("Two accelerators cannot be used at the same time in PyTorch: npu and cuda", "two-accelerators"),
        ("ASCEND_OPP_PATH environment variable is not set", "cann-folder-wrong"),
        ("something else", "torch-npu-does-not-import"),
    ],
)
def test_an_import_of_torch_npu_that_fails_is_known_by_its_words(machine, said, code):
    machine.package("torch", torch_source(), "2.6.0")
    machine.package("torch_npu", f"raise ImportError({said!r})", "2.6.0")
    finding = only(torch_section(machine), code)
    assert finding.cure


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("SetPrecisionMode: error code is 500001", "cann-parts-missing"),
        ("EH9999: Inner Error!", "cann-parts-missing"),
        ("call aclnnInplaceZero failed, detail: error code is 561103", "kernels-do-not-fit-the-chip"),
        ("aclInit failed, error code is 507008", "device-not-usable-here"),
        ("507015, the vector core execution is abnormal: MTE DDR address out of range", "address-out-of-range"),
        ("NPU out of memory. Tried to allocate 2.00 GiB (NPU 0; 60.97 GiB total capacity", "npu-out-of-memory"),
        ("AclmdlRICaptureBegin error code is 207008", "graph-streams-exhausted"),
        ("nobody knows this", "npu-does-not-compute"),
    ],
)
def test_a_device_that_does_not_compute_is_known_by_its_words(machine, said, code):
    fails = f"def arange(n):\n    raise RuntimeError({said!r})\n"
    machine.package("torch", torch_source(npu=READY + fails), "2.6.0")
    machine.package("torch_npu", "", "2.6.0")
    machine.cann()
    section = torch_section(machine)
    assert code in codes(section)
    assert section.facts["npu"] == "Ascend910B3; 60.0 of 61.0 GiB free on the first"


def test_a_device_that_is_hidden_is_known(machine):
    hidden = "class npu:\n    is_available = staticmethod(lambda: False)\n"
    machine.package("torch", torch_source(npu=hidden), "2.6.0")
    machine.package("torch_npu", "", "2.6.0")
    assert "npu-not-visible" in codes(torch_section(machine))


def test_wrong_numbers_from_the_device_are_what_garbled_text_is_made_of(machine):
    wrong = """
import builtins
class T:
    def __init__(self, *a): pass
    def __getattr__(self, name): return lambda *a: self
    def __mod__(self, other): return self
    def __matmul__(self, other): return self
    def __sub__(self, other): return self
    def __float__(self): return 3.5
def arange(n): return T()
"""
    machine.package("torch", torch_source(npu=READY + wrong), "2.6.0")
    machine.package("torch_npu", "", "2.6.0")
    section = torch_section(machine)
    finding = only(section, "garbled-text")
    assert "3.5" in finding.found
    assert any("--dtype bfloat16" in line for line in finding.cure)


def test_a_crash_while_importing_is_a_finding(machine):
    machine.package("torch", torch_source(), "2.6.0")
    machine.package("torch_npu", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "2.6.0")
    assert "killed by SIGSEGV" in only(torch_section(machine), "torch-npu-does-not-import").found


def test_an_import_that_hangs_is_a_finding(machine):
    machine.package("torch", "import time\ntime.sleep(600)", "2.6.0")
    section = probe_torch(machine.surroundings(import_timeout_s=1.0), Cann(), PYTHON, is_wanted=True, for_npu=False)
    found = only(section, "torch-does-not-import").found
    assert "no answer within 1 s" in found


def test_a_torch_for_cuda_beside_torch_npu_is_the_wrong_one(machine):
    machine.package("torch", torch_source(cuda="12.4"), "2.6.0")
    machine.package("torch_npu", "", "2.6.0")
    assert "two-accelerators" in codes(torch_section(machine))


def test_an_old_torch_is_named(machine):
    machine.package("torch", torch_source("2.1.0"), "2.1.0")
    assert "torch-too-old" in codes(torch_section(machine, for_npu=False))


# -- texts --


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("answer: !!!!!!!!!!!!!!!!!!!!!!!!", "garbled-text"),
        ("request 7 failed: NaN in the logits", "garbled-text"),
        ("prefix cache hit gives different text", "cached-prefix-changes-text"),
        ("torch_npu detected, but NPU device is not available or visible.", "npu-not-visible"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "cuda-out-of-memory"),
        ("EI0006: Getting socket times out", "rank-is-missing"),
        ("561002: block_size should aligned to 16, but got 1", "page-size-not-aligned"),
    ],
)
def test_a_line_of_a_log_is_known(line, code):
    (finding,) = explain(f"before\n{line}\nafter")
    assert (finding.code, finding.found) == (code, line)


def test_codes_of_failures_are_unique_and_each_has_a_cure():
    names = [failure.code for failure in FAILURES]
    assert len(set(names)) == len(names)
    assert all(failure.cure and failure.cause for failure in FAILURES)


def test_a_quiet_log_has_no_findings():
    assert explain("step 1: 48 tokens, inference of 3 requests\nwow! nice!!\n") == []


@given(st.text())
def test_no_text_breaks_the_explanation(text):
    explain(text)
