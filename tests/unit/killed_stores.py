"""A program that forks children which append to a store, kills them, and checks what they have left: `killed_stores.py
FOLDER`. A process of its own, as one with threads should not fork."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cache_files import chain, found, open_store

CHAINS = [chain(number, 6) for number in range(40)]


def append_all(folder: Path, told: int) -> None:
    """Tells a byte for each chain that is in the store."""
    store = open_store(folder)
    for pages in CHAINS:
        store.append(pages)
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
        with open_store(folder) as store:
            assert store.stats.is_writer
            for pages in CHAINS[:heard]:
                assert found(store, pages) == 6
            for pages in CHAINS[heard:]:
                found(store, pages)
    print(killed, "killed")


if __name__ == "__main__":
    main()
