"""What is seen of the cache and of the requests in it, by who looks once and by who watches.

Owns who may see what (`View`), and the feed: one question to the engine a tick for all who watch, and none while nobody
does. Each watcher has a bounded queue of pieces that are encoded once for all with the same view. One that reads too
slowly loses them and is told so; it never holds anybody up. What a question costs the engine decides when the next one
comes: at most a hundredth of its time goes into being watched. What goes out has its shapes in
`mooli.server.cache_shapes`.

Never knows HTTP. Lives in the server's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mooli.errors import EngineError, MooliError, QueueFullError
from mooli.link.link import Link
from mooli.server.activity import Activity, Happened, Miss, OpenEntry
from mooli.server.cache_shapes import (
    CacheNode,
    Changes,
    Closed,
    Hello,
    Missed,
    Namespace,
    OpenRequest,
    Pages,
    Tree,
    event,
    open_request,
    page_counts,
    shown_nodes,
    shown_spans,
)

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
"""Between two looks, at least."""

COST_SHARE = 0.01
"""Of the engine's time may go into being looked at."""

PART_NODES = 500
"""Asked for at a time: about half a millisecond of the engine's."""

MOST_NODES = 10_000
"""Of one answer."""

MOST_REQUESTS = 256
"""Open requests that are told of at a time."""

MOST_WATCHERS = 64

MOST_UNREAD_BYTES = 1 << 20
"""Of one watcher. Beyond it loses them all, and is told so."""

QUIET_S = 15.0
"""After so long without news, a sign that the stream lives."""

LINGER_S = 2.0
"""For which the engine goes on taking notes: a page that is loaded again comes back at once."""

MOST_WAIT_S = 10.0
"""For one's turn to see the tree."""

BEGIN_S = 60.0
"""For the answer that says where the changes begin."""

MOST_SILENCE_S = 600.0
"""Of an engine in the middle of a step. One that is dead or hung is ended by the server."""


# -- who sees what -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class View:
    """namespace: the only one that is seen; None for all. tenant: whose requests are seen whatever their salt; "" for
    nobody's."""

    namespace: str | None = None
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Names:
    """label: of a namespace, for people. tenant_of: of the client of a request, "" for nobody's."""

    label: Callable[[str], str]
    tenant_of: Callable[[str], str]


# -- the feed ----------------------------------------------------------------------------------------------------------
class _Watcher:
    """What one reader has not read yet."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self.is_closed = False
        self._pieces: list[bytes] = []
        self._num_bytes = 0
        self._num_missed = 0

    def put(self, piece: bytes) -> None:
        if self._num_bytes + len(piece) > MOST_UNREAD_BYTES:
            self.lose(len(self._pieces) + 1)
            return
        self._pieces.append(piece)
        self._num_bytes += len(piece)
        self.news.set()

    def lose(self, count: int) -> None:
        """Nothing of what came before is of use any more, and so many events are lost."""
        self._pieces, self._num_bytes = [], 0
        self._num_missed += count
        self.news.set()

    def take(self, seq: int) -> bytes:
        self.news.clear()
        pieces, self._pieces, self._num_bytes = self._pieces, [], 0
        if self._num_missed:
            pieces.insert(0, event(Missed(seq=seq, count=self._num_missed)))
            self._num_missed = 0
        return b"".join(pieces)


class _Channel:
    """All watchers with one view."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.seq = 0
        self.watchers: set[_Watcher] = set()
        self.last_rows: Any = None
        self.last_pages: Pages | None = None


