"""The bytes of a segment and of its index.

Owns formats and checksums: what a header, a record and an index look like, and whether bytes are one. Never opens a
file, and never decides what is kept.

    segment    header, padded | record 0 | record 1 | …          all records of one segment have the same size
    record     head (128 bytes) | tokens | payload | padding to a multiple of 64
    index      header | one entry for each record that counts

All numbers are little-endian. Checksums are CRC-32 (ISO 3309, as in zlib). The head has two: one of itself, so that the
records of a segment can be listed without reading pages, and one of everything.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mooli.cache.store.files import Buffer

FORMAT = 1
"""Part of a folder's name: pages of another format are those of another namespace."""

DIGEST_BYTES = 32
TOKEN_BYTES = 4

_SEGMENT = struct.Struct("<8sIIII32sIQId")
"""Magic, checksum of what follows, format, bytes before the first record, bytes of ingredients, namespace, page_tokens,
page_bytes, slots, created."""
_SEGMENT_MAGIC = b"MooliKVs"
_HEADER_UNIT = 512
MAX_HEADER_BYTES = 1 << 20

_HEAD = struct.Struct("<4sIIId32s32s40x")
"""Magic, checksum of the head from the third field on, checksum of head (from the fourth field on), tokens and
payload, position, written, digest, parent."""
_HEAD_MAGIC = b"MKVr"
HEAD_BYTES = _HEAD.size

_INDEX = struct.Struct("<8sIIIQ32sIQ")
"""Magic, checksum of what follows, format, entries, bytes before the first record, namespace, page_tokens,
page_bytes."""
_INDEX_MAGIC = b"MooliKVi"
_ENTRY = np.dtype(
    [
        ("slot", "<u4"),
        ("position", "<u4"),
        ("written", "<f8"),
        ("used", "<f8"),
        ("digest", "u1", (DIGEST_BYTES,)),
        ("parent", "u1", (DIGEST_BYTES,)),
    ]
)


