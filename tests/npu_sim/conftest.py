"""The simulated device for these tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

torch = pytest.importorskip("torch")

import mooli_simulate_ascend as sim  # noqa: E402


@pytest.fixture
def cann() -> Callable[[str], None]:
    """Install a version: `cann("8.3")`."""
    return sim.install


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """CANN 8.2 on the device npu, nothing counted, results without gradients."""
    sim.install("8.2")
    if not sim.has_device():
        pytest.skip("the device npu needs torch 2.13")
    sim.operations.reset()
    torch.manual_seed(0)
    torch.npu.config.allow_internal_format = True
    with torch.no_grad():
        yield
    sim.install("8.2")
