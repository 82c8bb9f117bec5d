"""Facts that say what a number was measured on.

Owns reading them from this machine and out of what a server tells of itself. What is not known
is absent, never guessed.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mooli.version import __version__

_TELLING_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)

_ENGINE_KEYS = (
    "version",
    "model_path",
    "architecture",
    "device",
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "page_size",
    "context_length",
    "max_total_num_tokens",
    "max_running_requests",
    "tp_size",
)


def client_machine() -> dict[str, Any]:
    """This machine: cpu (name), cores, flags (of those that matter for kernels), system, python, mooli."""
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "mooli": __version__,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    fields = _cpu_fields()
    name = fields.get("model name") or platform.processor()
    if name:
        facts["cpu"] = name
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    if flags:
        facts["flags"] = [flag for flag in _TELLING_FLAGS if flag in flags]
    return facts


def engine_facts(server_info: Mapping[str, Any]) -> dict[str, Any]:
    """The telling ones of what /server_info says; a fact may stand at the top or in the first engine's state."""
    states = server_info.get("internal_states")
    state = states[0] if isinstance(states, list) and states and isinstance(states[0], Mapping) else {}
    facts: dict[str, Any] = {}
    for key in _ENGINE_KEYS:
        value = server_info.get(key)
        if value is None:
            value = state.get(key)
        if isinstance(value, (str, int, float)):
            facts[key] = value
    backend = server_info.get("backend")
    if isinstance(backend, Mapping):
        words = [f"{key} {backend[key]}" for key in ("library", "device", "isa", "num_threads") if backend.get(key)]
        if words:
            facts["backend"] = ", ".join(words)
    return facts


def _cpu_fields() -> dict[str, str]:
    """The first processor's entries of Linux's list; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
