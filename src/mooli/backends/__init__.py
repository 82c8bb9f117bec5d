"""Which backends there are, and how one is made.

Owns the names users write and the lazy import behind each. Never falls back to another backend than the one asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

from mooli.backends.base import Backend
from mooli.config import ABILITIES
from mooli.errors import BackendUnavailableError, ConfigError

BACKENDS: dict[str, tuple[str, str]] = {
    "cpu": ("mooli.backends.cpu", "CpuBackend"),
    "reference": ("mooli.backends.reference", "ReferenceBackend"),
    "torch": ("mooli.backends.torch", "TorchBackend"),
    "cuda": ("mooli.backends.torch", "CudaBackend"),
    "ascend": ("mooli.backends.ascend", "open_backend"),
}
"""Name to (module, what makes a backend there). A module is imported only when its backend is asked for."""

INSTALL: dict[str, str] = {
    "torch": "pip install mooli[torch]",
    "cuda": "pip install mooli[torch], with a build of torch for CUDA",
}
"""How to install what a backend needs and the core does not bring."""


def create_backend(
    name: str,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    num_threads: int | None = None,
    rank: int = 0,
) -> Backend:
    """A new backend, with nothing loaded.

    dtype: type of the computation ("auto" leaves it to the backend). quantization: None, "int8" or "int4".
    num_threads: None lets the backend count the cores it may use. rank: of the processes that compute one model
    (`mooli.backends.parallel`), each on its own device.

    Raises BackendUnavailableError if the backend is not part of this installation or its native part does not load,
    ConfigError for an unknown name or for settings the backend cannot honour.
    """
    if name not in BACKENDS:
        raise ConfigError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    module_name, maker_name = BACKENDS[name]
    try:
        module = importlib.import_module(module_name)
        make = getattr(module, maker_name)
    except (ImportError, AttributeError, OSError, RuntimeError) as exc:
        # torch raises the last two for shared libraries and device extensions that do not load.
        if name in INSTALL:
            raise BackendUnavailableError(
                f"backend {name!r} does not load: {exc}. It needs torch: {INSTALL[name]}."
            ) from exc
        raise BackendUnavailableError(
            f"backend {name!r} does not load: {exc}. Reinstall mooli (pip install --force-reinstall mooli), "
            "or choose backend 'reference', which is slow but needs no native module."
        ) from exc
    settings: dict[str, Any] = {"dtype": dtype, "quantization": quantization, "num_threads": num_threads}
    if rank:
        if not ABILITIES[name].has_ranks:
            parallel = ", ".join(other for other, ability in ABILITIES.items() if ability.has_ranks)
            raise ConfigError(f"backend {name!r} computes in one process: use tp_size=1, or one of {parallel}")
        settings["rank"] = rank
    backend: Backend = make(**settings)
    return backend
