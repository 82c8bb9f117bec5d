"""The engine process and its client: life and death, and that no request hears of another."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_link import SLOW, START, NoProcess, Taker, Wire, connected, fake_child, request, submit, with_engine, within
from fake_engine import CONTEXT, EOS, NUM_PAGES

import mooli.errors
from mooli.engine import messages
from mooli.errors import ConfigError, EngineClosedError, EngineDeadError, EngineError, PromptError, RequestError
from mooli.link.client import EngineClient
from mooli.types import FinishReason, Request, RequestOutput, SamplingParams

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quiet(caplog):
    """What is logged of planted faults is not worth showing."""
    caplog.set_level("CRITICAL", logger="mooli")


# -- a process that works ---------------------------------------------------------------------------------------------
def test_requests_go_in_and_outputs_come_out():
    async def test(client: EngineClient) -> None:
        assert client.is_alive
        assert (client.facts.vocab_size, client.facts.eos_ids[0]) == (258, EOS)
        reports: list[messages.Outputs] = []
        client.on_report = reports.append
        first, second = submit(client, request("a"), request("b", [9], max_new_tokens=5))
        await first.ended.wait()
        await second.ended.wait()
        assert (first.ids, second.ids) == ([7] * 3, [9] * 5)
        assert first.finish == FinishReason("length", length=3)
        assert client.num_open == 0
        while not reports or reports[-1].stats["generated_tokens"] < 8:  # it comes behind the outputs
            await asyncio.sleep(0.005)

    with_engine(test)


def test_every_field_of_a_request_arrives():
    sampling = SamplingParams(
        seed=2**64 - 1,
        max_new_tokens=9,
        min_new_tokens=3,
        stop_token_ids=frozenset({1, 2}),
        logit_bias=((5, -1.5),),
        stop=("é",),
    )
    sent = Request(
        rid="r", prompt_ids=np.arange(5, dtype=np.int32), sampling=sampling, eos_ids=frozenset({3}),
        return_logprob=True, logprob_start=2, num_top_logprobs=4, logprob_token_ids=(6, 7), namespace="n", priority=-5,
        client="c",
    )  # fmt: skip
    frame = messages.encode(messages.Submit.of([("r", sent)]))
    (submitted,) = messages.Frames(messages.ToEngine).push(frame)
    (got,) = submitted.to_requests()
    assert got.prompt_ids.dtype == np.int32
    assert got.prompt_ids.tolist() == sent.prompt_ids.tolist()
    for name in Request.__slots__:
        if name not in ("prompt_ids", "sampling"):
            assert getattr(got, name) == getattr(sent, name), name
    assert got.sampling == replace(sampling, stop=())  # stop strings are the text side's


def test_the_engine_answers_questions():
    async def test(client: EngineClient) -> None:
        assert await client.ask("ping", 30) is None
        assert await client.ask("check", 30) is None
        assert await client.ask("flush_cache", 30) is True
        assert (await client.ask("stats", 30))["free_pages"] == NUM_PAGES
        with pytest.raises(EngineError, match="'weather'"):
            await client.ask("weather", 30)

    with_engine(test)


def test_a_late_answer_is_not_taken_for_a_later_questions():
    async def test() -> None:
        client, theirs = await connected()
        with theirs:
            with pytest.raises(TimeoutError, match=r"'stats' within 0\.01 s"):
                await client.ask("stats", 0.01)
            theirs.sendall(messages.encode(messages.Reply(0, {"late": 1})))
            theirs.sendall(messages.encode(messages.Reply(1, {"new": 2})))
            assert await client.ask("stats", 30) == {"new": 2}
        await client.close()

    asyncio.run(within(test()))


def test_aborted_requests_say_so_and_dropped_ones_say_nothing():
    async def test(client: EngineClient) -> None:
        second = request("b", max_new_tokens=100)
        aborted, dropped, other = submit(
            client, request("a", max_new_tokens=100), second, request("c", max_new_tokens=9)
        )
        await other.started.wait()
        client.abort(["a", "nobody"], "enough")
        client.drop([second], "gone")
        num_heard = len(dropped.ids)
        await aborted.ended.wait()
        await other.ended.wait()
        assert (aborted.finish.type, aborted.finish.message) == ("abort", "enough")
        assert (len(dropped.ids), dropped.end) == (num_heard, None)
        assert other.finish.type == "length"
        stats = await client.ask("stats", 30)
        assert (stats["running"], stats["waiting"], stats["used_pages"]) == (0, 0, 0)

    with_engine(test, SLOW)


def test_an_id_in_use_is_refused_and_changes_nothing():
    async def test(client: EngineClient) -> None:
        (first,) = submit(client, request("a"))
        with pytest.raises(RequestError, match="'a'"):
            submit(client, request("b"), request("a"))
        assert client.open_rids == ["a"]
        await first.ended.wait()
        assert first.finish.type == "length"

    with_engine(test)


def test_a_request_the_engine_refuses_gets_the_error():
    async def test(client: EngineClient) -> None:
        good, bad = submit(client, request("a"), request("b", [5] * (CONTEXT + 1)))
        await good.ended.wait()
        await bad.ended.wait()
        assert good.finish.type == "length"
        assert isinstance(bad.end, PromptError)

    with_engine(test)


@pytest.mark.parametrize(
    "wrong",
    [
        Request(rid="a", namespace="\ud800", prompt_ids=np.zeros(1, np.int32)),
        Request(rid="a", prompt_ids=np.zeros(1, np.int32), priority=2**70),
        Request(rid="a", prompt_ids=np.zeros(messages.MAX_SUBMIT_TOKENS + 1, np.int8)),
    ],
    ids=["no Unicode", "no 64-bit number", "too much"],
)
def test_a_request_that_cannot_be_sent_leaves_no_trace(wrong):
    async def test() -> None:
        client = EngineClient(NoProcess(), lambda *_: None)
        client.connection_made(Wire())
        with pytest.raises(RequestError):
            client.submit([wrong], [Taker()])
        assert client.num_open == 0

    asyncio.run(test())


def test_a_taker_that_fails_harms_only_itself():
    async def test(client: EngineClient) -> None:
        def fails(item: Any) -> None:
            raise ZeroDivisionError

        good = Taker()
        client.submit([request("a", max_new_tokens=100), request("b", max_new_tokens=100)], [fails, good])
        await good.ended.wait()
        assert good.finish.type == "length"
        assert (await client.ask("stats", 30))["finished"] == 2

    with_engine(test)


class Panic(BaseException):
    """What a panic inside a library that is written in Rust is raised as: no Exception."""


@pytest.mark.parametrize("kind", [RuntimeError, Panic])
@pytest.mark.parametrize("when", ["first", "last"])
def test_a_taker_that_has_failed_is_told_of_the_end_once(kind, when):
    async def test(client: EngineClient) -> None:
        heard: list[Any] = []
        is_told = asyncio.Event()

        def fails(item: Any) -> None:
            heard.append(item)
            if not isinstance(item, RequestOutput):
                is_told.set()
            elif when == "first" or item.finish is not None:
                raise kind("a bug in the taker")

        good = Taker()
        client.submit([request("a"), request("b")], [fails, good])
        await good.ended.wait()
        await is_told.wait()
        assert good.finish.type == "length"
        assert isinstance(heard[-1], EngineError)
        assert len(heard) == (2 if when == "first" else 4)
        assert client.num_open == 0
        assert client.is_alive
        stats = await client.ask("stats", 30)
        assert (stats["running"], stats["finished"]) == (0, 2)
        (again,) = submit(client, request("a"))
        await again.ended.wait()
        assert again.finish.type == "length"

    with_engine(test)


def test_what_fails_with_each_step_is_shown_once(caplog):
    async def test(client: EngineClient) -> None:
        def fails(item: Any) -> None:
            raise ZeroDivisionError

        client.on_report = fails
        good = Taker()
        requests = [request(f"r{i}") for i in range(10)]
        client.submit([*requests, request("good", max_new_tokens=9)], [*[fails] * 10, good])
        await good.ended.wait()

    caplog.set_level("WARNING", logger="mooli")
    with_engine(test)
    assert sum(record.exc_info is not None for record in caplog.records) == 2
    assert sum("its taker failed" in record.message for record in caplog.records) == 10


def test_a_report_nobody_can_take_harms_nothing():
    async def test(client: EngineClient) -> None:
        def fails(report: Any) -> None:
            raise ZeroDivisionError

        client.on_report = fails
        (taker,) = submit(client, request("a"))
        await taker.ended.wait()
        assert taker.finish.type == "length"
        assert client.is_alive

    with_engine(test)


# -- a process that ends ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV], ids=lambda number: number.name)
def test_when_the_process_is_killed_every_open_request_is_told_by_what(number):
    async def test(client: EngineClient) -> None:
        takers = submit(client, *(request(f"r{i}", max_new_tokens=100) for i in range(12)))  # of which eight run
        asking = asyncio.ensure_future(client.ask("ping", 60))
        await takers[0].started.wait()
        os.kill(client.pid, number)
        error = await client.died
        assert not client.is_alive
        assert isinstance(error, EngineDeadError)
        with pytest.raises(EngineError):
            if not asking.done() or await asking is None:  # answered before the end, or failed by it
                await client.ask("ping", 1)
        for taker in takers:
            assert isinstance(taker.end, EngineDeadError)
            assert number.name in str(taker.end)
        assert len({id(taker.end) for taker in takers}) == len(takers)
        assert client.num_open == 0
        with pytest.raises(EngineDeadError, match=number.name):
            submit(client, request("late"))

    with_engine(test, SLOW)


def test_a_process_that_the_server_kills_is_not_said_to_be_out_of_memory():
    async def test(client: EngineClient) -> None:
        (taker,) = submit(client, request("a", max_new_tokens=100))
        await taker.started.wait()
        client.kill("gave no sign for 3 s and was killed by the server")
        with pytest.raises(EngineDeadError, match="no sign for 3 s"):
            submit(client, request("late"))
        for error in (await client.died, taker.end):
            assert isinstance(error, EngineDeadError)
            assert "gave no sign for 3 s and was killed by the server" in str(error)
            assert "memory" not in str(error)

    with_engine(test, SLOW)


def test_a_process_that_outlives_its_link_is_killed_and_that_is_said():
    class Lingering(NoProcess):
        def wait(self, timeout: float | None = None) -> int:
            if not self.is_killed:
                raise subprocess.TimeoutExpired("engine", timeout or 0)
            return -9

    async def test() -> None:
        client, theirs = await connected(child=Lingering())
        with theirs:
            theirs.shutdown(socket.SHUT_RDWR)
            error = await client.died
        assert "killed by the server" in str(error)
        assert "memory" not in str(error)
        await client.close()

    asyncio.run(within(test()))


def test_a_process_that_cannot_be_waited_for_has_ended_all_the_same():
    class Strange(NoProcess):
        def wait(self, timeout: float | None = None) -> int:
            raise RuntimeError("can't start new thread")

    async def test() -> None:
        client, theirs = await connected(child=Strange())
        (taker,) = submit(client, request("a"))
        theirs.close()
        await taker.ended.wait()
        assert isinstance(taker.end, EngineDeadError)
        assert isinstance(await client.died, EngineDeadError)

    asyncio.run(within(test()))


def test_a_process_that_breaks_down_says_why():
    async def test(client: EngineClient) -> None:
        (taker,) = submit(client, request("a"))
        await taker.ended.wait()
        assert isinstance(taker.end, EngineDeadError)
        assert "RuntimeError: planted" in str(taker.end)
        assert "planted" in str(await client.died)

    with_engine(test, "break")


@pytest.mark.parametrize(
    "name",
    ["ConfigError", "OutOfMemoryError", "ModelNotFoundError", "UnsupportedModelError", "BackendUnavailableError"],
)
def test_an_error_of_building_arrives_as_its_own_class(name):
    with pytest.raises(getattr(mooli.errors, name), match="planted"):
        with_engine(None, f"raise:{name}")


@pytest.mark.parametrize(
    ("scenario", "words"),
    [("raise:Unheard", "ValueError: planted"), ("exit:3", "exit status 3"), ("kill", "SIGKILL")],
)
def test_a_process_that_dies_while_building_says_so(scenario, words):
    with pytest.raises(EngineDeadError, match=words):
        with_engine(None, scenario)


def test_progress_of_building_is_told():
    async def test() -> list[tuple[str, int, int]]:
        told: list[tuple[str, int, int]] = []
        client = await EngineClient.connect(START, *fake_child(), progress=lambda *step: told.append(step))
        await client.close()
        return told

    assert asyncio.run(test()) == [("Loading weights", 1, 1)]


def test_the_engine_is_built_while_the_vocabulary_is_read():
    async def test() -> None:
        is_building = asyncio.Event()

        async def vocab_size() -> int:
            await is_building.wait()
            return 258

        client = await EngineClient.connect(
            START, *fake_child(), vocab_size=vocab_size(), progress=lambda *_: is_building.set()
        )
        await client.close()

    asyncio.run(within(test()))


def test_a_vocabulary_that_cannot_be_read_is_the_error_and_leaves_no_process():
    async def vocab_size() -> int:
        raise ConfigError("planted")

    async def test() -> int:
        child, ours = fake_child()
        with pytest.raises(ConfigError, match="planted"):
            await EngineClient.connect(START, child, ours, vocab_size=vocab_size())
        return child.wait(0)

    assert asyncio.run(within(test())) is not None


def test_closing_ends_the_process_and_what_is_open():
    async def test(client: EngineClient) -> None:
        (taker,) = submit(client, request("a", max_new_tokens=100))
        await taker.started.wait()
        await client.close()
        assert isinstance(taker.end, EngineClosedError)
        with pytest.raises(EngineClosedError):
            submit(client, request("b"))
        with pytest.raises(EngineClosedError):
            await client.ask("ping", 1)
        assert not client.died.done()
        assert not is_running(client.pid)
        await client.close()

    with_engine(test, SLOW)


def test_a_start_that_is_cancelled_leaves_no_process():
    async def test() -> int:
        child, ours = fake_child()
        connecting = asyncio.ensure_future(EngineClient.connect(START, child, ours))
        await asyncio.sleep(0)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        return child.wait(0)

    assert asyncio.run(within(test())) is not None


def test_signals_for_the_whole_service_are_the_servers_to_handle():
    async def test(client: EngineClient) -> None:
        (taker,) = submit(client, request("a", max_new_tokens=20))
        await taker.started.wait()
        os.kill(client.pid, signal.SIGTERM)
        os.kill(client.pid, signal.SIGINT)
        await taker.ended.wait()
        assert taker.finish.type == "length"
        assert await client.ask("ping", 30) is None

    with_engine(test, SLOW)


@pytest.mark.parametrize("moment", ["before the start", "idle", "running"])
def test_when_the_server_is_gone_the_process_ends(moment):
    child, ours = fake_child()
    with ours:
        ours.settimeout(60)
        if moment != "before the start":
            ours.sendall(messages.encode(messages.Start({"model_path": "fake"}, SLOW, "critical")))
            ours.sendall(messages.encode(messages.Vocabulary(258)))
            read_until(ours, messages.Ready)
        if moment == "running":
            ours.sendall(messages.encode(messages.Submit.of([("a", request("a", max_new_tokens=100))])))
            read_until(ours, messages.Outputs)
    assert child.wait(60) == 0


def read_until(connection: socket.socket, kind: type) -> None:
    frames = messages.Frames(messages.ToServer)
    while True:
        data = connection.recv(65536)
        assert data, "the engine process has ended"
        if any(isinstance(message, kind) for message in frames.push(data)):
            return


def test_messages_that_arrive_together_are_all_read():
    """Nothing more comes after them that would wake the process."""
    child, ours = fake_child()
    with ours:
        ours.sendall(messages.encode(START) + messages.encode(messages.Stop()))
        assert child.wait(60) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_process_has_one_socket_and_listens_nowhere():
    async def test(client: EngineClient) -> None:
        links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{client.pid}/fd")]
        sockets = [link for link in links if link.startswith("socket:")]
        assert len(sockets) == 1
        inode = re.findall(r"\d+", sockets[0])[0]
        rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
        (row,) = [row for row in rows if inode in row]
        assert (row[5], len(row)) == ("03", 7)  # connected; without a name

    with_engine(test)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# -- what each side imports -------------------------------------------------------------------------------------------
def imported_by(statement: str) -> list[str]:
    program = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return names


def test_the_engine_process_never_imports_the_server():
    names = imported_by("import mooli.engine.process")
    assert "mooli.engine.build" in names
    for part in ("mooli.server", "starlette", "uvicorn", "httptools", "prometheus_client", "asyncio"):
        assert part not in names
        assert not [name for name in names if name.startswith(f"{part}.")]


def test_the_server_never_imports_what_computes():
    names = imported_by("import mooli.server.launch")
    assert "mooli.server.native_generate" in names
    for part in ("mooli.engine.build", "mooli.backends", "mooli.models", "mooli.runner", "mooli._native", "torch"):
        assert part not in names
        assert not [name for name in names if name.startswith(f"{part}.")]
