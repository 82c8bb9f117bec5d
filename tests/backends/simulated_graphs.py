"""A graph recorder on the CPU: what a device graph does, seen from outside.

Recording runs the function and writes down every operation with its tensors; a replay carries out the same operations
on the same memory, and nothing of the function's Python. What the host decided while recording is frozen, as on a
device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mooli.backends.torch.graphed_backend import GraphedBackend
from mooli.backends.torch.graphs import GraphRecorder

READS_DEVICE = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"}
"""Operations whose result decides something on the host, which a graph cannot hold."""


class Tape(TorchDispatchMode):
    """Writes down operations as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in READS_DEVICE:
            raise RuntimeError(f"{func} waits for the device: not possible while capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class SimulatedRun:
    def __init__(self, calls: list[tuple[Any, Any, Any, Any]], output: Tensor, replays: list[int]) -> None:
        self._calls, self.output, self._replays = calls, output, replays

    def replay(self) -> None:
        self._replays.append(len(self.output))
        with torch.no_grad():
            for func, args, kwargs, recorded in self._calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_flatten(recorded)[0], tree_flatten(again)[0], strict=True):
                    # Views and changes in place are where they were.
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class SimulatedRecorder:
    """replays: rows of each replay. `fails`: recording is not possible."""

    def __init__(self, *, fails: bool = False) -> None:
        self.replays: list[int] = []
        self.num_recorded = 0
        self._fails = fails

    def record(self, run: Callable[[], Tensor]) -> SimulatedRun:
        if self._fails:
            raise RuntimeError("no memory for a graph")
        run()
        tape = Tape()
        with tape:
            output = run()
        self.num_recorded += 1
        return SimulatedRun(tape.calls, output, self.replays)

    def upload_into(self, target: Tensor, values: NDArray[np.int64]) -> None:
        target.copy_(torch.from_numpy(values))


class SimulatedGraphBackend(GraphedBackend):
    """The torch backend on the CPU with every decode step captured."""

    def __init__(self, *, fails: bool = False, **settings: Any) -> None:
        self.recorder = SimulatedRecorder(fails=fails)
        super().__init__(**settings)

    def make_recorder(self) -> GraphRecorder:
        return self.recorder