class CacheFeed:
    """See the module docstring. tokens_per_s: generated now. is_draining: the server is about to end."""

    def __init__(
        self,
        link: Link,
        activity: Activity,
        names: Names,
        *,
        tokens_per_s: Callable[[], float],
        is_draining: Callable[[], bool],
    ) -> None:
        self._link = link
        self._activity = activity
        self._names = names
        self._tokens_per_s = tokens_per_s
        self._is_draining = is_draining
        self._num_looking = 0
        self._channels: dict[View, _Channel] = {}
        self._running: asyncio.Task[None] | None = None
        self._begun: asyncio.Future[None] | None = None
        self._version = 0
        self._ending: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self._free_at_s = 0.0

    # -- who looks once -----------------------------------------------------------------------------------------------
    async def tree(self, view: View, *, after: int, limit: int, timeout_s: float) -> Tree:
        """Up to `limit` nodes with ids above `after`. Raises what `Link.ask` raises, and QueueFullError where others
        have looked so often that it would be long before the engine may be asked."""
        wait_s = self._free_at_s - time.monotonic()
        if wait_s > MOST_WAIT_S:
            raise QueueFullError("The tree has been asked for too often.", retry_after_s=int(wait_s) + 1)
        with self._looking():
            async with self._turn:
                await asyncio.sleep(max(0.0, self._free_at_s - time.monotonic()))
                return await self._tree(view, after, limit, timeout_s)

    async def _tree(self, view: View, after: int, limit: int, timeout_s: float) -> Tree:
        at, cost_s = time.time(), 0.0
        nodes: list[CacheNode] = []
        roots: dict[int, str] = {}
        version: int | None = None
        next_after: int | None = after
        while next_after is not None and len(nodes) < limit:
            most = min(PART_NODES, limit - len(nodes))
            part = await self._link.ask("nodes", timeout_s, after=next_after, most=most)
            roots.update(part["roots"])
            nodes += shown_nodes(part["nodes"], _seen_roots(view, part["roots"]))
            version = part["version"] if version is None else version
            next_after = part["after"]
            cost_s += part["cost_s"]
        told = await self._link.ask("requests", timeout_s, most=MOST_REQUESTS)
        stats = await self._link.ask("stats", timeout_s)
        self._free_at_s = time.monotonic() + cost_s / COST_SHARE
        shown = {node.namespace for node in nodes}
        return Tree(
            at=at,
            version=version or 0,
            page_size=self._link.facts.page_size,
            namespaces=[self._namespace(number, roots[number]) for number in sorted(shown)],
            nodes=nodes,
            requests=[item for _, item in self._open_requests(view, told)],
            pages=page_counts(stats),
            more=next_after is not None,
            after=next_after,
        )

    async def node(self, number: int, most: int, timeout_s: float) -> Mapping[str, Any] | None:
        """What a node holds (`NodeTokens`); None if it is not there. Raises what `Link.ask` raises."""
        with self._looking():
            found: Mapping[str, Any] | None = await self._link.ask("node", timeout_s, number=number, most=most)
            return found

    async def find(self, namespace: str, token_ids: list[int], timeout_s: float) -> Mapping[str, Any]:
        """`Watching.find`, with the requests by their ids. Raises what `Link.ask` raises."""
        with self._looking():
            found: dict[str, Any] = await self._link.ask("find", timeout_s, namespace=namespace, token_ids=token_ids)
        entries = map(self._activity.named, found["requests"])
        return {**found, "requests": [entry.generation.rid for entry in entries if entry is not None]}

    async def requests(self, view: View, timeout_s: float) -> list[OpenRequest]:
        """The open requests, first come first. Raises what `Link.ask` raises."""
        told = await self._link.ask("requests", timeout_s, most=MOST_REQUESTS)
        return [item for _, item in self._open_requests(view, told)]

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        """The engine knows nodes by number meanwhile."""
        self._num_looking += 1
        try:
            yield
        finally:
            self._num_looking -= 1
            if not self._num_looking:
                ending = asyncio.ensure_future(self._unwatch())
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)

    async def _unwatch(self) -> None:
        await asyncio.sleep(LINGER_S)
        if not self._num_looking:
            with contextlib.suppress(MooliError, TimeoutError):  # it has ended, or notes no more than its bounds
                await self._link.ask("unwatch", BEGIN_S)

    # -- who watches --------------------------------------------------------------------------------------------------
    async def watch(self, view: View) -> AsyncIterator[bytes]:
        """Framed events, until whoever iterates leaves or the server ends. Raises QueueFullError, EngineDeadError, or
        EngineClosedError before the first."""
        if sum(len(channel.watchers) for channel in self._channels.values()) >= MOST_WATCHERS:
            raise QueueFullError(f"{MOST_WATCHERS} others watch the cache already.", retry_after_s=5)
        watcher = _Watcher()
        with self._looking():
            channel = self._channels.setdefault(view, _Channel(view))
            channel.watchers.add(watcher)
            try:
                if self._running is None or self._running.done():
                    self._begun = asyncio.get_running_loop().create_future()
                    self._running = asyncio.ensure_future(self._run(self._begun))
                if self._begun is not None:
                    await asyncio.shield(self._begun)
                yield event(Hello(seq=channel.seq, version=self._version, interval_s=INTERVAL_S))
                while not watcher.is_closed:
                    try:
                        await asyncio.wait_for(watcher.news.wait(), QUIET_S)
                    except asyncio.TimeoutError:
                        yield b": \n\n"
                    else:
                        yield watcher.take(channel.seq)
            finally:
                channel.watchers.discard(watcher)
                if not channel.watchers:
                    self._channels.pop(view, None)
                if not self._channels and self._running is not None:
                    self._running.cancel()
                    self._running = None

    async def _run(self, begun: asyncio.Future[None]) -> None:
        """Look again and again, while somebody watches."""
        try:
            self._activity.watch(on=True)
            answer = await self._link.ask("watch", BEGIN_S)
            self._version = answer["version"]
            begun.set_result(None)
            await self._look_again()
        except (MooliError, TimeoutError) as exc:
            if not begun.done():
                begun.set_exception(exc if isinstance(exc, MooliError) else EngineError(str(exc)))
                begun.exception()  # seen: whoever waited may have gone
            self._close_all(str(exc))
        except Exception:
            logger.exception("who watches the cache is told no more")
            self._close_all("The server failed to tell what happens; its log says why.")
        finally:
            begun.cancel()
            self._activity.watch(on=False)

    async def _look_again(self) -> None:
        loop = asyncio.get_running_loop()
        asking: asyncio.Future[Any] | None = None
        try:
            while not self._is_draining():
                started_s = loop.time()
                if asking is None:
                    asking = asyncio.ensure_future(
                        self._link.ask("changes", MOST_SILENCE_S, most_requests=MOST_REQUESTS)
                    )
                # A long step answers late. What has happened meanwhile is told all the same.
                await asyncio.wait({asking}, timeout=INTERVAL_S)
                told = None
                if asking.done():
                    told, asking = asking.result(), None
                self._tell(told)
                cost_s = 0.0 if told is None else told["cost_s"]
                await asyncio.sleep(max(0.0, max(INTERVAL_S, cost_s / COST_SHARE) - (loop.time() - started_s)))
        finally:
            if asking is not None:
                asking.cancel()
                with contextlib.suppress(asyncio.CancelledError, MooliError, TimeoutError):
                    await asking
        self._close_all("The server is shutting down.")

    def _tell(self, told: Mapping[str, Any] | None) -> None:
        """Tell all who watch what is new. told: the engine's answer, if there is one."""
        happened = self._activity.take()
        if told is not None:
            self._version = told["version"]
            began = [self._beginning(*row) for row in told["began"]]
            happened = sorted([*happened, *filter(None, began)], key=lambda item: item[1].at)
            self._activity.forget_ended()
        for channel in self._channels.values():
            if told is not None and not told["is_complete"]:
                for watcher in channel.watchers:
                    watcher.lose(1)
            changes = self._changes(channel, told, happened)
            if changes is None:
                continue
            channel.seq += 1
            changes.seq = channel.seq
            piece = event(changes)
            for watcher in channel.watchers:
                watcher.put(piece)

    def _changes(
        self, channel: _Channel, told: Mapping[str, Any] | None, happened: Sequence[tuple[OpenEntry, Happened]]
    ) -> Changes | None:
        """What of it a channel sees; None if that is nothing."""
        view = channel.view
        changes = Changes(seq=0, at=time.time(), version=self._version)
        changes.happened = [item for entry, item in happened if self._sees(view, entry)]
        is_news = bool(changes.happened)
        if told is not None:
            roots: Mapping[int, str] = told["roots"]
            seen = _seen_roots(view, roots)
            changes.nodes = shown_nodes(told["nodes"], seen)
            changes.removed = [number for number, root in told["removed"] if root in seen]
            changes.evicted = shown_spans(told["dropped"], seen)
            shown = {node.namespace for node in changes.nodes} | {span.namespace for span in changes.evicted}
            changes.namespaces = [self._namespace(number, roots[number]) for number in sorted(shown)]
            is_news |= bool(changes.nodes or changes.removed or changes.evicted)
            shown_requests = self._open_requests(view, told["requests"])
            rows = [row for row, _ in shown_requests]
            if rows != channel.last_rows:
                changes.requests = [item for _, item in shown_requests]
                is_news |= bool(rows) or channel.last_rows is not None
                channel.last_rows = rows
            pages = page_counts(told["stats"])
            if pages != channel.last_pages:
                changes.pages = channel.last_pages = pages
                is_news = True
        if not is_news:
            return None
        changes.tokens_per_s = round(self._tokens_per_s(), 3)
        return changes

    def _beginning(
        self, name: str, at: float, cached_tokens: int, agreed: int, reason: str | None
    ) -> tuple[OpenEntry, Happened] | None:
        entry = self._activity.named(name)
        if entry is None:
            return None
        rid, prompt_tokens = entry.generation.rid, entry.generation.prompt_tokens
        miss = None if reason is None else Miss(reason=reason, tokens=agreed)
        return entry, Happened(
            what="began",
            id=rid,
            at=max(at, entry.at),
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            miss=miss,
        )

    def _close_all(self, message: str) -> None:
        piece = event(Closed(message=message))
        for channel in self._channels.values():
            for watcher in channel.watchers:
                watcher.is_closed = True
                watcher.put(piece)

    # -- shapes -------------------------------------------------------------------------------------------------------
    def _sees(self, view: View, entry: OpenEntry) -> bool:
        request = entry.generation.request
        if view.namespace is None or request.namespace == view.namespace:
            return True
        return bool(view.tenant) and self._names.tenant_of(request.client) == view.tenant

    def _open_requests(self, view: View, rows: Sequence[Sequence[Any]]) -> list[tuple[Any, OpenRequest]]:
        """Those that a view sees, each after what of it moves."""
        now_s = time.monotonic()
        found = []
        for row in rows:
            entry = self._activity.named(row[0])
            if entry is not None and self._sees(view, entry):
                found.append(((*row, entry.first_token_s), open_request(row, entry, now_s)))
        return found

    def _namespace(self, number: int, namespace: str) -> Namespace:
        return Namespace(id=number, name=self._names.label(namespace))


def _seen_roots(view: View, roots: Mapping[int, str]) -> set[int]:
    return {number for number, namespace in roots.items() if view.namespace in (None, namespace)}
