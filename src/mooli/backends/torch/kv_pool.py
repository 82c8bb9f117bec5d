"""The KV pool in one tensor: storing, gathering and copying by slot.

Owns the layout, [layer][K, V][page][offset][kv head][value], of which every layer's keys and values are contiguous.
Never knows which request a page belongs to. Memory that was never stored to holds anything, and is never gathered.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mooli.backends.base import KVSpec
from mooli.backends.page_bytes import Bytes
from mooli.backends.sizes import page_bytes
from mooli.backends.torch.dtypes import torch_dtype
from mooli.batch import PageCopy
from mooli.errors import OutOfMemoryError


class KVPool:
    """Keys and values of `num_pages` pages, and of `num_spare_pages` more that no request owns.

    Padding rows of a captured step read and write the spare page, whose number is `num_pages`.
    """

    def __init__(self, spec: KVSpec, num_pages: int, device: torch.device, num_spare_pages: int = 0) -> None:
        """Raises OutOfMemoryError if the device does not hold the pool, ConfigError for an unknown KV type."""
        self.page_size = spec.page_size
        self.num_kv_heads = spec.num_kv_heads
        self.head_dim = spec.head_dim
        self.num_pages = num_pages
        self.page_bytes = page_bytes(spec)
        shape = (spec.num_layers, 2, num_pages + num_spare_pages, spec.page_size, spec.num_kv_heads, spec.head_dim)
        dtype = torch_dtype(spec.dtype)
        try:
            self.storage = torch.empty(shape, dtype=dtype, device=device)
        except RuntimeError as exc:  # of which torch's own out-of-memory error is one
            size = num_pages * self.page_bytes
            raise OutOfMemoryError(
                f"no memory on {device} for a KV pool of {size / 2**30:.2f} GiB ({str(exc).splitlines()[0]}): "
                "lower mem_fraction_static or max_total_tokens"
            ) from exc
        width = spec.num_kv_heads * spec.head_dim
        self._keys = [layer[0].view(-1, width) for layer in self.storage]
        self._values = [layer[1].view(-1, width) for layer in self.storage]

    @property
    def spare_slot(self) -> int:
        """The first slot of the spare page."""
        return self.num_pages * self.page_size

    def store(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Keep k and v (T, kv heads * head_dim), rounded to the pool's type, at slots int64 (T,)."""
        dtype = self.storage.dtype
        self._keys[layer].index_copy_(0, slots, k.to(dtype))
        self._values[layer].index_copy_(0, slots, v.to(dtype))

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at slots int64 of any shape: (*slots.shape, kv heads, head_dim) each."""
        flat, shape = slots.reshape(-1), (*slots.shape, self.num_kv_heads, self.head_dim)
        k = self._keys[layer].index_select(0, flat)
        v = self._values[layer].index_select(0, flat)
        return k.view(shape), v.view(shape)

    def copy(self, copies: Sequence[PageCopy]) -> None:
        """Carry out the copies, in order, in all layers."""
        for item in copies:
            source = self.storage[:, :, item.source, : item.num_tokens]
            self.storage[:, :, item.target, : item.num_tokens].copy_(source)

    def read(self, pages: Sequence[int], num_tokens: int, out: Bytes) -> None:
        """Pages to the host, as uint8 (pages, page bytes): of each [layer][K, V][offset][kv head][value], zeros behind
        `num_tokens` of all pages together. The device has room for one page more meanwhile."""
        for index, page in enumerate(pages):
            host = self._on_host(out[index])
            host.copy_(self.storage[:, :, page])
            host[:, :, max(0, num_tokens - index * self.page_size) :] = 0

    def write(self, pages: Sequence[int], data: Bytes) -> None:
        """The inverse of `read`."""
        for index, page in enumerate(pages):
            self.storage[:, :, page].copy_(self._on_host(data[index] if data.flags.writeable else data[index].copy()))

    def _on_host(self, page: Bytes) -> Tensor:
        return torch.from_numpy(page).view(self.storage.dtype).view(self.storage[:, :, 0].shape)
