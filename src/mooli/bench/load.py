"""Putting a server under load: when requests go out, and at most how many at once.

Owns the arrival processes, the schedule of one run, stopping it early, and giving up when the server is gone. Never
knows HTTP.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mooli.bench.client import UnreachableError
from mooli.bench.errors import BenchmarkError
from mooli.bench.records import BenchRequest, RequestRecord


def arrival_times(
    requests: Sequence[BenchRequest], *, request_rate: float, generator: np.random.RandomState
) -> list[float]:
    """Seconds from the start of the run at which each request is sent, in the order given.

    Requests that carry a time of their own keep it; the rate is then not looked at. Otherwise an infinite rate sends
    all at once, and a finite one makes a Poisson process: the first at 0, then gaps drawn from an exponential
    distribution with mean 1 / `request_rate` (requests per second). A request that could not be sent in time does
    not delay those after it, so that the rate holds over the whole run.

    Raises BenchmarkError for a rate that is not above 0.
    """
    own = [request.arrival_s for request in requests]
    if any(time is not None for time in own):
        return [time or 0.0 for time in own]
    if not request_rate > 0:
        raise BenchmarkError(f"--request-rate must be above 0, got {request_rate}; inf sends everything at once")
    if math.isinf(request_rate):
        return [0.0] * len(requests)
    gaps = [float(generator.exponential(1.0 / request_rate)) for _ in requests]
    return [float(time) for time in np.cumsum([0.0, *gaps])[: len(requests)]]


REFUSALS_TO_GIVE_UP = 20
"""So many requests in a row that find no server end the run: a rate of 1/s would go on for an hour otherwise."""

Send = Callable[[int, BenchRequest, "list[RequestRecord]"], Awaitable[None]]
"""Sends one request and adds its records; raises UnreachableError when there is no server."""


class Refusals:
    """Ends a run, by its `stop`, whose server is gone: so many requests in a row found none.

    A context manager around each request, which takes the request's UnreachableError.
    """

    def __init__(self, stop: asyncio.Event) -> None:
        self.stop = stop
        self.is_server_gone = False
        self._in_a_row = 0

    def __enter__(self) -> None:
        """Nothing is known yet."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        if kind is None:
            self._in_a_row = 0
        elif issubclass(kind, UnreachableError):
            self._in_a_row += 1
            if self._in_a_row >= REFUSALS_TO_GIVE_UP:
                self.is_server_gone = True
                self.stop.set()
            return True
        return False


@dataclass(slots=True, kw_only=True)
class LoadResult:
    """records: in the order of the dataset, of what was sent. duration_s: from the first request to the last answer.

    is_interrupted: `stop` was set. is_server_gone: the run was given up. num_unsent: requests that never went out.
    """

    records: list[RequestRecord] = field(default_factory=list)
    start_s: float = 0.0
    duration_s: float = 0.0
    is_interrupted: bool = False
    is_server_gone: bool = False
    num_unsent: int = 0

    @staticmethod
    def of(
        records: Sequence[RequestRecord], refusals: Refusals, *, start_s: float, end_s: float, num_unsent: int
    ) -> LoadResult:
        return LoadResult(
            records=sorted(records, key=lambda record: (record.index, record.turn)),
            start_s=start_s,
            duration_s=end_s - start_s,
            is_interrupted=refusals.stop.is_set() and not refusals.is_server_gone,
            is_server_gone=refusals.is_server_gone,
            num_unsent=num_unsent,
        )


async def put_under_load(
    requests: Sequence[BenchRequest],
    times_s: Sequence[float],
    send: Send,
    *,
    max_concurrency: int | None,
    clock: Callable[[], float],
    stop: asyncio.Event,
    records: list[RequestRecord] | None = None,
) -> LoadResult:
    """Send each request at its time, wait for all answers, and tell what came.

    max_concurrency: requests (conversations) in progress at once; the wait for a place counts in no latency.
    stop: setting it ends the run: what is in progress is cut off and marked so.
    records: a list to fill, for someone who watches the run.
    """
    refusals, records, start_s = Refusals(stop), [] if records is None else records, clock()
    run = _Run(send, max_concurrency, records, refusals)
    await until_stopped(run.send_all(requests, times_s, start_s, clock), stop)
    num_unsent = len(requests) - len({record.index for record in records})
    return LoadResult.of(records, refusals, start_s=start_s, end_s=clock(), num_unsent=num_unsent)


async def until_stopped(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> None:
    """Wait for `work`, or cut it off when `stop` is set. Raises what `work` raised."""
    sending = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        # Also when this task is cancelled: nothing may go on sending.
        stopping.cancel()
        if not sending.done():
            sending.cancel()
        await asyncio.wait({sending, stopping})
    if not sending.cancelled() and (failure := sending.exception()) is not None:
        raise failure


class _Run:
    def __init__(
        self, send: Send, max_concurrency: int | None, records: list[RequestRecord], refusals: Refusals
    ) -> None:
        self._send = send
        self._records = records
        self._refusals = refusals
        self._places: AbstractAsyncContextManager[None] = nullcontext()
        if max_concurrency:
            self._places = asyncio.Semaphore(max_concurrency)

    async def send_all(
        self, requests: Sequence[BenchRequest], times_s: Sequence[float], start_s: float, clock: Callable[[], float]
    ) -> None:
        tasks: list[asyncio.Task[None]] = []
        try:
            for index, (request, time_s) in enumerate(zip(requests, times_s, strict=True)):
                delay = start_s + time_s - clock() if time_s else 0.0
                if delay > 0:
                    await asyncio.sleep(delay)
                tasks.append(asyncio.create_task(self._send_one(index, request)))
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_one(self, index: int, request: BenchRequest) -> None:
        async with self._places:
            with self._refusals:
                await self._send(index, request, self._records)
