"""The requests that were submitted to an engine and have not ended, as the caller's end of the link keeps them.

Owns whose each output is. In the engine a request has a name that never comes again, so nothing that is still on its
way, an output or an end, can meet a later request of the same id. Not thread-safe.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mooli.errors import EngineError, MooliError, RequestError
from mooli.logs import FirstTimes
from mooli.types import Request, RequestOutput

logger = logging.getLogger(__name__)

Sink = Callable[["RequestOutput | MooliError"], None]
"""Takes what happens to one request. An error, or an output with `finish`, is the last thing it gets. One that raises
is given an EngineError, and nothing more."""


@dataclass(frozen=True, slots=True, eq=False)
class OpenRequest:
    """name: of this submission in the engine."""

    name: str
    request: Request
    sink: Sink


class OpenRequests:
    """By id, as callers know them, and by name, as the engine does."""

    def __init__(self) -> None:
        self._names = map(str, itertools.count())
        self._by_rid: dict[str, OpenRequest] = {}
        self._by_name: dict[str, OpenRequest] = {}
        self._failures = FirstTimes()

    def __len__(self) -> int:
        return len(self._by_rid)

    @property
    def rids(self) -> list[str]:
        return list(self._by_rid)

    def check_free(self, requests: Iterable[Request]) -> None:
        """Raises RequestError if an id belongs to a request that is open."""
        for request in requests:
            if request.rid in self._by_rid:
                raise RequestError(
                    f"rid {request.rid!r} belongs to a request that is still running: use another", argument="rid"
                )

    def named(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[OpenRequest]:
        """Requests with their names, which are not open before `add`."""
        return [OpenRequest(next(self._names), *pair) for pair in zip(requests, sinks, strict=True)]

    def add(self, entries: Sequence[OpenRequest]) -> None:
        for entry in entries:
            self._by_rid[entry.request.rid] = self._by_name[entry.name] = entry

    def names(self, rids: Iterable[str]) -> list[str]:
        """Of those that are open."""
        return [self._by_rid[rid].name for rid in rids if rid in self._by_rid]

    def get(self, name: str) -> OpenRequest | None:
        return self._by_name.get(name)

    def pop(self, name: str) -> OpenRequest | None:
        """It has ended. None if it was not open any more."""
        entry = self._by_name.get(name)
        if entry is not None:
            if self._by_rid.get(entry.request.rid) is entry:
                del self._by_rid[entry.request.rid]
            del self._by_name[name]
        return entry

    def name_of(self, request: Request) -> str | None:
        """Of this very request, not of another with its id. None if it is not open."""
        entry = self._by_rid.get(request.rid)
        return None if entry is None or entry.request is not request else entry.name

    def taker_failed(self, entry: OpenRequest, error: BaseException) -> None:
        """Its sink has raised `error`: say so, and tell the sink that the request, which is not open any more, ended
        with that."""
        rid, words = entry.request.rid, f"{type(error).__name__}: {error}"
        shown = error if self._failures.is_first("a taker", error) else None
        logger.warning("request %s ends here, as its taker failed: %s", rid, words, exc_info=shown)
        try:
            entry.sink(EngineError(f"request {rid} ended early: what takes its output failed with {words}"))
        except BaseException:  # an event loop that was closed, for example: nobody is there
            logger.debug("the taker of request %s could not be told", rid, exc_info=True)

    def clear(self) -> list[OpenRequest]:
        """All that were open."""
        entries = list(self._by_rid.values())
        self._by_rid, self._by_name = {}, {}
        return entries
