"""The error of every check the simulator makes."""

from __future__ import annotations


class SimulationError(RuntimeError):
    """What a real device would refuse, or get wrong without a word. A RuntimeError, as torch_npu raises."""


class NotSimulatedError(SimulationError):
    """A call that may be right on a device, but that the simulator knows nothing about."""


def check(condition: bool, operation: str, message: str) -> None:
    """Raise SimulationError unless `condition` holds."""
    if not condition:
        raise SimulationError(f"{operation}: {message}")


def check_simulated(condition: bool, operation: str, what: str) -> None:
    """Raise NotSimulatedError unless `condition` holds."""
    if not condition:
        raise NotSimulatedError(f"{operation}: {what} is not simulated")
