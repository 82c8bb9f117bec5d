"""One client for all servers: sends the requests of a workload and takes the times of what comes back.

Owns connections and the clock. Never knows what a server's events mean: that is its dialect's.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator

import aiohttp

from comparison.child import EngineError
from comparison.dialects import Dialect
from comparison.timing import TurnTimes
from comparison.workloads import Workload
from mooli.bench.apis import DONE, EventStream

_READ_BUFFER_BYTES = 1 << 20


async def run_workload(url: str, dialect: Dialect, workload: Workload, limit_s: float) -> list[TurnTimes]:
    """All requests of `workload`, `at_once` conversations together, each request on a connection of its own.

    Raises EngineError when one fails or all take longer than `limit_s`.
    """
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=_READ_BUFFER_BYTES) as session:
        run = _Run(session, url + dialect.path, dialect, workload)
        waiting = iter(range(len(workload.conversations)))
        tasks = [asyncio.ensure_future(run.place(waiting)) for _ in range(workload.at_once)]
        try:
            await asyncio.wait_for(asyncio.gather(*tasks), limit_s)
        except asyncio.TimeoutError as exc:
            raise EngineError(f"took too long (more than {limit_s:.0f} s)") from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise EngineError(f"the connection failed: {type(exc).__name__}: {exc}") from exc
        except ValueError as exc:
            raise EngineError(f"sent what is not JSON: {exc}") from exc
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return run.turns


class _Run:
    def __init__(self, session: aiohttp.ClientSession, url: str, dialect: Dialect, workload: Workload) -> None:
        self.turns: list[TurnTimes] = []
        self._session, self._url, self._dialect, self._workload = session, url, dialect, workload
        self._began = time.perf_counter()

    async def place(self, waiting: Iterator[int]) -> None:
        """Have one conversation after the other, as long as there are any."""
        for conversation in waiting:
            said: list[int] = []
            for turn, new_ids in enumerate(self._workload.conversations[conversation]):
                said += new_ids
                said += await self._ask(conversation, turn, said)

    async def _ask(self, conversation: int, turn: int, prompt: list[int]) -> list[int]:
        body = json.dumps(self._dialect.body(prompt, self._workload.output_len)).encode()
        sent_s, first_s = self._now(), None
        ids: list[int] = []
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self._url, data=body, headers=headers) as response:
            if response.status != 200:
                raise EngineError(f"HTTP {response.status}: {(await response.text())[:200]}")
            stream = EventStream()
            async for arrived in response.content.iter_any():
                now = self._now()
                for payload in stream.feed(arrived):
                    if payload != DONE:
                        ids += self._dialect.new_ids(json.loads(payload), len(ids))
                if ids and first_s is None:
                    first_s = now
        end_s = self._now()
        self.turns.append(
            TurnTimes(conversation, turn, len(prompt), len(ids), sent_s, end_s if first_s is None else first_s, end_s)
        )
        return ids

    def _now(self) -> float:
        return time.perf_counter() - self._began
