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
    from mooli.lang.backends import flush_cache, get_server_info, set_default_backend
    from mooli.lang.choices import (
        greedy_token_selection,
        token_length_normalized,
        unconditional_likelihood_normalized,
    )
    from mooli.lang.endpoint import Runtime, RuntimeEndpoint
    from mooli.lang.expressions import (
        assistant,
        assistant_begin,
        assistant_end,
        gen,
        gen_int,
        gen_string,
        image,
        select,
        separate_reasoning,
        system,
        system_begin,
        system_end,
        user,
        user_begin,
        user_end,
        video,
    )
    from mooli.lang.program import function
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
    "ProgramError",
    "PromptError",
    "RequestError",
    "RequestFailedError",
    "Runtime",
    "RuntimeEndpoint",
    "SamplingParamsError",
    "TokenizerError",
    "UnknownArgumentError",
    "UnknownSamplingParamError",
    "UnsupportedModelError",
    "__version__",
    "assistant",
    "assistant_begin",
    "assistant_end",
    "flush_cache",
    "function",
    "gen",
    "gen_int",
    "gen_string",
    "get_server_info",
    "greedy_token_selection",
    "image",
    "select",
    "separate_reasoning",
    "set_default_backend",
    "system",
    "system_begin",
    "system_end",
    "token_length_normalized",
    "unconditional_likelihood_normalized",
    "user",
    "user_begin",
    "user_end",
    "video",
]  # fmt: skip

_LANGUAGE = {
    "mooli.lang.expressions": (
        "gen gen_int gen_string select system user assistant system_begin system_end user_begin user_end"
        " assistant_begin assistant_end image video separate_reasoning"
    ),
    "mooli.lang.choices": "token_length_normalized greedy_token_selection unconditional_likelihood_normalized",
    "mooli.lang.program": "function",
    "mooli.lang.backends": "set_default_backend flush_cache get_server_info",
    "mooli.lang.endpoint": "Runtime RuntimeEndpoint",
}

_MODULES = {
    "Engine": "mooli.frontend.engine",
    "EngineConfig": "mooli.config",
    "__version__": "mooli.version",
    **{name: module for module, names in _LANGUAGE.items() for name in names.split()},
}
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
