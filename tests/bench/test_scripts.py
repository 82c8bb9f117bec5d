"""The scripts of benchmarks/ start, and the one that times steps runs to its end: what they say is not looked at."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "ArgumentParser" in path.read_text(encoding="utf-8")
]

pytestmark = pytest.mark.slow


HELP_OF_EACH = """
import os, runpy, sys

import numpy, mooli  # once for all: each script runs in a copy of this process

sys.path.insert(0, sys.argv[1])
for script in sys.argv[2:]:
    pid = os.fork()
    if not pid:
        sys.argv = [script, "--help"]
        runpy.run_path(script, run_name="__main__")
        sys.exit()
    _, status = os.waitpid(pid, 0)
    print("status", os.waitstatus_to_exitcode(status), flush=True)
"""


def test_each_script_says_how_it_is_used() -> None:
    command = [sys.executable, "-c", HELP_OF_EACH, str(ROOT / "benchmarks"), *map(str, COMMANDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = re.split(r"^status (\S+)\n", done.stdout, flags=re.MULTILINE)
    assert len(told) == 2 * len(COMMANDS) + 1
    for script, text, status in zip(COMMANDS, told[::2], told[1::2], strict=False):
        assert (status, text[:6]) == ("0", "usage:"), f"{script}: {text}\n{done.stderr}"


def test_steps_are_timed_to_the_end() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--seconds", "0.05", "--models", "smollm2"]
    done = subprocess.run([*command, "--formats", "file"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "decode 16" in done.stdout and "batch-1 decode step" in done.stdout
