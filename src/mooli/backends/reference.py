"""The reference backend: NumPy in float32, for the operations of `mooli.backends.reference_ops`.

Owns weights and pools. Never fast on purpose: whole weights are dequantised to float32, and a page is a slice of an
array. Never computes itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mooli.backends import reference_sampling
from mooli.backends.base import (
    Activation,
    CacheSpec,
    Limits,
    MemoryInfo,
    PagedLayer,
    SampleResult,
)
from mooli.backends.dequant import dequantize
from mooli.backends.host_memory import host_memory
from mooli.backends.latent import LatentLayer, LatentSpec
from mooli.backends.page_bytes import (
    Bytes,
    check_slot,
    held_tokens,
    page_numbers,
    pages_of,
    read_into,
    state_of,
)
from mooli.backends.reference_latent import LatentWeight
from mooli.backends.reference_ops import (
    ConvWeight,
    DeltaWeight,
    ExpertsWeight,
    Floats,
    ForwardBatch,
    GatedWeight,
    LinearWeight,
    ReferenceOps,
    RouterWeight,
    RowPlan,
    ScanWeight,
)
from mooli.batch import PageCopy, SamplingBatch, ScheduleBatch, StateCopy
from mooli.errors import ConfigError, OutOfMemoryError
from mooli.tensor import RawTensor


class ReferenceBackend:
    """`Backend` on NumPy arrays. Any page size; KV is float32 rounded to the KV type asked for.

    KV is NaN until it is stored, so that a read of anything stale shows in the logits.
    """

    name = "reference"
    default_page_size = 16
    default_chunked_prefill_size = 512
    default_max_running_requests = 48
    match_granularity_tokens = 1
    mixed_step_parts = 4
    is_exact = False

    def __init__(self, dtype: str = "auto", quantization: str | None = None, num_threads: int | None = None) -> None:
        """Raises ConfigError for anything but float32: the reference has no other arithmetic and owns no threads."""
        if dtype not in ("auto", "float32"):
            raise ConfigError(
                f"the reference backend computes in float32, not {dtype}; use dtype='float32' or backend 'cpu'"
            )
        if quantization is not None:
            raise ConfigError(
                f"the reference backend computes in float32 and cannot quantise to {quantization}; use backend 'cpu'"
            )
        if num_threads is not None:
            raise ConfigError(
                f"the reference backend cannot be told to use {num_threads} threads: NumPy's own library decides; "
                "set OMP_NUM_THREADS before the start, or use backend 'cpu'"
            )
        self.ops = ReferenceOps()
        self._page_size = self._num_pages = self._page_bytes = 0
        self._weight_bytes = 0

    def check_page_size(self, page_size: int) -> None:
        if page_size < 1:
            raise ConfigError(f"page_size must be at least 1, not {page_size}")

    def describe(self) -> dict[str, Any]:
        return {"backend": self.name, "device": "cpu", "dtype": "float32", "library": f"numpy {np.__version__}"}

    def bind_thread(self) -> None:
        """NumPy runs on whatever thread calls it."""

    def memory(self) -> MemoryInfo:
        return host_memory()

    def load_linear(
        self, tensors: Sequence[RawTensor], biases: Sequence[RawTensor] = (), *, head: bool = False
    ) -> LinearWeight:
        # `head` asks other backends for a finer format; here everything has the finest.
        del head
        values = self._count(np.concatenate([_matrix(tensor) for tensor in tensors]))
        bias = self._count(np.concatenate([_vector(tensor) for tensor in biases])) if biases else None
        return LinearWeight(values, bias)

    def load_gated(
        self, gate: RawTensor, up: RawTensor, biases: Sequence[RawTensor] = (), *, activation: Activation = "silu"
    ) -> GatedWeight:
        return GatedWeight(self.load_linear([gate], biases[:1]), self.load_linear([up], biases[1:]), activation)

    def load_embedding(self, table: RawTensor) -> Floats:
        return self._count(_matrix(table))

    def load_tied(self, table: RawTensor) -> tuple[Floats, LinearWeight]:
        return self.load_embedding(table), self.load_linear([table], head=True)

    def load_vector(self, vector: RawTensor) -> Floats:
        return self._count(_vector(vector))

    def load_conv(self, weight: RawTensor, bias: RawTensor | None = None) -> ConvWeight:
        values = self._count(_matrix(weight))
        return ConvWeight(values, np.zeros(len(values), np.float32) if bias is None else self._count(_vector(bias)))

    def load_scan(self, decay: RawTensor, dt_bias: RawTensor, skip: RawTensor) -> ScanWeight:
        return ScanWeight(*(self._count(_vector(vector)) for vector in (decay, dt_bias, skip)))

    def load_delta(self, decay: RawTensor, dt_bias: RawTensor) -> DeltaWeight:
        return DeltaWeight(self._count(_vector(decay)), self._count(_vector(dt_bias)))

    def load_latent(self, keys: RawTensor, values: RawTensor, spec: LatentSpec) -> LatentWeight:
        return LatentWeight(
            self._count(_matrix(keys)).reshape(spec.num_heads, spec.rank, spec.nope_dim),
            self._count(_matrix(values)).reshape(spec.num_heads, spec.value_dim, spec.rank),
        )

    def load_router(
        self, weight: RawTensor, bias: RawTensor | None = None, correction: RawTensor | None = None
    ) -> RouterWeight:
        linear = self.load_linear([weight], [] if bias is None else [bias])
        return RouterWeight(linear, None if correction is None else self._count(_vector(correction)))

    def load_experts(self, gated: Sequence[GatedWeight], down: Sequence[LinearWeight]) -> ExpertsWeight:
        return ExpertsWeight(tuple(gated), tuple(down))

    def unread_loads(self, at_most: int) -> int:
        return 0

    def weight_bytes(self) -> int:
        return self._weight_bytes

    def kv_bytes_per_page(self, spec: CacheSpec) -> int:
        return 4 * spec.page_size * sum(math.prod(kept_shape(layer)) for layer in spec.paged_layers())

    def allocate(self, spec: CacheSpec, num_pages: int, limits: Limits) -> None:
        """Raises OutOfMemoryError if the pool does not fit. Of `limits` only the number of states bounds anything here:
        arrays are made as needed."""
        self.check_page_size(spec.page_size)
        if spec.dtype not in ("float32", "float16", "bfloat16", "int8"):
            raise ConfigError(f"unknown KV type {spec.dtype!r}; choose float32, float16, bfloat16 or int8")
        num_slots = num_pages * spec.page_size
        shapes = [(parts, num_slots, *rest) for parts, *rest in map(kept_shape, spec.paged_layers())]
        try:
            self.ops.kv = [np.full(shape, np.nan, dtype=np.float32) for shape in shapes]
            self.ops.states = [
                [np.full((limits.num_states, *shape), np.nan, dtype=np.float32) for shape in layer.shapes]
                for layer in spec.state_layers
            ]
        except MemoryError as exc:
            needed = num_pages * self.kv_bytes_per_page(spec) + limits.num_states * spec.state_bytes
            raise OutOfMemoryError(
                f"a KV pool of {num_pages} pages needs {needed} bytes; lower max_total_tokens or mem_fraction_static"
            ) from exc
        self.ops.layers, self.ops.numbers, self.ops.kv_dtype = spec.layers, spec.numbers, spec.dtype
        self._page_size, self._num_pages = spec.page_size, num_pages
        self._page_bytes = self.kv_bytes_per_page(spec)

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        for copy in copies:
            source, target = copy.source * self._page_size, copy.target * self._page_size
            for kv in self.ops.kv:
                kv[:, target : target + copy.num_tokens] = kv[:, source : source + copy.num_tokens].copy()
                kv[:, target + copy.num_tokens : target + self._page_size] = 0

    def copy_states(self, copies: Sequence[StateCopy]) -> None:
        for copy in copies:
            for arrays in self.ops.states:
                for array in arrays:
                    array[copy.target] = array[copy.source]

    def read_pages(
        self, pages: Sequence[int] | NDArray[np.int32], num_tokens: int | None = None, out: Any = None
    ) -> Bytes:
        numbers = page_numbers(pages, self._num_pages)
        held = held_tokens(num_tokens, len(numbers), self._page_size)
        result = read_into(out, len(numbers), self._page_bytes)
        for index, page in enumerate(numbers.tolist()):
            for kept, part in self._parts(page, result[index]):
                part[:] = kept
                part[:, max(0, held - index * self._page_size) :] = 0
        return result

    def write_pages(self, pages: Sequence[int] | NDArray[np.int32], data: Any) -> None:
        numbers = page_numbers(pages, self._num_pages)
        given = pages_of(data, len(numbers), self._page_bytes)
        for index, page in enumerate(numbers.tolist()):
            for kept, part in self._parts(page, given[index]):
                kept[:] = part

    def read_state(self, slot: int) -> Bytes:
        arrays = self._of_states(slot)
        return np.concatenate([array[slot].ravel() for array in arrays]).view(np.uint8)

    def write_state(self, slot: int, data: Any) -> None:
        arrays = self._of_states(slot)
        values = state_of(data, 4 * sum(array[slot].size for array in arrays)).view(np.float32)
        for array in arrays:
            array[slot] = values[: array[slot].size].reshape(array[slot].shape)
            values = values[array[slot].size :]

    def _of_states(self, slot: int) -> list[Floats]:
        arrays = [array for layer in self.ops.states for array in layer]
        check_slot(slot, len(arrays[0]) if arrays else 0)
        return arrays

    def page_format(self) -> dict[str, str]:
        return {"layout": "[layer][K, V][token][kv head][value] float32", "library": f"numpy {np.__version__}"}

    def _parts(self, page: int, whole: Bytes) -> Iterator[tuple[Floats, Floats]]:
        """What each layer keeps in a page, and its part of the page's bytes: (2, page size, kv heads, head_dim), or
        (1, page size, 1, width) of latents."""
        values, first = whole.view(np.float32), page * self._page_size
        for kv in self.ops.kv:
            kept = kv[:, first : first + self._page_size]
            yield kept, values[: kept.size].reshape(kept.shape)
            values = values[kept.size :]

    def plan(self, batch: ScheduleBatch) -> ForwardBatch:
        rows = []
        first_token = 0
        for index, (start, length) in enumerate(zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)):
            positions = np.arange(start + length)
            pages = batch.page_table[index, positions // self._page_size].astype(np.int64)
            slots = pages * self._page_size + positions % self._page_size
            state, kept = -1, []
            if batch.state_slots is not None:
                state = int(batch.state_slots[index])
                kept = [(save.num_tokens, save.slot) for save in batch.state_saves if save.row == index]
            rows.append(RowPlan(first_token, start, length, slots, state, (*sorted(kept), (length, state))))
            first_token += length
        rope_positions = batch.positions if batch.rope_positions is None else batch.rope_positions
        return ForwardBatch(
            batch.token_ids.astype(np.int64), rope_positions.astype(np.int64), batch.slots.astype(np.int64), tuple(rows)
        )

    def capture(self, function: Callable[..., Floats]) -> Callable[..., Floats]:
        return function

    def take_rows(self, batch: ForwardBatch, hidden: Floats, rows: NDArray[np.int32]) -> tuple[ForwardBatch, Floats]:
        return replace(batch, tokens=rows), hidden[rows]

    def run_step(
        self, forward: Callable[..., Floats], logits: Callable[..., Floats], batch: ScheduleBatch, vocab_size: int
    ) -> SampleResult:
        planned = self.plan(batch)
        taken = self.take_rows(planned, forward(planned), batch.sampling_tokens)
        return self.sample(logits(*taken), batch.sampling, vocab_size)

    def sample(self, logits: Floats, sampling: SamplingBatch, vocab_size: int) -> SampleResult:
        return reference_sampling.sample(logits[:, :vocab_size], sampling)

    def logprobs(
        self, logits: Floats, target_ids: NDArray[np.int32], num_top: int, token_ids: Sequence[int], vocab_size: int
    ) -> list[reference_sampling.LogprobTuple]:
        return [
            reference_sampling.logprob_row(row, target_id, num_top, token_ids)
            for row, target_id in zip(logits[:, :vocab_size], target_ids.tolist(), strict=True)
        ]

    def to_host(self, x: Floats) -> Floats:
        return x

    def close(self) -> None:
        """Give the KV pool back. Weights go with the model that holds them."""
        self.ops.kv, self.ops.states = [], []
        self._num_pages = 0

    def _count(self, array: Floats) -> Floats:
        self._weight_bytes += array.nbytes
        return array


def kept_shape(layer: PagedLayer | LatentLayer) -> tuple[int, int, int]:
    """Of one token: keys and values, their heads, and their length."""
    return (1, 1, layer.width) if isinstance(layer, LatentLayer) else (2, layer.num_kv_heads, layer.head_dim)


def _matrix(tensor: RawTensor) -> Floats:
    return dequantize(tensor).reshape(tensor.num_rows, tensor.num_columns)


def _vector(tensor: RawTensor) -> Floats:
    return dequantize(tensor).reshape(-1)
