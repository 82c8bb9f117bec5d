"""Every instruction set level that this processor has below its best, and what the levels have in common."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_ops import ALL_LEVELS, LEVELS, Floats, Inputs, assert_same_bits, cpu_backend, random, random_tensor, stored

from mooli.backends import create_backend
from mooli.errors import ConfigError
from mooli.tensor import TensorType

ROOT = Path(__file__).resolve().parents[2]
FUSED_LEVELS = [level for level in LEVELS if level != "scalar"]
"""Those with a fused multiply-add, whose float sums are alike."""
MODEL_LEVELS = ("avx2", "neon")
"""The lowest that people have. Models are made of the operations, which are tested at every level."""

LEFT_OUT = (
    "llama-tied or llama-3 or llama-linear or qwen2 or qwen3-tied or smollm3 or ernie or granite or hunyuan or mistral"
)
"""Models that differ from the others in nothing the kernels see. Families with experts, sinks and latents are
left out whole: their operations are tested, and what is beside them is that of the others."""


def needs(level: str) -> None:
    if level not in LEVELS:
        pytest.skip(f"this processor has no {level}")


@pytest.mark.parametrize("level", ALL_LEVELS[:-1])
def test_a_lower_level_passes_the_tests_of_operations_and_sampling(level: str) -> None:
    needs(level)
    if level == LEVELS[-1]:
        pytest.skip("the best level of this processor, on which all other tests run")
    names = ("ops", "sampling", "recurrent_ops", "experts", "latent", "sinks")
    tests = [f"tests/backends/test_{name}.py" for name in names]
    if level in MODEL_LEVELS:
        tests.append("tests/models/test_llama_family.py")
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", f"cpu and not ({LEFT_OUT})"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        env={**os.environ, "MOOLI_ISA": level},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("level", ALL_LEVELS)
def test_the_level_asked_for_is_the_one_described(level: str) -> None:
    needs(level)
    with cpu_backend(level) as backend:
        assert backend.describe()["isa"] == level


def test_without_a_wish_the_best_level_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOOLI_ISA", raising=False)
    backend = create_backend("cpu")
    assert backend.describe()["isa"] == LEVELS[-1]
    backend.close()


@pytest.mark.parametrize("wish", ["avx1024", "AVX2", " scalar", "scalar,avx2"])
def test_a_level_that_is_not_there_is_an_error_that_lists_those_that_are(
    monkeypatch: pytest.MonkeyPatch, wish: str
) -> None:
    monkeypatch.setenv("MOOLI_ISA", wish)
    with pytest.raises(ConfigError) as raised:
        create_backend("cpu")
    assert f"MOOLI_ISA={wish}" in str(raised.value)
    assert ", ".join(LEVELS) in str(raised.value)


@pytest.fixture(scope="module", params=FUSED_LEVELS[:-1])
def lower_level(request: pytest.FixtureRequest) -> Iterator[str]:
    return request.param


def linears(level: str, storage: TensorType, quantization: str | None) -> list[Floats]:
    """33 rows through a linear weight with bias, one with a residual, and a gated one."""
    with cpu_backend(level, quantization=quantization) as backend:
        weight = backend.load_linear([random_tensor(storage, 75, 256)], [stored(random(1, 75))])
        square = backend.load_linear([random_tensor(storage, 256, 256, seed=2)])
        gated = backend.load_gated(*(random_tensor(storage, 50, 256, seed=seed) for seed in (3, 4)))
        ops = backend.ops

        def residual(batch: Any, x: Any) -> Any:
            return ops.linear(batch, x, square, residual=x)

        functions = (
            lambda batch, x: ops.linear(batch, x, weight),
            residual,
            lambda batch, x: ops.gated_linear(batch, x, gated),
        )
        captured = [backend.capture(function) for function in functions]
        inputs = Inputs(backend, random(5, 33, 256, scale=3))
        return [inputs.through(function, range(33)) for function in captured]


@pytest.mark.parametrize(
    ("storage", "quantization"),
    [
        (TensorType.Q8_0, None),
        (TensorType.Q4_0, None),
        (TensorType.Q4_1, None),
        (TensorType.Q4_K, None),
        (TensorType.IQ4_XS, None),
        (TensorType.MXFP4, None),
        (TensorType.Q6_K, None),
        (TensorType.F32, "int8"),
        (TensorType.F32, "int4"),
        (TensorType.F32, None),
        (TensorType.F16, None),
    ],
    ids=str,
)
def test_linear_has_the_same_bits_at_every_fused_level(
    lower_level: str, storage: TensorType, quantization: str | None
) -> None:
    """Not promised for bfloat16, whose dot product rounds in its own way, nor below AVX2."""
    best = linears(FUSED_LEVELS[-1], storage, quantization)
    for actual, expected in zip(linears(lower_level, storage, quantization), best, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize(
    ("storage", "quantization"), [(TensorType.Q8_0, None), (TensorType.Q4_1, None), (TensorType.F32, "int4")], ids=str
)
def test_scalar_linear_agrees_but_for_the_rounding_of_float_sums(storage: TensorType, quantization: str | None) -> None:
    expected = linears(FUSED_LEVELS[-1] if FUSED_LEVELS else "scalar", storage, quantization)
    for actual, best in zip(linears("scalar", storage, quantization), expected, strict=True):
        np.testing.assert_allclose(actual, best, atol=2e-6 * np.abs(best).max())


@pytest.mark.parametrize("level", ALL_LEVELS)
@pytest.mark.parametrize(
    "storage",
    [
        *(TensorType.Q8_0, TensorType.Q4_0, TensorType.Q4_1, TensorType.IQ4_NL, TensorType.MXFP4),
        *(TensorType.BF16, TensorType.F16, TensorType.F32),
    ],
    ids=str,
)
def test_a_row_has_the_same_bits_in_any_number_of_rows(level: str, storage: TensorType) -> None:
    """Numbers around every size of a block of rows, and K in several chunks of which the last is not full."""
    needs(level)
    with cpu_backend(level, dtype="auto") as backend:
        plain = backend.load_linear([random_tensor(storage, 75, 608)])
        gated = backend.load_gated(*(random_tensor(storage, 288, 608, seed=seed) for seed in (3, 4)))
        down = backend.load_linear([random_tensor(storage, 40, 288, seed=5)])
        ops = backend.ops
        functions = (
            lambda batch, x: ops.linear(batch, x, plain),
            lambda batch, x: ops.linear(batch, ops.gated_linear(batch, x, gated), down),
        )
        inputs = Inputs(backend, random(6, 70, 608, scale=3))
        for captured in [backend.capture(function) for function in functions]:
            alone = np.concatenate([inputs.through(captured, [row]) for row in range(70)])
            for count in (2, 3, 5, 6, 7, 12, 13, 16, 17, 20, 32, 33, 40, 70):
                assert_same_bits(inputs.through(captured, range(count)), alone[:count], f"{count} rows")
