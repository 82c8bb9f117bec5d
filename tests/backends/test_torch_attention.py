"""How the torch backend gathers keys: groups, blocks of queries, page sizes, and nothing that was never stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mooli.backends.base import AttentionSpec, Backend, Limits
from mooli.backends.reference import ReferenceBackend
from mooli.backends.torch import TorchBackend
from mooli.backends.torch.attention import PagedAttention
from mooli.backends.torch.cuda import CudaAttention
from mooli.backends.torch.kv_pool import KVPool
from mooli.backends.torch.step_plan import GATHERED_TOKENS, SHORT_ROW, decode_groups, plan_step
from mooli.batch import PageCopy
from mooli.tensor import RawTensor, TensorType
from steps import Pages, Row, step, uniform_cache

SPEC = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=8, scale=0.35)
QKV = (SPEC.num_heads + 2 * SPEC.num_kv_heads) * SPEC.head_dim
NUM_TOKENS = 300
LIMITS = Limits(max_tokens=512, max_rows=64, max_pages_per_row=512)


@given(st.lists(st.one_of(st.integers(1, 600), st.integers(1, 200_000)), max_size=60))
def test_groups_hold_every_row_once_and_keep_padding_and_memory_bounded(num_keys: list[int]) -> None:
    groups = decode_groups(num_keys)
    assert sorted(row for group in groups for row in group) == list(range(len(num_keys)))
    for group in groups:
        longest, shortest = (f(num_keys[row] for row in group) for f in (max, min))
        assert len(group) == 1 or len(group) * longest <= GATHERED_TOKENS
        assert longest <= max(SHORT_ROW, 2 * shortest)


def test_short_rows_are_one_group() -> None:
    assert len(decode_groups([1, 256, 30, 2, 17])) == 1


class OnBackend:
    """Attention alone, over a random table of packed rows, on a backend whose pool holds NaN wherever it can."""

    def __init__(self, backend: Backend, page_size: int, kv_dtype: str = "float32") -> None:
        values = np.random.default_rng(0).standard_normal((NUM_TOKENS, QKV)).astype(np.float32)
        self.backend, self.page_size = backend, page_size
        self._table = backend.load_embedding(RawTensor("t", TensorType.F32, values.shape, values.view(np.uint8)))
        num_pages = 3 * NUM_TOKENS // page_size + 8
        backend.allocate(uniform_cache(1, SPEC.num_kv_heads, SPEC.head_dim, page_size, kv_dtype), num_pages, LIMITS)
        if isinstance(backend, TorchBackend):
            assert backend.pool is not None
            for stack in backend.pool.stacks.values():
                stack.fill_(torch.nan)
        self.pages = Pages(num_pages, page_size)

    def attend(self, rows: list[Row], window: int = 0) -> NDArray[np.float32]:
        spec = AttentionSpec(SPEC.num_heads, SPEC.num_kv_heads, SPEC.head_dim, SPEC.scale, window)

        def compute(batch: Any) -> Any:
            return self.backend.ops.attend(batch, 0, self.backend.ops.embed(batch, self._table), spec)

        planned = self.backend.plan(step(rows, self.page_size))
        return np.array(self.backend.to_host(self.backend.capture(compute)(planned)))

    def scenario(self, window: int) -> list[NDArray[np.float32]]:
        """A prompt, a copy of its head that goes on otherwise, then steps that mix long, short and decoding rows."""
        pages = [self.pages.take(100) for _ in range(5)]
        results = [self.attend([Row(range(70), 0, pages[0]), Row([5], 0, pages[1])], window)]
        shared, rest = divmod(50, self.page_size)
        if rest:
            self.backend.copy_pages([PageCopy(pages[0][shared], pages[2][shared], rest)])
        forked = list(pages[0][:shared]) + list(pages[2][shared:])
        results.append(self.attend([Row(range(200, 207), 50, forked), Row([6], 1, pages[1])], window))
        rows = [
            Row([9], 57, forked),
            Row(range(10, 40), 0, pages[3]),
            Row([70], 70, pages[0]),
            Row([7, 8, 9], 2, pages[1]),
            Row([1], 0, pages[4]),
        ]
        results.append(self.attend(rows, window))
        decoding = [Row([3], 71, pages[0]), Row([4], 5, pages[1]), Row([5], 58, forked), Row([6], 30, pages[3])]
        results.append(self.attend(decoding, window))
        return results


@pytest.mark.parametrize("window", [0, 1, 9], ids=lambda window: f"window-{window}")
@pytest.mark.parametrize("page_size", [1, 3, 16, 128, 1024], ids=lambda size: f"pages-of-{size}")
def test_any_page_size_gives_what_the_reference_gives(page_size: int, window: int) -> None:
    actual = OnBackend(TorchBackend(), page_size).scenario(window)
    expected = OnBackend(ReferenceBackend(), page_size).scenario(window)
    for mine, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


class PlainLayouts(TorchBackend):
    """The attention of CUDA devices, on the CPU."""

    def make_attention(self, pool: KVPool) -> PagedAttention:
        return CudaAttention(pool)


@pytest.mark.parametrize("window", [0, 9], ids=lambda window: f"window-{window}")
def test_keys_in_plain_layouts_give_the_same(window: int) -> None:
    actual = OnBackend(PlainLayouts(), 16).scenario(window)
    expected = OnBackend(TorchBackend(), 16).scenario(window)
    for mine, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 9], ids=lambda window: f"window-{window}")
@pytest.mark.parametrize("limit", [1, 4000, 30_000])
def test_blocks_of_queries_and_groups_of_rows_change_nothing(
    monkeypatch: pytest.MonkeyPatch, window: int, limit: int
) -> None:
    whole = OnBackend(TorchBackend(), 16).scenario(window)
    monkeypatch.setattr("mooli.backends.torch.attention.PagedAttention.scores_at_a_time", limit)
    monkeypatch.setattr("mooli.backends.torch.step_plan.GATHERED_TOKENS", limit // 100)
    monkeypatch.setattr("mooli.backends.torch.step_plan.SHORT_ROW", 1)
    cut = OnBackend(TorchBackend(), 16).scenario(window)
    for a, b in zip(whole, cut, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16"])
def test_keys_and_values_may_be_kept_in_fewer_bits_than_are_computed_with(kv_dtype: str) -> None:
    actual = OnBackend(TorchBackend(dtype="float32"), 16, kv_dtype).scenario(0)
    expected = OnBackend(ReferenceBackend(), 16, kv_dtype).scenario(0)
    for mine, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)


def test_a_step_is_uploaded_once() -> None:
    sent: list[int] = []

    def upload(values: NDArray[Any]) -> torch.Tensor:
        sent.append(len(values))
        return torch.from_numpy(values)

    rows = [Row([1], 40, range(8)), Row(range(20), 7, range(8)), Row([1], 900, range(90)), Row(range(3), 0, range(8))]
    planned = plan_step(step(rows, 16), 16, upload)
    assert len(sent) == 1
    assert [chunk.length for chunk in planned.chunks] == [20, 3]
    assert sorted(len(group.positions) for group in planned.decode) == [1, 1]
