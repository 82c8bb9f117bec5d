"""Speed of families by files of random weights: shapes of published models, cut in layers, as GGUF.

`write` makes a file that Mooli and llama.cpp both read. It has as many layers as fit in 1 to 2 GB; kinds of layers and
the vocabulary are cut in the same proportion, so that all parts take their true share of a step. Weights have the types
that `llama-quantize` chooses for Q4_K_M, and gpt-oss those of its published file: MXFP4 in experts, Q8_0 elsewhere.

`measure` prints a prompt of 512 tokens, and rows from context 512 on: the bytes of packed weights that a step reads,
how fast, and which share that is of what the memory gives. KV and states are not counted. `compare` does the same in
turns with llama.cpp's `llama-batched-bench` on the same file. `profile` prints where the time of a step goes. Run with
nothing else on the machine.

    python benchmarks/families.py write FOLDER [--only qwen3.5-4b,gpt-oss-20b]
    python benchmarks/families.py measure FILE... [--seconds 3]
    python benchmarks/families.py compare FILE... [--llama .peers/llamacpp/build/bin] [--rounds 3]
    python benchmarks/families.py profile FILE [--rows 512,1,16]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from kernels import Gauge, timed
from loaded import PAGE_SIZE, Loaded
from random_gguf import random_rows

from mooli.backends.cpu.backend import PackedExperts
from mooli.batch import ScheduleBatch
from mooli.models.experts import SparseMLP
from mooli.tensor import TensorType

CONTEXT, PROMPT = 512, 512
SHORT_CONTEXT = 128
"""Of many rows with states: llama.cpp cannot copy those from row to row, and computes each row's prompt."""

DECODED = 32
ROWS = (1, 16)


@dataclass(frozen=True)
class Shapes:
    """Of a published model. kept: layers that are written. width: of the MLP, or of each expert. full_every: of so many
    layers one has attention, the others a gated DeltaNet. latent: (q_rank, rank, nope, rope, value_dim)."""

    architecture: str
    layers: int
    kept: int
    vocabulary: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    experts: int = 0
    used: int = 0
    shared: int = 0
    is_tied: bool = False
    full_every: int = 1
    net_key_heads: int = 16
    net_value_heads: int = 32
    net_dim: int = 128
    latent: tuple[int, int, int, int, int] | None = None


SHAPES = {
    "qwen3-30b-a3b": Shapes("qwen3moe", 48, 4, 151936, 2048, 32, 4, 128, 768, 128, 8),
    "gpt-oss-20b": Shapes("gpt-oss", 24, 2, 201088, 2880, 64, 8, 64, 2880, 32, 4),
    "qwen3.5-4b": Shapes("qwen35", 32, 8, 248320, 2560, 16, 4, 256, 9216, is_tied=True, full_every=4),
    "qwen3.5-35b-a3b": Shapes("qwen35moe", 40, 4, 248320, 2048, 16, 2, 256, 512, 256, 8, 512, full_every=4),
    "glm-4.7-flash": Shapes(
        "deepseek2", 47, 4, 154880, 2048, 20, 1, 576, 1536, 64, 4, 1536, latent=(768, 512, 192, 64, 256)
    ),
}


