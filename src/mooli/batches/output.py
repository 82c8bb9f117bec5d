"""What is kept of a batch while it runs, and the files that it ends up in.

Owns the journal, the shape of a line, which of an answer's values are settled, and the writing of the results.

The journal is a file of lines that only grows: a first line that says whose it is, then each answer as its line will be
in the results. A line is handed to the system whole, in one write, so that a killed process loses none that was
written; the disk has all of it every SYNC_INTERVAL_S and at the end, so that a machine that loses power loses no more
than that. What is found torn at the end is cut off, and its row answered again. Whoever has the journal open has it
locked.

Results have the rows in the order of the input, and are made of the journal in files beside them, which take their
places when the disk has them whole; then the journal goes. As ids, times and what was cached are settled, the bytes of
the results depend on the rows, what answers them, and the time the journal was begun.

Source: OpenAI API reference, batches and the request output object.
"""

from __future__ import annotations

import fcntl
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec

from mooli.batches.order import Kept, Placed, Refused, RowIndex
from mooli.errors import BatchError

SYNC_INTERVAL_S = 5.0

VERSION = 1
"""Of the journal. One of another version is refused."""

OK = 200

_ID_HEX = 32
_WRITE_BUFFER_BYTES = 2**20
_KIND = re.compile(r"([A-Za-z]+[_-])?")
"""What an id begins with that says of what it is."""

_DRAWN = re.compile(rf"{_KIND.pattern}[0-9A-Za-z]{{16,}}(_\d+)?")
"""An id that nobody has thought of."""


# -- lines -------------------------------------------------------------------------------------------------------------
def answer_line(placed: Placed, status: int, body: Any, created: int) -> bytes:
    """The line of an answer. body: as it came. created: seconds since the epoch, for all of a batch."""
    name = placed.id.hex()
    response = {"status_code": status, "request_id": f"req_{name}", "body": settled(body, name, created)}
    return _line(name, placed.row.custom_id, response, None)


def lost_line(placed: Placed, code: str, message: str) -> bytes:
    """The line of a row that no answer came for."""
    return _line(placed.id.hex(), placed.row.custom_id, None, {"code": code, "message": message})


def refused_line(refused: Refused) -> bytes:
    """The line of what is no row."""
    error = {"code": refused.code, "message": f"line {refused.line}: {refused.message}", "line": refused.line}
    return _line(f"{refused.line:0{_ID_HEX}x}", refused.custom_id, None, error)


def _line(name: str, custom_id: str | None, response: Any, error: Any) -> bytes:
    said = {"id": f"batch_req_{name}", "custom_id": custom_id, "response": response, "error": error}
    return msgspec.json.encode(said) + b"\n"


def settled(body: Any, name: str, created: int) -> Any:
    """An answer without what another time would make different: ids that were drawn, times, and what was found in the
    cache, which depends on the rows before it.

    name: hex digits that stand in ids for what was drawn.
    """
    if not isinstance(body, dict):
        return body
    found = {key: value for key, value in body.items() if key != "sglext"}
    for key in ("created", "created_at", "completed_at"):
        if isinstance(found.get(key), (int, float)):
            found[key] = created
    if isinstance(found.get("id"), str):
        kind = _KIND.match(found["id"])
        found["id"] = f"{kind[0] if kind else ''}{name}"
    if isinstance(found.get("usage"), dict):
        found["usage"] = {key: _uncached(value) for key, value in found["usage"].items()}
    numbers: dict[str, str] = {}

    def renamed(item: Any) -> Any:
        if not isinstance(item, dict):
            return item
        given = {key: item[key] for key in ("id", "call_id") if isinstance(item.get(key), str)}
        for text in given.values():
            numbers.setdefault(text, f"{name[:24]}{len(numbers):08x}")
        return {**item, **{key: _named(text, numbers[text]) for key, text in given.items()}}

    if isinstance(found.get("output"), list):
        found["output"] = [renamed(item) for item in found["output"]]
    if isinstance(found.get("choices"), list):
        found["choices"] = [_with_calls(choice, renamed) for choice in found["choices"]]
    return found


