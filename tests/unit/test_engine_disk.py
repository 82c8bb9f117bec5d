"""Where an engine keeps its KV cache on disk, and when it keeps none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mooli import cli
from mooli.backends.base import CacheSpec, StateLayer
from mooli.cache.kv_cache import KVCache
from mooli.cache.page_hash import PageChain, root_of
from mooli.cache.radix_tree import token_key
from mooli.cache.states import StateRoom
from mooli.cache.store.inspection import kept_pages
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


STATES = CacheSpec((*SPEC.layers, StateLayer((3, 4))), 32, "float32")


class Pages:
    """What is asked of them here."""

    def read_pages(self, pages: list[int]) -> Any:
        return np.zeros((len(pages), 1024), np.uint8)

    def read_state(self, slot: int) -> Any:
        return np.zeros(STATES.state_bytes, np.uint8)


def config(**arguments: Any) -> EngineConfig:
    return EngineConfig.from_kwargs(model_path="m", kv_cache_min_free_bytes=0, **arguments)


def opened(given: EngineConfig, spec: CacheSpec = SPEC) -> bool:
    disk = open_disk(given, KVCache(4, 32), Pages(), 1024, spec, NAMESPACE, 512)  # type: ignore[arg-type]
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


def test_recurrent_states_are_beside_the_pages_that_they_come_after_and_go_with_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "kv"
    for _ in range(2):
        cache = KVCache(8, 32, states=StateRoom(1, 0, 4, 64))
        given = config(kv_cache_dir=str(folder))
        disk = open_disk(given, cache, Pages(), 1024, STATES, NAMESPACE, 512)  # type: ignore[arg-type]
        assert disk is not None
        key = token_key(np.arange(130, dtype=np.int32))
        admission = cache.admit("", key, max_matched=129, most_tokens=130)
        assert admission is not None
        cache.begin_step(admission.held, 0, 130, 0)
        cache.end_step(admission.held, 130)
        cache.release(admission.held, key)
        chain = PageChain(root_of(NAMESPACE.root, ""), 32)
        chain.extend(key, 4)
        disk.behind.offer("", key, chain, 4, 0)
        disk.close(60.0)
    pages, states = sorted(kept_pages(folder), key=lambda one: one.states_of is not None)
    assert (pages.num_pages, states.num_pages) == (4, 2) and states.states_of == pages.name
    assert states.ingredients["model"] == pages.ingredients["model"]
    assert cli.main(["cache", "ls", "--dir", str(folder)]) == 0
    assert "2 states" in capsys.readouterr().out
    assert cli.main(["cache", "verify", "--dir", str(folder)]) == 0
    checked = capsys.readouterr().out
    assert f"{pages.name}: 4 pages are right" in checked and f"{states.name}: 2 states are right" in checked
    assert cli.main(["cache", "rm", pages.name, "--yes", "--dir", str(folder)]) == 0
    assert not kept_pages(folder)


def test_what_cannot_be_kept_is_said_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "kv"))
    with caplog.at_level(logging.WARNING):
        assert not opened(config(kv_cache_dir="auto", disable_radix_cache=True))
    assert len(caplog.records) == 1 and "shares nothing" in caplog.records[0].message
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


def test_a_folder_that_would_have_no_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dir='/a'"):
        config(kv_cache_dir="/a", disable_radix_cache=True)
