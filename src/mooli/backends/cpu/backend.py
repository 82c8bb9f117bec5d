"""The CPU backend behind the seam: weights, KV pool, plan of a step, sampling.

Owns the choice of packed kinds and the native device. Never knows a model's structure and never loops over tokens.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mooli import _native
from mooli.backends.base import (
    Activation,
    Array,
    CacheSpec,
    Limits,
    MemoryInfo,
    PagedLayer,
    SampleResult,
    check_attention,
    check_conv,
    check_delta,
)
from mooli.backends.claims import Claim
from mooli.backends.cpu.latent import LatentWeight, check_layer, heads_of
from mooli.backends.cpu.packing import (
    FLOAT_KINDS,
    MAX_RUNNING_REQUESTS,
    TILE,
    Kind,
    Packing,
    is_exact,
    kept_shapes,
    page_bytes,
)
from mooli.backends.cpu.processors import cpu_quota, default_num_threads, usable_cpus
from mooli.backends.cpu.tape import CapturedTape, Planned, Result, Rows, TapeOps
from mooli.backends.dequant import dequantize, with_scales_in_groups
from mooli.backends.host_memory import host_memory
from mooli.backends.latent import LatentLayer, LatentSpec, check_latent
from mooli.backends.page_bytes import (
    Bytes,
    check_slot,
    held_tokens,
    page_numbers,
    pages_of,
    read_into,
    state_of,
)
from mooli.batch import PageCopy, SamplingBatch, ScheduleBatch, StateCopy
from mooli.errors import ConfigError, EngineError, OutOfMemoryError, UnsupportedModelError
from mooli.shared_folder import shared_folder
from mooli.tensor import BLOCK, RawTensor, TensorType

logger = logging.getLogger(__name__)

MAX_INT8_HEAD_DIM = 512
"""The largest head whose keys and values are kept in eight bits."""

MAX_CONV_COLUMNS = 16
"""Of a causal convolution."""

MAX_THREADS = 1024
"""More than the processors of any machine these kernels know."""


_GATES: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1, "clamped_swiglu": 2}
_KV_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 4}


@dataclass(frozen=True, slots=True)
class PackedLinear:
    native: Any


@dataclass(frozen=True, slots=True)
class Table:
    native: Any
    width: int


@dataclass(frozen=True, slots=True)
class Vector:
    native: Any


@dataclass(frozen=True, slots=True)
class Recurrent:
    """The weight of a convolution or of a delta rule."""

    native: Any


@dataclass(frozen=True, slots=True)
class PackedRouter:
    """linear: float32, with the bias of the logits."""

    linear: PackedLinear
    native: Any


@dataclass(frozen=True, slots=True)
class PackedExperts:
    native: Any


Loaded = TypeVar("Loaded")


class CpuBackend:
    """Native kernels on this machine's processors."""

    name = "cpu"
    default_page_size = TILE
    default_chunked_prefill_size = 512
    """Matrix kernels have amortised the read of the weights by then, so a longer step computes no more tokens a second:
    it only holds up the streams that run beside the prompt for longer."""

    default_max_running_requests = MAX_RUNNING_REQUESTS
    match_granularity_tokens = 1
    mixed_step_parts = 4
    """A quarter of the gap, and prompts still come at 95 % of their speed (docs/log/serving.md)."""

    is_exact = True

    def __init__(self, dtype: str = "auto", quantization: str | None = None, num_threads: int | None = None) -> None:
        """dtype: of weights that are not quantised. quantization: None keeps what the file has; int8, int4.

        Raises ConfigError for an unknown dtype, quantisation or instruction set (environment variable MOOLI_ISA).
        """
        if dtype != "auto" and dtype not in FLOAT_KINDS:
            raise ConfigError(f"dtype {dtype!r} is not one of auto, {', '.join(FLOAT_KINDS)}")
        if quantization not in (None, "int8", "int4"):
            raise ConfigError(f"quantization {quantization!r} is not one of None, 'int8', 'int4'")
        if num_threads is not None and not 1 <= num_threads <= MAX_THREADS:
            raise ConfigError(f"num_threads must be from 1 to {MAX_THREADS}, not {num_threads}")
        isa = os.environ.get("MOOLI_ISA", "")
        if isa and isa not in _native.available_isas():
            raise ConfigError(
                f"MOOLI_ISA={isa} is not available on this processor: use one of {', '.join(_native.available_isas())}"
            )
        cpus = usable_cpus()
        most = default_num_threads(cpus, cpu_quota())
        threads = num_threads or most
        if threads > most:
            logger.warning(
                "num_threads=%d is more than the %d processors that this process may use: threads will wait for each"
                " other, and every step takes longer; leave num_threads out for %d",
                threads, most, most,
            )  # fmt: skip
        # Pinned only when every usable processor has its thread: two small engines must not crowd on the first ones.
        try:
            self._device = _native.Device(threads, cpus if threads == len(cpus) else [], isa)
        except RuntimeError as exc:
            raise ConfigError(f"the system does not start {threads} threads ({exc}): lower num_threads") from exc
        if dtype == "float16":
            logger.info(
                "dtype float16: weights and KV are stored as float16 and multiplied in float32: this processor has no "
                "float16 dot product for it; bfloat16 or quantization='int8' is faster"
            )
        self._packing = Packing(dtype, quantization, self._device.has_bf16_dot)
        self.ops = TapeOps(self._device)
        self._slabs = _native.Slabs()
        self._weight_bytes = 0
        self._max_k = 1
        self._scratch: tuple[int, int, int, int] = (0, 0, 0, 0)
        self._mixtures: tuple[int, ...] = (0, 0, 0)
        self._limits: Limits | None = None
        self._kv: CacheSpec | None = None
        self._vocab_size = 0
        self._kinds: dict[str, int] = {}
        self._captured: list[CapturedTape] = []
        self._loads: deque[int] = deque()
        """The last packing job of each `load_*` call that is not known to be read."""
        self._jobs: deque[tuple[int, Any, NDArray[np.uint8]]] = deque()
        """Packing jobs that are not known to be done, and what they write and read: it must live until then."""
        weakref.finalize(self, self._device.drop_packing)
        self._claim: Claim | None = None

    # ------------------------------------------------------------------ facts

    def describe(self) -> dict[str, Any]:
        return {
            "device": "cpu",
            "isa": self._device.isa,
            "num_threads": self._device.num_threads,
            "weight_kinds": dict(self._kinds),
        }

    def memory(self) -> MemoryInfo:
        return host_memory()

    def check_page_size(self, page_size: int) -> None:
        if page_size < TILE or page_size % TILE:
            raise ConfigError(
                f"page_size {page_size} does not fit the cpu kernels: use a multiple of {TILE} "
                "(matching is by token whatever the page size)"
            )

    def weight_bytes(self) -> int:
        return self._weight_bytes

    def bind_thread(self) -> None:
        """Pin the calling thread, the one that runs steps, beside the pool's own."""
        self._device.pin_caller()

    # ------------------------------------------------------------------ weights, packed while Python goes on

    def load_linear(
        self, tensors: Sequence[RawTensor], biases: Sequence[RawTensor] = (), *, head: bool = False
    ) -> PackedLinear:
        return self._loaded(self._linear(tensors, biases, head=head))

    def _linear(self, tensors: Sequence[RawTensor], biases: Sequence[RawTensor], *, head: bool) -> PackedLinear:
        kind = self._packing.kind(tensors, head=head)
        weight = self._new_linear(kind, sum(t.num_rows for t in tensors), tensors[0].num_columns, gated=False)
        row = 0
        for tensor in tensors:
            self._pack(weight, 0, row, tensor)
            row += tensor.num_rows
        row = 0
        for bias in biases:
            weight.set_bias(0, row, dequantize(bias))
            row += bias.num_columns
        return self._count(weight, kind)

    def load_gated(
        self, gate: RawTensor, up: RawTensor, biases: Sequence[RawTensor] = (), *, activation: Activation = "silu"
    ) -> PackedLinear:
        kind = self._packing.kind([gate, up], head=False)
        weight = self._new_linear(kind, gate.num_rows, gate.num_columns, gated=True)
        weight.gate = _GATES[activation]
        for part, tensor in enumerate((gate, up)):
            self._pack(weight, part, 0, tensor)
        for part, bias in enumerate(biases):
            weight.set_bias(part, 0, dequantize(bias))
        return self._loaded(self._count(weight, kind))

    def load_embedding(self, table: RawTensor) -> Table:
        return self._loaded(self._table(table))

    def _table(self, table: RawTensor) -> Table:
        self._check_type(table)
        self._vocab_size = table.num_rows
        # The rows are copied: nothing depends on the file once it is loaded.
        rows, columns = table.num_rows, table.num_columns
        try:
            native = _native.Embedding(int(table.type), rows, columns)
        except MemoryError as exc:
            raise OutOfMemoryError(f"no memory for a table of {rows} x {columns} values") from exc
        self._jobs.append((self._device.fill(native, table.data), native, table.data))
        self._weight_bytes += native.num_bytes
        return Table(native, columns)

    def load_tied(self, table: RawTensor) -> tuple[Table, PackedLinear]:
        head = self._linear([table], [], head=True)
        if is_exact(table, Kind(head.native.kind)):
            self._vocab_size = table.num_rows
            return self._loaded((Table(_native.Embedding(head.native), table.num_columns), head))
        return self._loaded((self._table(table), head))

    def load_vector(self, vector: RawTensor) -> Vector:
        self._check_type(vector)
        values = dequantize(vector)
        try:
            native = _native.FloatBuffer(len(values))
        except MemoryError as exc:
            raise OutOfMemoryError(f"no memory for a vector of {len(values)} values") from exc
        native.array()[:] = values
        self._weight_bytes += 4 * len(values)
        return self._loaded(Vector(native))

    def load_conv(self, weight: RawTensor, bias: RawTensor | None = None) -> Recurrent:
        values = self._floats(weight).reshape(weight.shape)
        if not 2 <= weight.num_columns <= MAX_CONV_COLUMNS:
            raise UnsupportedModelError(
                f"{weight.name} is a convolution of {weight.num_columns} columns; the cpu kernels take 2 to"
                f" {MAX_CONV_COLUMNS}"
            )
        biases = np.zeros(weight.num_rows, np.float32) if bias is None else self._floats(bias)
        return self._recurrent(_native.ConvWeight(values, biases))

    def load_delta(self, decay: RawTensor, dt_bias: RawTensor) -> Recurrent:
        return self._recurrent(_native.DeltaWeight(self._floats(decay), self._floats(dt_bias)))

    def load_scan(self, decay: RawTensor, dt_bias: RawTensor, skip: RawTensor) -> Recurrent:
        return self._recurrent(_native.DeltaWeight(*(self._floats(vector) for vector in (decay, dt_bias, skip))))

    def load_latent(self, keys: RawTensor, values: RawTensor, spec: LatentSpec) -> LatentWeight:
        of_heads = [self._head_weights(tensor, spec.num_heads) for tensor in (keys, values)]
        return self._loaded(LatentWeight(_native.LatentWeight(*of_heads), spec))

    def _head_weights(self, tensor: RawTensor, num_heads: int) -> list[Any]:
        kind = self._packing.kind([tensor], head=True)  # all that is kept of a sequence goes through them
        weights = []
        for rows in heads_of(tensor, num_heads):
            weights.append(self._new_linear(kind, rows.num_rows, rows.num_columns, gated=False))
            self._pack(weights[-1], 0, 0, rows)
            self._weight_bytes += weights[-1].num_bytes
        self._kinds[kind.name] = self._kinds.get(kind.name, 0) + 1
        return weights

    def load_router(
        self, weight: RawTensor, bias: RawTensor | None = None, correction: RawTensor | None = None
    ) -> PackedRouter:
        self._check_type(weight)
        linear = self._new_linear(Kind.F32, weight.num_rows, weight.num_columns, gated=False)
        self._pack(linear, 0, 0, weight)
        if bias is not None:
            linear.set_bias(0, 0, self._floats(bias).reshape(-1))
        added = np.zeros(0, np.float32) if correction is None else self._floats(correction).reshape(-1)
        self._weight_bytes += added.nbytes
        return self._loaded(PackedRouter(self._count(linear, Kind.F32), _native.Router(added)))

    def load_experts(self, gated: Sequence[PackedLinear], down: Sequence[PackedLinear]) -> PackedExperts:
        native = _native.Experts([each.native for each in gated], [each.native for each in down])
        native.each = (*gated, *down)  # it refers to them
        return PackedExperts(native)

    def _floats(self, tensor: RawTensor) -> NDArray[np.float32]:
        self._check_type(tensor)
        return np.ascontiguousarray(dequantize(tensor), dtype=np.float32)

    def _recurrent(self, native: Any) -> Recurrent:
        self._weight_bytes += native.num_bytes
        return self._loaded(Recurrent(native))

    def _loaded(self, weight: Loaded) -> Loaded:
        self._loads.append(self._jobs[-1][0] if self._jobs else 0)
        return weight

    def unread_loads(self, at_most: int) -> int:
        has_more = len(self._loads) > at_most
        num_done = self._device.wait_packed(self._loads[-at_most - 1] if has_more else 0)
        while self._loads and self._loads[0] <= num_done:
            self._loads.popleft()
        while self._jobs and self._jobs[0][0] <= num_done:
            self._jobs.popleft()
        return len(self._loads)

    def _new_linear(self, kind: Kind, rows: int, columns: int, *, gated: bool) -> Any:
        self._max_k = max(self._max_k, columns)
        try:
            return _native.Linear(self._slabs, int(kind), rows, columns, gated)
        except MemoryError as exc:
            raise OutOfMemoryError(f"no memory for a weight of {rows} x {columns} values as {kind.name}") from exc

    def _pack(self, weight: Any, part: int, first_row: int, tensor: RawTensor) -> None:
        if tensor.scales is not None:
            tensor = with_scales_in_groups(tensor)
        number = self._device.pack(weight, part, first_row, int(tensor.type), tensor.data)
        self._jobs.append((number, weight, tensor.data))

    def _count(self, weight: Any, kind: Kind) -> PackedLinear:
        self._weight_bytes += weight.num_bytes
        self._kinds[kind.name] = self._kinds.get(kind.name, 0) + 1
        return PackedLinear(weight)

    def _check_type(self, tensor: RawTensor) -> None:
        kind = TensorType.Q8_0 if tensor.type == TensorType.I8 else tensor.type
        if kind not in BLOCK or tensor.num_columns % BLOCK[kind][0]:
            raise UnsupportedModelError(
                f"tensor {tensor.name}: {tensor.type.name} rows of {tensor.num_columns} values are not supported"
            )

    # ------------------------------------------------------------------ KV pool

    def kv_bytes_per_page(self, spec: CacheSpec) -> int:
        return page_bytes(spec)

    def allocate(self, spec: CacheSpec, num_pages: int, limits: Limits) -> None:
        self.check_page_size(spec.page_size)
        layers = spec.paged_layers()
        for layer in layers:
            if isinstance(layer, LatentLayer):
                check_layer(layer)
        for head_dim in sorted({layer.head_dim for layer in layers if isinstance(layer, PagedLayer)}):
            if head_dim % 16:
                raise UnsupportedModelError(f"head_dim {head_dim} is not a multiple of 16, which the cpu kernels need")
            if spec.dtype == "int8" and head_dim > MAX_INT8_HEAD_DIM:
                raise UnsupportedModelError(
                    f"kv_cache_dtype='int8' takes a head_dim of at most {MAX_INT8_HEAD_DIM} on the cpu, not {head_dim}"
                )
        for state in spec.state_layers:
            if state.conv[1] % 16 or (state.delta is not None and (state.delta[1] % 4 or state.delta[2] % 16)):
                raise UnsupportedModelError(
                    f"{state}: the cpu kernels need channels and values of a multiple of 16, and keys of one of 4"
                )
        size = self.kv_bytes_per_page(spec) * num_pages + spec.state_bytes * limits.num_states
        try:
            self._device.allocate_states(
                [[state.conv[0] + 1, state.conv[1]] for state in spec.state_layers],
                [list(state.delta or (0, 0, 0)) for state in spec.state_layers],
                limits.num_states,
            )
            self._device.allocate_kv(
                _KV_TYPES[spec.dtype],
                *kept_shapes(layers),
                spec.page_size,
                num_pages,
            )
        except MemoryError as exc:
            raise OutOfMemoryError(
                f"the system gives no memory for a KV pool of {size / 2**30:.2f} GiB, of"
                f" {self.memory().available_bytes / 2**30:.2f} GiB that seem to be left: lower max_total_tokens or"
                " mem_fraction_static"
            ) from exc
        self._drop_claim()
        # The system has given addresses. Memory comes when pages are first written to.
        self._claim = Claim(self._weight_bytes + size, shared_folder())
        weakref.finalize(self, self._claim.release)
        self._limits, self._kv = limits, spec
        self.ops.numbers = spec.numbers
        self._prepare()

    def _prepare(self) -> int:
        """Scratch for the widest linear and the most heads seen so far; returns the most tokens of a step."""
        if self._limits is None or self._kv is None:
            raise ConfigError("allocate the KV pool before running a step")
        _, widths = kept_shapes(self._kv.paged_layers())
        for layer, attention in self.ops.attentions:
            check_attention(self._kv.layers, layer, attention)
        for layer, columns, channels in self.ops.convs:
            check_conv(self._kv.layers, layer, columns, channels)
        for layer, delta in self.ops.deltas:
            check_delta(self._kv.layers, layer, delta)
        for layer, latent in self.ops.latents:
            check_latent(self._kv.layers, layer, latent)
        attended = [attention.num_heads for _, attention in self.ops.attentions]
        attended += [latent.num_heads for _, latent in self.ops.latents]
        need = (self._limits.max_tokens, self._max_k, max(attended, default=1), max(widths))
        self._prepare_experts()
        if any(a > b for a, b in zip(need, self._scratch, strict=True)):
            wanted: tuple[int, int, int, int] = tuple(map(max, need, self._scratch))  # type: ignore[assignment]
            try:
                self._device.allocate_scratch(*wanted)
            except MemoryError as exc:
                raise OutOfMemoryError(
                    f"the system gives no memory for the buffers of a step of {wanted[0]} tokens, of"
                    f" {self.memory().available_bytes / 2**30:.2f} GiB that seem to be left: lower"
                    " chunked_prefill_size, max_total_tokens or mem_fraction_static"
                ) from exc
            self._scratch = wanted
        return self._limits.max_tokens

    def _prepare_experts(self) -> None:
        """Scratch for the mixtures of experts recorded so far."""
        assert self._limits is not None
        need = tuple(map(max, zip((0, 0, 0), *self.ops.mixtures, strict=True)))
        if all(a <= b for a, b in zip(need, self._mixtures, strict=True)):
            return
        try:
            self._device.allocate_experts(self._limits.max_tokens, *need)
        except MemoryError as exc:
            raise OutOfMemoryError(
                f"the system gives no memory for what {need[0]} experts compute of {self._limits.max_tokens} tokens:"
                " lower chunked_prefill_size"
            ) from exc
        self._mixtures = need

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        for copy in copies:
            self._device.copy_page(copy.source, copy.target, copy.num_tokens)

    def copy_states(self, copies: Sequence[StateCopy]) -> None:
        for copy in copies:
            self._device.copy_state(copy.source, copy.target)

    def read_pages(
        self, pages: Sequence[int] | NDArray[np.int32], num_tokens: int | None = None, out: Any = None
    ) -> Bytes:
        spec, numbers = self._pool(), page_numbers(pages, self._device.num_pages)
        held = held_tokens(num_tokens, len(numbers), spec.page_size)
        result = read_into(out, len(numbers), page_bytes(spec))
        self._device.read_pages(numbers, held, result.reshape(-1))
        return result

    def write_pages(self, pages: Sequence[int] | NDArray[np.int32], data: Any) -> None:
        spec, numbers = self._pool(), page_numbers(pages, self._device.num_pages)
        self._device.write_pages(numbers, pages_of(data, len(numbers), page_bytes(spec)).reshape(-1))

    def read_state(self, slot: int) -> Bytes:
        spec = self._pool()
        check_slot(slot, self._num_states)
        result = np.empty(spec.state_bytes, np.uint8)
        self._device.read_state(slot, result)
        return result

    def write_state(self, slot: int, data: Any) -> None:
        spec = self._pool()
        check_slot(slot, self._num_states)
        self._device.write_state(slot, state_of(data, spec.state_bytes))

    @property
    def _num_states(self) -> int:
        return self._limits.num_states if self._limits is not None and self._kv and self._kv.state_layers else 0

    def page_format(self) -> dict[str, str]:
        layout = f"[tile of {TILE}][layer][kv head][K, V] {self._device.kv_layout}"
        return {"layout": layout, "instruction set": self._device.isa}

    def _pool(self) -> CacheSpec:
        if self._kv is None:
            raise ConfigError("allocate the KV pool before reading or writing pages")
        return self._kv

    # ------------------------------------------------------------------ a step

    def plan(self, batch: ScheduleBatch) -> Planned:
        if self._loads:
            self.unread_loads(0)
        asked = batch.asked_tokens
        rope_positions = batch.positions if batch.rope_positions is None else batch.rope_positions
        self._device.plan(
            batch.token_ids, batch.positions, rope_positions, batch.lengths, batch.page_table, asked, self._vocab_size
        )
        if batch.state_slots is not None:
            saves = sorted((save.row, save.num_tokens, save.slot) for save in batch.state_saves)
            self._device.plan_states(batch.state_slots, np.array(saves, np.int32).reshape(-1))
        return Planned(batch.num_tokens, asked)

    def capture(self, function: Callable[..., Array]) -> Callable[..., Result]:
        captured = CapturedTape(self._device, self.ops, function, self._prepare)
        self._captured.append(captured)
        return captured

    def take_rows(self, batch: Planned, hidden: Result, rows: NDArray[np.int32]) -> tuple[Planned, Rows]:
        taken = replace(batch, tokens=rows)
        if hidden.tokens is None:
            return taken, Rows(hidden.values, rows)
        places = np.searchsorted(hidden.tokens, rows)
        if len(rows) and (places.max() >= hidden.num_rows or not np.array_equal(hidden.tokens[places], rows)):
            missing = np.setdiff1d(rows, hidden.tokens)
            raise EngineError(f"token {missing[0]} of this step was not asked for, so it has no hidden state")
        return taken, Rows(hidden.values, places.astype(np.int32))

    def run_step(
        self, forward: CapturedTape, logits: CapturedTape, batch: ScheduleBatch, vocab_size: int
    ) -> SampleResult:
        planned, s = self.plan(batch), batch.sampling
        if not (s.temperature.any() or s.history_ids.size or s.bias_ids.size) and s.num_top.max() < 0:
            token_ids = forward.run_choosing(planned, logits, vocab_size, s.masks, batch.may_begin_next)
            return SampleResult(token_ids, [None] * len(s))
        result = self.sample(forward.run_then(planned, logits), s, vocab_size)
        if batch.may_begin_next:
            forward.begin_next(result.token_ids)
        return result

    def sample(self, logits: Result, sampling: SamplingBatch, vocab_size: int) -> SampleResult:
        s = sampling
        token_ids = np.empty(len(s), dtype=np.int32)
        masks = (None, None) if s.masks is None else (s.masks.allowed, s.masks.rows)
        self._device.sample(
            logits.values, vocab_size,
            s.temperature, s.top_k, s.top_p, s.min_p, s.frequency_penalty, s.presence_penalty,
            s.repetition_penalty, s.seeds, s.positions, s.history_ids, s.history_indptr, s.output_starts, s.bias_ids,
            s.bias_values, s.bias_indptr, *masks, 0, token_ids,
        )  # fmt: skip
        if s.num_top.max() < 0:
            return SampleResult(token_ids, [None] * len(s))
        logprobs = [
            self._device.logprobs(
                logits.values,
                row,
                vocab_size,
                int(token_ids[row]),
                int(num_top),
                list(s.logprob_token_ids[row]),
                *masks,
            )
            if num_top >= 0 and token_ids[row] >= 0
            else None
            for row, num_top in enumerate(s.num_top)
        ]
        return SampleResult(token_ids, logprobs)

    def logprobs(
        self, logits: Result, target_ids: NDArray[np.int32], num_top: int, token_ids: Sequence[int], vocab_size: int
    ) -> list[tuple[float, list[tuple[float, int]], list[tuple[float, int]]]]:
        ids = list(token_ids)
        return [
            self._device.logprobs(logits.values, row, vocab_size, int(target), num_top, ids, None, None)
            for row, target in enumerate(target_ids)
        ]

    def to_host(self, x: Result) -> NDArray[np.float32]:
        return x.values[: x.num_rows]

    def close(self) -> None:
        """Give back the KV pool, buffers and tapes. Weights go with the model that holds them."""
        self._device.drop_packing()
        self._loads.clear()
        self._jobs.clear()
        self._device.settle()
        for captured in self._captured:
            captured.close()
        # They refer to this backend: without them it goes, threads and all, with its last user.
        self._captured.clear()
        self._device.release()
        self._drop_claim()

    def _drop_claim(self) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.release()
