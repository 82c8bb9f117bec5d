"""Speed of whole steps on this machine, beside the machine's own limits measured in the same second.

Prints, for each model and weight format, prefill of 512 tokens and decode of 1, 4 and 16 rows at context 512. Virtual
machines change speed from second to second: every timed step is bracketed by a 0.2 ms gauge of the integer units, and
only steps with both readings healthy count. The gauge multiplies 8-bit weights; with AVX2 alone those of 4 bits take
half the instructions and may pass it. Run with nothing else on the machine.

    python benchmarks/kernels.py [--seconds 3] [--models smollm2,qwen] [--formats file,int8,int4,bfloat16]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from loaded import PAGE_SIZE, REAL_MODELS, Loaded, demo_model, real_model

from mooli import _native

HEALTHY = 0.92
"""Share of the best gauge reading that counts as a full machine."""


class Gauge:
    """What the machine gives right now: integer operations a second, bytes read a second."""

    best = 0.0
    """Of all gauges: a model measured while the machine is slow must not take that for healthy."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.region = _native.FloatBuffer((256 << 20) // 4)
        self.region.array()[:] = 1.0
        Gauge.best = max(self.best, *(self.dots() for _ in range(50)))

    def dots(self) -> float:
        return 2 * self.device.gauge_dots(600_000)

    def read_bytes_per_s(self) -> float:
        return max(self.device.gauge_read(self.region) for _ in range(3))


def timed(gauge: Gauge, step: Callable[[], Any], seconds: float) -> tuple[float, int, int]:
    """(median time of healthy runs, number of healthy runs, number of runs); of all runs if none was healthy."""
    healthy, every = [], []
    step()
    end = time.perf_counter() + seconds
    before = gauge.dots()
    while time.perf_counter() < end or (len(healthy) < 3 and time.perf_counter() < end + 3 * seconds):
        start = time.perf_counter()
        step()
        took = time.perf_counter() - start
        after = gauge.dots()
        every.append(took)
        if min(before, after) > HEALTHY * gauge.best:
            healthy.append(took)
        before = after
    return statistics.median(healthy or every), len(healthy), len(every)


def matrix_values(loaded: Loaded, *, head: bool) -> int:
    """Weights multiplied per token: each is two operations."""
    c = loaded.config
    qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    layer = c.hidden_size * (qkv + c.num_heads * c.head_dim + 3 * c.intermediate_size)
    return c.num_layers * layer + (c.vocab_size * c.hidden_size if head else 0)


def read_bytes(loaded: Loaded) -> int:
    """Packed bytes a decode step reads: all linear weights, head included; the embedding is only gathered from."""
    blocks = [(layer.mixer, layer.mlp) for layer in loaded.model._layers]
    weights = [w for attention, mlp in blocks for w in (attention.qkv, attention.o, mlp.gate_up, mlp.down)]
    weights.append(loaded.model._head)
    return sum(weight.native.num_bytes for weight in weights)


def bench(name: str, path: Any, label: str, dtype: str, quantization: str | None, seconds: float) -> None:
    start = time.perf_counter()
    loaded = Loaded(path, "cpu", dtype=dtype, quantization=quantization)
    load_s = time.perf_counter() - start
    gauge = Gauge(loaded.backend._device)
    rng = np.random.default_rng(0)
    facts = loaded.backend.describe()
    size = read_bytes(loaded)
    print(
        f"\n{name} {label}: {facts['weight_kinds']}, {size / 1e6:.0f} MB read a step, isa {facts['isa']}, "
        f"{facts['num_threads']} threads, loaded in {load_s:.2f} s; gauge {gauge.best / 1e9:.0f} Gop/s"
    )

    def report(what: str, tokens: int, batch: Any, values: int) -> None:
        took, good, total = timed(gauge, lambda: loaded.runner.execute(batch), seconds)
        bandwidth = gauge.read_bytes_per_s()
        ops = 2 * values / took
        print(
            f"  {what:<24} {1e3 * took:9.2f} ms {tokens / took:8.0f} tok/s   {ops / 1e9:6.0f} Gop/s = "
            f"{ops / gauge.best:4.0%} of the integer limit   {size / took / 1e9:5.1f} GB/s = "
            f"{size / took / bandwidth:4.0%} of {bandwidth / 1e9:.1f}   ({good} of {total} steps healthy)"
        )

    pages = list(range(PAGE_SIZE, PAGE_SIZE + 16))
    ids = rng.integers(0, loaded.config.vocab_size, 512)
    body, head = matrix_values(loaded, head=False), matrix_values(loaded, head=True) - matrix_values(loaded, head=False)
    report("prefill 512", 512, loaded.step([(0, 512, pages)], ids), 512 * body + head)
    for count in (1, 4, 16):
        rows = [(512, 1, list(range(20 * i, 20 * i + 17))) for i in range(count)]
        for i in range(count):
            loaded.runner.execute(loaded.step([(0, 512, rows[i][2])], ids))
        report(f"decode {count} at 512", count, loaded.step(rows, ids[:count]), count * (body + head))


