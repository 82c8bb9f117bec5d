"""A wrong step is refused and does no harm; what is not a number stays with the request that made it."""

from __future__ import annotations

import dataclasses
import gc
import os
import resource
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from cpu_ops import Floats, allocate, assert_same_bits, cpu_backend, native, random, stored, thread_ids, until

from mooli.backends.base import AttentionSpec, Limits
from mooli.batch import PageCopy, ScheduleBatch
from mooli.errors import ConfigError, EngineClosedError, OutOfMemoryError
from mooli.tensor import RawTensor, TensorType
from steps import Choice, Row, sampling_batch, step, uniform_cache

if TYPE_CHECKING:
    from mooli.backends.cpu import CpuBackend

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=32, scale=32**-0.5)
QKV_SIZE = (SPEC.num_heads + 2 * SPEC.num_kv_heads) * SPEC.head_dim
VALUES = slice((SPEC.num_heads + SPEC.num_kv_heads) * SPEC.head_dim, QKV_SIZE)
VOCAB = 100
NUM_PAGES = 16
LIMITS = Limits(max_tokens=64, max_rows=8, max_pages_per_row=4)
BAD_ID = 99
"""Its row of the table holds what is not a number."""


class Model:
    """One layer of attention and a head, on a pool of 16 pages of 32 tokens."""

    def __init__(self, backend: CpuBackend, table: Floats, kv_dtype: str, window: int = 0) -> None:
        self.backend = backend
        spec = dataclasses.replace(SPEC, window=window)
        embedding = backend.load_embedding(stored(table))
        weight = backend.load_linear([stored(random(1, VOCAB, SPEC.num_heads * SPEC.head_dim))], head=True)
        backend.allocate(uniform_cache(1, SPEC.num_kv_heads, SPEC.head_dim, 32, kv_dtype), NUM_PAGES, LIMITS)
        ops = backend.ops
        self._forward = backend.capture(lambda batch: ops.attend(batch, 0, ops.embed(batch, embedding), spec))
        self._logits = backend.capture(lambda batch, hidden: ops.linear(batch, hidden, weight))

    def logits(self, batch: ScheduleBatch) -> Floats:
        """(R, VOCAB) at the last token of each row."""
        self.backend.copy_pages(batch.copies)
        return np.array(self.backend.to_host(self._of_last(batch)))

    def _of_last(self, batch: ScheduleBatch) -> Any:
        planned = self.backend.plan(batch)
        last = np.cumsum(batch.lengths, dtype=np.int32) - np.int32(1)
        return self._logits(*self.backend.take_rows(planned, self._forward(planned), last))

    def tokens(self, batch: ScheduleBatch) -> list[int]:
        logits = self._of_last(batch)
        choices = sampling_batch([Choice(num_top=2) for _ in batch.lengths])
        sampled = self.backend.sample(logits, choices, VOCAB)
        assert [entry is None for entry in sampled.logprobs] == [token < 0 for token in sampled.token_ids]
        return sampled.token_ids.tolist()


def table(bad: float | None = None, where: slice = VALUES) -> Floats:
    values = random(2, VOCAB, QKV_SIZE)
    if bad is not None:
        values[BAD_ID, where] = bad
    return values


@pytest.fixture
def model() -> Iterator[Model]:
    with cpu_backend() as backend:
        yield Model(backend, table(), "float32")


def good_step() -> ScheduleBatch:
    return step([Row(range(40), 0, [3, 5]), Row([7, 8, 9], 0, [6])], 32)


def changed(**arrays: Any) -> ScheduleBatch:
    """The good step (43 tokens, two rows) with some of its arrays replaced."""
    return dataclasses.replace(good_step(), **{name: np.array(value, np.int32) for name, value in arrays.items()})


def positions_with(index: int, value: int) -> list[int]:
    positions = [*range(40), 0, 1, 2]
    positions[index] = value
    return positions


