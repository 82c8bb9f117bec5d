"""Work on texts: short where it is asked for, long on few threads, huge ones in nobody's way."""

from __future__ import annotations

import asyncio
import threading

import pytest
from engine_link import START, fake_child
from fake_engine import byte_tokenizer

from mooli.config import EngineConfig
from mooli.errors import ContextLengthError
from mooli.frontend.inputs import GenerateCall
from mooli.frontend.tokenizer_bounds import TextBounds
from mooli.link.client import EngineClient
from mooli.server.bring_up import make_service
from mooli.server.config import ServerConfig
from mooli.server.work import (
    HUGE_TEXT_CHARS,
    LONG_TEXT_CHARS,
    NUM_HUGE_THREADS,
    NUM_LONG_THREADS,
    TextThreads,
    num_chars,
)

WAIT_S = 60


def test_short_work_is_done_at_once_and_long_work_on_another_thread() -> None:
    async def run() -> None:
        threads, here = TextThreads(), threading.get_ident()
        assert await threads.run(LONG_TEXT_CHARS - 1, threading.get_ident) == here
        for length in (LONG_TEXT_CHARS, HUGE_TEXT_CHARS):
            assert await threads.run(length, threading.get_ident) != here

    asyncio.run(run())


@pytest.mark.parametrize(("length", "most"), [(LONG_TEXT_CHARS, NUM_LONG_THREADS), (HUGE_TEXT_CHARS, NUM_HUGE_THREADS)])
def test_only_a_few_work_at_a_time(length: int, most: int) -> None:
    async def run() -> None:
        threads, lock, gate = TextThreads(), threading.Lock(), threading.Event()
        working, highest = 0, 0

        def work() -> None:
            nonlocal working, highest
            with lock:
                working += 1
                highest = max(highest, working)
                if working == most:
                    gate.set()
            gate.wait(WAIT_S)
            with lock:
                working -= 1

        await asyncio.gather(*(threads.run(length, work) for _ in range(20)))
        assert highest == most

    asyncio.run(run())


def test_huge_texts_hold_up_nobody_elses() -> None:
    async def run() -> None:
        threads, gate = TextThreads(), threading.Event()
        huge = [asyncio.create_task(threads.run(HUGE_TEXT_CHARS, lambda: gate.wait(WAIT_S))) for _ in range(50)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(threads.run(LONG_TEXT_CHARS, lambda: "long"), WAIT_S) == "long"
        assert await threads.run(10, lambda: "short") == "short"
        assert not any(task.done() for task in huge)
        gate.set()
        assert all(await asyncio.gather(*huge))

    asyncio.run(run())


def test_work_of_a_client_who_left_while_it_waited_is_never_done() -> None:
    async def run() -> None:
        threads, gate, done = TextThreads(), threading.Event(), []
        first = asyncio.create_task(threads.run(HUGE_TEXT_CHARS, lambda: gate.wait(WAIT_S)))
        second = asyncio.create_task(threads.run(HUGE_TEXT_CHARS, lambda: done.append(2)))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        gate.set()
        assert await first
        await threads.run(HUGE_TEXT_CHARS, lambda: done.append(3))
        assert done == [3]

    asyncio.run(run())


def test_everything_in_a_value_counts() -> None:
    assert num_chars("abc") == 4
    assert num_chars([{"role": "user", "content": "abc"}, None, 5]) == 13
    assert num_chars([[]] * 10_000) > LONG_TEXT_CHARS
    assert num_chars([""] * 10_000) > LONG_TEXT_CHARS
    assert HUGE_TEXT_CHARS <= num_chars(["a" * 10**6] * 3) < 2 * 10**6
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert num_chars(deep) >= HUGE_TEXT_CHARS


def test_a_prompt_that_is_too_long_is_refused_without_waiting_for_a_thread() -> None:
    async def run() -> None:
        client = await EngineClient.connect(START, *fake_child())
        tokenizer = byte_tokenizer()
        tokenizer._bounds = TextBounds(1.0, 1, 1)
        config = EngineConfig.from_kwargs(model_path="fake", random_seed=1)
        service = make_service(ServerConfig(), config, client, tokenizer, started_s=0.0)
        gate = threading.Event()
        others = [asyncio.create_task(service.text_threads.run(n, gate.wait)) for n in (5000, 5000, 99999)]
        await asyncio.sleep(0)
        with pytest.raises(ContextLengthError, match="at least 100000 tokens"):
            await asyncio.wait_for(service.prepare(GenerateCall("a" * 100_000)), WAIT_S)
        gate.set()
        assert all(await asyncio.gather(*others))
        messages = [{"role": "user", "content": "a" * 5000}]
        with pytest.raises(ContextLengthError, match="at least 5018 tokens"):
            await service.encode_chat(messages)
        await client.close()

    asyncio.run(run())
