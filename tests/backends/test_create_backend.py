"""Choosing a backend by name: the right one, or an error that says what to do; never another one."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys

import pytest

from mooli.backends import create_backend
from mooli.backends.base import CacheSpec, PagedLayer
from mooli.config import ABILITIES
from mooli.errors import BackendUnavailableError, ConfigError


def test_a_backend_is_made_by_its_name(backend_name: str) -> None:
    backend = create_backend(backend_name)
    assert backend.name == backend_name
    backend.close()


def test_a_backend_can_what_is_said_of_it_before_it_is_loaded(backend_name: str) -> None:
    ability, backend = ABILITIES[backend_name], create_backend(backend_name)
    spec = CacheSpec((PagedLayer(2, 32),), backend.default_page_size, "int8")
    if ability.has_int8_kv:
        assert backend.kv_bytes_per_page(spec) > 0
    else:
        with pytest.raises(ConfigError, match="int8"):
            backend.kv_bytes_per_page(spec)
    assert hasattr(backend, "join") == ability.has_ranks
    assert ability.verifies_guesses or not backend.is_exact, "guesses are on by default where answers are exact"
    backend.close()


@pytest.mark.parametrize("name", ["torch", "cuda"])
@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_without_torch_an_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, name: str, error: type[Exception]
) -> None:
    def fail(module: str) -> None:
        raise error("libtorch_cpu.so: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(BackendUnavailableError, match=r"libtorch_cpu.so.*pip install mooli\[torch\]"):
        create_backend(name)


def test_an_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'abacus'.*cpu, reference"):
        create_backend("abacus")


def test_a_native_module_that_does_not_load_is_an_error_not_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(BackendUnavailableError, match=r"'cpu' does not load: no mooli.backends.cpu.*Reinstall"):
        create_backend("cpu")


def test_naming_backends_imports_none_of_them() -> None:
    code = "import sys, mooli.backends; print([m for m in sys.modules if m.startswith('mooli.backends.')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    vocabulary = {"mooli.backends.base", "mooli.backends.latent", "mooli.backends.routing"}
    assert set(ast.literal_eval(result.stdout)) == vocabulary
