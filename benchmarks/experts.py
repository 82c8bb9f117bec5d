"""Speed of mixtures of experts on this machine: random weights of true shapes, cut in layers.

`write` makes a GGUF file that llama.cpp reads too (`llama-bench -m FILE`); it has no vocabulary, so nobody makes text
of it. `measure` prints a prompt of 512 tokens and decode of 1, 4 and 16 rows at context 512, with the bytes of weights
that a step reads, how fast, and which share that is of what the memory gives. Other tokens in every step, so that other
experts are read. Run with nothing else on the machine.

    python benchmarks/experts.py write moe.gguf [--shapes qwen3-30b-a3b] [--layers 4] [--type Q4_0] [--vocabulary 32000]
    python benchmarks/experts.py measure moe.gguf [--seconds 3]
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from kernels import Gauge, timed
from loaded import PAGE_SIZE, Loaded

from mooli.batch import ScheduleBatch
from mooli.models.qwen_moe import MoeConfig
from mooli.tensor import BLOCK, TensorType, row_bytes

CONTEXT, PROMPT = 512, 512
STEPS = 16
KINDS = ("Q4_0", "Q8_0")


@dataclass(frozen=True)
class Shapes:
    """Of a published model."""

    architecture: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    used: int
    width: int


SHAPES = {"qwen3-30b-a3b": Shapes("qwen3moe", 2048, 32, 4, 128, 128, 8, 768)}


def random_rows(kind: TensorType, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 (rows, row_bytes): any codes, under scales that keep what they multiply near one."""
    blocks = rng.integers(0, 256, (rows * columns // BLOCK[kind][0], BLOCK[kind][1]), dtype=np.uint8)
    size = columns**-0.5 / (64 if kind == TensorType.Q8_0 else 4)
    scales = (rng.choice((-1.0, 1.0), len(blocks)) * size).astype("<f2")
    blocks[:, :2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, row_bytes(kind, columns))


def write(path: Path, shapes: Shapes, layers: int, kind: TensorType, vocabulary: int) -> None:
    s, rng = shapes, np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, s.architecture)
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(s.hidden)
    writer.add_feed_forward_length(3 * s.hidden)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_key_length(s.head_dim)
    writer.add_value_length(s.head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(s.experts)
    writer.add_expert_used_count(s.used)
    writer.add_expert_feed_forward_length(s.width)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, rows: int, columns: int, count: int = 0) -> None:
        data = random_rows(kind, max(count, 1) * rows, columns, rng)
        data = data.reshape(count, rows, -1) if count else data
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind.name])

    def add_gain(name: str, length: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(length, np.float32))

    add("token_embd", vocabulary, s.hidden)
    for layer in range(layers):
        block = f"blk.{layer}"
        add_gain(f"{block}.attn_norm", s.hidden)
        add(f"{block}.attn_q", s.heads * s.head_dim, s.hidden)
        add(f"{block}.attn_k", s.kv_heads * s.head_dim, s.hidden)
        add(f"{block}.attn_v", s.kv_heads * s.head_dim, s.hidden)
        add(f"{block}.attn_output", s.hidden, s.heads * s.head_dim)
        add_gain(f"{block}.attn_q_norm", s.head_dim)
        add_gain(f"{block}.attn_k_norm", s.head_dim)
        add_gain(f"{block}.ffn_norm", s.hidden)
        router = rng.standard_normal((s.experts, s.hidden)).astype(np.float32) * np.float32(2 * s.hidden**-0.5)
        writer.add_tensor(f"{block}.ffn_gate_inp.weight", router)
        add(f"{block}.ffn_gate_exps", s.width, s.hidden, s.experts)
        add(f"{block}.ffn_up_exps", s.width, s.hidden, s.experts)
        add(f"{block}.ffn_down_exps", s.hidden, s.width, s.experts)
    add_gain("output_norm", s.hidden)
    add("output", vocabulary, s.hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_bytes(loaded: Loaded, rows: int) -> float:
    """Of weights, as packed, in a step of so many rows, each of which chooses its experts at random."""
    config = loaded.config
    assert isinstance(config, MoeConfig)
    values = sum(np.prod(s.shape) for name, s in config.tensors().items() if ".experts." in name)
    others = sum(
        np.prod(s.shape) for name, s in config.tensors().items() if ".experts." not in name and "embed" not in name
    )
    touched = 1 - (1 - config.top_k / config.num_experts) ** rows
    table = config.vocab_size * config.hidden_size
    per_value = loaded.backend.weight_bytes() / (values + others + table)
    return float(per_value * (values * touched + others))


def measure(path: Path, seconds: float) -> None:
    loaded = Loaded(path, "cpu")
    gauge = Gauge(loaded.backend._device)
    memory = gauge.read_bytes_per_s()
    rng = np.random.default_rng(0)
    pages_each = (CONTEXT + PROMPT) // PAGE_SIZE + 1
    print(f"{path.name}: {loaded.backend.weight_bytes() / 1e6:.0f} MB packed; memory reads {memory / 1e9:.1f} GB/s")

    def drawn(rows: int, start: int, length: int) -> ScheduleBatch:
        each = [(start, length, list(range(i * pages_each, (i + 1) * pages_each))) for i in range(rows)]
        return loaded.step(each, rng.integers(0, loaded.config.vocab_size, rows * length))

    def run(rows: int, start: int, length: int) -> tuple[float, int, int]:
        steps = itertools.cycle([drawn(rows, start, length) for _ in range(STEPS)])
        return timed(gauge, lambda: loaded.runner.execute(next(steps)), seconds)

    took, healthy, every = run(1, 0, PROMPT)
    print(f"prompt of {PROMPT}: {PROMPT / took:.0f} tokens/s ({healthy} of {every} runs)")
    for rows in (1, 4, 16):
        for begin in range(0, CONTEXT, PROMPT // rows):  # something in the pages
            loaded.runner.execute(drawn(rows, begin, PROMPT // rows))
        took, healthy, every = run(rows, CONTEXT, 1)
        speed = read_bytes(loaded, rows) / took
        print(
            f"{rows:2} rows: {rows / took:.1f} tokens/s, {speed / 1e9:.1f} GB/s, {speed / memory:.0%} of the memory"
            f" ({healthy} of {every} runs)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("path", type=Path)
    writing.add_argument("--shapes", choices=SHAPES, default="qwen3-30b-a3b")
    writing.add_argument("--layers", type=int, default=4)
    writing.add_argument("--type", choices=KINDS, default="Q4_0")
    writing.add_argument("--vocabulary", type=int, default=32000)
    measuring = commands.add_parser("measure")
    measuring.add_argument("path", type=Path)
    measuring.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    if arguments.command == "write":
        kind = TensorType[arguments.type]
        write(arguments.path, SHAPES[arguments.shapes], arguments.layers, kind, arguments.vocabulary)
    else:
        measure(arguments.path, arguments.seconds)


if __name__ == "__main__":
    main()
