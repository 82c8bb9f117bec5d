"""A model by path or name, fetched if it is a name that is not on this machine: what the engine and the server ask.

Owns when fetching is allowed and what is said when it fails. `mooli pull` is the same without an engine.
"""

from __future__ import annotations

import threading
from pathlib import Path

from mooli.config import DEMO
from mooli.errors import DownloadError, ModelNotFoundError
from mooli.hub.local import has_weights, parse_name, resolve


def locate(model: str | Path, *, needs_weights: bool = True, stop: threading.Event | None = None) -> Path:
    """`resolve`, and where that finds nothing under a name like Qwen/Qwen2.5-7B-Instruct, `pull`.

    A path is never fetched: what exists here, begins with a dot, ~ or /, or ends like a file of weights.
    Nor is anything while MOOLI_OFFLINE or HF_HUB_OFFLINE is set. needs_weights: fetch too where only
    the rest of the model is here. `stop`, once set, ends it with `transfer.Cancelled`. Raises what `resolve` and `pull`
    raise.
    """
    name = str(model)
    try:
        path = resolve(model)
    except ModelNotFoundError as exc:
        if not _may_fetch(name):
            raise
        from mooli.hub.pull import offline_variable

        variable = offline_variable()
        if variable is not None:
            raise ModelNotFoundError(f"{name} was not fetched, because {variable} is set: {exc}") from exc
    else:
        if not needs_weights or has_weights(path) or not _may_fetch(name) or Path(name).exists():
            return path
        from mooli.hub.pull import offline_variable

        if offline_variable() is not None:
            return path  # the loader says what is missing
    return _fetch(name, stop)


async def locate_async(model: str | Path, *, needs_weights: bool = True) -> Path:
    """`locate` beside an event loop. Cancelling ends the download; what came is kept."""
    import asyncio  # here: who calls this has it, and it is a tenth of what an engine imports

    stop = threading.Event()
    try:
        return await asyncio.to_thread(locate, model, needs_weights=needs_weights, stop=stop)
    finally:
        stop.set()


def _may_fetch(name: str) -> bool:
    return (
        name != DEMO
        and parse_name(name) is not None
        and not (":" not in name and name.endswith((".gguf", ".safetensors")))
    )


def _fetch(name: str, stop: threading.Event | None) -> Path:
    from mooli.hub.pull import PullOptions, pull  # the network's modules, for those who need them

    options = PullOptions() if stop is None else PullOptions(stop=stop)
    try:
        return pull(name, options)
    except DownloadError as exc:
        raise DownloadError(
            f"{name} is not on this machine and could not be fetched: {exc}. When that is solved, `mooli pull {name}`"
            " fetches it; or give the path of its folder"
        ) from exc
