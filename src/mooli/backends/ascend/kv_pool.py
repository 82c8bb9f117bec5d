"""The KV pool as the NPU's operations see it: pages of 128 tokens, plain layout, the caches of a layer contiguous.

Owns the views that operations take and the fused store. Not tried on hardware.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mooli.backends.ascend.bring_up import Npu
from mooli.backends.ascend.paths import STORE, Switches
from mooli.backends.base import CacheSpec
from mooli.backends.latent import LatentLayer
from mooli.backends.torch.kv_pool import KVPool
from mooli.errors import ConfigError

MOST_VALUES = 2**31 - 1
"""Values that one layer's keys, or values, may have: the attention kernels count them in 32 bits."""


class AscendKVPool(KVPool):
    """Page `num_pages` is spare: padding rows of captured steps store there."""

    def __init__(self, spec: CacheSpec, num_pages: int, npu: Npu, switches: Switches) -> None:
        """Raises ConfigError for more pages than kernels can count in, OutOfMemoryError if the device is full."""
        widest = max(
            layer.width if isinstance(layer, LatentLayer) else layer.num_kv_heads * layer.head_dim
            for layer in spec.paged_layers()
        )
        most = MOST_VALUES // (spec.page_size * widest) - 1
        if num_pages > most:
            raise ConfigError(
                f"the KV cache would have {num_pages} pages, and the NPU's attention takes at most {most} of this"
                f" model: lower max_total_tokens to {most * spec.page_size} or mem_fraction_static"
            )
        super().__init__(spec, num_pages, npu.device, 1)
        if not npu.is_simulated:
            # Kernels get lengths; what they do with numbers behind them is not documented. The simulated pool stays
            # full of NaN, so that a read too far is seen.
            for stack in self.stacks.values():
                stack.zero_()
        self.key_rows = [keys.view(*keys.shape[:2], -1) for keys in self.key_pages]
        """Per layer (pages, 128, kv heads * head_dim)."""
        self.value_rows = [values.view(*values.shape[:2], -1) for values in self.value_pages]
        is_half = self.dtype in (torch.float16, torch.bfloat16)
        self._is_fused = is_half and switches.is_on(STORE)

    def store(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        if not self._is_fused:
            super().store(layer, slots.long(), k, v)
            return
        shape = (len(k), *self.key_pages[layer].shape[2:])
        torch.ops.atb._npu_reshape_and_cache(
            key=k.contiguous().view(shape),
            value=v.contiguous().view(shape),
            key_cache=self.key_pages[layer],
            value_cache=self.value_pages[layer],
            slot_indices=slots,
        )
