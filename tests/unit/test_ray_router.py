"""The request router as Serve uses it: what it places, counts and lets go of, with replicas that are made up."""

from __future__ import annotations

import asyncio
import importlib.util
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mooli.ray.forwarding import Forwarded
from mooli.ray.heads import Heads

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what Ray imports
]

LIMIT_S = 60


class Replica:
    """is_full: takes nothing more."""

    def __init__(self, name: str) -> None:
        from ray.serve._private.common import DeploymentID, ReplicaID

        self.replica_id = ReplicaID(name, DeploymentID("engine", "app"))
        self.routing_stats: dict[str, Any] = {}
        self.max_ongoing_requests = 1000
        self.is_full = False

    def update_replica_info(self, info: Any) -> None: ...

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.max_ongoing_requests if self.is_full else 0


class Routing:
    """A router of these replicas, and calls of it."""

    def __init__(self, *replicas: Replica, **rules: Any) -> None:
        from ray.serve._private.common import DeploymentHandleSource, DeploymentID

        from mooli.ray.router import HeadRouter

        self.router = HeadRouter(
            deployment_id=DeploymentID("engine", "app"), handle_source=DeploymentHandleSource.REPLICA
        )
        self.router.initialize_state(**rules)
        self.router.update_replicas(list(replicas))

    def pending(self, call: str, *args: Any) -> Any:
        from ray.serve._private.common import RequestMetadata
        from ray.serve.request_router import PendingRequest

        metadata = RequestMetadata(request_id=call, internal_request_id=call)
        return PendingRequest(args=list(args), kwargs={}, metadata=metadata)

    async def place(self, call: str, *args: Any) -> str:
        """The name of who gets a call, which is told to the router as sent."""
        request = self.pending(call, *args)
        replica = await self.router._choose_replica_for_request(request)
        self.router.on_request_routed(request, replica.replica_id, None)
        return replica.replica_id.unique_id

    def loads(self) -> dict[str, float]:
        names = [each.unique_id for each in self.router.curr_replicas]
        return {name: self.router._placement.load(name) for name in names}

    def end(self, call: str, name: str) -> None:
        (replica_id,) = [each for each in self.router.curr_replicas if each.unique_id == name]
        self.router.on_request_completed(replica_id, call)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), LIMIT_S))


def heads(index: int, conversation: int = 0) -> Forwarded:
    return Forwarded(heads=Heads(b"%d" % index, b"%d %d" % (index, conversation)))


def test_calls_go_where_their_heads_are_and_count_until_they_end():
    async def test() -> None:
        routing = Routing(Replica("a"), Replica("b"), spill_floor=1000)
        placed = {f"call {i}": await routing.place(f"call {i}", heads(i % 10)) for i in range(60)}
        assert all(placed[f"call {i}"] == placed[f"call {i % 10}"] for i in range(60))
        assert routing.loads() == Counter(placed.values())
        for call, name in placed.items():
            routing.end(call, name)
        assert set(routing.loads().values()) == {0}

    run(test)


def test_a_burst_is_counted_before_it_is_answered():
    async def test() -> None:
        routing = Routing(*map(Replica, "abcd"), spill_floor=2)
        calls = [routing.place(f"call {i}", heads(0, i)) for i in range(80)]
        counts = Counter(await asyncio.gather(*calls))
        assert routing.loads() == counts
        assert max(counts.values()) <= 31

    run(test)


def test_a_call_of_another_kind_goes_where_least_is_to_do():
    async def test() -> None:
        routing = Routing(*map(Replica, "abc"))
        assert {await routing.place(f"call {i}", "something else") for i in range(3)} == {"a", "b", "c"}
        assert {await routing.place(f"more {i}") for i in range(3)} == {"a", "b", "c"}

    run(test)


def test_a_full_replica_is_passed_over_and_counts_nothing():
    async def test() -> None:
        replicas = Replica("a"), Replica("b")
        routing = Routing(*replicas)
        owner = await routing.place("first", heads(0))
        routing.end("first", owner)
        next(each for each in replicas if each.replica_id.unique_id == owner).is_full = True
        other = await routing.place("second", heads(0))
        assert other != owner
        assert routing.loads() == {owner: 0, other: 1}

    run(test)


def test_a_call_that_nobody_waits_for_any_more_counts_nothing():
    async def test() -> None:
        replica = Replica("a")
        replica.is_full = True
        routing = Routing(replica)
        waiting = asyncio.ensure_future(routing.place("left", heads(0)))
        while not routing.loads()["a"]:
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await asyncio.sleep(0)
        assert routing.loads() == {"a": 0}
        assert routing.router._firsts == {}

    run(test)


def test_replicas_tell_what_they_do_die_and_fail():
    async def test() -> None:
        replicas = [Replica(name) for name in "abc"]
        routing = Routing(*replicas, spill_floor=2)
        replicas[0].routing_stats = {"running": 3, "waiting": 4, "free_tokens": 10}
        routing.router.update_replicas(replicas)
        assert routing.loads() == {"a": 7, "b": 0, "c": 0}
        routing.router.on_replica_actor_unavailable(replicas[1].replica_id)
        assert routing.loads()["b"] == 2
        await routing.place("again", Forwarded(avoid=("c",), failed=("c",)))
        assert routing.loads()["c"] == 2
        routing.router.on_replica_actor_died(replicas[0].replica_id)
        assert routing.loads().keys() == {"b", "c"}

    run(test)
