"""Routers and experts against their definitions in float64, on every backend; and rows alone against rows together.

The definitions are written from the formulas, row by row, and share no code with any backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from mooli.backends import create_backend
from mooli.backends.ascend.paths import Switches
from mooli.backends.base import Activation, Backend
from mooli.backends.routing import RouteSpec
from mooli.errors import ConfigError
from mooli.tensor import RawTensor, TensorType
from steps import LIMITS, Row, step, uniform_cache
from variants import WORST, Variant, require

Floats = NDArray[np.float64]

HIDDEN, INNER, NUM_EXPERTS, NUM_ROWS, NUM_PAGES = 96, 64, 12, 37, 8

SPECS = {
    "softmax": RouteSpec(num_experts=NUM_EXPERTS, top_k=3),
    "normalised": RouteSpec(num_experts=NUM_EXPERTS, top_k=4, normalise=True),
    "one": RouteSpec(num_experts=NUM_EXPERTS, top_k=1),
    "all": RouteSpec(num_experts=NUM_EXPERTS, top_k=NUM_EXPERTS, normalise=True),
    "of the chosen": RouteSpec(num_experts=NUM_EXPERTS, top_k=3, score="chosen_softmax"),
    "sigmoid": RouteSpec(num_experts=NUM_EXPERTS, top_k=3, score="sigmoid", normalise=True, eps=1e-20, factor=2.5),
    "minimum": RouteSpec(num_experts=NUM_EXPERTS, top_k=2, normalise=True, minimum=0.9),
    "groups by their best": RouteSpec(num_experts=NUM_EXPERTS, top_k=3, groups=4, kept_groups=2, factor=16.0),
    "groups by two": RouteSpec(
        num_experts=NUM_EXPERTS, top_k=4, score="sigmoid", groups=3, kept_groups=2, group_top=2, normalise=True
    ),
}


def raw(values: NDArray[Any], kind: TensorType = TensorType.F32) -> RawTensor:
    data = np.ascontiguousarray(values, dtype=np.float32)
    stored = data.reshape(-1, data.shape[-1]).view(np.uint8)
    if kind != TensorType.F32:
        stored = gguf.quants.quantize(data, gguf.GGMLQuantizationType(int(kind)))
    return RawTensor("t", kind, data.shape, stored)


def random(seed: int, *shape: int, scale: float = 1.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def silu(x: Floats) -> Floats:
    return x / (1 + np.exp(-x))


GATES: dict[Activation, Callable[[Floats, Floats], Floats]] = {
    "silu": lambda gate, up: silu(gate) * up,
    "gelu_tanh": lambda g, up: g / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * up,
    "clamped_swiglu": lambda gate, up: (
        np.minimum(gate, 7) / (1 + np.exp(-1.702 * np.minimum(gate, 7))) * (np.clip(up, -7, 7) + 1)
    ),
}


@dataclass
class Mixture:
    """What experts are made of: each has gate, up and down, and may have biases. float32."""

    router: NDArray[np.float32]
    router_bias: NDArray[np.float32] | None
    correction: NDArray[np.float32] | None
    weights: list[list[NDArray[np.float32]]]
    biases: list[list[NDArray[np.float32]]]
    activation: Activation = "silu"

    @classmethod
    def random(cls, *, biases: bool = False, correction: bool = False, activation: Activation = "silu") -> Mixture:
        shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
        size = 4.0 if activation == "clamped_swiglu" else 1.0  # so that bounds are met
        return cls(
            random(1, NUM_EXPERTS, HIDDEN, scale=HIDDEN**-0.5),
            random(2, NUM_EXPERTS) if biases else None,
            random(3, NUM_EXPERTS, scale=0.1) if correction else None,
            [
                [random(10 * e + i, *shape, scale=size * shape[1] ** -0.5) for i, shape in enumerate(shapes)]
                for e in range(NUM_EXPERTS)
            ],
            [[random(500 + 10 * e + i, shape[0]) for i, shape in enumerate(shapes)] for e in range(NUM_EXPERTS)]
            if biases
            else [],
            activation,
        )

    def loaded(self, backend: Backend, kind: TensorType = TensorType.F32) -> tuple[Any, Any]:
        """Router and experts."""
        bias, correction = (None if x is None else raw(x) for x in (self.router_bias, self.correction))
        router = backend.load_router(raw(self.router), bias, correction)
        gated, down = [], []
        for expert, (gate, up, out) in enumerate(self.weights):
            biases = [raw(x) for x in self.biases[expert]] if self.biases else []
            gated.append(backend.load_gated(raw(gate, kind), raw(up, kind), biases[:2], activation=self.activation))
            down.append(backend.load_linear([raw(out, kind)], biases[2:]))
        return router, backend.load_experts(gated, down)

    def chosen(self, x: Floats, spec: RouteSpec) -> tuple[list[int], Floats]:
        """Of one row: experts, best first, and weights. The choice must not hang on a rounding."""
        logits = self.router.astype(np.float64) @ x + (0 if self.router_bias is None else self.router_bias)
        scores = logits
        if spec.score == "softmax":
            scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        elif spec.score == "sigmoid":
            scores = 1 / (1 + np.exp(-logits))
        order = scores + (0 if self.correction is None else self.correction)
        allowed = list(range(spec.num_experts))
        if spec.groups > 1:
            size = spec.num_experts // spec.groups
            groups = [allowed[g * size : (g + 1) * size] for g in range(spec.groups)]
            best = [sum(sorted((order[e] for e in group), reverse=True)[: spec.group_top]) for group in groups]
            kept = sorted(range(spec.groups), key=lambda g: (-best[g], g))[: spec.kept_groups]
            allowed = [e for g in sorted(kept) for e in groups[g]]
        ids = sorted(allowed, key=lambda e: (-order[e], e))[: spec.top_k]
        weights = scores[ids]
        if spec.score == "chosen_softmax":
            weights = np.exp(weights - weights.max()) / np.exp(weights - weights.max()).sum()
        if spec.normalise:
            weights = weights / max(weights.sum() + spec.eps, spec.minimum)
        return ids, weights * spec.factor

    def mixed(self, x: Floats, spec: RouteSpec) -> Floats:
        out = np.zeros_like(x)
        for row, (values, total) in enumerate(zip(x, out, strict=True)):
            for expert, weight in zip(*self.chosen(values, spec), strict=True):
                gate, up, down = (each.astype(np.float64) for each in self.weights[expert])
                of_gate, of_up, of_down = self.biases[expert] if self.biases else (0.0, 0.0, 0.0)
                inner = GATES[self.activation](gate @ values + of_gate, up @ values + of_up)
                total += weight * (down @ inner + of_down)
            out[row] = total
        return out


Build = Callable[[Any, Any], Any]


class Bench:
    """Rows of a table through captured operations."""

    def __init__(self, backend: Backend, kv_dtype: str, inputs: NDArray[np.float32]) -> None:
        self.backend, self.page_size = backend, backend.default_page_size
        self._table = backend.load_embedding(raw(inputs))
        backend.allocate(uniform_cache(1, 1, 32, self.page_size, kv_dtype), NUM_PAGES, LIMITS)

    def run(self, build: Build, ids: list[int]) -> NDArray[np.float32]:
        def function(batch: Any) -> Any:
            return build(batch, self.backend.ops.embed(batch, self._table))

        pages = list(range(-(-len(ids) // self.page_size)))
        planned = self.backend.plan(step([Row(ids, 0, pages)], self.page_size))
        result: NDArray[np.float32] = np.array(self.backend.to_host(self.backend.capture(function)(planned)))
        return result.astype(np.float32)


def assert_close(actual: NDArray[Any], expected: NDArray[Any], bound: float) -> None:
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    error = np.abs(actual - expected) / (np.sqrt(np.mean(expected**2, axis=-1, keepdims=True)) + 1e-30)
    assert np.sqrt(np.mean(error**2, axis=-1)).max() <= bound
    assert error.max() <= WORST * bound


def bound_of(variant: Variant) -> float:
    """Of two products, one behind the other, the second of the first's errors, and of a sum in the backend's type."""
    return 3 * variant.linear + 2 * variant.embed


ALL = list(range(NUM_ROWS))


@pytest.mark.parametrize("name", SPECS)
def test_rows_are_computed_by_the_experts_that_the_router_chooses(
    backend: Backend, variant: Variant, name: str
) -> None:
    spec, mixture = SPECS[name], Mixture.random(correction="group" in name or name == "sigmoid")
    router, experts = mixture.loaded(backend)
    bench, ops = Bench(backend, variant.kv_dtype, random(0, NUM_ROWS, HIDDEN)), backend.ops
    x = bench.run(lambda _, x: x, ALL).astype(np.float64)
    actual = bench.run(lambda b, x: ops.experts(b, x, ops.route(b, x, router, spec), experts), ALL)
    assert_close(actual, mixture.mixed(x, spec), bound_of(variant))


@pytest.mark.parametrize("activation", GATES)
def test_biases_activations_and_a_residual(backend: Backend, variant: Variant, activation: Activation) -> None:
    mixture, spec = Mixture.random(biases=True, activation=activation), SPECS["normalised"]
    router, experts = mixture.loaded(backend)
    bench, ops = Bench(backend, variant.kv_dtype, random(0, NUM_ROWS, HIDDEN)), backend.ops
    x = bench.run(lambda _, x: x, ALL).astype(np.float64)
    actual = bench.run(lambda b, x: ops.experts(b, x, ops.route(b, x, router, spec), experts, residual=x), ALL)
    assert_close(actual, mixture.mixed(x, spec) + x, bound_of(variant))


def test_of_equal_experts_the_lower_one_is_chosen(backend: Backend, variant: Variant) -> None:
    mixture = Mixture.random()
    mixture.router[[3, 7, 9]] = mixture.router[1]
    router, experts = mixture.loaded(backend)
    bench, ops = Bench(backend, variant.kv_dtype, random(0, NUM_ROWS, HIDDEN)), backend.ops
    x = bench.run(lambda _, x: x, ALL).astype(np.float64)
    for top_k in (1, 2, 3):
        spec = RouteSpec(num_experts=NUM_EXPERTS, top_k=top_k)
        chosen = {tuple(mixture.chosen(row, spec)[0]) for row in x}
        assert any(1 in ids and 9 not in ids for ids in chosen), "the tie must decide"
        actual = bench.run(lambda b, x, s=spec: ops.experts(b, x, ops.route(b, x, router, s), experts), ALL)
        assert_close(actual, mixture.mixed(x, spec), bound_of(variant))


def test_a_row_with_nan_is_nan_and_no_other(backend: Backend, variant: Variant) -> None:
    inputs = random(0, NUM_ROWS, HIDDEN)
    inputs[5, 17] = np.nan
    router, experts = Mixture.random(correction=True).loaded(backend)
    bench, ops = Bench(backend, variant.kv_dtype, inputs), backend.ops
    for spec in SPECS.values():
        actual = bench.run(lambda b, x, s=spec: ops.experts(b, x, ops.route(b, x, router, s), experts), ALL)
        assert np.isnan(actual[5]).all()
        assert np.isfinite(np.delete(actual, 5, axis=0)).all()


def test_one_gate_may_be_of_a_whole_row(backend: Backend, variant: Variant) -> None:
    gate = random(9, 1, HIDDEN, scale=HIDDEN**-0.5)
    loaded = backend.load_linear([raw(gate)])
    bench, ops = Bench(backend, variant.kv_dtype, random(0, NUM_ROWS, HIDDEN)), backend.ops
    x = bench.run(lambda _, x: x, ALL).astype(np.float64)
    actual = bench.run(lambda b, x: ops.sigmoid_mul(x, ops.linear(b, x, loaded)), ALL)
    assert_close(actual, x / (1 + np.exp(-(x @ gate.T.astype(np.float64)))), 2 * variant.linear + variant.embed)


EXACT_KINDS = {
    **{name: (name, None, TensorType.F32) for name in ("float32", "bfloat16", "float16")},
    **{name: ("bfloat16", name, TensorType.F32) for name in ("int8", "int4")},
    **{kind.name: ("bfloat16", None, kind) for kind in (TensorType.Q4_0, TensorType.Q4_1, TensorType.Q8_0)},
}


@pytest.mark.parametrize("kind", EXACT_KINDS)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_on_the_cpu_a_row_has_the_same_bits_beside_any_others(kind: str, num_threads: int) -> None:
    require("cpu")
    dtype, quantization, stored = EXACT_KINDS[kind]
    backend = create_backend("cpu", dtype=dtype, quantization=quantization, num_threads=num_threads)
    mixture = Mixture.random(biases=True)
    router, experts = mixture.loaded(backend, stored)
    spec, ops = SPECS["normalised"], backend.ops
    bench = Bench(backend, "float32", random(0, NUM_ROWS, HIDDEN))

    def build(b: Any, x: Any) -> Any:
        return ops.experts(b, x, ops.route(b, x, router, spec), experts, residual=x)

    whole = bench.run(build, ALL)
    draw = np.random.default_rng(7)
    for ids in ([0], [36], [5, 6], [5] * 40, *(draw.integers(0, NUM_ROWS, count).tolist() for count in (3, 17, 90))):
        np.testing.assert_array_equal(bench.run(build, ids), whole[ids])
    backend.close()


def test_numbers_that_do_not_fit_are_refused() -> None:
    for numbers, words in (
        ({"top_k": 13}, "13 of 12 experts"),
        ({"top_k": 0}, "0 of 12 experts"),
        ({"groups": 5}, "not 5 equal groups"),
        ({"groups": 4, "kept_groups": 5}, "of which 5 are kept"),
        ({"groups": 4, "top_k": 4}, "4 experts"),
        ({"groups": 12, "group_top": 2}, "the best 2"),
    ):
        given: Any = {"num_experts": NUM_EXPERTS, "top_k": 1, **numbers}
        with pytest.raises(ConfigError, match=words):
            RouteSpec(**given)


@pytest.mark.parametrize("biases", [False, True])
def test_on_the_npu_all_experts_are_one_grouped_product(monkeypatch: pytest.MonkeyPatch, biases: bool) -> None:
    require("ascend")
    sim = pytest.importorskip("mooli_simulate_ascend")
    monkeypatch.setenv("MOOLI_SIMULATE_ASCEND", "8.2")
    monkeypatch.setenv("MOOLI_SELFTEST", "0")
    spec, inputs, results = SPECS["normalised"], random(0, NUM_ROWS, HIDDEN), []
    for is_on in (True, False):
        backend: Any = create_backend("ascend", dtype="bfloat16")
        if not is_on:
            monkeypatch.setattr(backend, "_switches", Switches({"npu_grouped_matmul": "for the test"}))
        router, experts = Mixture.random(biases=biases).loaded(backend)
        bench, ops = Bench(backend, "bfloat16", inputs), backend.ops
        sim.operations.reset()
        results.append(bench.run(lambda b, x: ops.experts(b, x, ops.route(b, x, router, spec), experts), ALL))  # noqa: B023
        assert sim.operations.by_name["npu_grouped_matmul.default"] == (2 if is_on else 0)
        # A product for each expert needs to know on the host how many rows it has.
        assert sim.operations.device_to_host == (1 if is_on else 2)
        backend.close()
    assert_close(results[0], results[1].astype(np.float64), 0.01)
