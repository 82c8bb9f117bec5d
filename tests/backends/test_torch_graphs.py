"""Decode steps in graphs give what they give eagerly, whatever their size, and what fits no graph runs without."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from simulated_graphs import SimulatedGraphBackend

from mooli.backends.base import AttentionSpec, Limits, RopeSpec
from mooli.backends.torch import TorchBackend
from mooli.backends.torch.graphs import BATCH_SIZES
from mooli.backends.torch.step_plan import GATHERED_TOKENS
from mooli.errors import ConfigError
from mooli.tensor import RawTensor, TensorType
from steps import Row, step, uniform_cache

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, scale=8**-0.5)
QKV = (SPEC.num_heads + 2 * SPEC.num_kv_heads) * SPEC.head_dim
HIDDEN = SPEC.num_heads * SPEC.head_dim
VOCAB = 50
PAGE_SIZE = 4
NUM_PAGES = 300
LIMITS = Limits(max_tokens=512, max_rows=64, max_pages_per_row=256)


class OneLayer:
    """Embedding, rotation, attention, head: what a model does in a step, on any torch backend."""

    def __init__(self, backend: TorchBackend, window: int = 0) -> None:
        random = np.random.default_rng(0)

        def raw(*shape: int) -> RawTensor:
            values = random.standard_normal(shape).astype(np.float32)
            return RawTensor("t", TensorType.F32, shape, values.view(np.uint8))

        self.backend = backend
        self._spec = AttentionSpec(SPEC.num_heads, SPEC.num_kv_heads, SPEC.head_dim, SPEC.scale, window)
        self._table = backend.load_embedding(raw(VOCAB, QKV))
        self._out = backend.load_linear([raw(HIDDEN, HIDDEN)])
        self._head = backend.load_linear([raw(VOCAB, HIDDEN)], head=True)
        backend.allocate(uniform_cache(1, SPEC.num_kv_heads, SPEC.head_dim, PAGE_SIZE, "float32"), NUM_PAGES, LIMITS)
        assert backend.pool is not None
        for stack in backend.pool.stacks.values():
            stack.fill_(torch.nan)
        self._forward = backend.capture(self._compute)
        self._logits = backend.capture(lambda batch, hidden: backend.ops.linear(batch, hidden, self._head))

    def _compute(self, batch: Any) -> Any:
        ops = self.backend.ops
        qkv = ops.embed(batch, self._table)
        qkv = ops.rope(batch, qkv, self._spec, RopeSpec(np.array([1.0, 0.3, 0.1, 0.03])))
        return ops.linear(batch, ops.attend(batch, 0, qkv, self._spec), self._out)

    def logits(self, rows: list[Row], turned_by: int = 0) -> NDArray[np.float32]:
        """turned_by: how far rotations are from the indices."""
        batch = step(rows, PAGE_SIZE)
        batch.rope_positions = batch.positions + np.int32(turned_by) if turned_by else None
        planned = self.backend.plan(batch)
        hidden = self._forward(planned)
        everything = np.arange(sum(len(row.token_ids) for row in rows), dtype=np.int32)
        taken = self.backend.take_rows(planned, hidden, everything[:32])
        return np.array(self.backend.to_host(self._logits(*taken)))


def prompts(count: int) -> list[Row]:
    """Sequences of 1, 2, 3 ... tokens, each on pages of its own."""
    rows, first = [], 0
    for index in range(count):
        num_pages = (index + 8) // PAGE_SIZE + 1
        rows.append(Row([(7 * index + i) % VOCAB for i in range(index + 1)], 0, range(first, first + num_pages)))
        first += num_pages
    return rows


def decode(rows: list[Row], token: int) -> list[Row]:
    """The step after: every sequence one token longer."""
    return [Row([(token + i) % VOCAB], row.start + len(row.token_ids), row.pages) for i, row in enumerate(rows)]


@pytest.mark.parametrize("window", [0, 3], ids=lambda window: f"window-{window}")
@pytest.mark.parametrize("count", [1, 2, 3, 5, 17])
def test_replayed_steps_give_what_eager_ones_give(count: int, window: int) -> None:
    backend = SimulatedGraphBackend()
    graphed, eager = OneLayer(backend, window), OneLayer(TorchBackend(), window)
    rows = prompts(count)
    np.testing.assert_allclose(graphed.logits(rows), eager.logits(rows), atol=2e-5)
    for token in range(5):
        rows = decode(rows, 3 * token)
        np.testing.assert_allclose(graphed.logits(rows), eager.logits(rows), atol=2e-5)
    # Steps were replayed, at one size, padded to the next there is.
    padded = next(size for size in BATCH_SIZES if size >= count)
    assert backend.recorder.replays.count(padded) >= 5


@pytest.mark.parametrize("turned_by", [5, PAGE_SIZE * LIMITS.max_pages_per_row])
def test_replayed_steps_turn_by_their_own_positions(turned_by: int) -> None:
    backend = SimulatedGraphBackend()
    graphed, eager = OneLayer(backend), OneLayer(TorchBackend())
    rows = prompts(3)
    for token in range(4):
        actual = graphed.logits(rows, turned_by * token)
        np.testing.assert_allclose(actual, eager.logits(rows, turned_by * token), atol=2e-5)
        rows = decode(rows, token)
    # Three heads, and their steps: a graph holds tables of its capture, and what lies beyond them goes without one.
    assert backend.recorder.replays.count(4) == (3 + 3 if turned_by == 5 else 3)


def test_a_smaller_step_after_a_larger_one_sees_nothing_of_it() -> None:
    graphed, eager = OneLayer(SimulatedGraphBackend()), OneLayer(TorchBackend())
    rows = prompts(8)
    for model in (graphed, eager):
        model.logits(rows)
        model.logits(decode(rows, 1))
    for count in (7, 5, 6):
        fewer = decode(decode(rows, 1), 9)[8 - count :]
        np.testing.assert_allclose(graphed.logits(fewer), eager.logits(fewer), atol=2e-5)


def test_a_sequence_that_outgrows_a_graph_goes_on_in_a_longer_one() -> None:
    backend = SimulatedGraphBackend()
    graphed, eager = OneLayer(backend), OneLayer(TorchBackend())
    rows = [Row([i % VOCAB for i in range(254)], 0, range(70))]
    graphed.logits(rows), eager.logits(rows)
    recorded = []
    for token in range(4):
        rows = decode(rows, token)
        np.testing.assert_allclose(graphed.logits(rows), eager.logits(rows), atol=2e-5)
        recorded.append(backend.recorder.num_recorded)
    assert recorded[-1] == recorded[0] + 1


def test_padding_rows_write_to_no_page_of_a_request() -> None:
    backend = SimulatedGraphBackend()
    model = OneLayer(backend)
    rows = prompts(5)
    model.logits(rows)
    assert backend.pool is not None
    (pool,) = backend.pool.stacks.values()
    before = pool[:, :, :NUM_PAGES].clone()
    model.logits(decode(rows, 1))
    changed = (before != pool[:, :, :NUM_PAGES]) & ~(before.isnan() & pool[:, :, :NUM_PAGES].isnan())
    written = changed.any(dim=-1).any(dim=-1)[0, 0].nonzero().tolist()
    expected = [
        [row.pages[(row.start + len(row.token_ids)) // PAGE_SIZE], (row.start + len(row.token_ids)) % PAGE_SIZE]
        for row in rows
    ]
    assert sorted(written) == sorted(expected)


def test_graphs_are_made_once_for_each_size() -> None:
    backend = SimulatedGraphBackend()
    model = OneLayer(backend)
    rows = prompts(3)
    model.logits(rows)
    counts = []
    for token in range(4):
        rows = decode(rows, token)
        model.logits(rows)
        counts.append(backend.recorder.num_recorded)
    assert len(set(counts)) == 1


def test_what_cannot_be_captured_runs_eagerly_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    broken, eager = OneLayer(SimulatedGraphBackend(fails=True)), OneLayer(TorchBackend())
    rows = prompts(3)
    with caplog.at_level(logging.WARNING, logger="mooli"):
        for step_rows in (rows, decode(rows, 1), decode(decode(rows, 1), 2)):
            np.testing.assert_allclose(broken.logits(step_rows), eager.logits(step_rows), atol=2e-5)
    messages = [record.getMessage() for record in caplog.records]
    # The forward function and the head are captured apart.
    assert len(messages) == 2
    assert all("no memory for a graph" in message for message in messages)


@pytest.mark.parametrize(
    ("rows", "key"),
    [
        ([Row([1], 0, [0])], (1, 256)),
        ([Row([1], 255, [0])] * 3, (4, 256)),
        ([Row([1], 256, [0])] * 3, (4, 512)),
        ([Row([1], 900, [0])], (1, 1024)),
        ([Row([1, 2], 0, [0])], None),
        ([Row([1, 2], 0, [0]), Row([1], 4, [0])], None),
        ([Row([1], 1000, [0])] * 200, None),
        ([Row([1], 0, [0])] * 300, None),
    ],
)
def test_steps_that_fit_a_graph(rows: list[Row], key: tuple[int, int] | None) -> None:
    backend = SimulatedGraphBackend()
    backend.allocate(uniform_cache(1, 1, 8, PAGE_SIZE, "float32"), 4, LIMITS)
    assert backend._steps is not None
    # Only sizes count here: every row may use page 0.
    pages = list(range(256))
    batch = step([Row(row.token_ids, row.start, pages) for row in rows], PAGE_SIZE)
    assert backend._steps.key_of(batch) == key
    assert key is None or key[0] * key[1] <= GATHERED_TOKENS


@pytest.mark.parametrize(("switch", "graphs"), [("0", "off"), ("1", "decode steps")])
def test_graphs_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, switch: str, graphs: str) -> None:
    monkeypatch.setenv("MOOLI_GRAPHS", switch)
    backend = SimulatedGraphBackend()
    model = OneLayer(backend)
    model.logits(prompts(2))
    model.logits(decode(prompts(2), 1))
    assert backend.describe()["graphs"] == graphs
    assert bool(backend.recorder.replays) == (switch == "1")


def test_a_switch_with_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOOLI_GRAPHS", "yes")
    with pytest.raises(ConfigError, match="MOOLI_GRAPHS=yes"):
        SimulatedGraphBackend()
