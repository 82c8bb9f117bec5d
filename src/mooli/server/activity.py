"""What is going on in a server: which requests are open, what has just happened to them, and how the last hour was.

Owns the table of open requests, from where they begin until they end, and the numbers of the last hour, by the minute.
What happens is noted only while somebody watches; the rest is an entry of a table for each request, and a count for
each token. Never sees texts. Lives in the server's event loop.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from mooli.frontend.generation import Generation

MOST_HAPPENED = 5000
"""Kept until it is taken; of more, the latest."""

MINUTES = 60

_SHORTEST_S = 1e-4
_STEP = math.log(1.05)
"""Times are counted in steps of 5 %, so that a percentile is right to half of that."""


class Happened(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Something that happened to a request. at: Unix seconds.

    received: it has come. began: it runs from now on, with so many tokens from the cache; `miss` says why no more.
    first_token, ended: so long after it came. reason: of an end, as in `finish_reason`.
    """

    what: str
    id: str
    at: float
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    miss: Miss | None = None
    reason: str | None = None
    after_s: float | None = None


class Miss(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Why no more of a prompt was in the cache, and how many of its tokens agreed with what is there.

    reason: `new` (not known before), `evicted` (known, and gone for want of room), `diverged` (others went on with
    another token), `namespace` (nothing is cached for this tenant or salt), `held back` (it must be computed),
    `judged slower` and `load failed` (more is in a tier below, and was not loaded), `disabled`.
    """

    reason: str
    tokens: int


@dataclass(slots=True, eq=False)
class OpenEntry:
    """An open request. name: as the engine calls it. at: Unix seconds of its beginning, `started_s` by the monotonic
    clock. first_token_s: after how long its first token came."""

    generation: Generation
    name: str
    at: float
    started_s: float
    first_token_s: float | None = None


@dataclass(slots=True)
class Percentiles:
    """Of times in seconds, how many there were; the percentiles are None of none."""

    count: int
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None


@dataclass(slots=True)
class Hour:
    """Of requests that ended in the last hour. hit_rate: share of their prompt tokens that came from the cache.
    gap_s: between two tokens of an answer."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    hit_rate: float
    first_token_s: Percentiles
    gap_s: Percentiles


@dataclass(slots=True)
class _Minute:
    number: int
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    first: collections.Counter[int] = field(default_factory=collections.Counter)
    gaps: collections.Counter[int] = field(default_factory=collections.Counter)


class Activity:
    """See the module docstring. name_of: `Link.name_of`. clock: monotonic seconds."""

    def __init__(self, name_of: Callable[[str], str | None], clock: Callable[[], float] = time.monotonic) -> None:
        self.open: dict[str, OpenEntry] = {}
        """By rid."""
        self._name_of = name_of
        self._clock = clock
        self._by_name: dict[str, OpenEntry] = {}
        self._minutes: collections.deque[_Minute] = collections.deque(maxlen=MINUTES)
        self._happened: collections.deque[tuple[OpenEntry, Happened]] | None = None
        self._ended: list[str] = []
        self._ended_before: list[str] = []

    def named(self, name: str) -> OpenEntry | None:
        """The request of that name in the engine, while it is open; while somebody watches, until what happened to it
        was taken."""
        return self._by_name.get(name)

    # -- of requests, as they happen ----------------------------------------------------------------------------------
    def started(self, generation: Generation) -> None:
        """It is on its way to the engine."""
        name = self._name_of(generation.rid)
        if name is None:  # it has failed already
            return
        entry = OpenEntry(generation, name, time.time(), self._clock())
        self.open[generation.rid] = self._by_name[name] = entry
        if self._happened is not None:
            prompt_tokens = generation.prompt_tokens
            self._note(entry, Happened(what="received", id=generation.rid, at=entry.at, prompt_tokens=prompt_tokens))

    def first_token(self, generation: Generation, elapsed_s: float) -> None:
        self._minute().first[_step_of(elapsed_s)] += 1
        entry = self.open.get(generation.rid)
        if entry is None:
            return
        entry.first_token_s = elapsed_s
        if self._happened is not None:
            after_s = round(elapsed_s, 6)
            self._note(entry, Happened(what="first_token", id=generation.rid, at=time.time(), after_s=after_s))

    def next_tokens(self, num_tokens: int, elapsed_s: float) -> None:
        """So many more of a request, so long after those before."""
        self._minute().gaps[_step_of(elapsed_s / num_tokens)] += num_tokens

    def finished(self, generation: Generation, elapsed_s: float) -> None:
        """It has ended, or without a `finish` nobody waits for it any more."""
        minute, finish = self._minute(), generation.finish
        minute.requests += 1
        if generation.output_ids or (finish is not None and finish.type in ("stop", "length")):
            minute.prompt_tokens += generation.prompt_tokens
            minute.cached_tokens += generation.cached_tokens
            minute.output_tokens += len(generation.output_ids)
        entry = self.open.pop(generation.rid, None)
        if entry is None:
            return
        if self._happened is None:
            del self._by_name[entry.name]
            return
        self._ended.append(entry.name)
        ended = Happened(
            what="ended",
            id=generation.rid,
            at=time.time(),
            reason="abort" if finish is None else finish.type,
            prompt_tokens=generation.prompt_tokens,
            cached_tokens=generation.cached_tokens,
            output_tokens=len(generation.output_ids),
            after_s=round(elapsed_s, 6),
        )
        self._note(entry, ended)

    # -- for who watches ----------------------------------------------------------------------------------------------
    def watch(self, *, on: bool) -> None:
        """Note what happens from here on, or no more."""
        self._happened = collections.deque(maxlen=MOST_HAPPENED) if on else None
        self.forget_ended()
        self.forget_ended()

    def take(self) -> list[tuple[OpenEntry, Happened]]:
        """What has happened since it was last taken, in the order of time."""
        if not self._happened:
            return []
        taken = list(self._happened)
        self._happened.clear()
        return taken

    def forget_ended(self) -> None:
        """Names of requests that had ended before this was called last are asked for no more."""
        for name in self._ended_before:
            self._by_name.pop(name, None)
        self._ended_before, self._ended = self._ended, []

    def _note(self, entry: OpenEntry, happened: Happened) -> None:
        if self._happened is not None:
            self._happened.append((entry, happened))

    # -- the last hour ------------------------------------------------------------------------------------------------
    def last_hour(self) -> Hour:
        """The numbers of the last 60 minutes, the one that runs included."""
        first = int(self._clock() // 60) - MINUTES + 1
        minutes = [minute for minute in self._minutes if minute.number >= first]
        prompt_tokens = sum(minute.prompt_tokens for minute in minutes)
        cached_tokens = sum(minute.cached_tokens for minute in minutes)
        return Hour(
            requests=sum(minute.requests for minute in minutes),
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            output_tokens=sum(minute.output_tokens for minute in minutes),
            hit_rate=cached_tokens / max(prompt_tokens, 1),
            first_token_s=_percentiles(minute.first for minute in minutes),
            gap_s=_percentiles(minute.gaps for minute in minutes),
        )

    def _minute(self) -> _Minute:
        number = int(self._clock() // 60)
        if not self._minutes or self._minutes[-1].number != number:
            self._minutes.append(_Minute(number))
        return self._minutes[-1]


def _step_of(time_s: float) -> int:
    return int(math.log(time_s / _SHORTEST_S) / _STEP) if time_s > _SHORTEST_S else 0


def _percentiles(counts: Iterable[collections.Counter[int]]) -> Percentiles:
    total: collections.Counter[int] = collections.Counter()
    for count in counts:
        total.update(count)
    num = total.total()
    found = Percentiles(num)
    shares = [("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99)] if num else []
    seen = 0
    for step in sorted(total):
        seen += total[step]
        while shares and seen >= shares[0][1] * num:
            setattr(found, shares.pop(0)[0], round(_SHORTEST_S * math.exp((step + 0.5) * _STEP), 6))
    return found
