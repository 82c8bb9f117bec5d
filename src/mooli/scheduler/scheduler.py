"""Decides what runs in each step, and what the step's result means for each request.

Owns the requests from `add` to the output that carries their finish reason, in three rooms: `admission.py` (they come,
wait and begin), `planning.py` (a step), `landing.py` (what it computed, and how requests end). Never sees text or a
device. There is no prefill and no decode phase: each request has num_computed chasing num_tokens, and a step gives
some of them some tokens to catch up with.

A step is filled in this order:
1. running requests that miss one token: streams are never held up by prompts, and if there are any, what follows gets
   no more than `mixed_prefill_tokens`; nor where there have been several clients;
2. a request of each client that has none running while others have, if need be in the place of one of several;
3. running requests that miss more (a prompt in chunks), oldest first, those of different clients in turn;
4. waiting requests, clients in turn and each in the order of the policy, as long as tokens, places and pages are left.
   The first that does not fit ends the round, so that large requests are not overtaken for ever;
5. what constraints force their outputs to go on with;
6. where that left only a few tokens, drafts: guesses at what the rows will sample, verified in the same step;
7. requests in the background, running and waiting ones, in the same order: all there is of the step where they are
   alone, and a small part of it beside others, who never wait for them longer than a step.

Why nothing hangs: a request that could not run alone is refused by `add`. Under lack of pages a running request takes
those of requests of lower rank (preemption), never of higher; and for another client that has nothing, the last of
several gives way. Those in the background are last in rank. So the first in rank always moves on.
"""

from __future__ import annotations

from collections.abc import Collection

from mooli.batch import ScheduleBatch, StepOutput
from mooli.cache.kv_cache import KVCache
from mooli.errors import ConfigError, EngineError, RequestError
from mooli.scheduler.admission import (
    AdmissionControl,
    ConstraintWaits,
    Hold,
    PrefixWaits,
    Tier,
    Waiting,
    check_request,
    head_start,
)
from mooli.scheduler.batch_builder import BatchBuilder, Plan, Row
from mooli.scheduler.constraint import Constrained, ConstraintMaker
from mooli.scheduler.disk_tier import DiskTier
from mooli.scheduler.drafts import Drafts, DraftSettings, ForcedSettings
from mooli.scheduler.host_tier import HostTier
from mooli.scheduler.landing import Acceptance, Landing
from mooli.scheduler.planning import Planner
from mooli.scheduler.request_state import RequestState
from mooli.scheduler.running import Running
from mooli.scheduler.stats import Counters, StepStats
from mooli.scheduler.watching import Watching
from mooli.types import FinishReason, Request, RequestOutput

ABORTED = "The request was aborted."


