"""One line of a batch file: what it must be, what makes it the same as another, and beside which others it belongs.

Owns the format (OpenAI's: custom_id, method, url, body), the words for a line that is wrong, and the digests and keys
of a row. Never sends a row, and never reads more of a line than is allowed.

Source: OpenAI API reference, batches and the request input object.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgspec

from mooli.errors import RowError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
"""What a row may ask for."""

NOT_YET = ("/v1/embeddings", "/v1/moderations", "/v1/images/generations", "/v1/audio/transcriptions")
"""What OpenAI's batches have besides."""

MAX_LINE_BYTES = 8 * 2**20
"""Of a line: as a text, more than any context holds."""

MAX_VALUES = 500_000
"""Numbers, texts, lists and objects of a line. A few bytes of JSON are a hundred in memory."""

MAX_ID_CHARS = 512

_ID_BYTES = 16
_SEED_BITS = 31
_BOM = b"\xef\xbb\xbf"

_SPELLED_BYTES = 1024
_PIECE_BYTES = 256
_PIECE_DIGEST_BYTES = 8

_SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank. number: among these, from 0. line: in the file, from 1. offset, length: its bytes in
    the file. raw: None where it is longer than is allowed."""

    number: int
    line: int
    offset: int
    length: int
    raw: bytes | None


@dataclass(frozen=True, slots=True)
class Row:
    """A request. body: a JSON object."""

    custom_id: str
    url: str
    body: dict[str, Any]

    @property
    def work(self) -> bytes:
        """Digest of what is asked for. Rows of the same one get the same answer."""
        return _digest(self.url.encode(), msgspec.json.encode(self.body, order="sorted"))

    def id_of(self, work: bytes) -> bytes:
        """Digest of the row with its name. work: this row's."""
        return _digest(work, self.custom_id.encode())


def read_lines(file: BinaryIO, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """The lines of a file from where it stands, blank ones left out. No more than `max_line_bytes` are kept of one."""
    number = count = 0
    offset = file.tell()
    while True:
        raw = file.readline(max_line_bytes + 1)
        if not raw:
            return
        count += 1
        length = len(raw)
        if length > max_line_bytes and not raw.endswith(b"\n"):
            while more := file.readline(2**20):
                length += len(more)
                if more.endswith(b"\n"):
                    break
            yield Line(number, count, offset, length, None)
            number += 1
        elif raw.strip() and raw.strip() != _BOM:
            yield Line(number, count, offset, length, raw)
            number += 1
        offset += length


def parse_row(raw: bytes) -> Row:
    """The row that a line is. Raises RowError."""
    raw = raw.removeprefix(_BOM)
    _check_size(raw)
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.DecodeError, ValueError) as exc:
        raise RowError("invalid_json", f"the line is not JSON: {exc}") from None
    except RecursionError:
        raise RowError("invalid_json", "the line has lists and objects that are nested too deeply") from None
    if not isinstance(found, dict):
        raise RowError("invalid_request", "the line must be a JSON object with custom_id, method, url and body")
    custom_id = _custom_id(found)
    try:
        return Row(custom_id, _url(found), _body(found))
    except RowError as exc:
        exc.custom_id = custom_id
        raise


def too_long(length: int, max_line_bytes: int) -> RowError:
    """The error of a line that was not kept."""
    return RowError("line_too_long", f"the line has {length} bytes: {max_line_bytes} are the most")


def _check_size(raw: bytes) -> None:
    if _num_marks(raw) > MAX_VALUES:
        outside = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", raw)
        if _num_marks(outside) > MAX_VALUES:
            raise RowError("too_many_values", f"the line has more than {MAX_VALUES} values")


def _num_marks(raw: bytes) -> int:
    return raw.count(b",") + raw.count(b"[") + raw.count(b"{")


