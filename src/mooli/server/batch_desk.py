"""Batches that clients have left with the server: what state each is in, and the work on them.

Owns the records of batches, on disk beside the files, the states they go through, and when each is worked on: of one
owner's the oldest, of several owners' one each at the same time. Rows, journal and results are `mooli.batches`'; what
answers a row, and as whom, is told by whoever starts the work. Never knows HTTP.

What happens is on disk before it is told, so that a process may be killed at any moment: the next one goes on with
every batch from the answers that its journal has. The input is the batch's own: its file may be deleted meanwhile.

Source: OpenAI API reference, batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import msgspec

from mooli.batches.order import Refused
from mooli.batches.output import ResultFiles
from mooli.batches.rows import read_lines
from mooli.batches.runner import Batch, Progress, Send
from mooli.errors import BatchError, RequestError, StorageError
from mooli.server.file_store import FileStore, StoredFile, no_room, put_beside, read_all, write_whole

logger = logging.getLogger(__name__)

T = TypeVar("T")

OUTPUT = "batch_output"
"""The purpose of files that batches write."""

MOST_OPEN = 100
"""Batches of one owner that have not ended."""

MOST_ENDED = 1000
"""Records of one owner's batches that have ended; older ones are let go, and their files stay."""

MOST_ERRORS = 100
"""Lines of an input that are told of where it cannot be used."""

LOOK_S = 30.0
"""Between two looks whether a batch has expired, or can go on where it could not."""

GONE = "the key that made this batch is none of this server's any more"

EXPIRED = ("batch_expired", "the completion window of the batch has ended before this row was answered")
CANCELLED = ("batch_cancelled", "the batch was cancelled before this row was answered")
"""Code and words of rows that are not answered any more."""


