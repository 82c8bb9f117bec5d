"""A recorded function gives what its operations give one by one, wherever their results lie in the arena."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cpu_ops import Floats, Inputs, allocate, assert_same_bits, cpu_backend, random, stored
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mooli.backends import create_backend
from mooli.backends.base import AttentionSpec, Backend, RopeSpec
from mooli.batch import PromptLogprobRows
from mooli.errors import ConfigError, EngineError
from steps import LIMITS, Row, step, uniform_cache

SPEC = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=32, scale=32**-0.5)
ROPE = RopeSpec(10000.0 ** -np.linspace(0, 1, 16, endpoint=False))
QKV = 128
WIDTHS = (QKV, 64, 96)
"""The first is that of a packed qkv row, the second that of attention's result."""
VOCAB = 40


@dataclass(frozen=True)
class Op:
    """An operation on earlier results, of which those of a fitting width are counted from the latest."""

    name: str
    source: int
    other: int
    width: int


names = st.sampled_from(["norm", "linear", "linear", "residual", "residual", "gated", "rope", "head norm", "attend"])
ops = st.builds(Op, names, st.integers(0, 5), st.integers(0, 5), st.sampled_from(WIDTHS))


class Weights:
    """One weight of each shape on a backend, and functions made of a list of operations."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.table = backend.load_embedding(stored(random(1, VOCAB, QKV)))
        self.norms = {width: backend.load_vector(stored(random(width, width, scale=0.1) + 1)) for width in WIDTHS}
        self.head_norm = backend.load_vector(stored(random(2, SPEC.head_dim, scale=0.1) + 1))
        pairs = [(rows, columns) for rows in WIDTHS for columns in WIDTHS]
        self.linears = {(m, n): backend.load_linear([self.matrix(m, n)], [stored(random(3, m))]) for m, n in pairs}
        self.gated = {(m, n): backend.load_gated(self.matrix(m, n), self.matrix(m, n, 9)) for m, n in pairs}
        backend.allocate(uniform_cache(1, SPEC.num_kv_heads, SPEC.head_dim, 32, "float32"), 8, LIMITS)

    @staticmethod
    def matrix(rows: int, columns: int, seed: int = 0) -> Any:
        return stored(random(rows + columns + seed, rows, columns, scale=columns**-0.5))

    def build(self, batch: Any, x: Any, graph: list[Op], wanted: int) -> Any:
        """The `wanted`-th result of the graph; all of its operations are carried out before."""
        ops, results = self.backend.ops, [(QKV, x)]
        attended = False

        def pick(index: int, width: int | None = None) -> tuple[int, Any]:
            fitting = [r for r in results if width in (None, r[0])]
            return fitting[-1 - index % len(fitting)]

        for op in graph:
            width, source = pick(op.source)
            if op.name == "norm":
                results.append((width, ops.rms_norm(source, self.norms[width], 1e-5)))
            elif op.name == "linear":
                results.append((op.width, ops.linear(batch, source, self.linears[op.width, width])))
            elif op.name == "residual":
                target, residual = pick(op.other)
                results.append((target, ops.linear(batch, source, self.linears[target, width], residual=residual)))
            elif op.name == "gated":
                results.append((op.width, ops.gated_linear(batch, source, self.gated[op.width, width])))
            elif op.name == "attend" and not attended:
                attended = True  # a layer's keys are stored once a step
                results.append((64, ops.attend(batch, 0, pick(op.source, QKV)[1], SPEC)))
            elif op.name == "head norm":
                _, qkv = pick(op.source, QKV)
                results.append((QKV, ops.head_norm(qkv, SPEC, self.head_norm, self.head_norm, 1e-5)))
            else:
                results.append((QKV, ops.rope(batch, pick(op.source, QKV)[1], SPEC, ROPE)))
        return results[wanted % len(results)][1]

    def run(self, graph: list[Op], wanted: int, counts: list[int]) -> list[Floats]:
        captured = self.backend.capture(
            lambda batch: self.build(batch, self.backend.ops.embed(batch, self.table), graph, wanted)
        )
        batches = [step([Row([(7 * i) % VOCAB for i in range(n)], 0, [2, 5])], 32) for n in counts]
        return [np.array(self.backend.to_host(captured(self.backend.plan(batch)))) for batch in batches]


@pytest.fixture(scope="module")
def cpu() -> Iterator[Weights]:
    with cpu_backend() as backend:
        yield Weights(backend)


@pytest.fixture(scope="module")
def reference() -> Iterator[Weights]:
    backend = create_backend("reference")
    yield Weights(backend)
    backend.close()


quick = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(graph=st.lists(ops, min_size=1, max_size=14), wanted=st.integers(0, 14))
def test_any_graph_of_operations_gives_what_the_reference_gives(
    cpu: Weights, reference: Weights, graph: list[Op], wanted: int
) -> None:
    """A result that another overwrote too early would be off by its whole size."""
    counts = [5, 1, 40]
    for actual, expected in zip(cpu.run(graph, wanted, counts), reference.run(graph, wanted, counts), strict=True):
        size = np.sqrt((expected.astype(np.float64) ** 2).mean())
        np.testing.assert_allclose(actual, expected, atol=2e-4 * size + 1e-6)


@quick
@given(graph=st.lists(ops, min_size=1, max_size=10), data=st.data())
def test_keeping_results_for_later_changes_no_bit(cpu: Weights, graph: list[Op], data: st.DataObject) -> None:
    """Reading results again at the end keeps their places from being given to others."""
    wanted = data.draw(st.integers(0, len(graph)))
    readers = [Op("residual", source, other, 0) for source, other in zip(range(6), (3, 1, 4, 0, 5, 2), strict=True)]
    count = len(graph) + 1  # results: the input and one of each operation
    plain = cpu.run(graph, wanted % count, [5])
    kept = cpu.run([*graph, *readers], wanted % count, [5])
    assert_same_bits(kept[0], plain[0])


def test_a_function_of_rows_grows_with_the_rows_it_is_given() -> None:
    with cpu_backend() as backend:
        weight = backend.load_linear([stored(random(4, 70, 96))])
        captured = backend.capture(lambda batch, x: backend.ops.linear(batch, x, weight, residual=None))
        values = random(5, 100, 96)
        inputs = Inputs(backend, values)
        expected = np.concatenate([inputs.through(captured, [row]) for row in range(100)])
        for count in (1, 3, 2, 100, 7, 100, 1):
            rows = [(3 * i) % 100 for i in range(count)]
            assert_same_bits(inputs.through(captured, rows), expected[rows])


def test_a_result_taken_before_growth_stays_readable() -> None:
    with cpu_backend() as backend:
        weight = backend.load_linear([stored(random(6, 70, 96))])
        table = backend.load_embedding(stored(random(7, 64, 96)))
        allocate(backend)
        embedded = backend.capture(lambda batch: backend.ops.embed(batch, table))
        captured = backend.capture(lambda batch, x: backend.ops.linear(batch, x, weight))
        planned = backend.plan(step([Row(range(64), 0, [0, 1])], 32))
        hidden = embedded(planned)
        few = captured(*backend.take_rows(planned, hidden, np.array([3], np.int32)))
        seen = np.array(backend.to_host(few))
        captured(*backend.take_rows(planned, hidden, np.arange(64, dtype=np.int32)))
        assert_same_bits(np.array(backend.to_host(few)), seen)


@given(st.lists(st.integers(0, 69), unique=True).map(sorted), st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_rows_nobody_asks_for_are_left_out_and_the_others_keep_their_bits(asked: list[int], samples: int) -> None:
    with cpu_backend() as backend:
        weight = backend.load_linear([stored(random(21, 96, 96))])
        table = backend.load_embedding(stored(random(22, 70, 96)))
        allocate(backend)

        def function(batch: Any) -> Any:
            x = backend.ops.embed(batch, table)
            doubled = backend.ops.linear(batch, x, weight, residual=x)
            # `x` is still read by the second, so only that may take its place
            first, second = backend.ops.asked_rows(batch, doubled), backend.ops.asked_rows(batch, x)
            return backend.ops.linear(batch, first, weight, residual=second)

        captured = backend.capture(function)
        take = backend.capture(lambda batch, x: backend.ops.linear(batch, x, weight))

        def taken(tokens: list[int]) -> Floats:
            batch = step([Row(range(70), 0, [0, 1, 2], samples=samples)], 32)
            rows = [PromptLogprobRows(0, token, np.zeros(1, np.int32)) for token in tokens]
            batch.prompt_logprobs = rows
            planned = backend.plan(batch)
            hidden = captured(planned)
            sampled = set(range(70 - samples, 70))
            outside = sorted(set(range(70)) - sampled - set(tokens))
            if outside:
                with pytest.raises(EngineError, match="asked"):
                    backend.take_rows(planned, hidden, np.array(outside[-1:], np.int32))
            wanted = np.array(asked or sorted(sampled), np.int32)
            if not len(wanted):
                return random(1, 1)
            return np.array(backend.to_host(take(*backend.take_rows(planned, hidden, wanted))))

        assert_same_bits(taken(asked), taken(list(range(70))))


@pytest.mark.parametrize("rows_of_weight", [17_000, 17_008])
def test_results_too_large_for_a_cache_keep_their_bits(rows_of_weight: int) -> None:
    """More than 8 MB are stored past the caches, where rows begin with a cache line."""
    with cpu_backend() as backend:
        weight = backend.load_linear([stored(random(23, rows_of_weight, 32))], [stored(random(24, rows_of_weight))])
        captured = backend.capture(lambda batch, x: backend.ops.linear(batch, x, weight))
        inputs = Inputs(backend, random(25, 128, 32))
        together = inputs.through(captured, list(range(128)))
        assert together.nbytes > 8 << 20
        for first in (0, 60, 124):
            assert_same_bits(inputs.through(captured, list(range(first, first + 4))), together[first : first + 4])


def test_asked_tokens_outside_the_step_are_refused() -> None:
    with cpu_backend() as backend:
        table = backend.load_embedding(stored(random(26, 70, 96)))
        allocate(backend)
        captured = backend.capture(lambda batch: backend.ops.asked_rows(batch, backend.ops.embed(batch, table)))
        batch = step([Row(range(4), 0, [0])], 32)
        batch.prompt_logprobs = [PromptLogprobRows(0, 3, np.zeros(2, np.int32))]  # the second is not in the step
        with pytest.raises(ValueError, match="asked tokens"):
            captured(backend.plan(batch))


def test_more_rows_than_a_step_may_have_are_refused() -> None:
    with cpu_backend() as backend:
        weight = backend.load_linear([stored(random(8, 70, 96))])
        captured = backend.capture(lambda batch, x: backend.ops.linear(batch, x, weight))
        inputs = Inputs(backend, random(9, 5, 96))
        with pytest.raises(ValueError, match="max_tokens"):
            inputs.through(captured, [0] * (LIMITS.max_tokens + 1))
        assert inputs.through(captured, [0] * LIMITS.max_tokens).shape == (128, 70)


def test_a_function_may_return_its_input_or_use_it_twice() -> None:
    with cpu_backend() as backend:
        square = backend.load_linear([stored(np.eye(64, dtype=np.float32))])
        same = backend.capture(lambda batch, x: x)
        double = backend.capture(lambda batch, x: backend.ops.linear(batch, x, square, residual=x))
        values = random(10, 9, 64)
        inputs = Inputs(backend, values)
        assert_same_bits(inputs.through(same, [4, 2, 4]), values[[4, 2, 4]])
        np.testing.assert_allclose(inputs.through(double, range(9)), 2 * values, rtol=1e-6)


WRONG = {
    "linear": lambda ops, w, x: ops.linear(None, x, w["linear"]),
    "gated weight": lambda ops, w, x: ops.linear(None, ops.linear(None, x, w["square"]), w["gated"]),
    "gated": lambda ops, w, x: ops.gated_linear(None, x, w["gated"]),
    "weight that is not gated": lambda ops, w, x: ops.gated_linear(None, x, w["square"]),
    "residual": lambda ops, w, x: ops.linear(None, x, w["square"], residual=ops.linear(None, x, w["narrow"])),
    "norm": lambda ops, w, x: ops.rms_norm(x, w["gain"], 1e-5),
    "head norm": lambda ops, w, x: ops.head_norm(x, SPEC, w["gain"], w["gain"], 1e-5),
    "head norm's weight": lambda ops, w, x: ops.head_norm(
        ops.linear(None, x, w["qkv"]), SPEC, w["gain"], w["gain"], 1e-5
    ),
    "rope": lambda ops, w, x: ops.rope(None, x, SPEC, ROPE),
    "rope's frequencies": lambda ops, w, x: ops.rope(None, ops.linear(None, x, w["qkv"]), SPEC, RopeSpec(np.ones(9))),
    "attend": lambda ops, w, x: ops.attend(None, 0, x, SPEC),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_operands_that_do_not_fit_are_refused_every_time(name: str) -> None:
    with cpu_backend() as backend:
        weights = {
            "linear": backend.load_linear([stored(random(11, 70, 64))]),
            "square": backend.load_linear([stored(random(12, 80, 80))]),
            "narrow": backend.load_linear([stored(random(13, 40, 80))]),
            "qkv": backend.load_linear([stored(random(14, QKV, 80))]),
            "gated": backend.load_gated(stored(random(15, 70, 64)), stored(random(16, 70, 64))),
            "gain": backend.load_vector(stored(random(17, 64))),
        }
        inputs = Inputs(backend, random(18, 5, 80))
        captured = backend.capture(lambda batch, x: WRONG[name](backend.ops, weights, x))
        for _ in range(2):
            with pytest.raises((ConfigError, ValueError)):
                inputs.through(captured, [0])


def test_operations_outside_of_a_captured_function_say_so() -> None:
    with cpu_backend() as backend:
        table = backend.load_embedding(stored(random(19, 8, 32)))
        with pytest.raises(ConfigError, match="captured function"):
            backend.ops.embed(None, table)