def _custom_id(found: Mapping[str, Any]) -> str:
    custom_id = _required(found, "custom_id", str, "a text")
    if not custom_id:
        raise RowError("invalid_request", "custom_id is empty: give each row a name of its own")
    if len(custom_id) > MAX_ID_CHARS:
        raise RowError("invalid_request", f"custom_id has {len(custom_id)} characters: {MAX_ID_CHARS} are the most")
    return str(custom_id)


def _url(found: Mapping[str, Any]) -> str:
    method = _required(found, "method", str, '"POST"')
    if method != "POST":
        raise RowError("invalid_method", f"method={_shown(method)} must be POST")
    url = _required(found, "url", str, f"one of {', '.join(URLS)}")
    if url in URLS:
        return str(url)
    if url in NOT_YET:
        raise RowError("unsupported_url", f"{url} is not supported yet: use one of {', '.join(URLS)}")
    raise RowError("invalid_url", f"url={_shown(url)} is none of {', '.join(URLS)}")


def _body(found: Mapping[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = _required(found, "body", dict, "a JSON object")
    if body.get("stream"):
        raise RowError("invalid_request", "body.stream is set, and a batch has no streams: leave it out")
    return body


def _required(found: Mapping[str, Any], name: str, kind: type, words: str) -> Any:
    if name not in found:
        raise RowError("missing_field", f"{name} is missing: it must be {words}")
    if not isinstance(found[name], kind):
        raise RowError("invalid_request", f"{name} must be {words}, not {_shown(found[name])}")
    return found[name]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def _digest(*parts: bytes) -> bytes:
    found = hashlib.blake2b(digest_size=_ID_BYTES)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()


def name_digest(custom_id: str) -> bytes:
    """Of rows that are called alike."""
    return _digest(custom_id.encode())


def seeded(body: Mapping[str, Any], work: bytes, seed: int) -> dict[str, Any]:
    """`body` with a `seed`, if it brings none: drawn from `seed` and the digest of what it asks for, so that the answer
    depends on nothing that happened before."""
    if body.get("seed") is not None:
        return dict(body)
    drawn = int.from_bytes(_digest(work, str(seed).encode()), "little") & (1 << _SEED_BITS) - 1
    return {**body, "seed": drawn}


# -- what belongs together ---------------------------------------------------------------------------------------------
def order_key(row: Row) -> bytes:
    """Sorted by this, rows whose prompts begin alike stand beside each other, however long what they share is.

    A prompt's head is in it as it is written, and what follows as digests of equal pieces: two prompts that share their
    first N bytes share the key of all pieces that end before N.
    """
    text = "\0".join(_prompt_texts(row)).encode()
    pieces = range(_SPELLED_BYTES, len(text), _PIECE_BYTES)
    digests = (
        hashlib.blake2b(text[start : start + _PIECE_BYTES], digest_size=_PIECE_DIGEST_BYTES).digest()
        for start in pieces
    )
    return text[:_SPELLED_BYTES] + b"".join(digests)


def _prompt_texts(row: Row) -> Iterator[str]:
    """About what a model reads, from its beginning: what keeps caches apart first, and tools as templates put them."""
    body = row.body
    for name in ("model", "cache_salt", "extra_key"):
        yield _text(body.get(name) or "")
    if row.url == "/v1/completions":
        yield _text(body.get("prompt"))
        return
    yield _text(body.get("tools") or "")
    yield _text(body.get("instructions") or "")
    turns = body.get("messages") if row.url == "/v1/chat/completions" else body.get("input")
    if not isinstance(turns, list):
        yield _text(turns)
        return
    for turn in turns:
        if isinstance(turn, dict):
            yield _text(turn.get("role") or turn.get("type") or "")
            yield _text(turn.get("content"))
            others = {name: value for name, value in turn.items() if name not in ("role", "content")}
            if others:
                yield _text(others)
        else:
            yield _text(turn)


def _text(value: Any) -> str:
    """Texts as they are, also where they are the parts of a content; all else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return "\0".join(_part_text(part) for part in value)
    return msgspec.json.encode(value, order="sorted").decode()


def _part_text(part: Any) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    return _text(part) if not isinstance(part, list) else msgspec.json.encode(part).decode()
