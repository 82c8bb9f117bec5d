"""The engine process of a server: one thread that reads what is asked, steps the core, and sends what came out.

Owns the process's life, from its first message to its exit, and the link to the server. The link is an end of a socket
pair that the server made: it has no name, so nobody else can connect to it. Never handles text, never imports anything
of the server, and never waits for it: what the server does not take is kept, and the next step begins.

When the server is gone, for whatever reason, the link ends and so does this process.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from mooli.config import EngineConfig
from mooli.engine import messages
from mooli.engine.build import BuiltEngine, Progress, VocabSize, build_engine
from mooli.engine.child import SERVER_SIGNALS
from mooli.engine.core import STUCK_S, EngineCore
from mooli.errors import EngineError, MooliError, RequestError
from mooli.logs import set_up_logging
from mooli.types import RequestOutput

logger = logging.getLogger(__name__)

_READ_BYTES = 1 << 20

Build = Callable[[messages.Start, VocabSize, Progress], BuiltEngine]


class ServerGoneError(EngineError):
    """The server is gone."""


class Wire:
    """This process's end of the socket pair, for one thread. What the socket does not take at once, an answer of some
    megabytes, goes out on a thread of its own: steps go on meanwhile, and what others wait for is behind it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._frames = messages.Frames(messages.ToEngine)
        self._received: collections.deque[messages.ToEngine] = collections.deque()
        self._unsent = bytearray()
        self._sending = threading.Lock()
        self._is_left: threading.Event | None = None  # something is unsent; made with the thread that waits for it
        self._interrupt: EngineError | None = None
        self._woken, self._wake = os.pipe()
        weakref.finalize(self, _close, self._woken, self._wake)
        self._poll.register(self._woken, select.POLLIN)
        self._calls: collections.deque[Callable[[], None]] = collections.deque()

    def wake(self, function: Callable[[], None]) -> None:
        """Have `function` called by `make_calls`, and `receive` end where it waits. Called on another thread."""
        self._calls.append(function)
        os.write(self._wake, b"!")

    def make_calls(self) -> None:
        """What `wake` was given."""
        while self._calls:
            self._calls.popleft()()

    def interrupt(self, error: EngineError) -> None:
        """Have `receive` raise `error`, where it waits too. Called on another thread. A step that keeps the process
        from ending within STUCK_S is not waited for."""
        self._interrupt = error
        os.write(self._wake, b"!")
        threading.Thread(target=_end_stuck_process, daemon=True).start()

    def receive(self, *, wait: bool) -> Iterator[messages.ToEngine]:
        """What has come; with `wait`, once there is something. What the caller does not take is kept for the next call.

        Raises ServerGoneError when the server is gone, EngineError for what is no message, or what `interrupt` was
        given.
        """
        if not self._received:
            self._read(wait=wait)
        while self._received:
            yield self._received.popleft()

    def _read(self, *, wait: bool) -> None:
        ready = self._poll.poll(None if wait else 0)
        if ready:
            if self._interrupt is not None:
                raise self._interrupt
            if any(number == self._woken for number, _ in ready):
                os.read(self._woken, 4096)
            try:
                data = self._connection.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except OSError as exc:
                raise ServerGoneError(f"the link to the server broke: {exc}") from exc
            if not data:
                raise ServerGoneError("the server has ended")
            self._received.extend(self._frames.push(data))

    def send(self, message: messages.Message) -> None:
        """Send `message`, or have sent what the socket does not take now. Raises ServerGoneError."""
        frame = messages.encode(message)
        with self._sending:
            self._unsent += frame
            self._flush()
            is_left = bool(self._unsent)
        if is_left:
            self._have_sent()

    def drain(self) -> None:
        """Wait until everything is sent. Raises ServerGoneError."""
        while self._unsent:
            self._wait_until_writable()
            with self._sending:
                self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent:
                sent = self._connection.send(self._unsent)
                del self._unsent[:sent]
        except BlockingIOError:
            return
        except OSError as exc:
            raise ServerGoneError(f"the link to the server broke: {exc}") from exc

    def _wait_until_writable(self) -> None:
        poll = select.poll()
        poll.register(self._connection, select.POLLOUT)
        poll.poll()

    def _have_sent(self) -> None:
        if self._is_left is None:
            self._is_left = threading.Event()
            threading.Thread(target=self._send_rest, args=(self._is_left,), name="mooli-link", daemon=True).start()
        self._is_left.set()

    def _send_rest(self, is_left: threading.Event) -> None:
        with contextlib.suppress(ServerGoneError, ValueError, OSError):  # this process's thread finds out by itself
            while is_left.wait():
                is_left.clear()
                self.drain()


def _end_stuck_process() -> None:
    time.sleep(STUCK_S)
    logger.error("the step that was being computed does not end")
    os._exit(1)


def _close(*numbers: int) -> None:
    for number in numbers:
        os.close(number)


