"""The other ranks of an engine as rank 0 sees them: what it has them do, and what becomes of them.

Owns the processes, the links to them, the folder in which the ranks meet, and the cause when one breaks down. A thread
listens to all links, so that a rank that ends is noticed at once, also where this process waits for it in a sum. The
first failure ends all ranks: what they have in common cannot go on without one. Never computes anything.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from mooli.backends.base import Backend, CacheSpec, Limits
from mooli.backends.parallel import COLLECTIVE_TIMEOUT_S, ParallelBackend, RankGroup
from mooli.batch import ScheduleBatch, StepOutput
from mooli.config import EngineConfig
from mooli.engine import rank_process
from mooli.engine.child import EXIT_WAIT_S, command_of, error_named, exit_words, start_child
from mooli.engine.pool_size import PoolNeeds
from mooli.errors import EngineDeadError, EngineError, MooliError
from mooli.runner.base import Runner
from mooli.scheduler.write_behind import PageBytes

logger = logging.getLogger(__name__)

COMMAND = command_of("mooli.engine.rank_process")
"""Becomes a rank; the number of its socket, the id of this process and the folder to meet in are appended."""

GATHER_S = 0.5
"""After a failure others follow from it: how long they are waited for, to tell the cause from the consequences."""

BLAME_WAIT_S = 2.0
"""How long after a failure in this process the failure of another rank is waited for, which may be its cause."""

STOP_WAIT_S = 10.0
"""How long ranks that are told to stop may take before they are killed."""

Callback = Callable[[EngineDeadError], None]

T = TypeVar("T", bound=rank_process.RankMessage)


class Ranks:
    """Ranks 1 and on of an engine, each a child process with a socket pair. Make it with `start`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = Path(tempfile.mkdtemp(prefix="mooli-ranks-"))  # for this user alone
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._links: dict[int, socket.socket] = {}
        self._changed = threading.Condition()
        self._answers: dict[int, list[Any]] = {}
        self._failures: dict[int, rank_process.Failed | str] = {}
        self._error: MooliError | None = None
        self._is_closing = False
        self._kill_at_s = 0.0
        self._callbacks: list[Callback] = []
        self._listener = threading.Thread(target=self._listen, name="mooli-ranks", daemon=True)

    @classmethod
    def start(cls, config: EngineConfig, model_path: Path) -> Ranks:
        """Start `config.tp_size - 1` processes and have them open their devices; returns when all have.

        Raises what opening raised (BackendUnavailableError, ConfigError, …), or EngineDeadError, naming the rank.
        """
        ranks = cls(config.tp_size)
        try:
            for rank in range(1, ranks.size):
                ranks._spawn(rank)
            ranks._listener.start()
            for rank in range(1, ranks.size):
                message = rank_process.Open(rank, ranks.size, str(ranks.store), config.to_dict(), str(model_path))
                ranks._send(rank, rank_process.encode(message))
            ranks.expect(rank_process.Opened)
        except BaseException:
            ranks.close()
            raise
        return ranks

    @property
    def store(self) -> Path:
        """The file through which the ranks meet."""
        return self._folder / "store"

    def tell(self, message: rank_process.RankMessage) -> None:
        """Send to every rank. Raises what has broken one down."""
        self._check()
        frame = rank_process.encode(message)
        for rank in self._links:
            self._send(rank, frame)

    def tell_each(self, messages: Sequence[rank_process.RankMessage]) -> None:
        """Send to every rank one of its own, in their order. Raises what has broken one down."""
        self._check()
        for rank, message in zip(self._links, messages, strict=True):
            self._send(rank, rank_process.encode(message))

    def expect(self, kind: type[T]) -> list[T]:
        """Every rank's next message, which is of this kind, in their order. Raises what has broken one down."""
        with self._changed:
            while self._error is None and not all(self._answers.values()):
                self._changed.wait()
            self._check()
            messages = [answers.pop(0) for answers in self._answers.values()]
        for rank, message in enumerate(messages, 1):
            if not isinstance(message, kind):
                raise EngineDeadError(f"rank {rank} said {type(message).__name__} where {kind.__name__} was expected")
        return messages

    @contextlib.contextmanager
    def blaming(self) -> Iterator[None]:
        """What fails in here cannot be repaired, as the ranks are no longer at the same place: EngineDeadError with the
        rank whose failure it was, this one's if no other has one."""
        try:
            yield
        except Exception as exc:
            with self._changed:
                self._changed.wait_for(lambda: self._error is not None, BLAME_WAIT_S)
                if self._error is None:
                    words = f"rank 0 of {self.size} failed: {type(exc).__name__}: {exc}"
                    self._error = EngineDeadError(words)
                    self._kill()
                raise EngineDeadError(str(self._error)) from exc
        except BaseException as exc:  # Ctrl-C
            with self._changed:
                if self._error is None:  # or the ranks' end would be taken for the cause
                    self._error = EngineDeadError(f"rank 0 of {self.size} was interrupted by {type(exc).__name__}")
            self._kill()
            raise

    def watch(self, callback: Callback) -> None:
        """Have `callback` called with the cause, on another thread, when a rank breaks down; now if one has."""
        with self._changed:
            self._callbacks.append(callback)
            error = self._error
        if error is not None:
            callback(EngineDeadError(str(error)))

    def stop(self) -> None:
        """Tell the ranks to end, without waiting. Before `close`, for an engine that works."""
        with self._changed:
            self._is_closing = True
            self._kill_at_s = time.monotonic() + STOP_WAIT_S
        with contextlib.suppress(MooliError):
            self.tell(rank_process.Stop())

    def close(self) -> None:
        """End the ranks, at once unless they were told to stop, and forget them. May be called again."""
        with self._changed:
            self._is_closing = True
        for process in self._processes.values():
            try:
                process.wait(max(0.0, self._kill_at_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        # The listener ends with the last link.
        if self._listener.is_alive() and threading.current_thread() is not self._listener:
            self._listener.join(STOP_WAIT_S)
        for link in self._links.values():
            link.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- parts --
    def _spawn(self, rank: int) -> None:
        self._processes[rank], link = start_child(COMMAND, str(os.getpid()), str(self._folder))
        self._links[rank], self._answers[rank] = link, []
        # A rank that takes nothing for so long hangs.
        link.settimeout(COLLECTIVE_TIMEOUT_S)

    def _send(self, rank: int, frame: bytes) -> None:
        try:
            self._links[rank].sendall(frame)
        except OSError as exc:
            with self._changed:
                self._changed.wait_for(lambda: self._error is not None, BLAME_WAIT_S)
                self._check()
            raise EngineDeadError(f"rank {rank} of {self.size} cannot be told of a step: {exc}") from exc

    def _check(self) -> None:
        if self._error is not None:
            raise type(self._error)(*self._error.args)

    def _kill(self) -> None:
        for process in self._processes.values():
            process.kill()

    # -- on the listening thread --
    def _listen(self) -> None:
        poll = select.poll()
        ranks = {link.fileno(): rank for rank, link in self._links.items()}
        for number in ranks:
            poll.register(number, select.POLLIN)
        decide_at_s: float | None = None
        while ranks:
            wait_s = None if decide_at_s is None else max(0.0, decide_at_s - time.monotonic())
            for number, _ in poll.poll(None if wait_s is None else 1000 * wait_s):
                if not self._take(ranks[number]):
                    poll.unregister(number)
                    del ranks[number]
            if self._failures and not self._is_closing and self._error is None:
                if decide_at_s is None:
                    decide_at_s = time.monotonic() + GATHER_S
                elif time.monotonic() >= decide_at_s:
                    self._fail()
                    decide_at_s = None
            elif self._error is not None:
                decide_at_s = None
        if self._failures and not self._is_closing and self._error is None:
            self._fail()

    def _take(self, rank: int) -> bool:
        """Take what a rank says; False if that was the last."""
        try:
            message = rank_process.receive(self._links[rank], rank_process.FromRank)
        except OSError:  # it has ended before it took what it was sent
            message = None
        except EngineError as exc:
            message = rank_process.Failed(type(exc).__name__, str(exc), is_consequence=True)
        if message is None:
            self._failures.setdefault(rank, self._exit_of(rank))
            return False
        with self._changed:
            if isinstance(message, rank_process.Failed):
                self._failures[rank] = message
            else:
                self._answers[rank].append(message)
                self._changed.notify_all()
        return True

    def _exit_of(self, rank: int) -> str:
        try:
            return exit_words(self._processes[rank].wait(EXIT_WAIT_S))
        except subprocess.TimeoutExpired:
            return "has closed its link"

    def _fail(self) -> None:
        """Settle the cause, end all ranks, and tell who watches."""
        error = self._cause()
        self._kill()
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()
            callbacks = list(self._callbacks)
        logger.error("%s", error)
        for callback in callbacks:
            try:
                callback(EngineDeadError(str(error)))
            except Exception:
                logger.warning("the end of a rank was not taken note of", exc_info=True)

    def _cause(self) -> MooliError:
        """The failure that the others follow from: a process that was killed, else an error of a rank's own."""

        def weight(rank: int) -> int:
            failure = self._failures[rank]
            return 0 if isinstance(failure, str) else 2 if failure.is_consequence else 1

        rank = min(self._failures, key=lambda rank: (weight(rank), rank))
        failure = self._failures[rank]
        if isinstance(failure, str):
            return EngineDeadError(f"rank {rank} of {self.size} {failure}")
        error = error_named(failure.error, failure.message)
        words = failure.message if type(error).__name__ == failure.error else f"{failure.error}: {failure.message}"
        return type(error)(f"rank {rank} of {self.size} failed: {words}")


class RankedRunner:
    """Computes every step on all ranks at once; what this rank sampled counts, the others sample the same."""

    def __init__(self, runner: Runner, ranks: Ranks) -> None:
        self._runner = runner
        self._ranks = ranks

    def execute(self, batch: ScheduleBatch) -> StepOutput:
        """See `Runner.execute`. Raises EngineDeadError: a step that fails on one rank is the last of all."""
        with self._ranks.blaming():
            self._ranks.tell(rank_process.Step(batch))
            return self._runner.execute(batch)


class RankedPages:
    """Pages of the KV cache as bytes: of each page the parts of all ranks in their order, as if they were one device's.

    Between steps, on their thread. Ranks do what they are told in that order, and so see the same steps before and
    after. What fails on one rank ends all, as in a step.
    """

    def __init__(self, own: Backend, part_bytes: int, ranks: Ranks) -> None:
        """part_bytes: of a page on one rank, the same on each."""
        self._own = own
        self._part_bytes = part_bytes
        self._ranks = ranks

    @property
    def page_bytes(self) -> int:
        return self._part_bytes * self._ranks.size

    def read_pages(self, pages: Sequence[int]) -> NDArray[np.uint8]:
        """See `Backend.read_pages`: uint8 (pages, page_bytes)."""
        with self._ranks.blaming():
            self._ranks.tell(rank_process.ReadPages(list(pages)))
            whole = np.empty((len(pages), self._ranks.size, self._part_bytes), np.uint8)
            whole[:, 0] = self._own.read_pages(pages)
            for rank, answer in enumerate(self._ranks.expect(rank_process.PagesRead), 1):
                whole[:, rank] = np.frombuffer(answer.data, np.uint8).reshape(len(pages), self._part_bytes)
            return whole.reshape(len(pages), self.page_bytes)

    def write_pages(self, pages: Sequence[int], data: Any) -> None:
        """See `Backend.write_pages`."""
        whole = np.frombuffer(data, np.uint8).reshape(len(pages), self._ranks.size, self._part_bytes)
        with self._ranks.blaming():
            self._ranks.tell_each(
                [rank_process.WritePages(list(pages), whole[:, rank].tobytes()) for rank in range(1, self._ranks.size)]
            )
            self._own.write_pages(pages, np.ascontiguousarray(whole[:, 0]))

    def read_state(self, slot: int) -> NDArray[np.uint8]:
        """Never: models with recurrent layers run on one rank."""
        raise EngineError("recurrent states are not cut into parts")

    def write_state(self, slot: int, data: Any) -> None:
        """See `read_state`."""
        raise EngineError("recurrent states are not cut into parts")


class RankTeam:
    """How building an engine on several processes differs from one (`SoloTeam`): the other ranks go through the same
    steps, in order: meet, load, allocate. Rank 0 is this process; the others are started by `meet`."""

    def __init__(self, config: EngineConfig, model_path: Path) -> None:
        self._config = config
        self._model_path = model_path
        self._ranks: Ranks | None = None

    def meet(self, backend: Backend) -> int:
        """Start the other ranks and have all meet: available bytes of this rank's device, before anything is loaded.

        Raises what has broken a rank down.
        """
        # Only backends that are one are let through by the configuration.
        parallel = cast(ParallelBackend, backend)
        self._ranks = ranks = Ranks.start(self._config, self._model_path)
        ranks.tell(rank_process.Load())
        with ranks.blaming():
            parallel.join(RankGroup(0, ranks.size, ranks.store))
            available_bytes = parallel.memory().available_bytes
            parallel.barrier()
        ranks.watch(lambda error: parallel.abort())
        return available_bytes

    def needs(self, own: PoolNeeds) -> list[PoolNeeds]:
        loaded = self._met.expect(rank_process.Loaded)
        others = [
            replace(own, available_bytes=message.available_bytes, weight_bytes=message.weight_bytes)
            for message in loaded
        ]
        return [own, *others]

    def allocate(self, spec: CacheSpec, num_pages: int, limits: Limits, vocab_size: int) -> None:
        self._met.tell(
            rank_process.Allocate(
                kv_dtype=spec.dtype,
                page_size=spec.page_size,
                num_pages=num_pages,
                max_tokens=limits.max_tokens,
                max_rows=limits.max_rows,
                max_pages_per_row=limits.max_pages_per_row,
                vocab_size=vocab_size,
            )
        )

    def runner(self, own: Runner) -> Runner:
        self._met.expect(rank_process.Allocated)
        return RankedRunner(own, self._met)

    def pages(self, own: Backend, part_bytes: int) -> PageBytes:
        return RankedPages(own, part_bytes, self._met)

    def describe(self, needs: Sequence[PoolNeeds]) -> dict[str, Any]:
        return {"tp_size": len(needs), "weight_bytes_of_ranks": [need.weight_bytes for need in needs]}

    def watch(self, callback: Callable[[EngineDeadError], None]) -> None:
        self._met.watch(callback)

    def stop(self) -> None:
        if self._ranks is not None:
            self._ranks.stop()

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.close()

    @property
    def _met(self) -> Ranks:
        if self._ranks is None:
            raise EngineDeadError("no other rank has been started")
        return self._ranks
