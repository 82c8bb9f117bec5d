"""The command line of `mooli selftest`: its flags and exit status.

Importing it imports no torch.
"""

from __future__ import annotations

import argparse


def add_selftest_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        "--backend",
        default="npu",
        choices=("npu", "ascend"),
        help="Which device: only NPUs have operations that are tested at first use. Default: %(default)s.",
    )


def run_selftest_command(args: argparse.Namespace) -> int:
    """Test every operation on the device and print the table: 0 if all agree with plain torch, else 1."""
    from mooli.backends.ascend.bring_up import load_torch

    load_torch()
    from mooli.backends.ascend.selftest_report import selftest_lines

    lines, agrees = selftest_lines()
    print("\n".join(lines))
    return 0 if agrees else 1