INT_MAX = 2**31 - 1
WRONG_STEPS = {
    "id too large": changed(token_ids=[*range(42), VOCAB]),
    "id negative": changed(token_ids=[-1, *range(42)]),
    "id largest": changed(token_ids=[INT_MAX] * 43),
    "page missing": changed(page_table=[[3, -1], [6, -1]]),
    "page negative": changed(page_table=[[-7, 5], [6, -1]]),
    "page past the pool": changed(page_table=[[3, NUM_PAGES], [6, -1]]),
    "page largest": changed(page_table=[[3, 5], [INT_MAX, -1]]),
    "too few pages": changed(page_table=[[3], [6]]),
    "no pages": changed(page_table=np.zeros((2, 0))),
    "lengths too short": changed(lengths=[39, 3]),
    "lengths too long": changed(lengths=[40, 4]),
    "length zero": changed(lengths=[43, 0]),
    "length negative": changed(lengths=[44, -1]),
    "length that overflows": changed(lengths=[40, INT_MAX]),
    "no rows": changed(lengths=np.zeros(0), page_table=np.zeros((0, 2))),
    "rows of another number": changed(page_table=[[3, 5], [6, -1], [7, -1]]),
    "position negative": changed(positions=[*range(-1, 39), 0, 1, 2]),
    "position largest": changed(positions=positions_with(42, INT_MAX)),
    "positions past the pages": changed(positions=[*range(30, 70), 0, 1, 2]),
    "position that jumps": changed(positions=positions_with(20, 21)),
    "position that falls at the end": changed(positions=positions_with(39, 5)),
    "position that jumps at the end": changed(positions=positions_with(39, 40)),
    "positions descending": changed(positions=[*range(39, -1, -1), 0, 1, 2]),
    "positions that overflow": changed(positions=[*range(INT_MAX - 42, INT_MAX + 1)]),
    "positions too few": changed(positions=range(40)),
    "rotary position negative": changed(rope_positions=positions_with(42, -1)),
    "rotary position past the pool": changed(rope_positions=positions_with(42, NUM_PAGES * 32)),
    "rotary positions too few": changed(rope_positions=range(40)),
    "too many tokens": step([Row([1] * 60, 0, [1, 2]), Row([2] * 5, 0, [3])], 32),
    "empty": changed(token_ids=np.zeros(0), positions=np.zeros(0), lengths=np.zeros(0), page_table=np.zeros((0, 1))),
}


@pytest.mark.parametrize("wrong", list(WRONG_STEPS))
def test_a_wrong_step_is_refused_and_the_next_is_computed(model: Model, wrong: str) -> None:
    expected = model.logits(good_step())
    with pytest.raises(ValueError):
        model.backend.plan(WRONG_STEPS[wrong])
    assert_same_bits(model.logits(good_step()), expected)


def test_nothing_runs_on_a_step_that_was_refused(model: Model) -> None:
    planned = model.backend.plan(good_step())
    with pytest.raises(ValueError):
        model.backend.plan(WRONG_STEPS["page past the pool"])
    with pytest.raises(ValueError, match="planned step"):
        model._forward(planned)


def test_a_table_smaller_than_the_last_one_loaded_is_not_read_past_its_end() -> None:
    with cpu_backend() as backend:
        small = backend.load_embedding(stored(random(3, 10, 64)))
        backend.load_embedding(stored(random(4, 5000, 64)))
        allocate(backend)
        captured = backend.capture(lambda batch: backend.ops.embed(batch, small))
        with pytest.raises(ValueError, match="4999 outside the embedding"):
            captured(backend.plan(step([Row([0, 4999], 0, [0])], 32)))
        assert backend.to_host(captured(backend.plan(step([Row([0, 9], 0, [0])], 32)))).shape == (2, 64)


def test_a_weight_loaded_after_the_pool_finds_its_buffers_large_enough() -> None:
    with cpu_backend() as backend:
        wide = random(5, 3, 9000)
        table = backend.load_embedding(stored(wide))
        allocate(backend)
        weight = backend.load_linear([stored(random(6, 20, 9000))])
        embedded = backend.capture(lambda batch: backend.ops.embed(batch, table))
        captured = backend.capture(lambda batch, hidden: backend.ops.linear(batch, hidden, weight))
        rows = np.zeros(128, np.int32)
        planned = backend.plan(step([Row([0], 0, [0])], 32))
        result = captured(*backend.take_rows(planned, embedded(planned), rows))
        assert_same_bits(np.array(backend.to_host(result)), np.repeat(backend.to_host(result)[:1], 128, 0))


