"""Sums and gathers over the ranks that compute one model, through torch.distributed.

Owns the meeting of the ranks and the operations on tensors. Never knows what is summed. Ranks meet through a file and
talk over the loopback interface or the devices' own links: nothing listens for other machines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from mooli.backends.parallel import CommunicationError, RankGroup
from mooli.errors import BackendUnavailableError, ConfigError

dist: Any = torch.distributed
"""Some of its documented names are not in its type information."""

LOOPBACK = "127.0.0.1"

ABORTS: tuple[tuple[str, tuple[str, ...]], ...] = (("abort", ()), ("abort_hccl_comm", ("a rank has ended",)))
"""What ends waiting operations in process groups of NCCL and of HCCL, with its arguments."""


class Communicator(Protocol):
    """The ranks of one model. Every rank calls the same operations in the same order. All raise CommunicationError."""

    rank: int
    size: int
    transport: str

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, the same on each to the bit. May overwrite x."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' x (rows, columns), in the order of the ranks: (size, rows, columns)."""
        ...

    def barrier(self) -> None: ...

    def abort(self) -> None:
        """Have what waits for another rank fail. Called on another thread."""
        ...

    def close(self) -> None: ...


class GlooCommunicator:
    """Through the memory of the host, for the CPU and for the simulated NPU. Halves are summed in float32."""

    transport = "gloo"

    def __init__(self, group: RankGroup) -> None:
        self.rank, self.size = group.rank, group.size
        if not dist.is_available() or not hasattr(dist, "ProcessGroupGloo"):
            raise BackendUnavailableError(f"torch {torch.__version__} has no gloo: tp_size > 1 needs a build with it")
        timeout = timedelta(seconds=group.timeout_s)
        # Not the process group of the whole process, which belongs to the user's program.
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timeout
        with _failing("the ranks do not find each other"):
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
            store = dist.FileStore(str(group.store), group.size)
            store.set_timeout(timeout)
            self._group: Any = dist.ProcessGroupGloo(store, group.rank, group.size, options)

    def all_reduce(self, x: Tensor) -> Tensor:
        staged = x.to(device="cpu", dtype=torch.float32).contiguous()
        with _failing("a sum over the ranks failed"):
            self._group.allreduce([staged]).wait()
        return staged if staged is x else x.copy_(staged)

    def all_gather(self, x: Tensor) -> Tensor:
        staged = x.cpu().contiguous()
        parts = [torch.empty_like(staged) for _ in range(self.size)]
        with _failing("a gather over the ranks failed"):
            self._group.allgather([parts], [staged]).wait()
        return torch.stack(parts).to(x.device)

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1))

    def abort(self) -> None:
        """A connection to a process that has ended is closed by the system: nothing waits."""

    def close(self) -> None:
        self._group = None


class DeviceCommunicator:
    """Over the links of the devices, through NCCL or HCCL. Not tried on hardware.

    It is the process group of the whole process, as that is the documented way to one, so there can be one such engine
    in a process. A failure shows where the host next waits for the device.
    """

    def __init__(self, group: RankGroup, transport: str, device: torch.device) -> None:
        self.rank, self.size, self.transport = group.rank, group.size, transport
        self._device = device
        self._is_aborted = False
        if dist.is_initialized():
            raise ConfigError(
                "tp_size > 1 needs torch.distributed for itself, and this process has a process group already: start"
                " the engine in a process of its own"
            )
        timeout = timedelta(seconds=group.timeout_s)
        with _failing(f"the ranks do not find each other through {transport}"):
            store = dist.FileStore(str(group.store), group.size)
            store.set_timeout(timeout)
            dist.init_process_group(transport, store=store, rank=group.rank, world_size=group.size, timeout=timeout)

    def all_reduce(self, x: Tensor) -> Tensor:
        summed = x.contiguous()
        with _failing("a sum over the ranks failed"):
            dist.all_reduce(summed)
        return summed

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        with _failing("a gather over the ranks failed"):
            dist.all_gather_into_tensor(gathered.view(-1, x.shape[-1]), x.contiguous())
        return gathered

    def barrier(self) -> None:
        # The first operation makes the library's buffers, and the copy back waits for it.
        with _failing("waiting for the ranks failed"):
            self.all_reduce(torch.zeros(1, device=self._device)).cpu()

    def abort(self) -> None:
        self._is_aborted = True
        group: Any = dist.group.WORLD
        if group is None:
            return
        backend = group._get_backend(self._device)
        for name, arguments in ABORTS:
            if hasattr(backend, name):
                getattr(backend, name)(*arguments)
                return

    def close(self) -> None:
        # An aborted group would wait for ranks that are gone.
        if not self._is_aborted and dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, OSError) as exc:  # all that torch.distributed raises is of these
        text = str(exc).strip() or type(exc).__name__
        raise CommunicationError(f"{what}: {text.splitlines()[0]}") from exc
