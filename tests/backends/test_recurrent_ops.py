"""Every operation of recurrent layers against its definition in float64, on every backend, however a sequence is cut.

The definitions are written from the formulas, in float64 and token by token, and share no code with any backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mooli.backends.base import AttentionSpec, Backend, CacheSpec, DeltaSpec, PagedLayer, RopeSpec, StateLayer
from mooli.batch import StateCopy
from mooli.errors import ConfigError, EngineError
from mooli.tensor import RawTensor, TensorType
from steps import LIMITS, Row, step
from variants import VARIANTS, Variant

Floats = NDArray[np.float64]

CHANNELS, COLUMNS, NUM_TOKENS, NUM_STATES = 32, 4, 21, 6
SPEC = DeltaSpec(num_key_heads=2, key_dim=8, value_dim=16, key_heads=(0, 1, 1, 0))
LAYERS = (
    StateLayer((COLUMNS - 1, CHANNELS)),
    PagedLayer(2, 32),
    StateLayer((COLUMNS - 1, SPEC.row_width), (SPEC.num_heads, SPEC.key_dim, SPEC.value_dim)),
)
CUTS = {"whole": (21,), "token by token": (1,) * 21, "chunks": (1, 2, 13, 5)}


def raw(values: NDArray[Any]) -> RawTensor:
    data = np.ascontiguousarray(values, dtype=np.float32)
    return RawTensor("t", TensorType.F32, data.shape, data.reshape(-1, data.shape[-1]).view(np.uint8))


def random(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-x)))


def assert_close(actual: NDArray[Any], expected: NDArray[Any], variant: Variant) -> None:
    """Within the rounding of activations, relative to a value and to all together."""
    allowed = max(1e-5, 4 * variant.embed) * (np.abs(expected) + np.sqrt(np.mean(expected**2)))
    assert actual.shape == expected.shape and np.isfinite(actual).all()
    assert (np.abs(actual - expected) <= allowed).all()


class Bench:
    """Sequences of rows of two tables through one captured operation."""

    def __init__(self, backend: Backend, variant: Variant, tables: Sequence[NDArray[np.float32]]) -> None:
        self.backend, self.page_size, self.num_tokens = backend, backend.default_page_size, len(tables[0])
        self._tables = [backend.load_embedding(raw(table)) for table in tables]
        # The first values of a row, exact on all backends that keep floats.
        rows = np.eye(3 * CHANNELS, dtype=np.float32)[: 2 * SPEC.num_heads]
        self.gates, self.steps = backend.load_linear([raw(rows)]), backend.load_linear([raw(rows[: SPEC.num_heads])])
        spec = CacheSpec(LAYERS, self.page_size, variant.kv_dtype)
        backend.allocate(spec, 12, replace(LIMITS, max_tokens=2 * self.num_tokens, num_states=NUM_STATES))

    def captured(self, build: Callable[[Any, Any, Any], Any]) -> Callable[[list[Row]], Floats]:
        ops, tables = self.backend.ops, self._tables
        function = self.backend.capture(lambda b: build(b, *(ops.embed(b, table) for table in tables)))

        def run(rows: list[Row]) -> Floats:
            planned = self.backend.plan(step(rows, self.page_size))
            return np.array(self.backend.to_host(function(planned)), dtype=np.float64)

        return run

    def row(self, first: int, count: int, state: int, *saves: tuple[int, int]) -> Row:
        """Tokens first .. first + count of the sequence in slot `state`."""
        pages = [(2 * state + page) % 12 for page in range(-(-self.num_tokens // self.page_size))]
        return Row(range(first, first + count), first, pages, state=state, saves=saves)

    def inputs(self) -> tuple[Floats, Floats]:
        """Both tables, as the backend sees them."""
        whole = [self.row(0, self.num_tokens, 0)]
        return self.captured(lambda b, x, y: x)(whole), self.captured(lambda b, x, y: y)(whole)


def convolved(x: Floats, weight: Floats, bias: Floats) -> Floats:
    out = np.tile(bias, (len(x), 1))
    for token in range(len(x)):
        for column in range(COLUMNS):
            before = token - (COLUMNS - 1) + column
            if before >= 0:
                out[token] += weight[:, column] * x[before]
    return out


def delta_of(qkv: Floats, gates: Floats, decay: Floats, dt_bias: Floats) -> Floats:
    keys, out = SPEC.num_key_heads * SPEC.key_dim, np.zeros((len(qkv), SPEC.num_heads, SPEC.value_dim))
    for head, key_head in enumerate(SPEC.key_heads):
        state = np.zeros((SPEC.key_dim, SPEC.value_dim))
        at = key_head * SPEC.key_dim
        for t, row in enumerate(qkv):
            q, k = row[at : at + SPEC.key_dim], row[keys + at : keys + at + SPEC.key_dim]
            q, k = (x / np.sqrt((x**2).sum() + 1e-6) for x in (q, k))
            v = row[2 * keys + head * SPEC.value_dim :][: SPEC.value_dim]
            b, a = gates[t, head], gates[t, SPEC.num_heads + head]
            state = state * np.exp(decay[head] * np.log1p(np.exp(a + dt_bias[head])))
            state = state + np.outer(k, sigmoid(b) * (v - k @ state))
            out[t, head] = (q / np.sqrt(SPEC.key_dim)) @ state
    return out.reshape(len(qkv), -1)


def scan_of(qkv: Floats, steps: Floats, decay: Floats, dt_bias: Floats, skip: Floats) -> Floats:
    keys, out = SPEC.num_key_heads * SPEC.key_dim, np.zeros((len(qkv), SPEC.num_heads, SPEC.value_dim))
    for head, key_head in enumerate(SPEC.key_heads):
        state = np.zeros((SPEC.value_dim, SPEC.key_dim))
        at = key_head * SPEC.key_dim
        for t, row in enumerate(qkv):
            c, b = row[at : at + SPEC.key_dim], row[keys + at : keys + at + SPEC.key_dim]
            x = row[2 * keys + head * SPEC.value_dim :][: SPEC.value_dim]
            delta = np.log1p(np.exp(steps[t, head] + dt_bias[head]))
            state = np.exp(decay[head] * delta) * state + delta * np.outer(x, b)
            out[t, head] = state @ c + skip[head] * x
    return out.reshape(len(qkv), -1)


def operations(bench: Bench) -> dict[str, tuple[Callable[..., Any], Floats]]:
    """Each recurrence, and what it is."""
    backend, ops = bench.backend, bench.backend.ops
    x, y = bench.inputs()
    weight, bias = random(5, CHANNELS, COLUMNS), random(6, CHANNELS)
    plain = backend.load_conv(raw(weight))
    biased = backend.load_conv(raw(weight), raw(bias))
    wide = random(7, SPEC.row_width, COLUMNS)
    of_values = backend.load_conv(raw(wide))
    decay, dt_bias = -np.abs(random(8, SPEC.num_heads)), random(9, SPEC.num_heads)
    gates, skip = backend.load_delta(raw(decay), raw(dt_bias)), random(10, SPEC.num_heads)
    of_scan = backend.load_scan(raw(decay), raw(dt_bias), raw(skip))
    of_float64 = [vector.astype(np.float64) for vector in (decay, dt_bias, skip)]
    before, after, u = np.split(x, 3, axis=1)
    mixed = convolved(y, wide.astype(np.float64), np.zeros(SPEC.row_width))
    wide_weight = weight.astype(np.float64)
    return {
        "short": (
            lambda b, x, y: ops.short_conv(b, 0, x, biased),
            after * convolved(before * u, wide_weight, bias.astype(np.float64)),
        ),
        "short, no bias": (
            lambda b, x, y: ops.short_conv(b, 0, x, plain),
            after * convolved(before * u, wide_weight, np.zeros(CHANNELS)),
        ),
        "silu": (lambda b, x, y: ops.causal_conv(b, 2, y, of_values), mixed * sigmoid(mixed)),
        "delta": (
            lambda b, x, y: ops.delta_rule(b, 2, y, ops.linear(b, x, bench.gates), gates, SPEC),
            delta_of(y, x[:, : 2 * SPEC.num_heads], *of_float64[:2]),
        ),
        "scan": (
            lambda b, x, y: ops.scan(b, 2, y, ops.linear(b, x, bench.steps), of_scan, SPEC),
            scan_of(y, x[:, : SPEC.num_heads], *of_float64),
        ),
    }


NAMES = ("short", "short, no bias", "silu", "delta", "scan")
GATED = ("delta", "scan")


@pytest.fixture
def bench(backend: Backend, variant: Variant) -> Bench:
    return Bench(
        backend, variant, [random(seed, NUM_TOKENS, w) for seed, w in enumerate((3 * CHANNELS, SPEC.row_width))]
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_recurrence_is_its_definition_however_a_sequence_is_cut(bench: Bench, variant: Variant, name: str) -> None:
    if name in GATED and variant.quantization is not None:
        pytest.skip("gates come out of a product, which is rounded to few bits here")
    build, expected = operations(bench)[name]
    run = bench.captured(build)
    whole = run([bench.row(0, NUM_TOKENS, 1)])
    tolerant = replace(variant, embed=max(variant.embed, 0.001 if name in GATED and variant.linear > 1e-4 else 0.0))
    assert_close(whole, expected, tolerant)
    for cut in CUTS.values():
        parts, first = [], 0
        for count in cut:
            parts.append(run([bench.row(first, count, 2)]))
            first += count
        if variant.exact_rows:
            np.testing.assert_array_equal(np.concatenate(parts), whole)
        else:
            assert_close(np.concatenate(parts), expected, tolerant)


@pytest.mark.parametrize("name", NAMES)
def test_states_are_kept_copied_and_begun_anew(bench: Bench, variant: Variant, name: str) -> None:
    build, _ = operations(bench)[name]
    run = bench.captured(build)
    whole = run([bench.row(0, NUM_TOKENS, 0)])

    def check(rows: list[Row], expected: Floats) -> None:
        actual = run(rows)
        np.testing.assert_array_equal(actual, expected) if variant.exact_rows else assert_close(
            actual, expected, replace(variant, embed=max(variant.embed, 0.002))
        )

    # A row that keeps states on its way, beside one of one token that begins, in a slot that another has used.
    check([bench.row(0, 9, 1, (4, 3), (9, 4)), bench.row(0, 1, 0)], np.concatenate([whole[:9], whole[:1]]))
    bench.backend.copy_states([StateCopy(3, 5), StateCopy(5, 0)])
    data = bench.backend.read_state(4)
    assert (data.dtype, data.shape) == (np.uint8, (CacheSpec(LAYERS, bench.page_size, "float32").state_bytes,))
    bench.backend.write_state(2, data.tobytes())
    for slot, given in ((NUM_STATES, data), (-1, data), (2, data[:-4])):
        with pytest.raises(EngineError, match="recurrent state"):
            bench.backend.write_state(slot, given)
    check([bench.row(4, 5, 0), bench.row(9, 1, 2)], np.concatenate([whole[4:9], whole[9:10]]))
    check([bench.row(9, 12, 1), bench.row(10, 1, 2), bench.row(4, 1, 3)], whole[[*range(9, 21), 10, 4]])


@pytest.mark.parametrize("keys", ["any", "alike"])
@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if str(v) in ("torch-float32", "ascend-bfloat16")], indirect=True, ids=str
)
def test_prompts_of_many_chunks_beside_others_are_the_definition(
    backend: Backend, variant: Variant, name: str, keys: str
) -> None:
    """These backends compute a prompt in chunks of 64 tokens, which end at every state that is kept as well."""
    x, y = (random(seed, 200, width) for seed, width in enumerate((3 * CHANNELS, SPEC.row_width)))
    if keys == "alike":  # all nearly one direction, each almost replacing what was there, and hardly anything decays
        y[:, : 2 * SPEC.num_key_heads * SPEC.key_dim] *= np.float32(0.01)
        y[:, : 2 * SPEC.num_key_heads * SPEC.key_dim] += random(3, 2 * SPEC.num_key_heads * SPEC.key_dim)
        x[:, : SPEC.num_heads], x[:, SPEC.num_heads : 2 * SPEC.num_heads] = (4, -6) if name == "delta" else (-6, 0)
    bench = Bench(backend, variant, [x, y])
    build, expected = operations(bench)[name]
    run = bench.captured(build)
    tolerant = replace(variant, embed=max(variant.embed, 1e-5))

    def check(*rows: Row) -> None:
        assert_close(run(list(rows)), expected[np.concatenate([row.token_ids for row in rows])], tolerant)

    check(bench.row(0, 1, 1), bench.row(0, 200, 0, (10, 3), (64, 4), (65, 5)), bench.row(0, 37, 2))
    bench.backend.copy_states([StateCopy(5, 0)])
    check(bench.row(37, 3, 2), bench.row(64, 136, 4), bench.row(65, 1, 0), bench.row(10, 150, 3), bench.row(1, 1, 1))
    check(bench.row(160, 40, 3), bench.row(66, 129, 0, (1, 4), (2, 5)))
    check(bench.row(67, 1, 4), bench.row(195, 5, 0), bench.row(40, 100, 2), bench.row(68, 65, 5))


def test_gates_multiply(bench: Bench, variant: Variant) -> None:
    ops, weight = bench.backend.ops, random(4, CHANNELS)
    gain = bench.backend.load_vector(raw(weight))
    x, _ = bench.inputs()
    rows = [bench.row(0, NUM_TOKENS, 0)]
    heads = x.reshape(NUM_TOKENS, -1, CHANNELS)
    normed = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-5) * weight
    expected = normed.reshape(x.shape) * x * sigmoid(x)
    actual = bench.captured(lambda b, x, y: ops.gated_norm(x, x, gain, 1e-5))(rows)
    assert_close(actual, expected, replace(variant, embed=max(variant.embed, variant.norm)))
    actual = bench.captured(lambda b, x, y: ops.sigmoid_mul(x, x))(rows)
    assert_close(actual, x * sigmoid(x), variant)
    actual = bench.captured(lambda b, x, y: ops.silu_mul(x, x))(rows)
    assert_close(actual, x * x * sigmoid(x), variant)


def test_part_of_a_head_may_be_rotated(bench: Bench, variant: Variant) -> None:
    spec, inv_freq = AttentionSpec(1, 1, CHANNELS, 1.0), 0.1 ** np.arange(4.0)
    x, _ = bench.inputs()
    turned, angles = x.reshape(NUM_TOKENS, 3, CHANNELS).copy(), np.arange(NUM_TOKENS)[:, None, None] * inv_freq
    a, b = turned[:, :2, :4].copy(), turned[:, :2, 4:8].copy()
    turned[:, :2, :4] = a * np.cos(angles) - b * np.sin(angles)
    turned[:, :2, 4:8] = b * np.cos(angles) + a * np.sin(angles)
    run = bench.captured(lambda batch, x, y: bench.backend.ops.rope(batch, x, spec, RopeSpec(inv_freq)))
    assert_close(run([bench.row(0, NUM_TOKENS, 0)]), turned.reshape(x.shape), variant)


def test_a_recurrence_in_a_layer_that_keeps_something_else_is_refused(bench: Bench) -> None:
    backend, ops = bench.backend, bench.backend.ops
    conv = backend.load_conv(raw(random(5, CHANNELS, COLUMNS)))
    delta = backend.load_delta(raw(random(8, SPEC.num_heads)), raw(random(9, SPEC.num_heads)))
    scan = backend.load_scan(*(raw(random(seed, SPEC.num_heads)) for seed in (8, 9, 10)))
    rows = [bench.row(0, NUM_TOKENS, 0)]
    attention = AttentionSpec(1, 1, CHANNELS, 1.0)
    for build, words in (
        (lambda b, x, y: ops.short_conv(b, 1, x, conv), "a convolution of 4 columns and 32 channels in layer 1"),
        (lambda b, x, y: ops.short_conv(b, 3, x, conv), "in layer 3"),
        (
            lambda b, x, y: ops.delta_rule(b, 0, y, ops.linear(b, x, bench.gates), delta, SPEC),
            "in layer 0, which keeps",
        ),
        (
            lambda b, x, y: ops.scan(b, 1, y, ops.linear(b, x, bench.steps), scan, SPEC),
            "in layer 1, which keeps",
        ),
        (lambda b, x, y: ops.attend(b, 0, x, attention), "attention in layer 0, which keeps StateLayer"),
    ):
        with pytest.raises(ConfigError, match=words):
            bench.captured(build)(rows)
        if hasattr(ops, "convs"):  # what was recorded is checked again whenever anything is
            ops.convs.clear(), ops.deltas.clear(), ops.attentions.clear()
