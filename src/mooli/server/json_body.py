"""A body's JSON as the type of its route, at a price that has bounds.

Owns what of a body becomes objects: the fields of the type, and short values of the names that the route asks for; all
else is read over. Depth and the number of values are counted before anything is made of them: a few bytes of JSON are a
hundred in memory, and who reads them does not let go of the interpreter until the end. Never reads a socket, and never
knows what a field means.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mooli.server.routing import LONG_VALUE, HttpError

MAX_DEPTH = 64
"""Lists and objects inside each other. Whatever walks through values may call itself so often."""

LONG_BODY_BYTES = 64 * 1024
"""Bodies from here on are read on another thread."""

SHORT_VALUE_BYTES = 256
"""A value that asks for nothing is not longer; more of a field that no type has is not kept."""

_PIECE_BYTES = 2**20
_QUOTE = ord('"')
_BYTES = np.arange(256)
_STEPS = np.isin(_BYTES, [*b"[{"]).astype(np.int8) - np.isin(_BYTES, [*b"]}"]).astype(np.int8)
_BEGINS_VALUE = np.isin(_BYTES, [*b"[{,"])

_JSON_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}

_MARKS = re.compile(rb'"([^"]*)"\s*:|"[^"]*"|[\[{]|[\]}]')
"""A key, another string, an opening, a closing; in JSON without escapes."""


async def read_body(
    raw: bytes, body_type: type[msgspec.Struct], names: Iterable[str], max_values: int
) -> tuple[msgspec.Struct, Mapping[str, Any]]:
    """The body as its type, and what it says under `names`, which the type does not have: LONG_VALUE for a long value.

    Raises HttpError (400) for what is no JSON object, for a value of a wrong type, naming the field, and for one that
    is nested too deeply; HttpError (413) for more than `max_values` numbers, texts, lists and objects.
    """
    if len(raw) < LONG_BODY_BYTES:
        return _read(raw, body_type, frozenset(names), max_values)
    return await asyncio.to_thread(_read, raw, body_type, frozenset(names), max_values)


def _read(
    raw: bytes, body_type: type[msgspec.Struct], names: frozenset[str], max_values: int
) -> tuple[msgspec.Struct, Mapping[str, Any]]:
    _check_size(raw, max_values)
    try:
        return msgspec.json.decode(raw, type=body_type), _short_values(raw, names)
    except msgspec.ValidationError as exc:
        raise _wrong_type(str(exc)) from None
    except ValueError as exc:
        raise HttpError(400, f"The body is not valid JSON: {exc}") from None


def _short_values(raw: bytes, names: frozenset[str]) -> Mapping[str, Any]:
    if not names:
        return {}
    found = msgspec.json.decode(raw, type=_slices_type(names))
    values: dict[str, Any] = {}
    for name in names:
        value = bytes(getattr(found, name))
        if value:
            values[name] = msgspec.json.decode(value) if len(value) <= SHORT_VALUE_BYTES else LONG_VALUE
    return values


@lru_cache(maxsize=64)
def _slices_type(names: frozenset[str]) -> type[msgspec.Struct]:
    """A type that has the JSON of `names` and of nothing else."""
    return msgspec.defstruct("Slices", [(name, msgspec.Raw, msgspec.Raw()) for name in sorted(names)])


def _wrong_type(words: str) -> HttpError:
    """msgspec's words, with JSON's names of types, and with the path in front as clients write it."""
    words, _, path = words.partition(" - at ")
    words = re.sub(r"\b(str|int|float|bool)\b", lambda match: _JSON_TYPES[match[0]], words)
    match = re.search(r"\$\.?([^`]*)", path)
    where = match.group(1) if match else ""
    if not where and words.startswith("Expected `object`"):
        return HttpError(400, "The body must be a JSON object.")
    missing = re.search(r"missing required field `([^`]*)`", words)
    field = (re.match(r"[^.\[]*", where) or [""])[0] or (missing.group(1) if missing else None)
    message = f"{where}: {words}" if where else words
    return HttpError(400, message.replace("`", ""), param=field or None)


# -- how much it is ----------------------------------------------------------------------------------------------------
def _check_size(raw: bytes, max_values: int) -> None:
    """Raises HttpError. Looks closely only at bodies that have so many brackets and commas that it could be too much:
    those may still be inside of strings."""
    num_open = raw.count(b"[") + raw.count(b"{")
    if num_open <= MAX_DEPTH and num_open + raw.count(b",") <= max_values:
        return
    # Without escapes each quote begins or ends a string.
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    depth = num_values = num_quotes = 0
    for start in range(0, len(plain), _PIECE_BYTES):
        piece = np.frombuffer(plain, np.uint8, min(_PIECE_BYTES, len(plain) - start), start)
        quotes = np.cumsum(piece == _QUOTE, dtype=np.int32) + num_quotes
        outside = (quotes & 1) == 0
        num_quotes = int(quotes[-1]) & 1
        num_values += int(np.count_nonzero(_BEGINS_VALUE[piece] & outside))
        if num_values > max_values:
            raise HttpError(
                413,
                f"The body has more than the {max_values} values (numbers, texts, lists, objects) that are read in one"
                " request: send it in several.",
            )
        levels: NDArray[np.int32] = np.cumsum(_STEPS[piece] * outside, dtype=np.int32) + depth
        deep = levels > MAX_DEPTH
        if deep.any():
            field = _field_at(plain, start + int(deep.argmax()))
            raise HttpError(
                400,
                f"{field or 'The body'} is nested too deeply: JSON of at most {MAX_DEPTH} lists and objects inside each"
                " other is read.",
                param=field,
            )
        depth = int(levels[-1])


def _field_at(plain: bytes, end: int) -> str | None:
    """The field of the outermost object to which the value at `end` belongs."""
    field, depth = None, 0
    for match in _MARKS.finditer(plain, 0, end):
        if match[0] in (b"[", b"{"):
            depth += 1
        elif match[0] in (b"]", b"}"):
            depth -= 1
        elif depth == 1 and match[1] is not None:
            field = match[1][:64].decode("utf-8", "replace")
    return field


def num_entries(value: Any) -> int:
    """Of all lists and objects in a JSON value together."""
    count, rest = 0, [value]
    while rest:
        item = rest.pop()
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        count += len(inner)
        rest.extend(inner)
    return count


def check_count(name: str, count: int, most: int) -> None:
    """Raises HttpError (400) for a list that is longer than one request may have it."""
    if count > most:
        raise HttpError(
            400, f"{name} has {count} entries, and at most {most} are taken in one request: send fewer", param=name
        )


# -- memory ------------------------------------------------------------------------------------------------------------
class BodyRoom:
    """Memory for bodies that are being read: many long ones at a time could take all there is."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0

    def share(self) -> BodyShare:
        """For one body; a context manager, which gives back what was taken."""
        return BodyShare(self)


class BodyShare:
    """What one body has of a `BodyRoom`."""

    def __init__(self, room: BodyRoom) -> None:
        self._room = room
        self._num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Raises HttpError (503) if there is not that much."""
        if self._room.num_bytes + num_bytes > self._room.max_bytes:
            raise HttpError(503, "The server is reading too many long requests.")
        self._room.num_bytes += num_bytes
        self._num_bytes += num_bytes

    def __enter__(self) -> BodyShare:
        return self

    def __exit__(self, *_: object) -> None:
        self._room.num_bytes -= self._num_bytes
        self._num_bytes = 0
