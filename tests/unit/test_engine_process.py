"""The engine process and its client: life and death, messages, and that no request hears of another."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import CONTEXT, EOS, NUM_PAGES, fake_build
from hypothesis import given, settings
from hypothesis import strategies as st

import mooli.errors
from mooli.config import EngineConfig
from mooli.engine import messages, process
from mooli.engine.client import EngineClient, copy_error, error_named, exit_words
from mooli.errors import EngineClosedError, EngineDeadError, EngineError, MooliError, PromptError, RequestError
from mooli.scheduler.stats import StepStats
from mooli.types import FinishReason, Request, RequestOutput, SamplingParams, TokenLogprobs

FAKE_CORE = Path(__file__).with_name("fake_core.py")
SLOW = "slow:0.02"
START = messages.Start({"model_path": "fake"}, "fake", 258, "critical")


@pytest.fixture(autouse=True)
def quiet(caplog):
    """What is logged of planted faults is not worth showing."""
    caplog.set_level("CRITICAL", logger="mooli")


@dataclass(eq=False)
class Taker:
    """Keeps what happens to one request."""

    ids: list[int] = field(default_factory=list)
    end: RequestOutput | MooliError | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    started: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, item: RequestOutput | MooliError) -> None:
        assert self.end is None, "something came after the end"
        if isinstance(item, RequestOutput):
            self.ids += item.new_token_ids
            self.started.set()
        if isinstance(item, MooliError) or item.finish is not None:
            self.end = item
            self.ended.set()

    @property
    def finish(self) -> FinishReason:
        assert isinstance(self.end, RequestOutput)
        assert self.end.finish is not None
        return self.end.finish


def request(rid: str, prompt: list[int] | None = None, max_new_tokens: int = 3) -> Request:
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, ignore_eos=True)
    return Request(rid=rid, prompt_ids=np.array(prompt or [7, 8], np.int32), sampling=sampling)


def submit(client: EngineClient, *requests: Request) -> list[Taker]:
    takers = [Taker() for _ in requests]
    client.submit(requests, takers)
    return takers


def with_engine(test: Any, scenario: str = "fake", **config: Any) -> Any:
    """Run `test(client)` with a real engine process."""

    async def run() -> Any:
        start = messages.Start({"model_path": "fake", **config}, scenario, 258, "critical")
        client = await EngineClient.start(start, command=(sys.executable, str(FAKE_CORE)))
        try:
            return await within(test(client))
        finally:
            await client.close()

    return asyncio.run(run())


async def within(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """A test that waits for ever says where."""
    return await asyncio.wait_for(coroutine, 60)


# -- a process that works ---------------------------------------------------------------------------------------------
def test_requests_go_in_and_outputs_come_out():
    async def test(client: EngineClient) -> None:
        assert client.is_alive
        assert (client.facts.vocab_size, client.facts.eos_ids[0]) == (258, EOS)
        first, second = submit(client, request("a"), request("b", [9], max_new_tokens=5))
        await first.ended.wait()
        await second.ended.wait()
        assert (first.ids, second.ids) == ([7] * 3, [9] * 5)
        assert first.finish == FinishReason("length", length=3)
        assert client.num_open == 0
        assert client.last_report is not None
        assert client.last_report.stats["generated_tokens"] == 8

    with_engine(test)


def test_every_field_of_a_request_arrives():
    sampling = SamplingParams(seed=2**64 - 1, stop_token_ids=frozenset({1, 2}), logit_bias=((5, -1.5),), stop=("é",))
    sent = Request(
        rid="r", prompt_ids=np.arange(5, dtype=np.int32), sampling=sampling, eos_ids=frozenset({3}),
        return_logprob=True, logprob_start=2, num_top_logprobs=4, logprob_token_ids=(6, 7), namespace="n", priority=-5,
    )  # fmt: skip
    frame = messages.encode(messages.Submit([messages.WireRequest.of(sent)]))
    ((submitted,),) = [message.requests for message in messages.Frames(messages.ToEngine).push(frame)]
    got = submitted.to_request()
    assert got.prompt_ids.dtype == np.int32
    assert got.prompt_ids.tolist() == sent.prompt_ids.tolist()
    for name in Request.__slots__:
        if name != "prompt_ids":
            assert getattr(got, name) == getattr(sent, name), name


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
        aborted, dropped, other = submit(
            client, request("a", max_new_tokens=100), request("b", max_new_tokens=100), request("c", max_new_tokens=9)
        )
        await other.started.wait()
        client.abort(["a", "nobody"], "enough")
        client.drop(["b"], "gone")
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
        Request(rid="\ud800", prompt_ids=np.zeros(1, np.int32)),
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
        command = (sys.executable, str(FAKE_CORE))
        client = await EngineClient.start(START, progress=lambda *step: told.append(step), command=command)
        await client.close()
        return told

    assert asyncio.run(test()) == [("Loading weights", 1, 1)]


def test_a_command_that_does_not_exist_is_an_error():
    with pytest.raises(FileNotFoundError):
        asyncio.run(EngineClient.start(START, command=("/no/such/program",)))


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
        ours, theirs = socket.socketpair()
        with theirs:
            child = subprocess.Popen([sys.executable, str(FAKE_CORE), str(theirs.fileno())], pass_fds=[theirs.fileno()])
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
    ours, theirs = socket.socketpair()
    with theirs:
        child = subprocess.Popen([sys.executable, str(FAKE_CORE), str(theirs.fileno())], pass_fds=[theirs.fileno()])
    with ours:
        ours.settimeout(60)
        if moment != "before the start":
            ours.sendall(messages.encode(messages.Start({"model_path": "fake"}, SLOW, 258, "critical")))
            read_until(ours, messages.Ready)
        if moment == "running":
            many = [messages.WireRequest.of(request("a", max_new_tokens=100))]
            ours.sendall(messages.encode(messages.Submit(many)))
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
    ours, theirs = socket.socketpair()
    with theirs:
        child = subprocess.Popen([sys.executable, str(FAKE_CORE), str(theirs.fileno())], pass_fds=[theirs.fileno()])
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


# -- frames -----------------------------------------------------------------------------------------------------------
SAMPLES = [
    messages.Progress("Loading", 1, 2),
    messages.Outputs(
        [
            RequestOutput("r", [1], FinishReason("stop", matched="x"), logprobs=[TokenLogprobs(1, -0.5, [(-1.0, 2)])]),
            RequestOutput("s", prompt_logprobs=[TokenLogprobs(3, None)], finish=FinishReason("stop", matched=7)),
        ],
        {"running": 1},
        StepStats(step=3),
    ),
    messages.Refused("r", "PromptError", "Füße"),
    messages.Reply(3, {"a": 1}),
    messages.Failed("ConfigError", ""),
]


@settings(deadline=None)
@given(st.data())
def test_a_stream_of_messages_may_be_cut_anywhere(data):
    stream = b"".join(map(messages.encode, SAMPLES))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    frames = messages.Frames(messages.ToServer)
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert [message for piece in pieces for message in frames.push(piece)] == SAMPLES


@pytest.mark.parametrize(
    "bad",
    [
        b"\xff\xff\xff\xff",
        b"\x01\x00\x00\x00\xc1",
        b"\x00\x00\x00\x00",
        messages.encode(messages.Stop()),
        b"\x04\x00\x00\x00\x94\xa1ab",
        messages.encode(SAMPLES[0])[:-1] + b"\xa0",
    ],
    ids=["too long", "no msgpack", "empty", "of the other direction", "unknown kind", "a wrong type"],
)
def test_what_is_no_message_is_an_error(bad):
    frames = messages.Frames(messages.ToServer)
    good = messages.encode(SAMPLES[0])
    read = frames.push(good + bad)
    assert next(read) == SAMPLES[0]
    with pytest.raises(EngineError, match="between server and engine"):
        next(read)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_no_bytes_make_anything_but_messages_or_an_error(data):
    try:
        for message in messages.Frames(messages.ToServer).push(data):
            assert isinstance(message, messages.Message)
    except EngineError:
        pass


class NoProcess:
    """Stands for a child that ends when it is killed."""

    pid = 0

    def __init__(self) -> None:
        self.is_killed = False
        self.connection: socket.socket | None = None

    def wait(self, timeout: float | None = None) -> int:
        return -9

    def kill(self) -> None:
        self.is_killed = True
        if self.connection is not None:
            self.connection.shutdown(socket.SHUT_RDWR)


async def connected(then: bytes = b"") -> tuple[EngineClient, socket.socket]:
    """A client whose other end is in the test's hand, and has said that it is ready, and `then`."""
    ours, theirs = socket.socketpair()
    built = fake_build(EngineConfig.from_kwargs(model_path="fake"))
    theirs.sendall(messages.encode(messages.Ready(built.facts.to_dict())) + then)
    child = NoProcess()
    child.connection = theirs
    return await EngineClient.connect(START, child, ours), theirs


