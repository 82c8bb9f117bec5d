"""The commands below `mooli cache`: their names, flags and help.

Owns the table of them. Imports nothing of what they run, as a command line is read before anything else is loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple


class CacheCommand(NamedTuple):
    """add_args: adds its flags to a parser. run: where the function is that runs it, as "module:name"."""

    text: str
    add_args: Callable[[argparse.ArgumentParser], object]
    run: str


def add_cache_args(parser: argparse.ArgumentParser) -> None:
    """What comes behind `mooli cache`."""
    texts = "; ".join(f"{name}: {command.text}" for name, command in CACHE_COMMANDS.items())
    parser.add_argument("kind", choices=tuple(CACHE_COMMANDS), help=texts)
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="Its own flags; --help lists them.")


def _add_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir", metavar="DIR", help="The folder, as --kv-cache-dir of a server. Default: where servers keep pages."
    )


def _add_ls_args(parser: argparse.ArgumentParser) -> None:
    _add_dir(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def _add_verify_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("namespaces", nargs="*", metavar="NAMESPACE", help="Or how one begins. Default: all.")
    _add_dir(parser)


def _add_rm_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("namespaces", nargs="*", metavar="NAMESPACE", help="Or how one begins, as `ls` has it.")
    parser.add_argument("--all", action="store_true", help="All of them.")
    parser.add_argument("-y", "--yes", action="store_true", help="Do not ask.")
    _add_dir(parser)


def _add_diff_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A.json", help="The body of a chat request, of any API; - is standard input.")
    parser.add_argument("second", metavar="B.json", help="That of a later one.")
    parser.add_argument("--model", default="demo", help="Whose template and tokenizer. Default: demo.")
    parser.add_argument("--chat-template", metavar="FILE", help="Another template. Default: the model's.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")


CACHE_COMMANDS = {
    "ls": CacheCommand("what of prompts is kept on disk", _add_ls_args, "mooli.cache.store.command:ls"),
    "verify": CacheCommand("read all of it and check it", _add_verify_args, "mooli.cache.store.command:check"),
    "rm": CacheCommand("remove it", _add_rm_args, "mooli.cache.store.command:rm"),
    "diff": CacheCommand(
        "what of one request's prompt is lost in another, and why", _add_diff_args, "mooli.cache_diff:run_diff"
    ),
}
