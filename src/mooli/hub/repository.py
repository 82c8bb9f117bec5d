"""What a hub says of a model, and which of its files Mooli takes.

Owns the two records and the choice. Never uses the network and never touches a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mooli.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from mooli.formats.gguf_names import first_parts, part_names

if TYPE_CHECKING:
    from mooli.hub.locate import RepositoryName

CONFIG = "config.json"
HUGGING_FACE = "huggingface"
MODELSCOPE = "modelscope"
SOURCES = ("auto", HUGGING_FACE, MODELSCOPE)

_SAFE_PART = re.compile(r"[A-Za-z0-9_][\w.+ -]*", re.ASCII)
_TOKENIZER_TEXTS = ("vocab.txt", "merges.txt")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository. size in bytes; digest in lower-case hex, None where the hub publishes none.

    digest_kind: "sha256" of the content, or "git" for the id of a git blob (SHA-1 over a header and the content).
    """

    path: str
    size: int
    digest: str | None
    digest_kind: str
    url: str


@dataclass(frozen=True, slots=True)
class Repository:
    """A model on a hub at one commit. credentials: headers that only the hub's own host may see."""

    hub: str
    name: str
    commit: str
    files: tuple[RemoteFile, ...]
    headers: Mapping[str, str] = field(default_factory=dict)
    credentials: Mapping[str, str] = field(default_factory=dict, repr=False)


def choose_files(repository: Repository, wanted: RepositoryName) -> tuple[RemoteFile, ...]:
    """The files to fetch: weights as safetensors with tokenizer and configuration, or one GGUF file, all of its parts.

    Only the top folder is looked at, but for a GGUF file that is asked for by its path. Never pickle, never code.
    Raises ModelNotFoundError where the file asked for is not there, UnsupportedModelError where there are no weights
    that Mooli reads, CheckpointError for several GGUF files of which none was asked for, or a name that leads out of
    the folder.
    """
    for file in repository.files:
        if not _is_safe(file.path) and _is_kind_of_ours(file.path):
            raise CheckpointError(f"{repository.hub} lists a file named {file.path[:200]!r} in {wanted}: refused")
    if wanted.file is not None:
        chosen = _parts(repository, wanted.file)
        if not chosen:
            there = ", ".join(first_parts(file.path for file in _ggufs(repository.files))) or "none"
            raise ModelNotFoundError(
                f"{wanted.repository} on {repository.hub} has no file {wanted.file}; its GGUF files: {there}"
            )
        return chosen
    top = [file for file in repository.files if "/" not in file.path]
    weights = [file for file in top if file.path.endswith(".safetensors")]
    if weights:
        # Mistral's repositories hold the weights a second time, in a layout of their own.
        usual = [file for file in weights if not file.path.startswith("consolidated")]
        return tuple(usual or weights) + tuple(file for file in top if _is_text_side(file.path))
    return _only_gguf(repository, wanted)


def _parts(repository: Repository, name: str) -> tuple[RemoteFile, ...]:
    """The GGUF file of that name, with all others where it is a part of several; none if it is not there."""
    by_path = {file.path: file for file in repository.files}
    if name not in by_path:
        return ()
    names = part_names(name)
    missing = [part for part in names if part not in by_path]
    if missing:
        raise ModelNotFoundError(
            f"{repository.name} on {repository.hub} lacks {len(missing)} of the {len(names)} parts of {name},"
            f" {missing[0]} is one: ask its owner, or choose another file"
        )
    return tuple(by_path[part] for part in names)


def _only_gguf(repository: Repository, wanted: RepositoryName) -> tuple[RemoteFile, ...]:
    ggufs = _ggufs(repository.files)
    firsts = first_parts(file.path for file in ggufs)
    if len(firsts) == 1:
        return _parts(repository, ggufs[0].path)
    if ggufs:
        sizes = dict.fromkeys(firsts, 0)
        for file in ggufs:
            sizes[part_names(file.path)[0]] += file.size
        listed = ", ".join(f"{name} ({size / 1e9:.2f} GB)" for name, size in sizes.items())
        raise CheckpointError(
            f"{wanted} on {repository.hub} has several GGUF files: {listed}. Name one: {wanted}:{firsts[0]}"
        )
    pickles = [file.path for file in repository.files if file.path.endswith(_PICKLES)]
    held = f", only {pickles[0]} and the like, which Mooli never opens" if pickles else ""
    raise UnsupportedModelError(
        f"{wanted} on {repository.hub} has no safetensors and no GGUF file{held}; choose a repository that has them"
    )


def _ggufs(files: tuple[RemoteFile, ...]) -> list[RemoteFile]:
    return [file for file in files if file.path.endswith(".gguf") and "mmproj" not in file.path]


def _is_kind_of_ours(path: str) -> bool:
    return path.endswith((".safetensors", ".gguf")) or _is_text_side(path.rsplit("/", 1)[-1])


def _is_text_side(name: str) -> bool:
    if name.endswith(".json"):
        return not name.endswith(".bin.index.json")
    return name.endswith((".model", ".jinja", ".tiktoken")) or name in _TOKENIZER_TEXTS


def _is_safe(path: str) -> bool:
    return ".." not in path and all(_SAFE_PART.fullmatch(part) for part in path.split("/"))
