"""KV events: read by a decoder that knows the wire alone, they say at any moment which full pages the cache has."""

from __future__ import annotations

import hashlib
import random
import struct
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from test_cache_ends import PAGE, Traffic

from mooli.cache.page_events import AllCleared, PageEvent, PagesRemoved, PagesStored
from mooli.cache.page_hash import root_of
from mooli.config import EngineConfig
from mooli.engine import build
from mooli.engine.kv_events import EventEncoder, KvEventPublisher, KvEventsConfig, is_bound
from mooli.errors import ConfigError

TIMEOUT_MS = 20_000


class Reader:
    """What a router knows. Written from the table of the formats: type first in arrays, by name in maps."""

    FIELDS = (
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
        "cache_salt",
    )

    def __init__(self) -> None:
        self.pages: dict[Any, tuple[Any, tuple[int, ...], str | None]] = {}
        """By hash: that of the page before, the tokens, the salt."""
        self.next = 0

    def read(self, sequence: bytes, payload: bytes) -> None:
        (number,) = struct.unpack(">Q", sequence)
        assert number == self.next, "none is missing"
        self.next += 1
        seconds, events, rank = msgspec.msgpack.decode(payload)
        assert seconds > 1e9 and rank == 0 and events
        for event in events:
            self._apply(event)

    def _apply(self, event: Any) -> None:
        if isinstance(event, dict):
            kind = event["type"]
        else:
            kind, *values = event
            names = self.FIELDS if kind == "BlockStored" else ("block_hashes", "medium")
            event = dict(zip(names, values, strict=True)) if values else {}
        if kind == "AllBlocksCleared":
            self.pages.clear()
        elif kind == "BlockRemoved":
            for name in event["block_hashes"]:
                assert not any(parent == name for parent, _, _ in self.pages.values()), "those behind go first"
                del self.pages[name]
        else:
            assert kind == "BlockStored" and event["block_size"] == PAGE and event["medium"] == "GPU"
            parent, ids = event["parent_block_hash"], event["token_ids"]
            assert len(ids) == PAGE * len(event["block_hashes"]) and (parent is None or parent in self.pages)
            for i, name in enumerate(event["block_hashes"]):
                assert name not in self.pages, "told once"
                self.pages[name] = (parent, tuple(ids[i * PAGE : (i + 1) * PAGE]), event["cache_salt"])
                parent = name


def pages_of(traffic: Traffic) -> dict[bytes, tuple[int, ...]]:
    """The full pages in the tree by their names, worked out here."""
    found: dict[bytes, tuple[int, ...]] = {}
    for root in traffic.cache._tree._roots.values():
        stack = [(root, root_of(b"", root.namespace))]
        while stack:
            node, name = stack.pop()
            for at in range(0, len(node.key) - 4 * PAGE + 1, 4 * PAGE):
                ids = np.frombuffer(node.key, ">i4", PAGE, at)
                name = hashlib.sha256(name + ids.astype("<u4").tobytes()).digest()
                found[name] = tuple(ids.tolist())
            stack += [(child, name) for child in node.children.values()]
    return found


@pytest.mark.parametrize(("encoding", "block_hash"), [("map", "int64"), ("array", "bytes")])
def test_whoever_reads_all_events_knows_the_full_pages_of_the_tree(encoding: str, block_hash: str) -> None:
    rng = random.Random(encoding)
    traffic = Traffic(rng, 40)
    events: list[PageEvent] = []
    traffic.cache.tell(events.append)
    encoder = EventEncoder(KvEventsConfig.of({"encoding": encoding, "block_hash": block_hash}), PAGE)
    reader, stems, num_removed = Reader(), [traffic.prompt() for _ in range(4)], 0
    for number in range(150):
        stem = rng.choice(stems)
        prompt = [*stem[: rng.randint(0, len(stem))], *traffic.prompt(low=2, high=20)]
        traffic.add(prompt, namespace=rng.choice(["n", "n", "n/salt"]), max_new_tokens=rng.randrange(6))
        for _ in range(rng.randrange(3)):
            traffic.step()
        if number % 40 == 39:
            while traffic.core.has_work:
                traffic.step()
            assert traffic.core.flush_cache() and events[-1] == AllCleared()
        if events:
            num_removed += sum(isinstance(event, PagesRemoved) for event in events)
            reader.read(struct.pack(">Q", reader.next), encoder.payload(1.7e9, events))
            events.clear()
        wanted = pages_of(traffic)
        named = {
            name if block_hash == "bytes" else struct.unpack(">q", name[:8])[0]: ids for name, ids in wanted.items()
        }
        assert {name: ids for name, (_, ids, _) in reader.pages.items()} == named
    assert num_removed > 20, "pages were evicted"
    assert {salt for _, _, salt in reader.pages.values()} <= {None, "salt"}


def test_a_request_whose_values_are_not_to_be_trusted_takes_its_pages_back() -> None:
    traffic = Traffic(random.Random(3))
    events: list[PageEvent] = []
    traffic.cache.tell(events.append)
    rid = traffic.add(traffic.prompt(low=9), max_new_tokens=50)
    traffic.step()
    (stored,) = events
    assert isinstance(stored, PagesStored)
    traffic.cache.forget(traffic.scheduler._states[rid].pages)
    assert {digest for event in events[1:] for digest in event.digests} == set(stored.digests)


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


LOCAL = {"endpoint": "tcp://127.0.0.1:*", "replay_endpoint": "tcp://127.0.0.1:*"}