@pytest.mark.parametrize(
    "copy",
    [PageCopy(-1, 2, 3), PageCopy(1, NUM_PAGES, 3), PageCopy(NUM_PAGES, 1, 3), PageCopy(1, 2, 33), PageCopy(1, 2, -1)],
    ids=str,
)
def test_a_copy_outside_the_pool_is_refused(model: Model, copy: PageCopy) -> None:
    with pytest.raises(ValueError, match="copy out of range"):
        model.backend.copy_pages([copy])


def test_a_weight_larger_than_any_memory_is_an_error() -> None:
    tensor = RawTensor("t", TensorType.F32, (2**30, 2**24), np.zeros((1, 4), np.uint8))
    with cpu_backend() as backend:
        with pytest.raises(OutOfMemoryError, match="no memory for a table"):
            backend.load_embedding(tensor)
        with pytest.raises(OutOfMemoryError, match="no memory for a weight"):
            backend.load_linear([tensor])


@pytest.mark.parametrize("num_pages", [2**24, 2**45, 2**62])
def test_a_pool_larger_than_any_memory_is_an_error_and_a_small_one_then_works(num_pages: int) -> None:
    with cpu_backend() as backend:
        huge = uniform_cache(2**10, 2**10, 2**8, 32, "float32")
        with pytest.raises(OutOfMemoryError, match="max_total_tokens"):
            backend.allocate(huge, num_pages, LIMITS)
        with pytest.raises(ValueError):
            backend.plan(good_step())
        Model(backend, table(), "float32").logits(good_step())


def test_buffers_larger_than_any_memory_are_an_error_and_smaller_ones_then_work() -> None:
    with cpu_backend() as backend:
        wide = backend.load_linear([stored(random(1, 1, 2**20))])
        kv = uniform_cache(1, SPEC.num_kv_heads, SPEC.head_dim, 32, "float32")
        with pytest.raises(OutOfMemoryError, match=r"buffers of a step of 1073741824 tokens.* lower"):
            backend.allocate(kv, NUM_PAGES, Limits(2**30, 8, 4))
        with pytest.raises(ValueError):
            backend.plan(good_step())
        del wide
        Model(backend, table(), "float32").logits(good_step())


@pytest.mark.skipif(sys.platform != "linux", reason="a pool takes memory at once elsewhere")
def test_pages_of_a_pool_that_nobody_has_touched_are_not_free_for_other_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("cpu.backend", "host_memory"):
        monkeypatch.setattr(f"mooli.backends.{module}.shared_folder", lambda: tmp_path / "claims")
    kv = uniform_cache(1, SPEC.num_kv_heads, SPEC.head_dim, 32, "float32")
    with cpu_backend() as other, cpu_backend() as backend:
        assert other.memory().claimed_bytes == 0
        num_pages = 2**40 // backend.kv_bytes_per_page(kv)  # addresses alone
        backend.allocate(kv, num_pages, LIMITS)
        claimed = other.memory().claimed_bytes
        assert 0.9 * 2**40 < claimed < 2**40
        assert other.memory().available_bytes == 0
        backend.allocate(kv, NUM_PAGES, LIMITS)
        assert other.memory().claimed_bytes == 0, "this process holds more than that already"
        backend.allocate(kv, num_pages, LIMITS)
    assert list((tmp_path / "claims").iterdir()) == []


def test_more_threads_than_processors_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with cpu_backend() as backend:
        most = backend.describe()["num_threads"]
    with cpu_backend(num_threads=most):
        assert not caplog.records
    with cpu_backend(num_threads=most + 1):
        (record,) = caplog.records
        assert f"num_threads={most + 1} is more than the {most} processors" in record.message


SAMPLING_ARRAYS = [
    "temperature", "top_k", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "seeds",
    "positions", "output_starts", "history_indptr", "bias_indptr",
]  # fmt: skip


