"""Pages on disk that are encrypted: who can read them, and who cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cache_files import BadReads, chain, digests, found, open_store
from mooli.cache.store.encryption import EXTRA_BYTES, PageKeys
from mooli.cache.store.page_store import PageStore, StoredPage
from mooli.errors import StoreError

KEYS = PageKeys(bytes(range(32)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kv"


def of(owner: bytes, pages: list[StoredPage]) -> list[StoredPage]:
    return [page._replace(owner=owner) for page in pages]


def read(store: PageStore, pages: list[StoredPage], owner: bytes) -> list[bytes]:
    return [bytes(one) for one in store.read(digests(pages), [page.tokens for page in pages], owner=owner)]


def test_only_the_owner_reads_a_page_before_and_after_a_restart(folder: Path) -> None:
    pages = chain("a", 12)
    for _ in range(2):
        with open_store(folder, keys=KEYS) as store:
            store.append(of(b"one", pages))
            assert read(store, pages, b"one") == [page.payload for page in pages]
            assert read(store, pages, b"two") == [] == read(store, pages, b"")
            assert store.leading(digests(pages)) == 12, "who asks wrongly takes nothing away"
            assert store.stats.bytes_read == 12 * len(pages[0].payload)


def test_neither_tokens_nor_payloads_are_in_the_files(folder: Path) -> None:
    pages = chain("a", 12)
    with open_store(folder, keys=KEYS) as store:
        store.append(of(b"one", pages))
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
    hot = of(b"one", chain("hot", 6))
    with open_store(folder, keys=KEYS, max_bytes=100_000) as store:
        store.append(hot)
        for number in range(60):
            store.append(chain(number, 8))
            store.touch(digests(hot))
        assert read(store, hot, b"one") == [page.payload for page in hot]
        assert store.stats.pages_evicted > 100
        store._files = BadReads(0, for_good=True)
        assert read(store, hot, b"one") == []


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