def _with_calls(choice: Any, renamed: Any) -> Any:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict) or not isinstance(message.get("tool_calls"), list):
        return choice
    return {**choice, "message": {**message, "tool_calls": [renamed(call) for call in message["tool_calls"]]}}


def _named(given: str, name: str) -> str:
    """`given` with `name` in the place of what was drawn. Ids that say something, as `functions.search:0`, stay."""
    drawn = _DRAWN.fullmatch(given)
    return given if drawn is None else f"{drawn[1] or ''}{name}{drawn[2] or ''}"


def _uncached(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: item for key, item in value.items() if key not in ("cached_tokens", "cache_write_tokens")}


# -- the journal -------------------------------------------------------------------------------------------------------
class _Header(msgspec.Struct, kw_only=True):
    journal: int
    created: int
    settings: dict[str, Any]


class _Response(msgspec.Struct):
    status_code: int


class _Answer(msgspec.Struct):
    """Of a line, what a journal must know."""

    id: str
    response: _Response | None = None


def _kept_lines(lines: Iterable[bytes], offset: int = 0) -> Iterator[Kept]:
    """Of lines that stand there, up to the first that is none of ours or not whole."""
    decoder = msgspec.json.Decoder(_Answer)
    for line in lines:
        try:
            if not line.endswith(b"\n"):
                return
            answer = decoder.decode(line)
            row_id = bytes.fromhex(answer.id.removeprefix("batch_req_"))
        except (msgspec.DecodeError, ValueError):
            return
        failed = answer.response is None or answer.response.status_code != OK
        yield Kept(row_id, offset, len(line), failed)
        offset += len(line)