@dataclass(frozen=True, slots=True)
class PageShape:
    """What all pages of one namespace have in common. namespace: 32 bytes. page_bytes: of a page's payload."""

    namespace: bytes
    page_tokens: int
    page_bytes: int

    @property
    def token_bytes(self) -> int:
        return self.page_tokens * TOKEN_BYTES

    @property
    def record_bytes(self) -> int:
        return -(-(HEAD_BYTES + self.token_bytes + self.page_bytes) // 64) * 64

    def index_bytes(self, num_records: int) -> int:
        return _INDEX.size + num_records * _ENTRY.itemsize


class Header(NamedTuple):
    """Of a segment. start: bytes before the first record. slots: records that there is room for. created: seconds since
    the epoch. ingredients: what the namespace was made of, in words."""

    shape: PageShape
    start: int
    slots: int
    created: float
    ingredients: dict[str, Any]


class Head(NamedTuple):
    """Of a record. position: of the page in its chain, from 0. written: seconds since the epoch."""

    digest: bytes
    parent: bytes
    position: int
    written: float
    checksum: int


class Listed(NamedTuple):
    """A record in an index. used: when it was last used, seconds since the epoch."""

    slot: int
    digest: bytes
    parent: bytes
    position: int
    written: float
    used: float


# -- segments ----------------------------------------------------------------------------------------------------------
def header_bytes(shape: PageShape, slots: int, created: float, ingredients: Mapping[str, Any]) -> bytes:
    """What a segment begins with. Raises ValueError for ingredients of more than a MiB."""
    words = json.dumps(dict(ingredients), sort_keys=True).encode("utf-8", "surrogatepass")
    start = -(-(_SEGMENT.size + len(words)) // _HEADER_UNIT) * _HEADER_UNIT
    if start > MAX_HEADER_BYTES:
        raise ValueError(f"{len(words)} bytes of ingredients are too many for a header")
    fields = (FORMAT, start, len(words), shape.namespace, shape.page_tokens, shape.page_bytes, slots, created)
    whole = bytearray((_SEGMENT.pack(_SEGMENT_MAGIC, 0, *fields) + words).ljust(start, b"\0"))
    struct.pack_into("<I", whole, 8, zlib.crc32(memoryview(whole)[12:]))
    return bytes(whole)


def read_header(data: bytes) -> Header | None:
    """Of the first bytes of a segment; None where they are no header of this format, or not all of it."""
    if len(data) < _SEGMENT.size:
        return None
    magic, checksum, form, start, num_words, namespace, page_tokens, page_bytes, slots, created = _SEGMENT.unpack_from(
        data
    )
    if magic != _SEGMENT_MAGIC or form != FORMAT or not _SEGMENT.size + num_words <= start <= len(data):
        return None
    if zlib.crc32(memoryview(data)[12:start]) != checksum:
        return None
    ingredients = json.loads(data[_SEGMENT.size : _SEGMENT.size + num_words].decode("utf-8", "surrogatepass"))
    return Header(PageShape(namespace, page_tokens, page_bytes), start, slots, created, ingredients)


def header_size(data: bytes) -> int:
    """How many bytes the header has that begins with `data`; 0 where that is no header."""
    if len(data) < _SEGMENT.size or data[:8] != _SEGMENT_MAGIC:
        return 0
    start: int = _SEGMENT.unpack_from(data)[3]
    return start if start <= MAX_HEADER_BYTES else 0


# -- records -----------------------------------------------------------------------------------------------------------
def head_bytes(digest: bytes, parent: bytes, position: int, written: float, tokens: Buffer, payload: Buffer) -> bytes:
    """The head of a record, checksums included."""
    head = bytearray(_HEAD.pack(_HEAD_MAGIC, 0, 0, position, written, digest, parent))
    struct.pack_into("<I", head, 8, _checksum(head, tokens, payload))
    struct.pack_into("<I", head, 4, zlib.crc32(memoryview(head)[8:]))
    return bytes(head)


def read_head(data: bytes | memoryview) -> Head | None:
    """Of the first bytes of a record; None where they are no head."""
    if len(data) < HEAD_BYTES:
        return None
    magic, own, checksum, position, written, digest, parent = _HEAD.unpack_from(data)
    if magic != _HEAD_MAGIC or zlib.crc32(memoryview(data)[8:HEAD_BYTES]) != own:
        return None
    return Head(digest, parent, position, written, checksum)


class Body(NamedTuple):
    """What a record holds, as views of its bytes."""

    head: Head
    tokens: memoryview
    payload: memoryview


def read_record(shape: PageShape, data: bytes | memoryview) -> Body | None:
    """Of the bytes of one record; None where they are not what was once written."""
    view = memoryview(data)
    head = read_head(view)
    end = HEAD_BYTES + shape.token_bytes
    if head is None or len(view) < end + shape.page_bytes:
        return None
    tokens, payload = view[HEAD_BYTES:end], view[end : end + shape.page_bytes]
    if _checksum(view[:HEAD_BYTES], tokens, payload) != head.checksum:
        return None
    return Body(head, tokens, payload)


def _checksum(head: Buffer, tokens: Buffer, payload: Buffer) -> int:
    return zlib.crc32(payload, zlib.crc32(tokens, zlib.crc32(memoryview(head)[12:HEAD_BYTES])))


# -- indexes -----------------------------------------------------------------------------------------------------------
def index_bytes(shape: PageShape, start: int, listed: Sequence[Listed]) -> bytes:
    """The index of a segment whose first record is at `start`."""
    entries: NDArray[Any] = np.zeros(len(listed), _ENTRY)
    if listed:
        entries["slot"] = [one.slot for one in listed]
        entries["position"] = [one.position for one in listed]
        entries["written"] = [one.written for one in listed]
        entries["used"] = [one.used for one in listed]
        for name in ("digest", "parent"):
            joined = b"".join(getattr(one, name) for one in listed)
            entries[name] = np.frombuffer(joined, np.uint8).reshape(-1, DIGEST_BYTES)
    fields = (FORMAT, len(listed), start, shape.namespace, shape.page_tokens, shape.page_bytes)
    whole = bytearray(_INDEX.pack(_INDEX_MAGIC, 0, *fields) + entries.tobytes())
    struct.pack_into("<I", whole, 8, zlib.crc32(memoryview(whole)[12:]))
    return bytes(whole)


def read_index(shape: PageShape, data: bytes) -> tuple[int, list[Listed]] | None:
    """Bytes before the first record, and what is listed; None where this is no index of such pages."""
    if len(data) < _INDEX.size:
        return None
    magic, checksum, form, count, start, namespace, page_tokens, page_bytes = _INDEX.unpack_from(data)
    if magic != _INDEX_MAGIC or form != FORMAT or PageShape(namespace, page_tokens, page_bytes) != shape:
        return None
    if len(data) != shape.index_bytes(count) or zlib.crc32(memoryview(data)[12:]) != checksum:
        return None
    entries = np.frombuffer(data, _ENTRY, count, _INDEX.size)
    columns = [entries[name].tolist() for name in ("slot", "position", "written", "used")]
    digests, parents = (entries[name].tobytes() for name in ("digest", "parent"))
    cuts = [slice(at * DIGEST_BYTES, (at + 1) * DIGEST_BYTES) for at in range(count)]
    return start, [
        Listed(slot, digests[cut], parents[cut], position, written, used)
        for slot, position, written, used, cut in zip(*columns, cuts, strict=True)
    ]
