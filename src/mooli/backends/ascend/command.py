"""What `mooli selftest` does, and its exit status.

Importing it imports no torch.
"""

from __future__ import annotations

import argparse


def run_selftest_command(args: argparse.Namespace) -> int:
    """Test every operation on the device and print the table: 0 if all agree with plain torch, else 1."""
    from mooli.backends.ascend.bring_up import load_torch

    load_torch()
    from mooli.backends.ascend.selftest_report import selftest_lines

    lines, agrees = selftest_lines()
    print("\n".join(lines))
    return 0 if agrees else 1
