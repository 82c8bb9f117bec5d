"""What the engine and the processes of its other ranks say to each other, over a socket pair each.

Owns the messages and their encoding: msgpack with a length in front, arrays as type, shape and bytes. Decoding checks
every type and runs no code of the sender's. The engine is rank 0; the others are told of every step before it begins.

Source: the MessagePack specification; msgspec's tagged unions.
"""

from __future__ import annotations

import math
import socket
import struct
from typing import Any, get_args, get_origin

import msgspec
import numpy as np
from numpy.typing import NDArray

from mooli.batch import ScheduleBatch
from mooli.errors import EngineError

MAX_FRAME_BYTES = 2**30

_LENGTH = struct.Struct("<I")


class RankMessage(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Base of all messages. `tag=True`: the kind is the name of the class."""


# -- to a rank, in this order ------------------------------------------------------------------------------------------
class Open(RankMessage, frozen=True):
    """What to compute and where. config: keywords of `EngineConfig`. store: see `RankGroup`."""

    rank: int
    size: int
    store: str
    config: dict[str, Any]
    model_path: str


class Load(RankMessage, frozen=True):
    """Meet the other ranks, then load."""


class Allocate(RankMessage, frozen=True):
    """The KV pool, the same on every rank, the largest step (`Limits`), and the ids that may be sampled."""

    kv_dtype: str
    page_size: int
    num_pages: int
    max_tokens: int
    max_rows: int
    max_pages_per_row: int
    vocab_size: int


class Step(RankMessage, frozen=True):
    batch: ScheduleBatch


class Stop(RankMessage, frozen=True):
    """End now."""


# -- from a rank -------------------------------------------------------------------------------------------------------
class Opened(RankMessage, frozen=True):
    """Answers `Open`: the device is there."""


class Loaded(RankMessage, frozen=True):
    """Answers `Load`. available_bytes: of the device before loading."""

    available_bytes: int
    weight_bytes: int


class Allocated(RankMessage, frozen=True):
    """Answers `Allocate`: steps can come."""


class Failed(RankMessage, frozen=True):
    """The last message of a rank that breaks down. error: name of the exception's class.

    is_consequence: an operation over all ranks failed, so the cause is more likely another rank's.
    """

    error: str
    message: str
    is_consequence: bool


ToRank = Open | Load | Allocate | Step | Stop
FromRank = Opened | Loaded | Allocated | Failed


def encode(message: RankMessage) -> bytes:
    """A whole frame. Raises EngineError for one that is too long."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise EngineError(f"a step of {len(body)} bytes is more than ranks are told at once")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes, direction: Any) -> Any:
    """A message of `direction`, ToRank or FromRank. Raises EngineError for bytes that are none."""
    try:
        return _decoders[direction].decode(body)
    except (msgspec.DecodeError, msgspec.ValidationError) as exc:
        raise EngineError(f"a message between ranks cannot be read: {exc}") from exc


def receive(connection: socket.socket, direction: Any) -> Any | None:
    """The next message, waiting for it; None when the other end has closed. Raises EngineError, OSError."""
    head = _read(connection, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise EngineError(f"a frame of {length} bytes came between ranks: the stream is broken")
    body = _read(connection, length)
    return None if body is None else decode(body, direction)


def _read(connection: socket.socket, count: int) -> bytes | None:
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = connection.recv_into(view[done:])
        if not got:
            return None
        done += got
    return bytes(data)


def _encode_array(value: Any) -> tuple[str, tuple[int, ...], bytes]:
    if not isinstance(value, np.ndarray):
        raise NotImplementedError(f"{type(value).__name__} cannot be sent to a rank")
    return value.dtype.str, value.shape, value.tobytes()


def _decode_array(kind: Any, value: Any) -> NDArray[Any]:
    """From type, shape and bytes, of the type that the annotation `kind` (NDArray[np.int32]) demands."""
    if get_origin(kind) is not np.ndarray:
        raise NotImplementedError(f"{kind} cannot be received")
    expected = np.dtype(get_args(get_args(kind)[1])[0])
    dtype, shape, data = msgspec.convert(value, tuple[str, tuple[int, ...], bytes])
    if dtype != expected.str or min(shape, default=0) < 0 or math.prod(shape) * expected.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes are no {expected.name} array of shape {shape}")
    # A copy, as an array over bytes could not be written to.
    array: NDArray[Any] = np.frombuffer(data, expected).reshape(shape).copy()
    return array


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {
    direction: msgspec.msgpack.Decoder(direction, dec_hook=_decode_array) for direction in (ToRank, FromRank)
}
