"""The soak of `make soak`, in its short form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from server_process import needs_demo, needs_proc

pytestmark = [needs_demo, needs_proc, pytest.mark.whole_machine]

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


def test_a_server_under_several_times_its_capacity_keeps_its_books():
    command = [sys.executable, str(SCRIPT), "--seconds", "25", "--clients", "64", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    for kind in ("answered", "streamed", "client left", "refused 503", "nonsense refused"):
        assert f"'{kind}': " in done.stdout
