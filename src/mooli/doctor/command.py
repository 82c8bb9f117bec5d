"""The command line of `mooli doctor`: its flags, what is printed, the exit status."""

from __future__ import annotations

import argparse
from pathlib import Path

from mooli.arguments import add_model_word, model_word
from mooli.entry import Interruptible

BACKENDS = {
    "cpu": "cpu",
    "torch": "torch",
    "cuda": "cuda",
    "gpu": "cuda",
    "ascend": "ascend",
    "npu": "ascend",
}  # fmt: skip
"""Names as users write them for --backend elsewhere, to those that findings carry."""


def add_doctor_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        "--device",
        default="cpu",
        choices=tuple(BACKENDS),
        help="What is to work; its problems make the exit status 1. Default: %(default)s.",
    )
    add_model_word(parser, "--model-path")
    parser.add_argument(
        "--model-path", "--model", help="Model folder, GGUF file or model name to check as well: files, types, memory."
    )
    parser.add_argument("--log", type=Path, help="File with an engine's or server's output to search for failures.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def run_doctor(args: argparse.Namespace) -> int:
    """Print the report; 0 if nothing stands in the way of the CPU and of the backend asked for, else 1."""
    from mooli.doctor.examination import examine  # here, as --help needs nothing of it
    from mooli.doctor.findings import report_json, report_table
    from mooli.doctor.surroundings import Surroundings

    model = model_word(args, "--model-path", args.model_path)
    with Interruptible():  # as what runs in other processes must be ended
        report = examine(Surroundings(), backend=BACKENDS[args.backend], model_path=model, log=args.log)
    print(report_json(report) if args.json else report_table(report))
    return report.exit_status
