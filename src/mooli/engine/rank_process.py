"""A process that computes one rank of an engine, rank 1 or a later one, and what rank 0, the engine, says to it.

Owns the process's life: open the device, load its part of the model, compute every step it is told of, in that order,
and between steps read and write its part of pages of the KV cache.
What it samples is discarded: rank 0 samples the same from the same logits. Never schedules, never handles text.

When the engine is gone, for whatever reason, the link ends and so does this process, even in the middle of a step.

The messages go over a socket pair: msgpack with a length in front, arrays as type, shape and bytes. Decoding checks
every type and runs no code of the sender's. Source: the MessagePack specification; msgspec's tagged unions.
"""

from __future__ import annotations

import logging
import math
import os
import select
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

import msgspec
import numpy as np
from numpy.typing import NDArray

from mooli.backends import create_backend
from mooli.backends.base import Limits
from mooli.backends.parallel import CommunicationError, ParallelBackend, RankGroup
from mooli.batch import ScheduleBatch
from mooli.config import EngineConfig
from mooli.engine.child import SERVER_SIGNALS
from mooli.errors import EngineError, MooliError
from mooli.logs import set_up_logging
from mooli.models.family import Model
from mooli.models.loader import open_model
from mooli.models.registry import create_model
from mooli.models.sharding import Place, part_checkpoint
from mooli.runner.model_runner import ModelRunner

logger = logging.getLogger(__name__)

PARENT_CHECK_MS = 1000
"""A link can outlive the engine's process, in a process forked from it: so its id is looked at too."""

MOST_REMOVALS = 100
"""Tries to remove the folder in which the ranks met, a hundredth of a second apart."""

MAX_FRAME_BYTES = 2**30

_LENGTH = struct.Struct("<I")


