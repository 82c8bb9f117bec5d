"""Norms over all heads together, soft caps, and queries that grow, against their definitions in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cpu_ops import cpu_backend
from numpy.typing import NDArray
from test_ops import (
    NUM_PAGES,
    QKV_SIZE,
    SPEC,
    allocate,
    assert_close,
    attend,
    embedded,
    normed,
    random,
    raw,
    run,
    run_op,
)

from mooli.backends.base import AttentionSpec, Backend, RopeSpec
from mooli.errors import ConfigError
from steps import Pages, Row, step
from variants import VARIANTS, Variant

Floats = NDArray[np.float64]


@pytest.mark.parametrize("eps", [1e-6, 1e-2], ids=str)
def test_projection_norm_norms_queries_together_and_keys_together(
    backend: Backend, variant: Variant, eps: float
) -> None:
    queries, keys = SPEC.num_heads * SPEC.head_dim, SPEC.num_kv_heads * SPEC.head_dim
    q_gain, k_gain = random(1, queries) + 1, random(2, keys) + 1
    q_weight, k_weight = backend.load_vector(raw(q_gain)), backend.load_vector(raw(k_gain))
    x, actual = run_op(
        backend,
        variant,
        random(3, 5, QKV_SIZE, scale=4),
        lambda _, x: backend.ops.projection_norm(x, SPEC, q_weight, k_weight, eps),
    )
    q, k, v = np.split(x, [queries, queries + keys], axis=1)
    assert_close(actual, np.concatenate([normed(q, q_gain, eps), normed(k, k_gain, eps), v], axis=1), variant.norm)


def capped(x: Any, cap: float) -> Any:
    return cap * np.tanh(x / cap)


@pytest.mark.parametrize("cap", [0.3, 5.0, 50.0], ids=str)
def test_a_soft_cap_bends_what_is_large(backend: Backend, variant: Variant, cap: float) -> None:
    inputs = np.concatenate([random(4, 4, 70, scale=scale * cap) for scale in (1e-3, 0.3, 1.0, 30.0)])
    inputs[0, :5] = 0, 0.5 * cap, -0.5 * cap, 1e4, -1e4
    x, actual = run_op(backend, variant, inputs, lambda _, x: backend.ops.soft_cap(x, cap))
    np.testing.assert_allclose(actual, capped(x, cap), rtol=max(5e-7, 2.5 * variant.embed), atol=1e-30)


def attended(qkv: Floats, spec: AttentionSpec) -> Floats:
    heads = qkv.reshape(len(qkv), -1, spec.head_dim)
    q, k, v = np.split(heads, [spec.num_heads, spec.num_heads + spec.num_kv_heads], axis=1)
    k, v = (x.repeat(spec.num_heads // spec.num_kv_heads, axis=1) for x in (k, v))
    scores = capped(np.einsum("qhd,khd->hqk", q, k) * spec.scale, spec.softcap)
    behind = np.arange(len(qkv))[:, None] - np.arange(len(qkv))
    scores[:, (behind < 0) | (behind >= (spec.window or len(qkv)))] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(len(qkv), -1)


@pytest.mark.parametrize("window", [0, 7], ids=lambda window: f"window-{window}")
@pytest.mark.parametrize("chunks", [(45,), (13, 1, 20, 11)], ids=["whole", "chunks"])
def test_scores_are_capped_before_they_are_masked(
    backend: Backend, variant: Variant, window: int, chunks: tuple[int, ...]
) -> None:
    spec = replace(SPEC, window=window, softcap=2.0)
    table = backend.load_embedding(raw(random(5, 45, QKV_SIZE, scale=1.5)))
    page_size = allocate(backend, variant)
    pages = Pages(NUM_PAGES, page_size).take(45)
    qkv = embedded(backend, table, 45, page_size)
    parts, start = [], 0
    for length in chunks:
        batch = step([Row(range(start, start + length), start, pages)], page_size)
        parts.append(attend(backend, table, batch, spec))
        start += length
    expected = attended(qkv, spec)
    assert np.abs(expected - attended(qkv, replace(spec, softcap=1e9))).max() > 0.1
    assert_close(np.concatenate(parts), expected, variant.attend)


def test_a_cap_that_is_none_is_refused_by_the_cpu() -> None:
    with cpu_backend() as backend:
        table = backend.load_embedding(raw(random(6, 3, 32)))
        allocate(backend, VARIANTS[1])
        captured = backend.capture(lambda batch: backend.ops.soft_cap(backend.ops.embed(batch, table), 0.0))
        planned = backend.plan(step([Row([1], 0, [0])], backend.default_page_size))
        with pytest.raises(ConfigError, match="soft cap"):
            captured(planned)


def test_queries_may_grow_by_their_position(backend: Backend, variant: Variant) -> None:
    inv_freq = 10000.0 ** (-np.arange(0, SPEC.head_dim, 2) / SPEC.head_dim)
    plain, growing = RopeSpec(inv_freq), RopeSpec(inv_freq, growth=0.5, period=7)
    table = backend.load_embedding(raw(random(7, 30, QKV_SIZE)))
    page_size = allocate(backend, variant)
    batch = step([Row(range(30), 3, list(range(33 // page_size + 1)))], page_size)
    before, after = (
        run(backend, table, batch, lambda b, x, spec=spec: backend.ops.rope(b, x, SPEC, spec)).astype(np.float64)
        for spec in (plain, growing)
    )
    num_queries = SPEC.num_heads * SPEC.head_dim
    np.testing.assert_array_equal(after[:, num_queries:], before[:, num_queries:])
    periods = np.arange(3, 33) // 7
    assert periods[0] == 0 and periods[-1] == 4
    expected = before[:, :num_queries] * (1 + 0.5 * np.log(1 + periods))[:, None]
    assert_close(after[:, :num_queries], expected, max(1e-6, 2 * variant.embed))