@pytest.mark.parametrize("bad", [b"\xff\xff\xff\xff", messages.encode(messages.Ready({"no": "facts"}))])
def test_an_engine_that_is_not_understood_is_ended(bad):
    async def test() -> None:
        client, theirs = await connected()
        with theirs:
            (taker,) = submit(client, request("a"))
            theirs.sendall(bad)
            await taker.ended.wait()
            assert isinstance(taker.end, EngineDeadError)
            assert "not understood" in str(taker.end)
            assert not client.is_alive
            await client.close()

    asyncio.run(within(test()))


def test_last_words_are_heard_although_a_write_fails_first():
    async def test() -> None:
        client, theirs = await connected()
        (taker,) = submit(client, request("a"))
        last = [RequestOutput("a", [5], FinishReason("length", length=1))]
        theirs.sendall(messages.encode(messages.Outputs(last, {}, StepStats())))
        theirs.sendall(messages.encode(messages.Failed("OutOfMemoryError", "planted")))
        theirs.close()
        (late,) = submit(client, request("b"))  # written before the loop reads: a broken pipe
        await late.ended.wait()
        assert taker.finish.type == "length"
        assert "planted" in str(late.end)
        await client.close()

    asyncio.run(within(test()))


def test_errors_travel_by_name():
    assert isinstance(error_named("PromptError", "x"), PromptError)
    for name in ("KeyError", "MooliError.__init__", "annotations", ""):
        assert isinstance(error_named(name, "x"), EngineDeadError)
    error = EngineDeadError("why")
    assert copy_error(error) is not error
    assert str(copy_error(error)) == "why"


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, "exit status 0"), (3, "exit status 3"), (-11, "SIGSEGV"), (-9, "run out of memory"), (-250, "unknown")],
)
def test_an_exit_status_is_told_in_words(status, words):
    assert words in exit_words(status)


