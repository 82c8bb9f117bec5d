"""A row's bits never depend on the rows beside it: every kind of weight and KV, at every instruction set level."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cpu_ops import (
    BLOCK,
    LEVELS,
    Floats,
    Inputs,
    allocate,
    assert_same_bits,
    cpu_backend,
    random,
    random_tensor,
    stored,
)

from mooli.backends.base import AttentionSpec, Limits, RopeSpec
from mooli.tensor import TensorType
from steps import Row, step

MOST_ROWS = 40
KINDS = {
    "Q8": (TensorType.Q8_0, "float32"),
    "Q4": (TensorType.Q4_0, "float32"),
    "Q4M": (TensorType.Q4_1, "float32"),
    "IQ4": (TensorType.IQ4_NL, "float32"),
    "FP4": (TensorType.MXFP4, "float32"),
    "Q6": (TensorType.Q6_K, "float32"),
    "BF16": (TensorType.BF16, "bfloat16"),
    "F16": (TensorType.F16, "float16"),
    "F32": (TensorType.F32, "float32"),
}

every_level = pytest.mark.parametrize("level", LEVELS)
every_kind = pytest.mark.parametrize("kind", list(KINDS))


@every_level
@every_kind
@pytest.mark.parametrize("gated", [False, True], ids=["linear", "gated"])
def test_a_row_of_a_linear_has_the_same_bits_among_1_to_40(level: str, kind: str, gated: bool) -> None:
    storage, dtype = KINDS[kind]
    columns = -(-160 // BLOCK[storage][0]) * BLOCK[storage][0]
    with cpu_backend(level, dtype=dtype) as backend:
        parts = [random_tensor(storage, 50, columns, seed=seed) for seed in (1, 2)]
        if gated:
            weight = backend.load_gated(*parts)
            captured = backend.capture(lambda batch, x: backend.ops.gated_linear(batch, x, weight))
        else:
            weight = backend.load_linear(parts)
            captured = backend.capture(lambda batch, x: backend.ops.linear(batch, x, weight))
        assert backend.describe()["weight_kinds"] == {kind: 1}
        values = random(3, MOST_ROWS, columns) * np.logspace(-3, 3, MOST_ROWS, dtype=np.float32)[:, None]
        inputs = Inputs(backend, values)
        alone = np.concatenate([inputs.through(captured, [row]) for row in range(MOST_ROWS)])
        assert np.isfinite(alone).all()
        for count in range(1, MOST_ROWS + 1):
            # another first row for each count: a row is seen at many places of a block
            rows = [(7 * count + i) % MOST_ROWS for i in range(count)]
            assert_same_bits(inputs.through(captured, rows), alone[rows], f"{count} rows")


SPEC = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=32, scale=32**-0.5)
WINDOWED = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=32, scale=32**-0.5, window=40)
QKV_SIZE = (SPEC.num_heads + 2 * SPEC.num_kv_heads) * SPEC.head_dim
LONGEST = 150
LIMITS = Limits(max_tokens=160, max_rows=48, max_pages_per_row=8)


class Sequence:
    """The rows of one sequence of qkv, attended in any cut; each in pages of its own."""

    def __init__(self, backend: Any, values: Floats, spec: AttentionSpec, kv_dtype: str) -> None:
        table = backend.load_embedding(stored(values))
        allocate(backend, spec, kv_dtype=kv_dtype, num_pages=256, limits=LIMITS)
        self._backend = backend
        self._attend = backend.capture(lambda b: backend.ops.attend(b, 0, backend.ops.embed(b, table), spec))
        self._next_page = 0

    def take_pages(self) -> list[int]:
        self._next_page += 5
        return list(range(self._next_page - 5, self._next_page))[::-1]

    def rows(self, *rows: Row) -> Floats:
        return np.array(self._backend.to_host(self._attend(self._backend.plan(step(rows, 32)))))


@every_level
@pytest.mark.parametrize("spec", [SPEC, WINDOWED], ids=["full", "window"])
@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_token_attends_to_the_same_bits_in_any_cut_and_company(
    level: str, spec: AttentionSpec, kv_dtype: str
) -> None:
    with cpu_backend(level) as backend:
        sequence = Sequence(backend, random(4, LONGEST, QKV_SIZE), spec, kv_dtype)
        whole = sequence.rows(Row(range(LONGEST), 0, sequence.take_pages()))
        assert np.isfinite(whole).all()
        # token by token, and in chunks beside it
        one, other = sequence.take_pages(), sequence.take_pages()
        cuts = np.cumsum([0, 1, 2, 13, 16, 17, 1, 32, 50])
        for token in range(LONGEST):
            rows = [Row([token], token, one)]
            if token < len(cuts) - 1:
                rows.append(Row(range(cuts[token], cuts[token + 1]), int(cuts[token]), other))
            expected = np.concatenate([whole[row.start : row.start + len(row.token_ids)] for row in rows])
            assert_same_bits(sequence.rows(*rows), expected, f"token {token}")


@every_level
@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_decode_row_has_the_same_bits_among_1_to_40(level: str, kv_dtype: str) -> None:
    with cpu_backend(level) as backend:
        sequence = Sequence(backend, random(5, LONGEST, QKV_SIZE), SPEC, kv_dtype)
        pages = [sequence.take_pages() for _ in range(MOST_ROWS)]
        lengths = [1 + (37 * i) % (LONGEST - 1) for i in range(MOST_ROWS)]
        alone = []
        for length, where in zip(lengths, pages, strict=True):
            sequence.rows(Row(range(length), 0, where))
            alone.append(sequence.rows(Row([length], length, where)))
        expected = np.concatenate(alone)
        for count in range(1, MOST_ROWS + 1):
            rows = [Row([lengths[i]], lengths[i], pages[i]) for i in range(count)]
            assert_same_bits(sequence.rows(*rows), expected[:count], f"{count} rows")


SHARED_LIMITS = Limits(max_tokens=400, max_rows=48, max_pages_per_row=16)
NUM_SHARED = 300


def shared_rows(own_pages: Iterator[int]) -> list[tuple[list[int], Row]]:
    """What each row computes last, after the tokens before it, which begin with those of others: all have 128 in
    common, some 256, one goes on inside a shared page, and two have nothing in common with anybody."""
    trunk = list(range(8))
    rows = []
    for index in range(14):
        common = (256, 256, 256, 128, 128, 0)[index % 6] + (32 if index == 7 else 0)
        length = max(common, 40) + 3 + 11 * index % 60
        tokens = [*range(common), *((NUM_SHARED + 31 * index + i) % 399 for i in range(length - common))]
        pages = [*trunk, 8][: common // 32]
        pages += [next(own_pages) for _ in range(length // 32 + 1 - len(pages))]
        count = (1, 1, 1, 4)[index % 4]  # some verify guesses
        rows.append((tokens, Row(tokens[length - count :], length - count, pages)))
    return rows


@every_level
@pytest.mark.parametrize("spec", [SPEC, WINDOWED], ids=["full", "window"])
@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_rows_that_share_pages_have_the_bits_of_each_alone(
    level: str, spec: AttentionSpec, kv_dtype: str, num_threads: int
) -> None:
    with cpu_backend(level, num_threads=num_threads) as backend:
        table = backend.load_embedding(stored(random(20, 400, QKV_SIZE)))
        allocate(backend, spec, kv_dtype=kv_dtype, num_pages=400, limits=SHARED_LIMITS)
        attend = backend.capture(lambda b: backend.ops.attend(b, 0, backend.ops.embed(b, table), spec))

        def run(*rows: Row) -> Floats:
            return np.array(backend.to_host(attend(backend.plan(step(rows, 32)))))

        own_pages = iter(range(10, 400))
        cases = shared_rows(own_pages)
        run(Row(range(288), 0, list(range(9))))
        alone = []
        for tokens, row in cases:
            private = [next(own_pages) for _ in row.pages]
            alone.append(run(Row(tokens, 0, private))[row.start :])
            shared = min(row.start, next((i for i, page in enumerate(row.pages) if page > 9), 99) * 32)
            run(Row(tokens[shared : row.start], shared, row.pages))
        for count in (2, 3, 7, len(cases)):
            for first in (0, 5):
                chosen = [(first + i) % len(cases) for i in range(count)]
                expected = np.concatenate([alone[i] for i in chosen])
                assert_same_bits(run(*(cases[i][1] for i in chosen)), expected, f"{count} rows from {first}")


@every_level
@pytest.mark.parametrize(
    ("down_kind", "width"),  # blocks of 32 are quantised as they are; other widths when they are loaded
    [("Q8", 16), ("Q8", 50), ("Q8", 224), ("Q4", 16), ("Q4", 50), ("Q4", 224), ("Q4M", 224), ("Q6", 256), ("BF16", 50)],
)
@pytest.mark.parametrize("kind", ["Q8", "Q4M", "F32"])
def test_a_gated_linear_and_the_next_in_one_have_the_bits_of_one_after_the_other(
    level: str, kind: str, down_kind: str, width: int
) -> None:
    storage, dtype = KINDS[kind]
    is_quantised_at_load = width % 32 != 0 and down_kind != "BF16"
    down_storage = TensorType.F32 if is_quantised_at_load else KINDS[down_kind][0]
    quantization = {"Q8": "int8", "Q4": "int4"}[down_kind] if is_quantised_at_load else None
    with cpu_backend(level, dtype=dtype, quantization=quantization) as backend:
        gate_up = backend.load_gated(*(random_tensor(storage, width, 160, seed=seed) for seed in (1, 2)))
        down = backend.load_linear([random_tensor(down_storage, 70, width, seed=3)])
        gated = backend.capture(lambda batch, x: backend.ops.gated_linear(batch, x, gate_up))
        both = backend.capture(
            lambda batch, x: backend.ops.linear(batch, backend.ops.gated_linear(batch, x, gate_up), down)
        )
        values = random(4, MOST_ROWS, 160)
        inputs = Inputs(backend, values)
        for count in (1, 2, 5, 6, 7, 13, MOST_ROWS):
            rows = list(range(count))
            middle = inputs.through(gated, rows)
            after = Inputs(backend, middle).through(
                backend.capture(lambda batch, x: backend.ops.linear(batch, x, down)), rows
            )
            assert_same_bits(inputs.through(both, rows), after, f"{count} rows")


def layer_bits(level: str, num_threads: int, dtype: str, quantization: str | None) -> list[Floats]:
    """A whole layer and a head over prompts, chunks and single tokens."""
    with cpu_backend(level, dtype=dtype, quantization=quantization, num_threads=num_threads) as backend:
        assert backend.describe()["num_threads"] == num_threads
        table = backend.load_embedding(stored(random(6, LONGEST, 128)))
        gain = backend.load_vector(stored(random(7, 128)))
        qkv_weight = backend.load_linear([stored(random(8, QKV_SIZE, 128, scale=0.1))])
        out_weight = backend.load_linear([stored(random(9, 128, 192, scale=0.1))])
        gated = backend.load_gated(*(stored(random(seed, 208, 128, scale=0.1)) for seed in (10, 11)))
        down = backend.load_linear([stored(random(12, 128, 208, scale=0.1))])
        head = backend.load_linear([stored(random(13, 99, 128, scale=0.1))], head=True)
        allocate(backend, SPEC, kv_dtype=dtype, num_pages=40, limits=LIMITS)
        ops, rope = backend.ops, RopeSpec(10000.0 ** -np.linspace(0, 1, 16, endpoint=False))

        def layer(batch: Any) -> Any:
            x = ops.embed(batch, table)
            qkv = ops.rope(batch, ops.linear(batch, ops.rms_norm(x, gain, 1e-5), qkv_weight), SPEC, rope)
            x = ops.linear(batch, ops.attend(batch, 0, qkv, SPEC), out_weight, residual=x)
            x = ops.linear(batch, ops.gated_linear(batch, ops.rms_norm(x, gain, 1e-5), gated), down, residual=x)
            return ops.linear(batch, x, head)

        captured = backend.capture(layer)
        pages = [[5 * i + j for j in range(5)] for i in range(8)]
        steps = [
            [Row(range(LONGEST), 0, pages[0])],
            [Row([i], 0, pages[i]) for i in range(1, 8)],
            [Row(range(20, 61), 1, pages[1]), Row([9], 1, pages[2])],
            [Row([77], 42, pages[1])],
        ]
        return [np.array(backend.to_host(captured(backend.plan(step(rows, 32))))) for rows in steps]


@every_level
@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("float32", "int4")],
    ids=str,
)
def test_any_number_of_threads_gives_the_same_bits(level: str, dtype: str, quantization: str | None) -> None:
    expected = layer_bits(level, 1, dtype, quantization)
    for num_threads in (2, 3, 5):
        for actual, one in zip(layer_bits(level, num_threads, dtype, quantization), expected, strict=True):
            assert_same_bits(actual, one, f"{num_threads} threads")