class LineError(msgspec.Struct, kw_only=True):
    """What is wrong with an input. line: in it, from 1; None where it is not a single one."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchRecord(msgspec.Struct, kw_only=True):
    """A batch as it is kept. Times are in seconds since the epoch.

    owner: whose it is. key: the name of the key that made it. seed: for rows that bring none. outcome: how it ends,
    where its rows need no more work: the status that it gets when its results are files.
    """

    id: str
    owner: str
    key: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: float
    expires_at: float
    seed: int | None
    metadata: dict[str, str] | None = None
    output_expires_after_s: float | None = None
    status: str = "validating"
    outcome: str = ""
    times: dict[str, float] = {}
    """When it got into each state since."""
    errors: list[LineError] = []
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def is_open(self) -> bool:
        """It has not ended."""
        return self.status in ("validating", "in_progress", "finalizing", "cancelling")

    @property
    def journal_time(self) -> int:
        """When it was begun, for its answers."""
        return int(self.created_at)


class _Url(msgspec.Struct):
    url: Any = None


class Rows(NamedTuple):
    """What answers the rows of a batch, as whoever made it. at_a_time: the most that whoever it is may have there."""

    send: Send
    at_a_time: int


RowsOf = Callable[[BatchRecord], "Rows | None"]
"""None where nobody of the name that made the batch is known any more."""


class BatchDesk:
    """See the module docstring. Lives in the server's event loop.

    files: what clients have sent, and where results go; closed with it. look_s: between two looks at what only time
    changes.
    Raises ConfigError for a folder that cannot be used.
    """

    def __init__(self, files: FileStore, *, look_s: float = LOOK_S) -> None:
        self.files = files
        self._look_s = look_s
        self._path = files.folder.room("batches")
        self._records: dict[str, BatchRecord] = {}
        self._progress: dict[str, Progress] = {}
        """Of those that are worked on."""
        self._asked: dict[str, asyncio.Event] = {}
        """Of those that are worked on: to cancel it was asked."""
        self._workers: dict[str, asyncio.Task[None]] = {}
        """By owner."""
        self._saving = asyncio.Lock()
        self._rows_of: RowsOf | None = None
        self._settings: Mapping[str, Any] = {}
        self._places = asyncio.Semaphore(1)
        self._at_a_time = 1
        self._sweeping: asyncio.Task[None] | None = None
        found = read_all(self._path, BatchRecord)
        for record in sorted(found, key=lambda item: (item.created_at, item.id)):
            self._records[record.id] = record
        for path in self._path.iterdir():
            if path.is_dir() and (path.name not in self._records or not self._records[path.name].is_open):
                shutil.rmtree(path)

    # -- what there is -------------------------------------------------------------------------------------------------
    def get(self, owner: str, batch_id: str) -> BatchRecord | None:
        """None for what is not there, or somebody else's."""
        record = self._records.get(batch_id)
        return record if record is not None and record.owner == owner else None

    def of(self, owner: str) -> list[BatchRecord]:
        """All of them, the newest first."""
        return [record for record in reversed(self._records.values()) if record.owner == owner]

    def counts(self, record: BatchRecord) -> tuple[int, int, int]:
        """Rows in all, those that were answered, and those that have failed."""
        progress = self._progress.get(record.id)
        if progress is None:
            return record.total, record.completed, record.failed
        return progress.total, progress.done - progress.failed, progress.failed

    # -- what clients do -----------------------------------------------------------------------------------------------
    async def create(
        self,
        source: StoredFile,
        *,
        key: str,
        endpoint: str,
        completion_window: str,
        window_s: float,
        seed: int | None,
        metadata: dict[str, str] | None,
        output_expires_after_s: float | None,
    ) -> BatchRecord:
        """A batch of the rows in a file, which is worked on when its turn comes. Raises RequestError where there are
        too many, StorageError."""
        if sum(record.is_open for record in self.of(source.owner)) >= MOST_OPEN:
            raise RequestError(f"there are {MOST_OPEN} batches that have not ended: wait for one, or cancel one")
        now = self.files.clock()
        record = BatchRecord(
            id=f"batch_{secrets.token_hex(12)}",
            owner=source.owner,
            key=key,
            endpoint=endpoint,
            input_file_id=source.id,
            completion_window=completion_window,
            created_at=now,
            expires_at=now + window_s,
            seed=seed,
            metadata=metadata,
            output_expires_after_s=output_expires_after_s,
        )
        room = self._path / record.id
        try:
            await asyncio.to_thread(_prepare, room, self.files.path_of(source.id))
            await self._save(record)
        except OSError as exc:
            await asyncio.to_thread(shutil.rmtree, room, ignore_errors=True)
            raise no_room(room, exc) from exc
        self._records[record.id] = record
        self._prune(record.owner)
        self._wake(record.owner)
        return record

    async def cancel(self, record: BatchRecord) -> None:
        """Have it end soon; what was answered until then is kept. Raises RequestError for one that ends already,
        StorageError."""
        if record.status == "cancelling":
            return
        if record.status not in ("validating", "in_progress") or record.outcome:
            raise RequestError(f"batch {record.id} cannot be cancelled: it is {record.status}")
        before = record.status
        self._turn(record, "cancelling")
        if before == "validating" and record.id not in self._asked:  # nobody has looked at it yet
            self._turn(record, "cancelled")
        try:
            await self._save(record)
        except OSError as exc:
            record.status = before
            raise no_room(self._path, exc) from exc
        if record.id in self._asked:
            self._asked[record.id].set()
        elif not record.is_open:
            await self._clear(record)

    # -- the work ------------------------------------------------------------------------------------------------------
    def start(self, rows_of: RowsOf, settings: Mapping[str, Any], *, at_a_time: int) -> None:
        """Begin to work, with what was there before this process first. settings: on which answers depend beside the
        rows: what was begun with others waits until they are these again. at_a_time: rows of all batches together."""
        self._rows_of, self._settings = rows_of, settings
        self._at_a_time, self._places = at_a_time, asyncio.Semaphore(at_a_time)
        self._sweeping = asyncio.ensure_future(self._sweep())
        for owner in {record.owner for record in self._records.values()}:
            self._wake(owner)

    async def stop(self) -> None:
        """Leave everything as it is, for the next process. It may be called again."""
        self._rows_of = None
        tasks = [*self._workers.values(), *([] if self._sweeping is None else [self._sweeping])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """Another server may have the folder."""
        await self.stop()
        self.files.close()

    async def _sweep(self) -> None:
        while True:
            self.files.sweep()
            await asyncio.sleep(self._look_s)

    def _wake(self, owner: str) -> None:
        if self._rows_of is not None and owner not in self._workers:
            self._workers[owner] = asyncio.ensure_future(self._work(owner))

    async def _work(self, owner: str) -> None:
        try:
            while (record := self._next(owner)) is not None:
                self._asked[record.id] = asyncio.Event()
                try:
                    await self._end(record)
                finally:
                    del self._asked[record.id]
        except Exception:
            logger.exception("the batches of %r are not worked on any more", owner)
            raise
        finally:
            del self._workers[owner]

    def _next(self, owner: str) -> BatchRecord | None:
        """The oldest. It has begun if any has."""
        found = (record for record in self._records.values() if record.owner == owner and record.is_open)
        return next(found, None)

    async def _end(self, record: BatchRecord) -> None:
        """Work on a batch until it has ended. What the disk does not take is tried again."""
        while record.is_open:
            try:
                await self._advance(record)
            except (BatchError, StorageError, OSError) as exc:
                logger.error("%s cannot go on, and is tried again in %g s: %s", record.id, self._look_s, exc)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._asked[record.id].wait(), self._look_s)
                self._asked[record.id].clear()

    async def _advance(self, record: BatchRecord) -> None:
        room = self._path / record.id
        files, journal = ResultFiles(room / "output", room / "errors"), room / "journal"
        if record.outcome and not journal.exists():  # the results were written
            await self._collect(record, files)
            return
        rows = None if self._rows_of is None else self._rows_of(record)
        if rows is None:
            await self._fail(record, [LineError(code="key_gone", message=GONE)])
            return
        source = room / "input"
        batch = await _opened(lambda: Batch(source, journal, files))
        with batch:
            if record.status == "validating":
                errors = await _whole(lambda: _errors_of(batch, source, record.endpoint))
                if errors:
                    await self._fail(record, errors)
                    return
            self._progress[record.id] = batch.progress
            try:
                await self._answer(record, batch, rows)
            finally:
                record.total, record.completed, record.failed = self.counts(record)
                del self._progress[record.id]
        await self._collect(record, files)

    async def _answer(self, record: BatchRecord, batch: Batch, rows: Rows) -> None:
        """Until every row has an answer, or is to have none any more; then write the results."""
        if record.status == "validating":
            self._turn(record, "in_progress")
            await self._save(record)
        if batch.journal.created is None:
            batch.begin(self._settings, record.journal_time)
        if not record.outcome:
            outcome = await self._outcome(record, batch, rows)
            record.total, record.completed, record.failed = self.counts(record)
            if record.status != "cancelling":
                self._turn(record, "finalizing")
            record.outcome = outcome
            await self._save(record)
        if batch.num_pending:
            code, words = EXPIRED if record.outcome == "expired" else CANCELLED
            await _whole(lambda: batch.give_up(code, words))
        await _whole(batch.finish)

    async def _outcome(self, record: BatchRecord, batch: Batch, rows: Rows) -> str:
        async def in_turn(url: str, body: dict[str, Any]) -> tuple[int, Any]:
            async with self._places:
                return await rows.send(url, body)

        asked = self._asked[record.id]
        if record.status == "cancelling":
            return "cancelled"
        if self.files.clock() >= record.expires_at:
            return "expired"
        batch.begin(self._settings, record.journal_time)
        most = min(self._at_a_time, rows.at_a_time)
        running = asyncio.ensure_future(batch.run(in_turn, max_concurrency=most, seed=record.seed))
        asking = asyncio.ensure_future(asked.wait())
        try:
            while True:
                left_s = record.expires_at - self.files.clock()
                await asyncio.wait(
                    [running, asking],
                    timeout=max(0.0, min(self._look_s, left_s)),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if running.done():
                    running.result()
                    return "completed"
                if asked.is_set():
                    return "cancelled"
                if self.files.clock() >= record.expires_at:
                    return "expired"
        finally:
            for task in (running, asking):
                task.cancel()
            await asyncio.gather(running, asking, return_exceptions=True)

    async def _collect(self, record: BatchRecord, files: ResultFiles) -> None:
        """Make files of the results; then the batch has ended."""
        record.output_file_id = await self._keep(record, files.output, "output")
        record.error_file_id = await self._keep(record, files.errors, "errors")
        self._turn(record, record.outcome)
        await self._save(record)
        await self._clear(record)

    async def _keep(self, record: BatchRecord, path: Path, kind: str) -> str | None:
        """The id of the file: the same, however often it is tried. None where there is nothing in it."""
        file_id = f"file-{hashlib.sha256(f'{record.id} {kind}'.encode()).hexdigest()[:24]}"
        if path.exists() and path.stat().st_size:
            await self.files.keep(
                path,
                owner=record.owner,
                filename=f"{record.id}_{kind}.jsonl",
                purpose=OUTPUT,
                expires_after_s=record.output_expires_after_s,
                file_id=file_id,
            )
        return None if self.files.get(record.owner, file_id) is None else file_id

    async def _fail(self, record: BatchRecord, errors: list[LineError]) -> None:
        record.errors = errors
        self._turn(record, "failed")
        await self._save(record)
        await self._clear(record)

    def _turn(self, record: BatchRecord, status: str) -> None:
        record.status = status
        record.times = {**record.times, status: self.files.clock()}

    async def _save(self, record: BatchRecord) -> None:
        """Raises OSError."""
        async with self._saving:
            now = msgspec.Raw(msgspec.json.encode(record))
            await _whole(lambda: write_whole(self._path / f"{record.id}.json", now))

    async def _clear(self, record: BatchRecord) -> None:
        await asyncio.to_thread(shutil.rmtree, self._path / record.id, ignore_errors=True)

    def _prune(self, owner: str) -> None:
        ended = [record for record in self.of(owner) if not record.is_open]
        for record in ended[MOST_ENDED:]:
            (self._path / f"{record.id}.json").unlink(missing_ok=True)
            del self._records[record.id]


# -- on other threads --------------------------------------------------------------------------------------------------
async def _whole(work: Callable[[], T]) -> T:
    """What it returns or raises. Who is cancelled meanwhile waits for its end: what it uses may not go before."""
    working = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])
        raise


