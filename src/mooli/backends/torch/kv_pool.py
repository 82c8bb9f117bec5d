"""The KV pool in few tensors: storing, gathering and copying by slot.

Owns the layout, [layer][K, V][page][offset][kv head][value] for the layers of one shape, of which every layer's keys
and values are contiguous. Latents are keys of one head, whose first numbers are the values. Never knows which request a
page belongs to. Memory that was never stored to holds anything, and is never gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mooli.backends.base import CacheSpec
from mooli.backends.latent import LatentLayer
from mooli.backends.page_bytes import Bytes
from mooli.backends.sizes import page_bytes
from mooli.backends.torch.dtypes import torch_dtype
from mooli.batch import PageCopy
from mooli.errors import OutOfMemoryError


class KVPool:
    """Keys and values of `num_pages` pages, and of `num_spare_pages` more that no request owns.

    Padding rows of a captured step read and write the spare page, whose number is `num_pages`.
    """

    def __init__(self, spec: CacheSpec, num_pages: int, device: torch.device, num_spare_pages: int = 0) -> None:
        """Raises OutOfMemoryError if the device does not hold the pool, ConfigError for an unknown KV type, and as
        `CacheSpec.paged_layers`."""
        self.page_size = spec.page_size
        self.layers = spec.paged_layers()
        self.num_pages = num_pages
        self.page_bytes = page_bytes(spec)
        self.dtype = torch_dtype(spec.dtype)
        shapes = [
            (1, 1, layer.width) if isinstance(layer, LatentLayer) else (2, layer.num_kv_heads, layer.head_dim)
            for layer in self.layers
        ]
        pages = (num_pages + num_spare_pages, spec.page_size)
        self.stacks: dict[tuple[int, int, int], Tensor] = {}
        """2 for keys and values, or 1, kv heads and head_dim to their layers, in order: (layers, 2 or 1, pages, page
        size, kv heads, head_dim)."""
        try:
            for shape in dict.fromkeys(shapes):
                stack = (shapes.count(shape), shape[0], *pages, *shape[1:])
                self.stacks[shape] = torch.empty(stack, dtype=self.dtype, device=device)
        except RuntimeError as exc:  # of which torch's own out-of-memory error is one
            size = num_pages * self.page_bytes
            raise OutOfMemoryError(
                f"no memory on {device} for a KV pool of {size / 2**30:.2f} GiB ({str(exc).splitlines()[0]}): "
                "lower mem_fraction_static or max_total_tokens"
            ) from exc
        each = {shape: iter(stack) for shape, stack in self.stacks.items()}
        kept = [next(each[shape]) for shape in shapes]
        self.key_pages = [layer[0] for layer in kept]
        """Per layer (pages, page size, kv heads, head_dim)."""
        self.value_dims = [layer.rank if isinstance(layer, LatentLayer) else layer.head_dim for layer in self.layers]
        """Per layer, the length of a value."""
        self.value_pages = [
            layer[1] if len(layer) == 2 else layer[0][..., :value_dim]
            for layer, value_dim in zip(kept, self.value_dims, strict=True)
        ]
        self._keys = [keys.view(-1, keys.shape[2] * keys.shape[3]) for keys in self.key_pages]
        self._values = [values.view(-1, values.shape[2] * values.shape[3]) for values in self.value_pages]

    @property
    def spare_slot(self) -> int:
        """The first slot of the spare page."""
        return self.num_pages * self.page_size

    def store(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Keep k and v (T, kv heads * head_dim), rounded to the pool's type, at slots int64 (T,)."""
        self._keys[layer].index_copy_(0, slots, k.to(self.dtype))
        self._values[layer].index_copy_(0, slots, v.to(self.dtype))

    def store_latents(self, layer: int, slots: Tensor, rows: Tensor) -> None:
        """Keep rows (T, width), rounded to the pool's type, at slots of whole numbers (T,)."""
        self._keys[layer].index_copy_(0, slots.long(), rows.to(self.dtype))

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at slots int64 of any shape: (*slots.shape, kv heads, head_dim) each. Values of latents are a
        view of the keys."""
        flat, kept = slots.reshape(-1), self.layers[layer]
        k = self._keys[layer].index_select(0, flat)
        if isinstance(kept, LatentLayer):
            k = k.view(*slots.shape, 1, kept.width)
            return k, k[..., : kept.rank]
        shape = (*slots.shape, kept.num_kv_heads, kept.head_dim)
        v = self._values[layer].index_select(0, flat)
        return k.view(shape), v.view(shape)

    def copy(self, copies: Sequence[PageCopy]) -> None:
        """Carry out the copies, in order, in all layers."""
        for item in copies:
            for stack in self.stacks.values():
                source = stack[:, :, item.source, : item.num_tokens]
                stack[:, :, item.target, : item.num_tokens].copy_(source)

    def read(self, pages: Sequence[int], num_tokens: int, out: Bytes) -> None:
        """Pages to the host, as uint8 (pages, page bytes): of each [layer][K, V][offset][kv head][value], zeros behind
        `num_tokens` of all pages together. The device has room for one page more meanwhile."""
        for index, page in enumerate(pages):
            for stack, host in self._on_host(out[index]):
                host.copy_(stack[:, :, page])
                host[:, :, max(0, num_tokens - index * self.page_size) :] = 0

    def write(self, pages: Sequence[int], data: Bytes) -> None:
        """The inverse of `read`."""
        for index, page in enumerate(pages):
            for stack, host in self._on_host(data[index] if data.flags.writeable else data[index].copy()):
                stack[:, :, page].copy_(host)

    def back_up(self, pages: Sequence[int], host: Tensor, rows: Sequence[int]) -> None:
        """Pages to rows of `host`, which has the pool's type and the layout of `read`: gathered on the device, then one
        copy for each page and stack, for which nobody waits here."""
        index = torch.tensor(pages, device=self.key_pages[0].device)
        first = 0
        for stack in self.stacks.values():
            # (pages, layers, 2 or 1, page size, kv heads, head_dim): a page in one piece
            gathered = stack.index_select(2, index).movedim(2, 0).contiguous().view(len(pages), -1)
            last = first + gathered.shape[1]
            for at, row in enumerate(rows):
                host[row, first:last].copy_(gathered[at], non_blocking=True)
            first = last

    def load_back(self, pages: Sequence[int], host: Tensor, rows: Sequence[int]) -> None:
        """The inverse of `back_up`."""
        device = self.key_pages[0].device
        index = torch.tensor(pages, device=device)
        first = 0
        for stack in self.stacks.values():
            shape = stack[:, :, 0].shape
            last = first + shape.numel()
            gathered = torch.empty((len(rows), shape.numel()), dtype=self.dtype, device=device)
            for at, row in enumerate(rows):
                gathered[at].copy_(host[row, first:last], non_blocking=True)
            stack.index_copy_(2, index, gathered.view(len(rows), *shape).movedim(0, 2))
            first = last

    def _on_host(self, page: Bytes) -> Iterator[tuple[Tensor, Tensor]]:
        """Each stack, and its part of a page: (layers, 2 or 1, page size, kv heads, head_dim)."""
        values = torch.from_numpy(page).view(self.dtype)
        for stack in self.stacks.values():
            shape = stack[:, :, 0].shape
            yield stack, values[: shape.numel()].view(shape)
            values = values[shape.numel() :]
