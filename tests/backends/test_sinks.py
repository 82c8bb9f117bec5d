"""Attention with a sink in each head: one score more in the softmax, before all keys, whose value is zero."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mooli.backends.base import AttentionSpec, Backend
from mooli.errors import ConfigError
from mooli.tensor import RawTensor, TensorType
from steps import LIMITS, Pages, Row, step, uniform_cache
from variants import WORST, Variant

Floats = NDArray[np.float64]

SPEC = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=32, scale=32**-0.5)
WIDTH = (SPEC.num_heads + 2 * SPEC.num_kv_heads) * SPEC.head_dim
TOTAL = 300  # several blocks of keys, the first ones outside a window
SINKS = np.array([-1.0, 0.5, 2.0, 3.5, -30.0, 6.0], np.float32)
"""Of each head its own: from one that changes nothing to one that takes nearly all."""


def raw(values: NDArray[np.float32]) -> RawTensor:
    return RawTensor("t", TensorType.F32, values.shape, values.reshape(-1, values.shape[-1]).view(np.uint8))


def attended(qkv: Floats, spec: AttentionSpec, sinks: NDArray[Any]) -> Floats:
    """Of one whole sequence, token by token and head by head."""
    return _attended(qkv.tobytes(), spec, tuple(sinks.tolist()))


@lru_cache(maxsize=32)
def _attended(values: bytes, spec: AttentionSpec, sinks: tuple[float, ...]) -> Floats:
    qkv = np.frombuffer(values).reshape(-1, WIDTH)
    heads = qkv.reshape(len(qkv), -1, spec.head_dim)
    q, k, v = np.split(heads, [spec.num_heads, spec.num_heads + spec.num_kv_heads], axis=1)
    out = np.zeros_like(q)
    for token in range(len(qkv)):
        first = max(0, token - spec.window + 1) if spec.window else 0
        for head in range(spec.num_heads):
            kv_head = head // (spec.num_heads // spec.num_kv_heads)
            scores = np.append(k[first : token + 1, kv_head] @ q[token, head] * spec.scale, sinks[head])
            weights = np.exp(scores - scores.max())
            out[token, head] = weights[:-1] @ v[first : token + 1, kv_head] / weights.sum()
    return out.reshape(len(qkv), -1)


class Bench:
    """A backend with one layer, the values of `TOTAL` tokens, and a function that attends to them."""

    def __init__(self, backend: Backend, variant: Variant, spec: AttentionSpec, sinks: NDArray[np.float32]) -> None:
        self.backend, self.page_size = backend, backend.default_page_size
        values = np.random.default_rng(3).standard_normal((TOTAL, WIDTH)).astype(np.float32)
        table, loaded = backend.load_embedding(raw(values)), backend.load_vector(raw(sinks))
        num_pages = 3 * TOTAL // self.page_size + 8
        kv = uniform_cache(1, SPEC.num_kv_heads, SPEC.head_dim, self.page_size, variant.kv_dtype)
        backend.allocate(kv, num_pages, LIMITS)
        self.pool = Pages(num_pages, self.page_size)
        self._embed = backend.capture(lambda batch: backend.ops.embed(batch, table))
        self._attend = backend.capture(
            lambda batch: backend.ops.attend(batch, 0, backend.ops.embed(batch, table), spec, loaded)
        )

    def attend(self, *rows: Row) -> NDArray[np.float32]:
        return self._run(self._attend, rows)

    def values(self) -> Floats:
        """Of all tokens, as the backend sees them."""
        pages = self.pool.take(100)
        parts = [self._run(self._embed, (Row(range(first, first + 100), 0, pages),)) for first in (0, 100, 200)]
        return np.concatenate(parts).astype(np.float64)

    def _run(self, function: Any, rows: tuple[Row, ...]) -> NDArray[np.float32]:
        planned = self.backend.plan(step(list(rows), self.page_size))
        return np.array(self.backend.to_host(function(planned)), dtype=np.float32)


def assert_close(actual: NDArray[Any], expected: Floats, bound: float) -> None:
    # What a sink takes is missing in the result, but not in the rounding of what it is made of.
    scale = np.sqrt(np.mean(expected**2))
    error = np.abs(actual - expected) / scale
    assert np.sqrt(np.mean(error**2)) <= bound
    assert error.max() <= 2 * WORST * bound


@pytest.mark.parametrize("window", [0, 1, 20, 200], ids=lambda window: f"window-{window}")
def test_a_sink_is_a_score_more_however_a_prompt_is_cut(backend: Backend, variant: Variant, window: int) -> None:
    spec = replace(SPEC, window=window)
    bench = Bench(backend, variant, spec, SINKS)
    expected = attended(bench.values(), spec, SINKS)
    one, other = bench.pool.take(TOTAL), bench.pool.take(TOTAL)
    bounds = [0, 128, 131, 132, 200, 299, TOTAL]
    cut = [bench.attend(Row(range(a, b), a, one)) for a, b in pairwise(bounds)]
    mixed = [
        bench.attend(Row(range(120), 0, other)),
        bench.attend(Row(range(120, 240), 120, other), Row([299], 299, one)),
        bench.attend(Row(range(240, 299), 240, other)),
        bench.attend(Row([299], 299, other)),
    ]
    assert_close(np.concatenate(cut), expected, variant.attend)
    whole = np.concatenate([mixed[0], mixed[1][:-1], *mixed[2:]])
    assert_close(whole, expected, variant.attend)
    if variant.exact_rows:
        np.testing.assert_array_equal(whole, np.concatenate(cut))
        np.testing.assert_array_equal(mixed[1][-1], whole[-1])


def test_rows_that_share_a_prefix_have_the_sinks_of_their_own_heads(backend: Backend, variant: Variant) -> None:
    bench = Bench(backend, variant, SPEC, SINKS)
    qkv = bench.values()
    shared = bench.pool.take(256)
    bench.attend(Row(range(128), 0, shared))
    bench.attend(Row(range(128, 256), 128, shared))
    tails = ([260, 261, 262], [270], [280])
    rows = [Row(tail, 256, shared + bench.pool.take(len(tail))) for tail in tails]
    actual = bench.attend(*rows)
    expected = [attended(qkv[[*range(256), *tail]], SPEC, SINKS)[256:] for tail in tails]
    assert_close(actual, np.concatenate(expected), variant.attend)
    if variant.exact_rows:
        alone = [bench.attend(row) for row in rows]
        np.testing.assert_array_equal(actual, np.concatenate(alone))


def test_sinks_far_below_all_scores_change_nothing(backend: Backend, variant: Variant) -> None:
    bench = Bench(backend, variant, SPEC, np.full(6, -1e4, np.float32))
    pages = bench.pool.take(TOTAL)
    parts = [bench.attend(Row(range(first, first + 100), first, pages)) for first in (0, 100, 200)]
    actual = np.concatenate(parts)
    assert_close(actual, attended(bench.values(), SPEC, np.full(6, -np.inf)), variant.attend)


def test_sinks_far_above_all_scores_leave_nothing(backend: Backend, variant: Variant) -> None:
    bench = Bench(backend, variant, SPEC, np.full(6, 1e4, np.float32))
    assert not bench.attend(Row(range(100), 0, bench.pool.take(100))).any()


def test_a_sink_for_each_head_is_demanded(backend: Backend, variant: Variant) -> None:
    with pytest.raises((ConfigError, ValueError, RuntimeError)):
        Bench(backend, variant, SPEC, SINKS[:5].copy()).attend(Row(range(3), 0, [0]))
