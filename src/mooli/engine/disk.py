"""What an engine keeps of its KV cache on disk: whether, where and how much, and the threads for it.

Owns the decision what of the arguments holds, and the line in the log that says so. A folder that was asked for and
cannot be used ends the start; one that is used by default does not.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from mooli.backends.base import Backend, CacheSpec
from mooli.cache.kv_cache import KVCache
from mooli.cache.store.encryption import PageKeys
from mooli.cache.store.folder import FOLDER_VARIABLE, default_folder
from mooli.cache.store.page_store import PageStore
from mooli.cache.store_io import StoreIO
from mooli.config import KV_CACHE_AUTO, KV_CACHE_NONE, EngineConfig
from mooli.engine.facts import CacheNamespace
from mooli.errors import StoreError
from mooli.scheduler.disk_tier import DiskTier
from mooli.scheduler.speed import BreakEven

logger = logging.getLogger(__name__)

SGLANG_FOLDER_VARIABLE = "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"


def kv_cache_folder(config: EngineConfig) -> Path | None:
    """Where pages are kept; None for nowhere."""
    given = config.kv_cache_dir
    if given == KV_CACHE_AUTO or (given is None and config.hicache_storage_backend is not None):
        sglang = os.environ.get(SGLANG_FOLDER_VARIABLE) if config.hicache_storage_backend is not None else None
        given = sglang or os.environ.get(FOLDER_VARIABLE) or None
        if given is None:
            return default_folder()
    return None if given is None or given == KV_CACHE_NONE else Path(given).expanduser()


def open_disk(
    config: EngineConfig, cache: KVCache, backend: Backend, spec: CacheSpec, namespace: CacheNamespace, step_tokens: int
) -> DiskTier | None:
    """The store of an engine whose pool is allocated; None where nothing is kept.

    Raises StoreError where a folder or a key file was named and cannot be used.
    """
    folder = kv_cache_folder(config)
    if folder is None:
        if config.kv_cache_key_file is not None:
            raise StoreError(
                f"kv_cache_key_file={config.kv_cache_key_file!r} encrypts nothing, as nothing is kept on disk: give"
                " kv_cache_dir too, or leave it out"
            )
        return None
    why = _obstacle(config, spec)
    if why is not None:
        logger.warning("the KV cache is not kept on disk: %s", why)
        return None
    page_bytes = backend.kv_bytes_per_page(spec)
    # Never without encryption where it was asked for.
    keys = None if config.kv_cache_key_file is None else PageKeys.read(Path(config.kv_cache_key_file).expanduser())
    try:
        store = PageStore.open(
            folder,
            namespace.root,
            page_tokens=spec.page_size,
            page_bytes=page_bytes,
            max_bytes=config.kv_cache_max_bytes,
            min_free_bytes=config.kv_cache_min_free_bytes,
            ttl_s=config.kv_cache_ttl or None,
            ingredients={"name": Path(config.model_path).name, **namespace.to_dict()},
            keys=keys,
        )
    except StoreError as exc:
        if config.kv_cache_dir not in (None, KV_CACHE_AUTO):
            raise
        logger.warning("the KV cache is not kept on disk: %s", exc)
        return None
    found = store.stats
    logger.info(
        "KV cache on disk: %s has %d tokens of this model, %.2f GB",
        folder,
        found.num_pages * spec.page_size,
        found.num_bytes / 1e9,
    )
    even = BreakEven(page_bytes / spec.page_size, step_tokens)
    return DiskTier(cache, StoreIO(store, page_bytes), backend, page_bytes, namespace.root, even)


def _obstacle(config: EngineConfig, spec: CacheSpec) -> str | None:
    """Why pages of this engine cannot be kept."""
    if config.disable_radix_cache:
        return "disable_radix_cache shares nothing between requests"
    if config.tp_size > 1:
        return f"the model is cut in {config.tp_size} parts, and each process has pages of its own"
    if spec.state_layers:
        return "this model has recurrent layers, whose states are in no page"
    return None
