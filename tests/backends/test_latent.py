"""Multi-head latent attention on every backend against its definition in float64, however a sequence is cut.

The definition is the expanded one: keys and values of every head are made of the latents, as the papers write it. It
shares no code with any backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cpu_ops import LEVELS, cpu_backend
from numpy.typing import NDArray

from mooli.backends import create_backend
from mooli.backends.base import (
    AttentionSpec,
    Backend,
    CacheLayer,
    CacheSpec,
    Limits,
    PagedLayer,
    RopeSpec,
)
from mooli.backends.latent import LatentLayer, LatentSpec
from mooli.backends.sizes import AscendSizes, CudaSizes, TorchSizes
from mooli.batch import PageCopy
from mooli.errors import ConfigError, UnsupportedModelError
from mooli.tensor import RawTensor, TensorType
from steps import Row, step
from variants import VARIANTS, Variant, require, simulated_npu

Floats = NDArray[np.float64]

SPEC = LatentSpec(num_heads=5, rank=48, nope_dim=24, rope_dim=16, value_dim=40, scale=0.21)
LAYERS: tuple[CacheLayer, ...] = (PagedLayer(2, 32), LatentLayer(48, 16), LatentLayer(48, 16))
LAYER, NUM_TOKENS, EPS = 2, 300, 1e-5
ROPE = RopeSpec(0.3 ** np.arange(8.0), 1.3)
LIMITS = Limits(max_tokens=NUM_TOKENS, max_rows=16, max_pages_per_row=64)


def random(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


KEYS = random(1, SPEC.num_heads, SPEC.nope_dim, SPEC.rank) * np.float32(SPEC.rank**-0.5)
VALUES = random(2, SPEC.num_heads, SPEC.value_dim, SPEC.rank) * np.float32(SPEC.rank**-0.5)
NORM = 1 + 0.3 * random(3, SPEC.rank)


def raw(values: NDArray[Any]) -> RawTensor:
    data = np.ascontiguousarray(values, dtype=np.float32)
    return RawTensor("t", TensorType.F32, data.shape, data.reshape(-1, data.shape[-1]).view(np.uint8))


def turned(x: Floats) -> Floats:
    """Rows of (T, heads, rope_dim) at positions 0, 1, ..."""
    first, second = np.split(x, 2, axis=-1)
    angles = np.arange(len(x))[:, None, None] * ROPE.inv_freq
    cos, sin = np.cos(angles) * ROPE.factor, np.sin(angles) * ROPE.factor
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def defined(q: Floats, latent: Floats) -> Floats:
    """Of all tokens of one sequence."""
    heads = q.reshape(len(q), SPEC.num_heads, -1)
    c, key = latent[:, : SPEC.rank], turned(latent[:, None, SPEC.rank :])
    c = c / np.sqrt((c**2).mean(-1, keepdims=True) + EPS) * NORM
    out = np.zeros((len(q), SPEC.num_heads, SPEC.value_dim))
    rotated = turned(heads[..., SPEC.nope_dim :])
    for head in range(SPEC.num_heads):
        k = np.concatenate([c @ KEYS[head].T.astype(np.float64), key[:, 0]], axis=1)
        scores = np.concatenate([heads[:, head, : SPEC.nope_dim], rotated[:, head]], axis=1) @ k.T * SPEC.scale
        scores[np.triu_indices(len(q), 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ (c @ VALUES[head].T.astype(np.float64))
    return out.reshape(len(q), -1)


class Bench:
    """One latent attention, captured, of rows of two tables."""

    def __init__(self, backend: Backend, kv_dtype: str) -> None:
        self.backend, self.page_size = backend, backend.default_page_size
        ops = backend.ops
        widths = (SPEC.query_width, SPEC.width)
        tables = [backend.load_embedding(raw(random(seed, NUM_TOKENS, w))) for seed, w in enumerate(widths, 5)]
        norm = backend.load_vector(raw(NORM))
        keys, values = KEYS.transpose(0, 2, 1).reshape(-1, SPEC.nope_dim), VALUES.reshape(-1, SPEC.rank)
        before = backend.weight_bytes()
        self.up = backend.load_latent(raw(keys), raw(values), SPEC)
        self.up_bytes = backend.weight_bytes() - before
        backend.allocate(CacheSpec(LAYERS, self.page_size, kv_dtype), 200, LIMITS)

        def attend(batch: Any) -> Any:
            q, latent = (ops.embed(batch, table) for table in tables)
            return ops.attend_latent(batch, LAYER, q, latent, norm, EPS, self.up, ROPE, SPEC)

        self._attend = backend.capture(attend)
        self._inputs: list[Callable[[Any], Any]] = [
            backend.capture(lambda batch, table=table: ops.embed(batch, table))  # type: ignore[misc]
            for table in tables
        ]

    def run(self, *rows: Row) -> NDArray[np.float32]:
        planned = self.backend.plan(step(rows, self.page_size))
        return np.array(self.backend.to_host(self._attend(planned)), dtype=np.float32)

    def inputs(self) -> tuple[Floats, Floats]:
        """Both tables as the backend sees them."""
        planned = self.backend.plan(step([self.row(0, NUM_TOKENS, 0)], self.page_size))
        q, latent = (np.array(self.backend.to_host(table(planned)), np.float64) for table in self._inputs)
        return q, latent

    def pages(self, sequence: int) -> list[int]:
        width = -(-NUM_TOKENS // self.page_size)
        return [sequence * width + (7 * page + 3) % width for page in range(width)]

    def row(self, first: int, count: int, sequence: int) -> Row:
        """Tokens first .. first + count, whose ids are their positions, of a sequence in pages of its own."""
        return Row(range(first, first + count), first, self.pages(sequence))


@pytest.fixture(scope="session", params=[v for v in VARIANTS if v.kv_dtype != "int8"], ids=str)
def variant(request: pytest.FixtureRequest) -> Variant:
    """Those that keep latents."""
    require(request.param.backend)
    return request.param


@pytest.fixture
def bench(backend: Backend, variant: Variant) -> Bench:
    return Bench(backend, variant.kv_dtype)


def error_of(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean((actual - expected) ** 2)) / np.sqrt(np.mean(expected**2)))


def bound(variant: Variant) -> float:
    """What is rounded: what is kept, as attention's; queries and sums of latents, as two products' inputs."""
    eight_bits = 0.02 if variant.backend == "cpu" and variant.quantization else 0.0
    return max(variant.attend + 2 * min(variant.linear, 0.005) + 2 * variant.norm, eight_bits)


def test_it_is_its_definition(bench: Bench, variant: Variant) -> None:
    expected = defined(*bench.inputs())
    actual = bench.run(bench.row(0, NUM_TOKENS, 0))
    assert actual.shape == expected.shape
    assert error_of(actual, expected) <= bound(variant)
    per_token = np.sqrt(((actual - expected) ** 2).mean(axis=1) / (expected**2).mean(axis=1))
    assert per_token.max() <= 5 * bound(variant)


@pytest.mark.parametrize("cut", [(1, 127, 2, 33, 137), (31, 33, 64, 129, 43), (299, 1)], ids=str)
def test_chunks_beside_other_rows_give_what_a_prompt_gives_whole(
    bench: Bench, variant: Variant, cut: tuple[int, ...]
) -> None:
    whole = bench.run(bench.row(0, NUM_TOKENS, 0))
    parts, first = [], 0
    for count in cut:
        beside = min(LIMITS.max_tokens - count, 20)
        rows = [bench.row(first, count, 1)] + ([bench.row(0, beside, 2)] if beside else [])
        parts.append(bench.run(*rows)[:count])
        first += count
    assert_alike(np.concatenate(parts), whole, variant)


def test_single_tokens_of_many_sequences_share_a_prefix_and_a_page_that_was_copied(
    bench: Bench, variant: Variant
) -> None:
    whole = bench.run(bench.row(0, NUM_TOKENS, 0))
    size, pages = bench.page_size, bench.pages(0)
    held = 259
    own = 150
    bench.backend.copy_pages([PageCopy(pages[held // size], own, held % size)] if held % size else [])
    table = [*pages[: held // size], own, *pages[held // size + 1 :]]
    rows = [Row([held], held, table), bench.row(299, 1, 0), bench.row(130, 1, 0), bench.row(0, 1, 1)]
    # Computed again into the same slots: bits are the same, so that nobody is disturbed.
    assert_alike(bench.run(*rows), whole[[held, 299, 130, 0]], variant)


def assert_alike(actual: NDArray[Any], expected: NDArray[Any], variant: Variant) -> None:
    if variant.exact_rows:
        np.testing.assert_array_equal(actual, expected)
    else:
        assert error_of(actual, expected) <= max(1e-5, variant.attend + 2 * variant.embed)


def test_pages_go_out_as_bytes_and_come_back(bench: Bench, variant: Variant) -> None:
    backend = bench.backend
    whole = bench.run(bench.row(0, NUM_TOKENS, 0))
    pages, others = bench.pages(0), bench.pages(3)
    data = backend.read_pages(pages, NUM_TOKENS - 1)
    spec = CacheSpec(LAYERS, bench.page_size, variant.kv_dtype)
    assert data.shape == (len(pages), backend.kv_bytes_per_page(spec))
    backend.write_pages(others, data)
    np.testing.assert_array_equal(backend.read_pages(others, NUM_TOKENS - 1), data)
    last = bench.run(bench.row(NUM_TOKENS - 1, 1, 3))
    assert_alike(last, whole[-1:], variant)


def test_equal_tokens_are_equal_bytes_whatever_lay_behind_them(bench: Bench, variant: Variant) -> None:
    held = bench.page_size + 3
    bench.run(bench.row(0, NUM_TOKENS, 0))
    bench.run(bench.row(0, held, 1))
    count = -(-held // bench.page_size)
    read = [bench.backend.read_pages(bench.pages(sequence)[:count], held) for sequence in (0, 1)]
    if variant.exact_rows:  # others round rows of a step by what is beside them
        np.testing.assert_array_equal(*read)


def test_what_is_kept_of_a_token_is_its_latent_alone(backend: Backend, variant: Variant) -> None:
    size, item = backend.default_page_size, 4 if variant.kv_dtype == "float32" else 2
    assert backend.kv_bytes_per_page(CacheSpec((LatentLayer(512, 64),), size, variant.kv_dtype)) == 576 * size * item
    for sizes in (TorchSizes, CudaSizes, AscendSizes):
        spec = CacheSpec((LatentLayer(512, 64),) * 2, 16, "bfloat16")
        assert sizes("auto", None).kv_bytes_per_page(spec) == 2 * 576 * 16 * 2


def test_who_only_asks_counts_the_bytes_of_the_weights(bench: Bench, variant: Variant) -> None:
    if variant.backend == "reference":  # nobody plans for it
        return
    if variant.backend == "cpu":
        from mooli.backends.cpu.packing import CpuSizes

        sizes: Any = CpuSizes(variant.dtype, variant.quantization)
    else:
        sizes = {"torch": TorchSizes, "ascend": AscendSizes}[variant.backend](variant.dtype, variant.quantization)
    sizes.load_latent(
        raw(np.zeros((SPEC.num_heads * SPEC.rank, SPEC.nope_dim))),
        raw(np.zeros((SPEC.num_heads * SPEC.value_dim, SPEC.rank))),
        SPEC,
    )
    assert sizes.weight_bytes() == bench.up_bytes


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16"])
def test_every_instruction_set_computes_it(level: str, kv_dtype: str) -> None:
    with cpu_backend(level) as backend:
        bench = Bench(backend, kv_dtype)
        expected = defined(*bench.inputs())
        whole = bench.run(bench.row(0, NUM_TOKENS, 0))
        assert error_of(whole, expected) <= {"float32": 3e-6, "float16": 0.001, "bfloat16": 0.006}[kv_dtype]
        parts = [bench.run(bench.row(0, 133, 1)), bench.run(bench.row(133, 166, 1)), bench.run(bench.row(299, 1, 1))]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


WRONG = {
    "another rank": (2, replace(SPEC, rank=32), "latents of 32 and 16 numbers in layer 2, which keeps LatentLayer"),
    "keys and values": (0, SPEC, "in layer 0, which keeps PagedLayer"),
    "no such layer": (3, SPEC, "in layer 3, which keeps None"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_latents_that_a_layer_does_not_keep_are_refused(float32_backend: Backend, wrong: str) -> None:
    layer, spec, words = WRONG[wrong]
    backend, ops = float32_backend, float32_backend.ops
    q, latent = (backend.load_embedding(raw(np.zeros((4, width)))) for width in (spec.query_width, spec.width))
    norm = backend.load_vector(raw(np.ones(spec.rank)))
    keys = raw(np.zeros((spec.num_heads * spec.rank, spec.nope_dim)))
    up = backend.load_latent(keys, raw(np.zeros((spec.num_heads * spec.value_dim, spec.rank))), spec)
    page_size = backend.default_page_size
    backend.allocate(CacheSpec(LAYERS, page_size, "float32"), 4, LIMITS)
    captured = backend.capture(
        lambda b: ops.attend_latent(b, layer, ops.embed(b, q), ops.embed(b, latent), norm, EPS, up, ROPE, spec)
    )
    with pytest.raises(ConfigError, match=words):
        captured(backend.plan(step([Row([1], 0, [0])], page_size)))


def test_torch_makes_keys_and_values_of_prompts_of_some_heads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    require("torch")
    from mooli.backends.torch import latent
    from mooli.backends.torch.step_plan import ChunkRow

    deepseek = LatentSpec(num_heads=128, rank=512, nope_dim=128, rope_dim=64, value_dim=128, scale=0.07)
    for length, start, expanded in ((1, 4000, False), (64, 4000, False), (512, 4000, True), (100, 0, True)):
        assert latent.takes_less_expanded(ChunkRow(0, start, length, None), deepseek) is expanded  # type: ignore[arg-type]
    backend = create_backend("torch", dtype="float32")
    bench = Bench(backend, "float32")
    expected = defined(*bench.inputs())
    monkeypatch.setattr(latent, "EXPANDED_AT_A_TIME", 2 * 2 * 40 * 300)
    rows: list[int] = []
    attend = latent.PagedAttention.attend_gathered

    def counted(self: Any, batch: Any, row: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
        rows.append(len(k))
        return attend(self, batch, row, q, k, v, *rest)

    monkeypatch.setattr(latent.PagedAttention, "attend_gathered", counted)
    actual = bench.run(bench.row(0, NUM_TOKENS, 0))
    assert rows == [2, 2, 1]
    assert error_of(actual, expected) <= 3e-6
    # Beside it a row that looks back on much, in the other form, and single tokens.
    bench.run(bench.row(0, 290, 1))
    rows.clear()
    actual = bench.run(bench.row(290, 2, 1), bench.row(17, 1, 0), bench.row(0, 200, 2), bench.row(299, 1, 0))
    assert rows == [1, 3, 2]
    tokens = [290, 291, 17, *range(200), 299]
    assert error_of(actual, expected[tokens]) <= 3e-6
    backend.close()


def test_an_npu_attends_to_single_tokens_of_many_sequences_at_once() -> None:
    with simulated_npu():
        backend = create_backend("ascend", dtype="bfloat16")
        bench = Bench(backend, "bfloat16")
        planned = backend.plan(step([bench.row(position, 1, 0) for position in (299, 250, 200)], bench.page_size))
        assert not planned.decode, "there is a layer with keys and values, which has a fused operation"
        backend.allocate(CacheSpec(LAYERS[1:], bench.page_size, "bfloat16"), 20, LIMITS)
        planned = backend.plan(step([bench.row(position, 1, 0) for position in (299, 250, 200)], bench.page_size))
        assert (len(planned.decode), len(planned.chunks)) == (1, 0)
        backend.close()


def test_ordinary_attention_where_latents_are_kept_and_rows_of_another_shape_are_refused() -> None:
    backend = create_backend("reference")
    ops, page_size = backend.ops, backend.default_page_size
    table = backend.load_embedding(raw(np.zeros((4, 96))))
    norm, up = (
        backend.load_vector(raw(NORM)),
        backend.load_latent(raw(KEYS[0]), raw(VALUES[0]), replace(SPEC, num_heads=1)),
    )
    backend.allocate(CacheSpec(LAYERS, page_size, "float32"), 4, LIMITS)
    planned = backend.plan(step([Row([1], 0, [0])], page_size))
    x = ops.embed(planned, table)
    with pytest.raises(ConfigError, match=r"attention in layer 1, which keeps LatentLayer"):
        ops.attend(planned, 1, x, AttentionSpec(1, 1, 32, 1.0))
    with pytest.raises(ConfigError, match=r"queries of 96 values and latents of 96"):
        ops.attend_latent(planned, 1, x, x, norm, EPS, up, ROPE, SPEC)


def test_the_cpu_refuses_widths_that_its_kernels_do_not_read() -> None:
    with cpu_backend() as backend, pytest.raises(UnsupportedModelError, match="latents of 40 and 8 numbers"):
        backend.allocate(CacheSpec((LatentLayer(40, 8),), 32, "float32"), 4, LIMITS)
