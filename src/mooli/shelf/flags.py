"""The flags of `mooli list`, `show`, `rm`, `ps`, `stop` and `completion`.

Owns their names and help. Imports nothing, as a command line is read before anything else is loaded.
"""

from __future__ import annotations

import argparse


def add_list_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--available", action="store_true", help="The short names, whether their models are here or not."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def add_show_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="A model that is here: a name, a short one, a folder or a file.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def add_rm_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="As `mooli list` has it.")
    parser.add_argument("-y", "--yes", action="store_true", help="Do not ask.")


def add_ps_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def add_stop_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "server", nargs="?", metavar="MODEL|PID|URL", help="Of `mooli ps`; not needed where one server runs."
    )
    parser.add_argument("--all", action="store_true", help="All of them.")
    parser.add_argument(
        "--wait", type=float, default=60.0, metavar="S", help="For answers that are under way. Default: %(default)s s."
    )


def add_completion_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="Which shell: print what it must be told.")


def add_candidates_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("typed", nargs=argparse.REMAINDER, metavar="WORD", help="What is typed so far.")