@pytest.mark.parametrize("name", SAMPLING_ARRAYS)
def test_sampling_parameters_of_fewer_rows_are_refused(name: str) -> None:
    with cpu_backend() as backend:
        sampling = sampling_batch([Choice(temperature=1.0)] * 3)
        arrays = {field: getattr(sampling, field) for field in SAMPLING_ARRAYS}
        arrays[name] = arrays[name][:-1]
        with pytest.raises(ValueError, match=r"sampling parameters|logits or parameters"):
            sample(backend, arrays, sampling)


def test_an_index_pointer_outside_its_values_is_refused() -> None:
    with cpu_backend() as backend:
        sampling = sampling_batch([Choice(temperature=1.0)] * 3)
        arrays = {field: getattr(sampling, field) for field in SAMPLING_ARRAYS}
        for wrong in ([0, 0, 0, 1], [0, -1, 0, 0], [0, INT_MAX, 0, 0]):
            arrays["history_indptr"] = np.array(wrong, np.int32)
            with pytest.raises(ValueError, match="index pointer"):
                sample(backend, arrays, sampling)


def test_masks_of_fewer_rows_or_ids_and_rows_of_none_are_refused() -> None:
    with cpu_backend() as backend:
        sampling = sampling_batch([Choice(temperature=1.0)] * 3)
        arrays = {field: getattr(sampling, field) for field in SAMPLING_ARRAYS}
        words = np.ones((2, 1), np.uint32)
        for allowed, rows in (
            (words, [0, 1]),
            (words, [0, 2, 1]),
            (words[:, :0], [-1, -1, -1]),
            (words[:0], [-1, 0, -1]),
        ):
            masks = {"allowed": np.ascontiguousarray(allowed), "mask_rows": np.array(rows, np.int32)}
            with pytest.raises(ValueError, match="masks"):
                sample(backend, arrays | masks, sampling)
        sample(backend, arrays | {"allowed": words, "mask_rows": np.array([0, -1, 1], np.int32)}, sampling)


def sample(backend: CpuBackend, arrays: dict[str, Any], sampling: Any) -> None:
    a = arrays
    backend._device.sample(
        np.zeros((3, 8), np.float32), 8, a["temperature"], a["top_k"], a["top_p"], a["min_p"], a["frequency_penalty"],
        a["presence_penalty"], a["repetition_penalty"], a["seeds"], a["positions"], sampling.history_ids,
        a["history_indptr"], a["output_starts"], sampling.bias_ids, sampling.bias_values, a["bias_indptr"],
        a.get("allowed"), a.get("mask_rows"), 0, np.empty(3, np.int32),
    )  # fmt: skip


QUERIES = slice(0, SPEC.num_heads * SPEC.head_dim)
KEYS = slice(SPEC.num_heads * SPEC.head_dim, VALUES.start)

every_kv = pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16", "int8"])
every_level = pytest.mark.parametrize("level", native.available_isas())


@every_level
@every_kv
@pytest.mark.parametrize(
    ("part", "bad"),
    [(QUERIES, np.nan), (KEYS, np.nan), (VALUES, np.nan), (KEYS, np.inf), (VALUES, np.inf), (VALUES, -np.inf)],
    ids=["query NaN", "key NaN", "value NaN", "key inf", "value inf", "value -inf"],
)
def test_what_is_not_a_number_fails_its_request_and_no_other(
    level: str, kv_dtype: str, part: slice, bad: float
) -> None:
    with cpu_backend(level) as backend:
        model = Model(backend, table(bad, part), kv_dtype)
        alone = model.logits(step([Row(range(30), 0, [0])], 32))
        rows = [Row(range(30), 0, [1]), Row([5, BAD_ID], 0, [2]), Row([5, 6, 7], 0, [3])]
        tokens = model.tokens(step(rows, 32))
        assert tokens[1] == -1 and tokens[0] >= 0 and tokens[2] >= 0
        assert tokens[0] == alone[0].argmax()
        assert_same_bits(model.logits(step(rows, 32))[:1], alone)