# -- any order of things ----------------------------------------------------------------------------------------------
class Wire(asyncio.Transport):
    """Keeps what the client writes until the test carries it on."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False


class LeftError(MooliError):
    """The test has dropped or finished the request."""


class Trial:
    """A client and an engine whose every byte and step the test moves."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.near, far = socket.socketpair()
        self.far = far
        self.near.setblocking(False)
        built = fake_build(
            EngineConfig.from_kwargs(model_path="fake", max_running_requests=2), next_token=lambda context: context[0]
        )
        self.core = built.core
        self.link = process.Link(far)
        self.client = EngineClient(NoProcess(), lambda *_: None)
        self.client.connection_made(self.wire)
        self.client.data_received(messages.encode(messages.Ready(built.facts.to_dict())))
        self.takers: list[tuple[int, Taker]] = []
        self.ends: list[set[str]] = []
        """Of each taker: how its request may end."""
        self.left: dict[str, Taker] = {}

    def submit(self, rid: str, num_prompt: int) -> None:
        """Its first token, which the fake model repeats, tells requests apart."""
        if rid in self.client.open_rids:
            return
        mark = len(self.takers) % 200 + 1
        taker = Taker()
        self.client.submit([request(rid, [mark] * num_prompt, max_new_tokens=4)], [taker])
        self.takers.append((mark, taker))
        self.ends.append({"length" if num_prompt <= CONTEXT else "refused"})
        self.left[rid] = taker

    def leave(self, how: str, rid: str) -> None:
        taker = self.left.get(rid)
        if how == "abort":
            self.client.abort([rid], "aborted")
            if taker is not None and taker.end is None:
                self.ends[[taker for _, taker in self.takers].index(taker)].add("abort")
            return
        if how == "drop":
            self.client.drop([rid], "dropped")
        else:
            self.client.finish({rid: "stop"})
        if taker is not None and taker.end is None:
            taker.end = LeftError()  # from here on it asserts that nothing comes

    def up(self, num_bytes: int) -> None:
        piece = bytes(self.wire.written[:num_bytes])
        del self.wire.written[:num_bytes]
        if piece:
            self.near.sendall(piece)

    def turn(self) -> None:
        assert process.take_turn(self.link, self.core, wait=False)
        self.core.check()

    def down(self, num_bytes: int) -> int:
        try:
            data = self.near.recv(num_bytes)
        except BlockingIOError:
            return 0
        self.client.data_received(data)
        return len(data)

    def settle(self) -> None:
        """Carry everything on until nothing moves."""
        while True:
            self.up(1 << 20)
            self.turn()
            moved = self.down(1 << 20)
            if not moved and not self.wire.written and not self.core.has_work:
                return

    def close(self) -> None:
        self.near.close()
        self.far.close()


