"""One file from a hub to this disk: goes on where it was cut off, and is right or is not there.

Owns the partial file, the retries and the check of size and digest. Never decides which files, and never puts one where
a model is looked for: `destination` does that.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from mooli.errors import CheckpointError, DownloadError, ModelNotFoundError
from mooli.formats.files import open_weights
from mooli.hub.hubs import HttpStatusError, open_url
from mooli.hub.repository import RemoteFile, Repository

_CHUNK_BYTES = 1 << 20
_LONGEST_DELAY_S = 60.0
_RETRIED_STATUSES = (408, 416, 425, 429, 500, 502, 503, 504)

Count = Callable[[int], None]
"""Told the bytes that came, or a negative number for bytes that are thrown away."""


@dataclass(frozen=True, slots=True)
class TransferPolicy:
    """How long to wait for an answer or the next bytes, and how often to try again in a row without a single byte."""

    timeout_s: float = 30.0
    retries: int = 6
    first_delay_s: float = 1.0

    def delay_s(self, attempt: int, asked_s: float | None) -> float:
        """Seconds before attempt `attempt` (from 1), doubling; at least what the server asks for, a minute at most."""
        return min(max(self.first_delay_s * 2.0 ** (attempt - 1), asked_s or 0.0), _LONGEST_DELAY_S)


class Cancelled(Exception):
    """Another part of the work failed or was interrupted, so this one ends where it is."""


def matches(path: Path, file: RemoteFile) -> bool:
    """Whether `path` holds exactly `file`, by size and digest; by size alone where the hub publishes no digest."""
    try:
        if path.stat().st_size != file.size:
            return False
        if file.digest is None:
            return True
        digest = _new_digest(file)
        with open_weights(path) as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                digest.update(chunk)
    except (OSError, CheckpointError):
        return False
    return bool(digest.hexdigest() == file.digest)


@dataclass(slots=True)
class Transfer:
    """Fetches files of one repository. count is told each change; `stop`, once set, ends every file with Cancelled."""

    repository: Repository
    count: Count
    stop: threading.Event
    policy: TransferPolicy

    def fetch(self, file: RemoteFile, partial: Path) -> None:
        """Make `partial` the whole of `file`, keeping what it already holds of it.

        A file that an earlier run began and that turns out wrong is fetched once more from its beginning. One that is
        wrong all the same is removed. Raises DownloadError (also for a disk that takes no more), ModelNotFoundError for
        a file that has gone, Cancelled; of a connection that stays cut, what came is kept for the next run.
        """
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            old_bytes = partial.stat().st_size if partial.exists() else 0
            if old_bytes > file.size:
                partial.unlink()
                old_bytes = 0
            self.count(old_bytes)
            found = self._fill(file, partial)
            if file.digest not in (None, found) and old_bytes:
                self._discard(partial)
                found = self._fill(file, partial)
            if file.digest in (None, found):
                return
            self._discard(partial)
        except (DownloadError, ModelNotFoundError):
            raise
        except OSError as exc:
            raise DownloadError(f"{partial} cannot be written: {exc}") from exc
        raise DownloadError(
            f"{file.path} of {self.repository.name} came from {self.repository.hub} with a wrong checksum ({found}"
            f" instead of {file.digest}) and was removed. Try again; if it stays so, a proxy or mirror changes it"
        )

    def _discard(self, partial: Path) -> None:
        self.count(-partial.stat().st_size)
        partial.unlink()

    def _fill(self, file: RemoteFile, partial: Path) -> str:
        """Append to `partial` until it has the file's size, and return the digest of all of it."""
        # Unbuffered: what came is on the disk when the program is killed, and an ended transfer writes nothing late.
        with partial.open("a+b", buffering=0) as out:
            out.seek(0)
            digest, have = _new_digest(file), 0
            while chunk := out.read(_CHUNK_BYTES):
                self._go_on()
                digest.update(chunk)
                have += len(chunk)
            failures = 0
            while have < file.size:
                begin = have
                try:
                    with self._open(file, have) as response:
                        if have and not _continues(response, have):
                            self.count(-have)
                            out.truncate(0)
                            digest, have, begin = _new_digest(file), 0, 0
                        while have < file.size:
                            chunk = _read(response, file.size - have)
                            self._go_on()
                            _write(out, chunk)
                            digest.update(chunk)
                            have += len(chunk)
                            self.count(len(chunk))
                except DownloadError as exc:
                    failures = 1 if have > begin else failures + 1
                    self._wait(exc, failures, file, have)
        return str(digest.hexdigest())

    def _open(self, file: RemoteFile, offset: int) -> http.client.HTTPResponse:
        headers = {**self.repository.headers, "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        return open_url(file.url, headers, self.repository.credentials, timeout_s=self.policy.timeout_s)

    def _wait(self, failure: DownloadError, failures: int, file: RemoteFile, have: int) -> None:
        """Until the next attempt. Raises where another one is of no use."""
        what = f"{file.path} of {self.repository.name}"
        asked_s = None
        if isinstance(failure, HttpStatusError):
            asked_s = failure.retry_after_s
            if failure.status == 404:
                raise ModelNotFoundError(f"{what} is not on {self.repository.hub} any more") from failure
            if failure.status in (401, 403):
                raise DownloadError(
                    f"{self.repository.hub} refuses {what} (HTTP status {failure.status}): accept the model's terms on"
                    " its page, and log in"
                ) from failure
            if failure.status not in _RETRIED_STATUSES:
                raise DownloadError(f"{what} cannot be fetched from {self.repository.hub}: {failure}") from failure
        if failures > self.policy.retries:
            raise DownloadError(
                f"{what} cannot be fetched from {self.repository.hub}: {failure}. {have} of {file.size} bytes are"
                " kept; the same command goes on from there"
            ) from failure
        if self.stop.wait(self.policy.delay_s(failures, asked_s)):
            raise Cancelled

    def _go_on(self) -> None:
        if self.stop.is_set():
            raise Cancelled


def _read(response: http.client.HTTPResponse, most: int) -> bytes:
    """The next bytes, at least one. DownloadError where the connection ends."""
    try:
        chunk = response.read1(min(_CHUNK_BYTES, most))
    except (OSError, http.client.HTTPException) as exc:
        raise DownloadError(f"the connection was cut ({exc or type(exc).__name__})") from exc
    if not chunk:
        raise DownloadError("the connection was cut")
    return chunk


def _write(out: FileIO, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[out.write(rest) :]


def _continues(response: http.client.HTTPResponse, offset: int) -> bool:
    """Whether the answer begins at `offset`. A server that knows no ranges sends all with status 200."""
    given = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
    return response.status == 206 and given is not None and int(given[1]) == offset


def _new_digest(file: RemoteFile) -> Any:
    if file.digest_kind == "git":
        # Git's id of a blob, no protection against an attacker: those files come over TLS and hold no weights.
        return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    return hashlib.sha256()
