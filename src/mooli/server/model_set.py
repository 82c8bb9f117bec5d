"""Several models behind one address: which there are, which are loaded, and which has to go.

Owns the life of each: loaded when it is first asked for, one at a time, as the memory that one takes is counted for the
next; used by any number of requests; ended when nobody has used it for a while, when another needs its memory, or when
its engine has died. Knows engines only as `Loaded`, and neither HTTP nor a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from mooli.errors import ModelsInUseError, OutOfMemoryError

logger = logging.getLogger(__name__)

_LOOKS_A_LIFE = 4
"""How often it is looked, in the time that a model may be idle, whether it is over."""

_MOST_PAUSE_S = 5.0


class Loaded(Protocol):
    """A model that can be used."""

    @property
    def is_alive(self) -> bool: ...

    async def close(self) -> None:
        """Give back everything it holds. May be called again."""
        ...


L = TypeVar("L", bound=Loaded)


@dataclass(slots=True)
class _Model(Generic[L]):
    """num_users: requests that have it, or wait for it. used_s: of the monotonic clock, when the last left."""

    name: str
    loaded: L | None = None
    loading: asyncio.Task[L] | None = None
    num_users: int = 0
    used_s: float = 0.0


class ModelSet(Generic[L]):
    """Lives in one event loop.

    load: makes a model ready; raises OutOfMemoryError where there is too little memory for it now, and anything else
    where it cannot be had. idle_s: after so long without a request a model is ended; None for never. most: that many at
    a time; None for as many as there is memory for.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        load: Callable[[str], Awaitable[L]],
        *,
        idle_s: float | None = None,
        most: int | None = None,
    ) -> None:
        self._load = load
        self._idle_s = idle_s
        self._most = most
        self._models: Mapping[str, _Model[L]] = {name: _Model(name) for name in names}
        self._closing: set[asyncio.Future[None]] = set()
        self._turn = asyncio.Lock()
        """Of who loads or ends a model."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._models)

    @property
    def loaded(self) -> dict[str, L]:
        """Those that can be used at once."""
        return {
            name: model.loaded
            for name, model in self._models.items()
            if model.loaded is not None and model.loaded.is_alive
        }

    @property
    def num_users(self) -> int:
        return sum(model.num_users for model in self._models.values())

    @contextlib.asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[L]:
        """The model of that name, loaded if it is not, and not ended before this is left. KeyError for one that is not
        of the set.

        Raises what loading it raises, and ModelsInUseError.
        """
        model = self._models[name]
        model.num_users += 1
        try:
            yield await self._ready(model)
        finally:
            model.num_users -= 1
            model.used_s = time.monotonic()

    async def _ready(self, model: _Model[L]) -> L:
        if model.loaded is not None and model.loaded.is_alive:
            return model.loaded
        if model.loading is None:
            model.loading = asyncio.ensure_future(self._make_ready(model))
            model.loading.add_done_callback(_look_at)
        # Who leaves does not end it: others may wait, and the next one will ask soon.
        return await asyncio.shield(model.loading)

    async def _make_ready(self, model: _Model[L]) -> L:
        try:
            async with self._turn:
                if model.loaded is not None:
                    await self._end(model, "its engine has ended")
                while self._most is not None and len(self.loaded) >= self._most:
                    await self._end_idle(f"at most {self._most} models may be loaded at a time")
                started_s = time.perf_counter()
                while True:
                    try:
                        loaded = await self._load(model.name)
                        break
                    except OutOfMemoryError as exc:
                        if not self.loaded:
                            raise
                        logger.info("%s does not fit beside what is loaded: %s", model.name, exc)
                        await self._end_idle(f"there is no memory for {model.name} beside them")
                model.loaded = loaded
                model.used_s = time.monotonic()
                logger.info("%s is loaded, in %.1f s", model.name, time.perf_counter() - started_s)
                return loaded
        finally:
            model.loading = None

    async def _end_idle(self, why: str) -> None:
        """End the model that has been idle for longest. Raises ModelsInUseError where all are in use."""
        idle = [model for model in self._models.values() if model.loaded is not None and not model.num_users]
        if not idle:
            raise ModelsInUseError(f"{', '.join(self.loaded)} are in use, and {why}: try again in a while")
        await self._end(min(idle, key=lambda model: model.used_s), why)

    async def _end(self, model: _Model[L], why: str) -> None:
        loaded, model.loaded = model.loaded, None
        if loaded is not None:
            logger.info("%s is ended: %s", model.name, why)
            closing = asyncio.ensure_future(loaded.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            await asyncio.shield(closing)  # whoever has begun it may be cancelled

    async def end_idle_ones(self) -> None:
        """End models that nobody uses, one after the other, as long as this runs."""
        while self._idle_s is not None:
            await asyncio.sleep(min(_MOST_PAUSE_S, self._idle_s / _LOOKS_A_LIFE))
            for model in self._models.values():
                async with self._turn:
                    idle_s = time.monotonic() - model.used_s
                    if model.loaded is not None and not model.num_users and idle_s >= self._idle_s:
                        await self._end(model, f"nobody has used it for {idle_s:.0f} s")

    async def close(self) -> None:
        """End all of them, and what is being loaded."""
        for model in self._models.values():
            if model.loading is not None:
                model.loading.cancel()
                await asyncio.wait([model.loading])
        for model in self._models.values():
            await self._end(model, "the server ends")
        await asyncio.gather(*self._closing)


def _look_at(task: asyncio.Task[L]) -> None:
    """Whoever waited may have left before it failed."""
    if not task.cancelled() and task.exception() is not None:
        logger.warning("a model could not be loaded: %s", task.exception())
