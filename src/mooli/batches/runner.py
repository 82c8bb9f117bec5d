"""A batch as it runs: rows taken in their order, so many at a time, sent, tried again, and kept.

Owns a batch from its input to its results, and how much of it is done. Whoever runs one says what answers a row
(`Send`): a server elsewhere, or an engine of this process. Never knows which, and never prints.

One row never stops the others: what is wrong with it is its answer. What stops a batch is what would fail every row:
a server that is gone, a full disk. Everything that was answered is kept then, and the same batch goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mooli.batches.order import Group, Kept, Placed, RowIndex
from mooli.batches.output import (
    OK,
    SYNC_INTERVAL_S,
    Journal,
    ResultFiles,
    answer_line,
    lost_line,
    write_results,
    written_before,
)
from mooli.batches.rows import MAX_LINE_BYTES, Row, seeded
from mooli.errors import BatchError

Send = Callable[[str, dict[str, Any]], Awaitable[tuple[int, Any]]]
"""From a row's url and body to a status and a body. A connection that breaks raises OSError (ConnectionError,
TimeoutError and the like). Anything else that is raised ends the run."""

Wait = Callable[[float], Awaitable[object]]

TRIED_AGAIN = frozenset({429, 502, 503, 529})
"""Statuses by which a server says that the same may be sent again."""

LINES_AT_A_TIME = 256
"""Of one answer that many rows have asked for, until others get their turn."""

CANCEL_AGAIN_S = 1.0

LEAST_LOST = 8
"""When so many rows, or twice as many as are sent at a time, were given up one after the other, it is asked whether
anybody is there."""


@dataclass(frozen=True, slots=True)
class Retries:
    """attempts: sendings of a row, the first one counted. first_s: seconds until the second; each pause is twice the
    one before, up to longest_s, and cut at random by up to a half. With the defaults a row has about a minute."""

    attempts: int = 9
    first_s: float = 0.5
    longest_s: float = 30.0

    def pause_s(self, attempt: int) -> float:
        """After the sending of that number, from 1."""
        return min(self.longest_s, self.first_s * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)


@dataclass(slots=True)
class Progress:
    """How much of a batch is done.

    total: lines of the input that are not blank. done: those with a line in the results, of an earlier run too. failed:
    of these, what did not get 200. already: of these, before this run. sent: rows that this run had answered; equal
    ones count once. The tokens are those of answers in this run. retried: sendings that had to be repeated.
    """

    total: int = 0
    done: int = 0
    failed: int = 0
    already: int = 0
    sent: int = 0
    retried: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def count_tokens(self, body: Any) -> None:
        """Of an answer's `usage`, in the names of chats or of the Responses API."""
        usage = body.get("usage") if isinstance(body, dict) else None
        if not isinstance(usage, dict):
            return
        self.prompt_tokens += _count(usage, "prompt_tokens") or _count(usage, "input_tokens")
        self.completion_tokens += _count(usage, "completion_tokens") or _count(usage, "output_tokens")
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
        self.cached_tokens += _count(details, "cached_tokens") if isinstance(details, dict) else 0


def _count(numbers: Mapping[str, Any], name: str) -> int:
    value = numbers.get(name)
    return value if isinstance(value, int) else 0


