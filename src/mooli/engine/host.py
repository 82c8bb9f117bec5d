"""What an engine keeps of its KV cache in the host's memory, below a pool on a device: whether and how much.

Owns the decision what of the arguments holds, and the line in the log that says so. It is only there where it was asked
for, so that what cannot be had ends the start.
"""

from __future__ import annotations

import logging
from typing import cast

from mooli.backends.base import Backend, CacheSpec, OffloadingBackend
from mooli.backends.host_memory import host_memory
from mooli.cache.host_pool import HostPool
from mooli.cache.kv_cache import KVCache
from mooli.config import HICACHE_RATIO, HICACHE_WRITE_POLICY, EngineConfig
from mooli.errors import ConfigError, OutOfMemoryError
from mooli.scheduler.host_tier import LEAST_COPY_S, SUPPOSED_COPY_BYTES_PER_S, HostPolicy, HostTier
from mooli.scheduler.speed import BreakEven

logger = logging.getLogger(__name__)

GB = 10**9
"""Of `hicache_size`, as SGLang counts."""


def open_host(
    config: EngineConfig, cache: KVCache, backend: Backend, spec: CacheSpec, root: bytes, step_tokens: int
) -> HostTier | None:
    """The host's memory of an engine whose pool is allocated; None where it was not asked for. root: of the engine
    (`CacheNamespace.root`).

    Raises ConfigError where the model or the size cannot be kept so, OutOfMemoryError where the host has too little.
    """
    if not config.enable_hierarchical_cache:
        return None
    if spec.state_layers:
        raise ConfigError(
            "enable_hierarchical_cache is not possible yet for models with recurrent layers, whose states are in no"
            " page: leave it out"
        )
    page_bytes = backend.kv_bytes_per_page(spec)
    num_pages = _num_pages(config, cache.num_pages, page_bytes)
    num_bytes, available = num_pages * page_bytes, host_memory().available_bytes
    if num_bytes > available:
        raise OutOfMemoryError(
            f"the KV cache in the host's memory would take {num_bytes / GB:.2f} GB, and {available / GB:.2f} GB are"
            " available: lower hicache_size or hicache_ratio"
        )
    offloading = cast(OffloadingBackend, backend)  # `Ability.has_host_tier`
    offloading.allocate_host(num_pages)
    policy = HostPolicy(config.hicache_write_policy or HICACHE_WRITE_POLICY)
    logger.info(
        "KV cache in the host's memory: %d tokens, %.2f GB, %s",
        num_pages * spec.page_size,
        num_bytes / GB,
        policy.value,
    )
    even = BreakEven(page_bytes / spec.page_size, step_tokens, LEAST_COPY_S, SUPPOSED_COPY_BYTES_PER_S)
    return HostTier(cache, HostPool(num_pages), offloading, page_bytes, root, policy, even)


def _num_pages(config: EngineConfig, pool_pages: int, page_bytes: int) -> int:
    if config.hicache_size:
        num_pages = int(config.hicache_size * GB) // page_bytes
        if not num_pages:
            raise ConfigError(
                f"hicache_size={config.hicache_size} GB holds no page, which takes {page_bytes / GB:.3g} GB: raise it"
            )
        return num_pages
    ratio = HICACHE_RATIO if config.hicache_ratio is None else config.hicache_ratio
    return max(1, int(ratio * pool_pages))