class Writer:
    """Of one file."""

    def __init__(self, path: Path, shapes: Shapes) -> None:
        self.shapes = shapes
        self.rng = np.random.default_rng(1)
        self.gguf = gguf.GGUFWriter(path, shapes.architecture)

    def write(self) -> None:
        s = self.shapes
        vocabulary = -(-s.vocabulary * s.kept // s.layers // 32) * 32
        self._keys(vocabulary)
        self._matrix("token_embd", vocabulary, s.hidden)
        for layer in range(s.kept):
            self._layer(layer, f"blk.{layer}")
        self._vector("output_norm", s.hidden)
        if not s.is_tied:
            self._matrix("output", vocabulary, s.hidden)
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()

    def _keys(self, vocabulary: int) -> None:
        s, g = self.shapes, self.gguf
        g.add_block_count(s.kept)
        g.add_context_length(32768)
        g.add_embedding_length(s.hidden)
        g.add_feed_forward_length(s.width)
        g.add_head_count(s.heads)
        g.add_head_count_kv(s.kv_heads)
        g.add_rope_freq_base(1e6)
        g.add_layer_norm_rms_eps(1e-6)
        g.add_vocab_size(vocabulary)
        g.add_tokenizer_model("no_vocab")
        if s.experts:
            g.add_expert_count(s.experts)
            g.add_expert_used_count(s.used)
            g.add_expert_feed_forward_length(s.width)
        if s.latent:
            q_rank, rank, nope, rope, value = s.latent
            g.add_q_lora_rank(q_rank)
            g.add_kv_lora_rank(rank)
            g.add_key_length(rank + rope)
            g.add_value_length(rank)
            g.add_key_length_mla(nope + rope)
            g.add_value_length_mla(value)
            g.add_rope_dimension_count(rope)
            g.add_leading_dense_block_count(0)  # of 47 layers one has no experts
            g.add_expert_shared_count(1)
            g.add_expert_weights_scale(1.8)
            g.add_expert_weights_norm(True)
            g.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        else:
            g.add_key_length(s.head_dim)
            g.add_value_length(s.head_dim)
        if s.architecture == "gpt-oss":
            g.add_sliding_window(128)
            g.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            g.add_rope_scaling_factor(32.0)
            g.add_rope_scaling_orig_ctx_len(4096)
        if s.full_every > 1:
            g.add_rope_dimension_count(s.head_dim // 4)
            g.add_rope_dimension_sections([11, 11, 10, 0])
            g.add_uint32(f"{s.architecture}.full_attention_interval", s.full_every)
            g.add_ssm_conv_kernel(4)
            g.add_ssm_state_size(s.net_dim)
            g.add_ssm_group_count(s.net_key_heads)
            g.add_ssm_time_step_rank(s.net_value_heads)
            g.add_ssm_inner_size(s.net_value_heads * s.net_dim)
        if s.shared:
            g.add_expert_shared_feed_forward_length(s.shared)

    def _layer(self, layer: int, block: str) -> None:
        s = self.shapes
        self._vector(f"{block}.attn_norm", s.hidden)
        mlp_norm = "ffn_norm" if s.architecture in ("qwen3moe", "deepseek2") else "post_attention_norm"
        self._vector(f"{block}.{mlp_norm}", s.hidden)
        if s.latent:
            self._latent_attention(block, *s.latent)
        elif (layer + 1) % s.full_every:
            self._delta_net(block, layer)
        else:
            self._attention(block, layer)
        self._mlp(block, layer)

    def _attention(self, block: str, layer: int) -> None:
        s, has_bias = self.shapes, self.shapes.architecture == "gpt-oss"
        keys, gated = s.kv_heads * s.head_dim, 2 if s.full_every > 1 else 1
        for name, rows in (("q", gated * s.heads * s.head_dim), ("k", keys), ("v", keys)):
            self._matrix(f"{block}.attn_{name}", rows, s.hidden, layer=layer, bias=has_bias)
        self._matrix(f"{block}.attn_output", s.hidden, s.heads * s.head_dim, bias=has_bias)
        if has_bias:
            self._vector(f"{block}.attn_sinks", s.heads)
        else:
            self._vector(f"{block}.attn_q_norm", s.head_dim)
            self._vector(f"{block}.attn_k_norm", s.head_dim)

    def _latent_attention(self, block: str, q_rank: int, rank: int, nope: int, rope: int, value: int) -> None:
        s = self.shapes
        self._matrix(f"{block}.attn_q_a", q_rank, s.hidden)
        self._vector(f"{block}.attn_q_a_norm", q_rank)
        self._matrix(f"{block}.attn_q_b", s.heads * (nope + rope), q_rank)
        self._matrix(f"{block}.attn_kv_a_mqa", rank + rope, s.hidden)
        self._vector(f"{block}.attn_kv_a_norm", rank)
        self._matrix(f"{block}.attn_k_b", rank, nope, count=s.heads)
        self._matrix(f"{block}.attn_v_b", value, rank, count=s.heads)
        self._matrix(f"{block}.attn_output", s.hidden, s.heads * value)

    def _delta_net(self, block: str, layer: int) -> None:
        s = self.shapes
        keys, values, heads = s.net_key_heads * s.net_dim, s.net_value_heads * s.net_dim, s.net_value_heads
        self._matrix(f"{block}.attn_qkv", 2 * keys + values, s.hidden, layer=layer)
        self._matrix(f"{block}.attn_gate", values, s.hidden)
        self._matrix(f"{block}.ssm_beta", heads, s.hidden)
        self._matrix(f"{block}.ssm_alpha", heads, s.hidden)
        self._floats(f"{block}.ssm_conv1d.weight", self.rng.standard_normal((2 * keys + values, 4)) / 2)
        self._floats(f"{block}.ssm_a", -self.rng.uniform(0.01, 1.0, heads))
        self._floats(f"{block}.ssm_dt.bias", self.rng.uniform(-4.0, 0.0, heads))
        self._vector(f"{block}.ssm_norm", s.net_dim)
        self._matrix(f"{block}.ssm_out", s.hidden, values)

    def _mlp(self, block: str, layer: int) -> None:
        s, has_bias = self.shapes, self.shapes.architecture == "gpt-oss"
        stack = "_exps" if s.experts else ""
        for name, rows, columns in (
            ("gate", s.width, s.hidden),
            ("up", s.width, s.hidden),
            ("down", s.hidden, s.width),
        ):
            self._matrix(f"{block}.ffn_{name}{stack}", rows, columns, count=s.experts, layer=layer, bias=has_bias)
            if s.shared:
                rows, columns = (s.hidden, s.shared) if name == "down" else (s.shared, s.hidden)
                self._matrix(f"{block}.ffn_{name}_shexp", rows, columns, layer=layer)
        if s.experts:
            router = self.rng.standard_normal((s.experts, s.hidden)) * 2 * s.hidden**-0.5
            self._floats(f"{block}.ffn_gate_inp.weight", router)
        if has_bias:
            self._floats(f"{block}.ffn_gate_inp.bias", np.zeros(s.experts))
        if s.latent:
            self._floats(f"{block}.exp_probs_b.bias", np.zeros(s.experts))
        if s.shared and not s.latent:
            self._floats(f"{block}.ffn_gate_inp_shexp.weight", self.rng.standard_normal(s.hidden) * s.hidden**-0.5)

    def _type(self, name: str, columns: int, layer: int) -> TensorType:
        """Source: `llama_tensor_get_type_impl` of llama.cpp."""
        if self.shapes.architecture == "gpt-oss":
            return TensorType.MXFP4 if "_exps" in name else TensorType.Q8_0
        if columns % 256:
            return TensorType.Q5_0
        if name == "output" or (name == "token_embd" and self.shapes.is_tied):
            return TensorType.Q6_K
        if not any(part in name for part in ("ffn_down", "attn_v", "attn_qkv")) or "attn_v_b" in name:
            return TensorType.Q4_K
        kept = self.shapes.kept
        has_more = layer < kept // 8 or layer >= 7 * kept // 8 or (layer - kept // 8) % 3 == 2
        return TensorType.Q6_K if has_more else TensorType.Q4_K

    def _matrix(
        self, name: str, rows: int, columns: int, *, count: int = 0, layer: int = 0, bias: bool = False
    ) -> None:
        kind = self._type(name, columns, layer)
        data = random_rows(kind, max(count, 1) * rows, columns, self.rng)
        data = data.reshape(count, rows, -1) if count else data
        self.gguf.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind.name])
        if bias:
            self._floats(f"{name}.bias", np.zeros((count, rows) if count else rows))

    def _vector(self, name: str, length: int) -> None:
        self._floats(f"{name}.weight", np.ones(length))

    def _floats(self, name: str, values: Any) -> None:
        self.gguf.add_tensor(name, values.astype(np.float32))


