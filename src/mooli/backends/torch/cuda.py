"""The torch backend on a CUDA device: its memory, pinned uploads, CUDA graphs of decode steps.

Owns what differs from the CPU. Not tried on hardware: everything here but the refusals was written from PyTorch's
documentation, and the graphs' logic is tested with a recorder that runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mooli.backends.base import MemoryInfo
from mooli.backends.parallel import RankGroup
from mooli.backends.torch.attention import PagedAttention
from mooli.backends.torch.communicator import Communicator, DeviceCommunicator
from mooli.backends.torch.graphed_backend import GraphedBackend
from mooli.backends.torch.graphs import GraphRecorder
from mooli.backends.torch.kv_pool import KVPool
from mooli.errors import BackendUnavailableError, ConfigError


class CudaAttention(PagedAttention):
    """Kernels are fused in half precision, so scores are never laid out and blocks of queries can be long.

    Keys and values are copied to plain layouts first: the memory-efficient kernel is reported to give wrong numbers for
    strided and broadcast ones behind a mask (pytorch issues 112577 and 191937).
    """

    scores_at_a_time = 1 << 28

    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, *, is_causal: bool, scale: float
    ) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        return super().kernel(q, k, v, visible, is_causal=is_causal, scale=scale)


class CudaBackend(GraphedBackend):
    """PyTorch on the current CUDA device, and rank N on device N (choose others with CUDA_VISIBLE_DEVICES)."""

    name = "cuda"

    def open_device(self) -> torch.device:
        if not torch.cuda.is_available():
            if torch.version.cuda is None:
                cause = f"torch {torch.__version__} is built without CUDA: install a build for CUDA from pytorch.org"
            else:
                cause = "torch finds no CUDA device: check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"
            raise BackendUnavailableError(f"{cause}; or use device='cpu'")
        if self.rank >= torch.cuda.device_count():
            raise BackendUnavailableError(
                f"rank {self.rank} has no CUDA device, torch finds {torch.cuda.device_count()}: lower tp_size, or check"
                " CUDA_VISIBLE_DEVICES"
            )
        if self.rank:
            torch.cuda.set_device(self.rank)
        return torch.device("cuda", torch.cuda.current_device())

    def auto_dtype(self) -> str:
        # Processors before compute capability 8.0 (Ampere) only emulate bfloat16.
        return "bfloat16" if torch.cuda.get_device_capability(self.device) >= (8, 0) else "float16"

    def use_threads(self, num_threads: int | None) -> None:
        if num_threads is not None:
            raise ConfigError(f"num_threads={num_threads} has no effect on a CUDA device: leave it out")

    def make_attention(self, pool: KVPool) -> PagedAttention:
        return CudaAttention(pool)

    def connect(self, group: RankGroup) -> Communicator:
        return DeviceCommunicator(group, "nccl", self.device)

    def make_recorder(self) -> GraphRecorder | None:
        return CudaRecorder()

    def upload(self, values: NDArray[Any]) -> Tensor:
        # From pinned memory the host does not wait for what the device is still computing.
        return torch.from_numpy(values).pin_memory().to(self.device, non_blocking=True)

    def memory(self) -> MemoryInfo:
        free, total = torch.cuda.mem_get_info(self.device)
        return MemoryInfo(total_bytes=total, available_bytes=free)

    def wait_for_copies(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()

    def bind_thread(self) -> None:
        torch.cuda.set_device(self.device)

    def describe(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self.device)
        described = super().describe()
        described.pop("threads")
        return {**described, "library": f"torch {torch.__version__} on {name}"}

    def close(self) -> None:
        super().close()
        torch.cuda.empty_cache()


class CudaGraphRun:
    """A captured CUDA graph with its output buffer."""

    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor) -> None:
        self._graph = graph
        self.output = output

    def replay(self) -> None:
        self._graph.replay()


class CudaRecorder:
    """Captures on a side stream into one memory pool shared by all graphs: they never run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, run: Callable[[], Tensor]) -> CudaGraphRun:
        # Libraries set themselves up in the first runs, which must not happen while capturing.
        new_stream: Callable[[], torch.cuda.Stream] = torch.cuda.Stream
        current, side = torch.cuda.current_stream(), new_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            run()
            run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            output = run()
        return CudaGraphRun(graph, output)

    def upload_into(self, target: Tensor, values: NDArray[np.int64]) -> None:
        target.copy_(torch.from_numpy(values).pin_memory(), non_blocking=True)
