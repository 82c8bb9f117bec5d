"""Client and engine process in any order of bytes, steps and calls: every request hears of its own end, once."""

from __future__ import annotations

import asyncio
import collections
import socket

import pytest
from engine_link import NoProcess, Taker, Wire, request
from fake_engine import CONTEXT, fake_build
from hypothesis import given, settings
from hypothesis import strategies as st

from mooli.config import EngineConfig
from mooli.engine import messages, process
from mooli.errors import MooliError, PromptError
from mooli.link.client import EngineClient
from mooli.types import FinishReason, Request, RequestOutput

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quiet(caplog):
    """What is logged of planted faults is not worth showing."""
    caplog.set_level("CRITICAL", logger="mooli")


# -- any order of things ----------------------------------------------------------------------------------------------
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
        self.engine_end = process.Wire(far)
        self.client = EngineClient(NoProcess(), lambda *_: None)
        self.client.connection_made(self.wire)
        self.client.data_received(messages.encode(messages.Ready(built.facts.to_dict())))
        self.takers: list[tuple[int, Taker]] = []
        self.ends: list[set[str]] = []
        """Of each taker: how its request may end."""
        self.left: dict[str, Taker] = {}
        self.sent: collections.defaultdict[str, list[Request]] = collections.defaultdict(list)

    def submit(self, rid: str, num_prompt: int) -> None:
        """Its first token, which the fake model repeats, tells requests apart."""
        if rid in self.client.open_rids:
            return
        mark = len(self.takers) % 200 + 1
        taker = Taker()
        sent = request(rid, [mark] * num_prompt, max_new_tokens=4)
        self.client.submit([sent], [taker])
        self.sent[rid].append(sent)
        self.takers.append((mark, taker))
        self.ends.append({"length" if num_prompt <= CONTEXT else "refused"})
        self.left[rid] = taker

    def leave(self, how: str, rid: str) -> None:
        taker, sent = self.left.get(rid), self.sent[rid]
        if how == "end earlier ones":
            self.client.drop(sent[:-1], "dropped")
            for earlier in sent[:-1]:
                self.client.finish(earlier, "stop")
            return
        if how == "abort":
            self.client.abort([rid], "aborted")
            if taker is not None and taker.end is None:
                self.ends[[taker for _, taker in self.takers].index(taker)].add("abort")
            return
        if how == "drop":
            self.client.drop(sent[-1:], "dropped")
        elif sent:
            self.client.finish(sent[-1], "stop")
        if taker is not None and taker.end is None:
            taker.end = LeftError()  # from here on it asserts that nothing comes

    def up(self, num_bytes: int) -> None:
        piece = bytes(self.wire.written[:num_bytes])
        del self.wire.written[:num_bytes]
        if piece:
            self.near.sendall(piece)

    def turn(self) -> None:
        assert process.take_turn(self.engine_end, self.core, wait=False)
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
    st.tuples(st.sampled_from(["drop", "finish", "abort", "end earlier ones"]), RIDS, st.just(0)),
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
