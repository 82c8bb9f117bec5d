"""The self-test: all agrees on a sound device, a fault is found, named and walked around, the result is kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mooli import cli
from mooli.backends import create_backend
from mooli.backends.ascend import selftest, selftest_record
from mooli.backends.ascend.bring_up import Npu, open_npu
from mooli.backends.ascend.selftest import Outcome, run_selftest, switches_of
from mooli.errors import ConfigError
from variants import simulated_npu


@pytest.fixture(autouse=True)
def _kept_here(tmp_path: Path) -> Iterator[None]:
    with simulated_npu() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path))
        patch.delenv("MOOLI_SELFTEST")
        yield


def simulated(monkeypatch: pytest.MonkeyPatch, profile: str = "8.2") -> Npu:
    monkeypatch.setenv("MOOLI_SIMULATE_ASCEND", profile)
    return open_npu()


@pytest.mark.parametrize("profile", ["8.2", "8.3", "8.5"])
def test_a_sound_device_agrees_everywhere(monkeypatch: pytest.MonkeyPatch, profile: str) -> None:
    outcomes = run_selftest(simulated(monkeypatch, profile))
    assert [outcome for outcome in outcomes if outcome.failure] == []
    names = {outcome.name.split()[0] for outcome in outcomes}
    assert names >= {
        "npu_rms_norm",
        "npu_rotary_mul",
        "npu_swiglu",
        "w8a8",
        "npu_grouped_matmul",
        "_npu_reshape_and_cache",
        "graphs",
    }
    assert names >= {"qlens", "fia_bsh", "fia_decode", "paged_attention", "page_reuse"}
    assert ({"fia_tnd", "token_reuse"} <= names) == (profile != "8.2")


def shifted(original: Callable[..., Any]) -> Callable[..., Any]:
    """An operation whose results are a little too large."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if result is None:
            kwargs["out"].mul_(1.1)
            return None
        return [x * 1.1 for x in result] if isinstance(result, (tuple, list)) else result * 1.1

    call.default = original.default  # type: ignore[attr-defined]  # by which the simulation knows it
    return call