def packed(weight: Any) -> Iterator[int]:
    """Bytes of all matrices that it has, experts aside."""
    if isinstance(weight, PackedExperts):
        return
    if dataclasses.is_dataclass(weight):
        for field in dataclasses.fields(weight):
            yield from packed(getattr(weight, field.name))
    elif isinstance(weight, list | tuple):
        for each in weight:
            yield from packed(each)
    elif hasattr(weight, "num_bytes"):
        yield weight.num_bytes
    elif hasattr(weight, "keys"):  # of latents
        yield from packed([*weight.keys, *weight.values])


def mixtures(weight: Any) -> Iterator[SparseMLP]:
    if isinstance(weight, SparseMLP):
        yield weight
    elif dataclasses.is_dataclass(weight):
        for field in dataclasses.fields(weight):
            yield from mixtures(getattr(weight, field.name))


def read_bytes(loaded: Loaded, rows: int) -> float:
    """Of weights, as packed, in a step of so many rows, each of which chooses its experts at random."""
    size = float(sum(packed(loaded.model._layers)) + sum(packed(loaded.model._head)))
    for layer in loaded.model._layers:
        for mixture in mixtures(layer):
            untouched = (1 - mixture.spec.top_k / mixture.spec.num_experts) ** rows
            size += (1 - untouched) * sum(each.native.num_bytes for each in mixture.experts.native.each)
    return size


