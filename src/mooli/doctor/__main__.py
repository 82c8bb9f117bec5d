"""`python -m mooli.doctor`: the same as `mooli doctor`, also where a package that other commands need is broken."""

from __future__ import annotations

import argparse
import sys

from mooli.doctor.command import add_doctor_args, run_doctor

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="mooli doctor", description="Say what this machine has and what is missing.")
    add_doctor_args(parser)
    sys.exit(run_doctor(parser.parse_args()))
