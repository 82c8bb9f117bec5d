"""Every operation of the seam against its definition in float64, on every backend.

The definitions here are written from the formulas, in float64 and with plain loops, and share no code with any backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from mooli.backends.base import AttentionSpec, Backend, RopeSpec
from mooli.batch import PageCopy, ScheduleBatch
from mooli.errors import ConfigError
from mooli.tensor import GGUF_TYPES, RawTensor, TensorType
from steps import LIMITS, Pages, Row, step, uniform_cache
from variants import WORST, Variant

Floats = NDArray[np.float64]

HIDDEN = 128
SPEC = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=32, scale=32**-0.5)
QKV_SIZE = (SPEC.num_heads + 2 * SPEC.num_kv_heads) * SPEC.head_dim
NUM_PAGES = 24


def raw(values: NDArray[Any], name: str = "t") -> RawTensor:
    data = np.ascontiguousarray(values, dtype=np.float32)
    return RawTensor(name, TensorType.F32, data.shape, data.reshape(-1, data.shape[-1]).view(np.uint8))


def random(seed: int, *shape: int, scale: float = 1.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def allocate(backend: Backend, variant: Variant, page_size: int | None = None, num_layers: int = 1) -> int:
    page_size = page_size or backend.default_page_size
    spec = uniform_cache(num_layers, SPEC.num_kv_heads, SPEC.head_dim, page_size, variant.kv_dtype)
    backend.allocate(spec, NUM_PAGES, LIMITS)
    return page_size


def run(
    backend: Backend, table: Any, batch: ScheduleBatch, build: Callable[[Any, Any], Any] | None = None
) -> NDArray[np.float32]:
    """What `build(batch, x)` gives for x = the step's rows of an embedding table that the backend has loaded."""

    def function(planned: Any) -> Any:
        x = backend.ops.embed(planned, table)
        return x if build is None else build(planned, x)

    captured = backend.capture(function)
    return np.array(backend.to_host(captured(backend.plan(batch))), dtype=np.float32)


