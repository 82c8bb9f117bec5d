"""The backend of Ascend NPUs behind the seam. Not tried on hardware.

Owns what is different from the torch backend it extends: pages of 128, the fused operations that the self-test left on,
W8A8, graphs of decode steps with the head in them, and the watch for overflow. Never tests an operation itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mooli.backends.ascend.attention import AscendAttention
from mooli.backends.ascend.bring_up import Npu
from mooli.backends.ascend.defaults import MAX_RUNNING_REQUESTS, chunked_prefill_size
from mooli.backends.ascend.experts import grouped
from mooli.backends.ascend.graphs import DecodeGraphs, StaticSteps
from mooli.backends.ascend.kv_pool import AscendKVPool
from mooli.backends.ascend.ops import AscendOps
from mooli.backends.ascend.paths import (
    DECODE_ORDER,
    GRAPHS,
    GROUPED_PRODUCT,
    PAGE_SIZE,
    W8A8,
    Paths,
    Switches,
    extend_order,
)
from mooli.backends.ascend.quant import load_w8a8
from mooli.backends.ascend.sampler import AscendSampler
from mooli.backends.ascend.step import AscendStep, cut, plan_rows
from mooli.backends.base import CacheSpec, Limits, MemoryInfo, Weight
from mooli.backends.latent import LatentLayer
from mooli.backends.parallel import RankGroup
from mooli.backends.sizes import AscendSizes, is_w8a8, no_w8a8_in_float32
from mooli.backends.torch.backend import TorchBackend
from mooli.backends.torch.communicator import Communicator, DeviceCommunicator, GlooCommunicator
from mooli.backends.torch.experts import ExpertsWeight
from mooli.backends.torch.graphed_backend import GRAPHS_SWITCH
from mooli.backends.torch.step_plan import ForwardBatch
from mooli.backends.torch.weights import GatedLinear, LinearWeight, check_type, load_vector
from mooli.batch import ScheduleBatch
from mooli.errors import ConfigError
from mooli.tensor import RawTensor

logger = logging.getLogger(__name__)


class AscendBackend(TorchBackend):
    """One NPU. float16 and bfloat16 run on fused operations; float32 in plain torch, for comparison."""

    name = "ascend"
    default_page_size = PAGE_SIZE
    default_max_running_requests = MAX_RUNNING_REQUESTS

    def __init__(
        self,
        npu: Npu,
        switches: Switches,
        *,
        dtype: str = "auto",
        quantization: str | None = None,
        num_threads: int | None = None,
        rank: int = 0,
    ) -> None:
        """switches: what the self-test found unfit for this device. dtype: "auto" is bfloat16. quantization: None or
        "int8", which is W8A8 here.

        Raises ConfigError for what this backend cannot honour.
        """
        self._npu = npu
        self._switches = switches
        super().__init__(dtype, quantization, num_threads, rank)
        if quantization == "int8" and self.dtype_name == "float32":
            raise no_w8a8_in_float32()
        self._paths = Paths(npu.versions.release, switches, self.dtype_name)
        self.default_chunked_prefill_size = chunked_prefill_size(self.memory().total_bytes)
        self.match_granularity_tokens = self._paths.match_granularity_tokens()
        self.sampler = AscendSampler(self.upload, self.dtype_name)
        self.graphs: DecodeGraphs | None = None
        """None where steps are not captured."""
        if self._graphs_wanted():
            self.graphs = DecodeGraphs(npu.api)
        self._attends_in_torch = False
        """Whether no layer has a fused operation, so that rows of one token are better off in groups."""
        self._steps: StaticSteps | None = None
        self._head: Callable[..., Tensor] | None = None
        self._done: tuple[Tensor, Tensor] | None = None
        self._taken: tuple[Tensor, Tensor] | None = None

    def _graphs_wanted(self) -> bool:
        switch = os.environ.get(GRAPHS_SWITCH, "1")
        if switch not in ("0", "1"):
            raise ConfigError(f"{GRAPHS_SWITCH}={switch} is neither 0 nor 1")
        return switch == "1" and self.dtype_name != "float32" and self._switches.is_on(GRAPHS)

    # ------------------------------------------------------------------ the device

    def open_device(self) -> torch.device:
        return self._npu.device

    def auto_dtype(self) -> str:
        return AscendSizes.auto_dtype

    def use_threads(self, num_threads: int | None) -> None:
        if num_threads is not None:
            raise ConfigError(f"num_threads={num_threads} has no effect on an NPU: leave it out")

    def bind_thread(self) -> None:
        self._npu.api.set_device(self._npu.index)

    def pins_host(self) -> bool:
        return not self._npu.is_simulated

    def wait_for_copies(self) -> None:
        self._npu.api.synchronize()

    def connect(self, group: RankGroup) -> Communicator:
        if self._npu.is_simulated:
            return GlooCommunicator(group)
        return DeviceCommunicator(group, "hccl", torch.device("npu", self._npu.index))

    def join(self, group: RankGroup) -> None:
        """Without graphs: they would have the sums over cards in them, which CANN 8.2 has too few streams for, and
        nobody has tried."""
        if self.graphs is not None and group.rank == 0:
            logger.info("steps run without graphs: %d cards compute them together", group.size)
        self.graphs = None
        super().join(group)

    def memory(self) -> MemoryInfo:
        if self._npu.is_simulated:
            return self.share_of_host()
        free, total = self._npu.api.mem_get_info()
        return MemoryInfo(total_bytes=total, available_bytes=free)

    def make_ops(self) -> AscendOps:
        return AscendOps(self.device, self._switches)

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        described.pop("threads")
        release = self._npu.versions.release
        return {
            **described,
            "library": str(self._npu.versions),
            "simulated": self._npu.is_simulated,
            "attention": {"prompts": list(extend_order(release)), "decode": list(DECODE_ORDER)},
            "graphs": "decode steps" if self.graphs is not None and self.graphs.is_in_use else "off",
            "match_granularity_tokens": self.match_granularity_tokens,
            "switched_off": dict(self._switches.off),
        }

    def check_page_size(self, page_size: int) -> None:
        if page_size != PAGE_SIZE:
            raise ConfigError(
                f"page_size={page_size} is not possible on an NPU: use {PAGE_SIZE}, or leave it out. Others are"
                " refused by the attention operations, or give wrong numbers."
            )

    # ------------------------------------------------------------------ weights

    def pack_linear(
        self, tensors: Sequence[RawTensor], biases: Sequence[RawTensor] = (), *, head: bool = False
    ) -> LinearWeight:
        if not self._switches.is_on(W8A8):
            return super().pack_linear(tensors, biases, head=head)
        if not is_w8a8(tensors, self.dtype_name, self._quantization, head=head):
            return self._as_floats(tensors, biases, head=head)
        for tensor in tensors:
            check_type(tensor)
            self._loaded[f"{tensor.type.name} as W8A8"] += 1
        bias = load_vector(biases, self._dtype, self.device) if biases else None
        return self._count_linear(load_w8a8(tensors, bias, self.device))

    def _as_floats(self, tensors: Sequence[RawTensor], biases: Sequence[RawTensor], *, head: bool) -> LinearWeight:
        self._quantization, wanted = None, self._quantization
        try:
            return super().pack_linear(tensors, biases, head=head)
        finally:
            self._quantization = wanted

    def load_experts(self, gated: Sequence[GatedLinear], down: Sequence[LinearWeight]) -> Weight:
        weight: ExpertsWeight = super().load_experts(gated, down)
        in_groups = grouped(weight, self._dtype) if self._switches.is_on(GROUPED_PRODUCT) else None
        return weight if in_groups is None else in_groups

    def load_vector(self, vector: RawTensor) -> Tensor:
        """Gains of norms in the type of the activations, which the fused norm wants of them."""
        return super().load_vector(vector).to(self._dtype)

    # ------------------------------------------------------------------ KV pool

    def allocate(self, spec: CacheSpec, num_pages: int, limits: Limits) -> None:
        self.check_page_size(spec.page_size)
        if spec.dtype != self.dtype_name:
            raise ConfigError(
                f"kv_cache_dtype={spec.dtype!r} is not possible with dtype={self.dtype_name!r} on an NPU: its attention"
                " reads queries and keys of one type. Leave kv_cache_dtype out."
            )
        self._embedding = None
        if (spec.state_layers or self.has_experts) and self.graphs is not None:
            logger.info(
                "steps run without graphs: the model has %s",
                "recurrent layers" if spec.state_layers else "a mixture of experts",
            )
            self.graphs = None
        self._attends_in_torch = all(isinstance(layer, LatentLayer) for layer in spec.paged_layers())
        if any(isinstance(layer, LatentLayer) for layer in spec.layers) and self.graphs is not None:
            logger.info("steps run without graphs: the model attends to latents, in operations that graphs do not take")
            self.graphs = None
        self.pool = pool = AscendKVPool(spec, num_pages, self._npu, self._switches)
        self.ops.keep_states(spec, limits.num_states)
        self.ops.attention = AscendAttention(pool, self._paths, self.device)
        self.ops.num_positions = limits.max_pages_per_row * spec.page_size
        if self.graphs is not None:
            self._steps = StaticSteps(limits, num_pages, self.device)

    def page_format(self) -> dict[str, str]:
        return {**super().page_format(), "switched off": ", ".join(sorted(self._switches.off))}

    # ------------------------------------------------------------------ a step

    def plan(self, batch: ScheduleBatch) -> ForwardBatch:
        self._allocated()
        if self._attends_in_torch:
            return super().plan(batch)
        if self._steps is not None and self.graphs is not None and self.graphs.is_in_use:
            fixed = self._steps.plan(batch)
            if fixed is not None:
                return fixed
        return plan_rows(batch, self.upload)

    def capture(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Decode steps are replayed, and the head with them once it is known: it is the function of rows."""

        def run(batch: ForwardBatch, hidden: Tensor | None = None) -> Tensor:
            with torch.no_grad():
                if hidden is not None:
                    return self._of_rows(function, batch, hidden)
                if isinstance(batch, AscendStep) and batch.is_static:
                    return self._decode(function, batch)
                self._done = self._taken = None
                return function(batch)

        return run

    def _decode(self, forward: Callable[..., Tensor], step: AscendStep) -> Tensor:
        self._done = self._taken = None
        result = None if self.graphs is None else self.graphs.run(forward, self._head, step)
        if result is None:
            return forward(cut(step))
        if result.logits is not None:
            self._done = (result.hidden, result.logits)
        return result.hidden

    def _of_rows(self, head: Callable[..., Tensor], batch: ForwardBatch, rows: Tensor) -> Tensor:
        self._head = head
        if self._taken is not None and self._taken[0] is rows:
            return self._taken[1]
        return head(batch, rows)

    def take_rows(self, batch: ForwardBatch, hidden: Tensor, rows: NDArray[np.int32]) -> tuple[ForwardBatch, Tensor]:
        begin, count = int(rows[0]) if len(rows) else 0, len(rows)
        if begin + count > len(hidden) or not np.array_equal(rows, np.arange(begin, begin + count)):
            return replace(batch, tokens=rows), hidden.index_select(0, self.upload(rows.astype(np.int32)))
        taken = hidden[begin : begin + count]
        if self._done is not None and self._done[0] is hidden:
            self._taken = (taken, self._done[1][begin : begin + count])
        return replace(batch, tokens=rows), taken

    def close(self) -> None:
        if self.graphs is not None:
            self.graphs.close()
        self._steps = self._head = self._done = self._taken = None
        super().close()
        self._npu.api.empty_cache()