class Batch:
    """The rows of a file, and what is kept of their answers. As a context manager: closed on the way out, and what was
    kept stays.

        with Batch(source, journal, files) as batch:
            if batch.num_pending:
                batch.begin(settings, created)
                await batch.run(send, max_concurrency=8)
            batch.finish()

    Reading a long file takes a while, with the interpreter to itself: make it on another thread where that matters.
    Use it on one thread at a time.

    source: the input. journal: where answers are kept until `finish`; it is locked meanwhile. files: the results.
    anew: what was kept is let go.
    Raises BatchError, where the input cannot be read, or another process writes the same batch.
    """

    def __init__(
        self,
        source: Path,
        journal: Path,
        files: ResultFiles,
        *,
        anew: bool = False,
        max_line_bytes: int = MAX_LINE_BYTES,
    ) -> None:
        self._files = files
        with contextlib.ExitStack() as stack:
            self.journal = stack.enter_context(Journal(journal))
            self.index = stack.enter_context(RowIndex(source, max_line_bytes=max_line_bytes))
            if anew:
                self.journal.clear()
            num_kept = self.index.take(self.journal.kept())
            self._stack = stack.pop_all()
        done = num_kept + self.index.num_refused
        self.progress = Progress(total=self.index.num_rows, done=done, already=done, failed=self._num_failed)

    def __enter__(self) -> Batch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """What was kept stays, for a batch of the same input and journal."""
        self._stack.close()

    @property
    def num_pending(self) -> int:
        """Rows that have no answer yet."""
        return self.progress.total - self.progress.done

    @property
    def _num_failed(self) -> int:
        return self.index.num_failed + self.index.num_refused

    def has_results(self) -> bool:
        """Whether the results are there already, of all rows that the input has now: then nothing is left to be done,
        and `progress` says so. Not of a batch that has begun. Raises BatchError where they cannot be read."""
        num_lines = 0

        def counted() -> Iterator[Kept]:
            nonlocal num_lines
            for kept in written_before(self._files):
                num_lines += 1
                yield kept

        done = self.index.take(counted()) + self.index.num_refused
        if not done == num_lines == self.progress.total:
            self.index.forget()
            return False
        self.progress.done = self.progress.already = done
        self.progress.failed = self._num_failed
        return True

    @property
    def has_begun(self) -> bool:
        """In this run or in an earlier one."""
        return self.journal.created is not None

    def begin(self, settings: Mapping[str, Any], created: int) -> None:
        """settings: everything beside the rows that decides what their answers are, in values of JSON. created: the
        time in seconds since the epoch; a batch that goes on keeps its own.

        Raises BatchError where the batch was begun with other settings.
        """
        self.journal.begin(settings, created)

    async def run(
        self,
        send: Send,
        *,
        max_concurrency: int,
        seed: int | None = None,
        retries: Retries = Retries(),
        on_progress: Callable[[Progress], object] = lambda progress: None,
        wait: Wait = asyncio.sleep,
    ) -> None:
        """Have all rows answered that are not; after `begin`. When it is cancelled, what was answered is kept.

        max_concurrency: rows that are sent at the same time. seed: rows that bring none get one that is drawn from it
        and what they ask for; None: rows are sent as they are. on_progress: called after each answer.
        Raises BatchError for what would fail every row, and what `send` raises besides OSError.
        """
        running = _Running(self, send, max_concurrency, seed, retries, on_progress, wait)
        tasks = [asyncio.ensure_future(running.work()) for _ in range(min(max_concurrency, max(self.num_pending, 1)))]
        syncing = asyncio.ensure_future(self._keep_synced())
        try:
            await _all_of(tasks, syncing)
            await running.judge()
        finally:
            running.is_over = True
            await _end({*tasks, syncing})
            self.journal.sync()

    def give_up(self, code: str, message: str) -> None:
        """The rows that have no answer get this error for one. Not while the batch runs; the batch has begun.

        Raises BatchError where the disk does not take it.
        """
        for group in self.index.groups():
            for placed in self.index.rows_of(group):
                self.keep(placed, lost_line(placed, code, message), failed=True)

    def keep(self, placed: Placed, line: bytes, *, failed: bool) -> None:
        """Keep the line of one row. Raises BatchError where the disk does not take it."""
        self.index.answered(placed.number, self.journal.add(line), len(line), failed=failed)
        self.progress.done += 1
        self.progress.failed += failed

    def finish(self) -> None:
        """Write the results of a batch that is done, and let go of what was kept. It may be repeated if it fails.

        Raises BatchError where the disk does not take them.
        """
        if self.num_pending:
            raise BatchError(f"{self.num_pending} rows have no answer yet: run the batch to its end first")
        write_results(self.index, self.journal, self._files)

    async def _keep_synced(self) -> None:
        while True:
            await asyncio.sleep(SYNC_INTERVAL_S)
            await asyncio.to_thread(self.journal.sync)


async def _all_of(tasks: Sequence[asyncio.Future[None]], beside: asyncio.Future[None]) -> None:
    """Until all `tasks` have ended; raises what one of them, or `beside`, raises first."""
    left: set[asyncio.Future[None]] = {*tasks, beside}
    while left != {beside}:
        ended, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()


async def _end(tasks: set[asyncio.Future[None]]) -> None:
    """Cancel them, and wait until they have ended. Again after a while: what a row is sent through may take being
    cancelled for an end of its own."""
    while tasks:
        for task in tasks:
            task.cancel()
        ended, tasks = await asyncio.wait(tasks, timeout=CANCEL_AGAIN_S)
        for task in ended:
            if not task.cancelled():
                task.exception()  # it was raised before, or is of one that had to end anyway


