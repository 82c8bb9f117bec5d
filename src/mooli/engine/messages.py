"""What the server and its engine process say to each other: one msgpack message a frame, over one stream socket.

Owns the messages and the framing. A frame is its length in bytes (4 bytes, little endian) and a message; a message
is an array whose first entry names its kind. Decoding checks every type and runs no code of the sender's. Never
touches a socket.

Source: the MessagePack specification; msgspec's tagged unions.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mooli.errors import EngineError, RequestError
from mooli.scheduler.stats import StepStats
from mooli.types import Pin, Request, RequestOutput, SamplingParams, TokenBytes

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


class Tokens(Message, frozen=True):
    """What grammars must know of the vocabulary: before the first request that has one."""

    vocabulary: TokenBytes


class WireShared(msgspec.Struct, array_like=True, frozen=True):
    """What requests of one call have in common, most of them of any size: sent once. sampling: without stop strings,
    which are the text side's; its seed and lengths are each request's own."""

    sampling: SamplingParams
    eos_ids: frozenset[int]
    return_logprob: bool
    num_top_logprobs: int
    logprob_token_ids: tuple[int, ...]
    namespace: str
    priority: int
    client: str
    is_background: bool
    no_store: bool
    wants_cache_end: bool
    pins: tuple[Pin, ...]
    session: str
    previous: str


class WireRequest(msgspec.Struct, array_like=True, frozen=True):
    """The rest of a `Request`. name: its `rid` in the engine. prompt, key, shared: where they are in `Submit`."""

    name: str
    prompt: int
    key: int | None
    shared: int
    seed: int
    max_new_tokens: int | None
    min_new_tokens: int
    logprob_start: int | None


class Submit(Message, frozen=True):
    """prompts: as little-endian int32, and `key_ids` of those that have them."""

    requests: list[WireRequest]
    prompts: list[bytes]
    shared: list[WireShared]

    @classmethod
    def of(cls, named: Iterable[tuple[str, Request]]) -> Submit:
        """What equal neighbours share goes once, as the samples of one prompt and the prompts of one call do."""
        requests: list[WireRequest] = []
        prompts: list[bytes] = []
        shared: list[WireShared] = []
        last_prompt, last_key, last_shared = None, None, None
        prompt = key = 0
        for name, request in named:
            if request.prompt_ids is not last_prompt:
                last_prompt, prompt = request.prompt_ids, len(prompts)
                prompts.append(np.ascontiguousarray(last_prompt, dtype="<i4").tobytes())
            if request.key_ids is not None and request.key_ids is not last_key:
                last_key, key = request.key_ids, len(prompts)
                prompts.append(np.ascontiguousarray(last_key, dtype="<i4").tobytes())
            common = _common(request)
            if common != last_shared:
                last_shared = common
                shared.append(_shared(request))
            sampling = request.sampling
            requests.append(
                WireRequest(
                    name=name,
                    prompt=prompt,
                    key=None if request.key_ids is None else key,
                    shared=len(shared) - 1,
                    seed=sampling.seed,
                    max_new_tokens=sampling.max_new_tokens,
                    min_new_tokens=sampling.min_new_tokens,
                    logprob_start=request.logprob_start,
                )
            )
        return cls(requests, prompts, shared)

    def to_requests(self) -> list[Request]:
        prompts = [np.frombuffer(prompt, dtype="<i4").astype(np.int32, copy=False) for prompt in self.prompts]
        return [self._request(wire, prompts, self.shared[wire.shared]) for wire in self.requests]

    @staticmethod
    def _request(wire: WireRequest, prompts: list[NDArray[np.int32]], shared: WireShared) -> Request:
        return Request(
            rid=wire.name,
            prompt_ids=prompts[wire.prompt],
            key_ids=None if wire.key is None else prompts[wire.key],
            sampling=replace(
                shared.sampling,
                seed=wire.seed,
                max_new_tokens=wire.max_new_tokens,
                min_new_tokens=wire.min_new_tokens,
            ),
            eos_ids=shared.eos_ids,
            return_logprob=shared.return_logprob,
            logprob_start=wire.logprob_start,
            num_top_logprobs=shared.num_top_logprobs,
            logprob_token_ids=shared.logprob_token_ids,
            namespace=shared.namespace,
            priority=shared.priority,
            client=shared.client,
            is_background=shared.is_background,
            no_store=shared.no_store,
            wants_cache_end=shared.wants_cache_end,
            pins=shared.pins,
            session=shared.session,
            previous=shared.previous,
        )


_OWN_SAMPLING = ("seed", "max_new_tokens", "min_new_tokens", "stop")
_common = operator.attrgetter(
    *(f"sampling.{item.name}" for item in fields(SamplingParams) if item.name not in _OWN_SAMPLING),
    *(name for name in WireShared.__struct_fields__ if name != "sampling"),
)
"""A tuple of all that `WireShared` holds, which compares quickly where two requests hold the same objects."""


def _shared(request: Request) -> WireShared:
    return WireShared(
        sampling=replace(request.sampling, seed=0, max_new_tokens=None, min_new_tokens=0, stop=()),
        eos_ids=request.eos_ids,
        return_logprob=request.return_logprob,
        num_top_logprobs=request.num_top_logprobs,
        logprob_token_ids=request.logprob_token_ids,
        namespace=request.namespace,
        priority=request.priority,
        client=request.client,
        is_background=request.is_background,
        no_store=request.no_store,
        wants_cache_end=request.wants_cache_end,
        pins=request.pins,
        session=request.session,
        previous=request.previous,
    )


class Abort(Message, frozen=True):
    """End requests with `abort`; each has one more output. Unknown names are ignored."""

    names: list[str]
    reason: str


class Finish(Message, frozen=True):
    """The text side has ended these requests: name to the stop string it found. Each has one more output."""

    matched: dict[str, str]


class Ask(Message, frozen=True):
    """One of the questions of `EngineCore.answer`, answered by a `Reply` of the same number between two steps. details:
    what else it says."""

    number: int
    question: str
    details: dict[str, Any] = {}


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
    """What a step brought, after it; `rid` is the name. stats: `Scheduler.stats` at this moment; step: what it was."""

    outputs: list[RequestOutput]
    stats: dict[str, int]
    step: StepStats


class Refused(Message, frozen=True):
    """A submitted request that cannot be served: it has no outputs from here on. error: name of a class of
    `mooli.errors`."""

    name: str
    error: str
    message: str


class Reply(Message, frozen=True):
    number: int
    value: Any
    error: str | None = None


ToEngine = Start | Vocabulary | Tokens | Submit | Abort | Finish | Ask | Stop
ToServer = Progress | Ready | Failed | Outputs | Refused | Reply


def encode(message: Message) -> bytes:
    """A whole frame. Raises RequestError if it is larger than the other side takes; ValueError or OverflowError if it
    cannot be written."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise RequestError(
            f"{len(body)} bytes are more than the {MAX_FRAME_BYTES} that go to or from the engine at once"
        )
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
