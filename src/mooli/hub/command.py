"""`mooli pull`: fetch a model, with progress, unless all of it is there.

Owns the flags and what is printed: the model's folder on standard output, for scripts, everything else on standard
error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mooli.entry import INTERRUPTED, Interruptible
from mooli.hub.repository import SOURCES


def add_pull_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("model", metavar="MODEL", help="Name, as Qwen/Qwen2.5-7B-Instruct or owner/name:file.gguf.")
    parser.add_argument(
        "--source",
        choices=SOURCES,
        default="auto",
        help="Hub. auto: Hugging Face, then ModelScope; MOOLI_HUB=modelscope turns that round. Default: %(default)s.",
    )
    parser.add_argument(
        "--dir", metavar="DIR", help="Folder for the files; default: the hub's own cache, where names are looked for."
    )
    parser.add_argument("--revision", metavar="R", help="Branch, tag or commit; default: the hub's.")


def run_pull(args: argparse.Namespace) -> int:
    """Run the command and return its exit status. Raises a ModelError or a ConfigError."""
    from mooli.hub.pull import PullOptions, pull  # the network's modules, for this command alone

    folder = None if args.dir is None else Path(args.dir).expanduser()
    options = PullOptions(source=args.source, folder=folder, revision=args.revision, say=_say)
    try:
        with Interruptible():
            path = pull(args.model, options)
    except KeyboardInterrupt:
        _say("interrupted; what came is kept, and the same command goes on from there")
        return INTERRUPTED
    print(path)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
