"""Where an engine keeps its KV cache on disk, and when it keeps none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from mooli.backends.base import CacheSpec, StateLayer
from mooli.cache.kv_cache import KVCache
from mooli.config import EngineConfig
from mooli.engine.disk import FOLDER_VARIABLE, SGLANG_FOLDER_VARIABLE, kv_cache_folder, open_disk
from mooli.engine.facts import CacheNamespace
from mooli.errors import ConfigError, StoreError
from steps import uniform_cache

SPEC = uniform_cache(2, 1, 16, 32, "float32")
NAMESPACE = CacheNamespace(
    model="a",
    load_format="auto",
    seed=None,
    numbers="b",
    backend="cpu",
    dtype="auto",
    quantization=None,
    kv_cache_dtype="float32",
    page_size=32,
    parts=1,
    page_format={},
    numeric_version=1,
)


class Backend:
    """What is asked of one here."""

    def kv_bytes_per_page(self, spec: CacheSpec) -> int:
        return 1024


def config(**arguments: Any) -> EngineConfig:
    return EngineConfig.from_kwargs(model_path="m", kv_cache_min_free_bytes=0, **arguments)


def opened(given: EngineConfig, spec: CacheSpec = SPEC) -> bool:
    disk = open_disk(given, KVCache(4, 32), Backend(), spec, NAMESPACE, 512)  # type: ignore[arg-type]
    if disk is not None:
        disk.close(60.0)
    return disk is not None


def test_the_folder_is_the_one_that_is_named_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (FOLDER_VARIABLE, SGLANG_FOLDER_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kv_cache_folder(config()) is None
    assert kv_cache_folder(config(kv_cache_dir="none")) is None
    assert kv_cache_folder(config(kv_cache_dir="auto")) == tmp_path / "mooli" / "kv"
    assert kv_cache_folder(config(hicache_storage_backend="file")) == tmp_path / "mooli" / "kv"
    assert kv_cache_folder(config(kv_cache_dir="/a")) == Path("/a")
    assert kv_cache_folder(config(kv_cache_dir="~/a")) == Path.home() / "a"
    monkeypatch.setenv(SGLANG_FOLDER_VARIABLE, "/b")
    assert kv_cache_folder(config(kv_cache_dir="auto")) == tmp_path / "mooli" / "kv"
    assert kv_cache_folder(config(hicache_storage_backend="file")) == Path("/b")
    assert kv_cache_folder(config(hicache_storage_backend="file", kv_cache_dir="none")) is None
    monkeypatch.setenv(FOLDER_VARIABLE, "/c")
    assert kv_cache_folder(config(kv_cache_dir="auto")) == Path("/c")
    assert kv_cache_folder(config(kv_cache_dir="/a")) == Path("/a")
    assert kv_cache_folder(config()) is None
    monkeypatch.setenv(FOLDER_VARIABLE, "none")
    assert kv_cache_folder(config(kv_cache_dir="auto")) is None


def test_a_store_is_opened_where_it_is_asked_for(tmp_path: Path) -> None:
    assert not opened(config())
    assert opened(config(kv_cache_dir=str(tmp_path / "kv")))
    assert (tmp_path / "kv").is_dir()


@pytest.mark.parametrize(
    ("arguments", "spec", "why"),
    [
        ({"disable_radix_cache": True}, SPEC, "shares nothing"),
        ({"device": "torch", "tp_size": 2}, SPEC, "cut in 2 parts"),
        ({}, CacheSpec((*SPEC.layers, StateLayer((3, 4))), 32, "float32"), "recurrent layers"),
    ],
)
def test_what_cannot_be_kept_is_said_in_one_line(
    arguments: dict[str, Any], spec: CacheSpec, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "kv"))
    with caplog.at_level(logging.WARNING):
        assert not opened(config(kv_cache_dir="auto", **arguments), spec)
    assert len(caplog.records) == 1 and why in caplog.records[0].message
    assert not (tmp_path / "kv").exists()


def test_a_folder_that_cannot_be_used_ends_the_start_only_if_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "kv"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(StoreError, match="others can write"):
        opened(config(kv_cache_dir=str(folder)))
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    with caplog.at_level(logging.WARNING):
        assert not opened(config(kv_cache_dir="auto"))
    assert len(caplog.records) == 1 and "others can write" in caplog.records[0].message


@pytest.mark.parametrize("arguments", [{"disable_radix_cache": True}, {"device": "torch", "tp_size": 2}])
def test_a_folder_that_would_have_no_effect_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dir='/a'"):
        config(kv_cache_dir="/a", **arguments)
