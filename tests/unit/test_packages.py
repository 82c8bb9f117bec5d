"""What is in which package: Mooli's has no simulator, and the simulator needs nothing of Mooli."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SIMULATOR = "mooli_simulate_ascend"
THE_ONE_PLACE = Path("src/mooli/backends/ascend/bring_up.py")


def test_moolis_package_is_src_mooli_alone() -> None:
    packages = re.findall(r"^wheel\.packages = (.*)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert packages == ['["src/mooli"]']
    assert not [path for path in (ROOT / "src").rglob("*") if path.is_dir() and path.name.startswith("sim")]


def test_one_place_of_mooli_names_the_simulator_and_none_imports_it() -> None:
    naming = [
        path.relative_to(ROOT) for path in (ROOT / "src").rglob("*.py") if SIMULATOR in path.read_text(encoding="utf-8")
    ]
    assert naming == [THE_ONE_PLACE]
    source = (ROOT / THE_ONE_PLACE).read_text(encoding="utf-8")
    assert source.count(SIMULATOR) == 1 and source.count("import_module(SIMULATOR)") == 1


def test_the_simulator_needs_nothing_of_mooli() -> None:
    modules = list((ROOT / "simulate" / SIMULATOR).glob("*.py"))
    assert len(modules) > 20
    for path in modules:
        assert not re.search(r"^\s*(from|import) mooli\b", path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_an_installed_mooli_has_no_file_of_the_simulator() -> None:
    try:
        files = importlib.metadata.files("mooli") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mooli is not installed")
    place = next((file for file in files if str(file) == str(THE_ONE_PLACE.relative_to("src"))), None)
    if place is None or SIMULATOR not in Path(place.locate()).read_text(encoding="utf-8"):
        pytest.skip("another tree than this one is installed")
    assert not [str(file) for file in files if "/sim/" in str(file) or "simulate" in str(file)]
