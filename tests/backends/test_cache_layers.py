"""Layers that keep different things: each right on every backend, or refused by the name of its kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mooli.backends import create_backend
from mooli.backends.base import (
    AttentionSpec,
    Backend,
    CacheLayer,
    CacheSpec,
    LatentLayer,
    Limits,
    PagedLayer,
    RopeSpec,
    StateLayer,
)
from mooli.batch import PageCopy
from mooli.errors import ConfigError, UnsupportedModelError
from mooli.tensor import RawTensor, TensorType
from steps import Row, step
from variants import Variant

HIDDEN, VOCAB, NUM_PAGES = 64, 50, 80
LIMITS = Limits(max_tokens=256, max_rows=16, max_pages_per_row=30)
SPECS = (
    AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=32, scale=0.2, window=20),
    AttentionSpec(num_heads=4, num_kv_heads=1, head_dim=64, scale=0.1),
    AttentionSpec(num_heads=6, num_kv_heads=3, head_dim=16, scale=0.3, window=140),
    AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=32, scale=0.2),
    AttentionSpec(num_heads=4, num_kv_heads=1, head_dim=64, scale=0.1, window=20),
)
"""Two windows and none, three shapes of heads; the first and the fourth differ in the window alone."""
LAYERS = tuple(PagedLayer(spec.num_kv_heads, spec.head_dim, spec.window) for spec in SPECS)


class ToyModel:
    """A decoder whose layers each keep something else, captured on a backend. Its weights are always the same."""

    def __init__(self, backend: Backend, kv_dtype: str, page_size: int) -> None:
        self.backend, self.page_size = backend, page_size
        random = np.random.default_rng(7)

        def raw(*shape: int) -> RawTensor:
            values = (random.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
            return RawTensor("t", TensorType.F32, shape, values.reshape(-1, shape[-1]).view(np.uint8))

        self._table = backend.load_embedding(raw(VOCAB, HIDDEN))
        self._layers = [
            (
                spec,
                RopeSpec(10000.0 ** (-np.arange(0, spec.head_dim, 2) / spec.head_dim)),
                backend.load_linear([raw((spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim, HIDDEN)]),
                backend.load_linear([raw(HIDDEN, spec.num_heads * spec.head_dim)]),
            )
            for spec in SPECS
        ]
        self._head = backend.load_linear([raw(VOCAB, HIDDEN)], head=True)
        backend.allocate(CacheSpec(LAYERS, page_size, kv_dtype), NUM_PAGES, LIMITS)
        self._forward = backend.capture(self._compute)
        self._logits = backend.capture(lambda batch, hidden: backend.ops.linear(batch, hidden, self._head))

    def _compute(self, batch: Any) -> Any:
        ops = self.backend.ops
        x = ops.embed(batch, self._table)
        for index, (spec, rope, qkv, out) in enumerate(self._layers):
            mixed = ops.attend(batch, index, ops.rope(batch, ops.linear(batch, x, qkv), spec, rope), spec)
            x = ops.linear(batch, mixed, out, residual=x)
        return x

    def last(self, *rows: Row, copies: tuple[PageCopy, ...] = ()) -> NDArray[np.float32]:
        """The logits (R, VOCAB) after the last token of each row."""
        batch = step(rows, self.page_size)
        self.backend.copy_pages(copies)
        planned = self.backend.plan(batch)
        taken = self.backend.take_rows(planned, self._forward(planned), batch.sampling_tokens)
        return np.array(self.backend.to_host(self._logits(*taken)), dtype=np.float32)

    def story(self) -> list[NDArray[np.float32]]:
        """Prompts whole and in chunks, a copied page's head, shared pages, and tokens one by one, past every window."""
        ids = [(7 * i * i + 3 * i) % VOCAB for i in range(400)]
        width = -(-400 // self.page_size)
        one, two, three = ([*range(first, first + width)] for first in (0, width, 2 * width))
        three[0] = one[0]  # a page that both have
        kept = self.page_size // 2
        told = [
            self.last(Row(ids[:200], 0, one), Row(ids[:9], 0, two[1:])),
            self.last(Row(ids[200:300], 200, one), Row(ids[5:9], 9, two[1:])),
            self.last(Row(ids[kept : kept + 30], kept, two), copies=(PageCopy(one[0], two[0], kept),)),
            self.last(Row(ids[3:90], self.page_size, three), Row(ids[300:302], 300, one)),
        ]
        ends = [(one, 302), (two, kept + 30), (three, self.page_size + 87)]
        for i in range(4):
            told.append(self.last(*(Row([ids[9 * i + k]], end + i, pages) for k, (pages, end) in enumerate(ends))))
        told.append(self.last(Row(ids[:3], 306, one)))
        return told


@contextmanager
def toy(backend: Backend, kv_dtype: str, page_size: int) -> Iterator[ToyModel]:
    try:
        yield ToyModel(backend, kv_dtype, page_size)
    finally:
        backend.close()


def test_layers_of_different_windows_and_heads_compute_what_the_reference_does(
    backend: Backend, variant: Variant
) -> None:
    page_size = backend.default_page_size
    with toy(create_backend("reference"), "float32", page_size) as reference:
        expected = reference.story()
    with toy(backend, variant.kv_dtype, page_size) as model:
        for actual, wanted in zip(model.story(), expected, strict=True):
            error = np.sqrt(np.mean((actual - wanted) ** 2, axis=1) / np.mean(wanted**2, axis=1))
            assert error.max() <= variant.model, str(variant)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_on_the_cpu_their_bits_do_not_depend_on_how_the_work_is_cut(kv_dtype: str) -> None:
    ids = [(11 * i + 3) % VOCAB for i in range(170)]
    pages, others = [*range(7, 13)], [*range(20, 26)]
    with toy(create_backend("cpu"), kv_dtype, 32) as model:
        whole = model.last(Row(ids, 0, pages))
        model.last(Row(ids[:128], 0, pages), Row(ids[5:15], 0, others))
        model.last(Row(ids[15:18], 10, others), Row(ids[128:169], 128, pages))
        np.testing.assert_array_equal(model.last(Row(ids[:1], 13, others), Row(ids[169:], 169, pages))[1:], whole)
        for token in range(170):
            last = model.last(Row([ids[token]], token, others))
        np.testing.assert_array_equal(last, whole)


def test_a_page_has_the_bytes_of_all_layers(variant: Variant, backend: Backend) -> None:
    def bytes_of(*layers: CacheLayer) -> int:
        return backend.kv_bytes_per_page(CacheSpec(layers, backend.default_page_size, variant.kv_dtype))

    assert bytes_of(*LAYERS) == sum(bytes_of(layer) for layer in LAYERS)
    assert bytes_of(*LAYERS * 3) == 3 * bytes_of(*LAYERS)


def test_pages_of_layers_that_differ_go_out_as_bytes_and_come_back(variant: Variant, backend: Backend) -> None:
    ids = [(13 * i + 5) % VOCAB for i in range(141)]
    with toy(backend, variant.kv_dtype, backend.default_page_size) as model:
        width = -(-len(ids) // model.page_size)
        pages, others = [*range(width)], [*range(2 * width, width, -1)]
        model.last(Row(ids[:140], 0, pages))
        data = backend.read_pages(pages, 140)
        assert data.shape == (width, backend.kv_bytes_per_page(CacheSpec(LAYERS, model.page_size, variant.kv_dtype)))
        backend.write_pages(others, data)
        np.testing.assert_array_equal(backend.read_pages(others, 140), data)
        expected = model.last(Row(ids[140:], 140, pages))
        np.testing.assert_array_equal(model.last(Row(ids[140:], 140, others)), expected)
        if hasattr(backend, "allocate_host"):  # and to rows of the host as well
            backend.allocate_host(width)
            backend.write_pages(pages, data)
            backend.back_up(pages[::-1], range(width))
            backend.write_pages(others, bytes(data.size))
            backend.load_back(others[::-1], range(width))
            np.testing.assert_array_equal(backend.read_pages(others, 140), data)
            assert [backend.host_bytes(row) for row in range(width)] == [page.tobytes() for page in data[::-1]]


def test_layers_that_a_type_is_not_for_are_refused_by_their_kind(float32_backend: Backend) -> None:
    spec = CacheSpec((PagedLayer(2, 32), LatentLayer(512, 64)), float32_backend.default_page_size, "int8")
    message = "kv_cache_dtype='int8' is (not implemented for models with multi-head latent|(not )?possible)"
    with pytest.raises((ConfigError, UnsupportedModelError), match=message):
        float32_backend.allocate(spec, 4, LIMITS)
    with pytest.raises((ConfigError, UnsupportedModelError), match=message):
        float32_backend.kv_bytes_per_page(spec)
    with pytest.raises(ConfigError, match="without layers"):
        float32_backend.allocate(CacheSpec((), float32_backend.default_page_size, "float32"), 4, LIMITS)


WRONG = {
    "kv heads": (0, AttentionSpec(4, 1, 32, 1.0, 9), "1 kv heads of 32 in layer 0, which keeps 2 kv heads of 32"),
    "head size": (0, AttentionSpec(8, 2, 16, 1.0, 9), "2 kv heads of 16 in layer 0"),
    "no window": (0, AttentionSpec(4, 2, 32, 1.0), "to all positions in layer 0, which keeps the last 9"),
    "a wider window": (0, AttentionSpec(4, 2, 32, 1.0, 10), "to the last 10 positions in layer 0"),
    "no such layer": (2, AttentionSpec(4, 2, 32, 1.0, 9), "layer 2 of a KV pool of 2"),
    "a layer below 0": (-1, AttentionSpec(4, 2, 32, 1.0, 9), "layer -1"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_attention_to_what_a_layer_does_not_keep_is_refused(float32_backend: Backend, wrong: str) -> None:
    layer, spec, words = WRONG[wrong]
    backend, page_size = float32_backend, float32_backend.default_page_size
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    table = backend.load_embedding(RawTensor("t", TensorType.F32, (4, width), np.zeros((4, width * 4), np.uint8)))
    backend.allocate(CacheSpec((PagedLayer(2, 32, 9), PagedLayer(2, 32)), page_size, "float32"), 4, LIMITS)

    captured = backend.capture(lambda batch: backend.ops.attend(batch, layer, backend.ops.embed(batch, table), spec))
    with pytest.raises(ConfigError, match=words):
        captured(backend.plan(step([Row([1], 0, [0])], page_size)))


def test_layers_are_numbered_among_those_of_their_kind_and_states_are_no_part_of_pages() -> None:
    paged, conv, delta = PagedLayer(2, 32), StateLayer((2, 64)), StateLayer((3, 96), (2, 16, 32))
    spec = CacheSpec((conv, paged, delta, conv, paged), 32, "float32")
    assert spec.numbers == (0, 0, 1, 2, 1)
    assert CacheSpec((paged, conv, LatentLayer(64, 16), paged), 32, "float32").numbers == (0, 0, 1, 2)
    assert spec.state_layers == (conv, delta, conv)
    assert spec.state_bytes == 4 * (2 * 64 + (3 * 96 + 2 * 16 * 32) + 2 * 64)
    assert CacheSpec((paged, paged), 32, "float32").state_bytes == 0
    assert spec.paged_layers() == (paged, paged)
