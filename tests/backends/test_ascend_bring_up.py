"""From a machine to an open NPU: versions, what is missing and how to cure it, the simulated device."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from typing import Any

import pytest
import torch

from mooli.backends import create_backend
from mooli.backends.ascend import bring_up
from mooli.backends.ascend.bring_up import open_npu, simulated_profile
from mooli.backends.ascend.versions import Versions, cann_release
from mooli.errors import BackendUnavailableError, ConfigError


@pytest.fixture(autouse=True)
def _no_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOOLI_SIMULATE_ASCEND", raising=False)


# -- versions --


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("8.2.RC1", (8, 2)),
        ("8.5.0", (8, 5)),
        ("CANN-8.3.RC2", (8, 3)),
        ("9.1", (9, 1)),
        ("unknown", None),
        ("", None),
    ],
)
def test_the_release_is_read_from_a_version(text: str, release: tuple[int, int] | None) -> None:
    assert cann_release(text) == release


@pytest.mark.parametrize(("cann", "release"), [("8.1.RC1", (8, 2)), ("unknown", (8, 2)), ("8.5.0", (8, 5))])
def test_an_old_or_unknown_release_counts_as_the_strictest(cann: str, release: tuple[int, int]) -> None:
    assert Versions("Ascend910B3", cann, "2.6.0", "2.6.0", "0", False).release == release


def test_a_simulated_device_is_called_so() -> None:
    real, simulated = (Versions("Ascend910B3", "8.2.RC1", "2.6.0", "2.6.0", "0", s) for s in (False, True))
    assert str(simulated) == f"SIMULATED {real}"
    assert simulated.key != real.key


# -- what is missing --


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A torch_npu that has found a device."""
    api = types.SimpleNamespace(
        is_available=lambda: True,
        current_device=lambda: 0,
        set_device=lambda _: None,
        set_compile_mode=lambda **_: None,
        config=types.SimpleNamespace(),
        get_device_name=lambda _: "Ascend910B4",
        utils=types.SimpleNamespace(get_cann_version=lambda _: "8.2.RC1"),
    )
    atb = types.SimpleNamespace(_register_atb_extensions=lambda: None)
    module = types.SimpleNamespace(
        __version__="2.6.0", npu=api, op_plugin=types.SimpleNamespace(atb=types.SimpleNamespace(_atb_ops=atb))
    )
    monkeypatch.setitem(sys.modules, "torch_npu", module)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.version, "cann", None, raising=False)
    monkeypatch.setattr(torch, "device", lambda name: name)
    return module


def test_a_device_is_opened_and_named(torch_npu: Any) -> None:
    npu = open_npu()
    assert str(npu.versions).startswith("Ascend910B4, CANN 8.2.RC1, torch_npu 2.6.0")
    assert not npu.is_simulated
    assert torch_npu.npu.config.allow_internal_format is True


def test_without_a_device_the_error_says_where_to_look(torch_npu: Any) -> None:
    torch_npu.npu.is_available = lambda: False
    with pytest.raises(BackendUnavailableError, match=r"no NPU.*npu-smi info.*ASCEND_RT_VISIBLE_DEVICES"):
        open_npu()


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        ("libhccl.so: cannot open shared object file: No such file or directory", r"set_env\.sh"),
        ("libascendcl.so: cannot open shared object file", r"set_env\.sh"),
        ("libascend_hal.so: cannot open shared object file", r"driver into the container.*npu-smi"),
        ("/x/libop_plugin_atb.so: undefined symbol: _ZN3atb", r"not of the same release.*torch_npu 2\.6\.0"),
        ("ASCEND_OPP_PATH environment variable is not set", r"set_env\.sh"),
        ("something new", "mooli doctor"),
    ],
)
@pytest.mark.parametrize("kind", [ImportError, RuntimeError, Exception], ids=lambda kind: kind.__name__)
def test_a_torch_npu_that_does_not_load_is_explained(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], error: str, cure: str
) -> None:
    def fail(name: str) -> None:
        raise kind(error)

    monkeypatch.setattr(bring_up.importlib, "import_module", fail)
    with pytest.raises(BackendUnavailableError, match=cure) as raised:
        open_npu()
    assert error in str(raised.value)


@pytest.mark.parametrize("error", [OSError("libatb.so: cannot open shared object file"), OSError("nnal package")])
def test_without_nnal_the_error_names_it(torch_npu: Any, error: OSError) -> None:
    def fail() -> None:
        raise error

    torch_npu.op_plugin.atb._atb_ops._register_atb_extensions = fail
    with pytest.raises(BackendUnavailableError, match=r"NNAL.*nnal/atb/set_env\.sh"):
        open_npu()


def test_a_simulated_module_is_not_taken_for_the_real_one(torch_npu: Any) -> None:
    torch_npu.__simulated__ = True
    with pytest.raises(BackendUnavailableError, match=r"simulated one.*MOOLI_SIMULATE_ASCEND=1"):
        open_npu()


def run_python(code: str, **environ: str) -> str:
    cleared = {name: value for name, value in os.environ.items() if not name.startswith("MOOLI_")}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**cleared, **environ}, check=True
    )
    return result.stdout


ASK = """
import mooli
from mooli.backends import create_backend
try: create_backend("ascend")
except mooli.BackendUnavailableError as exc: print(exc)
"""


def test_without_torch_npu_the_error_says_what_to_install() -> None:
    hide = "import sys; sys.modules['torch_npu'] = None\n"
    assert "torch==2.6.0 torch_npu==2.6.0" in run_python(hide + ASK)


def test_a_torch_that_does_not_load_is_explained() -> None:
    hide = "import sys; sys.modules['torch'] = None\n"
    assert "pip install torch==2.6.0 torch_npu==2.6.0" in run_python(hide + ASK)


def test_the_package_imports_no_torch() -> None:
    code = "import sys, mooli.backends.ascend, mooli.backends.ascend.command; print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"


# -- the switch --


@pytest.mark.parametrize(
    ("given", "profile"), [("", None), ("0", None), ("1", "8.2"), ("8.2", "8.2"), ("8.3", "8.3"), ("8.5", "8.5")]
)
def test_the_switch_names_a_version(monkeypatch: pytest.MonkeyPatch, given: str, profile: str | None) -> None:
    monkeypatch.setenv("MOOLI_SIMULATE_ASCEND", given)
    assert simulated_profile() == profile


def test_a_switch_with_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOOLI_SIMULATE_ASCEND", "yes")
    with pytest.raises(ConfigError, match=r"MOOLI_SIMULATE_ASCEND=yes.*8\.2"):
        create_backend("ascend")


def test_without_the_simulator_the_error_says_where_it_is() -> None:
    hide = "import sys; sys.modules['mooli_simulate_ascend'] = None\n"
    said = run_python(hide + ASK, MOOLI_SIMULATE_ASCEND="1")
    assert "MOOLI_SIMULATE_ASCEND is set" in said and "pip install ./simulate" in said


def test_without_the_switch_the_simulator_is_not_imported() -> None:
    asked = ASK + "import sys; print([name for name in sys.modules if 'simulate' in name])"
    assert run_python(asked).splitlines()[-1] == "[]"
