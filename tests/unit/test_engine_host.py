"""Whether an engine keeps its KV cache in the host's memory below a device, and how much of it."""

from __future__ import annotations

from typing import Any

import pytest

from mooli.backends.base import CacheSpec, MemoryInfo, StateLayer
from mooli.cache.kv_cache import KVCache
from mooli.config import EngineConfig
from mooli.engine import host
from mooli.engine.host import open_host
from mooli.errors import ConfigError, OutOfMemoryError
from mooli.scheduler.host_tier import HostPolicy, HostTier
from steps import uniform_cache

SPEC = uniform_cache(2, 1, 16, 32, "float32")
PAGE_BYTES = 1_000_000


class Backend:
    """What is asked of one here."""

    num_rows = 0

    def kv_bytes_per_page(self, spec: CacheSpec) -> int:
        return PAGE_BYTES

    def allocate_host(self, num_rows: int) -> None:
        self.num_rows = num_rows


def opened(spec: CacheSpec = SPEC, **arguments: Any) -> HostTier | None:
    config = EngineConfig.from_kwargs(model_path="m", device="torch", **arguments)
    backend: Any = Backend()
    tier = open_host(config, KVCache(10, 32), backend, spec, bytes(32), 512)
    assert backend.num_rows == (0 if tier is None else tier.num_pages)
    return tier


@pytest.mark.parametrize(
    ("arguments", "num_pages", "policy"),
    [
        ({}, 20, HostPolicy.WRITE_THROUGH),
        ({"hicache_ratio": 0.01, "hicache_write_policy": "write_back"}, 1, HostPolicy.WRITE_BACK),
        ({"hicache_ratio": 0.5, "hicache_size": 0}, 5, HostPolicy.WRITE_THROUGH),
        (
            {"hicache_ratio": 0.5, "hicache_size": 0.0335, "hicache_write_policy": "write_through_selective"},
            33,
            HostPolicy.WRITE_THROUGH_SELECTIVE,
        ),
    ],
)
def test_its_size_is_that_of_the_ratio_or_the_memory_given(
    arguments: dict[str, Any], num_pages: int, policy: HostPolicy
) -> None:
    tier = opened(enable_hicache=True, **arguments)
    assert tier is not None and (tier.num_pages, tier.policy) == (num_pages, policy)


def test_it_is_there_where_it_was_asked_for_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened() is None
    recurrent = CacheSpec((*SPEC.layers, StateLayer((3, 4))), 32, "float32")
    with pytest.raises(ConfigError, match="recurrent layers"):
        opened(recurrent, enable_hierarchical_cache=True)
    with pytest.raises(ConfigError, match="holds no page"):
        opened(enable_hierarchical_cache=True, hicache_size=0.0005)
    monkeypatch.setattr(host, "host_memory", lambda: MemoryInfo(10**8, 15_000_000, 0))
    with pytest.raises(OutOfMemoryError, match=r"would take 0\.02 GB, and 0\.01 GB are available"):
        opened(enable_hierarchical_cache=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_hierarchical_cache": True}, "no effect on device 'cpu': the KV cache lies in the host's memory"),
        ({"hicache_ratio": 2.0, "device": "reference"}, "hicache_ratio=2.0 has no effect on device 'reference'"),
        ({"hicache_size": 3, "device": "npu"}, "hicache_size=3.0 has no effect without enable_hierarchical_cache"),
        ({"enable_hicache": True, "device": "npu", "disable_radix_cache": True}, "with disable_radix_cache"),
        ({"enable_hicache": True, "device": "torch", "tp_size": 2}, "not possible with tp_size=2"),
        ({"enable_hicache": True, "device": "npu", "hicache_write_policy": "write_around"}, "write_through_selective"),
    ],
)
def test_what_would_have_no_effect_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_kwargs(model_path="m", **arguments)
