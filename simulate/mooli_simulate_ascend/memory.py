"""Memory of the simulated device: what is allocated, and which tensors share it.

Owns the count of bytes. An allocation lives as long as a tensor of the device, or a graph, holds it.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from mooli_simulate_ascend import capture

TOTAL_BYTES = int(60.97 * 2**30)
"""What PyTorch reports of a 64 GB card."""


class Allocation:
    """Memory of the device, shared by all views of it."""

    def __init__(self, storage: torch.UntypedStorage, memory: Memory) -> None:
        self.storage = storage
        self.num_bytes = storage.nbytes()
        memory.take(self.num_bytes)
        weakref.finalize(self, memory.give_back, self.num_bytes)


class Memory:
    """What is allocated, in bytes."""

    def __init__(self) -> None:
        self.allocated = 0
        self.most = 0
        self._known: weakref.WeakValueDictionary[int, Allocation] = weakref.WeakValueDictionary()

    def take(self, num_bytes: int) -> None:
        if self.allocated + num_bytes > TOTAL_BYTES:
            free = (TOTAL_BYTES - self.allocated) / 2**30
            raise torch.OutOfMemoryError(
                f"NPU out of memory. Tried to allocate {num_bytes / 2**30:.2f} GiB (NPU 0; "
                f"{TOTAL_BYTES / 2**30:.2f} GiB total capacity; "
                f"{self.allocated / 2**30:.2f} GiB already allocated; {free:.2f} GiB free)"
            )
        self.allocated += num_bytes
        self.most = max(self.most, self.allocated)

    def give_back(self, num_bytes: int) -> None:
        self.allocated -= num_bytes

    def of(self, tensor: Tensor) -> Allocation:
        """The allocation that a CPU tensor lies in. A new one belongs to the graph that is captured."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Allocation(storage, self)
            recording = capture.current()
            if recording is not None:
                recording.owned.append(found)
        return found


memory = Memory()


def free_bytes() -> int:
    return max(0, TOTAL_BYTES - memory.allocated)