@every_level
@every_kv
@pytest.mark.parametrize("bad_tokens", [1, 31, 32, 60])
@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_pages_that_held_nan_give_the_next_request_the_bits_of_a_cold_one(
    level: str, kv_dtype: str, bad_tokens: int, bad: float
) -> None:
    with cpu_backend(level) as backend:
        model = Model(backend, table(bad, slice(KEYS.start, VALUES.stop)), kv_dtype)
        pages = [4, 2]
        cold = [model.logits(batch) for batch in continued(pages)]
        assert model.tokens(step([Row([BAD_ID] * bad_tokens, 0, pages)], 32)) == [-1]
        for batch, expected in zip(continued(pages), cold, strict=True):
            assert np.isfinite(expected).all()
            assert_same_bits(model.logits(batch), expected)


def continued(pages: list[int]) -> list[ScheduleBatch]:
    """A prompt of 5 tokens, then chunks and single tokens up to 37."""
    cuts = [0, 5, 6, 20, 31, 32, 33, 37]
    return [step([Row(range(a, b), a, pages)], 32) for a, b in pairwise(cuts)]


@every_level
@every_kv
@pytest.mark.parametrize("kept", [1, 2, 31])
def test_a_copied_head_leaves_the_nan_behind_it_in_the_source(level: str, kv_dtype: str, kept: int) -> None:
    with cpu_backend(level) as backend:
        model = Model(backend, table(np.nan, slice(KEYS.start, VALUES.stop)), kv_dtype)
        cold = [model.logits(step([Row(range(kept), 0, [0])], 32)), model.logits(step([Row([50], kept, [0])], 32))]
        # a source whose head is sound, NaN after it, and a target full of NaN
        model.logits(step([Row(range(kept), 0, [1])], 32))
        model.logits(step([Row([BAD_ID] * (32 - kept), kept, [1])], 32))
        model.logits(step([Row([BAD_ID] * 32, 0, [2])], 32))
        batch = step([Row([50], kept, [2])], 32, copies=[PageCopy(1, 2, kept)])
        assert_same_bits(model.logits(batch), cold[1])


@pytest.mark.parametrize("num_tokens", [3, 17, 31])
def test_a_page_that_was_copied_in_part_goes_on_as_if_computed(num_tokens: int) -> None:
    with cpu_backend() as backend:
        model = Model(backend, table(), "bfloat16")
        whole = [model.logits(step([Row([i % VOCAB], i, [0, 1])], 32)) for i in range(40)]
        copies = [PageCopy(0, 7, num_tokens)]
        for i in range(num_tokens, 40):
            actual = model.logits(step([Row([i % VOCAB], i, [7, 8])], 32, copies=copies))
            copies = []
            assert_same_bits(actual, whole[i], f"token {i}")