class RankMessage(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Base of all messages. `tag=True`: the kind is the name of the class."""


# -- what is said: to a rank, in this order ----------------------------------------------------------------------------
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


class ReadPages(RankMessage, frozen=True):
    pages: list[int]


class WritePages(RankMessage, frozen=True):
    """data: of this rank's part of the pages, one behind the other, as it was read."""

    pages: list[int]
    data: bytes


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


class PagesRead(RankMessage, frozen=True):
    """Answers `ReadPages`."""

    data: bytes


class Failed(RankMessage, frozen=True):
    """The last message of a rank that breaks down. error: name of the exception's class.

    is_consequence: an operation over all ranks failed, so the cause is more likely another rank's.
    """

    error: str
    message: str
    is_consequence: bool


ToRank = Open | Load | Allocate | Step | ReadPages | WritePages | Stop
FromRank = Opened | Loaded | Allocated | PagesRead | Failed


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


# -- what it does ------------------------------------------------------------------------------------------------------
T = TypeVar("T", bound=RankMessage)


class LinkClosedError(EngineError):
    """The engine is gone, or has said stop."""


def run(connection: socket.socket) -> int:
    """Be the rank that the first message on `connection` asks for. Returns the exit status."""
    try:
        _compute(connection)
    except LinkClosedError as exc:
        logger.debug("the rank ends: %s", exc)
    except BaseException as exc:
        if not isinstance(exc, MooliError):
            logger.exception("a rank has died")
        failed = Failed(
            type(exc).__name__,
            str(exc) or type(exc).__name__,
            is_consequence=isinstance(exc, CommunicationError),
        )
        try:
            connection.sendall(encode(failed))
        except OSError:
            logger.debug("nobody is left to hear of it")
        return 1
    return 0


def _compute(connection: socket.socket) -> None:
    start = _expect(connection, Open)
    config = EngineConfig.from_kwargs(**start.config)
    set_up_logging(config.log_level)
    backend = cast(
        ParallelBackend,
        create_backend(
            config.backend_name,
            dtype=config.dtype,
            quantization=config.quantization,
            num_threads=config.num_threads,
            rank=start.rank,
        ),
    )
    backend.bind_thread()
    _send(connection, Opened())

    _expect(connection, Load)
    backend.join(RankGroup(start.rank, start.size, Path(start.store)))
    available_bytes = backend.memory().available_bytes
    # Nobody takes memory before everybody has looked.
    backend.barrier()
    model = _load(config, Path(start.model_path), backend, Place(start.rank, start.size))
    _send(connection, Loaded(available_bytes, backend.weight_bytes()))

    order = _expect(connection, Allocate)
    spec = model.config.cache_spec(order.page_size, order.kv_dtype)
    backend.allocate(spec, order.num_pages, Limits(order.max_tokens, order.max_rows, order.max_pages_per_row))
    runner = ModelRunner(model, backend, order.vocab_size)
    _send(connection, Allocated())
    try:
        while True:
            told = _expect(connection, RankMessage)
            if isinstance(told, Step):
                runner.execute(told.batch)
            elif isinstance(told, ReadPages):
                _send(connection, PagesRead(backend.read_pages(told.pages).tobytes()))
            elif isinstance(told, WritePages):
                backend.write_pages(told.pages, told.data)
            else:
                raise EngineError(f"a rank that computes was told to {type(told).__name__}")
    except LinkClosedError:
        runner.close()
        raise


def _load(config: EngineConfig, path: Path, backend: ParallelBackend, place: Place) -> Model:
    whole, checkpoint = open_model(
        path,
        load_format=config.load_format,
        overrides=config.model_overrides,
        seed=config.random_seed or 0,
        context=config.context_length,
    )
    try:
        return create_model(whole.part(place.size), part_checkpoint(whole, checkpoint, place), backend)
    finally:
        checkpoint.close()


def _expect(connection: socket.socket, kind: type[T]) -> T:
    """The next message. Raises LinkClosedError if the engine is gone or says stop, EngineError for another message."""
    try:
        message = receive(connection, ToRank)
    except OSError as exc:
        raise LinkClosedError(f"the link to the engine broke: {exc}") from exc
    if message is None or isinstance(message, Stop):
        raise LinkClosedError("the engine has ended")
    if not isinstance(message, kind):
        raise EngineError(f"a rank was told to {type(message).__name__} where {kind.__name__} was expected")
    return message


def _send(connection: socket.socket, message: RankMessage) -> None:
    try:
        connection.sendall(encode(message))
    except OSError as exc:
        raise LinkClosedError(f"the link to the engine broke: {exc}") from exc


def _end_with_engine(connection: socket.socket, engine_pid: int, folder: Path) -> None:
    """End this process when the engine's ends, whatever this one waits for, and leave no folder behind."""
    while not _is_engine_gone(connection, engine_pid, PARENT_CHECK_MS):
        pass
    _remove(folder)
    os._exit(1)


def _remove(folder: Path) -> None:
    """Torch may write the file in it once more between a look into the folder and its removal, so that this fails."""
    for _ in range(MOST_REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.01)


def _is_engine_gone(connection: socket.socket, engine_pid: int, wait_ms: int) -> bool:
    """Whether the engine has ended, or does so in this time."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(wait_ms)) or os.getppid() != engine_pid


def main() -> None:
    """Entry of the process: its arguments are the number of the inherited socket, the id of the engine's process, and
    the folder in which the ranks meet."""
    # A terminal's Ctrl-C goes to all processes of a service. When this one ends is the engine's decision.
    for number in SERVER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SERVER_SIGNALS)
    connection, engine_pid, folder = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3])
    threading.Thread(target=_end_with_engine, args=(connection, engine_pid, folder), daemon=True).start()
    status = run(connection)
    # The folder is the engine's to remove when all ranks have ended: torch reads and writes the file in it once more
    # when a rank leaves its group, and where the file goes in between it waits for it and then aborts the process.
    # A rank that has failed may see the end of the engine's part in the group before the end of its process.
    if _is_engine_gone(connection, engine_pid, PARENT_CHECK_MS if status else 0):
        _remove(folder)
    logging.shutdown()
    # Libraries of devices may wait for other ranks when they are unloaded.
    os._exit(status)
