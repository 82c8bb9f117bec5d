"""Fetching a model: which hub, which files, where to, and that all of it is there at the end.

Owns the order of the work and what is said about it: one line that changes on a terminal, a line now and then
elsewhere. The parts are in `hubs`, `repository`, `destination` and `transfer`. Never loads a model.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from mooli.errors import CheckpointError, ConfigError, DownloadError, ModelError, ModelNotFoundError
from mooli.formats.gguf_names import gguf_in_folder, missing_parts, part_paths
from mooli.hub.destination import (
    LOCK,
    STAGING,
    Destination,
    HuggingFaceCache,
    PlainFolder,
    check_space,
    is_complete,
    lock,
    staged_name,
)
from mooli.hub.hubs import ask_hugging_face, ask_modelscope
from mooli.hub.locate import (
    RepositoryName,
    has_weights,
    hugging_face_folders,
    hugging_face_repository,
    missing_shards,
    modelscope_folder,
    modelscope_folders,
    parse_name,
)
from mooli.hub.repository import CONFIG, HUGGING_FACE, MODELSCOPE, SOURCES, RemoteFile, Repository, choose_files
from mooli.hub.short_names import expand
from mooli.hub.transfer import Cancelled, Transfer, TransferPolicy

_HUBS = {HUGGING_FACE: ask_hugging_face, MODELSCOPE: ask_modelscope}
_AUTO_TIMEOUT_S = 8.0
_CONNECTIONS = 4
_POLL_S = 0.2
_JOIN_S = 0.5
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]*", re.ASCII)
_TRUE = ("1", "true", "yes", "on")

logger = logging.getLogger(__name__)


def offline_variable() -> str | None:
    """The environment variable that forbids the network, None where nothing does."""
    for name in ("MOOLI_OFFLINE", "HF_HUB_OFFLINE"):
        if os.environ.get(name, "").strip().lower() in _TRUE:
            return name
    return None


@dataclass(slots=True)
class PullOptions:
    """source: one of SOURCES. folder: where the files go; None: the hub's own cache. say: told each line for people."""

    source: str = "auto"
    folder: Path | None = None
    revision: str | None = None
    say: Callable[[str], None] = logger.warning
    stop: threading.Event = field(default_factory=threading.Event)
    policy: TransferPolicy = field(default_factory=TransferPolicy)


def pull(model: str, options: PullOptions | None = None) -> Path:
    """Fetch `model`, owner/name or owner/name:file.gguf, unless all of it is there; its folder or GGUF file.

    Interrupted, it keeps what it has, and the next call goes on from there. Raises ConfigError for what cannot be a
    name, a source or a revision, ModelNotFoundError, DownloadError, CheckpointError or UnsupportedModelError, all with
    what to do, and Cancelled once `stop` is set.
    """
    options = options or PullOptions()
    wanted = parse_name(expand(model))
    if wanted is None:
        raise ConfigError(
            f"{model[:200]!r} is not a name on a hub, like Qwen/Qwen2.5-7B-Instruct or owner/name:file.gguf, nor a"
            " short one of `mooli list --available`"
        )
    if options.source not in SOURCES:
        raise ConfigError(f"source={options.source!r} must be one of {', '.join(SOURCES)}")
    revision = options.revision
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ConfigError(f"revision={revision[:200]!r} is not a branch, tag or commit")
    there = find_complete(wanted, options)
    if there is not None:
        options.say(f"{wanted} is complete in {there}: nothing to fetch")
        return there
    variable = offline_variable()
    if variable is not None:
        raise DownloadError(
            f"{wanted} is not complete on this machine and {variable} forbids the network: unset it, or copy the"
            " model's folder here and give its path"
        )
    repository = _ask(wanted, options)
    files = choose_files(repository, wanted)
    destination = _destination(wanted, repository, options)
    with lock(destination.staging, options.stop, lambda: options.say(f"another pull of {wanted} is running: waiting")):
        _fetch(wanted, repository, files, destination, options)
    return destination.folder / files[0].path if files[0].path.endswith(".gguf") else destination.folder


