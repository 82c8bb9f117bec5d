"""The waiting requests: in which order they are tried.

Owns their order within a client and whose turn it is among clients. Never admits a request and never changes one.

Clients take turns where several wait: first is the one for which least was computed, by tokens (as VTC, Sheng et al.,
arXiv 2401.00588). A client that had nothing waiting begins at the shared clock, so that nobody saves up turns by
idling. The clock stands where the client admitted last stood, and moves on with what is computed for all, so that
newcomers cannot keep another from its turn for ever. Within a client the policy decides; for one client it alone.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heapreplace

from mooli.cache.kv_cache import KVCache
from mooli.errors import EngineError
from mooli.scheduler.policy import check_policy, fcfs_key, order_lpm
from mooli.scheduler.request_state import RequestState

MOST_CLIENTS = 1024
"""Clients without waiting requests of whom it is kept how much was computed for them."""

SHARES = 8
"""The clock moves as if so many clients waited at most. So a client that is D tokens ahead of it goes before all who
come when SHARES * D more have been computed."""


class Waiting:
    """See the module docstring. Requests of one client lie in the order of `fcfs_key`."""

    def __init__(self, cache: KVCache, policy: str) -> None:
        """Raises ConfigError for a policy that is not known."""
        self.num_tokens = 0
        """Of all waiting requests."""
        self._cache = cache
        self._policy = check_policy(policy)
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
        served = {client: self._served[client] for client in self._queues}
        for state in running:
            if state.request.client in served:
                served[state.request.client] += state.num_tokens - state.num_found
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
        if len({state.request.client for state in states}) < 2:
            return states
        served: dict[str, float] = {}
        for state in running:
            client = state.request.client
            before = served.get(client)
            served[client] = (
                (self._served.get(client, 0) if before is None else before) + state.num_tokens - state.num_found
            )
        return sorted(states, key=lambda state: served[state.request.client])

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