@dataclass(frozen=True, slots=True)
class _Lost:
    """A row whose every sending has failed, for all rows that ask for the same. answer: the last status and body, None
    where no answer came; why: what came instead."""

    group: Group
    answer: tuple[int, Any] | None
    why: str


class _Running:
    """One run of a batch, shared by all who take rows."""

    def __init__(
        self,
        batch: Batch,
        send: Send,
        max_concurrency: int,
        seed: int | None,
        retries: Retries,
        on_progress: Callable[[Progress], object],
        wait: Wait,
    ) -> None:
        self._batch = batch
        self._index = batch.index
        self._progress = batch.progress
        self._send = send
        self._seed = seed
        self._retries = retries
        self._on_progress = on_progress
        self._wait = wait
        self._groups: Iterator[Group] = batch.index.groups()
        self.is_over = False
        """No more rows are taken."""
        self._most_lost = max(LEAST_LOST, 2 * max_concurrency)
        self._known: tuple[str, dict[str, Any]] | None = None
        """What was sent and answered last."""
        self._lost: list[_Lost] = []
        """Rows given up since the last answer: theirs is a fault of their own only if others are answered."""
        if batch.journal.created is None:
            raise BatchError("the batch was not begun")
        self._created = batch.journal.created

    async def work(self) -> None:
        """Take rows until there are none."""
        for group in self._groups:
            if self.is_over:
                return
            first = next(self._index.rows_of(group), None)
            if first is None:
                continue
            url, body = first.row.url, self._body(first.row, group.work)
            del first
            answer, why = await self._answer(url, body)
            if answer is None or answer[0] in TRIED_AGAIN:
                self._lost.append(_Lost(group, answer, why))
                if len(self._lost) >= self._most_lost:
                    await self.judge()
                continue
            await self._keep(group, answer, why)
            if answer[0] == OK:
                self._known = (url, body)
            await self._keep_lost()

    def _body(self, row: Row, work: bytes) -> dict[str, Any]:
        return row.body if self._seed is None else seeded(row.body, work, self._seed)

    async def _answer(self, url: str, body: dict[str, Any]) -> tuple[tuple[int, Any] | None, str]:
        """The last answer, or None and why none came."""
        attempt = 1
        while True:
            answer, why = None, ""
            try:
                answer = await self._send(url, body)
            except (OSError, asyncio.TimeoutError) as exc:
                why = str(exc) or type(exc).__name__
            if (answer is not None and answer[0] not in TRIED_AGAIN) or attempt >= self._retries.attempts:
                return answer, why
            self._progress.retried += 1
            await self._wait(self._retries.pause_s(attempt))
            attempt += 1

    async def judge(self) -> None:
        """Whether the rows given up are wrong themselves, or nobody is there who could answer any: a row that was
        answered before is sent again. Raises BatchError if that is not answered either."""
        if not self._lost:
            return
        known = self._known
        if known is None:
            placed = self._index.answered_row()
            known = None if placed is None else (placed.row.url, self._body(placed.row, placed.row.work))
        answer = None if known is None else (await self._answer(*known))[0]
        if self._lost and (answer is None or answer[0] in TRIED_AGAIN):
            raise self._unanswered()
        await self._keep_lost()

    async def _keep_lost(self) -> None:
        while self._lost:
            lost = self._lost.pop()
            await self._keep(lost.group, lost.answer, lost.why)

    def _unanswered(self) -> BatchError:
        last, times = self._lost[-1], self._retries.attempts
        said = last.why if last.answer is None else f"status {last.answer[0]}"
        return BatchError(
            f"no row is answered any more ({len(self._lost)} in a row, each sent {times} times): {said}."
            " What is done is kept: run the same again when rows are answered"
        )

    async def _keep(self, group: Group, answer: tuple[int, Any] | None, why: str) -> None:
        for count, _ in enumerate(self._lines(group, answer, why), start=1):
            if count % LINES_AT_A_TIME == 0:
                await asyncio.sleep(0)

    def _lines(self, group: Group, answer: tuple[int, Any] | None, why: str) -> Iterator[None]:
        """Keep the line of one row of the group after the other."""
        progress = self._progress
        progress.sent += 1
        if answer is not None:
            progress.count_tokens(answer[1])
        for placed in self._index.rows_of(group):
            if answer is None:
                line = lost_line(placed, "connection_failed", f"no answer came: {why}")
            else:
                line = answer_line(placed, *answer, self._created)
            self._batch.keep(placed, line, failed=answer is None or answer[0] != OK)
            self._on_progress(progress)
            yield