def find_complete(wanted: RepositoryName, options: PullOptions) -> Path | None:
    """Where all of `wanted` is on this machine, as far as can be seen without a network; None if it is nowhere."""
    if options.folder is not None:
        if not is_complete(options.folder, wanted, options.revision):
            return None
        return _model_in(options.folder, wanted)
    revision = options.revision or "main"
    folders: list[Path] = []
    if options.source != MODELSCOPE:
        folders += hugging_face_folders(wanted.repository, revision)
    if options.source != HUGGING_FACE:
        folders += modelscope_folders(wanted.repository, revision)
    return next((found for folder in folders if (found := _model_in(folder, wanted)) is not None), None)


def _model_in(folder: Path, wanted: RepositoryName) -> Path | None:
    """The model in `folder` if none of it is missing. A folder that cannot be read has none."""
    try:
        if wanted.file is not None:
            paths = part_paths(folder / wanted.file)
            return paths[0] if all(path.is_file() for path in paths) else None
        if (folder / CONFIG).is_file():
            return folder if has_weights(folder) and not missing_shards(folder) else None
        gguf = gguf_in_folder(folder)
        return None if gguf is None or missing_parts(gguf) else gguf
    except (OSError, CheckpointError):
        return None


def _ask(wanted: RepositoryName, options: PullOptions) -> Repository:
    """The model as the first hub that has it describes it."""
    if options.source != "auto":
        return _HUBS[options.source](wanted.repository, options.revision, timeout_s=options.policy.timeout_s)
    failures: list[ModelError] = []
    for hub in _order(wanted, options):
        try:
            repository = _HUBS[hub](wanted.repository, options.revision, timeout_s=_AUTO_TIMEOUT_S)
        except (DownloadError, ModelNotFoundError) as exc:
            failures.append(exc)
            options.say(f"{exc}; trying the next hub" if len(failures) < len(_HUBS) else str(exc))
        else:
            return repository
    # What one hub does not have may still be at the one that did not answer.
    kind = ModelNotFoundError if all(isinstance(exc, ModelNotFoundError) for exc in failures) else DownloadError
    raise kind(f"{wanted} cannot be fetched: {'; '.join(map(str, failures))}")


def _order(wanted: RepositoryName, options: PullOptions) -> list[str]:
    """The hubs, first the one where a pull was begun, then the one that the environment prefers."""
    preferred = os.environ.get("MOOLI_HUB", "").strip().lower()
    if preferred not in ("", *_HUBS):
        raise ConfigError(f"MOOLI_HUB={preferred!r} must be one of {', '.join(_HUBS)}")
    if not preferred and os.environ.get("SGLANG_USE_MODELSCOPE", "").strip().lower() in _TRUE:
        preferred = MODELSCOPE
    begun = {
        HUGGING_FACE: hugging_face_repository(wanted.repository) / STAGING,
        MODELSCOPE: modelscope_folder(wanted.repository, options.revision) / STAGING,
    }
    return sorted(_HUBS, key=lambda hub: (options.folder is not None or not begun[hub].is_dir(), hub != preferred))


def _destination(wanted: RepositoryName, repository: Repository, options: PullOptions) -> Destination:
    if options.folder is not None:
        return PlainFolder(options.folder, wanted, repository, options.revision)
    if repository.hub == HUGGING_FACE:
        return HuggingFaceCache(repository, options.revision)
    return PlainFolder(modelscope_folder(wanted.repository, options.revision), wanted, repository, options.revision)


def _fetch(
    wanted: RepositoryName,
    repository: Repository,
    files: Sequence[RemoteFile],
    destination: Destination,
    options: PullOptions,
) -> None:
    """Bring what is missing into the staging folder, then publish. Called with the lock held."""
    destination.check(files)
    missing = [file for file in files if not destination.holds(file)]
    staged = {file: destination.staging / staged_name(file) for file in missing}
    begun = sum(min(_size(path), file.size) for file, path in staged.items())
    total = sum(file.size for file in missing)
    check_space(destination.staging, total - begun)
    if missing:
        kept = f", of which {size(begun)} are there from an earlier pull" if begun else ""
        options.say(
            f"fetching {wanted} from {repository.hub}: {len(missing)} files, {size(total)}{kept}, into"
            f" {destination.folder}"
        )
        for file in missing:
            if file.digest is None:
                options.say(f"{repository.hub} publishes no checksum of {file.path}: only its size is checked")
        progress = PullProgress(wanted.repository, total, options.say)
        try:
            _fetch_all(repository, staged, progress, options)
        finally:
            progress.end()
    try:
        destination.publish(files)
        _remove_leftovers(destination.staging)
    except OSError as exc:
        raise DownloadError(f"cannot put {wanted} into {destination.folder}: {exc}") from exc
    options.say(f"{wanted} is complete in {destination.folder}")


