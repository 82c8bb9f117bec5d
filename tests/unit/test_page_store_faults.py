"""The store of pages on disk when things go wrong: processes that stop, files that change, disks that fail, others in
the same folder. Whatever happens: no page but the one asked for, nothing raised, nothing beyond the budget."""

from __future__ import annotations

import errno
import logging
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cache_files import (
    NAMESPACE,
    BadReads,
    Died,
    DyingFiles,
    FaultyFiles,
    QuickFiles,
    ShortWrites,
    SlowFiles,
    chain,
    digests,
    found,
    open_store,
    total_bytes,
)
from mooli.cache.store.page_store import PageStore, StoredPage
from mooli.errors import StoreError

BUDGET = 60_000
TRUNK = chain("trunk", 4)
CHAINS = [chain(f"branch {number}", 3 + number % 5, after=TRUNK[: number % 5]) for number in range(14)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kv"


class Known:
    """What must be there, and what must not, of a store from which nothing is evicted."""

    def __init__(self) -> None:
        self.there: set[bytes] = set()
        self.gone: set[bytes] = set()

    def check(self, store: PageStore) -> None:
        for pages in CHAINS:
            count = found(store, pages)
            assert not self.there.intersection(digests(pages[count:]))
            assert not self.gone.intersection(digests(pages[:count]))

    def unsure(self, gone: list[bytes]) -> None:
        self.there.difference_update(gone)
        self.gone.difference_update(gone)


def work(store: PageStore, draw: random.Random, known: Known, *, steps: int = 6) -> None:
    """Some of all that a store does. Ends with `Died` where its files do."""
    for _ in range(steps):
        pages = draw.choice(CHAINS)[: draw.randrange(1, 9)]
        kind = draw.random()
        if kind < 0.2:
            store.append(chain(draw.random(), 3))
        elif kind < 0.6:
            known.gone.difference_update(digests(pages))
            store.append(pages)
            known.there.update(digests(pages))
        elif kind < 0.75:
            store.touch(digests(pages))
            store.flush()
        elif kind < 0.85:
            first = draw.choice(pages).digest
            gone = {page.digest for one in CHAINS if first in digests(one) for page in one[position(one, first) :]}
            known.unsure(list(gone))
            store.forget([first])
            store.flush()
            known.gone |= gone
        else:
            found(store, pages)


def position(pages: list[StoredPage], digest: bytes) -> int:
    return digests(pages).index(digest)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [False, True])
def test_processes_and_machines_that_stop_anywhere_leave_a_store_that_is_right(tmp_path: Path, machine: bool) -> None:
    """500 ends each, every one in a folder that others have left before."""
    draw = random.Random(11 + machine)
    ends = 0
    for number in range(50):
        folder = tmp_path / str(number)
        budget = BUDGET if number % 2 else 1 << 20
        known = Known()
        for _ in range(10):
            files = DyingFiles(draw.randrange(40), part=draw.choice([0, 1, 100, 290]), lost=draw if machine else None)
            try:
                store = open_store(folder, max_bytes=budget, files=files)
                if budget > BUDGET and not machine:
                    known.check(store)
                else:
                    for pages in CHAINS:
                        found(store, pages)
                work(store, draw, known, steps=8)
                store.close()
            except Died:
                ends += 1
            files.bury()
            assert total_bytes(folder) <= budget
        with open_store(folder, max_bytes=budget) as store:
            assert store.stats.fault is None
            store._index.check()
            for pages in CHAINS:
                found(store, pages)
                if budget > BUDGET:
                    store.append(pages)
                    assert found(store, pages) == len(pages)
        with open_store(folder, max_bytes=budget) as store:
            assert budget == BUDGET or all(found(store, pages) == len(pages) for pages in CHAINS)
    assert ends > 400


