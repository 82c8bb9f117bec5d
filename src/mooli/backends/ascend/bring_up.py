"""From nothing to an NPU that computes: torch, torch_npu, the libraries of CANN, the device; or the simulator.

Owns the order, and the words for what is missing. Never falls back to another device. Not tried on hardware.

Sources of causes and cures: what torch_npu's own loader says, and reports of its users (vllm-ascend, SGLang).
"""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mooli.backends.ascend.versions import Versions
from mooli.errors import BackendUnavailableError, ConfigError
from mooli.version import __version__

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SIMULATE_SWITCH = "MOOLI_SIMULATE_ASCEND"
"""Environment variable: 1 simulates a device with CANN 8.2, a version (8.2, 8.3, 8.5) one with that CANN."""

SIMULATOR = "mooli_simulate_ascend"
"""The package that simulates. It is no part of Mooli's: `simulate/` of the repository has it."""

PROFILES = {"1": "8.2", "8.2": "8.2", "8.3": "8.3", "8.5": "8.5"}

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"

SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"

CAUSES: tuple[tuple[str, str], ...] = (
    ("libascend_hal.so", "the NPU driver's libraries are not visible: mount /usr/local/Ascend/driver into the"
     " container, and check npu-smi info"),
    ("libatb.so", "NNAL is not installed, or not in use: install Ascend-cann-nnal of the toolkit's version, then"
     " source /usr/local/Ascend/nnal/atb/set_env.sh"),
    ("nnal", "NNAL is not installed, or not in use: install Ascend-cann-nnal of the toolkit's version, then"
     " source /usr/local/Ascend/nnal/atb/set_env.sh"),
    ("undefined symbol", "CANN, NNAL and torch_npu are not of the same release: CANN 8.2 goes with torch 2.6.0 and"
     " torch_npu 2.6.0"),
    ("libhccl.so", f"CANN is not installed, or not in use: {SET_ENV}"),
    ("libascendcl.so", f"CANN's runtime is not installed, or not in use: {SET_ENV}"),
    ("libacl_op_compiler.so", f"CANN is not installed, or not in use: {SET_ENV}"),
    ("libge_runner.so", f"CANN is not installed, or not in use: {SET_ENV}"),
    ("libgraph.so", f"CANN is not installed, or not in use: {SET_ENV}"),
    ("ASCEND_HOME_PATH", f"ASCEND_HOME_PATH names no installation of CANN: {SET_ENV}"),
    ("ASCEND_OPP_PATH", f"CANN's operations are not in use: {SET_ENV}"),
    ("Two accelerators", "this build of torch is for another accelerator: install torch's build for the CPU"),
    ("500001", "parts of CANN are missing or of another version: install the kernels package of this chip, and the"
     " Python packages that CANN needs (attrs, decorator, sympy, cffi, pyyaml, psutil, scipy)"),
    ("507008", "the device cannot be used from here: check the driver, and in a container its device files"
     " (/dev/davinci*)"),
)  # fmt: skip
"""Part of an error's text, and what it means and what helps."""


@dataclass(frozen=True, slots=True)
class Npu:
    """An open device. api: `torch.npu`. index: its number among those that this process sees."""

    device: torch.device
    versions: Versions
    api: Any
    index: int = 0

    @property
    def is_simulated(self) -> bool:
        return self.versions.is_simulated


def explain(error: BaseException) -> str:
    """The cause of an error of torch_npu and its cure, as far as they are known."""
    text = str(error)
    for part, meaning in CAUSES:
        if part.lower() in text.lower():
            return meaning
    return "run `mooli doctor` for the state of driver, CANN and torch_npu"


def load_torch() -> None:
    """Import torch without torch_npu, which torch would load by itself and which fails where CANN is missing.

    Raises BackendUnavailableError.
    """
    before = os.environ.get(AUTOLOAD)
    os.environ[AUTOLOAD] = "0"
    try:
        importlib.import_module("torch")
    except (ImportError, OSError, RuntimeError) as exc:
        raise BackendUnavailableError(
            f"backend 'ascend' needs torch, which does not load: {_first_line(exc)}. For CANN 8.2:"
            " pip install torch==2.6.0 torch_npu==2.6.0, torch in its build for the CPU."
        ) from exc
    finally:
        if before is None:
            del os.environ[AUTOLOAD]
        else:
            os.environ[AUTOLOAD] = before


