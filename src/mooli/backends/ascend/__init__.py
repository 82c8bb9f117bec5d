"""Ascend NPUs (Atlas 800T A2, 910B) through PyTorch and torch_npu, for CANN 8.2 and newer. Not tried on hardware.

Owns the one entry, `open_backend`. Importing this package imports neither torch nor torch_npu: with torch_npu installed
and CANN not, `import torch` itself fails, and that has to become an error that says so.

Written from the vendor's operation schemas and documents and from what other engines ship; proven on a simulated device
(MOOLI_SIMULATE_ASCEND=1; its package is the repository's `simulate/`), whose checks are those of the documents. On its
first start on a machine the backend compares every operation it would use with plain torch (`selftest.py`), and uses
what agrees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mooli.backends.ascend.backend import AscendBackend


def open_backend(
    dtype: str = "auto", quantization: str | None = None, num_threads: int | None = None, rank: int = 0
) -> AscendBackend:
    """The backend on the current NPU, or that of a rank beyond the first, with whatever the self-test found unfit
    switched off.

    Raises BackendUnavailableError for what is not installed or not there, with cause and cure; ConfigError for settings
    that an NPU cannot honour.
    """
    from mooli.backends.ascend.bring_up import load_torch

    load_torch()
    from mooli.backends.ascend.backend import AscendBackend
    from mooli.backends.ascend.bring_up import open_npu
    from mooli.backends.ascend.selftest_record import settle

    npu = open_npu(rank)
    return AscendBackend(npu, settle(npu), dtype=dtype, quantization=quantization, num_threads=num_threads, rank=rank)