def _fetch_all(
    repository: Repository, staged: dict[RemoteFile, Path], progress: PullProgress, options: PullOptions
) -> None:
    """Several files at a time. The first failure, an interrupt or `stop` ends all of them; what came is kept."""
    end = threading.Event()
    transfer = Transfer(repository, progress.count, end, options.policy)
    todo: queue.SimpleQueue[RemoteFile] = queue.SimpleQueue()
    results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    for file in sorted(staged, key=lambda file: file.size, reverse=True):
        todo.put(file)

    def work() -> None:
        while not end.is_set():
            try:
                file = todo.get_nowait()
            except queue.Empty:
                return
            try:
                transfer.fetch(file, staged[file])
                results.put(None)
            except BaseException as exc:
                results.put(exc)

    # Not a pool: its threads would keep an interrupted program until the slowest connection times out.
    workers = [threading.Thread(target=work, name=f"mooli-pull-{i}", daemon=True) for i in range(_CONNECTIONS)]
    for worker in workers:
        worker.start()
    try:
        for _ in staged:
            failure = _next(results, options.stop)
            if failure is not None:
                raise failure
    finally:
        end.set()
        for worker in workers:
            worker.join(_JOIN_S)


def _next(results: queue.SimpleQueue[BaseException | None], stop: threading.Event) -> BaseException | None:
    while True:
        if stop.is_set():
            raise Cancelled
        try:
            return results.get(timeout=_POLL_S)
        except queue.Empty:
            continue


def _remove_leftovers(staging: Path) -> None:
    """Partial files of other revisions, which no pull asks for any more."""
    for path in staging.iterdir():
        if path.name != LOCK:
            path.unlink()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


# -- how far it is -----------------------------------------------------------------------------------------------------

_TERMINAL_PERIOD_S = 0.2
_LINE_PERIOD_S = 30.0
_SPEED_WINDOW_S = 10.0


class PullProgress:
    """Counts bytes from several threads. say: where a line goes when `stream` is no terminal."""

    def __init__(
        self,
        label: str,
        total_bytes: int,
        say: Callable[[str], None],
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = label
        self._total = total_bytes
        self._say = say
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream is not None and self._stream.isatty()
        self._clock = clock
        self._guard = threading.Lock()
        self._done = 0
        self._moves: deque[tuple[float, int]] = deque([(clock(), 0)])
        self._received = 0
        self._shown_s = clock()

    def count(self, change: int) -> None:
        """Add bytes that came; a negative number for those thrown away."""
        with self._guard:
            self._done += change
            self._received += change
            now = self._clock()
            if now - self._shown_s < (_TERMINAL_PERIOD_S if self._is_terminal else _LINE_PERIOD_S):
                return
            self._shown_s = now
            self._moves.append((now, self._received))
            while len(self._moves) > 2 and now - self._moves[0][0] > max(_SPEED_WINDOW_S, _LINE_PERIOD_S):
                self._moves.popleft()
            line = self._line(now)
        if self._is_terminal:
            self._stream.write(f"\r\x1b[K{line}")
            self._stream.flush()
        else:
            self._say(line)

    def end(self) -> None:
        """Clear the line of a terminal."""
        if self._is_terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _line(self, now: float) -> str:
        began_s, began = self._moves[0]
        speed = (self._received - began) / (now - began_s) if now > began_s else 0.0
        share = f"{self._label}: {size(self._done)} of {size(self._total)}"
        if speed <= 0:
            return share
        return f"{share}, {size(speed)}/s, {duration((self._total - self._done) / speed)} left"


def size(count: float) -> str:
    """Bytes in the unit that fits: 15.2 GB. Units are decimal."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def duration(seconds: float) -> str:
    """42 s, 3 min 20 s, 2 h 5 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
