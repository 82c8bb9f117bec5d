"""`Placement` as Ray Serve asks for it: a request router of the deployment of engines.

Owns what Serve's names are in those of `mooli.ray.placement`. Lives in each process that holds a handle of the
deployment: the ingress's replicas. Never decides anything itself.

Source: Ray Serve 2.60, `ray.serve.request_router` (alpha).
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from mooli.ray.forwarding import Forwarded
from mooli.ray.placement import Placement, Report, Rules

_REPORTED = frozenset(field.name for field in dataclasses.fields(Report))


class HeadRouter(RequestRouter):  # type: ignore[misc]
    """Routes `Forwarded` requests by their heads; calls of any other kind go where there is least to do."""

    def initialize_state(self, **rules: Any) -> None:
        """rules: those of `Rules`, by name."""
        self._placement = Placement(Rules(**rules))
        self._firsts: dict[asyncio.Future[RunningReplica], str] = {}
        """Where calls were placed of which it is not known yet who gets them."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._placement.set_replicas(replica.replica_id.unique_id for replica in replicas)
        for replica in replicas:
            stats = replica.routing_stats
            if stats.keys() >= _REPORTED:
                report = Report(**{name: stats[name] for name in _REPORTED})
                self._placement.reported(replica.replica_id.unique_id, report)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._placement.set_replicas(each.unique_id for each in self.curr_replicas)

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_unavailable(replica_id)
        self._placement.failed(replica_id.unique_id)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        call = pending_request.metadata.internal_request_id
        given = pending_request.args[0] if pending_request.args else None
        forwarded = given if isinstance(given, Forwarded) else Forwarded()
        for name in forwarded.failed:
            self._placement.failed(name)
        future = pending_request.future
        if future in self._firsts:  # nobody has taken it, and it is asked again
            self._placement.ended(call, self._firsts[future])
        else:
            future.add_done_callback(lambda future: self._chosen(call, future))
        names = self._placement.place(call, forwarded.heads, wanted=forwarded.wanted, avoid=forwarded.avoid)
        self._firsts[future] = names[0] if names else ""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_name[name]] for name in names if name in by_name]

    def _chosen(self, call: str, future: asyncio.Future[RunningReplica]) -> None:
        """It is known who gets a call, or that nobody waits for it any more. The second time nothing is done."""
        if future not in self._firsts:
            return
        first = self._firsts.pop(future)
        name = "" if future.cancelled() else future.result().replica_id.unique_id
        if name != first:
            self._placement.moved(call, first, name)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        self._chosen(pending_request.metadata.internal_request_id, pending_request.future)
        self._placement.sent(pending_request.metadata.internal_request_id, replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._placement.ended(internal_request_id, replica_id.unique_id)
