"""What the files of a GGUF model in several parts are called (`…-00001-of-00003.gguf`, as llama.cpp writes them).

Owns the names, and which of them are there. Never opens a file; whoever only fetches or lists models loads no more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mooli.errors import CheckpointError

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_MAX_PARTS = 4096


def part_names(name: str) -> tuple[str, ...]:
    """Of the file name of a part (folders before it stay), those of all parts in order; else the name alone."""
    match = _PART.fullmatch(name)
    if match is None:
        return (name,)
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count <= _MAX_PARTS:
        return (name,)
    return tuple(f"{match['stem']}-{part:05d}-of-{count:05d}.gguf" for part in range(1, count + 1))


def part_paths(path: Path) -> tuple[Path, ...]:
    """All files of the GGUF model of which `path` is one, the first part first, there or not."""
    return tuple(path.with_name(name) for name in part_names(path.name))


def missing_parts(path: Path) -> list[str]:
    """Names of the parts that are not beside `path`."""
    return [part.name for part in part_paths(path) if not part.is_file()]


def first_parts(names: Iterable[str]) -> list[str]:
    """Of names of GGUF files, one for each model: that of its first part, whether that is among them or not."""
    return list(dict.fromkeys(part_names(name)[0] for name in names))


def gguf_in_folder(folder: Path) -> Path | None:
    """The only GGUF model of a folder, its first part; None without one. CheckpointError listing them if several."""
    names = first_parts(sorted(file.name for file in folder.glob("*.gguf")))
    if len(names) > 1:
        listed = ", ".join(names[:10])
        raise CheckpointError(f"{folder} has {len(names)} GGUF files: {listed}; give the path of one of them")
    return folder / names[0] if names else None
