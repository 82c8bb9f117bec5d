"""What the host does for a step: operations started, copies between host and device, graphs replayed.

Owns the count. It sees what passes torch's dispatcher, on hardware as on the simulated device, and says nothing of
time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = ("aten::_to_copy", "aten::copy_")


@dataclass(slots=True)
class HostWork:
    """operations: started on the device, views and copies from and to the host not counted. by_name: which."""

    operations: int = 0
    to_device: int = 0
    to_host: int = 0
    replays: int = 0
    by_name: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return (
            f"{_count(self.replays, 'graph replay')}, {_count(self.operations, 'operation')},"
            f" {_count(self.to_device, 'copy', 'copies')} to the device, {_count(self.to_host, 'copy', 'copies')} back"
        )


class HostWorkCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts into `work` while it is entered. Replays do not pass the dispatcher: who replays adds them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = HostWork()
        self._kind = device.type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        places = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        targets = {x.device.type for x in tree_leaves(result) if isinstance(x, Tensor)}
        if name == "aten::copy_":
            source = args[1].device.type
            places, targets = {source}, {args[0].device.type}
        if self._kind not in places | targets or _is_view(func):
            return result
        if name == "aten::_local_scalar_dense" or (name in COPIES and self._kind not in targets):
            self.work.to_host += 1
        elif name in COPIES and self._kind not in places:
            self.work.to_device += 1
        else:
            self.work.operations += 1
            self.work.by_name[name] += 1
        return result


def _is_view(func: Any) -> bool:
    """The result shares memory with an argument, and nothing is written."""
    aliases = [item.alias_info for item in func._schema.returns if item.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
