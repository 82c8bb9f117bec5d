"""`mooli cache ls`, `verify` and `rm`: what of prompts is kept on disk, whether it is right, and away with it.

Owns what is printed and asked. What is there says `mooli.cache.store.inspection`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mooli.cache.store.folder import default_folder
from mooli.cache.store.inspection import KeptPages, kept_pages, remove, verify
from mooli.errors import StoreError


def ls(args: argparse.Namespace) -> int:
    """What is kept, by namespace: a model with all that decides its pages."""
    kept = kept_pages(_folder(args))
    if args.json:
        print(json.dumps([asdict(one) for one in kept], indent=2))
        return 0
    rows = [_row(one) for one in kept]
    heads = ("NAMESPACE", "MODEL", "KEPT", "SIZE", "CHANGED", "")
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    for row in [heads, *rows]:
        print("  ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=True)).rstrip())
    total = sum(one.num_bytes for one in kept)
    print(f"{total:,} bytes in {_folder(args)}", file=sys.stderr)
    return 0


def check(args: argparse.Namespace) -> int:
    """Read every page. Exit status 1 where one is not what was written."""
    folder = _folder(args)
    num_wrong = 0
    for name in args.namespaces or [one.name for one in kept_pages(folder)]:
        verdict = verify(folder, name)
        num_wrong += verdict.num_wrong
        words = f"{verdict.num_pages:,} {verdict.kind} are right"
        if verdict.num_wrong:
            words += f", {verdict.num_wrong:,} are not (the first in {verdict.where}): these are computed again"
        print(f"{name}: {words}")
    return 1 if num_wrong else 0


def rm(args: argparse.Namespace) -> int:
    """Remove namespaces, one after the other."""
    folder = _folder(args)
    if bool(args.namespaces) == args.all:
        raise StoreError("say what to remove: namespaces as `mooli cache ls` has them, or --all")
    kept = kept_pages(folder)
    gone: set[str] = set()
    for name in args.namespaces or [one.name for one in kept]:
        if name in gone:
            continue
        if not args.yes and not _agrees(name, folder):
            print(f"{name} stays.", file=sys.stderr)
            continue
        beside = [one.name for one in kept if one.states_of is not None and one.states_of.startswith(name)]
        for each in [name, *beside]:  # states are of no use without their pages
            print(f"{each} is removed: {remove(folder, each):,} bytes", file=sys.stderr)
        gone.update(beside)
    return 0


def _folder(args: argparse.Namespace) -> Path:
    return Path(args.dir) if args.dir else default_folder()


def _row(one: KeptPages) -> Sequence[str]:
    changed = "" if one.changed is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(one.changed))
    state = f"process {one.writer} writes" if one.writer is not None else ""
    kind = "pages" if one.states_of is None else "states"
    return one.name[:12], one.model[:40], f"{one.num_pages:,} {kind}", f"{one.num_bytes / 1e6:,.1f} MB", changed, state


def _agrees(name: str, folder: Path) -> bool:
    if sys.stdin is None or not sys.stdin.isatty():
        raise StoreError(f"remove {name} from {folder}? Say so with --yes")
    try:
        print(f"Remove {name} from {folder}? [y/N] ", end="", file=sys.stderr)
        sys.stderr.flush()
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        return False