RIDS = st.sampled_from(["a", "b", "c"])
MOVES = st.one_of(
    st.tuples(st.just("submit"), RIDS, st.sampled_from([1, 5, CONTEXT + 1])),
    st.tuples(st.sampled_from(["drop", "finish", "abort"]), RIDS, st.just(0)),
    st.tuples(st.just("up"), st.just(""), st.sampled_from([1, 30, 1000])),
    st.tuples(st.just("turn"), st.just(""), st.just(0)),
    st.tuples(st.just("down"), st.just(""), st.sampled_from([1, 100, 10000])),
)


def check_trial(trial: Trial, moves: list[tuple[str, str, int]]) -> None:
    for kind, rid, number in moves:
        if kind == "submit":
            trial.submit(rid, number)
        elif kind == "up":
            trial.up(number)
        elif kind == "down":
            trial.down(number)
        elif kind == "turn":
            trial.turn()
        else:
            trial.leave(kind, rid)
    trial.settle()
    for rid in ("a", "b", "c"):  # every id can be used again, and hears of itself alone
        trial.submit(rid, 3)
    last = [taker for _, taker in trial.takers[-3:]]
    trial.settle()
    assert [taker.finish for taker in last] == [FinishReason("length", length=4)] * 3
    for (mark, taker), ends in zip(trial.takers, trial.ends, strict=True):
        assert set(taker.ids) <= {mark}
        if isinstance(taker.end, RequestOutput):
            assert taker.finish.type in ends
        elif not isinstance(taker.end, LeftError):
            assert isinstance(taker.end, PromptError)
            assert "refused" in ends
    assert trial.client.num_open == 0
    assert trial.core.stats()["used_pages"] == 0


@settings(max_examples=300, deadline=None)
@given(st.lists(MOVES, max_size=40))
def test_no_request_hears_of_another_that_had_its_id(moves):
    async def play() -> None:
        trial = Trial()
        try:
            check_trial(trial, moves)
        finally:
            trial.close()

    asyncio.run(play())