def step_overhead(path: Any) -> None:
    """Time of a batch-1 decode step through the engine core that is not spent in the tapes, and how much of it other
    threads have begun with the next step."""
    from mooli.cache.kv_cache import KVCache
    from mooli.engine.core import EngineCore
    from mooli.scheduler.scheduler import Scheduler
    from mooli.types import Request, SamplingParams

    loaded = Loaded(path, "cpu")
    inside, hidden, begun = [0.0], [], [0.0]

    class Timer:
        """Stands for a native tape and adds up the time in it."""

        def __init__(self, tape: Any) -> None:
            self.tape = tape

        def run_choosing(self, *arguments: Any) -> None:
            start = time.perf_counter()
            if begun[0]:
                hidden.append(start - begun[0])
            self.tape.run_choosing(*arguments)
            end = time.perf_counter()
            inside[0] += end - start
            *_, may_begin_next, _ = arguments
            begun[0] = end if may_begin_next else 0.0

    cache = KVCache(num_pages=700, page_size=PAGE_SIZE)
    scheduler = Scheduler(
        cache, max_batch_tokens=512, max_running_requests=16, context_length=2048, vocab_size=loaded.config.vocab_size
    )
    core = EngineCore(scheduler, loaded.runner)
    ids = np.random.default_rng(1).integers(0, 1000, 64).astype(np.int32)
    core.add(Request(rid="r", prompt_ids=ids, sampling=SamplingParams(max_new_tokens=300, temperature=0.0)))
    core.step()
    core.step()
    forward = loaded.runner._forward
    forward._tape = Timer(forward._tape)  # type: ignore[attr-defined]
    overheads = []
    for _ in range(250):
        inside[0] = 0.0
        start = time.perf_counter()
        core.step()
        overheads.append(time.perf_counter() - start - inside[0])
    print(
        f"\nPython and scheduling in a batch-1 decode step: median {1e3 * statistics.median(overheads):.3f} ms, "
        f"p90 {1e3 * statistics.quantiles(overheads, n=10)[8]:.3f} ms; "
        f"of it {1e3 * statistics.median(hidden or [0.0]):.3f} ms while other threads compute the next step"
    )


FORMATS = {
    "file": ("as in the file", "auto", None),
    "int8": ("int8", "auto", "int8"),
    "int4": ("int4 (int8 head)", "auto", "int4"),
    "bfloat16": ("bfloat16", "bfloat16", None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each line")
    parser.add_argument(
        "--models",
        default="smollm2,qwen",
        help=f"of {', '.join(REAL_MODELS)}, and GGUF files, as random_gguf.py writes",
    )
    parser.add_argument("--formats", default="file,int8,int4")
    arguments = parser.parse_args()
    for name, path in map(real_model, arguments.models.split(",")):
        for entry in arguments.formats.split(","):
            label, dtype, quantization = FORMATS[entry]
            bench(name, path, label, dtype, quantization, arguments.seconds)
    step_overhead(demo_model())


if __name__ == "__main__":
    main()