def open_npu(rank: int = 0) -> Npu:
    """The current device, that of a rank beyond the first, or the simulated one if SIMULATE_SWITCH asks for it: every
    rank has a simulated one of its own. `load_torch` comes first.

    Raises BackendUnavailableError, and ConfigError for a switch with another value.
    """
    profile = simulated_profile()
    if profile is not None:
        return _simulated(profile)
    try:
        torch_npu = importlib.import_module("torch_npu")
    except ModuleNotFoundError as exc:
        raise _unavailable(
            f"torch_npu does not import: {_first_line(exc)}",
            "install torch_npu in the version of torch that CANN asks for (CANN 8.2: torch==2.6.0 torch_npu==2.6.0)",
            exc,
        ) from exc
    except Exception as exc:  # torch_npu raises plain Exception for variables it misses
        raise _unavailable(f"torch_npu does not load: {_first_line(exc)}", explain(exc), exc) from exc
    if getattr(torch_npu, "__simulated__", False):
        raise BackendUnavailableError(
            f"backend 'ascend': the torch_npu of this process is the simulated one, and {SIMULATE_SWITCH} is no longer"
            f" set. Start a new process, or set {SIMULATE_SWITCH}=1."
        )
    return _opened(torch_npu, rank)


def simulated_profile() -> str | None:
    """The CANN version to simulate; None for real hardware."""
    given = os.environ.get(SIMULATE_SWITCH, "")
    if given in ("", "0"):
        return None
    if given not in PROFILES:
        raise ConfigError(f"{SIMULATE_SWITCH}={given} is not 0, 1 or a version of CANN: 8.2, 8.3, 8.5")
    return PROFILES[given]


def _opened(torch_npu: Any, rank: int) -> Npu:
    import torch

    api = torch_npu.npu
    try:
        if not api.is_available():
            raise BackendUnavailableError(
                "backend 'ascend' finds no NPU: check npu-smi info, ASCEND_RT_VISIBLE_DEVICES, and in a container"
                " /dev/davinci*, /dev/davinci_manager, /dev/devmm_svm and /dev/hisi_hdc. MOOLI_SIMULATE_ASCEND=1 tries"
                " the backend without one."
            )
        index = rank or int(api.current_device())
        if rank and rank >= api.device_count():
            raise BackendUnavailableError(
                f"backend 'ascend': rank {rank} has no NPU, this process sees {api.device_count()}: lower tp_size, or"
                " check ASCEND_RT_VISIBLE_DEVICES and npu-smi info"
            )
        _set_up(api, index)
        # The library of NNAL is loaded at the first use otherwise, which would be in the middle of a request.
        torch_npu.op_plugin.atb._atb_ops._register_atb_extensions()
        soc = str(api.get_device_name(index))
    except BackendUnavailableError:
        raise
    except Exception as exc:
        raise _unavailable(f"the NPU does not start: {_first_line(exc)}", explain(exc), exc) from exc
    versions = Versions(soc, _cann(torch_npu), str(torch_npu.__version__), torch.__version__, __version__, False)
    return Npu(torch.device("npu"), versions, api, index)


def _simulated(profile: str) -> Npu:
    import torch

    try:
        sim = importlib.import_module(SIMULATOR)
    except ImportError as exc:
        raise BackendUnavailableError(
            f"{SIMULATE_SWITCH} is set, and the simulator does not import: {_first_line(exc)}. It is not part of mooli:"
            " install it from a clone of Mooli's repository, pip install ./simulate"
        ) from exc
    try:
        sim.install(profile)
    except sim.SimulationError as exc:
        raise BackendUnavailableError(f"{SIMULATE_SWITCH} is set, and the simulation does not start: {exc}") from exc
    torch_npu = importlib.import_module("torch_npu")
    api = torch_npu.npu
    _set_up(api, 0)
    soc = str(api.get_device_name(0))
    versions = Versions(soc, _cann(torch_npu), str(torch_npu.__version__), torch.__version__, __version__, True)
    logger.warning("%s: a SIMULATED device on the CPU. Its answers are right and its speed means nothing.", versions)
    return Npu(torch.device("npu" if sim.has_device() else "cpu"), versions, api)


def _set_up(api: Any, index: int) -> None:
    api.set_device(index)
    # Kernels that are compiled at first use cost minutes; formats of the device's own are needed for int8 weights.
    api.set_compile_mode(jit_compile=False)
    api.config.allow_internal_format = True


def _cann(torch_npu: Any) -> str:
    """The version of CANN in use, as torch_npu read it; "unknown" where it could not."""
    import torch

    found = getattr(torch.version, "cann", None)
    if not found:
        try:
            found = torch_npu.npu.utils.get_cann_version("CANN")
        except Exception as exc:  # absent in some releases, and of no consequence beyond this text
            logger.debug("the version of CANN cannot be read: %s", exc)
    return str(found or "unknown")


def _unavailable(what: str, cure: str, exc: BaseException) -> BackendUnavailableError:
    return BackendUnavailableError(f"backend 'ascend': {what}. {cure[:1].upper()}{cure[1:]}.")


def _first_line(exc: BaseException) -> str:
    text = str(exc).strip() or type(exc).__name__
    cause = exc.__cause__
    first = text.splitlines()[0]
    return f"{first} ({str(cause).splitlines()[0]})" if cause is not None and str(cause) else first
