"""Where the files of a model go, so that a folder is a model only when all of it is there and right.

Owns the two layouts, the record of what was put where, and the lock. Files wait in a folder of their own until the last
one is checked; then they are moved to their places, config.json last, which makes the folder a model for Mooli and for
every other program. Never uses the network.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mooli.errors import CheckpointError, DownloadError
from mooli.formats.files import read_text_file
from mooli.formats.safetensors import SINGLE_NAME
from mooli.hub.locate import RepositoryName, hugging_face_repository
from mooli.hub.repository import CONFIG, RemoteFile, Repository
from mooli.hub.transfer import Cancelled, matches

STAGING = ".mooli-pull"
LOCK = "lock"
RECORD = ".mooli-pull.json"

_POLL_S = 0.2
_MAX_RECORD_BYTES = 1 << 20


class Destination(Protocol):
    """A place for one model."""

    @property
    def folder(self) -> Path:
        """What will be the model's folder."""

    @property
    def staging(self) -> Path:
        """Where files wait, on the same disk."""

    def check(self, files: Sequence[RemoteFile]) -> None:
        """Raise CheckpointError where `files` must not be put, because something else is there."""

    def holds(self, file: RemoteFile) -> bool:
        """Whether the right file is already there. May read all of it."""

    def publish(self, files: Sequence[RemoteFile]) -> None:
        """Move the staged files to their places. Those that are not staged are held already."""


@dataclass(slots=True)
class PlainFolder:
    """A folder with the files in it, and a record of them. revision: as the user gave it."""

    folder: Path
    wanted: RepositoryName
    repository: Repository
    revision: str | None

    @property
    def staging(self) -> Path:
        return self.folder / STAGING

    def check(self, files: Sequence[RemoteFile]) -> None:
        record = read_record(self.folder) or {"model": self.repository.name, "files": {}}
        if record["model"] != self.repository.name:
            raise CheckpointError(f"{self.folder} holds {record['model']}: give another folder for {self.wanted}")
        chosen = {file.path for file in files}
        if CONFIG in chosen and SINGLE_NAME not in chosen.union(record["files"]) and self._has(SINGLE_NAME):
            raise CheckpointError(
                f"{self.folder} holds a {SINGLE_NAME} that is not of {self.wanted}, which would be read in its place:"
                " give another folder"
            )

    def holds(self, file: RemoteFile) -> bool:
        path = self.folder / file.path
        entry = (read_record(self.folder) or {"files": {}})["files"].get(file.path)
        if entry is not None and _is_untouched(path, entry):
            return bool(entry["size"] == file.size and entry["digest"] == file.digest)
        return matches(path, file)

    def publish(self, files: Sequence[RemoteFile]) -> None:
        staged = [file for file in _config_last(files) if (self.staging / staged_name(file)).is_file()]
        old = (read_record(self.folder) or {"files": {}})["files"]
        # Only names that the folder itself has: the record may have come with it.
        gone = set(old).difference(file.path for file in files).intersection(os.listdir(self.folder))
        if staged or gone:
            # Between the first move and the last the folder is not one model, so it must not look like one.
            (self.folder / RECORD).unlink(missing_ok=True)
            for config in files:
                if config.path == CONFIG and config not in staged:
                    os.replace(self.folder / CONFIG, self.staging / staged_name(config))
                    staged.append(config)
                elif config.path == CONFIG:
                    (self.folder / CONFIG).unlink(missing_ok=True)
        if self.wanted.file is None:
            for name in gone:
                (self.folder / name).unlink(missing_ok=True)
        for file in staged:
            place = self.folder / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.staging / staged_name(file), place)
        self._write_record(files)

    def _has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def _write_record(self, files: Sequence[RemoteFile]) -> None:
        entries = {}
        for file in files:
            status = (self.folder / file.path).stat()
            entries[file.path] = {"size": file.size, "digest": file.digest, "mtime_ns": status.st_mtime_ns}
        record = {
            "model": self.repository.name,
            "file": self.wanted.file,
            "hub": self.repository.hub,
            "revision": self.revision,
            "commit": self.repository.commit,
            "files": entries,
        }
        written = self.folder / (RECORD + ".new")
        written.write_text(json.dumps(record, indent=1), encoding="utf-8")
        os.replace(written, self.folder / RECORD)


