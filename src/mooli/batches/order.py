"""Which rows a batch file has, which of them are answered, and in which order the others come.

Owns the index of a file: where each row lies, what is wrong with it, which rows are the same, where its answer is. Rows
come depth-first by shared prefix, so that a prefix tree is walked once: what is cached of one branch may go when the
next begins. Equal rows come as one group.

A file may have any number of rows. The index is a database without a name that SQLite keeps in a folder for temporary
files and removes by itself; a few ten megabytes of it are in memory. Never writes a file that anybody else reads.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

from mooli.batches.rows import MAX_LINE_BYTES, Row, name_digest, order_key, parse_row, read_lines, too_long
from mooli.errors import BatchError, RowError

_CACHE_KIB = 32 * 1024
_ROWS_AT_A_TIME = 1000

_SETTINGS = f"PRAGMA cache_size=-{_CACHE_KIB};PRAGMA temp_store=FILE;PRAGMA journal_mode=OFF;"
"""All is one transaction without an end: nobody goes on with an index."""

_TABLES = """
CREATE TABLE rows(number INTEGER PRIMARY KEY, line INT, offset INT, length INT, id BLOB, name BLOB);
CREATE TABLE keys(number INTEGER PRIMARY KEY, key BLOB, work BLOB);
CREATE TABLE refused(number INTEGER PRIMARY KEY, line INT, custom_id TEXT, code TEXT, message TEXT);
CREATE TABLE answers(number INTEGER PRIMARY KEY, offset INT, length INT, failed INT);
CREATE TABLE walk(place INTEGER PRIMARY KEY, number INT, work BLOB);
"""


class Group(NamedTuple):
    """Rows that ask for the same. first, last: their places in the order. work: the digest of what they ask for."""

    first: int
    last: int
    work: bytes


class Kept(NamedTuple):
    """An answer that is kept. id: digest of its row. offset, length: of its line, in bytes."""

    id: bytes
    offset: int
    length: int
    failed: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """A line that is no row. custom_id: None where it has none of its own."""

    number: int
    line: int
    custom_id: str | None
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Placed:
    """A row and its place in the file. id: digest of the row with its name."""

    number: int
    id: bytes
    row: Row


class RowIndex:
    """The rows of the file at `path`, read once from its beginning to its end. As a context manager: closed on the way
    out. May be made on one thread and used on another, on one at a time.

    num_rows: lines that are not blank. num_refused: those that are no rows.
    Raises BatchError for a file that cannot be read or is no file, and where the index finds no room.
    """

    def __init__(self, path: Path, *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._path = path
        self._file = _opened(path)
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        try:
            with _room():
                self._db.executescript(f"{_SETTINGS}{_TABLES}")
                self._db.execute("BEGIN")
                self._read(max_line_bytes)
                self._refuse_names_given_twice()
                self._sort()
                (self.num_rows,) = self._one("SELECT (SELECT count(*) FROM rows) + (SELECT count(*) FROM refused)")
                (self.num_refused,) = self._one("SELECT count(*) FROM refused")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RowIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Once and for all; what is left of the index is gone."""
        self._db.close()
        self._file.close()

    # -- making it --
    def _read(self, max_line_bytes: int) -> None:
        rows: list[tuple[int, int, int, int, bytes, bytes]] = []
        keys: list[tuple[int, bytes, bytes]] = []
        for line in read_lines(self._file, max_line_bytes):
            try:
                if line.raw is None:
                    raise too_long(line.length, max_line_bytes)
                row = parse_row(line.raw)
            except RowError as exc:
                refused = (line.number, line.line, exc.custom_id, exc.code, exc.message)
                self._db.execute("INSERT INTO refused VALUES(?, ?, ?, ?, ?)", refused)
                continue
            work = row.work
            place = (line.number, line.line, line.offset, line.length)
            rows.append((*place, row.id_of(work), name_digest(row.custom_id)))
            keys.append((line.number, order_key(row), work))
            if len(rows) == _ROWS_AT_A_TIME:
                self._add(rows, keys)
        self._add(rows, keys)

    def _add(self, rows: list[tuple[int, int, int, int, bytes, bytes]], keys: list[tuple[int, bytes, bytes]]) -> None:
        self._db.executemany("INSERT INTO rows VALUES(?, ?, ?, ?, ?, ?)", rows)
        self._db.executemany("INSERT INTO keys VALUES(?, ?, ?)", keys)
        rows.clear()
        keys.clear()

    def _refuse_names_given_twice(self) -> None:
        """Answers are told apart by their names, so that only the first row may keep one."""
        self._db.execute(
            "INSERT INTO refused SELECT number, line, NULL, 'duplicate_custom_id',"
            " 'custom_id is that of line ' || first || ' already' FROM"
            " (SELECT number, line, min(line) OVER (PARTITION BY name) AS first FROM rows) WHERE line > first"
        )
        self._db.execute("DELETE FROM rows WHERE number IN (SELECT number FROM refused)")
        self._db.execute("DELETE FROM keys WHERE number IN (SELECT number FROM refused)")

    def _sort(self) -> None:
        self._db.execute("INSERT INTO walk(number, work) SELECT number, work FROM keys ORDER BY key, work, number")
        self._db.execute("DROP TABLE keys")

    # -- answers --
    def take(self, kept: Iterable[Kept]) -> int:
        """Rows that need no answer any more, as they have one; how many these are. What belongs to no row here is left
        aside."""
        with _room():
            self._db.execute("CREATE TABLE kept(id BLOB PRIMARY KEY, offset INT, length INT, failed INT)")
            self._db.executemany("INSERT OR IGNORE INTO kept VALUES(?, ?, ?, ?)", kept)
            self._db.execute(
                "INSERT OR IGNORE INTO answers SELECT number, kept.offset, kept.length, failed FROM rows"
                " JOIN kept USING(id)"
            )
            self._db.execute("DROP TABLE kept")
        return self.num_answered

    def forget(self) -> None:
        """No row has an answer."""
        self._db.execute("DELETE FROM answers")

    def answered(self, number: int, offset: int, length: int, *, failed: bool) -> None:
        """The row's answer lies there."""
        with _room():
            self._db.execute("INSERT INTO answers VALUES(?, ?, ?, ?)", (number, offset, length, failed))

    @property
    def num_answered(self) -> int:
        (count,) = self._one("SELECT count(*) FROM answers")
        return count

    @property
    def num_failed(self) -> int:
        """Of those that have an answer."""
        (count,) = self._one("SELECT count(*) FROM answers WHERE failed")
        return count

    # -- reading it --
    def groups(self) -> Iterator[Group]:
        """Rows without an answer, in the order in which to ask for them. Answers may be added meanwhile."""
        current: Group | None = None
        found = self._db.execute(
            "SELECT place, work FROM walk WHERE NOT EXISTS (SELECT 1 FROM answers WHERE number = walk.number)"
            " ORDER BY place"
        )
        for place, work in found:
            if current is not None and current.work == work:
                current = current._replace(last=place)
                continue
            if current is not None:
                yield current
            current = Group(place, place, work)
        if current is not None:
            yield current

    def rows_of(self, group: Group) -> Iterator[Placed]:
        """Its rows that have no answer. Raises BatchError if the file is not what it was."""
        found = self._db.execute(
            "SELECT number, id, offset, length FROM walk JOIN rows USING(number) WHERE place BETWEEN ? AND ?"
            " AND NOT EXISTS (SELECT 1 FROM answers WHERE number = walk.number) ORDER BY place",
            group[:2],
        )
        for number, row_id, offset, length in found:
            yield Placed(number, row_id, self._row(offset, length, row_id))

    def answered_row(self) -> Placed | None:
        """One that was answered without a failure. Raises BatchError if the file is not what it was."""
        found = self._db.execute(
            "SELECT number, id, rows.offset, rows.length FROM rows JOIN answers USING(number) WHERE NOT failed LIMIT 1"
        ).fetchone()
        if found is None:
            return None
        number, row_id, offset, length = found
        return Placed(number, row_id, self._row(offset, length, row_id))

    def results(self, *, failed: bool) -> Iterator[tuple[int, int] | Refused]:
        """Where the lines of answers lie (offset and length), in the order of the file. failed: of the rows that have
        failed, and the lines that are no rows, instead of those that have not."""
        found = self._db.execute(
            "SELECT number, offset, length, NULL, NULL, NULL, NULL FROM answers WHERE failed = ?1"
            " UNION ALL SELECT number, NULL, NULL, line, custom_id, code, message FROM refused WHERE ?1"
            " ORDER BY number",
            (failed,),
        )
        for number, offset, length, line, custom_id, code, message in found:
            yield (offset, length) if line is None else Refused(number, line, custom_id, code, message)

    def _row(self, offset: int, length: int, row_id: bytes) -> Row:
        try:
            row = parse_row(os.pread(self._file.fileno(), length, offset))
            if row.id_of(row.work) == row_id:
                return row
        except RowError:
            pass
        except OSError as exc:
            raise BatchError(f"{self._path} cannot be read any more: {exc}") from exc
        raise BatchError(f"{self._path} was changed while its rows were answered: leave it as it is, and run again")

    def _one(self, query: str) -> tuple[int, ...]:
        found: tuple[int, ...] = self._db.execute(query).fetchone()
        return found


def _opened(path: Path) -> BinaryIO:
    try:
        if not path.exists():
            raise BatchError(f"there is no file {str(path)!r}")
        if not path.is_file():
            raise BatchError(f"{str(path)!r} is no file: rows are read more than once, so that a pipe does not do")
        return path.open("rb")
    except OSError as exc:
        raise BatchError(f"{str(path)!r} cannot be read: {exc.strerror or exc}") from exc


@contextlib.contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as exc:
        raise BatchError(
            f"the index of the rows cannot be kept: {exc}. It lies in the folder for temporary files: give another one"
            " in SQLITE_TMPDIR"
        ) from exc
