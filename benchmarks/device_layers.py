"""Speed of single layers on a torch backend, whose prompts take another form than decode steps: recurrences, latents.

Prints, for each layer, the milliseconds of a prompt in steps of `--chunk` tokens and of a decode step of 16 rows.
Shapes: the delta rule of Qwen3.5-4B, the scan of Granite 4 Tiny, the latent attention of DeepSeek-V2-Lite, without the
projections around them. Weights and inputs are random. Run with nothing else on the machine.

    python benchmarks/device_layers.py [--layers delta,scan,latent] [--tokens 2048] [--chunk 512] [--device torch]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mooli.backends import create_backend
from mooli.backends.base import Backend, CacheLayer, CacheSpec, DeltaSpec, Limits, PagedLayer, RopeSpec, StateLayer
from mooli.backends.latent import LatentLayer, LatentSpec
from mooli.batch import SamplingBatch, ScheduleBatch
from mooli.tensor import RawTensor, TensorType

ROWS = 16
DELTA = DeltaSpec(16, 128, 128, tuple(head // 2 for head in range(32)))
SCAN = DeltaSpec(1, 128, 64, (0,) * 48)
LATENT = LatentSpec(num_heads=16, rank=512, nope_dim=128, rope_dim=64, value_dim=128, scale=192**-0.5)

Build = Callable[[Any], Any]


def raw(*shape: int, scale: float = 1.0) -> RawTensor:
    values = np.random.default_rng(len(shape)).standard_normal(shape, np.float32) * np.float32(scale)
    return RawTensor("t", TensorType.F32, shape, values.reshape(-1, shape[-1]).view(np.uint8))


def delta(backend: Backend, vocab: int) -> tuple[CacheLayer, Build]:
    ops = backend.ops
    rows, gates = backend.load_embedding(raw(vocab, DELTA.row_width)), backend.load_embedding(raw(vocab, 64))
    weight = backend.load_delta(raw(32, scale=0.01), raw(32))
    layer = StateLayer((3, DELTA.row_width), (DELTA.num_heads, DELTA.key_dim, DELTA.value_dim))
    return layer, lambda b: ops.delta_rule(b, 0, ops.embed(b, rows), ops.embed(b, gates), weight, DELTA)


def scan(backend: Backend, vocab: int) -> tuple[CacheLayer, Build]:
    ops = backend.ops
    rows, steps = backend.load_embedding(raw(vocab, SCAN.row_width)), backend.load_embedding(raw(vocab, 48))
    weight = backend.load_scan(raw(48, scale=0.01), raw(48), raw(48))
    layer = StateLayer((3, SCAN.row_width), (SCAN.num_heads, SCAN.key_dim, SCAN.value_dim))
    return layer, lambda b: ops.scan(b, 0, ops.embed(b, rows), ops.embed(b, steps), weight, SCAN)


def latent(backend: Backend, vocab: int) -> tuple[CacheLayer, Build]:
    ops, spec = backend.ops, LATENT
    queries, rows = (backend.load_embedding(raw(vocab, width)) for width in (spec.query_width, spec.width))
    keys = raw(spec.num_heads * spec.rank, spec.nope_dim, scale=spec.rank**-0.5)
    up = backend.load_latent(keys, raw(spec.num_heads * spec.value_dim, spec.rank, scale=spec.rank**-0.5), spec)
    norm, rope = backend.load_vector(raw(spec.rank)), RopeSpec(0.7 ** np.arange(spec.rope_dim // 2.0))

    def attend(b: Any) -> Any:
        return ops.attend_latent(b, 0, ops.embed(b, queries), ops.embed(b, rows), norm, 1e-6, up, rope, spec)

    return LatentLayer(spec.rank, spec.rope_dim), attend


LAYERS = {"delta": delta, "scan": scan, "latent": latent}


def step(rows: list[tuple[int, int, int]], page_size: int, width: int) -> ScheduleBatch:
    """Rows (sequence, start, length), whose tokens are their positions."""
    sequences, starts, lengths = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    positions = np.concatenate([np.arange(start, start + length, dtype=np.int32) for _, start, length in rows])
    table = sequences[:, None] * width + np.arange(width, dtype=np.int32)
    of_rows, count = np.repeat(np.arange(len(rows)), lengths), len(rows)
    zeros, empty = np.zeros(count, np.float32), np.empty(0, np.int32)
    sampling = SamplingBatch(
        temperature=zeros, top_k=np.full(count, -1, np.int32), top_p=zeros + 1, min_p=zeros, frequency_penalty=zeros,
        presence_penalty=zeros, repetition_penalty=zeros + 1, seeds=np.zeros(count, np.uint64),
        positions=(starts + lengths).astype(np.int64), history_ids=empty, history_indptr=np.zeros(count + 1, np.int32),
        output_starts=np.zeros(count, np.int32), bias_ids=empty, bias_values=np.empty(0, np.float32),
        bias_indptr=np.zeros(count + 1, np.int32), num_top=np.full(count, -1, np.int32), logprob_token_ids=[()] * count,
    )  # fmt: skip
    return ScheduleBatch(
        step=0, token_ids=positions, positions=positions,
        slots=(table[of_rows, positions // page_size] * page_size + positions % page_size).astype(np.int32),
        req_indices=np.arange(count, dtype=np.int32), starts=starts, lengths=lengths,
        num_samples=np.ones(count, np.int32), page_table=table, sampling=sampling, state_slots=sequences,
    )  # fmt: skip


def milliseconds(backend: Backend, function: Build, steps: list[ScheduleBatch], seconds: float) -> float:
    """The median of all steps together, planning included."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        results = [function(backend.plan(batch)) for batch in steps]
        backend.to_host(results[-1][-1:])  # until the device is done
        found.append(time.perf_counter() - start)
    return 1e3 * statistics.median(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="delta,scan,latent")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a step")
    parser.add_argument("--device", default="torch", help="torch, cuda or ascend")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each figure")
    args = parser.parse_args()
    for name in args.layers.split(","):
        backend = create_backend(args.device, dtype=args.dtype)
        layer, build = LAYERS[name](backend, args.tokens)
        size = backend.default_page_size
        width = -(-args.tokens // size)
        spec = CacheSpec((layer, PagedLayer(1, 32)), size, args.dtype)
        backend.allocate(spec, ROWS * width, Limits(args.tokens, ROWS, width, num_states=ROWS))
        function = backend.capture(build)
        starts = range(0, args.tokens, args.chunk)
        prompt = [step([(0, start, min(args.chunk, args.tokens - start))], size, width) for start in starts]
        decode = step([(row, args.tokens - 1, 1) for row in range(ROWS)], size, width)
        for row in range(1, ROWS):
            function(backend.plan(step([(row, 0, args.chunk)], size, width)))
        took, single = (milliseconds(backend, function, steps, args.seconds) for steps in (prompt, [decode]))
        print(
            f"{name:<7} {args.tokens} tokens, {args.chunk} a step: {took:9.1f} ms,"
            f" {1e3 * args.tokens / took:6.0f} tok/s; {ROWS} rows of one token: {single:7.2f} ms"
        )
        backend.close()


if __name__ == "__main__":
    main()
