"""What an engine keeps of its KV cache on disk: whether, where and how much, and the threads for it.

Owns the decision what of the arguments holds, and the line in the log that says so. A folder that was asked for and
cannot be used ends the start; one that is used by default does not.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from mooli.backends.base import CacheSpec
from mooli.cache.kv_cache import KVCache
from mooli.cache.store.encryption import PageKeys
from mooli.cache.store.folder import FOLDER_VARIABLE, default_folder
from mooli.cache.store.page_store import PageStore
from mooli.cache.store_io import StoreIO
from mooli.config import KV_CACHE_AUTO, KV_CACHE_NONE, EngineConfig
from mooli.engine.facts import CacheNamespace
from mooli.errors import StoreError
from mooli.scheduler.disk_tier import DiskTier
from mooli.scheduler.host_tier import HostTier
from mooli.scheduler.speed import BreakEven
from mooli.scheduler.write_behind import PageBytes

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
    config: EngineConfig,
    cache: KVCache,
    pages: PageBytes,
    page_bytes: int,
    spec: CacheSpec,
    namespace: CacheNamespace,
    step_tokens: int,
    host: HostTier | None = None,
) -> DiskTier | None:
    """The store of an engine whose pool is allocated; None where nothing is kept. host: the tier between, if any.

    pages: of the pool, page_bytes each, those of all ranks in one.

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
    if config.disable_radix_cache:
        logger.warning("the KV cache is not kept on disk: disable_radix_cache shares nothing between requests")
        return None
    # Never without encryption where it was asked for.
    keys = None if config.kv_cache_key_file is None else PageKeys.read(Path(config.kv_cache_key_file).expanduser())
    ingredients = {"name": Path(config.model_path).name, **namespace.to_dict()}

    def opened(root: bytes, record_bytes: int, **more: str) -> PageStore:
        return PageStore.open(
            folder,
            root,
            page_tokens=spec.page_size,
            page_bytes=record_bytes,
            max_bytes=config.kv_cache_max_bytes,
            min_free_bytes=config.kv_cache_min_free_bytes,
            ttl_s=config.kv_cache_ttl or None,
            ingredients={**ingredients, **more},
            keys=keys,
        )

    states = None
    try:
        store = opened(namespace.root, page_bytes)
        try:
            if spec.state_bytes:
                states = opened(namespace.state_root, spec.state_bytes, states_of=store.room.name)
        except BaseException:
            store.close()
            raise
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
        (found.num_bytes + (states.stats.num_bytes if states is not None else 0)) / 1e9,
    )
    even = BreakEven(page_bytes / spec.page_size, step_tokens)
    io = StoreIO(store, page_bytes, states)
    return DiskTier(cache, io, pages, page_bytes, namespace.root, even, state_bytes=spec.state_bytes, host=host)