def replayed(context: zmq.Context, publisher: KvEventPublisher, first: int) -> list[tuple[bytes, bytes, bytes]]:
    """What comes for a question, without the frame that ends it."""
    messages = []
    with context.socket(zmq.DEALER) as socket:
        socket.connect(publisher.replay_endpoint)
        socket.send_multipart((b"", struct.pack(">Q", first)))
        while socket.poll(TIMEOUT_MS):
            empty, topic, sequence, payload = socket.recv_multipart()
            assert empty == b""
            if sequence == b"\xff" * 8:
                assert (topic, payload) == (b"", b"")
                return messages
            messages.append((topic, sequence, payload))
    raise AssertionError("no end has come")


def until_sent(context: zmq.Context, publisher: KvEventPublisher, count: int) -> list[tuple[bytes, bytes, bytes]]:
    """The messages from the first on, once so many events are in them."""
    for _ in range(400):
        messages = replayed(context, publisher, 0)
        if sum(len(msgspec.msgpack.decode(payload)[1]) for *_, payload in messages) >= count:
            return messages
    raise AssertionError("they were not sent")


def test_subscribers_get_numbered_messages_and_missed_ones_again(context: zmq.Context) -> None:
    publisher = KvEventPublisher(KvEventsConfig.of({**LOCAL, "topic": "kv@pod@model", "buffer_steps": 3}), PAGE)
    try:
        with context.socket(zmq.SUB) as socket:
            socket.connect(publisher.endpoint)
            socket.subscribe("kv@")
            while not socket.poll(50):  # until it has joined
                publisher.take(AllCleared())
            topic, sequence, payload = socket.recv_multipart()
            assert topic == b"kv@pod@model" and len(sequence) == 8
            assert msgspec.msgpack.decode(payload)[1][0] == {"type": "AllBlocksCleared"}
            last = struct.unpack(">Q", sequence)[0]
            for number in range(5):  # each in a message of its own
                publisher.take(PagesRemoved([bytes([number]) * 32]))
                while True:
                    assert socket.poll(TIMEOUT_MS)
                    _, sequence, payload = socket.recv_multipart()
                    assert struct.unpack(">Q", sequence)[0] == last + 1
                    last += 1
                    if "block_hashes" in msgspec.msgpack.decode(payload)[1][-1]:
                        break
            kept = replayed(context, publisher, 0)
            assert [struct.unpack(">Q", sequence)[0] for _, sequence, _ in kept] == [last - 2, last - 1, last]
            assert kept[-1] == (b"kv@pod@model", sequence, payload)
            assert replayed(context, publisher, last) == kept[-1:] and replayed(context, publisher, last + 1) == []
    finally:
        publisher.close()
        publisher.close()


def test_events_that_find_no_room_are_a_gap_in_the_numbers(context: zmq.Context, monkeypatch, caplog) -> None:
    entered, gate = threading.Event(), threading.Event()
    written = EventEncoder.payload

    def payload(self: EventEncoder, seconds: float, events: list[PageEvent]) -> bytes:
        entered.set()
        assert gate.wait(60)
        return written(self, seconds, events)

    monkeypatch.setattr(EventEncoder, "payload", payload)
    publisher = KvEventPublisher(KvEventsConfig.of({**LOCAL, "max_queue_size": 2}), PAGE)
    try:
        publisher.take(AllCleared())
        assert entered.wait(60)
        for _ in range(4):  # while the first is written: there is room for two
            publisher.take(AllCleared())
        gate.set()
        messages = until_sent(context, publisher, 3)
        assert [struct.unpack(">Q", sequence)[0] for _, sequence, _ in messages] == [0, 2]
        assert caplog.text.count("dropped") == 1
    finally:
        gate.set()
        publisher.close()


def test_an_engine_publishes_where_it_is_configured_and_tells_of_wrong_values(context: zmq.Context) -> None:
    traffic = Traffic(random.Random(5))

    def publisher_of(text: str | None) -> KvEventPublisher | None:
        config = EngineConfig.from_kwargs(model_path="x", kv_events_config=text)
        return build._publisher(build._events_config(config), traffic.cache)

    assert publisher_of(None) is None and publisher_of('{"publisher": "null"}') is None
    assert publisher_of('{"enable_kv_cache_events": false}') is None and not traffic.cache._tree.observers
    publisher = publisher_of(msgspec.json.encode(LOCAL).decode())
    assert publisher is not None
    try:
        traffic.ask(traffic.prompt(low=30))
        reader = Reader()
        for _, sequence, payload in until_sent(context, publisher, 1):
            reader.read(sequence, payload)
        assert len(reader.pages) == len(pages_of(traffic))
    finally:
        publisher.close()
    for wrong, named in (
        ('{"port": 1}', "'port'"), ('{"topic": 1}', "topic"), ('{"hwm": 0}', "hwm"), ('{"hwm": true}', "hwm"),
        ('{"encoding": "json"}', "encoding"), ('{"endpoint": "nowhere"}', "endpoint"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=named):
            publisher_of(wrong)
    off = EngineConfig.from_kwargs(model_path="x", kv_events_config="{}", disable_radix_cache=True)
    with pytest.raises(ConfigError, match="disable_radix_cache"):
        build._events_config(off)


def test_which_addresses_are_this_machines() -> None:
    here = ("tcp://*:1", "tcp://127.0.0.1:1", "tcp://[::]:1", "tcp://0.0.0.0:1", "ipc:///tmp/a", "inproc://a")
    assert all(map(is_bound, here)) and not is_bound("tcp://router:5557")
    assert is_bound(KvEventsConfig().endpoint) and "127.0.0.1" in KvEventsConfig().endpoint
