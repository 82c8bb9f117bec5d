"""Putting the simulation where torch_npu would be, once a process; the profile can be exchanged."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.backend_registration as registration

from mooli_simulate_ascend import atb_attention, cache_writes, elementwise, fused_attention, grouped, quantised
from mooli_simulate_ascend.device import register_operators, simulation
from mooli_simulate_ascend.errors import SimulationError
from mooli_simulate_ascend.formats import format_of
from mooli_simulate_ascend.launch import launch
from mooli_simulate_ascend.modules import npu_module, torch_npu_module
from mooli_simulate_ascend.profiles import PROFILES, Profile
from mooli_simulate_ascend.schemas import schemas
from mooli_simulate_ascend.tasks import OPERATIONS

SIMULATED = (atb_attention, cache_writes, elementwise, fused_attention, grouped, quantised)
"""Modules that register operations."""


class Installed:
    """What must be kept alive, and what is there."""

    libraries: list[torch.library.Library]
    device: list[torch.library.Library] | None = None
    npu: types.ModuleType | None = None

    def __init__(self) -> None:
        self.libraries = []


installed = Installed()


def install(profile: str = "8.2") -> None:
    """Simulate one CANN version in this process: "8.2", "8.3" or "8.5". May be called again with another one.

    Raises SimulationError for an unknown version, or where the real torch_npu is loaded.
    """
    if profile not in PROFILES:
        raise SimulationError(f"CANN {profile!r} is not simulated: one of {', '.join(PROFILES)}")
    loaded = sys.modules.get("torch_npu")
    if loaded is not None and not getattr(loaded, "__simulated__", False):
        raise SimulationError("torch_npu is loaded: the simulation cannot be beside it")
    wanted = PROFILES[profile]
    if simulation.profile is wanted:
        return
    if installed.npu is None:
        _install_device()
    for library in installed.libraries:
        library._destroy()  # type: ignore[no-untyped-call]
    simulation.profile = wanted
    installed.libraries = _define(wanted)
    assert installed.npu is not None
    if loaded is None:
        sys.modules["torch_npu"] = torch_npu_module(installed.npu)
        sys.modules["torch_npu.npu"] = installed.npu
    sys.modules["torch_npu"].__dict__["__version__"] = wanted.torch_npu
    torch.version.cann = wanted.cann  # type: ignore[attr-defined]


def _install_device() -> None:
    module = npu_module()
    setup = getattr(registration, "_setup_privateuseone_for_python_backend", None)
    if setup is None:
        torch.npu = module  # type: ignore[attr-defined]
        sys.modules["torch.npu"] = module
    else:
        setup("npu", backend_module=module)
        installed.device = register_operators()
        simulation.has_device = True
    installed.npu = module


def has_device() -> bool:
    """Whether there is a device "npu": torch 2.13 or newer. Without, operations take CPU tensors."""
    return installed.device is not None


def is_installed() -> bool:
    return simulation.profile is not None


def profile() -> str:
    """The simulated CANN version. Raises SimulationError if none is."""
    if simulation.profile is None:
        raise SimulationError("the simulator is not installed: call install() first")
    return simulation.profile.name


def _define(wanted: Profile) -> list[torch.library.Library]:
    libraries = []
    for namespace, declarations in schemas(wanted).items():
        try:
            library = torch.library.Library(namespace, "DEF")  # type: ignore[no-untyped-call]
        except RuntimeError as exc:
            raise SimulationError(f"the namespace {namespace} is taken by a loaded extension: {exc}") from exc
        for declaration in declarations:
            library.define(declaration)  # type: ignore[no-untyped-call]
            name = declaration.split("(")[0]
            if not has_device():
                library.impl(name, _on_cpu(namespace, name), "CPU")  # type: ignore[no-untyped-call]
        libraries.append(library)
    return libraries


def _on_cpu(namespace: str, name: str) -> Callable[..., Any]:
    """An operation on CPU tensors, for a torch without the device."""
    packet, _, overload = name.partition(".")

    def call(*args: Any, **kwargs: Any) -> Any:
        if packet == "get_npu_format":
            return format_of(args[0])
        if simulation.profile is None:
            raise SimulationError(f"{name}: the simulator is not installed")
        func = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
        known = OPERATIONS[f"{packet}.{overload or 'default'}"]
        return launch(simulation.profile, known, func._schema, args, kwargs, func)[0]

    return call