@every_level
@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("quantization", [None, "int8", "int4"], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_bad_weight_shows_in_the_logits(level: str, dtype: str, quantization: str | None, bad: float) -> None:
    with cpu_backend(level, dtype=dtype, quantization=quantization) as backend:
        matrix = random(9, 70, 96)
        matrix[40, 50] = bad
        table = backend.load_embedding(stored(np.abs(random(10, 3, 96)) + 1))
        weight = backend.load_linear([stored(matrix)])
        allocate(backend)
        captured = backend.capture(lambda b: backend.ops.linear(b, backend.ops.embed(b, table), weight))
        result = backend.to_host(captured(backend.plan(step([Row(range(3), 0, [0])], 32))))
        assert not np.isfinite(result[:, 40]).any()
        assert np.isfinite(np.delete(result, 40, axis=1)).all()


@every_level
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("quantization", [None, "int8", "int4"], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_bad_activation_stays_in_its_row(level: str, dtype: str, quantization: str | None, bad: float) -> None:
    with cpu_backend(level, dtype=dtype, quantization=quantization) as backend:
        values = random(11, 13, 96)
        good = backend.load_embedding(stored(values))
        spoiled = values.copy()
        spoiled[6, 40] = bad
        table = backend.load_embedding(stored(spoiled))
        weight = backend.load_linear([stored(np.abs(random(12, 70, 96)) + 1)])
        allocate(backend)
        batch = step([Row(range(13), 0, [0])], 32)
        expected, actual = (
            np.array(backend.to_host(capture(backend, embedding, weight)(backend.plan(batch))))
            for embedding in (good, table)
        )
        assert not np.isfinite(actual[6]).any()
        assert_same_bits(np.delete(actual, 6, 0), np.delete(expected, 6, 0))


def capture(backend: CpuBackend, table: Any, weight: Any) -> Any:
    return backend.capture(lambda b: backend.ops.linear(b, backend.ops.embed(b, table), weight))


# ------------------------------------------------------------------ threads

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no list of threads on this system")


def threads_end_with_the_backend() -> None:
    before = thread_ids()
    gc.collect()
    gc.disable()
    with cpu_backend(num_threads=4) as backend:
        Model(backend, table(), "float32").logits(good_step())
        assert until(lambda: len(thread_ids() - before) == 3)  # the one that packed ends by itself
        gone = weakref.ref(backend)
    del backend
    assert gone() is None
    assert until(lambda: not thread_ids() - before)


def idle_threads_sleep_and_wake() -> None:
    before = thread_ids()
    with cpu_backend(num_threads=3) as backend:
        model = Model(backend, table(), "float32")
        expected = model.logits(good_step())
        assert until(lambda: len(thread_ids() - before) == 2)
        workers = thread_ids() - before

        def asleep(thread: str) -> bool:
            with open(f"/proc/self/task/{thread}/stat") as file:
                return file.read().rsplit(") ", 1)[1][0] == "S"

        for _ in range(3):
            assert until(lambda: all(map(asleep, workers)))
            assert_same_bits(model.logits(good_step()), expected)


@needs_proc
@pytest.mark.parametrize("check", [threads_end_with_the_backend, idle_threads_sleep_and_wake], ids=lambda f: f.__name__)
def test_threads_in_a_process_of_their_own(check: Callable[[], None]) -> None:
    """Without the collector, and with no thread of another test."""
    here = Path(__file__)
    paths = [str(here.parent), str(here.parents[1])]
    code = f"import sys; sys.path[:0] = {paths!r}; import {here.stem} as tests; tests.{check.__name__}()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_closed_backend_says_so() -> None:
    with cpu_backend() as backend:
        model = Model(backend, table(), "float32")
        model.logits(good_step())
    with pytest.raises((EngineClosedError, ValueError)):
        model.logits(good_step())
    backend.close()


@pytest.mark.parametrize("num_threads", [0, -1, 1025, 10**9])
def test_a_number_of_threads_out_of_reason_is_refused(num_threads: int) -> None:
    with pytest.raises(ConfigError, match=f"from 1 to 1024, not {num_threads}"), cpu_backend(num_threads=num_threads):
        pass


FEW_THREADS = """
import resource
from mooli.backends import create_backend
from mooli.errors import ConfigError

with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
try:
    create_backend("cpu", num_threads=1000)
except ConfigError as exc:
    print(exc)
print(create_backend("cpu", num_threads=2).describe()["num_threads"])
"""


@needs_proc
def test_a_system_that_starts_no_more_threads_gives_an_error_that_says_so() -> None:
    """Each thread has a stack of its own: with little address space left only some of them start."""
    limit, _ = resource.getrlimit(resource.RLIMIT_STACK)
    if limit != resource.RLIM_INFINITY and limit < 2**20:
        pytest.skip("thread stacks are too small here")
    done = subprocess.run([sys.executable, "-c", FEW_THREADS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    message, threads = done.stdout.splitlines()
    assert "1000 threads" in message and "lower num_threads" in message
    assert threads == "2"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_on_one_processor_there_is_one_thread_which_computes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ONE_PROCESSOR, str(Path(__file__).parent), str(Path(__file__).parents[1])],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1 (2, 100) True"


ONE_PROCESSOR = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
sys.path[:0] = sys.argv[1:]
import numpy as np
from mooli.backends import create_backend
from test_cpu_robustness import Model, good_step, table

backend = create_backend("cpu", dtype="float32")
backend.bind_thread()
logits = Model(backend, table(), "float32").logits(good_step())
print(backend.describe()["num_threads"], logits.shape, np.isfinite(logits).all())
"""
