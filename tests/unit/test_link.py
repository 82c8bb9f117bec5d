"""One link to an engine, whatever is behind it: a thread, a process, or several of both."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import pytest
from engine_link import SLOW, START, fake_child, request, within
from fake_engine import NUM_PAGES, fake_build

from mooli.config import EngineConfig
from mooli.engine import messages
from mooli.engine.facts import EngineFacts
from mooli.errors import EngineClosedError, EngineError, MooliError, RequestError, RequestFailedError
from mooli.frontend.call import Call, Listener, run_async
from mooli.frontend.generation import Generation
from mooli.frontend.native_answer import NativeAnswer
from mooli.link.client import EngineClient
from mooli.link.link import Link, Sink
from mooli.link.thread import EngineLoop
from mooli.types import Request, RequestOutput

pytestmark = pytest.mark.slow

Test = Callable[[Link], Awaitable[None]]


class Pair:
    """Two links as one, each request on the one that has less to do."""

    def __init__(self, *links: Link) -> None:
        self._links = links

    @property
    def facts(self) -> EngineFacts:
        return self._links[0].facts

    @property
    def is_alive(self) -> bool:
        return all(link.is_alive for link in self._links)

    @property
    def num_open(self) -> int:
        return sum(link.num_open for link in self._links)

    @property
    def open_rids(self) -> list[str]:
        return [rid for link in self._links for rid in link.open_rids]

    @property
    def last_sign_s(self) -> float:
        return min(link.last_sign_s for link in self._links)

    @property
    def error(self) -> MooliError | None:
        return next((link.error for link in self._links if link.error is not None), None)

    def check_process(self) -> None:
        for link in self._links:
            link.check_process()

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> None:
        for link in self._links:
            taken = set(link.open_rids)
            if any(item.rid in taken for item in requests):
                link.submit(requests, sinks)  # which refuses them
        for item, sink in zip(requests, sinks, strict=True):
            min(self._links, key=lambda link: link.num_open).submit([item], [sink])

    def abort(self, rids: Iterable[str], reason: str) -> None:
        wanted = list(rids)
        for link in self._links:
            link.abort(wanted, reason)

    def drop(self, requests: Iterable[Request], reason: str) -> None:
        wanted = list(requests)
        for link in self._links:
            link.drop(wanted, reason)

    def finish(self, request: Request, matched: str) -> None:
        for link in self._links:
            link.finish(request, matched)

    def name_of(self, rid: str) -> str | None:
        return next(filter(None, (link.name_of(rid) for link in self._links)), None)

    async def ask(self, question: str, timeout_s: float, **details: Any) -> Any:
        answers = [await link.ask(question, timeout_s, **details) for link in self._links]
        return {name: sum(answer[name] for answer in answers) for name in answers[0]}


class Heard:
    """What came to a sink, on whatever thread."""

    def __init__(self, *, fails: bool = False) -> None:
        self.items: list[RequestOutput | MooliError] = []
        self._fails = fails
        self._ended = threading.Event()

    def __call__(self, item: RequestOutput | MooliError) -> None:
        self.items.append(item)
        is_last = isinstance(item, MooliError) or item.finish is not None
        if self._fails and not isinstance(item, MooliError):
            raise ZeroDivisionError("a bug in the taker")
        if is_last:
            self._ended.set()

    async def end(self) -> Any:
        while not self._ended.is_set():
            await asyncio.sleep(0.005)
        return self.items[-1]


def thread() -> EngineLoop:
    built = fake_build(EngineConfig.from_kwargs(model_path="fake"), next_token=lambda context: context[0])
    return EngineLoop(built.core, built.facts)


async def play(kind: str, test: Test, scenario: str = "fake") -> None:
    """`test(link)`, and that afterwards all is closed and everything that was open has heard of it. scenario: of the
    process."""
    start = messages.Start(START.config, scenario, START.log_level)
    process = None if kind == "thread" else await EngineClient.connect(start, *fake_child())
    loop = None if kind == "process" else thread()
    parts: list[Link] = [link for link in (process, loop) if link is not None]
    link = parts[0] if len(parts) == 1 else Pair(*parts)
    try:
        assert link.is_alive
        assert link.error is None
        await within(_awaited(test(link)))
        left, quiet = Heard(), Heard()
        link.submit([request("left", max_new_tokens=100), request("quiet")], [left, quiet])
        await quiet.end()
    finally:
        if loop is not None:
            loop.close()
        if process is not None:
            await process.close()
    end = await within(left.end())
    assert isinstance(end, EngineClosedError) or end.finish.type == "length"
    assert (link.is_alive, link.num_open, link.open_rids) == (False, 0, [])
    assert isinstance(link.error, EngineClosedError)
    with pytest.raises(EngineClosedError):
        link.submit([request("late")], [Heard()])
    with pytest.raises(EngineClosedError):
        await link.ask("stats", 30)


async def _awaited(work: Awaitable[None]) -> None:
    await work


@pytest.fixture(params=["thread", "process", "both"])
def on_link(request, caplog):
    caplog.set_level("CRITICAL", logger="mooli")
    return lambda test: asyncio.run(play(request.param, test))


def test_each_request_hears_of_its_own_outputs_and_of_one_end(on_link):
    async def test(link: Link) -> None:
        heard = [Heard() for _ in range(4)]
        link.submit([request(f"r{i}", [i + 1], max_new_tokens=i + 1) for i in range(4)], heard)
        for i, one in enumerate(heard):
            assert (await one.end()).finish.type == "length"
            assert [token for item in one.items for token in item.new_token_ids] == [i + 1] * (i + 1)
            assert {item.rid for item in one.items} == {f"r{i}"}
            assert sum(item.finish is not None for item in one.items) == 1

    on_link(test)


def test_an_id_in_use_is_refused_and_one_that_was_left_is_free_at_once(on_link):
    async def test(link: Link) -> None:
        first, heard = request("same", max_new_tokens=100), Heard()
        link.submit([first], [heard])
        assert link.open_rids == ["same"]
        with pytest.raises(RequestError, match="still running"):
            link.submit([request("same")], [Heard()])
        link.drop([first], "gone")
        num_heard = len(heard.items)
        for leave in (link.drop, lambda requests, _: link.finish(requests[0], "stop")):
            again, second = request("same", max_new_tokens=100), Heard()
            link.submit([again], [second])
            leave([first], "this one has ended")
            assert link.open_rids == ["same"]
            leave([again], "gone")
            assert link.num_open == 0
        last = Heard()
        link.submit([request("same")], [last])
        assert (await last.end()).finish.type == "length"
        assert len(heard.items) <= num_heard + 1
        assert all(item.finish is None for item in heard.items)

    on_link(test)


def test_an_answer_is_a_sign_of_life(on_link):
    async def test(link: Link) -> None:
        before = link.last_sign_s
        await link.ask("stats", 30)
        while link.last_sign_s <= before:  # a thread notes it down behind its answer
            await asyncio.sleep(0.005)

    on_link(test)


def test_an_aborted_request_is_told_why(on_link):
    async def test(link: Link) -> None:
        heard = Heard()
        link.submit([request("a", max_new_tokens=100)], [heard])
        link.abort(["a", "nobody"], "enough")
        end = await heard.end()
        assert (end.finish.type, end.finish.message) == ("abort", "enough")

    on_link(test)


def test_a_sink_that_raises_is_told_of_the_end_and_no_other_notices(on_link):
    async def test(link: Link) -> None:
        bad, good = Heard(fails=True), Heard()
        link.submit([request("bad", max_new_tokens=100), request("good", max_new_tokens=20)], [bad, good])
        assert (await good.end()).finish.type == "length"
        end = await bad.end()
        assert isinstance(end, EngineError)
        assert len(bad.items) == 2
        assert link.num_open == 0

    on_link(test)


def test_questions_are_answered_between_steps(on_link):
    async def test(link: Link) -> None:
        num_engines = 2 if isinstance(link, Pair) else 1
        assert (await link.ask("stats", 30))["free_pages"] == NUM_PAGES * num_engines
        with pytest.raises(EngineError, match="'weather'"):
            await link.ask("weather", 30)
        with pytest.raises(EngineError, match="'requests'"):
            await link.ask("requests", 30, least=3)
        assert link.facts.num_pages == NUM_PAGES

    on_link(test)


def test_answers_call_open_requests_by_their_names(on_link):
    async def test(link: Link) -> None:
        if isinstance(link, Pair):
            return
        heard = Heard()
        link.submit([request("mine", max_new_tokens=50)], [heard])
        name = link.name_of("mine")
        assert name is not None
        told = await link.ask("requests", 30, most=10)
        assert [row[0] for row in told] in ([name], [])  # it may have ended
        assert link.name_of("another") is None
        link.abort(["mine"], "enough")

    on_link(test)


# -- the one call above it --
class Told(Listener):
    def __init__(self) -> None:
        self.events: list[tuple[str, str, int]] = []

    def started(self, generation: Generation) -> None:
        self.events.append(("started", generation.rid, 0))

    def grew(self, generation: Generation, num_tokens: int, elapsed_s: float) -> None:
        self.events.append(("grew", generation.rid, num_tokens))

    def finished(self, generation: Generation, elapsed_s: float) -> None:
        self.events.append(("finished", generation.rid, 0))


class Faulty(Listener):
    def started(self, generation: Generation) -> None:
        raise ZeroDivisionError

    def grew(self, generation: Generation, num_tokens: int, elapsed_s: float) -> None:
        raise ZeroDivisionError

    def finished(self, generation: Generation, elapsed_s: float) -> None:
        raise ZeroDivisionError


def generations(*rids: str, max_new_tokens: int = 3) -> list[Generation]:
    requests = [request(rid, max_new_tokens=max_new_tokens) for rid in rids]
    return [Generation(item, None) for item in requests]


def test_a_mailed_call_has_the_same_answer_over_every_link(on_link):
    async def test(link: Link) -> None:
        answers = await run_async(link, [NativeAnswer(item, None) for item in generations("a", "b")])
        assert [answer["output_ids"] for answer in answers] == [[7] * 3] * 2

    on_link(test)


def over_a_process(test: Test, scenario: str = "fake") -> None:
    asyncio.run(play("process", test, scenario))


def test_listeners_hear_of_each_request_and_a_faulty_one_ends_none():
    async def test(link: Link) -> None:
        told = Told()
        with Call(link, generations("a", "b"), listeners=[Faulty(), told]) as call:
            await call.wait()
        for rid in ("a", "b"):
            events = [(event, number) for event, of, number in told.events if of == rid]
            assert (events[0], events[-1]) == (("started", 0), ("finished", 0))
            assert [number for _, number in events[1:-1]] == [1, 1, 1]

    over_a_process(test)


def test_a_call_that_is_left_says_that_its_requests_have_ended_once():
    async def test(link: Link) -> None:
        told = Told()
        with Call(link, generations("a", "b", max_new_tokens=100), listeners=[told]) as call:
            async for _ in call.changes():
                break
        call.close()
        assert link.num_open == 0
        assert sorted(rid for event, rid, _ in told.events if event == "finished") == ["a", "b"]
        assert all(generation.finish is None for generation in call.generations)

    over_a_process(test, SLOW)  # it is left before its 100 tokens are there


def test_a_call_that_cannot_begin_tells_nobody_and_leaves_the_other_of_its_id_alone():
    async def test(link: Link) -> None:
        told = Told()
        with Call(link, generations("a", max_new_tokens=100)) as first:
            with pytest.raises(RequestError, match="still running"):
                Call(link, generations("b", "a"), listeners=[told])
            assert link.open_rids == ["a"]
            assert not told.events
            await first.wait()
        assert first.generations[0].finish is not None

    over_a_process(test)


@pytest.mark.parametrize("no_text", ["", "no words of others"])
def test_a_text_that_cannot_be_made_ends_its_own_request(monkeypatch, caplog, no_text):
    caplog.set_level("CRITICAL", logger="mooli")
    update = Generation.update

    def failing(self: Generation, output: RequestOutput) -> str | None:
        if self.rid == "bad":
            raise ValueError("secret")
        return update(self, output)

    monkeypatch.setattr(Generation, "update", failing)

    async def test(link: Link) -> None:
        with Call(link, generations("bad", "good"), no_text=no_text) as call:
            await call.wait()
        bad, good = call.generations
        assert bad.finish is not None
        assert bad.finish.message == (no_text or "its text could not be made: ValueError: secret")
        assert good.output_ids == [7] * 3
        with pytest.raises(RequestFailedError):
            bad.raise_if_failed()
        assert link.num_open == 0

    over_a_process(test)
