"""Pages on disk that are encrypted: who can read them, and who cannot."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cache_files import BadReads, chain, digests, found, open_store
from mooli.cache.store.encryption import EXTRA_BYTES, PageKeys
from mooli.cache.store.page_store import PageStore
from mooli.config import EngineConfig
from mooli.engine.build import build_engine
from mooli.errors import StoreError

KEYS = PageKeys(bytes(range(32)))

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 320,
}
SMALL_ENGINE: dict[str, Any] = {"load_format": "dummy", "device": "reference", "max_total_tokens": 1024}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kv"


def test_pages_are_read_back_before_and_after_a_restart_whoever_they_are_of(folder: Path) -> None:
    ours, theirs = chain("a", 12), chain("a", 12, root=bytes(32))
    for _ in range(2):
        with open_store(folder, keys=KEYS) as store:
            store.append([*ours, *theirs])
            store.append(chain("b", 3, after=ours[:5]))
            assert found(store, ours) == found(store, theirs) == 12
            assert found(store, ours[7:]) == 5
            assert store.stats.bytes_read == 29 * len(ours[0].payload)


def test_a_page_does_not_open_for_chains_of_another_root(folder: Path, caplog) -> None:
    pages = chain("a", 12)
    with open_store(folder, keys=KEYS) as store:
        store.append(pages)
        for entry in store._index:
            if entry.position >= 4:
                entry.root = bytes(32)
        assert found(store, pages) == 4
        assert len(caplog.records) == 1


def test_neither_tokens_nor_payloads_are_in_the_files(folder: Path) -> None:
    pages = chain("a", 12)
    with open_store(folder, keys=KEYS) as store:
        store.append(pages)
        data = b"".join(path.read_bytes() for path in store.room.iterdir())
    assert pages[0].digest in data
    assert not any(page.tokens in data or page.payload[40:] in data for page in pages)


def test_pages_of_another_key_and_of_none_are_not_there(folder: Path) -> None:
    pages = chain("a", 5)
    with open_store(folder, keys=KEYS) as store:
        store.append(pages)
    with open_store(folder) as store:
        assert store.leading(digests(pages)) == 0
        store.append(pages)
    with open_store(folder, keys=PageKeys(bytes(32))) as store:
        assert store.leading(digests(pages)) == 0
    with open_store(folder, keys=PageKeys(bytes(range(32)))) as store:
        assert found(store, pages) == 5
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 3


def test_the_same_page_is_never_the_same_bytes(folder: Path) -> None:
    sealed = {KEYS.seal(b"one", b"digest", b"plain") for _ in range(50)}
    assert len(sealed) == 50
    for one in sealed:
        assert len(one) == len(b"plain") + EXTRA_BYTES
        assert KEYS.unseal(b"one", b"digest", one) == b"plain"
        for wrong in (one[:-1] + bytes([one[-1] ^ 1]), bytes([one[0] ^ 1]) + one[1:], b""):
            assert KEYS.unseal(b"one", b"digest", wrong) is None
        assert KEYS.unseal(b"one", b"other", one) is None
        assert KEYS.unseal(b"other", b"digest", one) is None


def test_encrypted_pages_are_carried_on_and_survive_bad_reads(folder: Path) -> None:
    hot = chain("hot", 6)
    with open_store(folder, keys=KEYS, max_bytes=100_000) as store:
        store.append(hot)
        for number in range(60):
            store.append(chain(number, 8))
            store.touch(digests(hot))
        assert found(store, hot) == 6
        assert store.stats.pages_evicted > 100
        store._files = BadReads(0, for_good=True)
        assert found(store, hot) == 0


def test_a_key_file_is_for_its_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(StoreError, match="head -c 32"):
        PageKeys.read(path)
    path.write_bytes(bytes(range(32)))
    path.chmod(0o644)
    with pytest.raises(StoreError, match="chmod 600"):
        PageKeys.read(path)
    path.chmod(0o600)
    assert PageKeys.read(path).fingerprint == KEYS.fingerprint
    path.write_bytes(b"short")
    with pytest.raises(StoreError, match="5 bytes"):
        PageKeys.read(path)
    with pytest.raises(StoreError, match="no file"):
        PageKeys.read(tmp_path)


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(StoreError, match=r"mooli\[encryption\]"):
        PageKeys(bytes(32))


def test_an_engine_that_is_given_a_key_file_encrypts_or_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, key = tmp_path / "model", tmp_path / "key"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SMALL))
    given: dict[str, Any] = {}

    def opened(directory: Path, namespace: bytes, **arguments: Any) -> PageStore:
        given.update(arguments)
        raise StoreError("seen")

    monkeypatch.setattr(PageStore, "open", opened)

    def build(**arguments: Any) -> None:
        build_engine(EngineConfig.from_kwargs(**SMALL_ENGINE, model_path=str(model), **arguments), model).close()

    monkeypatch.setenv("MOOLI_KV_CACHE_DIR", str(tmp_path / "kv"))
    with pytest.raises(StoreError, match="give kv_cache_dir too"):
        build(kv_cache_key_file=str(key))
    with pytest.raises(StoreError, match="head -c 32"):
        build(kv_cache_dir="auto", kv_cache_key_file=str(key))
    assert not given, "nothing was kept without encryption"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o600)
    with pytest.raises(StoreError, match="seen"):
        build(kv_cache_dir=str(tmp_path / "kv"), kv_cache_key_file=str(key))
    assert given["keys"].fingerprint == KEYS.fingerprint and given["ingredients"]["name"] == "model"
    given.clear()
    with pytest.raises(StoreError, match="seen"):
        build(kv_cache_dir=str(tmp_path / "kv"))
    assert given["keys"] is None
