"""SentencePiece model files: a vocabulary, and how text is prepared for it.

Owns the few fields that are read of the file's protobuf messages, whose encoding is parsed here: nothing else needs the
format. Never tokenises; what the fields mean for a text is in `mooli.frontend.sentencepiece_tokenizer`.

Sources: the message definitions of SentencePiece (sentencepiece_model.proto), arXiv 1808.06226; Protocol Buffers,
wire format.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from mooli.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces; GGUF files have the same numbers."""

MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

_MAX_PIECES = 1 << 22
_MAX_PIECE_BYTES = 1 << 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Value = int | bytes


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """pieces, scores, types: of each id. kind: of `MODEL_TYPES`. unk_id, bos_id, eos_id: -1 where there is none.

    normalization, charsmap: the name of the compiled table by which characters are replaced first, and the table, which
    is empty for none. adds_dummy_prefix: a space is
    put before a text. removes_extra_whitespaces: spaces at both ends are dropped, and runs become one.
    """

    pieces: list[str]
    scores: list[float]
    types: list[int]
    kind: str
    byte_fallback: bool
    unk_id: int
    bos_id: int
    eos_id: int
    normalization: str
    charsmap: bytes
    adds_dummy_prefix: bool
    removes_extra_whitespaces: bool
    escapes_whitespaces: bool
    has_whitespace_suffix: bool


def read_sentencepiece(data: bytes, source: str) -> SentencePieceModel:
    """Read a model file. source: what to call it in errors. Raises TokenizerError for what is no such file."""
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    try:
        for number, value in _fields(data):
            if number == 1:
                piece, score, kind = _piece(_as_bytes(value))
                pieces.append(piece)
                scores.append(score)
                types.append(kind)
                if len(pieces) > _MAX_PIECES:
                    raise TokenizerError(f"{source} has more than {_MAX_PIECES} pieces")
            elif number == 2:
                trainer |= dict(_fields(_as_bytes(value)))
            elif number == 3:
                normalizer |= dict(_fields(_as_bytes(value)))
    except (ValueError, IndexError, struct.error) as exc:
        raise TokenizerError(f"{source} is no SentencePiece model: {exc}") from exc
    if not pieces:
        raise TokenizerError(f"{source} is no SentencePiece model: it has no pieces")
    kind_number = _number(trainer, 3, 1)
    if kind_number not in MODEL_TYPES:
        raise TokenizerError(f"{source} is of an unknown kind, {kind_number}; known are {MODEL_TYPES}")
    name, charsmap = normalizer.get(1, b""), normalizer.get(2, b"")
    return SentencePieceModel(
        pieces=pieces,
        scores=scores,
        types=types,
        kind=MODEL_TYPES[kind_number],
        byte_fallback=bool(_number(trainer, 35, 0)),
        unk_id=_number(trainer, 40, 0),
        bos_id=_number(trainer, 41, 1),
        eos_id=_number(trainer, 42, 2),
        normalization=name.decode("utf-8", "replace")[:80] if isinstance(name, bytes) else "",
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        adds_dummy_prefix=bool(_number(normalizer, 3, 1)),
        removes_extra_whitespaces=bool(_number(normalizer, 4, 1)),
        escapes_whitespaces=bool(_number(normalizer, 5, 1)),
        has_whitespace_suffix=bool(_number(trainer, 24, 0)),
    )


def _piece(data: bytes) -> tuple[str, float, int]:
    """(text, score, type) of a piece's message."""
    fields = dict(_fields(data))
    text, score = fields.get(1, b""), fields.get(2, b"\0\0\0\0")
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4:
        raise ValueError("a piece without a text or score")
    if len(text) > _MAX_PIECE_BYTES:
        raise ValueError(f"a piece of {len(text)} bytes")
    kind = _number(fields, 3, NORMAL)
    if not NORMAL <= kind <= BYTE:
        raise ValueError(f"a piece of type {kind}")
    return text.decode("utf-8"), float(struct.unpack("<f", score)[0]), kind


def _number(fields: dict[int, Value], number: int, default: int) -> int:
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise TokenizerError(f"field {number} of a SentencePiece model is not a number")
    return value


def _as_bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a message where there is a number")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """(number, value) of each field of a message: varints as numbers in 32 bits with a sign, all else as bytes."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            value &= 0xFFFFFFFF  # a negative number of 32 bits has been lengthened to 64
            yield key >> 3, value - (1 << 32) if value >= 1 << 31 else value
            continue
        if kind == _BYTES:
            length, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field of wire type {kind}")
        if length > end - at:
            raise ValueError(f"a field of {length} bytes, of which {end - at} are left")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number longer than ten bytes")