@dataclass(slots=True)
class HuggingFaceCache:
    """The cache of huggingface_hub, as its documentation describes it: blobs by digest, snapshots that link to them.

    A blob is only put there when it is right, so one that is there is. Where links cannot be made, snapshots hold the
    files themselves, as the library does.
    """

    repository: Repository
    revision: str | None

    @property
    def _root(self) -> Path:
        return hugging_face_repository(self.repository.name)

    @property
    def folder(self) -> Path:
        return self._root / "snapshots" / self.repository.commit

    @property
    def staging(self) -> Path:
        return self._root / STAGING

    def check(self, files: Sequence[RemoteFile]) -> None:
        if not self.repository.commit or not self.repository.commit.isalnum():
            raise CheckpointError(f"{self.repository.hub} names no commit of {self.repository.name}; use --dir")

    def holds(self, file: RemoteFile) -> bool:
        path = self.folder / file.path
        with contextlib.suppress(OSError):
            if path.is_file() and path.stat().st_size == file.size and path.resolve().name == file.digest:
                return True
        return matches(path, file) or self._has_blob(file)

    def _has_blob(self, file: RemoteFile) -> bool:
        """Whether another revision has the same content: a commit that changes a README has the same weights."""
        return file.digest is not None and matches(self._root / "blobs" / file.digest, file)

    def publish(self, files: Sequence[RemoteFile]) -> None:
        for file in _config_last(files):
            staged = self.staging / staged_name(file)
            link = self.folder / file.path
            if link.exists() and not staged.is_file():
                continue
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            if file.digest is None:
                os.replace(staged, link)
                continue
            blob = self._root / "blobs" / file.digest
            blob.parent.mkdir(exist_ok=True)
            if staged.is_file():
                os.replace(staged, blob)
            try:
                link.symlink_to(os.path.relpath(blob, link.parent))
            except OSError:  # a file system without links
                os.replace(blob, link)
        revision = self.revision or "main"
        if revision != self.repository.commit:
            reference = self._root / "refs" / revision
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(self.repository.commit, encoding="utf-8")


def staged_name(file: RemoteFile) -> str:
    """The name a file waits under; another content of the same name has another one."""
    key = f"{file.path}\0{file.size}\0{file.digest}"
    return f"{hashlib.sha256(key.encode()).hexdigest()[:16]}-{file.path.rsplit('/', 1)[-1]}"


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a pull wrote into a plain folder; None where there is no such record or it is not one."""
    try:
        record = json.loads(read_text_file(folder / RECORD, _MAX_RECORD_BYTES))
        files = record["files"]
        if not isinstance(record["model"], str) or not all(
            isinstance(entry["size"], int) and isinstance(entry["mtime_ns"], int) and "digest" in entry
            for entry in files.values()
        ):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return dict(record)


def is_complete(folder: Path, wanted: RepositoryName, revision: str | None) -> bool:
    """Whether a pull of `wanted` at `revision` into this plain folder has been done and nothing was changed since."""
    record = read_record(folder)
    if record is None:
        return False
    asked = (wanted.repository, wanted.file, revision)
    if (record["model"], record.get("file"), record.get("revision")) != asked:
        return False
    return all(_is_untouched(folder / name, entry) for name, entry in record["files"].items())


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise DownloadError where the disk of `folder` has not `needed_bytes` and a little left."""
    if needed_bytes <= 0:
        return
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError as exc:
        raise DownloadError(f"cannot see how much room {place} has: {exc}") from exc
    spare = 64 << 20
    if free < needed_bytes + spare:
        raise DownloadError(
            f"{place} has {free / 1e9:.2f} GB free and {needed_bytes / 1e9:.2f} GB are still to come: make room, or"
            " choose another disk with --dir"
        )


@contextlib.contextmanager
def lock(staging: Path, stop: threading.Event, on_wait: Callable[[], None]) -> Iterator[None]:
    """Have `staging` alone, among processes too; on_wait is called if another one has it. Removed if it ends empty.

    Raises DownloadError where nothing can be written, Cancelled if `stop` is set while waiting.
    """
    descriptor = _locked(staging, stop, on_wait)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.listdir(staging) == [LOCK]:
                (staging / LOCK).unlink()
                staging.rmdir()
        os.close(descriptor)


def _locked(staging: Path, stop: threading.Event, on_wait: Callable[[], None]) -> int:
    has_waited = False
    while True:
        try:
            staging.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(staging / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # another pull ended and removed the folder between our two steps
        except OSError as exc:
            raise DownloadError(f"cannot write into {staging.parent}: {exc}; give another folder with --dir") from exc
        is_kept = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Unless another pull removed the file after we had opened it.
            is_kept = (staging / LOCK).exists() and os.path.samestat(os.fstat(descriptor), os.stat(staging / LOCK))
            if is_kept:
                return descriptor
        except FileNotFoundError:
            continue
        except BlockingIOError:
            if not has_waited:
                on_wait()
            has_waited = True
            if stop.wait(_POLL_S):
                raise Cancelled from None
        except OSError as exc:
            if exc.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise DownloadError(f"cannot lock {staging / LOCK}: {exc}") from exc
            is_kept = True  # a file system without locks: what two pulls mix up there, the checksums refuse
            return descriptor
        finally:
            if not is_kept:
                os.close(descriptor)


def _config_last(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    return sorted(files, key=lambda file: file.path == CONFIG)


def _is_untouched(path: Path, entry: dict[str, Any]) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return bool(status.st_size == entry["size"] and status.st_mtime_ns == entry["mtime_ns"])