class Scheduler:
    """See the module docstring.

    max_batch_tokens: tokens computed per step; -1 for as many as a prompt can have. At most `max_batch_tokens` requests
    run at a time, so that each running request gets at least one token of every step.
    mixed_prefill_tokens: of them, what prompts get of a step that also continues outputs; None for all that are left.
    May be set between steps.
    computed_in: the type of the computation, for the error of a request whose logits it could not hold.
    drafts: how to guess tokens ahead; None for never.
    forced: how much to compute at once of what constraints force; None for never.
    priorities: those of requests count, see `head_start`; otherwise they are ignored.
    constraints: makes what the output of a request must keep to; None where nothing ever does.
    holds: reasons why a request waits though it could begin, besides a prefix that is being computed.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        max_batch_tokens: int,
        max_running_requests: int,
        context_length: int,
        vocab_size: int,
        policy: str = "fcfs",
        mixed_prefill_tokens: int | None = None,
        computed_in: str | None = None,
        drafts: DraftSettings | None = None,
        forced: ForcedSettings | None = None,
        priorities: bool = False,
        constraints: ConstraintMaker | None = None,
        holds: Collection[Hold] = (),
    ) -> None:
        for name, value in (
            ("max_running_requests", max_running_requests),
            ("context_length", context_length),
            ("vocab_size", vocab_size),
        ):
            if value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if max_batch_tokens == -1:
            max_batch_tokens = min(context_length, cache.num_pages * cache.page_size)
        if max_batch_tokens < 1:
            raise ConfigError(f"chunked_prefill_size={max_batch_tokens} must be at least 1, or -1 for no limit")
        self.max_batch_tokens = max_batch_tokens
        self.max_running_requests = min(max_running_requests, max_batch_tokens)
        if mixed_prefill_tokens is not None and mixed_prefill_tokens < 1:
            raise ConfigError(f"mixed_prefill_tokens={mixed_prefill_tokens} must be at least 1")
        self.mixed_prefill_tokens = mixed_prefill_tokens or max_batch_tokens
        self.context_length = context_length
        self.counters = Counters()
        self.last_step = StepStats()
        self._cache = cache
        self._vocab_size = vocab_size
        self._has_priorities = priorities
        self._constraints = constraints
        self._num_added = 0
        self._states: dict[str, RequestState] = {}
        self._in_flight: tuple[int, list[Row]] | None = None
        max_pages = min(cache.pages_for(context_length), cache.num_pages)
        self._builder = BatchBuilder(cache.page_size, self.max_running_requests, max_pages)
        self._waiting, self._background = Waiting(cache, policy), Waiting(cache, policy)
        self._running = Running(cache, self._builder, self.max_running_requests)
        waiting, background, running, counters = self._waiting, self._background, self._running, self.counters
        all_holds: list[Hold] = [ConstraintWaits(), PrefixWaits(cache), *holds]
        self.tiers: list[Tier] = []
        """Where pages are besides the pool, nearest first."""
        self.host: HostTier | None = None
        self.disk: DiskTier | None = None
        admission = self._admission = AdmissionControl(cache, waiting, background, running, counters, all_holds)
        self.watching = Watching(cache, self._states, all_holds)
        guesses = None if drafts is None else Drafts(drafts, cache)
        self._planner = Planner(cache, waiting, background, running, admission, max_batch_tokens, guesses, forced)
        acceptance = Acceptance(vocab_size, computed_in)
        self._landing = Landing(
            cache, running, admission, self._states, counters, acceptance, drafts is not None, self.tiers
        )

    def attach_host(self, host: HostTier) -> None:
        """Keep pages in the host's memory too. Called once, before `attach_disk` and before any request comes."""
        self.host = host
        self._attach(host)

    def attach_disk(self, disk: DiskTier) -> None:
        """Keep pages there too: one more reason for which requests wait. Called once, before any request comes."""
        self.disk = disk
        self._attach(disk)
        self._cache.watch.look_on_disk(disk.on_disk)

    def _attach(self, tier: Tier) -> None:
        self.tiers.append(tier)
        self._admission.holds.append(tier)

    # -- requests come and go -----------------------------------------------------------------------------------------
    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._background)

    @property
    def num_running(self) -> int:
        return len(self._running.states)

    @property
    def has_requests(self) -> bool:
        return bool(self._states)

    @property
    def has_outputs(self) -> bool:
        """Outputs wait for `take_outputs`."""
        return bool(self._landing.outputs)

    def add(self, request: Request) -> None:
        """Queue a request. Raises PromptError if it can never run, RequestError if its other fields cannot be used, its
        constraint among them."""
        if request.rid in self._states:
            raise RequestError(f"a request with rid {request.rid!r} is not finished yet; use another rid")
        max_tokens = check_request(request, self._cache, self.context_length, self._vocab_size)
        start = head_start(request.priority) if self._has_priorities else None
        state = RequestState(request, self._num_added, max_tokens, self.counters.computed_tokens, start)
        constraint = None if self._constraints is None else self._constraints(request)
        if constraint is not None:
            state.constrained = Constrained(constraint, self._vocab_size)
        self._num_added += 1
        self.counters.requests += 1
        self._states[request.rid] = state
        self._admission.add(state)

    def abort(self, rid: str, message: str = ABORTED) -> bool:
        """End a request with `abort`, at any time; what it computed stays cached. False if there is no such request."""
        return self._finish_early(rid, FinishReason("abort", message=message))

    def finish(self, rid: str, matched: int | str) -> bool:
        """End a request with `stop`: the text side found a stop string. False if there is no such request."""
        return self._finish_early(rid, FinishReason("stop", matched=matched))

    def refuse(self, rid: str, message: str, err_type: str) -> bool:
        """End a request with `error`, status 400: what it asks for cannot be had. False if there is no such request."""
        return self._finish_early(rid, FinishReason("error", message=message, status_code=400, err_type=err_type))

    def _finish_early(self, rid: str, finish: FinishReason) -> bool:
        state = self._states.get(rid)
        if state is None or state.pending_finish is not None:
            return False
        if self._in_flight and any(row.state is state for row in self._in_flight[1]):
            state.pending_finish = finish  # its pages are in use until the step is over
        else:
            self._landing.end(state, finish)
        return True

    def take_outputs(self) -> list[RequestOutput]:
        """Outputs that no `update` has returned yet."""
        taken, self._landing.outputs = self._landing.outputs, []
        return taken

    def flush_cache(self) -> bool:
        """Empty the tree. False, and nothing done, while there are requests."""
        if self._states:
            return False
        self._cache.flush()
        if self.host is not None:
            self.host.clear()
        return True

    # -- a step is planned --------------------------------------------------------------------------------------------
    def schedule(self) -> ScheduleBatch | None:
        """The next step, or None if nothing is to run now. `update` or `fail` must follow each batch."""
        if self._in_flight is not None:
            raise EngineError("schedule() was called again before update() or fail() of the last batch")
        if not self._states:
            return None
        plan = self._planner.plan(self.mixed_prefill_tokens)
        if not plan.rows:
            if plan.is_held_up:
                return None
            raise EngineError("requests are left and none can run")
        self.counters.steps += 1
        self._in_flight = (self.counters.steps, plan.rows)
        self._record(plan)
        return self._builder.build(self.counters.steps, plan)

    def _record(self, plan: Plan) -> None:
        num_tokens = sum(row.length for row in plan.rows)
        num_drafts = sum(len(row.drafts) for row in plan.rows)
        decode_rows = sum(row.continues_output for row in plan.rows)
        self.counters.computed_tokens += num_tokens
        self.last_step = StepStats(
            step=self.counters.steps,
            decode_rows=decode_rows,
            prefill_rows=len(plan.rows) - decode_rows,
            prefill_tokens=num_tokens - decode_rows - num_drafts,
            draft_tokens=num_drafts,
            cached_tokens=plan.num_cached_tokens,
            preempted=plan.num_preempted,
            running=len(self._running.states),
            waiting=self.num_waiting,
            used_pages=self._cache.num_pages - self._cache.num_available,
        )

    # -- a step is over -----------------------------------------------------------------------------------------------
    def update(self, batch: ScheduleBatch, output: StepOutput) -> list[RequestOutput]:
        """Take in what a step computed. Returns all outputs not returned before, those of early endings included.

        `output` has an entry for everything the batch asked for (see `check_output`).
        """
        self._landing.land(self._land(batch), batch.prompt_logprobs, output)
        return self.take_outputs()

    def fail(self, batch: ScheduleBatch, exc: BaseException) -> None:
        """The step raised: end its requests with `error`, outputs by `take_outputs`. What was being computed is not
        kept, as nobody knows what is in its pages."""
        self._landing.fail(self._land(batch), exc)

    def _land(self, batch: ScheduleBatch) -> list[Row]:
        if self._in_flight is None or self._in_flight[0] != batch.step:
            raise EngineError(f"step {batch.step} is not the step that was scheduled last")
        rows, self._in_flight = self._in_flight[1], None
        return rows

    # -- what may be asked ---------------------------------------------------------------------------------------------
    def stats(self) -> dict[str, int]:
        """Gauges of this moment (requests, pages) and the counters since the start."""
        cache = self._cache
        gauges = {
            "running": len(self._running.states),
            "waiting": self.num_waiting,
            "waiting_tokens": self._waiting.num_tokens + self._background.num_tokens,
            "total_pages": cache.num_pages,
            "free_pages": cache.num_free,
            "tree_pages": cache.num_tree_pages,
            "evictable_pages": cache.num_evictable,
            "retained_pages": cache.num_retained,
            "used_pages": cache.num_pages - cache.num_available,
            "evicted_pages": cache.num_evicted_pages,
        }
        gauges |= self.counters.as_dict()
        for tier in self.tiers:
            gauges |= tier.stats()
        return gauges

    def check(self) -> None:
        """Prove that pages, places and requests balance; raises EngineError otherwise. For tests."""
        if len(self._states) != self.num_waiting + len(self._running.states):
            raise EngineError("a request is neither waiting nor running, or both")
        self._waiting.check()
        self._background.check()
        self._running.check()
        if self.host is not None:
            self.host.check()
