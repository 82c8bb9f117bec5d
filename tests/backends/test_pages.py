"""Pages as bytes, on every backend: to the bit, wherever they come from and go to. What does not fit is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from cpu_ops import LEVELS, cpu_backend
from hypothesis import given, settings
from hypothesis import strategies as st

from mooli.backends import create_backend
from mooli.backends.base import Limits
from mooli.errors import ConfigError, EngineError
from mooli.models.checkpoint import DummyCheckpoint
from mooli.models.llama import LlamaConfig
from mooli.models.registry import create_model
from mooli.runner.model_runner import ModelRunner
from page_moves import Place
from steps import uniform_cache
from variants import require, simulated_npu

CONFIG = LlamaConfig(
    family="llama",
    architecture="LlamaForCausalLM",
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
)
NUM_PAGES = 16
MAX_TOKENS = 160


@dataclass(frozen=True)
class Pool:
    """A backend and what its pages are. Heads of 32 are bfloat16 panels where the processor has a dot product of it."""

    backend: str
    dtype: str
    page_size: int
    head_dim: int = 32
    level: str = ""

    def __str__(self) -> str:
        return f"{self.backend}{self.level and '-' + self.level}-{self.dtype}-{self.page_size}-of-{self.head_dim}"


POOLS = [
    Pool("reference", "float32", 5),
    Pool("reference", "int8", 16),
    *(Pool("cpu", dtype, 32) for dtype in ("float32", "float16", "bfloat16", "int8")),
    *(Pool("cpu", dtype, 96, 48) for dtype in ("float32", "bfloat16", "int8")),
    *(Pool("cpu", "int8", 32, 16, level) for level in LEVELS),
    *(Pool("cpu", "bfloat16", 64, 32, level) for level in LEVELS),
    Pool("torch", "float32", 1),
    Pool("torch", "bfloat16", 16),
    Pool("torch", "float16", 128),
    Pool("ascend", "float16", 128),
    Pool("ascend", "bfloat16", 128),
]


@pytest.fixture(params=POOLS, ids=str)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with placed(request.param) as made:
        yield made


class placed(ExitStack):  # noqa: N801 - a context manager
    """The tiny model on a pool."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self._pool = pool

    def __enter__(self) -> Place:  # type: ignore[override]
        pool = self._pool
        require(pool.backend)
        backend: Any
        if pool.backend == "cpu":
            backend = self.enter_context(cpu_backend(pool.level, num_threads=2))
        else:
            if pool.backend == "ascend":
                self.enter_context(simulated_npu())
            dtype = "float32" if pool.backend == "reference" else pool.dtype
            backend = create_backend(pool.backend, dtype=dtype)
            self.callback(backend.close)
        config = replace(CONFIG, head_dim=pool.head_dim)
        model = create_model(config, DummyCheckpoint(config, seed=3), backend)
        num_pages = NUM_PAGES * max(1, 16 // pool.page_size)
        spec = config.cache_spec(pool.page_size, pool.dtype)
        backend.allocate(spec, num_pages, Limits(MAX_TOKENS, 4, num_pages))
        runner = ModelRunner(model, backend, config.vocab_size)
        return Place(runner, backend, pool.page_size, num_pages, config.vocab_size, MAX_TOKENS)


def prompt(length: int, seed: int = 1) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(CONFIG.vocab_size) for _ in range(length)]


