"""Mooli on a Ray cluster: replicas of a server as one Ray Serve application, `serve run mooli.ray:app model_path=demo`,
and a model over the rows of a dataset, `mooli.ray.batch`.

Owns what is imported from here: `app`, the builder, and `batch`. Everything else of Mooli works without this package,
which needs the extra `mooli[ray]`; nothing in it imports `ray.serve.llm`. What is asked for is imported then, and not
before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application

    from mooli.ray.dataset import batch as batch


def app(arguments: dict[str, Any]) -> Application:
    """A Serve application of the models that `arguments` name (`mooli.ray.config.read_arguments`).

    Raises ConfigError for arguments that cannot be used.
    """
    from mooli.ray.application import build

    return build(arguments)


def __getattr__(name: str) -> Any:
    if name == "batch":
        from mooli.ray.dataset import batch

        return batch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