async def _opened(open_batch: Callable[[], Batch]) -> Batch:
    """Closed again if nobody waits for it any more."""
    made: list[Batch] = []
    try:
        await _whole(lambda: made.append(open_batch()))
    except asyncio.CancelledError:
        for batch in made:
            batch.close()
        raise
    return made[0]


def _prepare(room: Path, source: Path) -> None:
    """The folder of a batch, with an input of its own. Raises OSError."""
    room.mkdir(mode=0o700)
    put_beside(source, room / "input")


def _errors_of(batch: Batch, source: Path, endpoint: str) -> list[LineError]:
    """Why these rows are no batch for `endpoint`; the first in the file first. Raises BatchError, OSError."""
    if not batch.progress.total:
        return [LineError(code="empty_file", message="the file has no rows")]
    errors: list[LineError] = []
    for refused in batch.index.results(failed=True):
        if isinstance(refused, Refused) and len(errors) < MOST_ERRORS:
            errors.append(LineError(code=refused.code, message=refused.message, line=refused.line))
    refused_lines = {error.line for error in errors}
    with source.open("rb") as file:
        errors += [error for error in _mismatches(file, endpoint) if error.line not in refused_lines]
    return sorted(errors, key=lambda error: error.line or 0)[:MOST_ERRORS]


def _mismatches(file: BinaryIO, endpoint: str) -> list[LineError]:
    found: list[LineError] = []
    decoder = msgspec.json.Decoder(_Url)
    for line in read_lines(file):
        try:
            url = endpoint if line.raw is None else decoder.decode(line.raw.removeprefix(b"\xef\xbb\xbf")).url
        except (msgspec.DecodeError, ValueError, RecursionError):
            continue  # no row at all
        if url != endpoint and isinstance(url, str):
            message = f"url={url[:80]!r} is not the endpoint of the batch, {endpoint}"
            found.append(LineError(code="mismatched_url", message=message, line=line.line, param="url"))
            if len(found) == MOST_ERRORS:
                break
    return found
