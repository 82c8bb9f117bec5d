"""Weights are packed while Python goes on: nothing is used before it is, and nothing goes before it has been read."""

from __future__ import annotations

import gc
import itertools
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_ops import allocate, cpu_backend, random, stored, thread_ids, until

from mooli.backends import create_backend
from mooli.errors import CheckpointError
from mooli.models import packer
from mooli.models.checkpoint import DummyCheckpoint
from mooli.models.llama import LlamaConfig
from mooli.models.registry import create_model
from mooli.tensor import RawTensor
from steps import Row, step

ROWS, COLUMNS = 12_000, 512
SLOW = "int4"
"""Choosing four bits takes so long that Python is far ahead."""

IDS = [0, 7, ROWS - 1]


def load(backend: Any) -> tuple[Any, list[Any]]:
    """An embedding and linears of which nobody else keeps the tensors."""
    tensors = [stored(random(seed, ROWS, COLUMNS)) for seed in range(4)]
    embedding = backend.load_embedding(tensors.pop())
    linears = []
    while tensors:
        linears.append(backend.load_linear([tensors.pop()]))
    return embedding, linears


def test_operations_wait_for_the_weights_that_they_use() -> None:
    batch = step([Row(IDS, 0, [0])], 32)
    with cpu_backend(dtype="auto", quantization=SLOW) as backend:
        allocate(backend)
        embedding, linears = load(backend)
        ops = backend.ops
        captured = [
            backend.capture(lambda planned, weight=weight: ops.linear(planned, ops.embed(planned, embedding), weight))
            for weight in reversed(linears)
        ]
        assert backend.unread_loads(100) > 0  # a second's twentieth of packing has just begun
        planned = backend.plan(batch)
        assert backend.unread_loads(100) == 0
        results = [np.array(backend.to_host(each(planned))) for each in captured]
    table = random(3, ROWS, COLUMNS)[IDS]
    for seed, result in enumerate(results):
        exact = table @ random(seed, ROWS, COLUMNS).T
        assert np.linalg.norm(result - exact) < 0.2 * np.linalg.norm(exact)


def test_calls_are_read_in_order_and_counted() -> None:
    with cpu_backend(dtype="float32") as backend:
        assert backend.unread_loads(0) == 0
        weight, vector = stored(random(1, ROWS, COLUMNS)), stored(random(2, 1, COLUMNS)[0])
        for _ in range(3):
            backend.load_linear([weight, weight])
            backend.load_vector(vector)
        backend.load_gated(weight, weight)
        backend.load_tied(weight)
        counts = [backend.unread_loads(at_most) for at_most in (100, 5, 2, 1, 0)]
        assert counts == sorted(counts, reverse=True)
        assert all(count <= at_most for count, at_most in zip(counts, (8, 5, 2, 1, 0), strict=True))
        assert backend.load_vector(vector) is not None and backend.unread_loads(1) == 0  # nothing to be packed


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "forgotten"])
def test_a_backend_may_go_while_it_packs(is_closed: bool) -> None:
    for _ in range(5):
        backend: Any = create_backend("cpu", quantization=SLOW, num_threads=2)
        load(backend)
        if is_closed:
            backend.close()
            assert backend.unread_loads(0) == 0
        gone = weakref.ref(backend)
        del backend
        gc.collect()
        assert gone() is None


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no list of threads here")
def test_the_thread_that_packs_ends_with_the_last_weight() -> None:
    with cpu_backend(dtype="float32") as backend:
        before = thread_ids()
        backend.load_linear([stored(random(1, ROWS, COLUMNS))])
        backend.unread_loads(0)
        backend.close()
        assert until(lambda: thread_ids() <= before)


CONFIG = LlamaConfig(
    family="llama",
    architecture="LlamaForCausalLM",
    vocab_size=2000,
    hidden_size=256,
    intermediate_size=1024,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=False,
    dtype="float32",
)


class Watched(DummyCheckpoint):
    """Tensors of a made model. Knows how many bytes have been handed out and not released; `missing` cannot be read."""

    def __init__(self, missing: str = "") -> None:
        super().__init__(CONFIG)
        self.missing = missing
        self.in_use: dict[str, int] = {}
        self.most_bytes = 0

    def tensor(self, name: str) -> RawTensor:
        if name == self.missing:
            raise CheckpointError(f"{name} is gone")
        tensor = super().tensor(name)
        self.in_use[name] = tensor.data.nbytes
        self.most_bytes = max(self.most_bytes, sum(self.in_use.values()))
        return tensor

    def release(self, name: str) -> None:
        del self.in_use[name]


@pytest.mark.parametrize("most_bytes", [0, 5_000_000])
def test_tensors_are_released_when_they_are_packed_and_few_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, most_bytes: int
) -> None:
    monkeypatch.setattr(packer, "MOST_UNREAD_BYTES", most_bytes)
    checkpoint, told = Watched(), []
    with cpu_backend(dtype="bfloat16") as backend:
        create_model(CONFIG, checkpoint, backend, lambda done, total: told.append((done, total)))
    assert checkpoint.in_use == {}
    largest = 2 * 1024 * 256 * 4  # gate and up projection, read by one call
    assert largest <= checkpoint.most_bytes <= most_bytes + largest
    total = len(list(checkpoint.names()))
    assert told[0] == (0, total) and told[-1] == (total, total)
    assert all(before < after for (before, _), (after, _) in itertools.pairwise(told))


def test_a_tensor_that_cannot_be_read_ends_the_loading_while_others_are_packed() -> None:
    for _ in range(5):
        with cpu_backend(dtype="bfloat16") as backend, pytest.raises(CheckpointError, match="is gone"):
            create_model(CONFIG, Watched("model.norm.weight"), backend)
