"""What tests of the engine process and its client share: requests, who takes their outputs, processes real and not."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fake_engine import fake_build

from mooli.config import EngineConfig
from mooli.engine import messages
from mooli.engine.child import EngineChild
from mooli.errors import MooliError
from mooli.link.client import EngineClient
from mooli.types import FinishReason, Request, RequestOutput, SamplingParams

FAKE_CORE = Path(__file__).with_name("fake_core.py")
SLOW = "slow:0.02"
START = messages.Start({"model_path": "fake"}, "fake", "critical")


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


def fake_child() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A process with a fake engine, and the socket to it."""
    return EngineChild((sys.executable, str(FAKE_CORE))).take()


def with_engine(test: Any, scenario: str = "fake", **config: Any) -> Any:
    """Run `test(client)` with a real engine process."""

    async def run() -> Any:
        start = messages.Start({"model_path": "fake", **config}, scenario, "critical")
        client = await EngineClient.connect(start, *fake_child())
        try:
            return await within(test(client))
        finally:
            await client.close()

    return asyncio.run(run())


async def within(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """A test that waits for ever says where."""
    return await asyncio.wait_for(coroutine, 60)


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


async def connected(then: bytes = b"", child: NoProcess | None = None) -> tuple[EngineClient, socket.socket]:
    """A client whose other end is in the test's hand, and has said that it is ready, and `then`."""
    ours, theirs = socket.socketpair()
    built = fake_build(EngineConfig.from_kwargs(model_path="fake"))
    theirs.sendall(messages.encode(messages.Ready(built.facts.to_dict())) + then)
    child = child or NoProcess()
    child.connection = theirs
    return await EngineClient.connect(START, child, ours), theirs


class Wire(asyncio.Transport):
    """Keeps what the client writes until the test carries it on."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False
