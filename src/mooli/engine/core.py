"""The engine's one loop: schedule, execute, update. Start reading here.

Owns nothing but the order of things: the scheduler decides, the runner computes, and between them passes one
ScheduleBatch a step. Never touches text, pages or devices, and never starts a thread: who calls `step`, and when, is
the business of the clients in this package. Not safe to call from several threads at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mooli.batch import ScheduleBatch, StepOutput
from mooli.engine.child import CLOSE_DISK_S
from mooli.errors import EngineDeadError, EngineError
from mooli.grammar.compiler import Grammars
from mooli.runner.base import Runner, check_output
from mooli.scheduler.planning import Pace
from mooli.scheduler.scheduler import ABORTED, Scheduler
from mooli.scheduler.stats import StepStats
from mooli.types import Request, RequestOutput, TokenBytes

STUCK_S = 30.0
"""How long whoever calls `step` waits for one after the engine has failed."""


class _ReleasedRunner:
    def execute(self, batch: ScheduleBatch) -> StepOutput:
        raise EngineError("the engine has given its device back: make a new one")


class EngineCore:
    """Requests in by `add`, outputs out of `step`. Each request ends with exactly one output that has `finish`."""

    def __init__(
        self, scheduler: Scheduler, runner: Runner, pace: Pace | None = None, grammars: Grammars | None = None
    ) -> None:
        """pace: how long steps with prompts may become beside streams; None leaves the scheduler's own number.
        grammars: what the scheduler's constraints are made by, if they are made at all."""
        self._scheduler = scheduler
        self._tiers = scheduler.tiers
        self._runner: Runner = runner
        self._pace = pace
        self._grammars = grammars
        self._is_held = False  # all requests wait for what no step brings

    def step(self) -> list[RequestOutput]:
        """Run one step; returns what is new for each request. Does nothing, quickly, if there is no work.

        If the runner raises, the requests of that step end with finish reason `error` and all others go on; but
        EngineDeadError, which says that no step can follow, is raised here.
        """
        for tier in self._tiers:
            tier.move()
        batch = self._scheduler.schedule()
        self._is_held = batch is None
        if batch is None:
            return self._scheduler.take_outputs()
        started = time.perf_counter()
        try:
            output = self._runner.execute(batch)
            check_output(batch, output)
        except EngineDeadError as exc:  # nothing can be computed any more: all requests end, not these alone
            self._scheduler.fail(batch, exc)
            raise
        except Exception as exc:  # whatever it is, it is the finish reason of these requests
            self._scheduler.fail(batch, exc)
            return self._scheduler.take_outputs()
        except BaseException as exc:  # Ctrl-C in a notebook: the caller sees it, and the engine can still be used
            self._scheduler.fail(batch, exc)
            raise
        seconds = time.perf_counter() - started
        if self._pace is not None:
            self._pace.learn(self._scheduler.last_step, seconds)
            self._scheduler.mixed_prefill_tokens = self._pace.prefill_tokens
        for tier in self._tiers:
            tier.learn(self._scheduler.last_step, seconds)
        return self._scheduler.update(batch, output)

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError (PromptError) if it cannot be served; then it has no outputs."""
        self._scheduler.add(request)
        self._is_held = False

    def abort(self, rid: str, message: str = ABORTED) -> bool:
        """End a request with `abort`; its last output comes from the next `step`. False if it has ended already."""
        return self._scheduler.abort(rid, message)

    def finish(self, rid: str, matched: int | str) -> bool:
        """End a request with `stop`, for a stop string found in its text. Otherwise like `abort`."""
        return self._scheduler.finish(rid, matched)

    def release_runner(self) -> None:
        """Let go of the runner, whose memory and threads are free once its last owner does. `step` ends requests with
        `error` from here on."""
        self._runner = _ReleasedRunner()

    def bind_grammars(self, token_bytes: Callable[[], TokenBytes], wake: Callable[[], None]) -> None:
        """From here on requests may have grammars. token_bytes: of the vocabulary, asked for on a thread of its own
        when the first one comes; it may raise a MooliError. wake: called on another thread, has `look_again` called on
        the thread that steps."""
        if self._grammars is not None:
            self._grammars.bind(token_bytes, wake)

    def bind_disk(self, wake: Callable[[], None]) -> None:
        """wake: as for grammars; called when pages have come from disk, or there is room for more to write. To be bound
        before the first step."""
        if self._scheduler.disk is not None:
            self._scheduler.disk.on_change(wake)

    def close_disk(self) -> None:
        """Write what is warm, for the next engine. Called when nothing steps any more."""
        for tier in reversed(self._tiers):  # the disk takes what is in the host's memory
            tier.close(CLOSE_DISK_S)

    def look_again(self) -> None:
        """Something is there that no step brings. A grammar is ready, or will never be: requests that waited for it can
        begin, or end with `error`. Or pages have come from disk."""
        self._is_held = False
        if self._grammars is not None:
            for rid, error in self._grammars.take_failures():
                self._scheduler.refuse(rid, str(error), type(error).__name__)

    @property
    def has_work(self) -> bool:
        """`step` has something to compute, to move or to hand out. False while all requests wait for what no step
        brings."""
        scheduler = self._scheduler
        has_steps = (scheduler.has_requests and not self._is_held) or scheduler.has_outputs
        return has_steps or any(tier.has_work for tier in self._tiers)

    @property
    def last_step(self) -> StepStats:
        """What the last step consisted of."""
        return self._scheduler.last_step

    def flush_cache(self) -> bool:
        """Forget all cached prefixes. False, and nothing done, while there are requests."""
        return self._scheduler.flush_cache()

    def stats(self) -> dict[str, int]:
        """Requests and pages at this moment, and counters since the start (see `Counters`)."""
        return self._scheduler.stats()

    def answer(self, question: str, **details: Any) -> object:
        """ping: nothing, as a sign of life. stats, flush_cache, check: of the method of that name. watch, unwatch,
        changes, nodes, node, find, requests: of `Watching`, whose arguments are the details.

        Raises what it raises, and EngineError for any other question, or details that it does not take.
        """
        watching = self._scheduler.watching
        questions: dict[str, Callable[..., object]] = {
            "ping": lambda: None,
            "stats": self.stats,
            "flush_cache": self.flush_cache,
            "check": self.check,
            "watch": watching.begin,
            "unwatch": watching.end,
            "changes": lambda most_requests: {**watching.changes(most_requests), "stats": self.stats()},
            "nodes": watching.nodes,
            "node": watching.node,
            "find": watching.find,
            "requests": watching.requests,
        }
        if question not in questions:
            raise EngineError(f"the engine knows no question {question!r}")
        try:
            return questions[question](**details)
        except TypeError as exc:
            raise EngineError(f"the engine cannot answer {question!r} with {sorted(details)}: {exc}") from exc

    def check(self) -> None:
        """Prove that every page has one owner and every request one place; raises EngineError otherwise. For tests."""
        self._scheduler.check()
