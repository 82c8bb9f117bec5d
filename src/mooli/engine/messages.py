"""What the server and its engine process say to each other: one msgpack message a frame, over one stream socket.

Owns the messages and the framing. A frame is its length in bytes (4 bytes, little endian) and a message; a message
is an array whose first entry names its kind. Decoding checks every type and runs no code of the sender's. Never
touches a socket.

Source: the MessagePack specification; msgspec's tagged unions.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from mooli.errors import EngineError
from mooli.scheduler.stats import StepStats
from mooli.types import Request, RequestOutput, SamplingParams

MAX_FRAME_BYTES = 2**30
MAX_SUBMIT_TOKENS = 2**26
"""Of the prompts of one `Submit`, those of samples counted each: well within a frame."""

_LENGTH = struct.Struct("<I")


class Message(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Base of all messages. `tag=True`: the kind is the name of the class."""


# -- from the server ---------------------------------------------------------------------------------------------------
class Start(Message, frozen=True):
    """The first message: what to build. config: keywords of `EngineConfig`."""

    config: dict[str, Any]
    model_path: str
    log_level: str


class Vocabulary(Message, frozen=True):
    """The second, which may come while the engine loads its weights: ids with a text, None without a tokenizer."""

    size: int | None


class WireRequest(msgspec.Struct, array_like=True, frozen=True):
    """`Request`, with its prompt as little-endian int32."""

    rid: str
    prompt: bytes
    sampling: SamplingParams
    eos_ids: frozenset[int]
    return_logprob: bool
    logprob_start: int | None
    num_top_logprobs: int
    logprob_token_ids: tuple[int, ...]
    namespace: str
    priority: int
    client: str = ""

    @classmethod
    def of(cls, request: Request) -> WireRequest:
        return cls(
            rid=request.rid,
            prompt=np.ascontiguousarray(request.prompt_ids, dtype="<i4").tobytes(),
            sampling=request.sampling,
            eos_ids=request.eos_ids,
            return_logprob=request.return_logprob,
            logprob_start=request.logprob_start,
            num_top_logprobs=request.num_top_logprobs,
            logprob_token_ids=request.logprob_token_ids,
            namespace=request.namespace,
            priority=request.priority,
            client=request.client,
        )

    def to_request(self) -> Request:
        return Request(
            rid=self.rid,
            prompt_ids=np.frombuffer(self.prompt, dtype="<i4").astype(np.int32, copy=False),
            sampling=self.sampling,
            eos_ids=self.eos_ids,
            return_logprob=self.return_logprob,
            logprob_start=self.logprob_start,
            num_top_logprobs=self.num_top_logprobs,
            logprob_token_ids=self.logprob_token_ids,
            namespace=self.namespace,
            priority=self.priority,
            client=self.client,
        )


class Submit(Message, frozen=True):
    requests: list[WireRequest]


class Abort(Message, frozen=True):
    """End requests with `abort`; each has one more output. Unknown ids are ignored."""

    rids: list[str]
    reason: str


class Finish(Message, frozen=True):
    """The text side has ended these requests: rid to the stop string it found. Each has one more output."""

    matched: dict[str, str]


class Ask(Message, frozen=True):
    """One of `QUESTIONS`, answered by a `Reply` of the same number between two steps."""

    number: int
    question: str


QUESTIONS = ("ping", "stats", "flush_cache", "check")
"""ping: nothing, as a sign of life. stats: `Scheduler.stats`. flush_cache: whether it was done. check: `None`, or an
error if a page or a request is lost."""


class Stop(Message, frozen=True):
    """End now. Open requests get no further output."""


# -- from the engine process -------------------------------------------------------------------------------------------
class Progress(Message, frozen=True):
    stage: str
    done: int
    total: int


class Ready(Message, frozen=True):
    """The engine is built. facts: the fields of `EngineFacts`."""

    facts: dict[str, Any]


class Failed(Message, frozen=True):
    """The engine could not be built, or has broken down: the last message. error: name of a class of `mooli.errors`, or
    of another exception."""

    error: str
    message: str


class Outputs(Message, frozen=True):
    """What a step brought, after it. stats: `Scheduler.stats` at this moment; step: what it consisted of."""

    outputs: list[RequestOutput]
    stats: dict[str, int]
    step: StepStats


class Refused(Message, frozen=True):
    """A submitted request that cannot be served: it has no outputs. error: name of a class of `mooli.errors`."""

    rid: str
    error: str
    message: str


class Reply(Message, frozen=True):
    number: int
    value: Any
    error: str | None = None


ToEngine = Start | Vocabulary | Submit | Abort | Finish | Ask | Stop
ToServer = Progress | Ready | Failed | Outputs | Refused | Reply


def encode(message: Message) -> bytes:
    """A whole frame."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


_encoder = msgspec.msgpack.Encoder()


class Frames:
    """Cuts a stream of bytes into messages of one direction. Raises EngineError for bytes that are none."""

    def __init__(self, direction: Any) -> None:
        """direction: `ToEngine` or `ToServer`."""
        self._decoder = msgspec.msgpack.Decoder(direction)
        self._buffer = bytearray()

    def push(self, data: bytes) -> Iterator[Any]:
        """The messages that `data` completes."""
        self._buffer += data
        position = 0
        try:
            while len(self._buffer) - position >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer, position)
                if length > MAX_FRAME_BYTES:
                    raise EngineError(f"a frame of {length} bytes came between server and engine: the stream is broken")
                end = position + _LENGTH.size + length
                if len(self._buffer) < end:
                    break
                body = bytes(self._buffer[position + _LENGTH.size : end])
                position = end
                yield self._decode(body)
        finally:
            del self._buffer[:position]

    def _decode(self, body: bytes) -> Any:
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, msgspec.ValidationError) as exc:
            raise EngineError(f"a message between server and engine cannot be read: {exc}") from exc