def raising(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("aclnn error 561103\nand a long trace")

    return call


@pytest.mark.parametrize("fault", [shifted, raising])
@pytest.mark.parametrize(
    ("namespace", "operation", "name"),
    [
        ("npu", "npu_rms_norm", "npu_rms_norm"),
        ("npu", "npu_swiglu", "npu_swiglu"),
        ("npu", "npu_rotary_mul", "npu_rotary_mul"),
        ("npu", "npu_quant_matmul", "w8a8"),
        ("npu", "npu_grouped_matmul", "npu_grouped_matmul"),
        ("atb", "_npu_paged_attention", "paged_attention"),
        ("atb", "_npu_flash_attention_qlens", "qlens"),
    ],
)
def test_a_fault_is_found_and_named(
    monkeypatch: pytest.MonkeyPatch, fault: Any, namespace: str, operation: str, name: str
) -> None:
    npu = simulated(monkeypatch)
    where = getattr(torch.ops, namespace)
    monkeypatch.setattr(where, operation, fault(getattr(where, operation)))
    # The small model costs most of the time and is tested for itself.
    monkeypatch.setattr(selftest, "_model_checks", lambda *_: iter(()))
    off = switches_of(run_selftest(npu)).off
    assert {key.split()[0] for key in off} == {name}
    assert all("561103" in why if fault is raising else "off by" in why for why in off.values()), off
    assert not any("trace" in why for why in off.values())


def test_graphs_that_keep_old_lengths_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    npu = simulated(monkeypatch)
    monkeypatch.setattr(npu.api.NPUGraph, "update", lambda self, cpu_update_input: None)
    monkeypatch.setattr(selftest, "_attention_checks", lambda *_: iter(()))
    off = switches_of(run_selftest(npu)).off
    assert set(off) == {"graphs"}


def test_what_is_off_is_walked_around(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    npu = simulated(monkeypatch)
    where = torch.ops.npu
    monkeypatch.setattr(where, "npu_swiglu", raising(where.npu_swiglu))
    for checks in ("_attention_checks", "_model_checks"):
        monkeypatch.setattr(selftest, checks, lambda *_: iter(()))
    with caplog.at_level(logging.WARNING, logger="mooli"):
        backend = create_backend("ascend", dtype="float16")
    assert list(backend.describe()["switched_off"]) == ["npu_swiglu"]
    assert "the self-test switched npu_swiglu off" in caplog.text
    assert npu.versions.key in selftest_record.record_path(npu.versions).read_text()


# -- when it runs --


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Npu]:
    """Each run of a self-test that finds one fault."""
    seen: list[Npu] = []

    def pretend(npu: Npu) -> list[Outcome]:
        seen.append(npu)
        return [Outcome("qlens", "rows", "rows: off by 1", 1.0), Outcome("w8a8", "rows", "", 0.0)]

    monkeypatch.setattr(selftest, "run_selftest", pretend)
    return seen


def test_it_runs_once_for_each_set_of_versions(monkeypatch: pytest.MonkeyPatch, runs: list[Npu]) -> None:
    for profile, expected in (("8.2", 1), ("8.2", 1), ("8.5", 2), ("8.2", 2), ("8.5", 2)):
        simulated(monkeypatch, profile)
        described = create_backend("ascend").describe()
        assert described["switched_off"] == {"qlens": "rows: off by 1"}
        assert len(runs) == expected


@pytest.mark.parametrize(("switch", "expected", "off"), [("0", 0, []), ("1", 2, ["qlens"])])
def test_it_can_be_skipped_and_repeated(
    monkeypatch: pytest.MonkeyPatch, runs: list[Npu], switch: str, expected: int, off: list[str]
) -> None:
    monkeypatch.setenv("MOOLI_SELFTEST", switch)
    for _ in range(2):
        assert list(create_backend("ascend").describe()["switched_off"]) == off
    assert len(runs) == expected


def test_another_value_of_the_switch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOOLI_SELFTEST", "maybe")
    with pytest.raises(ConfigError, match="MOOLI_SELFTEST=maybe"):
        create_backend("ascend")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"off": 3, "versions": "x"}', '{"off": {}, "versions": "another"}'])
def test_a_file_that_is_damaged_or_of_something_else_counts_for_nothing(
    monkeypatch: pytest.MonkeyPatch, runs: list[Npu], text: str
) -> None:
    path = selftest_record.record_path(simulated(monkeypatch).versions)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    create_backend("ascend")
    assert len(runs) == 1
    assert json.loads(path.read_text())["off"] == {"qlens": "rows: off by 1"}


def test_a_folder_that_cannot_be_written_is_no_error(
    monkeypatch: pytest.MonkeyPatch, runs: list[Npu], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mooli").write_text("a file where the folder would be")
    create_backend("ascend")
    assert len(runs) == 1
    assert "cannot be kept" in caplog.text


# -- the command --


def test_the_command_prints_a_table_and_says_simulated(
    monkeypatch: pytest.MonkeyPatch, runs: list[Npu], capsys: pytest.CaptureFixture[str]
) -> None:
    simulated(monkeypatch)
    assert cli.main(["selftest", "--device", "npu"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("SIMULATED Ascend910B3, CANN 8.2")
    assert "qlens" in out and "differs" in out and "rows: off by 1" in out
    assert "1 graph replay" in out and "1 copy back" in out
    assert "SIMULATED: this shows" in out


def test_without_a_device_the_command_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOOLI_SIMULATE_ASCEND", "0")
    monkeypatch.setitem(__import__("sys").modules, "torch_npu", None)
    assert cli.main(["selftest"]) == 2
    assert "torch==2.6.0 torch_npu==2.6.0" in capsys.readouterr().err