def run_op(
    backend: Backend, variant: Variant, inputs: NDArray[np.float32], build: Callable[[Any, Any], Any]
) -> tuple[Floats, NDArray[np.float32]]:
    """(x as the backend sees it, result): inputs may be rounded when they are loaded, which is not the operation's."""
    table = backend.load_embedding(raw(inputs))
    page_size = allocate(backend, variant)
    pages = list(range(-(-len(inputs) // page_size)))
    batch = step([Row(range(len(inputs)), 0, pages)], page_size)
    x = run(backend, table, batch).astype(np.float64)
    return x, run(backend, table, batch, build)


def assert_close(actual: NDArray[Any], expected: NDArray[Any], bound: float) -> None:
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    scale = np.sqrt(np.mean(expected**2, axis=-1, keepdims=True)) + 1e-30
    error = np.abs(actual - expected) / scale
    assert np.sqrt(np.mean(error**2, axis=-1)).max() <= bound
    assert error.max() <= WORST * bound


def silu(x: Floats) -> Floats:
    return x / (1 + np.exp(-x))


def normed(x: Floats, weight: NDArray[Any], eps: float) -> Floats:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


@pytest.fixture
def eps() -> float:
    return 1e-5


def test_embedding_gives_the_rows_of_its_table(backend: Backend, variant: Variant) -> None:
    table = random(0, 40, HIDDEN)
    loaded = backend.load_embedding(raw(table))
    page_size = allocate(backend, variant)
    ids = [7, 0, 39, 7, 21]
    actual = run(backend, loaded, step([Row(ids, 0, [0] * (len(ids) // page_size + 1))], page_size))
    assert_close(actual, table[ids].astype(np.float64), variant.embed)


def test_an_embedding_may_be_scaled(backend: Backend, variant: Variant) -> None:
    table = random(0, 40, HIDDEN)
    loaded = backend.load_embedding(raw(table))
    page_size = allocate(backend, variant)
    forward = backend.capture(lambda batch: backend.ops.embed(batch, loaded, 8.0))  # a number that rounds nothing
    planned = backend.plan(step([Row([7, 0, 39], 0, [0] * (3 // page_size + 1))], page_size))
    actual = np.array(backend.to_host(forward(planned)), dtype=np.float64)
    assert_close(actual, 8.0 * table[[7, 0, 39]].astype(np.float64), variant.embed)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0], ids=["tiny", "unit", "large"])
def test_rms_norm_divides_by_the_root_mean_square(backend: Backend, variant: Variant, eps: float, scale: float) -> None:
    gain = random(1, HIDDEN) + 1
    weight = backend.load_vector(raw(gain))
    x, actual = run_op(
        backend, variant, random(2, 9, HIDDEN, scale=scale), lambda _, x: backend.ops.rms_norm(x, weight, eps)
    )
    assert_close(actual, normed(x, gain, eps), variant.norm)


def test_rms_norm_adds_a_residual_which_it_may_overwrite(backend: Backend, variant: Variant) -> None:
    gain = random(1, HIDDEN) + 1
    weight, matrix = backend.load_vector(raw(gain)), random(3, HIDDEN, HIDDEN)
    linear = backend.load_linear([raw(matrix)])

    def branch(batch: Any, x: Any) -> Any:
        return backend.ops.rms_norm(backend.ops.linear(batch, x, linear), weight, 1e-6, residual=x)

    x, actual = run_op(backend, variant, random(2, 9, HIDDEN), branch)
    expected = normed(x @ matrix.T.astype(np.float64), gain, 1e-6) + x
    assert_close(actual, expected, 2 * variant.linear)


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 13, 33])
def test_linear_is_a_matrix_product(backend: Backend, variant: Variant, num_tokens: int) -> None:
    matrix = random(3, 96, HIDDEN)
    weight = backend.load_linear([raw(matrix)])
    x, actual = run_op(
        backend, variant, random(4, num_tokens, HIDDEN), lambda batch, x: backend.ops.linear(batch, x, weight)
    )
    assert_close(actual, x @ matrix.T.astype(np.float64), variant.linear)


def test_linear_stacks_its_tensors_and_adds_biases_and_residual(backend: Backend, variant: Variant) -> None:
    parts = [random(5 + i, rows, HIDDEN) for i, rows in enumerate((64, 32, 32))]
    biases = [random(9 + i, rows, scale=10) for i, rows in enumerate((64, 32, 32))]
    weight = backend.load_linear([raw(part) for part in parts], [raw(bias) for bias in biases])
    x, actual = run_op(
        backend,
        variant,
        random(12, 7, HIDDEN, scale=3),
        lambda batch, x: backend.ops.linear(batch, x, weight, residual=x),
    )
    product = x @ np.concatenate(parts).T.astype(np.float64)
    assert_close(actual - np.concatenate(biases) - x, product, variant.linear + 3e-6)


@pytest.mark.parametrize("rows", [31, 50, 203], ids=lambda rows: f"{rows}-outputs")
def test_the_head_may_have_any_number_of_outputs(backend: Backend, variant: Variant, rows: int) -> None:
    matrix = random(13, rows, HIDDEN)
    weight = backend.load_linear([raw(matrix)], head=True)
    x, actual = run_op(backend, variant, random(14, 3, HIDDEN), lambda batch, x: backend.ops.linear(batch, x, weight))
    assert_close(actual, x @ matrix.T.astype(np.float64), variant.head)


SCALES = {
    TensorType.Q2_K: (80, 2),
    TensorType.Q3_K: (108, 1),
    TensorType.Q4_K: (0, 2),
    TensorType.Q5_K: (0, 2),
    TensorType.Q6_K: (208, 1),
    TensorType.IQ4_NL: (0, 1),
    TensorType.IQ4_XS: (0, 1),
}
"""Types that the gguf package cannot write: where a block has float16 scales, and how many."""


def block_tensor(kind: TensorType, rows: int, columns: int, seed: int) -> tuple[RawTensor, Floats]:
    """A tensor of a GGUF storage type, and its values by the gguf package."""
    quant = gguf.GGMLQuantizationType(int(kind))
    values = random(seed, rows, columns)
    if kind in SCALES:
        # Random codes under sane scales are as good.
        block, block_bytes = gguf.GGML_QUANT_SIZES[quant]
        data = np.random.default_rng(seed).integers(0, 256, (rows, columns // block, block_bytes), dtype=np.uint8)
        scales = random(seed + 1, rows, columns // block, 2, scale=0.01).astype(np.float16).view(np.uint8)
        begin, count = SCALES[kind]
        data[..., begin : begin + 2 * count] = scales[..., : 2 * count]
        data = data.reshape(rows, -1)
    else:
        data = np.ascontiguousarray(gguf.quants.quantize(values, quant)).view(np.uint8).reshape(rows, -1)
    exact = gguf.quants.dequantize(data, quant).astype(np.float64)
    return RawTensor("t", kind, (rows, columns), data), exact


@pytest.mark.parametrize("kind", GGUF_TYPES, ids=[kind.name for kind in GGUF_TYPES])
def test_linear_takes_every_storage_type(backend: Backend, variant: Variant, kind: TensorType) -> None:
    columns = 256
    tensor, exact = block_tensor(kind, 64, columns, seed=20)
    weight = backend.load_linear([tensor])
    x, actual = run_op(backend, variant, random(15, 5, columns), lambda batch, x: backend.ops.linear(batch, x, weight))
    bound = variant.blocks
    if kind in (TensorType.F32, TensorType.F16, TensorType.BF16):
        bound = variant.linear
    elif kind in (
        TensorType.Q4_0,
        TensorType.Q4_1,
        TensorType.Q5_0,
        TensorType.Q8_0,
        TensorType.IQ4_NL,
        TensorType.MXFP4,
    ):
        bound = variant.lossless
        if kind == TensorType.Q4_0 and variant.backend == "cpu":
            bound *= 2  # beside four bits the scales of activations are powers of two
    assert_close(actual, x @ exact.T, bound)


def test_linear_takes_int8_with_a_scale_for_each_row(backend: Backend, variant: Variant) -> None:
    codes = np.random.default_rng(21).integers(-127, 128, (96, 256), dtype=np.int8)
    scales = np.abs(random(22, 96, scale=1e-3)) + np.float32(1e-4)
    tensor = RawTensor("t", TensorType.I8, codes.shape, codes.view(np.uint8), scales)
    halves = tensor.take_rows(np.arange(40)), tensor.take_rows(np.arange(40, 96))
    weight = backend.load_linear(halves)
    x, actual = run_op(backend, variant, random(15, 5, 256), lambda batch, x: backend.ops.linear(batch, x, weight))
    # On NPUs in 16 bits it is the quantised product, with one step for a whole row of activations.
    bound = 0.016 if variant.backend == "ascend" else max(variant.lossless, variant.linear)
    if variant.quantization == "int8" and variant.backend == "torch":
        bound = 3e-6  # not rounded a second time
    if variant.quantization == "int4":
        bound = variant.blocks
    assert_close(actual, x @ (codes * scales[:, None].astype(np.float64)).T, bound)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_gated_linear_multiplies_silu_of_gate_with_up(backend: Backend, variant: Variant, biased: bool) -> None:
    gate, up = random(16, 96, HIDDEN, scale=0.2), random(17, 96, HIDDEN, scale=0.2)
    biases = [random(18, 96), random(19, 96)] if biased else []
    weight = backend.load_gated(raw(gate), raw(up), [raw(bias) for bias in biases])
    x, actual = run_op(
        backend, variant, random(20, 6, HIDDEN), lambda batch, x: backend.ops.gated_linear(batch, x, weight)
    )
    gate_bias, up_bias = biases or (0, 0)
    expected = silu(x @ gate.T.astype(np.float64) + gate_bias) * (x @ up.T.astype(np.float64) + up_bias)
    # A product of two inexact factors; silu's slope never exceeds 1.1.
    assert_close(actual, expected, 2 * variant.linear)


def test_gated_linear_with_gelu(backend: Backend, variant: Variant) -> None:
    gate, up = random(16, 96, HIDDEN, scale=0.2), random(17, 96, HIDDEN, scale=0.2)
    weight = backend.load_gated(raw(gate), raw(up), activation="gelu_tanh")
    x, actual = run_op(
        backend, variant, random(20, 6, HIDDEN), lambda batch, x: backend.ops.gated_linear(batch, x, weight)
    )
    gates = x @ gate.T.astype(np.float64)
    expected = gates * (1 + np.tanh(np.sqrt(2 / np.pi) * (gates + 0.044715 * gates**3))) / 2
    assert_close(actual, expected * (x @ up.T.astype(np.float64)), 2 * variant.linear)


def test_silu_keeps_its_limits_for_large_inputs(backend: Backend, variant: Variant) -> None:
    gate, up = np.zeros((32, HIDDEN), dtype=np.float32), np.zeros((32, HIDDEN), dtype=np.float32)
    gate[0::2, 0], gate[1::2, 0], up[:, 0] = 1, -1, 1
    inputs = np.zeros((2, HIDDEN), dtype=np.float32)
    inputs[:, 0] = 64, 250  # exp(250) is beyond float32, and the square of 250 is not beyond float16
    weight = backend.load_gated(raw(gate), raw(up))
    x, actual = run_op(backend, variant, inputs, lambda batch, x: backend.ops.gated_linear(batch, x, weight))
    square = np.broadcast_to(x[:, :1] ** 2, (2, 16))
    np.testing.assert_allclose(actual[:, 0::2], square, rtol=0.02)
    np.testing.assert_allclose(actual[:, 1::2], 0, atol=1e-6)


def test_head_norm_norms_each_query_and_key_head_and_no_value(backend: Backend, variant: Variant, eps: float) -> None:
    q_gain, k_gain = random(21, SPEC.head_dim) + 1, random(22, SPEC.head_dim) + 1
    q_weight, k_weight = backend.load_vector(raw(q_gain)), backend.load_vector(raw(k_gain))
    x, actual = run_op(
        backend,
        variant,
        random(23, 5, QKV_SIZE, scale=4),
        lambda _, x: backend.ops.head_norm(x, SPEC, q_weight, k_weight, eps),
    )
    heads = x.reshape(5, -1, SPEC.head_dim).copy()
    for head in range(SPEC.num_heads + SPEC.num_kv_heads):
        heads[:, head] = normed(heads[:, head], q_gain if head < SPEC.num_heads else k_gain, eps)
    assert_close(actual, heads.reshape(5, -1), variant.norm)


def rotated(x: Floats, positions: NDArray[Any], inv_freq: Floats) -> Floats:
    """Each pair (i, i + d/2) of a query or key head as a complex number, turned by its angle."""
    heads = x.reshape(len(x), -1, SPEC.head_dim).copy()
    half = SPEC.head_dim // 2
    turning = SPEC.num_heads + SPEC.num_kv_heads
    turned = (heads[:, :turning, :half] + 1j * heads[:, :turning, half:]) * np.exp(
        1j * positions[:, None, None] * inv_freq
    )
    heads[:, :turning, :half], heads[:, :turning, half:] = turned.real, turned.imag
    return heads.reshape(len(x), -1)


@pytest.mark.parametrize("start", [0, 1, 5000], ids=lambda start: f"from-{start}")
def test_rope_turns_queries_and_keys_by_position(backend: Backend, variant: Variant, start: int) -> None:
    inv_freq = 10000.0 ** (-np.arange(0, SPEC.head_dim, 2) / SPEC.head_dim)
    table = backend.load_embedding(raw(random(24, 6, QKV_SIZE)))
    page_size = allocate(backend, variant)
    batch = step([Row(range(6), start, [0] * ((start + 6) // page_size + 1))], page_size)
    x = run(backend, table, batch).astype(np.float64)
    actual = run(backend, table, batch, lambda b, x: backend.ops.rope(b, x, SPEC, RopeSpec(inv_freq)))
    assert_close(actual, rotated(x, batch.positions, inv_freq), variant.norm)


def test_rope_lengthens_what_it_turns_where_it_has_a_factor(backend: Backend, variant: Variant) -> None:
    inv_freq = 10000.0 ** (-np.arange(0, SPEC.head_dim, 2) / SPEC.head_dim)
    table = backend.load_embedding(raw(random(24, 6, QKV_SIZE)))
    page_size = allocate(backend, variant)
    batch = step([Row(range(6), 40, [0] * (46 // page_size + 1))], page_size)
    x = run(backend, table, batch).astype(np.float64)

    def turned(b: Any, x: Any) -> Any:
        # The same frequencies by another factor are another rotation.
        return backend.ops.rope(b, backend.ops.rope(b, x, SPEC, RopeSpec(inv_freq, 1.5)), SPEC, RopeSpec(inv_freq, 0.5))

    expected = rotated(rotated(x, batch.positions, inv_freq), batch.positions, inv_freq)
    heads = expected.reshape(len(x), -1, SPEC.head_dim)
    heads[:, : SPEC.num_heads + SPEC.num_kv_heads] *= 0.75
    actual = run(backend, table, batch, turned)
    assert_close(actual, expected, 2 * variant.norm)


def test_rope_turns_by_its_own_positions_and_attention_goes_by_indices(backend: Backend, variant: Variant) -> None:
    """A picture's tokens have one place in the text and many in the cache; a graph has both in buffers of its own."""
    rope = RopeSpec(10000.0 ** (-np.arange(0, SPEC.head_dim, 2) / SPEC.head_dim))
    table = backend.load_embedding(raw(random(27, 24, QKV_SIZE)))
    page_size = allocate(backend, variant)
    pages = Pages(NUM_PAGES, page_size).take(24)
    places = np.array([*range(4), *[4] * 9, *range(40, 51)], np.int32)
    qkv = embedded(backend, table, 24, page_size)
    expected = attended(rotated(qkv, places, rope.inv_freq), SPEC)

    def turned(batch: Any, x: Any) -> Any:
        return backend.ops.attend(batch, 0, backend.ops.rope(batch, x, SPEC, rope), SPEC)

    for first, end in ((0, 20), (20, 21), (21, 22), (22, 24)):
        batch = step([Row(range(first, end), first, pages)], page_size)
        batch.rope_positions = places[first:end].copy()
        actual = run(backend, table, batch, turned)
        assert_close(actual, expected[first:end], max(variant.attend, variant.norm))


def attended(qkv: Floats, spec: AttentionSpec) -> Floats:
    """Causal attention of one whole sequence, token by token and head by head."""
    heads = qkv.reshape(len(qkv), -1, spec.head_dim)
    q = heads[:, : spec.num_heads]
    k = heads[:, spec.num_heads : spec.num_heads + spec.num_kv_heads]
    v = heads[:, spec.num_heads + spec.num_kv_heads :]
    out = np.zeros_like(q)
    for token in range(len(qkv)):
        first = max(0, token - spec.window + 1) if spec.window else 0
        for head in range(spec.num_heads):
            kv_head = head // (spec.num_heads // spec.num_kv_heads)
            scores = k[first : token + 1, kv_head] @ q[token, head] * spec.scale
            weights = np.exp(scores - scores.max())
            out[token, head] = weights @ v[first : token + 1, kv_head] / weights.sum()
    return out.reshape(len(qkv), -1)


def attend(backend: Backend, table: Any, batch: ScheduleBatch, spec: AttentionSpec = SPEC) -> NDArray[np.float32]:
    return run(backend, table, batch, lambda b, x: backend.ops.attend(b, 0, x, spec))


def embedded(backend: Backend, table: Any, num_tokens: int, page_size: int) -> Floats:
    """All rows of the table as the backend sees them."""
    pages = list(range(num_tokens // page_size + 1))
    return run(backend, table, step([Row(range(num_tokens), 0, pages)], page_size)).astype(np.float64)


@pytest.mark.parametrize("multiple", [1, 2, 4], ids=["default pages", "double", "fourfold"])
@pytest.mark.parametrize("num_tokens", [1, 16, 45])
def test_attention_over_a_whole_prompt(backend: Backend, variant: Variant, multiple: int, num_tokens: int) -> None:
    table = backend.load_embedding(raw(random(25, 45, QKV_SIZE)))
    page_size = backend.default_page_size * multiple
    try:
        backend.check_page_size(page_size)
    except ConfigError as exc:
        pytest.skip(str(exc))
    allocate(backend, variant, page_size)
    pages = Pages(NUM_PAGES, page_size).take(num_tokens)
    qkv = embedded(backend, table, num_tokens, page_size)
    actual = attend(backend, table, step([Row(range(num_tokens), 0, pages)], page_size))
    assert_close(actual, attended(qkv, SPEC), variant.attend)


@pytest.mark.parametrize("window", [0, 1, 7, 32], ids=lambda window: f"window-{window}")
@pytest.mark.parametrize("chunks", [(45,), (1,) * 20, (13, 1, 20, 11)], ids=["whole", "token by token", "chunks"])
def test_attention_is_the_same_however_a_prompt_is_cut(
    backend: Backend, variant: Variant, window: int, chunks: tuple[int, ...]
) -> None:
    spec = AttentionSpec(SPEC.num_heads, SPEC.num_kv_heads, SPEC.head_dim, SPEC.scale, window)
    total = sum(chunks)
    table = backend.load_embedding(raw(random(26, total, QKV_SIZE)))
    page_size = allocate(backend, variant)
    pages = Pages(NUM_PAGES, page_size).take(total)
    qkv = embedded(backend, table, total, page_size)
    parts, start = [], 0
    for length in chunks:
        batch = step([Row(range(start, start + length), start, pages)], page_size)
        parts.append(attend(backend, table, batch, spec))
        start += length
    assert_close(np.concatenate(parts), attended(qkv, spec), variant.attend)


def test_attention_of_a_mix_of_rows_is_that_of_each_row_alone(backend: Backend, variant: Variant) -> None:
    lengths = {"decode": 40, "chunk": 30, "prompt": 9}
    table = backend.load_embedding(raw(random(27, 40, QKV_SIZE)))
    page_size = allocate(backend, variant)
    pool = Pages(NUM_PAGES, page_size)
    pages = {name: pool.take(length) for name, length in lengths.items()}
    qkv = embedded(backend, table, 40, page_size)
    first = [Row(range(39), 0, pages["decode"]), Row(range(12), 0, pages["chunk"])]
    attend(backend, table, step(first, page_size))
    second = [
        Row([39], 39, pages["decode"]),
        Row(range(12, 30), 12, pages["chunk"]),
        Row(range(9), 0, pages["prompt"]),
    ]
    actual = attend(backend, table, step(second, page_size))
    expected = attended(qkv, SPEC)
    assert_close(actual, np.concatenate([expected[39:40], expected[12:30], expected[:9]]), variant.attend)


def test_rows_that_share_pages_read_the_same_keys(backend: Backend, variant: Variant) -> None:
    num_tokens = max(60, backend.default_page_size)
    table = backend.load_embedding(raw(random(28, num_tokens, QKV_SIZE)))
    page_size = allocate(backend, variant)
    pool = Pages(NUM_PAGES, page_size)
    shared = pool.take(page_size)
    qkv = embedded(backend, table, num_tokens, page_size)
    attend(backend, table, step([Row(range(page_size), 0, shared)], page_size))
    tails = ([50, 51, 52], [53, 54])
    rows = [Row(tail, page_size, shared + pool.take(len(tail))) for tail in tails]
    actual = attend(backend, table, step(rows, page_size))
    expected = [attended(qkv[[*range(page_size), *tail]], SPEC)[page_size:] for tail in tails]
    assert_close(actual, np.concatenate(expected), variant.attend)


def test_what_an_earlier_sequence_left_in_a_page_is_never_read(backend: Backend, variant: Variant) -> None:
    values = random(29, 40, QKV_SIZE)
    values[20:] = 1e4
    table = backend.load_embedding(raw(values))
    page_size = allocate(backend, variant)
    pages = Pages(NUM_PAGES, page_size).take(20)
    qkv = embedded(backend, table, 40, page_size)
    attend(backend, table, step([Row(range(20, 40), 0, pages)], page_size))
    actual = attend(backend, table, step([Row(range(11), 0, pages)], page_size))
    assert_close(actual, attended(qkv[:11], SPEC), variant.attend)


def test_layers_have_their_own_keys_and_values(backend: Backend, variant: Variant) -> None:
    table = backend.load_embedding(raw(random(30, 24, QKV_SIZE)))
    page_size = allocate(backend, variant, num_layers=2)
    pages = Pages(NUM_PAGES, page_size).take(12)
    qkv = embedded(backend, table, 24, page_size)
    attend(backend, table, step([Row(range(11), 0, pages)], page_size))
    other = step([Row(range(12, 23), 0, pages)], page_size)
    run(backend, table, other, lambda b, x: backend.ops.attend(b, 1, x, SPEC))
    actual = attend(backend, table, step([Row([11], 11, pages)], page_size))
    assert_close(actual, attended(qkv[:12], SPEC)[11:], variant.attend)


NARROW = AttentionSpec(num_heads=2, num_kv_heads=SPEC.num_kv_heads, head_dim=SPEC.head_dim, scale=0.1)
KINDS = {
    "window last": (SPEC, replace(SPEC, window=7)),
    "window first": (replace(SPEC, window=7), SPEC),
    "in turns": (replace(SPEC, window=30), SPEC, replace(SPEC, window=30), replace(SPEC, window=1)),
    "heads and scale": (SPEC, NARROW, replace(NARROW, window=7), replace(SPEC, scale=0.12)),
}


@pytest.mark.parametrize("specs", KINDS.values(), ids=KINDS)
def test_each_layer_attends_with_its_own_heads_scale_and_window(
    backend: Backend, variant: Variant, specs: tuple[AttentionSpec, ...]
) -> None:
    page_size = backend.default_page_size
    # Long enough that a window leaves out whole blocks of keys.
    total, num_shared = 300, 256
    kv = uniform_cache(len(specs), SPEC.num_kv_heads, SPEC.head_dim, page_size, variant.kv_dtype)
    backend.allocate(kv, 2 * total // page_size + 8, LIMITS)
    widths = sorted({qkv_size(spec) for spec in specs})
    tables = {width: backend.load_embedding(raw(random(44 + width, total, width))) for width in widths}
    pool = Pages(2 * total // page_size + 8, page_size)
    shared = pool.take(num_shared)
    one, other, cold = shared + pool.take(44), shared + pool.take(2), pool.take(20)
    steps = [
        step([Row(range(128), 0, shared)], page_size),
        step([Row(range(128, 256), 128, shared)], page_size),
        step([Row(range(256, 299), 256, one), Row(range(9), 0, cold)], page_size),
        # A token that continues a row, a chunk, and a row that shares the first pages of another.
        step([Row([299], 299, one), Row(range(9, 15), 9, cold), Row([3, 5], 256, other)], page_size),
    ]
    tails = [[*range(300)], [*range(15)], [*range(256), 3, 5]]
    for layer, spec in enumerate(specs):

        def every_layer(batch: Any, _: Any, wanted: int = layer) -> Any:
            x = {width: backend.ops.embed(batch, table) for width, table in tables.items()}
            mixed = [backend.ops.attend(batch, i, x[qkv_size(kind)], kind) for i, kind in enumerate(specs)]
            return mixed[wanted]

        actual = [run(backend, tables[widths[0]], batch, every_layer) for batch in steps]
        table = tables[qkv_size(spec)]
        parts = [step([Row(range(first, first + 100), 0, shared)], page_size) for first in (0, 100, 200)]
        qkv = np.concatenate([run(backend, table, part) for part in parts]).astype(np.float64)
        a, b, c = (attended(qkv[tail], spec) for tail in tails)
        expected = [a[:128], a[128:256], np.concatenate([a[256:299], b[:9]]), np.concatenate([a[299:], b[9:], c[256:]])]
        for one_step, wanted in zip(actual, expected, strict=True):
            assert_close(one_step, wanted, variant.attend)


def qkv_size(spec: AttentionSpec) -> int:
    return (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim


@pytest.mark.parametrize("kept", [1, 5, 15], ids=lambda kept: f"{kept}-tokens")
def test_a_copied_page_head_continues_another_sequence(backend: Backend, variant: Variant, kept: int) -> None:
    num_tokens = max(80, 40 + backend.default_page_size)
    table = backend.load_embedding(raw(random(31, num_tokens, QKV_SIZE)))
    page_size = allocate(backend, variant)
    source, target = Pages(NUM_PAGES, page_size).take(2 * page_size)
    qkv = embedded(backend, table, num_tokens, page_size)
    attend(backend, table, step([Row(range(page_size), 0, [source])], page_size))
    backend.copy_pages([PageCopy(source, target, kept)])
    tail = range(40, 40 + page_size - kept)
    # Writing the copy must leave the source as it was: both go on, the copy with other tokens.
    actual = attend(backend, table, step([Row(tail, kept, [target])], page_size))
    assert_close(actual, attended(qkv[[*range(kept), *tail]], SPEC)[kept:], variant.attend)
    last = attend(backend, table, step([Row([page_size - 1], page_size - 1, [source])], page_size))
    assert_close(last, attended(qkv[:page_size], SPEC)[-1:], variant.attend)


def test_copies_are_carried_out_in_order(backend: Backend, variant: Variant) -> None:
    table = backend.load_embedding(raw(random(32, 20, QKV_SIZE)))
    page_size = allocate(backend, variant)
    first, second, third = Pages(NUM_PAGES, page_size).take(3 * page_size)
    qkv = embedded(backend, table, 20, page_size)
    attend(backend, table, step([Row(range(9), 0, [first])], page_size))
    backend.copy_pages([PageCopy(first, second, 9), PageCopy(second, third, 8)])
    actual = attend(backend, table, step([Row([8], 8, [third])], page_size))
    assert_close(actual, attended(qkv[:9], SPEC)[-1:], variant.attend)


def test_a_row_does_not_depend_on_the_rows_beside_it(backend: Backend, variant: Variant, eps: float) -> None:
    table = backend.load_embedding(raw(random(33, 33, HIDDEN)))
    gain = backend.load_vector(raw(random(34, HIDDEN)))
    qkv_weight = backend.load_linear([raw(random(35, QKV_SIZE, HIDDEN, scale=0.1))])
    out_weight = backend.load_linear([raw(random(36, HIDDEN, SPEC.num_heads * SPEC.head_dim, scale=0.1))])
    gated = backend.load_gated(raw(random(37, 160, HIDDEN, scale=0.1)), raw(random(38, 160, HIDDEN, scale=0.1)))
    page_size = allocate(backend, variant)

    def layer(batch: Any, x: Any) -> Any:
        ops = backend.ops
        qkv = ops.linear(batch, ops.rms_norm(x, gain, eps), qkv_weight)
        x = ops.linear(batch, ops.attend(batch, 0, qkv, SPEC), out_weight, residual=x)
        return ops.gated_linear(batch, x, gated)

    together = run(backend, table, step([Row([i], 0, [i % NUM_PAGES]) for i in range(13)], page_size), layer)
    alone = [run(backend, table, step([Row([i], 0, [5])], page_size), layer)[0] for i in range(13)]
    if variant.exact_rows:
        np.testing.assert_array_equal(together, np.stack(alone))
    else:
        assert_close(together, np.stack(alone).astype(np.float64), variant.alone)


def test_taken_rows_feed_another_function(backend: Backend, variant: Variant) -> None:
    table = backend.load_embedding(raw(random(39, 9, HIDDEN)))
    head = random(40, 50, HIDDEN)
    weight = backend.load_linear([raw(head)], head=True)
    page_size = allocate(backend, variant)
    forward = backend.capture(lambda batch: backend.ops.embed(batch, table))
    logits = backend.capture(lambda batch, hidden: backend.ops.linear(batch, hidden, weight))
    planned = backend.plan(step([Row(range(9), 0, [0] * (9 // page_size + 1))], page_size))
    hidden = forward(planned)
    x = np.array(backend.to_host(hidden), dtype=np.float64)
    for rows in ([8], [0, 3, 8], [4, 4, 1]):
        taken = backend.take_rows(planned, hidden, np.array(rows, dtype=np.int32))
        assert taken[0].tokens.tolist() == rows
        actual = np.array(backend.to_host(logits(*taken)))
        assert_close(actual, x[rows] @ head.T.astype(np.float64), variant.head)


def test_a_tied_table_is_embedding_and_head(backend: Backend, variant: Variant) -> None:
    table = random(43, 90, HIDDEN)
    embedding, head = backend.load_tied(raw(table))
    page_size = allocate(backend, variant)
    forward = backend.capture(lambda batch: backend.ops.embed(batch, embedding))
    logits = backend.capture(lambda batch, hidden: backend.ops.linear(batch, hidden, head))
    planned = backend.plan(step([Row([3, 89, 0, 41], 0, [0])], page_size))
    hidden = forward(planned)
    rows = np.array(backend.to_host(hidden), dtype=np.float64)
    assert_close(rows, table[[3, 89, 0, 41]].astype(np.float64), variant.embed)
    actual = np.array(backend.to_host(logits(*backend.take_rows(planned, hidden, np.arange(4, dtype=np.int32)))))
    assert_close(actual, rows @ table.T.astype(np.float64), variant.head)


def test_weights_are_counted_as_they_are_loaded(backend: Backend) -> None:
    assert backend.weight_bytes() == 0
    backend.load_linear([raw(random(41, 64, HIDDEN))])
    one = backend.weight_bytes()
    backend.load_linear([raw(random(42, 64, HIDDEN))])
    assert one >= 64 * HIDDEN // 2
    assert backend.weight_bytes() == 2 * one


def test_bytes_of_a_page_grow_with_layers(backend: Backend, variant: Variant) -> None:
    def bytes_of(num_layers: int) -> int:
        spec = uniform_cache(num_layers, 2, 32, backend.default_page_size, variant.kv_dtype)
        return backend.kv_bytes_per_page(spec)

    value_bytes = 1 if variant.kv_dtype == "int8" else 2
    assert bytes_of(1) >= 2 * 2 * 32 * backend.default_page_size * value_bytes
    assert bytes_of(3) == 3 * bytes_of(1)


def test_a_backend_tells_what_it_is_and_has(backend: Backend, variant: Variant) -> None:
    assert backend.name == variant.backend
    assert backend.describe()
    memory = backend.memory()
    assert 0 < memory.available_bytes <= memory.total_bytes
    backend.check_page_size(backend.default_page_size)
    with pytest.raises(ConfigError, match="page_size"):
        backend.check_page_size(0)
