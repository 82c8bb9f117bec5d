"""Which software of an NPU is in use, and which release of CANN that is.

Owns the reading of version texts. Never imports torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Release = tuple[int, int]
"""CANN 8.2.RC1 is (8, 2)."""

OLDEST = (8, 2)
"""The oldest release whose rules are written down here."""


@dataclass(frozen=True, slots=True)
class Versions:
    """As texts, for people and as the key of what was found out about them. `soc`: such as Ascend910B3."""

    soc: str
    cann: str
    torch_npu: str
    torch: str
    mooli: str
    is_simulated: bool

    @property
    def release(self) -> Release:
        """That of CANN. Older and unknown ones count as the oldest known: its rules are the strictest."""
        return max(OLDEST, cann_release(self.cann) or OLDEST)

    @property
    def key(self) -> str:
        """One line that changes whenever any of them does."""
        kind = "SIMULATED " if self.is_simulated else ""
        return f"{kind}{self.soc}; CANN {self.cann}; torch_npu {self.torch_npu}; torch {self.torch}; mooli {self.mooli}"

    def __str__(self) -> str:
        """For banners and logs."""
        kind = "SIMULATED " if self.is_simulated else ""
        return f"{kind}{self.soc}, CANN {self.cann}, torch_npu {self.torch_npu}, torch {self.torch}"


def cann_release(text: str) -> Release | None:
    """(8, 2) of "8.2.RC1", "CANN-8.2.RC1" or "8.2.0"; None where there is no such thing."""
    found = re.search(r"(?<![0-9.])([0-9]{1,2})\.([0-9]{1,2})(?![0-9])", text)
    return (int(found[1]), int(found[2])) if found else None
