"""What is done once for all who ask, and what anybody may ask a server for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fake_engine import says
from gate import Gate, wait_until
from live import LiveServer

from mooli.server import metrics, native_control, native_info, protection
from mooli.server.routing import Client, Incoming
from mooli.server.work import SharedWork


class Work:
    """Ends when the test lets it, with the number of its round."""

    def __init__(self) -> None:
        self.num_rounds = 0
        self.may_end = asyncio.Event()

    async def __call__(self) -> int:
        self.num_rounds += 1
        number = self.num_rounds
        await self.may_end.wait()
        if number == 3:
            raise ValueError("planted")
        return number


async def asked(shared: SharedWork[Any], times: int) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.create_task(shared.result()) for _ in range(times)]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


def test_all_who_ask_at_a_time_get_the_result_of_one_round():
    async def run() -> None:
        work = Work()
        shared = SharedWork(work)
        early = await asked(shared, 5)
        late = await asked(shared, 5)
        assert work.num_rounds == 1
        work.may_end.set()
        assert await asyncio.gather(*early, *late) == [1] * 10
        assert await shared.result() == 2

    asyncio.run(run())


def test_one_who_leaves_takes_nothing_from_the_others():
    async def run() -> None:
        work = Work()
        shared = SharedWork(work)
        tasks = await asked(shared, 3)
        tasks[0].cancel()
        await asked(shared, 0)
        work.may_end.set()
        assert await asyncio.gather(*tasks[1:]) == [1, 1]
        assert tasks[0].cancelled()

    asyncio.run(run())


def test_an_error_reaches_all_who_wait_and_nobody_later():
    async def run() -> None:
        work = Work()
        work.num_rounds = 2
        shared = SharedWork(work, keep_s=60)
        tasks = await asked(shared, 3)
        work.may_end.set()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(end) for end in ends] == ["planted"] * 3
        assert await shared.result() == 4

    asyncio.run(run())


def test_an_error_that_nobody_waits_for_is_no_news():
    async def run() -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
        work = Work()
        work.num_rounds = 2
        shared = SharedWork(work)
        (task,) = await asked(shared, 1)
        task.cancel()
        work.may_end.set()
        await asked(shared, 0)
        return told

    assert asyncio.run(run()) == []


def test_a_result_is_kept_for_its_time():
    async def run() -> list[int]:
        now_s = [100.0]
        work = Work()
        work.may_end.set()
        shared = SharedWork(work, keep_s=1.0, clock=lambda: now_s[0])
        results = []
        for step_s in (0.0, 0.5, 0.4, 0.2, 0.9):
            now_s[0] += step_s
            results.append(await shared.result())
        return results

    assert asyncio.run(run()) == [1, 1, 1, 2, 2]


def test_who_asks_in_a_pause_waits_for_what_comes_after_it():
    async def run() -> None:
        work = Work()
        work.may_end.set()
        shared = SharedWork(work, pause_s=0.01, clock=lambda: 100.0)
        assert await shared.result() == 1
        tasks = await asked(shared, 20)
        assert work.num_rounds == 1
        assert await asyncio.gather(*tasks) == [2] * 20

    asyncio.run(run())


# -- what strangers may ask for ----------------------------------------------------------------------------------------
REQUEST = Incoming(body=None, unsupported={}, query={}, path_params={}, headers={}, client=Client())


def at_a_time(
    server: LiveServer, handler: Callable[..., Awaitable[Any]], times: int, meanwhile=lambda: None
) -> list[Any]:
    """Replies of `handler` to so many who ask before anything is answered. meanwhile: is called when they have."""

    async def ask_all() -> list[Any]:
        return await asyncio.gather(*(handler(server.service, REQUEST) for _ in range(times)))

    answers = asyncio.run_coroutine_threadsafe(ask_all(), server.loop)
    meanwhile()
    return answers.result(60)


def test_probes_that_come_together_make_one_request(live):
    with Gate() as gate:
        server = live(says("x" * 100), runner={"raises": gate})

        def look_and_go_on() -> None:
            wait_until(lambda: server.service.client.num_open)
            assert server.service.client.num_open == 1
            gate.open()

        replies = at_a_time(server, native_control.health_generate, 50, look_and_go_on)
    assert [reply.status for reply in replies] == [200] * 50
    wait_until(lambda: not server.service.client.num_open)
    assert server.core.stats()["requests"] == 1


@pytest.mark.parametrize(("keep_s", "num_requests"), [(1e9, 1), (0.0, 5)])
def test_probes_share_an_answer_for_a_while(live, monkeypatch, keep_s, num_requests):
    monkeypatch.setattr(native_control, "KEEP_S", keep_s)
    server = live(says("x" * 100))
    for _ in range(5):
        assert server.http.get("/health_generate").status_code == 200
        wait_until(lambda: not server.service.client.num_open)
    assert server.core.stats()["requests"] == num_requests


def test_an_answer_that_is_kept_hides_no_end(live, monkeypatch):
    monkeypatch.setattr(native_control, "KEEP_S", 1e9)
    server = live(says("x" * 100))
    assert server.http.get("/health_generate").status_code == 200
    server.service.is_draining = True
    assert server.http.get("/health_generate").status_code == 503
    server.service.is_draining = False
    server.engine_process.kill()
    wait_until(lambda: server.service.client.error)
    assert server.http.get("/health_generate").status_code == 503


def test_scrapes_that_come_together_are_rendered_once(live, monkeypatch):
    server = live(says("x"))
    rendered = []
    render = server.service.metrics.render
    monkeypatch.setattr(server.service.metrics, "render", lambda: rendered.append(1) or render())
    first = at_a_time(server, metrics.get_metrics, 50)
    assert len(rendered) == 1
    second = at_a_time(server, metrics.get_metrics, 50)
    assert len(rendered) == 2
    assert {reply.content for reply in first} == {first[0].content} and second[0].content


def test_a_scrape_shows_what_was_before_it(live, monkeypatch):
    """Also one that shares its rendering."""
    server = live(says("hey"))
    for number in range(1, 4):
        server.http.get("/metrics")
        server.http.post("/generate", json={"text": "ab>"})
        (line,) = [
            line
            for line in server.http.get("/metrics").text.splitlines()
            if line.startswith("sglang:num_requests_total") and 'is_streaming="false"' in line
        ]
        assert float(line.split()[-1]) == number


@pytest.mark.parametrize("handler", [native_info.show_loads, native_info.show_server])
def test_who_asks_how_busy_the_engine_is_asks_it_once(live, monkeypatch, handler):
    server = live(says("x"))
    questions = []
    ask = server.service.client.ask
    monkeypatch.setattr(
        server.service.client, "ask", lambda name, limit_s: questions.append(name) or ask(name, limit_s)
    )
    replies = at_a_time(server, handler, 50)
    assert questions.count("stats") == 1
    assert len(replies) == 50


def test_a_crowd_at_one_probe_holds_up_no_other(live, monkeypatch):
    monkeypatch.setattr(protection, "MAX_PROBES", 2)
    with Gate() as gate, ThreadPoolExecutor(3) as crowd:
        server = live(says("x" * 100), runner={"raises": gate})
        asked = [crowd.submit(server.http.get, "/health_generate") for _ in range(3)]
        wait_until(lambda: any(reply.done() for reply in asked))
        others = [server.http.get(path).status_code for path in ("/health", "/health/live", "/ready", "/metrics")]
        gate.open()
        assert others == [200] * 4
        assert sorted(reply.result().status_code for reply in asked) == [200, 200, 429]
