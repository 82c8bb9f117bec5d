"""Keys and values of eight bits on the cpu: how near they come to attention in float64, and what they cost."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_ops import LEVELS, Floats, allocate, assert_same_bits, cpu_backend, random, stored
from numpy.typing import NDArray

from mooli.backends.base import AttentionSpec, Limits
from mooli.backends.reference import ReferenceBackend
from mooli.errors import ConfigError, UnsupportedModelError
from steps import Row, step, uniform_cache

LENGTH = 150
LIMITS = Limits(max_tokens=160, max_rows=8, max_pages_per_row=8)
FUSED_LEVELS = [level for level in LEVELS if level != "scalar"]


def spec_of(head_dim: int) -> AttentionSpec:
    return AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=head_dim, scale=head_dim**-0.5)


def on_the_cpu(qkv: Floats, spec: AttentionSpec, level: str = "", kv_dtype: str = "int8") -> Floats:
    """Attention over one sequence of packed rows, in one step."""
    with cpu_backend(level) as backend:
        table = backend.load_embedding(stored(qkv))
        allocate(backend, spec, kv_dtype=kv_dtype, num_pages=8, limits=LIMITS)
        attend = backend.capture(lambda b: backend.ops.attend(b, 0, backend.ops.embed(b, table), spec))
        return np.array(backend.to_host(attend(backend.plan(step([Row(range(len(qkv)), 0, [4, 0, 7, 2, 1])], 32)))))


def exactly(qkv: Floats, spec: AttentionSpec) -> NDArray[np.float64]:
    heads = qkv.astype(np.float64).reshape(len(qkv), -1, spec.head_dim)
    kv = np.repeat(heads[:, spec.num_heads :], spec.num_heads // spec.num_kv_heads, axis=1)
    q, k, v = heads[:, : spec.num_heads], kv[:, : spec.num_heads], kv[:, spec.num_heads :]
    scores = np.einsum("qhd,khd->hqk", q, k) * spec.scale
    scores[:, np.triu(np.ones((len(qkv),) * 2, dtype=bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(len(qkv), -1)


def error(actual: Floats, expected: NDArray[np.float64]) -> float:
    """Root mean square error relative to the root mean square of the output."""
    return float(np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_attention_is_within_two_percent_for_every_size_of_heads(level: str, head_dim: int) -> None:
    spec = spec_of(head_dim)
    qkv = random(1, LENGTH, 10 * head_dim)
    assert error(on_the_cpu(qkv, spec, level), exactly(qkv, spec)) < 0.02


@pytest.mark.parametrize("level", LEVELS)
def test_a_large_part_that_all_keys_have_costs_no_accuracy(level: str) -> None:
    """As models with a bias on keys have it: without a tile's base the error would be far beyond that of bfloat16."""
    spec = spec_of(64)
    qkv = random(2, LENGTH, 640)
    common = np.zeros(64, np.float32)
    common[[3, 20, 41]] = 150, -60, 90
    qkv.reshape(LENGTH, 10, 64)[:, 6:8] += common
    expected = exactly(qkv, spec)
    assert error(on_the_cpu(qkv, spec, level), expected) < 0.03
    assert error(on_the_cpu(qkv, spec, level), expected) < error(on_the_cpu(qkv, spec, level, "bfloat16"), expected)


def test_one_value_of_a_key_that_is_far_larger_than_the_others_costs_little() -> None:
    spec = spec_of(64)
    qkv = random(3, LENGTH, 640)
    qkv.reshape(LENGTH, 10, 64)[:, 6:8, 5] *= 30
    qkv.reshape(LENGTH, 10, 64)[:, :6, 5] = 0  # what the scores depend on is in the small ones
    assert error(on_the_cpu(qkv, spec), exactly(qkv, spec)) < 0.05


@pytest.mark.parametrize("level", LEVELS)
def test_many_small_weights_beside_a_large_one_are_kept(level: str) -> None:
    """In eight bits alone all weights but the first token's would be zero, and the output 0 instead of about 0.25."""
    spec = spec_of(16)
    qkv = np.zeros((128, 10, 16), np.float32)
    qkv[:, :6, 0] = 4
    qkv[0, 6:8, 0] = np.log(384)  # its score is that of the others plus log 384
    qkv[1:, 8:] = 1
    qkv = qkv.reshape(128, 160)
    last = on_the_cpu(qkv, spec, level)[-1]
    np.testing.assert_allclose(last, exactly(qkv, spec)[-1], rtol=0.02)
    assert last.min() > 0.2


@pytest.mark.parametrize("head_dim", [64, 96])
def test_every_fused_level_gives_the_same_bits(head_dim: int) -> None:
    qkv = random(4, LENGTH, 10 * head_dim)
    best = on_the_cpu(qkv, spec_of(head_dim), FUSED_LEVELS[-1])
    for level in FUSED_LEVELS[:-1]:
        assert_same_bits(on_the_cpu(qkv, spec_of(head_dim), level), best, level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1e30])
def test_tiny_and_huge_values_stay_finite(level: str, scale: float) -> None:
    spec = spec_of(32)
    qkv = random(5, 40, 320)
    qkv.reshape(40, 10, 32)[:, 6:] *= np.float32(scale)
    qkv.reshape(40, 10, 32)[:, :6] *= np.float32(min(1 / scale, 1e30) if scale else 1)
    assert np.isfinite(on_the_cpu(qkv, spec, level)).all()


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("page_size", [32, 96])
@pytest.mark.parametrize("kv_dtype", ["int8", "bfloat16", "float32"])
def test_the_bytes_of_a_page_are_those_that_are_allocated(head_dim: int, page_size: int, kv_dtype: str) -> None:
    spec = uniform_cache(3, 2, head_dim, page_size, kv_dtype)
    with cpu_backend() as backend:
        backend.allocate(spec, 5, LIMITS)
        assert backend._device.kv_bytes == 5 * backend.kv_bytes_per_page(spec)


def test_a_page_takes_little_more_than_half_of_one_in_bfloat16() -> None:
    with cpu_backend() as backend:
        eight, sixteen = (
            backend.kv_bytes_per_page(uniform_cache(1, 2, 128, 32, dtype)) for dtype in ("int8", "bfloat16")
        )
    assert 0.5 < eight / sixteen < 0.55


def test_heads_beyond_512_are_refused() -> None:
    with cpu_backend() as backend, pytest.raises(UnsupportedModelError, match=r"int8.*512.*528"):
        backend.allocate(uniform_cache(1, 1, 528, 32, "int8"), 2, LIMITS)


def test_the_torch_backend_names_what_it_does_not_know() -> None:
    pytest.importorskip("torch")
    from mooli.backends import create_backend

    backend = create_backend("torch", dtype="float32")
    with pytest.raises(ConfigError, match="int8"):
        backend.allocate(uniform_cache(1, 1, 32, 32, "int8"), 2, LIMITS)
    backend.close()


@pytest.mark.parametrize("head_dim", [16, 96])
def test_the_reference_rounds_to_eight_bits_too(head_dim: int) -> None:
    spec = spec_of(head_dim)
    qkv = random(6, 40, 10 * head_dim)
    backend = ReferenceBackend()
    table = backend.load_embedding(stored(qkv))
    backend.allocate(uniform_cache(1, 2, head_dim, 16, "int8"), 4, LIMITS)
    batch = backend.plan(step([Row(range(40), 0, [2, 0, 3])], 16))
    actual = backend.ops.attend(batch, 0, backend.ops.embed(batch, table), spec)
    assert 0.002 < error(actual, exactly(qkv, spec)) < 0.02
