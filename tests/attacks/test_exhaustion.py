"""One client tries to take the server from all others: answers stay right, processes small, and the server stays.

How late others get their first token is a matter of time, which no test asserts: `make attack` measures it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from exhaustion import ATTEMPTS, attack
from process_memory import Growth
from server_process import ServerProcess, needs_demo, needs_proc, wait_until

pytestmark = [needs_demo, needs_proc]

FLAGS = ("--num-threads", "1", "--max-total-tokens", "8192")
SCALE = 0.01
HOLD_S = 0.2

CAPITAL = "The capital of France is"


@pytest.fixture(scope="module")
def attacked() -> Iterator[tuple[ServerProcess, list[int]]]:
    """A server, and what it answered to a good request before the first attempt."""
    with ServerProcess(*FLAGS) as server:
        yield server, server.generate(CAPITAL)["output_ids"]


def test_there_are_enough_attempts() -> None:
    assert len(ATTEMPTS) > 30


@pytest.mark.parametrize("name", ATTEMPTS)
def test_an_attempt_costs_nobody_else_an_answer(attacked: tuple[ServerProcess, list[int]], name: str) -> None:
    server, expected = attacked
    growth = Growth({"server": server.pid, "engine": server.engine_pid})

    async def beside() -> tuple[list[int], list[list[int]]]:
        """What the attempt was answered, and what another client was meanwhile."""
        attempt = asyncio.create_task(attack(server.url, name, scale=SCALE, hold_s=HOLD_S))
        given = []
        while not attempt.done() or not given:
            answer = await asyncio.to_thread(server.generate, CAPITAL)
            given.append(answer["output_ids"])
            await asyncio.sleep(0.05)
        return (await attempt).faults, given

    faults, given = asyncio.run(beside())
    assert faults == []
    assert [ids for ids in given if ids != expected] == []
    wait_until(lambda: server.load()["num_running_reqs"] == server.load()["num_waiting_reqs"] == 0, "all have ended")
    assert server.generate(CAPITAL)["output_ids"] == expected
    assert growth.faults() == []
    assert "Traceback" not in server.log
