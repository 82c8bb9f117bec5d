"""Calls that are right but for one argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import mooli_simulate_ascend as sim


def refused(call: Callable[..., Any], right: dict[str, Any], wrong: dict[str, Any], message: str) -> None:
    """The right call passes, and the one with `wrong` arguments does not, for the reason in `message`."""
    call(**right)
    with pytest.raises(sim.SimulationError, match=message):
        call(**{**right, **wrong})
