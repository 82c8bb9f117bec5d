"""What a busy neighbour costs: steps of a model alone, and beside a process that takes half of one processor.

A neighbour that takes half of one of two processors leaves three quarters of the machine, so the fair price is a factor
of 0.75. More than that is lost where threads wait for one that does not run. Alone and beside alternate.

    python benchmarks/neighbour.py [--seconds 5] [--rounds 3] [--share 0.5]
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from typing import Any

import numpy as np
from loaded import PAGE_SIZE, Loaded, compared_model, demo_model

PERIOD_S = 0.02


def neighbour(share: float) -> None:
    """Compute for `share` of every period, sleep for the rest, until killed."""
    while True:
        start = time.perf_counter()
        while time.perf_counter() - start < share * PERIOD_S:
            pass
        time.sleep((1 - share) * PERIOD_S)


def steps_per_s(loaded: Loaded, batch: Any, seconds: float) -> float:
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        loaded.runner.execute(batch)
        count += 1
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.5, help="of one processor, that the neighbour takes")
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    for name, path in (("SmolLM2-135M", demo_model()), ("Qwen2.5-Coder-0.5B", compared_model())):
        loaded = Loaded(path, "cpu")
        loaded.backend.bind_thread()
        ids = np.random.default_rng(0).integers(0, loaded.config.vocab_size, 512)
        loaded.runner.execute(loaded.step([(0, 512, list(range(16)))], ids))
        for label, batch in (
            ("prompt of 512 tokens", loaded.step([(0, 512, list(range(16)))], ids)),
            ("decode of one row", loaded.step([(512, 1, list(range(512 // PAGE_SIZE + 1)))], ids[:1])),
        ):
            loaded.runner.execute(batch)
            ratios = []
            for _ in range(arguments.rounds):
                alone = steps_per_s(loaded, batch, arguments.seconds)
                process = spawn.Process(target=neighbour, args=(arguments.share,), daemon=True)
                process.start()
                time.sleep(1.0)  # until it computes
                beside = steps_per_s(loaded, batch, arguments.seconds)
                process.kill()
                process.join()
                ratios.append(beside / alone)
            print(
                f"{name}, {label}: beside the neighbour {statistics.median(ratios):.2f} of the speed alone "
                f"({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
