"""The first room of the scheduler: requests come, wait and begin.

Owns what a request must satisfy to be queued, the order in which the waiting ones are tried, and the one rule by which
they begin. Never plans what a running request computes, and never ends one. Sampling values are checked where they
enter, by the text side.

Clients take turns where several wait: first is the one for which least was computed, by tokens (as VTC, Sheng et al.,
arXiv 2401.00588). A client that had nothing waiting begins at the shared clock, so that nobody saves up turns by
idling. The clock stands where the client admitted last stood, and moves on with what is computed for all, so that
newcomers cannot keep another from its turn for ever. Within a client the policy decides; for one client it alone:

- `fcfs`: first come, first served.
- `lpm`: longest prefix match first, so that what is cached is used before it is evicted. A match of M tokens is worth
  as much as having waited while M tokens of others were computed: however many hits keep arriving, a cold request's
  turn comes.

Where priorities count, a larger one is a head start in the same measure: see `head_start`. Both policies try preempted
requests before those that never ran and have the same place otherwise.

The rule: whose turn it is begins if nothing holds it (see `Hold`) and the cache has pages for it. What is held lets
others pass; the first that has too few pages ends the round, so that large requests are not overtaken for ever.

Requests in the background have a queue of their own, of the same kind. One begins only where no other request waits
that could begin, and gives its place and its pages to any other, the latest first.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from math import log2
from typing import Protocol

import numpy as np

from mooli.cache.kv_cache import KVCache
from mooli.cache.radix_tree import token_key
from mooli.errors import ConfigError, ContextLengthError, EngineError, PromptError, RequestError
from mooli.scheduler import cache_ends
from mooli.scheduler.batch_builder import Plan
from mooli.scheduler.request_state import RequestState
from mooli.scheduler.running import Running
from mooli.scheduler.stats import Counters, StepStats
from mooli.types import FIRST_CONTENT_ID, Request

POLICIES = ("fcfs", "lpm")

LPM_WINDOW = 128
"""`lpm` looks at this many of the waiting requests, oldest first: matching thousands would cost more than it saves."""

PRIORITY_TOKENS = 8192
"""The head start of priority 1."""

MOST_CLIENTS = 1024
"""Clients without waiting requests of whom it is kept how much was computed for them."""

SHARES = 8
"""The clock moves as if so many clients waited at most. So a client that is D tokens ahead of it goes before all who
come when SHARES * D more have been computed."""


# -- a request comes ---------------------------------------------------------------------------------------------------
def check_request(request: Request, cache: KVCache, context_length: int, vocab_size: int) -> int:
    """Return the number of tokens, prompt and output, at which the request ends with `length`.

    Raises PromptError if the prompt is empty or not of this vocabulary, or its `key_ids` are neither its own nor
    content's; ContextLengthError if it is too long for the
    context or, with the output it asks for, for the whole KV pool: such a request could never run. Raises RequestError
    for a bad `logprob_start`.
    """
    num_prompt_tokens, start = len(request.prompt_ids), request.logprob_start
    _check_ids(request, vocab_size)
    if num_prompt_tokens >= context_length:
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens, which leaves no room in the context of {context_length} "
            "tokens; shorten it or raise context_length"
        )
    if start is not None and not 0 <= start < num_prompt_tokens:
        raise RequestError(
            f"logprob_start={start} is outside the prompt of {num_prompt_tokens} tokens; use an index of a prompt token"
        )
    max_new_tokens = request.sampling.max_new_tokens
    if max_new_tokens is None:  # as far as context and pool allow; the last token needs no place in the pool
        pool_tokens = cache.num_pages * cache.page_size
        max_tokens = min(context_length, max(num_prompt_tokens, pool_tokens) + 1)
    else:
        max_tokens = min(context_length, num_prompt_tokens + max_new_tokens)
    num_pages = cache.pages_for(max(num_prompt_tokens, max_tokens - 1))
    if num_pages > cache.num_pages:
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens and max_new_tokens is {max_new_tokens}: that needs {num_pages} "
            f"KV pages of {cache.page_size} tokens, and the pool has {cache.num_pages}; shorten the prompt, lower "
            "max_new_tokens, or give the pool more memory"
        )
    return max_tokens


def _check_ids(request: Request, vocab_size: int) -> None:
    prompt = request.prompt_ids
    if len(prompt) == 0:
        raise PromptError("the prompt is empty; give at least one token")
    for token_id in (int(prompt.min()), int(prompt.max())):
        if not 0 <= token_id < vocab_size:
            raise PromptError(f"token id {token_id} of the prompt is outside the vocabulary of {vocab_size} ids")
    key = request.key_ids
    if key is None:
        return
    if key.dtype != np.int32 or key.shape != prompt.shape:
        raise PromptError(
            f"key_ids are {key.dtype} of shape {key.shape}; give int32, one for each of {len(prompt)} tokens"
        )
    wrong = (key != prompt) & (key < FIRST_CONTENT_ID)
    if wrong.any():
        at = int(wrong.argmax())
        raise PromptError(
            f"key_ids[{at}]={int(key[at])} is neither the token id {int(prompt[at])} nor content, which begins at"
            f" {FIRST_CONTENT_ID}"
        )


# -- the order in which requests wait ----------------------------------------------------------------------------------
def head_start(priority: int) -> int:
    """How many tokens computed by others a priority is worth: as if the request had come so much earlier.

    It grows with the logarithm: none is worth more than 31 times that of 1. A request of priority p is overtaken by
    those of q only if they come before head_start(q) - head_start(p) tokens are computed after it has come.
    """
    worth = int(PRIORITY_TOKENS * log2(1 + abs(priority)))
    return worth if priority >= 0 else -worth


def fcfs_key(state: RequestState) -> tuple[int, bool, int]:
    """Sort key of first come, first served."""
    return (state.due, state.num_preemptions == 0, state.arrival)


def order_lpm(waiting: Sequence[RequestState], cache: KVCache, tokens_computed: int) -> list[RequestState]:
    """The head of `waiting` (in fcfs order) by cached tokens plus age. tokens_computed: by anybody so far."""

    def key(state: RequestState) -> tuple[int, bool, int, int]:
        match = cache.match(state.request.namespace, state.key, state.match_limit)
        matched_tokens = len(match.pages) * cache.page_size + match.head_tokens
        is_new = state.num_preemptions == 0
        if state.head_start is not None:
            return (state.due - matched_tokens, is_new, 0, state.arrival)
        waited_tokens = tokens_computed - state.enqueued_at
        return (0, is_new, -(matched_tokens + waited_tokens), state.arrival)

    return sorted(waiting[:LPM_WINDOW], key=key)


class Waiting:
    """The queue. Requests of one client lie in the order of `fcfs_key`. It never changes a request."""

    def __init__(self, cache: KVCache, policy: str) -> None:
        """Raises ConfigError for a policy that is not known."""
        self.num_tokens = 0
        """Of all waiting requests."""
        self._cache = cache
        if policy not in POLICIES:
            raise ConfigError(f"schedule_policy={policy!r} is not known; use one of {', '.join(POLICIES)}")
        self._policy = policy
        self._queues: dict[str, list[RequestState]] = {}  # none is empty
        self._num_requests = 0
        self._served: dict[str, float] = {}
        self._clock = 0.0

    def __len__(self) -> int:
        return self._num_requests

    @property
    def has_known_several(self) -> bool:
        """Requests of several clients have come since the last time that none was left."""
        return len(self._served) > 1

    def add(self, state: RequestState) -> None:
        client = state.request.client
        queue = self._queues.get(client)
        if queue is None:
            queue = self._queues[client] = []
            self._served[client] = max(self._served.get(client, 0), self._clock)
        insort(queue, state, key=fcfs_key)
        self._num_requests += 1
        self.num_tokens += state.num_tokens

    def remove(self, state: RequestState) -> None:
        client = state.request.client
        queue = self._queues[client]
        queue.remove(state)
        if not queue:
            del self._queues[client]
        self._num_requests -= 1
        self.num_tokens -= state.num_tokens

    def charge(self, client: str, num_tokens: int) -> None:
        """So much was computed for a request of `client` that runs no more."""
        self._served[client] = self._served.get(client, self._clock) + num_tokens
        if len(self._queues) > 1:
            self._clock += num_tokens / min(len(self._queues), SHARES)
        if len(self._served) > MOST_CLIENTS + len(self._queues):
            self._drop_records()

    def forget_clients(self) -> None:
        """Nobody waits or runs: all begin equal."""
        self._served.clear()
        self._clock = 0.0

    def in_turn(self, running: Iterable[RequestState], tokens_computed: int) -> Iterator[RequestState]:
        """All that are to be tried now, first come first. Those admitted in between are removed by whoever iterates.

        running: counted for their clients. tokens_computed: by anybody so far.
        """
        if len(self._queues) == 1:
            ((client, queue),) = self._queues.items()
            self._clock = max(self._clock, self._served[client])
            yield from self._by_policy(queue, tokens_computed)
            return
        served = self._served_to(self._queues, running)
        turns = [
            (served[client] - (queue[0].head_start or 0), fcfs_key(queue[0]), client)
            for client, queue in self._queues.items()
        ]
        heapify(turns)
        tried: dict[str, Iterator[RequestState]] = {}
        while turns:
            place, key, client = turns[0]
            if client not in tried:
                tried[client] = self._by_policy(self._queues[client], tokens_computed)
            following = next(tried[client], None)
            if following is None:
                heappop(turns)
                continue
            yield following
            if following.pages is not None:  # admitted
                self._clock = max(self._clock, self._served.get(client, 0))
                heapreplace(turns, (place + following.num_missing, key, client))

    def newcomers(self, running: Iterable[RequestState], tokens_computed: int) -> list[RequestState]:
        """The first request of each client that has none running while others have, who was served least first."""
        active = {state.request.client for state in running}
        if not active:
            return []
        new = [client for client in self._queues if client not in active]
        new.sort(key=lambda client: (self._served[client], fcfs_key(self._queues[client][0])))
        return [next(self._by_policy(self._queues[client], tokens_computed)) for client in new]

    def by_turn(self, states: list[RequestState], running: Iterable[RequestState]) -> list[RequestState]:
        """Running requests by what their clients were served, each client's in the order they have."""
        if len(states) < 2:
            return states
        clients = {state.request.client for state in states}
        if len(clients) < 2:
            return states
        served = self._served_to(clients, running)
        return sorted(states, key=lambda state: served[state.request.client])

    def _served_to(self, clients: Iterable[str], running: Iterable[RequestState]) -> dict[str, float]:
        """What was computed for each of `clients`, that of their requests which still run included."""
        served = {client: self._served.get(client, 0) for client in clients}
        for state in running:
            if state.request.client in served:
                served[state.request.client] += state.num_tokens - state.num_found
        return served

    def _by_policy(self, queue: list[RequestState], tokens_computed: int) -> Iterator[RequestState]:
        if self._policy == "lpm":
            return iter(order_lpm(queue, self._cache, tokens_computed))
        return iter(list(queue))

    def _drop_records(self) -> None:
        """Of clients without waiting requests: those behind the clock, who lose nothing, then those nearest to it."""
        ahead = sorted(
            (served, client)
            for client, served in self._served.items()
            if served > self._clock and client not in self._queues
        )
        kept = {client: self._served[client] for client in self._queues}
        self._served = kept | {client: served for served, client in ahead[-MOST_CLIENTS // 2 :]}

    def check(self) -> None:
        """Prove that the counts are those of the requests; raises EngineError otherwise. For tests."""
        states = [state for queue in self._queues.values() for state in queue]
        if self._num_requests != len(states) or self.num_tokens != sum(state.num_tokens for state in states):
            raise EngineError("the count of waiting requests or of their tokens is not theirs")


# -- what holds a request ----------------------------------------------------------------------------------------------
class Hold(Protocol):
    """One reason why a waiting request had better not begin yet, though it could.

    Of the running requests it is told before each step, and of each that begins in it. Whatever it waits for must come
    without the request that it holds.
    """

    reason: str
    """In the words of a person: what the request waits for."""

    def begin_step(self, running: Iterable[RequestState]) -> None:
        """`running` will compute in the step that is planned now."""

    def holds(self, state: RequestState) -> bool:
        """True if `state` should not begin in this step."""

    def began(self, state: RequestState) -> None:
        """`state` runs from now on."""


class Tier(Hold, Protocol):
    """A place for pages below the pool: requests wait for what comes from there, and what they compute goes there."""

    @property
    def has_work(self) -> bool:
        """`move` would do something."""
        ...

    def move(self) -> None:
        """Between two steps: what has come is put into pool and tree, and a piece of what is to go there is sent."""

    def learn(self, step: StepStats, seconds: float) -> None:
        """A step has taken `seconds`."""

    def computed(self, state: RequestState) -> None:
        """What it has computed so far gave numbers, and its full pages are in the tree or come there now."""

    def distrusted(self, state: RequestState) -> None:
        """What it computed on may hold NaN: that is not to be found again."""

    def ended(self, state: RequestState) -> None:
        """Nothing comes for it any more."""

    def stats(self) -> dict[str, int]:
        """By name, in tokens and requests."""
        ...

    def close(self, timeout_s: float) -> None:
        """Nothing steps any more."""


class PrefixWaits:
    """Reuse within a batch: a prefix that several requests need and that is being computed now is computed once.

    A running request (the leader) computes, page by page, what follows its pages in the tree. A waiting request whose
    cached prefix ends in the same place and goes on with the same page would compute that page too; instead it waits
    until the leader has put the whole prefix they share into the tree, or has stopped running.
    """

    reason = "in flight"

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._leaders: dict[tuple[str, int, bytes], list[RequestState]] = {}

    def begin_step(self, running: Iterable[RequestState]) -> None:
        self._leaders.clear()
        for state in running:
            self.began(state)

    def began(self, state: RequestState) -> None:
        """It leads, if the page it computes next is known to the end."""
        if state.pages is None or state.pages.node is None:
            return
        page_size = self._cache.page_size
        first = state.pages.num_shared * page_size
        if first + page_size <= state.num_tokens:
            page = token_key(state.key_ids[first : first + page_size])
            self._leaders.setdefault((state.request.namespace, state.pages.num_shared, page), []).append(state)

    def holds(self, state: RequestState) -> bool:
        """A running request computes its prefix."""
        leader = state.leader
        if leader is not None:
            if leader.pages is not None and leader.pages.num_shared < state.leader_pages:
                return True
            state.leader = None
        if not self._leaders:
            return False
        page_size = self._cache.page_size
        # What is being computed counts, also where it has no state yet to go on from.
        match = self._cache.agreeing(state.request.namespace, state.key, state.match_limit)
        num_pages = len(match.pages)
        first, last = num_pages * page_size, (num_pages + 1) * page_size
        if last > state.match_limit:  # would have to compute that page in any case
            return False
        page = token_key(state.key_ids[first:last])
        for leader in self._leaders.get((state.request.namespace, num_pages, page), ()):
            if leader.is_background and not state.is_background:
                continue  # it may take its time
            common = _common_tokens(leader, state) // page_size
            if common > num_pages:
                state.leader = leader
                state.leader_pages = min(common, state.match_limit // page_size)
                if leader.pages is not None:
                    leader.pages.wanted.add(state.leader_pages * page_size)
                return True
        return False


class ConstraintWaits:
    """A constraint that is still being made. Whoever makes it has the scheduler asked again."""

    reason = "grammar"

    def begin_step(self, running: Iterable[RequestState]) -> None:
        pass

    def holds(self, state: RequestState) -> bool:
        return state.constrained is not None and not state.constrained.is_ready

    def began(self, state: RequestState) -> None:
        pass


def _common_tokens(a: RequestState, b: RequestState) -> int:
    count = min(a.num_tokens, b.num_tokens)
    differs = a.key_ids[:count] != b.key_ids[:count]
    return int(differs.argmax()) if differs.any() else count


# -- a request begins --------------------------------------------------------------------------------------------------
@dataclass(slots=True, eq=False)
class AdmissionControl:
    """The rule in the module docstring, and who gives way where it would leave a client with nothing.

    background: who waits in the background; in `waiting` are all others. holds: the reasons why a request waits though
    it could begin.
    """

    cache: KVCache
    waiting: Waiting
    background: Waiting
    running: Running
    counters: Counters
    holds: list[Hold]

    def add(self, state: RequestState) -> None:
        """It waits from now on."""
        self._queue_of(state).add(state)

    def _queue_of(self, state: RequestState) -> Waiting:
        return self.background if state.is_background else self.waiting

    def admit_waiting(self, plan: Plan) -> bool:
        """Begin those whose turn it is, as far as tokens, places and pages are left or others in the background have
        them. Whether none is left that could begin."""
        return self._admit_from(self.waiting, plan)

    def admit_background(self, plan: Plan) -> None:
        """Begin those in the background whose turn it is, as far as tokens, places and pages are left."""
        self._admit_from(self.background, plan)

    def _admit_from(self, queue: Waiting, plan: Plan) -> bool:
        is_background = queue is self.background
        if not queue:
            return True
        if not plan.tokens_left or not self._has_place(is_background):
            return False
        self._begin_step()
        running, promised_pages = self.running.of_class(is_background), self._promised_pages()
        for state in queue.in_turn(running, self.counters.computed_tokens):
            if not plan.tokens_left or not self._has_place(is_background):
                return False
            if self._is_held(state):
                plan.is_held_up = True
                continue
            while not (self.running.free_indices and self._admit(state, plan, promised_pages)):
                last = self.running.last_in_background
                if is_background or last is None:
                    return False
                self.give_way(last, plan)
                promised_pages = self._promised_pages()
            promised_pages += self._pages_wanted(state)
        return True

    def _has_place(self, is_background: bool) -> bool:
        """For one more to run, if need be in the place of one in the background."""
        return bool(self.running.free_indices) or not (is_background or self.running.last_in_background is None)

    def admit_newcomers(self, plan: Plan, num_kept: int) -> None:
        """Begin a request of each client that has none running, with all tokens of the step but `num_kept`. The client
        that has most running leaves them a place and pages."""
        newcomers = self.waiting.newcomers(self.running.of_class(False), self.counters.computed_tokens)
        if not newcomers:
            return
        self._begin_step()
        plan.tokens_left -= num_kept
        for state in newcomers:
            if plan.tokens_left and not self._is_held(state):
                self._admit_first(state, plan)
        plan.tokens_left += num_kept

    def _begin_step(self) -> None:
        for hold in self.holds:
            hold.begin_step(self.running.states)

    def _is_held(self, state: RequestState) -> bool:
        for hold in self.holds:
            if hold.holds(state):
                state.waited_for = hold.reason
                return True
        return False

    def _admit_first(self, state: RequestState, plan: Plan) -> None:
        while not (self.running.free_indices and self._admit(state, plan, self._promised_pages())):
            victim = self._gives_way_to(state)
            if victim is None:
                return
            self.give_way(victim, plan)

    def _gives_way_to(self, newcomer: RequestState) -> RequestState | None:
        """The latest request in the background; or else of the client that has most running: of several, and of more
        pages than are wanted."""
        running = self.running.states
        if self.running.last_in_background is not None:
            return self.running.last_in_background
        client, count = Counter(state.request.client for state in running).most_common(1)[0]
        if count < 2:
            return None
        theirs = [state for state in running if state.request.client == client]
        num_pages = sum(len(state.pages.pages) for state in theirs if state.pages is not None)
        return theirs[-1] if num_pages > self._pages_in_all(newcomer) else None

    def _promised_pages(self) -> int:
        return sum(map(self._pages_wanted, self.running.states))

    def _pages_in_all(self, state: RequestState) -> int:
        """Pages for all tokens that a request has and one page of output. Admission leaves that many free, so that
        requests which just came in do not have to be thrown out again."""
        cache = self.cache
        return min(cache.pages_for(state.num_tokens) + 1, cache.pages_for(state.max_kv_tokens))

    def _pages_wanted(self, state: RequestState) -> int:
        """Of these, what a running request does not have yet."""
        return max(0, self._pages_in_all(state) - (len(state.pages.pages) if state.pages else 0))

    def _admit(self, state: RequestState, plan: Plan, promised_pages: int) -> bool:
        """Begin to run a waiting request on what is cached of it. False, and no change, if there are too few pages."""
        admission = self.cache.admit(
            state.request.namespace,
            state.key,
            max_matched=state.match_limit,
            most_tokens=plan.most_for(state),
            num_pages=self._pages_in_all(state) if self.running.states else 0,  # alone, it gets what there is
            promised_pages=promised_pages,
            given=state.given,
        )
        if admission is None:
            return False
        if state.request.pins:
            self.cache.want_states(admission, [pin.num_tokens for pin in state.request.pins])
        self._queue_of(state).remove(state)
        self.running.begin(state, admission)
        plan.copies += admission.copies
        plan.state_copies += admission.state_copies
        plan.add(state, admission.num_tokens)
        plan.num_cached_tokens += admission.num_matched
        is_first = state.cached_tokens < 0
        if is_first:
            state.cached_tokens = admission.num_matched
            self.counters.prompt_tokens += state.num_prompt_tokens
            self.counters.cached_tokens += admission.num_matched
        for hold in self.holds:
            hold.began(state)
        if is_first and state.match_end is not None:  # of which a hold may have known more
            end = cache_ends.with_running(state.match_end, state, self.running.states, self.cache.page_size)
            state.cache_end = cache_ends.account_of(end, state, self.cache)
        return True

    # -- and stops running ---------------------------------------------------------------------------------------------
    def give_way(self, state: RequestState, plan: Plan) -> None:
        """Take a running request out of the step that is planned, and put it back among the waiting."""
        plan.drop(state)
        plan.num_preempted += 1
        plan.num_background_preempted += state.is_background
        self.preempt(state)

    def preempt(self, state: RequestState) -> None:
        """Back to the front of the waiting; it resumes through the tree, as far as what it leaves there stays."""
        self._leave(state, keep=True)
        state.num_computed = 0
        state.num_preemptions += 1
        state.enqueued_at = self.counters.computed_tokens
        self.counters.preemptions += 1
        self.add(state)

    def remove(self, state: RequestState, *, keep: bool) -> None:
        """A request ends, waiting or running: its place and pages go. `keep` what it computed, in the tree."""
        queue = self._queue_of(state)
        if state.pages is None:
            queue.remove(state)
        else:
            self._leave(state, keep=keep)
        if not queue and not self.running.of_class(state.is_background):
            queue.forget_clients()

    def _leave(self, state: RequestState, *, keep: bool) -> None:
        self.running.leave(state, keep=keep)
        self._queue_of(state).charge(state.request.client, state.num_computed - state.num_found)
