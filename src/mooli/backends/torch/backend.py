"""The torch backend behind the seam: weights, KV pool, plan of a step, sampling, on the CPU through PyTorch.

Owns the choice of types and the order of loading. What other devices do differently (opening the device, memory,
uploads, graphs) is one method each, which their backends override. Never knows a model's structure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mooli.backends.base import Activation, CacheSpec, Limits, MemoryInfo, SampleResult, Weight
from mooli.backends.host_memory import host_memory
from mooli.backends.latent import LatentSpec
from mooli.backends.page_bytes import Bytes, held_tokens, page_numbers, pages_of, read_into
from mooli.backends.parallel import RankGroup
from mooli.backends.reference_sampling import LogprobTuple
from mooli.backends.sizes import TorchSizes, cannot_quantise, page_bytes
from mooli.backends.torch.attention import PagedAttention
from mooli.backends.torch.communicator import Communicator, GlooCommunicator
from mooli.backends.torch.dtypes import DTYPES, torch_dtype
from mooli.backends.torch.experts import RouterWeight, experts_weight
from mooli.backends.torch.kv_pool import KVPool
from mooli.backends.torch.latent import LatentWeight
from mooli.backends.torch.ops import ConvWeight, DeltaWeight, ScanWeight, TorchOps
from mooli.backends.torch.parallel import PartTable, over_ranks, table_over_ranks
from mooli.backends.torch.sampling import TorchSampler
from mooli.backends.torch.step_plan import ForwardBatch, plan_step
from mooli.backends.torch.weights import (
    FloatLinear,
    GatedLinear,
    LinearWeight,
    check_type,
    holds_same,
    load_int8,
    load_matrix,
    load_vector,
    tensor_bytes,
)
from mooli.batch import PageCopy, SamplingBatch, ScheduleBatch, StateCopy
from mooli.errors import ConfigError, EngineError, OutOfMemoryError
from mooli.tensor import RawTensor, TensorType

MOST_GATHERED_BYTES = 16 << 20
"""Of pages on their way between device and host: so much room it takes on the device, or a page."""

FLOATS = (TensorType.F32, TensorType.F16, TensorType.BF16)


class TorchBackend:
    """PyTorch on this machine's processors. Any page size; every operation in `dtype`, sums in float32."""

    name = "torch"
    default_page_size = TorchSizes.default_page_size
    default_chunked_prefill_size = 512
    default_max_running_requests = TorchSizes.default_max_running_requests
    match_granularity_tokens = 1
    mixed_step_parts = 4
    is_exact = False

    def __init__(
        self,
        dtype: str = "auto",
        quantization: str | None = None,
        num_threads: int | None = None,
        rank: int = 0,
    ) -> None:
        """dtype: of weights and activations; "auto" is the device's best. quantization: None or "int8" (weights only).

        num_threads: None leaves PyTorch's own choice; a number is set for the whole process. rank: of the processes
        that compute one model, which have a device each.

        Raises ConfigError for what this backend cannot honour, BackendUnavailableError if the device is not there.
        """
        if dtype != "auto" and dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
        if quantization not in (None, "int8"):
            raise cannot_quantise(self.name, quantization)
        self.rank = rank
        self.communicator: Communicator | None = None
        """The other ranks; None while this process computes alone."""
        self.device = self.open_device()
        self._num_threads = num_threads
        self.use_threads(num_threads)
        self.dtype_name = self.auto_dtype() if dtype == "auto" else dtype
        self._dtype = torch_dtype(self.dtype_name)
        self._quantization = quantization
        self.ops = self.make_ops()
        self.sampler = TorchSampler(self.upload)
        self.pool: KVPool | None = None
        self._host: Tensor | None = None
        self.has_experts = False
        """How many rows an expert has is known on the host alone, so that steps are not captured."""
        self._embedding: Tensor | None = None
        self._weight_bytes = 0
        self._loaded: Counter[str] = Counter()

    # ------------------------------------------------------------------ what a device does in its own way

    def open_device(self) -> torch.device:
        """The device to compute on. Raises BackendUnavailableError if it is not there."""
        return torch.device("cpu")

    def auto_dtype(self) -> str:
        """The type of dtype="auto"."""
        return TorchSizes.auto_dtype

    def use_threads(self, num_threads: int | None) -> None:
        """Raise ConfigError for a number that cannot be honoured."""
        if num_threads is None:
            return
        if num_threads < 1:
            raise ConfigError(f"num_threads must be at least 1, not {num_threads}")
        torch.set_num_threads(num_threads)

    def make_ops(self) -> TorchOps:
        return TorchOps(self.device)

    def make_attention(self, pool: KVPool) -> PagedAttention:
        return PagedAttention(pool)

    def upload(self, values: NDArray[Any]) -> Tensor:
        """One copy of an array that nobody else writes to."""
        return torch.from_numpy(values).to(self.device)

    def memory(self) -> MemoryInfo:
        return self.share_of_host()

    def bind_thread(self) -> None:
        # The number of threads is kept by each thread that starts some.
        self.use_threads(self._num_threads)

    def num_spare_pages(self) -> int:
        """Pages beyond those of requests, for padding rows."""
        return 0

    def connect(self, group: RankGroup) -> Communicator:
        """Meet the other ranks, by whatever this device talks to others through."""
        return GlooCommunicator(group)

    # ------------------------------------------------------------------ several ranks: see `ParallelBackend`

    def join(self, group: RankGroup) -> None:
        if self._num_threads is None and self.device.type == "cpu":
            # The ranks have the processors in common.
            self._num_threads = max(1, torch.get_num_threads() // group.size)
            torch.set_num_threads(self._num_threads)
        self.communicator = self.connect(group)
        self.communicator.barrier()

    def barrier(self) -> None:
        if self.communicator is not None:
            self.communicator.barrier()

    def abort(self) -> None:
        if self.communicator is not None:
            self.communicator.abort()

    def share_of_host(self) -> MemoryInfo:
        """The host's memory, in equal parts where several ranks live in it."""
        whole, size = host_memory(), 1 if self.communicator is None else self.communicator.size
        return MemoryInfo(whole.total_bytes // size, whole.available_bytes // size, whole.claimed_bytes // size)

    # ------------------------------------------------------------------ facts

    def describe(self) -> dict[str, Any]:
        ranks = {} if self.communicator is None else {"transport": self.communicator.transport}
        return {
            "backend": self.name,
            **ranks,
            "device": str(self.device),
            "dtype": self.dtype_name,
            "library": f"torch {torch.__version__}",
            "threads": torch.get_num_threads(),
            "attention": "scaled_dot_product_attention over gathered pages",
            "weight_kinds": dict(self._loaded),
        }

    def check_page_size(self, page_size: int) -> None:
        if page_size < 1:
            raise ConfigError(f"page_size must be at least 1, not {page_size}")

    def weight_bytes(self) -> int:
        return self._weight_bytes

    # ------------------------------------------------------------------ weights

    def unread_loads(self, at_most: int) -> int:
        return 0

    def load_linear(
        self, tensors: Sequence[RawTensor], biases: Sequence[RawTensor] = (), *, head: bool = False
    ) -> LinearWeight:
        weight = self.pack_linear(tensors, biases, head=head)
        return over_ranks(weight, tensors, self.communicator, is_head=head)

    def pack_linear(
        self, tensors: Sequence[RawTensor], biases: Sequence[RawTensor] = (), *, head: bool = False
    ) -> LinearWeight:
        """The weight of these tensors alone. A device that packs differently overrides this."""
        self._note(tensors, is_linear=True)
        bias = load_vector(biases, self._dtype, self.device) if biases else None
        if self._quantization == "int8":
            return self._count_linear(load_int8(tensors, bias, self.device))
        if head and len(tensors) == 1 and self._embedding is not None and holds_same(self._embedding, tensors[0]):
            return FloatLinear(self._embedding, bias)  # tied: one table for both, counted once
        return self._count_linear(FloatLinear(load_matrix(tensors, self._dtype, self.device), bias))

    def load_gated(
        self, gate: RawTensor, up: RawTensor, biases: Sequence[RawTensor] = (), *, activation: Activation = "silu"
    ) -> GatedLinear:
        return GatedLinear(self.load_linear([gate, up], biases), activation)

    def load_embedding(self, table: RawTensor) -> Tensor | PartTable:
        self._note([table], is_linear=False)
        self._embedding = self._count(load_matrix([table], self._dtype, self.device))
        return table_over_ranks(self._embedding, table, self.communicator)

    def load_tied(self, table: RawTensor) -> tuple[Tensor | PartTable, LinearWeight]:
        return self.load_embedding(table), self.load_linear([table], head=True)

    def load_vector(self, vector: RawTensor) -> Tensor:
        """Gains of norms stay in float32, in which norms compute."""
        check_type(vector)
        return self._count(load_vector([vector], torch.float32, self.device))

    def load_conv(self, weight: RawTensor, bias: RawTensor | None = None) -> ConvWeight:
        """In float32, as the states are."""
        check_type(weight)
        values = self._count(load_matrix([weight], torch.float32, self.device))
        if bias is None:
            return ConvWeight(values, self._count(torch.zeros(len(values), device=self.device)))
        check_type(bias)
        return ConvWeight(values, self._count(load_vector([bias], torch.float32, self.device)))

    def load_delta(self, decay: RawTensor, dt_bias: RawTensor) -> DeltaWeight:
        return DeltaWeight(*self._vectors(decay, dt_bias))

    def load_scan(self, decay: RawTensor, dt_bias: RawTensor, skip: RawTensor) -> ScanWeight:
        return ScanWeight(*self._vectors(decay, dt_bias, skip))

    def _vectors(self, *tensors: RawTensor) -> list[torch.Tensor]:
        """In float32, as the states are."""
        for tensor in tensors:
            check_type(tensor)
        return [self._count(load_vector([tensor], torch.float32, self.device)) for tensor in tensors]

    def load_latent(self, keys: RawTensor, values: RawTensor, spec: LatentSpec) -> LatentWeight:
        """In floats, whatever the linear weights are quantised to."""
        self._note([keys, values], is_linear=False)
        made = [self._count(load_matrix([tensor], self._dtype, self.device)) for tensor in (keys, values)]
        return LatentWeight(
            made[0].view(spec.num_heads, spec.rank, spec.nope_dim), made[1].view(spec.num_heads, -1, spec.rank)
        )

    def load_router(
        self, weight: RawTensor, bias: RawTensor | None = None, correction: RawTensor | None = None
    ) -> RouterWeight:
        given = [tensor for tensor in (weight, bias, correction) if tensor is not None]
        for tensor in given:
            check_type(tensor)
        values = self._count(load_matrix([weight], torch.float32, self.device))
        vectors = (
            None if tensor is None else self._count(load_vector([tensor], torch.float32, self.device))
            for tensor in (bias, correction)
        )
        return RouterWeight(values, *vectors)

    def load_experts(self, gated: Sequence[GatedLinear], down: Sequence[LinearWeight]) -> Weight:
        self.has_experts = True
        return experts_weight(gated, down)

    def _note(self, tensors: Sequence[RawTensor], *, is_linear: bool) -> None:
        """Check storage types, and keep for `describe` what became of them."""
        for tensor in tensors:
            check_type(tensor)
            to = "int8 in groups of 32" if is_linear and self._quantization else self.dtype_name
            is_kept = tensor.type == TensorType.I8 and to != self.dtype_name
            verb = "as" if tensor.type in FLOATS or is_kept else "dequantised to"
            self._loaded[f"{tensor.type.name} {verb} {to}"] += 1

    def _count_linear(self, weight: LinearWeight) -> LinearWeight:
        self._weight_bytes += weight.num_bytes()
        return weight

    def _count(self, values: Tensor) -> Tensor:
        self._weight_bytes += tensor_bytes(values)
        return values

    # ------------------------------------------------------------------ KV pool

    def kv_bytes_per_page(self, spec: CacheSpec) -> int:
        return page_bytes(spec)

    def allocate(self, spec: CacheSpec, num_pages: int, limits: Limits) -> None:
        self.check_page_size(spec.page_size)
        # The embedding was kept for a tied head, which is loaded by now.
        self._embedding = None
        self.pool = KVPool(spec, num_pages, self.device, self.num_spare_pages())
        self.ops.attention = self.make_attention(self.pool)
        self.ops.keep_states(spec, limits.num_states)
        self.ops.num_positions = limits.max_pages_per_row * spec.page_size

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        with torch.no_grad():
            self._allocated().copy(copies)

    def copy_states(self, copies: Sequence[StateCopy]) -> None:
        with torch.no_grad():
            self.ops.copy_states(copies)

    def read_pages(
        self, pages: Sequence[int] | NDArray[np.int32], num_tokens: int | None = None, out: Any = None
    ) -> Bytes:
        pool = self._allocated()
        numbers = page_numbers(pages, pool.num_pages)
        held = held_tokens(num_tokens, len(numbers), pool.page_size)
        result = read_into(out, len(numbers), pool.page_bytes)
        with torch.no_grad():
            pool.read(numbers.tolist(), held, result)
        return result

    def write_pages(self, pages: Sequence[int] | NDArray[np.int32], data: Any) -> None:
        pool = self._allocated()
        numbers = page_numbers(pages, pool.num_pages)
        with torch.no_grad():
            pool.write(numbers.tolist(), pages_of(data, len(numbers), pool.page_bytes))

    def read_state(self, slot: int) -> Bytes:
        with torch.no_grad():
            return self.ops.read_state(slot)

    def write_state(self, slot: int, data: Any) -> None:
        with torch.no_grad():
            self.ops.write_state(slot, data)

    # ------------------------------------------------------------------ the host's memory: see `OffloadingBackend`

    def allocate_host(self, num_rows: int) -> None:
        pool = self._allocated()
        size = pool.page_bytes // pool.dtype.itemsize
        try:
            self._host = torch.empty((num_rows, size), dtype=pool.dtype, pin_memory=self.pins_host())
        except RuntimeError as exc:
            num_bytes = num_rows * pool.page_bytes
            raise OutOfMemoryError(
                f"no memory on the host for {num_bytes / 2**30:.2f} GiB of the KV cache"
                f" ({str(exc).splitlines()[0]}): lower hicache_size or hicache_ratio"
            ) from exc

    def pins_host(self) -> bool:
        """Whether copies from and to pinned memory go without the host."""
        return self.device.type != "cpu"

    def wait_for_copies(self) -> None:
        """All copies that were begun are over."""

    def back_up(self, pages: Sequence[int], rows: Sequence[int]) -> None:
        pool, host, pieces = self._between(pages, rows)
        with torch.no_grad():
            for numbers, places in pieces:
                pool.back_up(numbers, host, places)
        self.wait_for_copies()

    def load_back(self, pages: Sequence[int], rows: Sequence[int]) -> None:
        pool, host, pieces = self._between(pages, rows)
        with torch.no_grad():
            for numbers, places in pieces:
                pool.load_back(numbers, host, places)
        self.wait_for_copies()  # a row may be another page's right after this

    def host_bytes(self, row: int) -> bytes:
        if self._host is None or not 0 <= row < len(self._host):
            raise EngineError(f"the host has no row {row} of the KV cache")
        taken: bytes = self._host[row].view(torch.uint8).numpy().tobytes()
        return taken

    def _between(
        self, pages: Sequence[int], rows: Sequence[int]
    ) -> tuple[KVPool, Tensor, list[tuple[list[int], list[int]]]]:
        """The pool, the host's memory, and which pages and rows are copied at a time."""
        pool, host = self._allocated(), self._host
        numbers = page_numbers(pages, pool.num_pages)
        places = page_numbers(rows, 0 if host is None else len(host), "the host's memory")
        if host is None or len(numbers) != len(places):
            raise EngineError(f"{len(numbers)} pages do not go to {len(places)} rows of the host")
        step = max(1, MOST_GATHERED_BYTES // pool.page_bytes)
        starts = range(0, len(numbers), step)
        pieces = [(numbers[at : at + step].tolist(), places[at : at + step].tolist()) for at in starts]
        return pool, host, pieces

    def page_format(self) -> dict[str, str]:
        layout = "[layer][K, V][token][kv head][value]"
        return {"layout": f"{layout} {self._allocated().dtype}", "library": self.describe()["library"]}

    def _allocated(self) -> KVPool:
        if self.pool is None:
            raise ConfigError("allocate the KV pool before running a step")
        return self.pool

    # ------------------------------------------------------------------ a step

    def plan(self, batch: ScheduleBatch) -> ForwardBatch:
        return plan_step(batch, self._allocated().page_size, self.upload)

    def capture(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function itself: nothing is captured on the CPU."""

        def run(batch: ForwardBatch, *hidden: Tensor) -> Tensor:
            with torch.no_grad():
                return function(batch, *hidden)

        return run

    def take_rows(self, batch: ForwardBatch, hidden: Tensor, rows: NDArray[np.int32]) -> tuple[ForwardBatch, Tensor]:
        taken = replace(batch, tokens=rows)
        if len(rows) <= len(hidden) and np.array_equal(rows, np.arange(len(rows))):
            return taken, hidden[: len(rows)]  # a decode step samples every row
        return taken, hidden.index_select(0, self.upload(rows.astype(np.int64)))

    def run_step(
        self, forward: Callable[..., Tensor], logits: Callable[..., Tensor], batch: ScheduleBatch, vocab_size: int
    ) -> SampleResult:
        planned = self.plan(batch)
        taken = self.take_rows(planned, forward(planned), batch.sampling_tokens)
        return self.sample(logits(*taken), batch.sampling, vocab_size)

    def sample(self, logits: Tensor, sampling: SamplingBatch, vocab_size: int) -> SampleResult:
        with torch.no_grad():
            return self.sampler.sample(logits[:, :vocab_size].float(), sampling)

    def logprobs(
        self, logits: Tensor, target_ids: NDArray[np.int32], num_top: int, token_ids: Sequence[int], vocab_size: int
    ) -> list[LogprobTuple]:
        with torch.no_grad():
            return self.sampler.logprobs(logits[:, :vocab_size].float(), target_ids, num_top, token_ids)

    def to_host(self, x: Tensor) -> NDArray[np.float32]:
        values: NDArray[np.float32] = x.float().cpu().numpy()
        return values

    def close(self) -> None:
        """Give back the KV pool and tables. Weights go with the model that holds them."""
        self.ops.close()
        self.pool = self._host = None
        self._embedding = None
        if self.communicator is not None:
            self.communicator.close()
