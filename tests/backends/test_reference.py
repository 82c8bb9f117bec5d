"""What is the reference backend's own: what it refuses, how it rounds KV, how stale KV shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mooli.backends.base import AttentionSpec
from mooli.backends.reference import ReferenceBackend
from mooli.backends.reference_ops import round_to
from mooli.errors import ConfigError
from steps import LIMITS, Pages, Row, step, uniform_cache

SPEC = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=4, scale=0.5)


@pytest.mark.parametrize(
    "arguments", [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"quantization": "int8"}, {"num_threads": 2}], ids=str
)
def test_what_the_reference_cannot_do_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="reference"):
        ReferenceBackend(**arguments)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_rounding_is_to_the_nearest_and_ties_to_even(dtype: str, torch_dtype: torch.dtype) -> None:
    special = [0.0, -0.0, 1.00390625, 1.01171875, 3.3e38, 70000.0, 1e-40, np.inf, -np.inf, np.nan]
    values = np.concatenate([np.random.default_rng(0).standard_normal(2000) * 100, special]).astype(np.float32)
    expected = torch.from_numpy(values).to(torch_dtype).float().numpy()
    np.testing.assert_array_equal(round_to(dtype, values), expected)


def test_keys_and_values_are_rounded_to_the_type_of_the_pool() -> None:
    backend = ReferenceBackend()
    backend.allocate(uniform_cache(1, 1, 4, 2, "bfloat16"), 3, LIMITS)
    qkv = np.random.default_rng(1).standard_normal((1, 16)).astype(np.float32)
    out = backend.ops.attend(backend.plan(step([Row([0], 0, [2])], 2)), 0, qkv, SPEC)
    np.testing.assert_array_equal(out.reshape(2, 4), np.tile(round_to("bfloat16", qkv[:, 12:]), (2, 1)))
    assert not np.array_equal(round_to("bfloat16", qkv), qkv)


def test_reading_what_was_never_stored_shows_as_nan() -> None:
    backend = ReferenceBackend()
    backend.allocate(uniform_cache(1, 1, 4, 2, "float32"), 3, LIMITS)
    out = backend.ops.attend(backend.plan(step([Row([0], 1, [2])], 2)), 0, np.ones((1, 16), dtype=np.float32), SPEC)
    assert np.isnan(out).all()


def test_an_unknown_type_of_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match="int3"):
        ReferenceBackend().allocate(uniform_cache(1, 1, 4, 2, "int3"), 3, LIMITS)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_any_page_size_gives_the_same(page_size: int) -> None:
    qkv = np.random.default_rng(3).standard_normal((10, 16)).astype(np.float32)
    outputs = []
    for size in (page_size, 10):
        backend = ReferenceBackend()
        backend.check_page_size(size)
        backend.allocate(uniform_cache(1, 1, 4, size, "float32"), 12, LIMITS)
        pages = Pages(12, size).take(10)
        outputs.append(backend.ops.attend(backend.plan(step([Row(range(10), 0, pages)], size)), 0, qkv, SPEC))
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_a_long_prompt_is_attended_in_blocks_that_agree() -> None:
    backend = ReferenceBackend()
    backend.allocate(uniform_cache(1, 1, 4, 16, "float32"), 50, LIMITS)
    qkv = np.random.default_rng(2).standard_normal((700, 16)).astype(np.float32)
    pages = list(range(44))
    whole = backend.ops.attend(backend.plan(step([Row(range(700), 0, pages)], 16)), 0, qkv, SPEC)
    last = backend.ops.attend(backend.plan(step([Row([0], 699, pages)], 16)), 0, qkv[-1:], SPEC)
    np.testing.assert_allclose(whole[-1:], last, rtol=1e-5, atol=1e-6)
