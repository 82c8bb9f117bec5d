"""`mooli batch` as users start it: killed again and again, with an engine of its own too, and a long file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import PATIENCE_S, needs_demo

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "batch.py"


def run(*words):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False, timeout=4 * PATIENCE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_no_kill_loses_or_doubles_a_row_and_the_results_are_the_same_bytes():
    assert "8 kills" in run("kills", "--rows", "60", "--kills", "8")


@needs_demo
@pytest.mark.whole_machine
@pytest.mark.slow
def test_the_same_holds_with_an_engine_of_its_own():
    said = run("kills", "--rows", "24", "--kills", "2", "--model", "demo")
    assert "2 kills" in said and "the same bytes" in said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the most memory is told in other units")
def test_memory_does_not_grow_with_the_file():
    most = [
        int(re.search(r"most memory (\d+) MiB", run("million", "--rows", str(count)))[1]) for count in (500, 40_000)
    ]
    # Of 40,000 rows, some hundred bytes each as text, lists and dicts would take 60 MiB.
    assert most[1] - most[0] < 35
