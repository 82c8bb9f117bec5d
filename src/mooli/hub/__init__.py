"""Where a model comes from: this machine's folders and caches, and the hubs that it is fetched from.

`resolve` only looks on this machine. `locate` fetches a name that is not there, and `pull` is the command's own work;
their modules are imported by whoever needs them, so that looking costs nothing of the network's libraries.
"""

from mooli.hub.local import DEMO, model_digest, resolve

__all__ = ["DEMO", "model_digest", "resolve"]
