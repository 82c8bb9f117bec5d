"""A program that forks children which append to a store of pages and to one of larger states, kills them, and checks
what they have left: `killed_stores.py FOLDER`. A process of its own, as one with threads should not fork."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cache_files import ROOT, chain, found, open_store, page_after

CHAINS = [chain(number, 6) for number in range(40)]
STATES = [[page_after(ROOT, 0, f"state {number}", 1000)] for number in range(40)]
OTHER = {"namespace": bytes(32), "page_bytes": 1000}


def append_all(folder: Path, told: int) -> None:
    """Tells a byte for each chain that is in the store."""
    store, states = open_store(folder), open_store(folder, **OTHER)
    for pages, state in zip(CHAINS, STATES, strict=True):
        store.append(pages)
        states.append(state)
        os.write(told, b".")
    os.write(told, b"!")
    signal.pause()


def main() -> None:
    draw = random.Random(1)
    folder = Path(sys.argv[1]) / "kv"
    killed = 0
    for number in range(30):
        if number % 6 == 0:
            folder = Path(sys.argv[1]) / f"kv {number}"
        wanted = draw.randrange(1, 40)
        ear, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ear)
            append_all(folder, told)
        os.close(told)
        heard = 0
        while heard < wanted:
            heard += len(os.read(ear, wanted - heard))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        while data := os.read(ear, 100):
            heard += len(data.replace(b"!", b""))
        os.close(ear)
        with open_store(folder) as store, open_store(folder, **OTHER) as states:
            assert store.stats.is_writer and states.stats.is_writer
            for pages, state in zip(CHAINS[:heard], STATES[:heard], strict=True):
                assert found(store, pages) == 6 and found(states, state) == 1
            for pages, state in zip(CHAINS[heard:], STATES[heard:], strict=True):
                found(store, pages)
                found(states, state)
    print(killed, "killed")


if __name__ == "__main__":
    main()
