"""Which replica gets a request: consistent hashing, as far as load allows. No part of Ray is needed to decide.

Owns the ring, the count of what each replica has to do, and four rules.

- **Affinity.** The head of a prompt has an order of replicas, the same in every process that decides, and after a
  restart. The first of them takes it. A replica that comes or goes moves its own share of heads and no other.
- **Spill.** A replica that would have more than `spill_factor` times the mean, and more than `spill_floor`, is passed
  over. Then the conversation decides who is next, so that one hot head is shared out by conversations.
- **Warm-up.** A replica that joins others takes `warm_up_share` of its heads at once and all after `warm_up_s`: more
  would be cold at one blow.
- **Failures are load.** Each counts as `spill_floor` requests for `failure_s`: a replica that fails fast looks idle,
  and would draw everything.

A request counts from the moment it is placed, not from that of its first answer. What a replica reports above that was
sent by others, and counts as well. Times come from `clock`, in seconds.
"""

from __future__ import annotations

import bisect
import hashlib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from mooli.ray.heads import Heads

POINTS = 128
"""Of each replica on the ring: shares of heads differ by about a tenth."""

UNCONFIRMED_S = 30.0
"""After which a request counts no more that was placed and never reported as sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """See the module docstring."""

    spill_factor: float = 1.5
    spill_floor: int = 8
    warm_up_s: float = 60.0
    warm_up_share: float = 0.25
    failure_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Report:
    """What an engine says of itself: sequences that run and wait, and tokens of its cache that nobody uses now."""

    running: int = 0
    waiting: int = 0
    free_tokens: int = 0


class _Replica:
    def __init__(self, name: str, joined_s: float | None) -> None:
        self.name = name
        self.joined_s = joined_s
        """None: it was there before the first call, when all were cold."""
        self.open: dict[str, tuple[int, float, bool]] = {}
        """By call: how often it was placed here, since when, and whether it was sent."""
        self.num_open = 0
        self.report = Report()
        self.num_foreign = 0
        self.failures: deque[float] = deque()


class Placement:
    """The state of one process that routes. Not for several threads."""

    def __init__(self, rules: Rules, clock: Callable[[], float] = time.monotonic) -> None:
        self._rules = rules
        self._clock = clock
        self._replicas: dict[str, _Replica] = {}
        self._ring: list[tuple[int, str]] = []
        self._has_placed = False

    # -- what happens --
    def set_replicas(self, names: Iterable[str]) -> None:
        """Those that there are now. What was open on others is forgotten."""
        wanted = set(names)
        if wanted == self._replicas.keys():
            return
        joined_s = self._clock() if self._has_placed else None
        kept = {name: replica for name, replica in self._replicas.items() if name in wanted}
        self._replicas = kept | {name: _Replica(name, joined_s) for name in sorted(wanted - kept.keys())}
        self._ring = sorted((_point(f"{name}:{i}".encode()), name) for name in self._replicas for i in range(POINTS))

    def sent(self, call: str, name: str) -> None:
        """The call has reached the replica: it counts until `ended`."""
        replica = self._replicas.get(name)
        if replica is not None and call in replica.open:
            count, since_s, _ = replica.open[call]
            replica.open[call] = count, since_s, True

    def ended(self, call: str, name: str) -> None:
        """The call was answered by the replica, has failed there, or was never sent. Unknown ones are ignored."""
        replica = self._replicas.get(name)
        if replica is None or call not in replica.open:
            return
        count, since_s, is_sent = replica.open.pop(call)
        replica.num_open -= 1
        if count > 1:
            replica.open[call] = count - 1, since_s, is_sent

    def moved(self, call: str, old: str, new: str) -> None:
        """Who was to have the call did not take it, and another will."""
        self.ended(call, old)
        if new in self._replicas:
            self._open(call, self._replicas[new])

    def failed(self, name: str) -> None:
        if name in self._replicas:
            self._replicas[name].failures.append(self._clock())

    def reported(self, name: str, report: Report) -> None:
        """What the replica's engine has last said; the same again says nothing new."""
        replica = self._replicas.get(name)
        if replica is not None and replica.report != report:
            replica.report = report
            replica.num_foreign = max(0, report.running + report.waiting - replica.num_open)

    # -- what is decided --
    def place(self, call: str, heads: Heads | None, *, wanted: str = "", avoid: Collection[str] = ()) -> list[str]:
        """Replicas for a call, best first; it counts as open on the first. heads: None where any will do.

        wanted: comes first, and has no other behind it, if it is there.
        avoid: those that have failed this call; they come last. A call is placed again only after it has ended where it
        was.
        """
        self._forget_unconfirmed()
        if not self._replicas:
            return []
        self._has_placed = True
        ranked = [wanted] if wanted in self._replicas else self._ranked(heads)
        ranked = [name for name in ranked if name not in avoid] + [name for name in ranked if name in avoid]
        self._open(call, self._replicas[ranked[0]])
        return ranked

    def load(self, name: str) -> float:
        """Requests that the replica has, and what its failures count as."""
        replica = self._replicas[name]
        failures, since_s = replica.failures, self._clock() - self._rules.failure_s
        while failures and failures[0] <= since_s:
            failures.popleft()
        return self._num(replica) + len(failures) * max(1, self._rules.spill_floor)

    def _open(self, call: str, replica: _Replica) -> None:
        count = replica.open[call][0] if call in replica.open else 0
        replica.open[call] = count + 1, self._clock(), False
        replica.num_open += 1

    def _num(self, replica: _Replica) -> int:
        return replica.num_open + replica.num_foreign

    def _ranked(self, heads: Heads | None) -> list[str]:
        loads = {name: self.load(name) for name in self._replicas}
        by_load = sorted(loads, key=lambda name: (loads[name], -self._replicas[name].report.free_tokens, name))
        if heads is None:
            return by_load
        mean = (sum(map(self._num, self._replicas.values())) + 1) / len(self._replicas)
        most = max(self._rules.spill_floor, self._rules.spill_factor * mean)
        is_free = {name: load + 1 <= most for name, load in loads.items()}
        session = heads.session.encode()
        order = self._order(_digest(session) if session else heads.begin)
        if is_free[order[0]]:
            return order
        # A session is one conversation: its order is its own already.
        others = order if session else self._order(heads.whole)
        return [name for name in others if is_free[name]] + [name for name in by_load if not is_free[name]]

    def _order(self, digest: bytes) -> list[str]:
        """All replicas, as they follow on the ring; those that do not take this digest yet are behind the others."""
        start = bisect.bisect(self._ring, (_point(digest), ""))
        turned = self._ring[start:] + self._ring[:start]
        order = list(dict.fromkeys(name for _, name in turned))
        early = [name for name in order if self._takes(name, digest)]
        return early + [name for name in order if name not in early] if early else order

    def _takes(self, name: str, digest: bytes) -> bool:
        joined_s, rules = self._replicas[name].joined_s, self._rules
        if joined_s is None or rules.warm_up_s <= 0:
            return True
        grown = min(1.0, (self._clock() - joined_s) / rules.warm_up_s)
        share = rules.warm_up_share + (1 - rules.warm_up_share) * grown
        return _point(digest + name.encode()) < share * 2**64

    def _forget_unconfirmed(self) -> None:
        before_s = self._clock() - UNCONFIRMED_S
        for replica in self._replicas.values():
            lost = []
            for call, (_, since_s, is_sent) in replica.open.items():
                if since_s > before_s:
                    break  # the rest is younger, but for what was placed here twice
                if not is_sent:
                    lost.append(call)
            for call in lost:
                replica.num_open -= replica.open.pop(call)[0]


def _point(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()
