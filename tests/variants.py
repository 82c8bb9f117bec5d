"""Which backends the tests run on, and how near to the definition each must come."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Variant:
    """A backend with its arithmetic, and the bounds it is held to.

    A bound is on the root mean square error of each row relative to the row's own; no single value may be off by more
    than `WORST` times the bound. `embed` is for the rounding of activations to the backend's own type, zero where they
    are float32. `linear` and `head` hold for floating weights, against the values in the file; `lossless` for storage
    types whose blocks of 32 an integer kernel can hold as they are, `blocks` for the other quantised ones, both against
    the exact dequantised values. `model` bounds the logits of a tiny whole model. `exact_rows`: a row's bits do not
    depend on the rows beside it. `kv_cache_dtype` is that of the computation where it is None.
    """

    backend: str
    dtype: str
    quantization: str | None
    embed: float
    norm: float
    attend: float
    linear: float
    head: float
    lossless: float
    blocks: float
    model: float
    exact_rows: bool
    kv_cache_dtype: str | None = None

    @property
    def kv_dtype(self) -> str:
        return self.kv_cache_dtype or self.dtype

    @property
    def alone(self) -> float:
        """Bound between a row alone and beside others, where bits may differ.

        Of float16 either is rounded by itself: on processors with AMX, torch multiplies one row and many differently.
        """
        return max(1e-5, 2 * self.embed if self.dtype == "float16" else self.embed)

    def __str__(self) -> str:
        kv = self.kv_cache_dtype and f"kv-{self.kv_cache_dtype}"
        return "-".join(part for part in (self.backend, self.dtype, self.quantization, kv) if part)


WORST = 6.0

# Where the bounds come from. float32: rounding of sums of a few hundred terms. bfloat16 keeps 8 bits: each factor is
# off by up to 2^-9 of itself, products by about 0.3 % in the mean square; float16 has three bits more. int8 in groups
# of 32: a step is about 2.1 sigma / 127, 0.5 to 0.6 % for the activations alone (lossless weights), 0.8 to 1 % with the
# weights. int4: 2.1 sigma / 8 for the weights, 9 to 11 % of the product. Three random layers multiply that: rounding
# the weights alone to 4 bits in float32 arithmetic moves the logits of these tiny models by up to 0.41. The torch
# backend keeps activations in its type, so that every result is rounded once more; it dequantises blocks to that type.
# The ascend backend also rounds gains, cosines and sines to its type; its int8 (W8A8) has one step for a whole row of
# weights or activations. It runs on the simulated device. Keys and values of eight bits move a row by about 1 %.
# fmt: off
VARIANTS = [
    #                                      embed  norm   attend  linear  head   lossless blocks  model  exact rows
    Variant("reference", "float32", None,  0.0,   1e-6,  3e-6,   3e-6,   3e-6,   3e-6,   3e-6,   1e-5,  False),
    Variant("cpu", "float32", None,        0.0,   2e-6,  3e-6,   3e-6,   3e-6,   0.008,  0.012,  2e-5,  True),
    Variant("cpu", "bfloat16", None,       0.0,   2e-6,  0.006,  0.004,  0.004,  0.008,  0.012,  0.02,  True),
    Variant("cpu", "float16", None,        0.0,   2e-6,  0.001,  0.0006, 0.0006, 0.008,  0.012,  0.003, True),
    Variant("cpu", "bfloat16", "int8",     0.0,   2e-6,  0.006,  0.012,  0.012,  0.012,  0.012,  0.05,  True),
    Variant("cpu", "bfloat16", "int4",     0.0,   2e-6,  0.006,  0.13,   0.012,  0.13,   0.13,   0.5,   True),
    Variant("cpu", "float32", None,        0.0,   2e-6,  0.02,   3e-6,   3e-6,   0.008,  0.012,  0.05,   True, "int8"),
    Variant("torch", "float32", None,      0.0,   1e-6,  3e-6,   3e-6,   3e-6,   3e-6,   3e-6,   1e-5,  False),
    Variant("torch", "bfloat16", None,     0.002, 0.003, 0.006,  0.004,  0.004,  0.004,  0.004,  0.03,  False),
    Variant("torch", "float16", None,      3e-4,  4e-4,  0.001,  0.0006, 0.0006, 0.0006, 0.0006, 0.004, False),
    Variant("torch", "float32", "int8",    0.0,   1e-6,  3e-6,   0.012,  0.012,  0.012,  0.012,  0.05,  False),
    Variant("ascend", "bfloat16", None,    0.002, 0.005, 0.006,  0.004,  0.004,  0.004,  0.004,  0.03,  False),
    Variant("ascend", "float16", None,     3e-4,  7e-4,  0.001,  0.0006, 0.0006, 0.0006, 0.0006, 0.004, False),
    Variant("ascend", "bfloat16", "int8",  0.002, 0.005, 0.006,  0.016,  0.004,  0.016,  0.016,  0.06,  False),
]
# fmt: on


@contextmanager
def simulated_npu(profile: str = "8.2") -> Iterator[pytest.MonkeyPatch]:
    """The ascend backend is there, and does not test itself: that has tests of its own."""
    require("ascend")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOOLI_SIMULATE_ASCEND", profile)
        patch.setenv("MOOLI_SELFTEST", "0")
        yield patch


def require(backend_name: str) -> None:
    """Skip while the native backend is not built, or torch is not installed."""
    if backend_name in ("torch", "ascend"):
        pytest.importorskip("torch")
    if backend_name == "cpu":
        try:
            importlib.import_module("mooli.backends.cpu").CpuBackend  # noqa: B018 - the name must exist
        except (ImportError, AttributeError) as exc:
            pytest.skip(f"the cpu backend does not import: {exc}")
