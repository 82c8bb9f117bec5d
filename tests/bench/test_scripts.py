"""The scripts of benchmarks/ start, and the one that times steps runs to its end: what they say is not looked at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "ArgumentParser" in path.read_text(encoding="utf-8")
]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_a_script_says_how_it_is_used(script: Path) -> None:
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


def test_steps_are_timed_to_the_end() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--seconds", "0.05", "--models", "smollm2"]
    done = subprocess.run([*command, "--formats", "file"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "decode 16" in done.stdout and "batch-1 decode step" in done.stdout
