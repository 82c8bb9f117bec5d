"""The cpu backend at any instruction set level, stored tensors of every type, and steps on them, for its own tests.

Owns nothing that other backends' tests need; those are in `steps` and `variants`.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mooli.backends.base import AttentionSpec, Limits
from mooli.tensor import BLOCK, RawTensor, TensorType, row_bytes
from steps import LIMITS, Row, step, uniform_cache

if TYPE_CHECKING:
    from mooli.backends.cpu import CpuBackend

try:
    native: Any = importlib.import_module("mooli._native")
except ImportError as exc:
    pytest.skip(f"the native module does not import: {exc}", allow_module_level=True)

Floats = NDArray[np.float32]

ALL_LEVELS = ("scalar", "neon", "avx2", "avx2_vnni", "avx512", "avx512_bf16", "amx")
LEVELS: list[str] = native.available_isas()
"""Those of this processor, worst first."""

HALF_OFFSETS: dict[TensorType, Sequence[int]] = {
    TensorType.F16: [0],
    TensorType.Q4_0: [0],
    TensorType.Q4_1: [0, 2],
    TensorType.Q5_0: [0],
    TensorType.Q5_1: [0, 2],
    TensorType.Q8_0: [0],
    TensorType.Q4_K: [0, 2],
    TensorType.Q5_K: [0, 2],
    TensorType.Q6_K: [208],
    TensorType.Q2_K: [80, 82],
    TensorType.Q3_K: [108],
    TensorType.IQ4_NL: [0],
    TensorType.IQ4_XS: [0],
    TensorType.MXFP4: [],
}
"""Where a block keeps its float16 numbers."""


@contextmanager
def cpu_backend(
    level: str = "", *, dtype: str = "float32", quantization: str | None = None, num_threads: int | None = None
) -> Iterator[CpuBackend]:
    """A backend at an instruction set level; "" for the best."""
    from mooli.backends.cpu import CpuBackend

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOOLI_ISA", level)
        backend = CpuBackend(dtype, quantization, num_threads)
    try:
        yield backend
    finally:
        backend.close()


def random(seed: int, *shape: int, scale: float = 1.0) -> Floats:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def to_bfloat16(values: Floats) -> NDArray[np.uint16]:
    """Nearest, ties to even; for finite values."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def stored(values: Floats, kind: TensorType = TensorType.F32) -> RawTensor:
    """Values as a tensor of a floating type."""
    if kind == TensorType.BF16:
        words: NDArray[Any] = to_bfloat16(values)
    else:
        words = np.ascontiguousarray(values, np.float16 if kind == TensorType.F16 else np.float32)
    return RawTensor("t", kind, values.shape, words.reshape(-1, values.shape[-1]).view(np.uint8))


def random_tensor(kind: TensorType, rows: int, columns: int, seed: int = 0) -> RawTensor:
    """Random codes under random scales about as large as a model's."""
    if kind in (TensorType.F32, TensorType.F16, TensorType.BF16):
        return stored(random(seed, rows, columns), kind)
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * columns // BLOCK[kind][0], BLOCK[kind][1]), dtype=np.uint8)
    for offset in HALF_OFFSETS[kind]:
        scales = (rng.standard_normal(len(blocks)) * 0.01).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    if kind == TensorType.MXFP4:
        blocks[:, 0] = rng.integers(112, 126, len(blocks))  # an exponent, and 127 more
    return RawTensor("t", kind, (rows, columns), blocks.reshape(rows, row_bytes(kind, columns)))


def allocate(
    backend: CpuBackend,
    spec: AttentionSpec | None = None,
    *,
    kv_dtype: str = "float32",
    page_size: int = 32,
    num_pages: int = 64,
    limits: Limits = LIMITS,
) -> None:
    heads, head_dim = (spec.num_kv_heads, spec.head_dim) if spec else (1, 32)
    backend.allocate(uniform_cache(1, heads, head_dim, page_size, kv_dtype), num_pages, limits)


class Inputs:
    """Rows of float32 numbers on a backend, to be given to captured functions any number at a time."""

    def __init__(self, backend: CpuBackend, values: Floats) -> None:
        self._backend = backend
        table = backend.load_embedding(stored(values))
        allocate(backend)
        embedded = backend.capture(lambda batch: backend.ops.embed(batch, table))
        pages = list(range(-(-len(values) // 32)))
        self._planned = backend.plan(step([Row(range(len(values)), 0, pages)], 32))
        self._hidden = embedded(self._planned)

    def through(self, captured: Callable[..., Any], rows: Sequence[int]) -> Floats:
        result = captured(*self._backend.take_rows(self._planned, self._hidden, np.array(rows, np.int32)))
        return np.array(self._backend.to_host(result))


def assert_same_bits(actual: Floats, expected: Floats, message: str = "") -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes(), message


def thread_ids() -> set[str]:
    """Of this process, where the system has a list of them."""
    return set(os.listdir("/proc/self/task"))


def until(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true before long: a thread that has ended may be seen for a moment."""
    for _ in range(2000):
        if condition():
            return True
        time.sleep(0.005)
    return False