class Ours:
    """A file on the CPU backend, and its steps."""

    def __init__(self, path: Path) -> None:
        self.loaded = Loaded(path, "cpu")
        self.gauge = Gauge(self.loaded.backend._device)
        self.rng = np.random.default_rng(0)
        self.pages_each = (CONTEXT + PROMPT) // PAGE_SIZE + 1
        self.filled: set[int] = set()

    def drawn(self, rows: int, start: int, length: int) -> ScheduleBatch:
        pages = self.pages_each
        each = [(start, length, list(range(i * pages, (i + 1) * pages))) for i in range(rows)]
        return self.loaded.step(each, self.rng.integers(0, self.loaded.config.vocab_size, rows * length))

    def fill(self, rows: int) -> None:
        """Something in the pages."""
        if rows not in self.filled:
            for begin in range(0, self.context(rows), PROMPT // rows):
                self.loaded.runner.execute(self.drawn(rows, begin, PROMPT // rows))
        self.filled.add(rows)

    def context(self, rows: int) -> int:
        return SHORT_CONTEXT if rows > 1 and self.loaded.has_states else CONTEXT

    def prompt(self, seconds: float) -> float:
        """Tokens a second."""
        steps = itertools.cycle([self.drawn(1, 0, PROMPT) for _ in range(8)])
        return PROMPT / self._took(lambda: self.loaded.runner.execute(next(steps)), seconds)

    def _took(self, run: Callable[[], Any], seconds: float) -> float:
        took, healthy, every = timed(self.gauge, run, seconds)
        if healthy < 3:
            print(f"  only {healthy} of {every} runs on a healthy machine")
        return took

    def decode(self, rows: int, seconds: float) -> float:
        """Each row goes on with what it chose, and threads begin with the next step as in the engine."""
        self.fill(rows)
        steps = [self.drawn(rows, self.context(rows) + index, 1) for index in range(DECODED)]
        for step in steps[:-1]:
            step.may_begin_next = True

        def run() -> None:
            ids = self.rng.integers(0, self.loaded.config.vocab_size, rows).astype(np.int32)
            for step in steps:
                step.token_ids = ids
                ids = self.loaded.runner.execute(step).token_ids

        return rows * DECODED / self._took(run, seconds)


def measure(path: Path, seconds: float) -> None:
    ours = Ours(path)
    memory = ours.gauge.read_bytes_per_s()
    kinds = ours.loaded.backend.describe()["weight_kinds"]
    size = ours.loaded.backend.weight_bytes()
    print(f"{path.name}: {size / 1e6:.0f} MB packed {kinds}; memory reads {memory / 1e9:.1f} GB/s")
    print(f"  prompt of {PROMPT}: {ours.prompt(seconds):.0f} tokens/s")
    for rows in ROWS:
        tokens = ours.decode(rows, seconds)
        speed = read_bytes(ours.loaded, rows) * tokens / rows
        print(
            f"  {rows:2} rows: {tokens:.1f} tokens/s, {read_bytes(ours.loaded, rows) / 1e6:.0f} MB a step,"
            f" {speed / 1e9:.1f} GB/s, {speed / memory:.0%} of the memory"
        )


def theirs(path: Path, binaries: Path, threads: int, *, has_states: bool) -> dict[str, float]:
    """Tokens a second of llama.cpp: a prompt, and rows behind prompts of their own. SystemExit if it does not run."""
    one, many = "1,1", ",".join(map(str, ROWS[1:]))
    if has_states:
        runs = [_batched_bench(path, binaries, threads, each) for each in ((CONTEXT, one), (SHORT_CONTEXT, many))]
    else:
        runs = [_batched_bench(path, binaries, threads, (CONTEXT, f"{one},{many}"), "-pps")]
    speeds = {f"{row['pl']}": row["speed_tg"] for rows in runs for row in rows}
    return {"prompt": statistics.median(row["speed_pp"] for row in runs[0]), **speeds}


def _batched_bench(path: Path, binaries: Path, threads: int, work: tuple[int, str], *more: str) -> list[dict[str, Any]]:
    context, rows = work
    size = max(ROWS) * (context + DECODED)
    words = [binaries / "llama-batched-bench", "-m", path, "-c", size, "-b", 2048, "-ub", PROMPT, "-t", threads]
    words += ["-npp", context, "-ntg", DECODED, "-npl", rows, "--output-format", "jsonl", *more]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode < 0:  # where it has AMX, b11434 falls as it repacks weights for it
        words.append("--no-repack")
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    found = [json.loads(line[line.index("{") :]) for line in said.splitlines() if '"speed_tg"' in line]
    if done.returncode or not found:
        telling = [line for line in said.splitlines() if "error" in line.lower()] or said.splitlines()[-3:]
        raise SystemExit(f"llama.cpp does not run {path.name}: {telling[0] if telling else done.returncode}")
    return found


def compare(path: Path, binaries: Path, rounds: int, seconds: float) -> None:
    """In turns, so that both see the same states of the machine."""
    ours = Ours(path)
    threads = ours.loaded.backend.describe()["num_threads"]
    works: dict[str, Callable[[], float]] = {"prompt": lambda: ours.prompt(seconds)}
    works |= {f"{rows}": lambda rows=rows: ours.decode(rows, seconds) for rows in ROWS}
    speeds: dict[str, list[tuple[float, float]]] = {what: [] for what in works}
    memory = []
    for _ in range(rounds):
        memory.append(ours.gauge.read_bytes_per_s())
        mine = {what: work() for what, work in works.items()}
        its = theirs(path, binaries, threads, has_states=ours.loaded.has_states)
        for what in works:
            speeds[what].append((mine[what], its[what]))
    reads = statistics.median(memory)
    for what, pairs in speeds.items():
        mine, its = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratios = [a / b for a, b in pairs]
        share = ""
        if what != "prompt":
            speed = read_bytes(ours.loaded, int(what)) * mine / int(what)
            share = f"{speed / 1e9:.1f} ({speed / reads:.0%} of {reads / 1e9:.1f})"
        name = "prompt of 512" if what == "prompt" else f"{what} row{'s' * (what != '1')}"
        print(
            f"| {path.stem} | {name} | {mine:.1f} | {its:.1f} | {statistics.median(ratios):.2f}"
            f" ({min(ratios):.2f}–{max(ratios):.2f}) | {share} |",
            flush=True,
        )


def profile(path: Path, rows: list[int]) -> None:
    """Where the time of steps goes: each operation of the model's tape, summed by its name and what it multiplies."""
    ours = Ours(path)
    loaded = ours.loaded
    for count in rows:
        if count < PROMPT:
            ours.fill(count)
        batches = [
            ours.drawn(1, 0, count) if count == PROMPT else ours.drawn(count, ours.context(count), 1) for _ in range(9)
        ]
        runs, whole = [], []
        for batch in batches:
            start = time.perf_counter()
            loaded.runner.execute(batch)
            whole.append(time.perf_counter() - start)
            runs.append(loaded.runner._forward._tape.run_timed(count))  # type: ignore[attr-defined]
        totals: Counter[str] = Counter()
        names = [name for name, _ in runs[0]]
        for index, calls in enumerate(zip(*runs, strict=True)):
            name = names[index]
            if name == "linear":  # by what takes its result
                name = f"linear before {names[index + 1] if index + 1 < len(names) else 'the end'}"
            totals[name] += statistics.median(seconds for _, seconds in calls)
        step = statistics.median(whole)
        totals["head and Python"] = step - sum(totals.values())
        print(f"{path.stem}, {count} {'tokens of a prompt' if count == PROMPT else 'rows'}: {1e3 * step:.2f} ms")
        for name, seconds in totals.most_common():
            print(f"  {name:<32} {1e3 * seconds:8.2f} ms {seconds / step:4.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--only", default=",".join(SHAPES))
    measuring, comparing, profiling = (commands.add_parser(name) for name in ("measure", "compare", "profile"))
    for each in (measuring, comparing, profiling):
        each.add_argument("paths", type=Path, nargs="+")
    for each in (measuring, comparing):
        each.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    comparing.add_argument("--rounds", type=int, default=3)
    comparing.add_argument("--llama", type=Path, default=Path(".peers/llamacpp/build/bin"))
    profiling.add_argument("--rows", default="512,1,16")
    arguments = parser.parse_args()
    if arguments.command == "write":
        for name in arguments.only.split(","):
            Writer(arguments.folder / f"{name}.gguf", SHAPES[name]).write()
        return
    if arguments.command == "compare":
        print("| file | work | Mooli, tokens/s | llama.cpp | ratio | weights, GB/s |")
        print("| --- | --- | --- | --- | --- | --- |")
    for path in arguments.paths:
        if arguments.command == "measure":
            measure(path, arguments.seconds)
        elif arguments.command == "compare":
            compare(path, arguments.llama, arguments.rounds, arguments.seconds)
        else:
            profile(path, [int(rows) for rows in arguments.rows.split(",")])


if __name__ == "__main__":
    main()