def pages_for(place: Place, num_tokens: int) -> list[int]:
    return list(range(-(-num_tokens // place.page_size)))


@pytest.mark.parametrize("length", [1, 64, 75])
def test_a_sequence_whose_pages_move_goes_on_as_if_they_had_stayed(place: Place, length: int) -> None:
    text, pages = prompt(length), pages_for(place, length + 8)
    place.fill(list(range(place.num_pages)), random.Random(2))
    stayed = place.decode(text, 8, pages)
    assert all(logprobs is not None for _, logprobs in stayed)
    for seed in range(2):
        assert place.decode(text, 8, pages, random.Random(seed)) == stayed


@pytest.mark.parametrize("length", [1, 33, 60])
def test_the_same_tokens_are_the_same_bytes_whatever_was_in_the_pages_before(place: Place, length: int) -> None:
    text, pages = prompt(length), pages_for(place, length)
    place.decode(text, 1, pages)
    first = place.backend.read_pages(pages, length)
    place.fill(list(range(place.num_pages)), random.Random(2))
    elsewhere = [place.num_pages - 1 - page for page in pages]
    place.decode(text, 1, elsewhere)
    assert place.backend.read_pages(elsewhere, length).tobytes() == first.tobytes()
    place.backend.write_pages(elsewhere, first)
    assert place.backend.read_pages(elsewhere).tobytes() == first.tobytes()
    assert not place.backend.read_pages(pages, 0).any()


def test_any_bytes_come_back_as_they_went_in(place: Place) -> None:
    rng = np.random.default_rng(0)
    size = place.backend.read_pages([0]).size
    pages = rng.permutation(place.num_pages)[:3].astype(np.int32)
    data = rng.integers(0, 256, 3 * size, dtype=np.uint8)
    others = np.setdiff1d(np.arange(place.num_pages), pages)
    place.backend.write_pages(others, bytes(len(others) * size))
    place.backend.write_pages(pages, data)
    assert place.backend.read_pages(pages).tobytes() == data.tobytes()
    assert place.backend.read_pages(pages[::-1]).tobytes() == data.reshape(3, size)[::-1].tobytes()
    assert not place.backend.read_pages(others).any()


def test_pages_are_read_into_the_callers_buffer(place: Place) -> None:
    place.fill([0, 1], random.Random(2))
    expected = place.backend.read_pages([1, 0])
    assert expected.dtype == np.uint8 and expected.shape == (2, expected.size // 2)
    buffer = bytearray(expected.size)
    assert place.backend.read_pages([1, 0], out=memoryview(buffer)).tobytes() == bytes(buffer) == expected.tobytes()
    array = np.zeros(expected.size // 4, np.float32)
    assert np.shares_memory(place.backend.read_pages([1, 0], out=array), array)
    assert array.tobytes() == expected.tobytes()
    place.backend.write_pages([0, 1], memoryview(expected.tobytes()))
    assert place.backend.read_pages([0, 1]).tobytes() == expected.tobytes()
    assert place.backend.read_pages([]).shape == (0, expected.size // 2)
    place.backend.write_pages([], b"")


@pytest.mark.parametrize("pool", [pool for pool in POOLS if pool.backend in ("torch", "ascend")], ids=str)
def test_pages_go_to_rows_of_the_host_and_come_back_elsewhere(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    with placed(pool) as place:
        backend: Any = place.backend
        with pytest.raises(EngineError, match="page 0 is outside the host's memory of 0 pages"):
            backend.back_up([0], [0])
        backend.allocate_host(5)
        monkeypatch.setattr("mooli.backends.torch.backend.MOST_GATHERED_BYTES", 2 * backend.read_pages([0]).size)
        place.fill([0, 1, 2], random.Random(2))
        data = [page.tobytes() for page in backend.read_pages([0, 1, 2])]
        backend.back_up([2, 0, 1], [4, 0, 3])
        assert [backend.host_bytes(row) for row in (0, 3, 4)] == data, "as pages go to disk"
        place.fill([0, 1, 2, 5, 6], random.Random(3))
        backend.load_back([6, 1, 5], [3, 0, 4])
        assert [page.tobytes() for page in backend.read_pages([1, 6, 5])] == data
        wrong: list[Any] = [([0], [5]), ([0], [-1]), ([0, 1], [2]), ([0, 1], [2, 2]), ([0, 0], [1, 2])]
        for pages, rows in wrong:
            for copy in (backend.back_up, backend.load_back):
                with pytest.raises(EngineError):
                    copy(pages, rows)
        with pytest.raises(EngineError, match="no row 5"):
            backend.host_bytes(5)
        assert [page.tobytes() for page in backend.read_pages([1, 6, 5])] == data


def test_what_does_not_fit_is_refused_and_changes_nothing(place: Place) -> None:
    place.fill([0, 1], random.Random(2))
    backend, before = place.backend, place.backend.read_pages([0, 1])
    data, size = before.tobytes(), before.size // 2
    wrong_pages: list[Any] = [[0, place.num_pages], [-1, 0], [0, 2**40], [1, 1], [0.0, 1.0], [[0, 1]], ["0", "1"]]
    for pages in wrong_pages:
        with pytest.raises(EngineError):
            backend.read_pages(pages)
        with pytest.raises(EngineError):
            backend.write_pages(pages, data)
    for num_tokens in (-1, 2 * place.page_size + 1):
        with pytest.raises(EngineError, match=f"{num_tokens} tokens"):
            backend.read_pages([0, 1], num_tokens)
    wrong_data: list[Any] = [data[:-1], data + b"0", b"", np.zeros((2 * size, 2), np.uint8)[:, 0], "text", None]
    for given_data in wrong_data:
        with pytest.raises(EngineError):
            backend.write_pages([0, 1], given_data)
    with pytest.raises(EngineError, match="cannot be written to"):
        backend.read_pages([0, 1], out=data)
    with pytest.raises(EngineError, match=f"has {2 * size + 1}"):
        backend.read_pages([0, 1], out=bytearray(2 * size + 1))
    assert backend.read_pages([0, 1]).tobytes() == data


@pytest.mark.parametrize("name", ["reference", "cpu", "torch"])
def test_there_are_no_pages_before_a_pool_and_after_its_end(name: str) -> None:
    require(name)
    backend = create_backend(name, dtype="float32")
    with pytest.raises((ConfigError, EngineError)):
        backend.read_pages([0])
    backend.allocate(uniform_cache(1, 1, 32, 32, "float32"), 4, Limits(32, 1, 4))
    assert backend.read_pages([3]).size == backend.kv_bytes_per_page(uniform_cache(1, 1, 32, 32, "float32"))
    backend.close()
    with pytest.raises((ConfigError, EngineError)):
        backend.write_pages([0], b"0")


def test_formats_differ_where_the_bits_of_pages_do() -> None:
    formats = []
    for pool in [pool for pool in POOLS if pool.page_size in (32, 64) or pool.backend in ("torch", "ascend")]:
        with placed(pool) as place:
            formats.append((str(pool), place.backend.page_format()))
    texts = {name: str(sorted(each.items())) for name, each in formats}
    assert all(isinstance(value, str) for _, each in formats for value in each.values())
    levels = [name for name in texts if "bfloat16-64" in name]
    assert len({texts[name] for name in levels}) == len(levels) == len(LEVELS)
    same_level = ["cpu-float32-32-of-32", "cpu-float16-32-of-32", "cpu-bfloat16-32-of-32", "cpu-int8-32-of-32"]
    assert len({texts[name] for name in same_level}) == len(same_level)
    assert len({texts[name] for name in texts if name.startswith(("torch", "ascend"))}) == 5


@settings(max_examples=200, deadline=None)
@given(
    pages=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 5), max_size=4),
    tokens=st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 130),
    extra=st.integers(-2, 2) | st.just(0),
)
def test_the_native_pool_refuses_what_it_does_not_have(pages: list[int], tokens: int, extra: int) -> None:
    with cpu_backend(num_threads=1) as backend:
        backend.allocate(uniform_cache(1, 1, 16, 32, "float32"), 4, Limits(32, 1, 4))
        device, size = backend._device, 2 * 16 * 32 * 4
        numbers, buffer = np.array(pages, np.int32), np.zeros(max(0, len(pages) * size + extra), np.uint8)
        is_right = all(0 <= page < 4 for page in pages) and len(buffer) == len(pages) * size
        if is_right:
            device.write_pages(numbers, buffer)
        else:
            with pytest.raises(ValueError, match=r"outside the pool|are not those"):
                device.write_pages(numbers, buffer)
        if is_right and 0 <= tokens <= 32 * len(pages):
            device.read_pages(numbers, tokens, buffer)
            return
        with pytest.raises(ValueError, match=r"outside the pool|are not those|more tokens"):
            device.read_pages(numbers, tokens, buffer)