@pytest.mark.slow
def test_processes_that_are_killed_lose_nothing_that_was_appended(tmp_path: Path) -> None:
    """30 children that get SIGKILL while they append."""
    program = Path(__file__).with_name("killed_stores.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "30 killed\n"


def test_a_torn_end_is_cut_at_the_next_start(folder: Path) -> None:
    """Also where a machine has stopped, and what was written first has not come to the disk."""
    pages = chain("a", 8)
    files = DyingFiles(None)
    store = open_store(folder, files=files)
    store.append(pages)
    files.bury()
    (path,) = folder.rglob("*.pages")
    data = path.read_bytes()
    for page, start in ((pages[7], 0), (pages[6], 100)):
        at = data.index(page.payload) + start
        data = data[:at] + bytes(50) + data[at + 50 :]
        path.write_bytes(data)
    with open_store(folder) as store:
        assert store.stats.num_pages == 6, "before anything is read"
        assert store.append(pages) == 2 and found(store, pages) == 8
    with open_store(folder) as store:
        assert found(store, pages) == 8


def test_what_a_disk_does_not_sync_is_used_no_more(folder: Path) -> None:
    class Unsynced(QuickFiles):
        def sync(self, descriptor: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_store(folder) as store:
        store.append(CHAINS[0])
    with open_store(folder, files=Unsynced()) as store:
        count = store.append(CHAINS[1])
        assert count and found(store, CHAINS[1]) == len(CHAINS[1])
        store.flush()
        assert store.stats.fault is not None and not store.stats.is_writer
        assert found(store, CHAINS[1]) == 0
        assert store.append(CHAINS[2]) == 0
    assert not list(folder.rglob("*.pages"))


def damage(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    kind = draw.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes(min(len(data) - at, draw.randrange(1, 600))) + data[at + 600 :]
    if kind == 2:
        other = draw.randrange(len(data))
        return data[:at] + data[other : other + 200] + data[at + 200 :]
    changed = bytearray(data)
    for _ in range(1 if kind == 3 else draw.randrange(1, 20)):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


@pytest.mark.slow
def test_2000_damaged_files_are_misses_and_are_mended(folder: Path, caplog) -> None:
    draw = random.Random(5)
    with open_store(folder, max_bytes=BUDGET * 4) as store:
        for pages in CHAINS:
            store.append(pages)
    room = store.room
    whole = {name: (room / name).read_bytes() for name in sorted(os.listdir(room)) if name != "lock"}
    assert sorted(Path(name).suffix for name in whole) == [".index"] * 4 + [".pages"] * 4
    missed = 0
    for number in range(2000):
        for name in os.listdir(room):
            (room / name).unlink()
        damaged = draw.choice(list(whole))
        for name, data in whole.items():
            (room / name).write_bytes(damage(data, draw) if name == damaged else data)
        caplog.clear()
        holder = open_store(folder, max_bytes=BUDGET * 4) if number % 4 == 0 else None
        store = open_store(folder, max_bytes=BUDGET * 4)
        assert store.stats.is_writer == (holder is None)
        missed += sum(len(pages) - found(store, pages) for pages in CHAINS)
        assert len(caplog.records) <= 2 * (1 + (holder is not None))
        if holder is None:
            for pages in CHAINS:
                store.append(pages)
                assert found(store, pages) == len(pages)
            assert store.stats.fault is None
        store.close()
        if holder is not None:
            holder.close()
        if holder is None and number % 8 == 1:
            with open_store(folder, max_bytes=BUDGET * 4) as store:
                assert all(found(store, pages) == len(pages) for pages in CHAINS)
    assert missed > 1000


def fails(store: PageStore, files: FaultyFiles) -> None:
    """From now on these are the store's files."""
    store._files = store._segments._files = files
    if store._segments._writer is not None:
        store._segments._writer._files = files


@pytest.mark.slow
@pytest.mark.parametrize(("error", "for_good"), [(errno.ENOSPC, True), (errno.EIO, False)])
def test_a_write_that_fails_ends_writing_for_a_while_and_nothing_else(
    tmp_path: Path, error: int, for_good: bool, caplog
) -> None:
    """At every call that changes something, one after the other."""
    number, failed, clock = 0, 1, [1.7e9]
    caplog.set_level(logging.INFO)
    while failed:
        folder = tmp_path / str(number)
        files = FaultyFiles(number, error, part=number % 3 * 50, for_good=for_good)
        caplog.clear()
        store = open_store(folder, max_bytes=BUDGET, files=FaultyFiles(None), clock=lambda: clock[0])
        store.append(CHAINS[0])
        fails(store, files)
        draw = random.Random(3)
        before = found(store, CHAINS[0])
        for _ in range(16):
            pages = draw.choice(CHAINS)
            store.append(pages)
            found(store, pages)
            if draw.random() < 0.1:
                store.forget([CHAINS[5][-1].digest])
                store.flush()
            assert total_bytes(folder) <= BUDGET
        failed = files.failed
        if failed:
            assert store.stats.fault is not None and not store.stats.is_writer
            assert store.append(chain("new", 2)) == 0
            clock[0] += 60.0  # once more, at a disk that is well again or is not
            fails(store, FaultyFiles(0, error) if number % 2 else FaultyFiles(None))
            written = [store.append(chain("new", 2)), store.append(chain("new", 2))]
            if number % 2:
                assert written == [0, 0] and store.stats.fault is not None
                fails(store, FaultyFiles(None))
                clock[0] += 119.0
                assert store.append(chain("new", 2)) == 0, "it rests longer each time"
                clock[0] += 1.0
                written = [store.append(chain("new", 2)), 0]
            assert written == [2, 0] and store.stats.fault is None and store.stats.is_writer
            assert found(store, chain("new", 2)) == 2 and total_bytes(folder) <= BUDGET
            assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1
            assert "is written again" in caplog.records[-1].message
        store.close()
        assert before == len(CHAINS[0])
        with open_store(folder, max_bytes=BUDGET) as store:
            assert store.stats.is_writer
            for pages in CHAINS:
                found(store, pages)
            store.append(CHAINS[1])
            assert found(store, CHAINS[1]) == len(CHAINS[1])
            assert total_bytes(folder) <= BUDGET
        number += 1
    assert number > 60


@pytest.mark.parametrize("for_good", [True, False])
def test_a_read_that_fails_is_a_miss(folder: Path, for_good: bool) -> None:
    with open_store(folder) as store:
        for pages in CHAINS:
            store.append(pages)
    number, reached, refused = 0, True, 0
    while reached:
        files = BadReads(number, for_good=for_good)
        try:
            store = open_store(folder, files=files)
        except StoreError:
            refused += 1
        else:
            for pages in CHAINS:
                found(store, pages)
            store.close()
        reached = files.calls > number
        number += 1
    assert number > 20 and refused > 1
    with open_store(folder) as store:
        for pages in CHAINS:
            store.append(pages)
            assert found(store, pages) == len(pages)


def test_writes_that_take_a_few_bytes_at_a_time_write_all(folder: Path) -> None:
    with open_store(folder, files=ShortWrites(37)) as store:
        assert store.append(CHAINS[6]) == len(CHAINS[6])
    with open_store(folder) as store:
        assert found(store, CHAINS[6]) == len(CHAINS[6])


def test_a_disk_that_is_short_of_room_is_left_alone(folder: Path) -> None:
    free = [10 << 20]

    class Disk(QuickFiles):
        def free_bytes(self, folder: Path) -> int:
            return free[0]

    with open_store(folder, files=Disk(), min_free_bytes=5 << 20) as store:
        assert store.append(CHAINS[0]) == len(CHAINS[0])
        free[0] = 4 << 20
        assert store.append(CHAINS[1]) == 0 and store.stats.fault is None
        assert found(store, CHAINS[0]) == len(CHAINS[0])
        free[0] = 10 << 20
        assert store.append(CHAINS[1]) > 0


def test_a_full_disk_takes_the_coldest_segments(folder: Path) -> None:
    needed = [0]

    class Disk(QuickFiles):
        def free_bytes(self, folder: Path) -> int:
            return 300_000 - total_bytes(folder) - needed[0]

    with open_store(folder, max_bytes=250_000, files=Disk(), min_free_bytes=1000) as store:
        for number in range(20):
            store.append(chain(number, 9))
        held = total_bytes(folder)
        needed[0] = 200_000
        store.flush()
        assert total_bytes(folder) <= 99_000 < held
        assert found(store, chain(0, 9)) == 0


def test_segments_that_somebody_removes_are_misses(folder: Path) -> None:
    pages = chain("a", 200)
    with open_store(folder) as store:
        store.append(pages)
        victim = sorted(folder.rglob("*.pages"))[1]
        victim.unlink()
        count = found(store, pages)
        assert 0 < count < 200
        assert store.append(pages) == 200 - count and found(store, pages) == 200
        store.flush()
    with open_store(folder) as store:
        assert found(store, pages) == 200


@pytest.mark.slow
def test_two_servers_of_two_models_share_a_folder_within_its_budget(folder: Path) -> None:
    draw = random.Random(2)
    names = [NAMESPACE, bytes(reversed(NAMESPACE))]
    stores = [open_store(folder, max_bytes=BUDGET, namespace=name) for name in names]
    for step in range(300):
        which = 0 if step < 100 else draw.randrange(2)
        pages = chain(f"{which} {draw.randrange(40)}", draw.randrange(1, 9))
        stores[which].append(pages)
        found(stores[which], pages)
        assert total_bytes(folder) <= BUDGET
        if draw.random() < 0.05:
            stores[which].close()
            stores[which] = open_store(folder, max_bytes=BUDGET, namespace=names[which])
    kept = [store.stats.num_pages for store in stores]
    assert min(kept) > 20, "one that comes late gets room too"
    for store in stores:
        assert store.stats.fault is None
        store.close()


@pytest.mark.slow
def test_readers_on_threads_see_right_pages_while_segments_go(folder: Path) -> None:
    store = open_store(folder, max_bytes=BUDGET)
    failures: list[BaseException] = []
    ready = threading.Barrier(4)

    def read(number: int) -> None:
        draw = random.Random(number)
        try:
            ready.wait()
            for _ in range(300):
                pages = draw.choice(CHAINS)
                found(store, pages)
                store.touch(digests(pages[:2]))
                if draw.random() < 0.05:
                    store.forget([draw.choice(pages).digest])
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    ready.wait()
    draw = random.Random(9)
    for number in range(150):
        store.append(draw.choice(CHAINS))
        store.append(chain(f"other {number}", 6))
        if number % 20 == 0:
            store.flush()
    for thread in threads:
        thread.join()
    assert not failures
    store._index.check()
    assert store.stats.fault is None
    store.close()


def test_a_slow_disk_is_waited_for_only_by_who_writes_or_reads(folder: Path) -> None:
    waits: list[float] = []
    with open_store(folder, files=SlowFiles(5e6, waits.append)) as store:
        store.append(CHAINS[0])
        assert sum(waits) >= len(CHAINS[0]) * 300 / 5e6
        waits.clear()
        store.leading(digests(CHAINS[0]))
        store.touch(digests(CHAINS[0]))
        store.forget(digests(CHAINS[0][2:]))
        assert CHAINS[0][0].digest in store and store.stats.num_pages == 2
        assert not waits
        found(store, CHAINS[0])
        assert waits
