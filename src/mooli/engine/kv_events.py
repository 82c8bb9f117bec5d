"""KV events over ZMQ: which pages the cache has, for routers that send requests to where their prompts are.

Owns what is on the wire: frames, numbers and messages as SGLang and vLLM have them, the buffer for who missed some, and
the thread that sends. Events hold token ids, so what users wrote: nothing is sent unless it is configured, and the
address is this machine's own by default. The engine never waits: what cannot be queued is dropped, which a gap in the
numbers shows.

    published    topic, sequence (8 bytes, big-endian, from 0), msgpack of [seconds, [event, …], rank]
    asked again  "", first sequence   →   "", topic, sequence, payload for each that is kept   →   "", "", 2^64 - 1, ""

Source: the formats that SGLang and vLLM publish (`kv_events.py` of both).
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import msgspec

from mooli.cache.page_events import AllCleared, PageEvent, PagesStored
from mooli.errors import ConfigError

if TYPE_CHECKING:
    import zmq

logger = logging.getLogger(__name__)

MOST_EVENTS = 512
"""In one message."""

LOOK_S = 0.1
"""So often, while there is nothing to send, it is looked whether somebody asks again."""

END = b"\xff" * 8
MEDIUM = "GPU"
"""What both call the memory that steps compute in, wherever it is."""

_BOUND_HOSTS = ("*", "0.0.0.0", "::", "[::]", "127.", "localhost", "[::1]", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvEventsConfig:
    """What `kv_events_config` says.

    enable_kv_cache_events, or publisher "null": whether anything is sent. endpoint, replay_endpoint: bound where they
    name this machine, else connected to. buffer_steps: messages kept for who asks again. hwm, max_queue_size: messages
    and events that may wait. encoding: events as maps, or as arrays that begin with their type, as older routers read
    them. block_hash: of 64 bits, or all 32 bytes.
    """

    enable_kv_cache_events: bool = True
    publisher: str = "zmq"
    endpoint: str = "tcp://127.0.0.1:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""
    encoding: str = "map"
    block_hash: str = "int64"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> KvEventsConfig:
        """Raises ConfigError for a name or a value that is not known."""
        known = {item.name: item for item in fields(cls)}
        for name, value in given.items():
            if name not in known:
                raise ConfigError(f"kv_events_config has {name!r}: it knows {', '.join(known)}")
            default = known[name].default
            wanted: tuple[type, ...] = (str, type(None)) if name == "replay_endpoint" else (type(default),)
            if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
                raise ConfigError(f"kv_events_config.{name}={value!r} must be of type {wanted[0].__name__}")
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ConfigError(f"kv_events_config.{name}={value} must be at least 1")
        config = cls(**given)
        for name, choices in (
            ("publisher", ("zmq", "null")), ("encoding", ("map", "array")), ("block_hash", ("int64", "bytes")),
        ):  # fmt: skip
            if getattr(config, name) not in choices:
                raise ConfigError(f"kv_events_config.{name}={getattr(config, name)!r} is none of {', '.join(choices)}")
        return config

    @property
    def is_on(self) -> bool:
        return self.enable_kv_cache_events and self.publisher != "null"


class EventEncoder:
    """Events as messages of one of both forms. page_size: tokens of a page."""

    def __init__(self, config: KvEventsConfig, page_size: int) -> None:
        self._is_map = config.encoding == "map"
        self._has_bytes = config.block_hash == "bytes"
        self._page_size = page_size
        self._encoder = msgspec.msgpack.Encoder()

    def payload(self, seconds: float, events: list[PageEvent]) -> bytes:
        return self._encoder.encode([seconds, [self._written(event) for event in events], 0])

    def _written(self, event: PageEvent) -> Any:
        if isinstance(event, AllCleared):
            return self._shaped("AllBlocksCleared", {})
        hashes = [self._hash(digest) for digest in event.digests]
        if not isinstance(event, PagesStored):
            return self._shaped("BlockRemoved", {"block_hashes": hashes, "medium": MEDIUM})
        stored = {
            "block_hashes": hashes,
            "parent_block_hash": None if event.parent is None else self._hash(event.parent),
            "token_ids": event.token_ids,
            "block_size": self._page_size,
            "lora_id": None,
            "medium": MEDIUM,
            "lora_name": None,
            # Only the digest of a tenant and a salt is in a namespace.
            "cache_salt": event.namespace.partition("/")[2] or None,
        }
        return self._shaped("BlockStored", stored)

    def _shaped(self, kind: str, values: dict[str, Any]) -> Any:
        return {"type": kind, **values} if self._is_map else [kind, *values.values()]

    def _hash(self, digest: bytes) -> int | bytes:
        return digest if self._has_bytes else int.from_bytes(digest[:8], "big", signed=True)


class KvEventPublisher:
    """Sends what `take` is given, from a thread of its own. Raises ConfigError where the sockets cannot be had."""

    def __init__(self, config: KvEventsConfig, page_size: int) -> None:
        try:
            import zmq
        except ImportError as exc:
            raise ConfigError("kv_events_config needs pyzmq: pip install 'mooli[events]'") from exc
        self._config = config
        self._encoder = EventEncoder(config, page_size)
        self._events: queue.Queue[PageEvent | None] = queue.Queue(config.max_queue_size)
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_steps)
        self._next = 0
        self._num_dropped = 0
        self._context = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        try:
            self._pub = self._open(zmq.PUB, config.endpoint)
            self._replay = None if config.replay_endpoint is None else self._open(zmq.ROUTER, config.replay_endpoint)
        except zmq.ZMQError as exc:
            self._close_sockets()
            raise ConfigError(
                f"kv_events_config: {config.endpoint} or the replay endpoint cannot be used: {exc}"
            ) from exc
        self.endpoint = self._pub.getsockopt_string(zmq.LAST_ENDPOINT)
        self.replay_endpoint = None if self._replay is None else self._replay.getsockopt_string(zmq.LAST_ENDPOINT)
        self._thread = threading.Thread(target=self._run, name="mooli-kv-events", daemon=True)
        self._thread.start()
        logger.info("KV events are published at %s", self.endpoint)

    def take(self, event: PageEvent) -> None:
        """Queue an event; where there is no room it is dropped, and the next message's number is one higher for it."""
        try:
            self._events.put_nowait(event)
        except queue.Full:
            if not self._num_dropped:
                logger.warning("KV events are dropped: %d wait to be sent", self._config.max_queue_size)
            self._num_dropped += 1

    def close(self) -> None:
        """Send what is queued, and give the sockets back. May be called again."""
        if self._thread.is_alive():
            self._events.put(None)
            self._thread.join()

    def _open(self, kind: int, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        self._sockets.append(socket)
        socket.set_hwm(self._config.hwm)
        socket.linger = 500  # milliseconds, for what is on its way when it ends
        if is_bound(endpoint):
            socket.bind(endpoint)
        else:
            socket.connect(endpoint)
        return socket

    def _close_sockets(self) -> None:
        for socket in self._sockets:
            socket.close()
        self._context.term()

    def _run(self) -> None:
        try:
            while True:
                self._answer_replays()
                events = self._wait()
                sent = [event for event in events if event is not None]
                if sent:
                    self._send(sent)
                if len(sent) < len(events):
                    return
        except Exception:
            logger.exception("KV events end here; requests go on")
        finally:
            self._close_sockets()

    def _wait(self) -> list[PageEvent | None]:
        """What is queued, at most so many events; None among them for the end. Empty after a while without any."""
        events: list[PageEvent | None] = []
        with contextlib.suppress(queue.Empty):
            events.append(self._events.get(timeout=LOOK_S))
            while events[-1] is not None and len(events) < MOST_EVENTS:
                events.append(self._events.get_nowait())
        return events

    def _send(self, events: list[PageEvent]) -> None:
        if self._num_dropped:
            self._num_dropped = 0
            self._next += 1  # whoever counts sees that something is missing
        payload = self._encoder.payload(time.time(), events)
        self._kept.append((self._next, payload))
        self._pub.send_multipart((self._config.topic.encode(), self._next.to_bytes(8, "big"), payload))
        self._next += 1

    def _answer_replays(self) -> None:
        while self._replay is not None and self._replay.poll(0):
            frames = self._replay.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                logger.warning("a request for KV events is not understood: %d frames", len(frames))
                continue
            client, _, first = frames
            for number, payload in self._kept:
                if number >= int.from_bytes(first, "big"):
                    topic = self._config.topic.encode()
                    self._replay.send_multipart((client, b"", topic, number.to_bytes(8, "big"), payload))
            self._replay.send_multipart((client, b"", b"", END, b""))


def is_bound(endpoint: str) -> bool:
    """Whether it names this machine, so that others connect to it."""
    kind, _, place = endpoint.partition("://")
    return kind in ("ipc", "inproc") or place.startswith(_BOUND_HOSTS)
