"""The table of npu-smi, of every layout, and of none."""

from __future__ import annotations

import npu_tables as tables
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooli.doctor.npu import Chip, NpuProcess, parse_npu_smi

ALL = [tables.ATLAS_A2, tables.ATLAS_A3, tables.ATLAS_300I, tables.DRIVER_26, tables.ASCEND_950, tables.FIRST_910]


def test_an_atlas_a2_has_one_chip_to_a_card():
    table = parse_npu_smi(tables.ATLAS_A2)
    assert (table.tool, table.driver) == ("24.1.0.3", "24.1.0.3")
    assert table.chips[0] == Chip(
        npu=0, chip=0, name="910B3", health="OK", bus_id="0000:C1:00.0", power_w=96.4, temperature_c=37.0,
        aicore_percent=3.0, memory_used_mib=0, memory_total_mib=0, hbm_used_mib=3397, hbm_total_mib=65536,
    )  # fmt: skip
    assert (table.chips[1].health, table.chips[1].used_mib) == ("Alarm", 57783)
    assert table.processes == (NpuProcess(npu=1, chip=0, pid=485946, name="python3.11", memory_mib=54320),)


def test_an_atlas_a3_has_two_chips_to_a_card_and_numbers_them_for_programs():
    chips = parse_npu_smi(tables.ATLAS_A3).chips
    assert [(chip.npu, chip.chip, chip.device) for chip in chips] == [(0, 0, 0), (0, 1, 1), (1, 0, 2)]
    assert [chip.power_w for chip in chips] == [166.5, None, 168.1]
    assert [chip.used_mib for chip in chips] == [3131, 2886, 3125]


def test_a_310p_has_no_hbm():
    chips = parse_npu_smi(tables.ATLAS_300I).chips
    assert [(chip.npu, chip.chip, chip.used_mib, chip.total_mib) for chip in chips] == [
        (8, 0, 1765, 21527),
        (8, 1, 1502, 21527),
    ]
    assert chips[0].power_w is None
    assert chips[0].hbm_total_mib is None


def test_a_newer_driver_names_processes_in_containers():
    table = parse_npu_smi(tables.DRIVER_26)
    assert (table.driver, table.chips[0].total_mib) == ("26.0.rc1", 32768)
    assert [(p.pid, p.memory_mib, p.container_pid) for p in table.processes] == [
        (485946, 5175, None),
        (485947, 100, 17),
    ]


def test_a_newer_card_has_a_column_for_its_number():
    table = parse_npu_smi(tables.ASCEND_950)
    (chip,) = table.chips
    assert (chip.npu, chip.name, chip.bus_id, chip.used_mib, chip.total_mib) == (3, "Ascend950PR", "NA", 1024, 131072)
    assert [(p.npu, p.pid) for p in table.processes] == [(3, 1001)]


def test_an_old_card_holds_models_in_hbm_too():
    (chip,) = parse_npu_smi(tables.FIRST_910).chips
    assert (chip.memory_used_mib, chip.used_mib, chip.total_mib) == (1823, 1, 32768)


def test_what_a_driver_prints_before_the_table_is_passed_over():
    text = "DrvMngGetConsoleLogLevel failed. (g_conLogLevel=3)\n" + tables.ATLAS_A2
    assert parse_npu_smi(text) == parse_npu_smi(tables.ATLAS_A2)


def test_a_quoted_table_is_read_too():
    text = "".join(f"> {line}\n" for line in tables.ATLAS_A3.splitlines())
    assert parse_npu_smi(text).chips == parse_npu_smi(tables.ATLAS_A3).chips


@pytest.mark.parametrize("text", ["", "dcmi module initialize failed. ret is -8005", "|" * 10_000, "| 0 x |\n" * 99])
def test_garbage_has_no_chips(text):
    assert parse_npu_smi(text).chips == ()


@given(
    st.text()
    | st.lists(st.sampled_from(["|", "0", "9" * 30, "910B", " / ", "\n", "OK", "0000:C1:00.0", "٣"])).map("".join)
)
def test_no_text_breaks_the_parser(text):
    parse_npu_smi(text)


@given(st.sampled_from(ALL), st.data())
def test_a_damaged_table_does_not_break_the_parser(text, data):
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 40)))
        text = text[:start] + data.draw(st.text(max_size=8)) + text[end:]
    for chip in parse_npu_smi(text).chips:
        assert chip.npu >= 0
        assert chip.total_mib is None or chip.total_mib >= 0