def run(connection: socket.socket, build: Build) -> int:
    """Be the engine process on `connection`: build what the first message asks for, then serve. Returns the exit
    status."""
    wire = Wire(connection)
    try:
        start = _first_message(wire)
        if start is None:
            return 0
        set_up_logging(start.log_level)
        try:
            vocab_size = functools.cache(lambda: _vocabulary(wire).size)
            built = build(
                start, vocab_size, lambda stage, done, total: wire.send(messages.Progress(stage, done, total))
            )
            vocab_size()  # it comes in any case
        except ServerGoneError:
            raise
        except (MooliError, OSError, MemoryError) as exc:
            return _fail(wire, exc)
        built.bind_thread()
        built.watch(wire.interrupt)
        built.core.bind_disk(functools.partial(wire.wake, built.core.look_again))
        try:
            wire.send(messages.Ready(built.facts.to_dict()))
            serve(wire, built.core)
        finally:
            built.close()
    except ServerGoneError as exc:
        logger.debug("the engine process ends: %s", exc)
    except Exception as exc:
        logger.exception("the engine has died")
        return _fail(wire, exc)
    return 0


def serve(wire: Wire, core: EngineCore) -> None:
    """Step `core` while there is work and do what comes over `wire`, until that says stop or ends."""
    while take_turn(wire, core, wait=not core.has_work):
        pass


def take_turn(wire: Wire, core: EngineCore, *, wait: bool) -> bool:
    """Do what has come over `wire`, with `wait` once there is something, then take one step if there is work. False
    when told to stop."""
    for message in wire.receive(wait=wait):
        if isinstance(message, messages.Stop):
            return False
        _carry_out(message, core, wire)
    wire.make_calls()
    if core.has_work:
        _send_outputs(core.step(), core, wire)
    return True


def _send_outputs(outputs: list[RequestOutput], core: EngineCore, wire: Wire) -> None:
    """In one frame, or in several where log-probabilities are too many for one. A request that fills more than a frame
    by itself ends."""
    try:
        wire.send(messages.Outputs(outputs, core.stats(), core.last_step))
    except RequestError as exc:
        if len(outputs) == 1:
            core.abort(outputs[0].rid)
            words = f"the log-probabilities of one step are too many: {exc}. Ask for fewer of them"
            wire.send(messages.Refused(outputs[0].rid, RequestError.__name__, words))
        else:
            middle = len(outputs) // 2
            _send_outputs(outputs[:middle], core, wire)
            _send_outputs(outputs[middle:], core, wire)


def _vocabulary(wire: Wire) -> messages.Vocabulary:
    while True:
        for message in wire.receive(wait=True):
            if isinstance(message, messages.Vocabulary):
                return message
            if isinstance(message, messages.Stop):
                raise ServerGoneError("stopped while the engine was built")
            raise EngineError(f"the engine process was asked for {type(message).__name__} while it loads")


def _first_message(wire: Wire) -> messages.Start | None:
    while True:
        for message in wire.receive(wait=True):
            if isinstance(message, messages.Start):
                return message
            if isinstance(message, messages.Stop):
                return None
            raise EngineError(f"the engine process was asked for {type(message).__name__} before Start")


def _carry_out(message: messages.ToEngine, core: EngineCore, wire: Wire) -> None:
    if isinstance(message, messages.Submit):
        for request in message.to_requests():
            try:
                core.add(request)
            except MooliError as exc:
                wire.send(messages.Refused(request.rid, type(exc).__name__, str(exc)))
    elif isinstance(message, messages.Abort):
        for name in message.names:
            core.abort(name, message.reason)
    elif isinstance(message, messages.Finish):
        for name, matched in message.matched.items():
            core.finish(name, matched)
    elif isinstance(message, messages.Tokens):
        core.bind_grammars(lambda: message.vocabulary, functools.partial(wire.wake, core.look_again))
    elif isinstance(message, messages.Ask):
        wire.send(_answer(message, core))
    else:
        raise EngineError(f"the engine process was asked for {type(message).__name__} while it runs")


def _answer(message: messages.Ask, core: EngineCore) -> messages.Reply:
    try:
        return messages.Reply(message.number, core.answer(message.question, **message.details))
    except MooliError as exc:
        return messages.Reply(message.number, None, str(exc))


def _fail(wire: Wire, exc: BaseException) -> int:
    """Say why the process ends; its exit status."""
    try:
        wire.send(messages.Failed(type(exc).__name__, str(exc) or type(exc).__name__))
        wire.drain()
    except ServerGoneError:
        logger.debug("nobody is left to hear of it")
    return 1


def _build(start: messages.Start, vocab_size: VocabSize, progress: Progress) -> BuiltEngine:
    config = EngineConfig.from_kwargs(**start.config)
    return build_engine(config, Path(start.model_path), tokenizer_vocab_size=vocab_size, progress=progress)


def main(build: Build = _build) -> int:
    """Entry of the process: its only argument is the number of the inherited socket."""
    for number in SERVER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SERVER_SIGNALS)
    return run(socket.socket(fileno=int(sys.argv[1])), build)
