"""Where a model comes from: this machine's folders and caches, and the hubs that it is fetched from.

`resolve` only looks on this machine, `locate` fetches a name that is not there, and `pull` is the command's own work.
Modules are imported by whoever needs them, so that looking costs nothing of the network's libraries, and the flags of a
command nothing of what looks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mooli.hub.locate import model_digest, resolve

__all__ = ["model_digest", "resolve"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mooli.hub import locate

    return getattr(locate, name)
