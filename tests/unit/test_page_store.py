"""The rules of the store of pages on disk: what is kept, what is given, who may write, and what goes."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from cache_files import NAMESPACE, chain, digests, found, open_store, page_after, total_bytes
from mooli import cli
from mooli.cache.store.folder import default_folder
from mooli.cache.store.page_store import PageStore
from mooli.errors import ConfigError, StoreError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kv"


def test_what_is_appended_is_read_back_at_once_and_after_a_restart(folder: Path) -> None:
    pages = chain("a", 30)
    with open_store(folder) as store:
        assert store.append(pages) == 30
        assert store.leading(digests(pages)) == found(store, pages) == 30
    with open_store(folder) as store:
        assert store.leading(digests(pages)) == found(store, pages) == 30
        assert store.stats.pages_read == 30


def test_nothing_is_written_twice(folder: Path) -> None:
    pages = chain("a", 10)
    with open_store(folder) as store:
        assert store.append(pages[:6]) == 6
        assert store.append(pages) == 4
        assert store.append([*pages, *pages]) == 0
        assert store.append([*chain("b", 2), *chain("b", 2)]) == 2
        assert store.stats.pages_written == 12


def test_a_page_without_the_one_before_it_is_refused(folder: Path) -> None:
    pages = chain("a", 5)
    with open_store(folder) as store:
        assert store.append(pages[1:]) == 0
        assert store.append(pages[:2]) == 2
        assert store.append(pages[3:]) == 0
        assert store.leading(digests(pages)) == 2
        assert store.stats.pages_refused == 6


def test_only_the_leading_run_is_found(folder: Path) -> None:
    pages, others = chain("a", 6), chain("b", 6)
    with open_store(folder) as store:
        store.append(pages)
        mixed = [*pages[:3], *others[3:]]
        assert store.leading(digests(mixed)) == found(store, mixed) == 3
        assert store.leading(digests(others)) == found(store, others) == 0
        assert pages[5].digest in store and others[0].digest not in store


def test_a_part_of_a_chain_can_be_read(folder: Path) -> None:
    pages = chain("a", 9)
    with open_store(folder) as store:
        store.append(pages)
        assert found(store, pages[4:]) == 5


def test_other_tokens_than_those_stored_are_a_miss_and_leave_the_page(folder: Path, caplog) -> None:
    pages = chain("a", 4)
    with open_store(folder) as store:
        store.append(pages)
        tokens = [page.tokens for page in pages]
        tokens[2] = bytes(len(tokens[2]))
        assert len(store.read(digests(pages), tokens)) == 2
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert found(store, pages) == 4


def test_pages_of_another_kind_are_refused(folder: Path) -> None:
    page = page_after(bytes(32), 0, "a")
    with open_store(folder) as store:
        for wrong in (
            page._replace(payload=page.payload[1:]),
            page._replace(tokens=b"1234"),
            page._replace(digest=b"short"),
            page._replace(position=-1),
        ):
            with pytest.raises(StoreError):
                store.append([wrong])


def test_what_is_forgotten_is_gone_with_what_continues_it_and_its_bytes_too(folder: Path) -> None:
    pages = chain("a", 8)
    branch = chain("b", 2, after=pages[:2])
    with open_store(folder) as store:
        store.append(pages)
        store.append(branch)
        store.forget(digests(pages[3:4]))
        assert (found(store, pages), found(store, branch)) == (3, 4)
        store.flush()
        files = b"".join(path.read_bytes() for path in folder.rglob("*.pages"))
        assert pages[2].payload in files and not any(page.payload in files for page in pages[3:])
    with open_store(folder) as store:
        assert (found(store, pages), found(store, branch)) == (3, 4)
        assert store.append(pages) == 5 and found(store, pages) == 8


@pytest.mark.slow
def test_the_budget_is_kept_and_the_coldest_go_first(folder: Path) -> None:
    budget = 200_000
    hot = chain("hot", 10)
    with open_store(folder, max_bytes=budget) as store:
        store.append(hot)
        for number in range(80):
            store.append(chain(number, 12))
            store.touch(digests(hot))
            assert total_bytes(folder) <= budget
        assert found(store, hot) == 10 and found(store, chain(1, 12)) == 0
        assert found(store, chain(79, 12)) == 12
        assert store.stats.pages_evicted > 500


def test_a_budget_that_holds_no_page_is_refused(folder: Path) -> None:
    with pytest.raises(StoreError, match="1000 bytes"):
        open_store(folder, max_bytes=1000)


def test_folders_that_others_can_change_and_links_are_refused(folder: Path, tmp_path: Path) -> None:
    folder.mkdir(mode=0o700)
    folder.chmod(0o770)
    with pytest.raises(StoreError, match="others can write"):
        open_store(folder)
    folder.chmod(0o700)
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(StoreError, match="symbolic link"):
        open_store(link)
    file = tmp_path / "file"
    file.write_bytes(b"")
    with pytest.raises(ConfigError):
        open_store(file)


def test_everything_is_for_this_user_alone(folder: Path) -> None:
    with open_store(folder) as store:
        store.append(chain("a", 40))
    modes = {path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")] if path.is_dir()}
    assert modes == {0o700}
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o600}


def test_one_writes_and_a_second_reads_what_is_finished_then_takes_over(folder: Path) -> None:
    now = [1000.0]
    pages = chain("a", 400)
    writer = open_store(folder, clock=lambda: now[0])
    writer.append(pages)
    reader = open_store(folder, clock=lambda: now[0])
    assert writer.stats.is_writer and not reader.stats.is_writer
    some = found(reader, pages)
    assert 0 < some < 400
    assert reader.append(chain("b", 3)) == 0
    writer.close()
    now[0] += 60
    assert reader.append(chain("b", 3)) == 3
    assert reader.stats.is_writer and found(reader, pages) == 400
    reader.close()


def test_a_page_that_nobody_uses_expires_with_its_bytes(folder: Path) -> None:
    now = [1000.0]
    old, used = chain("old", 5), chain("used", 5)
    with open_store(folder, ttl_s=100.0, clock=lambda: now[0]) as store:
        store.append(old)
        store.append(used)
        now[0] += 60
        store.touch(digests(used))
        now[0] += 60
        assert store.leading(digests(old)) == 0 and found(store, used) == 5
        store.flush()
        files = b"".join(path.read_bytes() for path in folder.rglob("*.pages"))
        assert used[0].payload in files and not any(page.payload in files for page in old)
    with open_store(folder, ttl_s=100.0, clock=lambda: now[0]) as store:
        assert found(store, used) == 5
        now[0] += 60
        assert found(store, used) == 0


def test_uses_outlive_a_close_and_come_to_the_disk_now_and_then(folder: Path) -> None:
    now = [1000.0]
    pages = chain("a", 30)
    with open_store(folder, ttl_s=2000.0, clock=lambda: now[0]) as store:
        store.append(pages)
    store = open_store(folder, ttl_s=2000.0, clock=lambda: now[0])
    now[0] += 700
    store.touch(digests(pages))
    store.flush()
    _die(store)
    now[0] += 1500
    with open_store(folder, ttl_s=2000.0, clock=lambda: now[0]) as store:
        assert store.leading(digests(pages)) == 30, "used 1,500 s ago, and written 2,200 s ago"
        now[0] += 400
        store.touch(digests(pages))
    now[0] += 1900
    with open_store(folder, ttl_s=2000.0, clock=lambda: now[0]) as store:
        assert store.leading(digests(pages)) == 30


def test_namespaces_are_apart_and_those_nobody_writes_go_first(folder: Path) -> None:
    budget = 200_000
    other = bytes(reversed(NAMESPACE))
    pages = chain("a", 30)
    with open_store(folder, max_bytes=budget, namespace=other) as store:
        store.append(pages)
        room = store.room
    with open_store(folder, max_bytes=budget) as store:
        assert store.leading(digests(pages)) == 0
        number = 0
        while not store.stats.pages_evicted:
            store.append(chain(number, 10))
            assert total_bytes(folder) <= budget
            number += 1
        assert not list(room.glob("*.pages"))
        assert found(store, chain(number - 1, 10)) == 10
    with open_store(folder, max_bytes=budget, namespace=other) as store:
        assert found(store, pages) == 0


@pytest.mark.slow
def test_random_operations_agree_with_a_dict(folder: Path) -> None:
    draw = random.Random(7)
    trunks = [chain(f"trunk {number}", 12) for number in range(4)]
    chains = [
        chain(f"leaf {n}", draw.randrange(1, 9), after=draw.choice(trunks)[: draw.randrange(13)]) for n in range(60)
    ]
    there: set[bytes] = set()
    store: PageStore = open_store(folder)
    for _ in range(1500):
        pages = draw.choice(chains)[: draw.randrange(1, 22)]
        kind = draw.random()
        if kind < 0.4:
            written = store.append(pages)
            assert written == len({page.digest for page in pages} - there)
            there.update(digests(pages))
        elif kind < 0.9:
            expected = next((n for n, page in enumerate(pages) if page.digest not in there), len(pages))
            assert store.leading(digests(pages)) == found(store, pages) == expected
        elif kind < 0.97:
            gone = draw.choice(pages).digest
            store.forget([gone])
            # what continues it goes with it
            for other in chains:
                ids = digests(other)
                if gone in ids:
                    there.difference_update(ids[ids.index(gone) :])
        else:
            if draw.random() < 0.5:
                store.close()
            else:
                _die(store)
            store = open_store(folder)
    assert len(there) > 100 and store.stats.num_pages == len(there)
    store.close()


def _die(store: PageStore) -> None:
    """As a process does that is killed, but for what it had not buried yet."""
    store.flush()
    writer, lock = store._segments._writer, store._lock
    assert lock is not None
    lock.release()
    if writer is not None:
        os.close(writer._descriptor)


# -- the commands ------------------------------------------------------------------------------------------------------
def _cache(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.main(["cache", *words])
    return status, *capsys.readouterr()


def test_the_command_lists_what_is_kept(folder: Path, capsys) -> None:
    assert _cache(capsys, "ls", "--dir", str(folder))[0] == 0
    with open_store(folder, ingredients={"model": "tiny", "dtype": "bf16"}) as store:
        store.append(chain("a", 5))
        (kept,) = json.loads(_cache(capsys, "ls", "--json", "--dir", str(folder))[1])
        assert kept["writer"] == os.getpid() and kept["num_pages"] == 5
    status, out, _ = _cache(capsys, "ls", "--dir", str(folder))
    assert status == 0 and "tiny" in out and "writes" not in out
    (kept,) = json.loads(_cache(capsys, "ls", "--json", "--dir", str(folder))[1])
    assert kept["name"] == store.room.name and kept["num_pages"] == 5 and kept["num_bytes"] == total_bytes(folder)
    assert kept["ingredients"] == {"model": "tiny", "dtype": "bf16"}


def test_the_command_finds_what_is_not_right(folder: Path, capsys) -> None:
    with open_store(folder) as store:
        store.append(chain("a", 5))
    assert _cache(capsys, "verify", "--dir", str(folder))[:2] == (0, f"{store.room.name}: 5 pages are right\n")
    (path,) = folder.rglob("*.pages")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    status, out, _ = _cache(capsys, "verify", store.room.name[:6], "--dir", str(folder))
    assert status == 1 and "4 pages are right, 1 are not" in out and str(path) in out
    assert path.read_bytes() == data


def test_the_command_removes_what_nobody_writes(folder: Path, capsys) -> None:
    with open_store(folder) as store:
        store.append(chain("a", 5))
        status, _, err = _cache(capsys, "rm", store.room.name, "--yes", "--dir", str(folder))
        assert status == 2 and f"process {os.getpid()} writes" in err
    assert _cache(capsys, "rm", "--dir", str(folder))[0] == 2
    assert _cache(capsys, "rm", "nothing", "--yes", "--dir", str(folder))[0] == 2
    assert _cache(capsys, "rm", store.room.name, "--dir", str(folder))[0] == 2, "nobody was asked"
    with open_store(folder) as store:
        assert found(store, chain("a", 5)) == 5
    assert _cache(capsys, "rm", "--all", "--yes", "--dir", str(folder))[0] == 0
    assert not store.room.exists()


def test_the_usual_folder_is_in_the_cache_of_the_user_or_named_by_the_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MOOLI_KV_CACHE_DIR", raising=False)
    assert default_folder() == tmp_path / "mooli" / "kv"
    monkeypatch.setenv("MOOLI_KV_CACHE_DIR", "none")
    assert default_folder() == tmp_path / "mooli" / "kv"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == Path.home() / ".cache" / "mooli" / "kv"
    monkeypatch.setenv("MOOLI_KV_CACHE_DIR", str(folder))
    assert default_folder() == folder
    with open_store(folder) as store:
        store.append(chain("a", 3))
    assert _cache(capsys, "verify")[1] == f"{store.room.name}: 3 pages are right\n"
