"""What a slow disk under the KV cache does to steps. Runs engines in this process and prints a table.

One stream decodes all the time while prompts come one after another, new ones and some of before that have left memory:
they are written, and loaded or computed again. Beside a stream no step is longer than its prompts are let be. Each step
is timed: without a disk, with the disk as it is, and with a layer under the store that lets so many bytes a second
through, in both directions. The three take turns, each with a folder of its own.

    python benchmarks/slow_disk.py [--model FILE] [--mb-per-s 5] [--seconds 20] [--rounds 2]
"""

from __future__ import annotations

import argparse
import functools
import random
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from loaded import demo_model

from mooli import Engine
from mooli.cache.store.files import Buffer, Files
from mooli.cache.store.page_store import PageStore
from mooli.engine import disk

PROMPT_TOKENS = 512
POOL_TOKENS = 8192
"""So that the prompts of some seconds ago have left it."""

STREAM_TOKENS = 4096
"""More than are decoded in a run: while no stream is there, a step may take a whole prompt."""

NAMES = ("no disk", "this disk", "slow disk")


class SlowFiles(Files):
    """A disk of so many bytes a second in both directions."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self.num_bytes = 0

    def read(self, descriptor: int, num_bytes: int, offset: int) -> bytes:
        data = super().read(descriptor, num_bytes, offset)
        self._pass(len(data))
        return data

    def write(self, descriptor: int, data: Buffer, offset: int) -> int:
        written = super().write(descriptor, data, offset)
        self._pass(written)
        return written

    def _pass(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        time.sleep(num_bytes / self._bytes_per_s)


def timed_steps(engine: Engine) -> list[float]:
    """The seconds of each step from here on."""
    core = engine._core
    steps: list[float] = []
    step = core.step

    def timed() -> Any:
        started_s = time.perf_counter()
        try:
            return step()
        finally:
            steps.append(time.perf_counter() - started_s)

    core.step = timed  # type: ignore[method-assign]
    return steps


def run(model: str, folder: Path, bytes_per_s: float, seconds: float, seed: int) -> tuple[list[float], int]:
    """Of the steps and the bytes that went through the layer. bytes_per_s: 0 without a disk."""
    files = SlowFiles(bytes_per_s or 1.0)
    disk.PageStore = SimpleNamespace(open=functools.partial(PageStore.open, files=files))  # type: ignore[misc,assignment]
    where = str(folder / f"kv-{seed}-{bytes_per_s:g}") if bytes_per_s else "none"
    draw = random.Random(seed)
    prompts: list[list[int]] = []
    greedy = {"temperature": 0, "ignore_eos": True}
    options: dict[str, Any] = {"kv_cache_max_bytes": "8gi", "kv_cache_min_free_bytes": 0} if bytes_per_s else {}
    with Engine(
        model_path=model, max_total_tokens=POOL_TOKENS, kv_cache_dir=where, log_level="error", **options
    ) as engine:
        engine.generate(input_ids=[5] * 600, sampling_params={**greedy, "max_new_tokens": 4})
        has_begun, is_over = threading.Event(), threading.Event()

        def decode() -> None:
            sampling = {**greedy, "max_new_tokens": STREAM_TOKENS}
            for _ in engine.generate(input_ids=[7] * 8, sampling_params=sampling, stream=True):
                has_begun.set()
                if is_over.is_set():
                    return

        stream = threading.Thread(target=decode)
        stream.start()
        has_begun.wait(60)
        steps = timed_steps(engine)
        ends_s = time.perf_counter() + seconds
        while time.perf_counter() < ends_s:
            if len(prompts) > 24 and draw.random() < 0.3:
                ids = draw.choice(prompts[:-20])
            else:
                ids = [draw.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS)]
                prompts.append(ids)
            engine.generate(input_ids=ids, sampling_params={**greedy, "max_new_tokens": 2})
        measured = steps.copy()
        if not stream.is_alive():
            raise SystemExit(f"the stream of {STREAM_TOKENS} tokens ended before the measurement: take fewer --seconds")
        is_over.set()
        stream.join()
    return measured, files.num_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--mb-per-s", type=float, default=5.0, help="of the slow disk")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", help="where the cache lies meanwhile; default: beside temporary files")
    args = parser.parse_args()
    model = args.model or str(demo_model())
    folder = Path(tempfile.mkdtemp(prefix="mooli-slow-disk-", dir=args.folder))
    try:
        for number in range(args.rounds):
            for name, speed in zip(NAMES, (0.0, 1e12, args.mb_per_s * 1e6), strict=True):
                steps, num_bytes = run(model, folder, speed, args.seconds, number)
                ms = sorted(1000 * step for step in steps)
                print(
                    f"{name:10} {len(ms):5} steps: median {statistics.median(ms):6.2f} ms,"
                    f" p99 {ms[int(0.99 * len(ms))]:7.2f}, longest {ms[-1]:7.2f};"
                    f" {num_bytes / 1e6:7.1f} MB through the layer",
                    flush=True,
                )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
