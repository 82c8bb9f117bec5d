"""The engine's process in its first moments."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from mooli.engine.child import EngineChild


def mask() -> set[signal.Signals | int]:
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, []))


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"))


def test_a_process_that_is_not_needed_ends_with_the_block() -> None:
    before = num_open_files()
    with pytest.raises(ValueError, match="no such model"), EngineChild() as child:
        raise ValueError("no such model")
    assert child._process.returncode == -signal.SIGKILL
    assert num_open_files() == before


def test_a_process_that_was_taken_is_the_takers() -> None:
    with EngineChild() as child:
        process, connection = child.take()
    with connection:
        assert process.poll() is None
    assert process.wait(60) == 0


def test_what_cannot_be_started_leaves_nothing() -> None:
    before = num_open_files(), mask()
    with pytest.raises(FileNotFoundError):
        EngineChild(("/no/such/program",))
    assert (num_open_files(), mask()) == before


SIGNALLED = """
import os, signal, sys, tempfile
from mooli.engine import child, ranks
words = (str(os.getpid()), tempfile.mkdtemp()) if sys.argv[1] == "rank" else ()
process, connection = child.start_child(ranks.COMMAND if words else child.COMMAND, *words)
for number in (signal.SIGINT, signal.SIGTERM):
    os.kill(process.pid, number)
connection.close()
print(process.wait(60) >= 0)
"""


@pytest.mark.parametrize("kind", ["engine", "rank"])
def test_signals_before_it_can_ignore_them_are_ignored_too(kind: str) -> None:
    done = subprocess.run([sys.executable, "-c", SIGNALLED, kind], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_starting_one_leaves_this_process_its_signals() -> None:
    before = mask()
    with EngineChild():
        assert mask() == before
