"""Decides what runs in each step, and what the step's result means for each request.

Owns the waiting and the running requests, from `add` to the output that carries their finish reason. Never sees text or
a device. There is no prefill and no decode phase: each request has num_computed chasing num_tokens, and a step gives
some of them some tokens to catch up with.

A step is filled in this order:
1. running requests that miss one token: streams are never held up by prompts, and if there are any, what follows gets
   no more than `mixed_prefill_tokens`; nor where there have been several clients;
2. a request of each client that has none running while others have, if need be in the place of one of several;
3. running requests that miss more (a prompt in chunks), oldest first, those of different clients in turn;
4. waiting requests, clients in turn and each in the order of the policy, as long as tokens, places and pages are left.
   The first that does not fit ends the round, so that large requests are not overtaken for ever;
5. where that left only a few tokens, drafts: guesses at what the rows will sample, verified in the same step.

Why nothing hangs: a request that could not run alone is refused by `add`. Under lack of pages a running request takes
those of requests of lower rank (preemption), never of higher; and for another client that has nothing, the last of
several gives way. So the first in rank always moves on.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from itertools import islice
from math import isnan

from mooli.batch import PageCopy, ScheduleBatch, StepOutput
from mooli.cache.kv_cache import KVCache, RequestPages
from mooli.cache.radix_tree import token_key
from mooli.errors import ConfigError, EngineError, RequestError
from mooli.scheduler.acceptance import Acceptance, Sample, error
from mooli.scheduler.batch_builder import BatchBuilder, Plan, Row
from mooli.scheduler.drafts import Drafts, DraftSettings
from mooli.scheduler.intake import check_request
from mooli.scheduler.policy import head_start
from mooli.scheduler.prefix_waits import PrefixWaits
from mooli.scheduler.request_state import RequestState
from mooli.scheduler.stats import Counters, StepStats
from mooli.scheduler.waiting import Waiting
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
    priorities: those of requests count, see `head_start`; otherwise they are ignored.
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
        priorities: bool = False,
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
        self._acceptance = Acceptance(vocab_size, computed_in)
        self.context_length = context_length
        self.counters = Counters()
        self.last_step = StepStats()
        self._cache = cache
        self._vocab_size = vocab_size
        self._states: dict[str, RequestState] = {}
        self._waiting = Waiting(cache, policy)
        self._has_priorities = priorities
        self._running: list[RequestState] = []  # in the order of rank
        self._free_indices = list(range(self.max_running_requests - 1, -1, -1))
        max_pages = min(cache.pages_for(context_length), cache.num_pages)
        self._builder = BatchBuilder(cache.page_size, self.max_running_requests, max_pages)
        self._prefix_waits = PrefixWaits(cache)
        self._drafts = None if drafts is None else Drafts(drafts, cache)
        self._num_added = 0
        self._in_flight: tuple[int, list[Row]] | None = None
        self._outputs: list[RequestOutput] = []

    # -- requests come and go -----------------------------------------------------------------------------------------
    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_requests(self) -> bool:
        return bool(self._states)

    @property
    def has_outputs(self) -> bool:
        """Outputs wait for `take_outputs`."""
        return bool(self._outputs)

    def add(self, request: Request) -> None:
        """Queue a request. Raises PromptError if it can never run, RequestError if its other fields cannot be used."""
        if request.rid in self._states:
            raise RequestError(f"a request with rid {request.rid!r} is not finished yet; use another rid")
        max_tokens = check_request(request, self._cache, self.context_length, self._vocab_size)
        start = head_start(request.priority) if self._has_priorities else None
        state = RequestState(request, self._num_added, max_tokens, self.counters.computed_tokens, start)
        self._num_added += 1
        self.counters.requests += 1
        self._states[request.rid] = state
        self._waiting.add(state)

    def abort(self, rid: str, message: str = ABORTED) -> bool:
        """End a request with `abort`, at any time; what it computed stays cached. False if there is no such request."""
        return self._finish_early(rid, FinishReason("abort", message=message))

    def finish(self, rid: str, matched: int | str) -> bool:
        """End a request with `stop`: the text side found a stop string. False if there is no such request."""
        return self._finish_early(rid, FinishReason("stop", matched=matched))

    def _finish_early(self, rid: str, finish: FinishReason) -> bool:
        state = self._states.get(rid)
        if state is None or state.pending_finish is not None:
            return False
        if self._in_flight and any(row.state is state for row in self._in_flight[1]):
            state.pending_finish = finish  # its pages are in use until the step is over
        else:
            self._end(state, finish)
        return True

    def take_outputs(self) -> list[RequestOutput]:
        """Outputs that no `update` has returned yet."""
        taken, self._outputs = self._outputs, []
        return taken

    def flush_cache(self) -> bool:
        """Empty the tree. False, and nothing done, while there are requests."""
        if self._states:
            return False
        self._cache.flush()
        return True

    # -- a step is planned --------------------------------------------------------------------------------------------
    def schedule(self) -> ScheduleBatch | None:
        """The next step, or None if there is nothing to run. `update` or `fail` must follow each batch."""
        if self._in_flight is not None:
            raise EngineError("schedule() was called again before update() or fail() of the last batch")
        if not self._states:
            return None
        plan = Plan(self.max_batch_tokens)
        self._continue_running(plan)
        if self._waiting and not plan.num_preempted:  # who just gave way would take the pages back
            self._admit_waiting(plan)
        if not plan.rows:
            raise EngineError("requests are left and none can run")
        if self._drafts is not None:
            self._add_drafts(self._drafts, plan)
        plan.goes_on = self._goes_on(plan)
        self.counters.steps += 1
        self._in_flight = (self.counters.steps, plan.rows)
        self._record(plan)
        return self._builder.build(self.counters.steps, plan)

    def _continue_running(self, plan: Plan) -> None:
        one_missing = [state for state in self._running if state.num_missing == 1]
        more_missing = [state for state in self._running if state.num_missing > 1]
        self._continue(one_missing, plan)
        # Streams wait for this step, and what else it computes is their gap; or another client may come while it runs.
        if plan.rows or self._waiting.has_known_several:
            plan.tokens_left = min(plan.tokens_left, self.mixed_prefill_tokens)
        if self._waiting:
            self._admit_newcomers(plan, has_prompts=bool(more_missing))
        self._continue(self._waiting.by_turn(more_missing, self._running), plan)

    def _continue(self, states: list[RequestState], plan: Plan) -> None:
        for state in states:
            if state.pages is None:  # preempted for one before it
                continue
            if not plan.tokens_left:
                break
            length = self._make_room(state, state.pages, plan)
            if length:
                plan.add(state, length)

    def _make_room(self, state: RequestState, held: RequestPages, plan: Plan) -> int:
        """Get pages for as many of the missing tokens as possible, at the cost of requests of lower rank if for none.

        Returns for how many; 0 means that the request must wait for those of higher rank.
        """
        while (room := self._room(state, held)) <= 0:
            victim = self._running[-1]
            if victim is state:
                return 0
            plan.drop(victim)
            plan.num_preempted += 1
            self._preempt(victim)
        length = self._chunk(state, min(state.num_missing, room, plan.tokens_left))
        self._grow(state, held, state.num_computed + length)
        return length

    def _chunk(self, state: RequestState, most: int) -> int:
        """At most `most` of the missing tokens: fewer if the next chunk then begins where a match could end, which some
        devices compute faster. A token whose log-probabilities are asked for has a row of logits of its own: of such a
        prompt a step takes no more than a quarter of what it takes of others."""
        if state.next_prompt_logprob < state.num_prompt_tokens:
            most = min(most, max(1, self.max_batch_tokens // 4))
        if most < state.num_missing:
            past = (state.num_computed + most) % self._cache.match_granularity_tokens
            return most - past if past < most else most
        return most

    def _room(self, state: RequestState, held: RequestPages) -> int:
        """How many tokens could be stored after the computed ones."""
        return (len(held.pages) + self._cache.num_available) * self._cache.page_size - state.num_computed

    def _grow(self, state: RequestState, held: RequestPages, num_tokens: int) -> None:
        if not self._cache.grow(held, num_tokens):
            raise EngineError("pages counted as available could not be allocated")
        self._builder.grow_pages(state.req_index, held.pages)

    def _preempt(self, state: RequestState) -> None:
        """Back to the front of the waiting; it resumes through the tree, as far as what it leaves there stays."""
        self._leave(state, keep=True)
        state.num_computed = 0
        state.num_preemptions += 1
        state.enqueued_at = self.counters.computed_tokens
        self.counters.preemptions += 1
        self._waiting.add(state)

    def _admit_newcomers(self, plan: Plan, *, has_prompts: bool) -> None:
        """Begin a request of each client that has none running. Prompts in progress leave them half of the step, and
        the client that has most running a place and pages."""
        newcomers = self._waiting.newcomers(self._running, self.counters.computed_tokens)
        if not newcomers:
            return
        self._prefix_waits.begin_step(self._running)
        kept = plan.tokens_left // 2 if has_prompts else 0
        plan.tokens_left -= kept
        for state in newcomers:
            if plan.tokens_left and not self._prefix_waits.is_waiting(state) and self._admit_first(state, plan):
                self._prefix_waits.add_leader(state)
        plan.tokens_left += kept

    def _admit_first(self, state: RequestState, plan: Plan) -> bool:
        while not (self._free_indices and self._admit(state, plan, self._promised_pages())):
            victim = self._gives_way_to(state)
            if victim is None:
                return False
            plan.drop(victim)
            plan.num_preempted += 1
            self._preempt(victim)
        return True

    def _gives_way_to(self, newcomer: RequestState) -> RequestState | None:
        """The latest request of the client that has most running: of several, and of more pages than are wanted."""
        counts = Counter(state.request.client for state in self._running)
        client, count = counts.most_common(1)[0]
        if count < 2:
            return None
        theirs = [state for state in self._running if state.request.client == client]
        num_pages = sum(len(state.pages.pages) for state in theirs if state.pages is not None)
        return theirs[-1] if num_pages > self._pages_wanted(newcomer, None) else None

    def _promised_pages(self) -> int:
        return sum(self._pages_wanted(state, state.pages) for state in self._running)

    def _admit_waiting(self, plan: Plan) -> None:
        if not plan.tokens_left or not self._free_indices:
            return
        self._prefix_waits.begin_step(self._running)
        promised_pages = self._promised_pages()
        for state in self._waiting.in_turn(self._running, self.counters.computed_tokens):
            if not plan.tokens_left or not self._free_indices:
                return
            if self._prefix_waits.is_waiting(state):
                continue
            if not self._admit(state, plan, promised_pages):
                return
            promised_pages += self._pages_wanted(state, state.pages)
            self._prefix_waits.add_leader(state)

    def _pages_wanted(self, state: RequestState, held: RequestPages | None) -> int:
        """Pages a request still needs for all tokens it has and one page of output. Admission leaves that many free, so
        that requests which just came in do not have to be thrown out again."""
        cache = self._cache
        wanted = min(cache.pages_for(state.num_tokens) + 1, cache.pages_for(state.max_kv_tokens))
        return max(0, wanted - (len(held.pages) if held else 0))

    def _admit(self, state: RequestState, plan: Plan, promised_pages: int) -> bool:
        """Begin to run a waiting request on what is cached of it. False, and no change, if there are too few pages."""
        cache = self._cache
        match = cache.match(state.request.namespace, state.key, state.match_limit)
        held = cache.open(match, state.given)
        num_cached = len(held.pages) * cache.page_size + match.head_tokens
        if self._running and cache.num_available < promised_pages + self._pages_wanted(state, held):
            cache.discard(held)
            return False
        state.num_computed = num_cached
        if match.head_tokens and self._room(state, held) <= 0:
            # Alone in a pool just large enough: the page to copy from is the one that is needed.
            cache.drop_copy_source(held)
            state.num_computed = num_cached = len(held.pages) * cache.page_size
        length = self._chunk(state, min(state.num_missing, plan.tokens_left, self._room(state, held)))
        if length <= 0:
            cache.discard(held)
            state.num_computed = 0
            return False
        self._waiting.remove(state)
        insort(self._running, state, key=_rank)
        state.pages, state.num_found = held, num_cached
        state.req_index = self._free_indices.pop()
        self._builder.enter(state)
        self._grow(state, held, num_cached + length)
        if num_cached % cache.page_size:  # the match ends inside a page
            plan.copies.append(PageCopy(match.source_page, held.pages[held.num_shared], match.head_tokens))
        plan.add(state, length)
        plan.num_cached_tokens += num_cached
        if state.cached_tokens < 0:
            state.cached_tokens = num_cached
            self.counters.prompt_tokens += state.num_prompt_tokens
            self.counters.cached_tokens += num_cached
        return True

    def _add_drafts(self, drafts: Drafts, plan: Plan) -> None:
        """Have the rows verify guesses, where all continue outputs and together are few.

        Only pages that nobody else could need in the next step are taken for guesses.
        """
        rows = plan.rows
        tokens_left = min(plan.tokens_left, drafts.settings.tokens_per_step - len(rows))
        if tokens_left < 1 or not all(row.continues_output for row in rows):
            return
        for index, row in enumerate(rows):
            state, held = row.state, row.state.pages
            if held is None:
                continue
            spare_pages = max(0, self._cache.num_available - len(self._running))
            most = min(
                -(-tokens_left // (len(rows) - index)),
                state.max_tokens - state.num_tokens - 1,  # the token after the last draft is the request's last
                (len(held.pages) + spare_pages) * self._cache.page_size - state.num_tokens,
            )
            guesses = drafts.propose(state.tokens, held, state.drafts, most)
            if guesses:
                self._grow(state, held, state.num_tokens + len(guesses))
                plan.add_drafts(row, guesses)
                tokens_left -= len(guesses)

    def _goes_on(self, plan: Plan) -> bool:
        """Whether the next step is most likely this one's rows with one token more each: no request begins, waits for a
        prompt or ends by its length. Gets them the page for that token a step early, if nobody else could need it."""
        if len(plan.rows) < len(self._running) or (self._waiting and self._free_indices):
            return False
        cache = self._cache
        spare_pages = cache.num_available - len(self._running)
        for row in plan.rows:
            state, held, num_tokens = row.state, row.state.pages, row.start + row.length + 1
            if held is None or row.num_samples != 1 or num_tokens >= state.max_tokens:
                return False
            missing = cache.pages_for(num_tokens) - len(held.pages)
            if missing > 0:
                spare_pages -= missing
                if spare_pages < 0:
                    return False
                self._grow(state, held, num_tokens)
        return True

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
            running=len(self._running),
            waiting=len(self._waiting),
            used_pages=self._cache.num_pages - self._cache.num_available,
        )

    # -- a step is over -----------------------------------------------------------------------------------------------
    def update(self, batch: ScheduleBatch, output: StepOutput) -> list[RequestOutput]:
        """Take in what a step computed. Returns all outputs not returned before, those of early endings included.

        `output` has an entry for everything the batch asked for (see `check_output`).
        """
        rows = self._land(batch)
        nan_rows = set()
        for wanted, logprob_rows in zip(batch.prompt_logprobs, output.prompt_logprobs, strict=True):
            if any(isnan(logprob_row.logprob) for logprob_row in logprob_rows):
                nan_rows.add(wanted.row)
            else:
                rows[wanted.row].state.collect_prompt_logprobs(wanted.target_ids, logprob_rows)
        sampled = zip(output.token_ids.tolist(), output.logprobs, strict=True)
        for index, row in enumerate(rows):
            state = row.state
            state.num_computed = row.start + row.length - len(row.drafts)
            samples = list(islice(sampled, row.num_samples))
            if state.pages is not None:
                self._cache.drop_copy_source(state.pages)
            if index in nan_rows:
                self._end_untrusted(state, self._acceptance.nan_error())
            elif state.pending_finish is not None:
                end = self._end_untrusted if self._acceptance.has_error(samples) else self._end
                end(state, state.pending_finish)
            elif samples:
                self._take_samples(row, samples)
            elif not state.wants_tokens and state.num_missing == 0:
                self._end(state, FinishReason("length", length=0))
            else:
                self._share_computed(state)
        return self.take_outputs()

    def fail(self, batch: ScheduleBatch, exc: BaseException) -> None:
        """The step raised: end its requests with `error`, outputs by `take_outputs`. What was being computed is not
        kept, as nobody knows what is in its pages."""
        for row in self._land(batch):
            state = row.state
            finish = state.pending_finish or error(f"the step failed: {type(exc).__name__}: {exc}", type(exc).__name__)
            self._end(state, finish, keep=False)

    def _land(self, batch: ScheduleBatch) -> list[Row]:
        if self._in_flight is None or self._in_flight[0] != batch.step:
            raise EngineError(f"step {batch.step} is not the step that was scheduled last")
        rows, self._in_flight = self._in_flight[1], None
        return rows

    def _take_samples(self, row: Row, samples: list[Sample]) -> None:
        """The row has sampled: its request has more tokens now, and may end."""
        state = row.state
        accepted = self._acceptance.take(row, samples)
        self.counters.generated_tokens += len(accepted.token_ids)
        if self._drafts is not None and row.continues_output:
            self._count_drafts(row, accepted.num_right_drafts)
        out = self._output(state, accepted.finish or accepted.error)
        out.new_token_ids, out.logprobs = accepted.token_ids, accepted.logprobs
        if accepted.error is not None:
            self._end_untrusted(state, accepted.error, out)
        elif accepted.finish is not None:
            self._end(state, accepted.finish, out)
        else:
            self._share_computed(state)
            self._outputs.append(out)
            if accepted.leaves_nan:
                self._preempt(state)  # it would spread: even what has no weight is multiplied

    def _count_drafts(self, row: Row, num_right: int) -> None:
        row.state.drafts.learn(len(row.drafts), num_right)
        self.counters.proposed_drafts += len(row.drafts)
        self.counters.correct_drafts += num_right
        self.counters.verify_steps += 1

    def _share_computed(self, state: RequestState) -> None:
        """Put full computed pages into the tree while the request goes on, so that others can use them at once."""
        held, page_size = state.pages, self._cache.page_size
        if held is None or held.node is None:
            return
        first, last = held.num_shared, state.num_computed // page_size
        if last > first:
            self._cache.insert(held, token_key(state.tokens[first * page_size : last * page_size]))
            self._builder.set_pages(state.req_index, held.pages, first)

    # -- a request ends -----------------------------------------------------------------------------------------------
    def _end(
        self, state: RequestState, finish: FinishReason, out: RequestOutput | None = None, *, keep: bool = True
    ) -> None:
        """The one place where a request ends: its pages go, its last output is queued."""
        if state.pages is None:
            self._waiting.remove(state)
        else:
            self._leave(state, keep=keep)
        del self._states[state.rid]
        if not self._states:
            self._waiting.forget_clients()
        self.counters.finished += 1
        self._outputs.append(out or self._output(state, finish))

    def _end_untrusted(self, state: RequestState, finish: FinishReason, out: RequestOutput | None = None) -> None:
        """End a request whose KV may hold NaN: others must not find it in the cache."""
        held = state.pages
        if held is not None:
            self._cache.forget(held)
        self._end(state, state.pending_finish or finish, out, keep=False)

    def _leave(self, state: RequestState, *, keep: bool) -> None:
        """Stop running: give back pages and req_index. `keep` what was computed, in the tree."""
        held = state.pages
        if held is None:
            raise EngineError(f"request {state.rid!r} is not running")
        if keep:
            first = held.num_shared * self._cache.page_size
            self._cache.release(held, token_key(state.tokens[first : state.num_computed]))
        else:
            self._cache.discard(held)
        self._running.remove(state)
        self._waiting.charge(state.request.client, state.num_computed - state.num_found)
        self._builder.leave(state.req_index)
        self._free_indices.append(state.req_index)
        state.pages, state.req_index = None, -1

    def _output(self, state: RequestState, finish: FinishReason | None) -> RequestOutput:
        return RequestOutput(
            rid=state.rid,
            finish=finish,
            prompt_tokens=state.num_prompt_tokens,
            completion_tokens=state.num_output_tokens,
            cached_tokens=max(0, state.cached_tokens),
            num_preemptions=state.num_preemptions,
            prompt_logprobs=state.take_prompt_logprobs(),
            drafts=None if self._drafts is None else state.drafts.counts,
        )

    def stats(self) -> dict[str, int]:
        """Gauges of this moment (requests, pages) and the counters since the start."""
        cache = self._cache
        gauges = {
            "running": len(self._running),
            "waiting": len(self._waiting),
            "waiting_tokens": self._waiting.num_tokens,
            "total_pages": cache.num_pages,
            "free_pages": cache.num_free,
            "tree_pages": cache.num_tree_pages,
            "evictable_pages": cache.num_evictable,
            "used_pages": cache.num_pages - cache.num_available,
            "evicted_pages": cache.num_evicted_pages,
        }
        return gauges | self.counters.as_dict()

    def check(self) -> None:
        """Prove that pages, places and requests balance; raises EngineError otherwise. For tests."""
        self._cache.check([state.pages for state in self._running if state.pages is not None])
        if len(self._states) != len(self._waiting) + len(self._running):
            raise EngineError("a request is neither waiting nor running, or both")
        self._waiting.check()
        indices = sorted([*self._free_indices, *(state.req_index for state in self._running)])
        if indices != list(range(self.max_running_requests)):
            raise EngineError("a req_index is lost or used twice")


def _rank(state: RequestState) -> tuple[int, int]:
    return state.rank
