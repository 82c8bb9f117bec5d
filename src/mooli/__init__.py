"""Mooli: an LLM inference engine that keeps its KV cache in a radix tree.

Owns the public names, and loads what is behind a name only when it is used, so that `import mooli` is quick and
`import mooli as sgl` works in scripts written for SGLang.
"""

# No `from __future__` and no `typing` here: both are files, and with `python -m mooli` this module runs while the
# current folder, which may have them too, still comes before all others. `mooli.entry` leaves it.
import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from mooli.config import EngineConfig
    from mooli.frontend.engine import Engine
    from mooli.version import __version__

__all__ = [
    "BackendUnavailableError",
    "ChatTemplateError",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "EngineDeadError",
    "EngineError",
    "ModelError",
    "ModelNotFoundError",
    "MooliError",
    "OutOfMemoryError",
    "PromptError",
    "RequestError",
    "RequestFailedError",
    "SamplingParamsError",
    "TokenizerError",
    "UnknownArgumentError",
    "UnknownSamplingParamError",
    "UnsupportedModelError",
    "__version__",
]  # fmt: skip

_MODULES = {"Engine": "mooli.frontend.engine", "EngineConfig": "mooli.config", "__version__": "mooli.version"}
"""Where a name comes from; the others are errors."""


def __getattr__(name: str) -> "Any":
    """Import the module that owns `name` and remember the result (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES.get(name, "mooli.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