class Journal:
    """The journal at `path`, locked until it is closed, and made where there is none. As a context manager: closed on
    the way out. Use it on one thread; `sync` may run on another.

    created: when the batch was begun, in seconds since the epoch; settings: by which its rows are answered. Both None
    until `begin`.
    Raises BatchError where another process has it, for a file that is no journal, and where no file can be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.created: int | None = None
        self.settings: Mapping[str, Any] | None = None
        self._file = _locked(path)
        try:
            self._length = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, settings: Mapping[str, Any], created: int) -> None:
        """Of an empty journal: write its first line. Otherwise: check that the batch goes on as it was begun.

        settings: all that decides what a row's answer is, in values of JSON. created: not used if it has begun.
        Raises BatchError for settings that differ, naming the first.
        """
        if self.settings is None:
            header = _Header(journal=VERSION, created=created, settings=dict(settings))
            self._write(msgspec.json.encode(header) + b"\n")
            self.created, self.settings = created, dict(settings)
            return
        for name in sorted({*settings, *self.settings}):
            was, now = self.settings.get(name), settings.get(name)
            if was != now:
                raise BatchError(
                    f"{self.path} was begun with {name}={was!r}, and this is {now!r}: answers of both would be mixed."
                    " Go on with the first, or begin anew with --overwrite"
                )

    def kept(self) -> Iterator[Kept]:
        """The answers that are there. What is torn behind them is cut off. To be read to the end before anything is
        added."""
        with self._reader() as lines:
            offset = len(lines.readline())
            for kept in _kept_lines(lines, offset):
                yield kept
                offset = kept.offset + kept.length
        if offset < self._length:
            self._cut(offset)

    def add(self, line: bytes) -> int:
        """Keep a line, which ends with a line feed; its offset. Raises BatchError where the disk does not take it; then
        nothing of it is kept."""
        offset = self._length
        self._write(line)
        return offset

    def read(self, offset: int, length: int) -> bytes:
        """A line that was kept."""
        return os.pread(self._file.fileno(), length, offset)

    def sync(self) -> None:
        """Have the disk take all that was added. Raises BatchError where it does not."""
        try:
            os.fsync(self._file.fileno())
        except OSError as exc:
            raise _no_room(self.path, exc) from exc

    def clear(self) -> None:
        """Begin anew, with nothing kept."""
        self._cut(0)
        self.created = self.settings = None

    def remove(self) -> None:
        """The file goes, while it is locked; then it is closed."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """An empty journal goes with that: nothing has begun."""
        if self._file.closed:
            return
        if self._length == 0:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _reader(self) -> BinaryIO:
        """From the beginning, with nothing read before that has changed since."""
        reader = open(self._file.fileno(), "rb", closefd=False)  # noqa: SIM115 - for who reads
        reader.seek(0)
        return reader

    def _read_header(self) -> int:
        length = os.fstat(self._file.fileno()).st_size
        with self._reader() as lines:
            first = lines.readline()
        if not first.endswith(b"\n"):
            if first and not b'{"journal":'.startswith(first[:11]):
                raise self._no_journal()
            self._length = length
            self._cut(0)
            return 0
        try:
            header = msgspec.json.decode(first, type=_Header)
        except msgspec.DecodeError:
            raise self._no_journal() from None
        if header.journal != VERSION:
            raise BatchError(f"{self.path} is of another version of Mooli: finish it with that, or remove it")
        self.created, self.settings = header.created, header.settings
        return length

    def _no_journal(self) -> BatchError:
        return BatchError(f"{self.path} is in the way: it is no journal of a batch. Move it, or give another output")

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._file.fileno(), rest) :]
        except OSError as exc:
            self._cut(self._length)
            raise _no_room(self.path, exc) from exc
        self._length += len(line)

    def _cut(self, length: int) -> None:
        try:
            os.ftruncate(self._file.fileno(), length)
        except OSError as exc:
            raise _no_room(self.path, exc) from exc
        self._length = length


def _locked(path: Path) -> io.FileIO:
    while True:
        try:
            file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b", 0)  # noqa: SIM115 - kept open
        except OSError as exc:
            raise BatchError(f"{path} cannot be written: {exc.strerror or exc}") from exc
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(path, file):
                return file
        except BlockingIOError:
            file.close()
            raise BatchError(f"another process writes {path}: wait for its end, or give another output") from None
        except OSError as exc:
            file.close()
            raise BatchError(f"{path} cannot be locked: {exc}. Give an output on a disk of this machine") from exc
        file.close()  # whoever had it has finished, and removed it


def _is_there(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _no_room(path: Path, error: OSError) -> BatchError:
    return BatchError(
        f"{path} cannot be written: {error.strerror or error}. What was written before is kept: make room, and run the"
        " same again"
    )


# -- the results -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class ResultFiles:
    """output: of rows that were answered with 200. errors: of all other lines; there is none if all rows were."""

    output: Path
    errors: Path


def written_before(files: ResultFiles) -> Iterator[Kept]:
    """The answers in results that are there. Raises BatchError for a file that cannot be read."""
    for path in (files.output, files.errors):
        try:
            with path.open("rb") as lines:
                yield from _kept_lines(lines)
        except FileNotFoundError:
            pass
        except OSError as exc:
            raise BatchError(f"{path} cannot be read: {exc.strerror or exc}") from exc


def write_results(index: RowIndex, journal: Journal, files: ResultFiles) -> None:
    """Write both files, in the order of the input, and have them take their places; then the journal goes.

    Raises BatchError where the disk does not take them: everything is still there, and may be tried again.
    """
    has_errors = bool(index.num_failed or index.num_refused)
    journal.sync()
    if has_errors:
        _write_lines(files.errors, _lines(index, journal, failed=True))
    _write_lines(files.output, _lines(index, journal, failed=False))
    try:
        if not has_errors:
            files.errors.unlink(missing_ok=True)
        for folder in {files.output.parent, files.errors.parent}:
            _sync_folder(folder)
    except OSError as exc:
        raise _no_room(files.output, exc) from exc
    journal.remove()


def _lines(index: RowIndex, journal: Journal, *, failed: bool) -> Iterator[bytes]:
    for result in index.results(failed=failed):
        yield refused_line(result) if isinstance(result, Refused) else journal.read(*result)


def _write_lines(path: Path, lines: Iterator[bytes]) -> None:
    """Whole, or not at all."""
    waiting = path.with_name(f".{path.name}.writing")
    try:
        with waiting.open("wb", buffering=_WRITE_BUFFER_BYTES) as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        waiting.replace(path)
    except OSError as exc:
        waiting.unlink(missing_ok=True)
        raise _no_room(path, exc) from exc


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
