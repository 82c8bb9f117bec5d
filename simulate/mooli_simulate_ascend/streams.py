"""Streams and events of the simulated device. Work is done when it is launched; only order that matters is kept.

Owns the current stream of each thread and the events that captured graphs wait for. Waiting for an event that nobody
records is what hangs a device: it is an error here, after `HANG_SECONDS`.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from mooli_simulate_ascend import capture
from mooli_simulate_ascend.counters import operations
from mooli_simulate_ascend.errors import SimulationError

HANG_SECONDS = 5.0


class Stream:
    """A queue of work."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = device
        self.priority = priority

    def synchronize(self) -> None:
        capture.refuse_sync("Stream.synchronize()")
        operations.syncs += 1

    def wait_stream(self, stream: Stream) -> None:
        """Nothing to wait for: work is done."""

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True


DEFAULT = Stream()
_local = threading.local()


def current_stream(device: Any = None) -> Stream:
    found: Stream = getattr(_local, "stream", DEFAULT)
    return found


def default_stream(device: Any = None) -> Stream:
    return DEFAULT


def set_stream(stream: Stream) -> None:
    _local.stream = stream


class StreamContext:
    """`with torch.npu.stream(s):`."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream
        self._before: list[Stream] = []

    def __enter__(self) -> Stream | None:
        self._before.append(current_stream())
        if self.stream is not None:
            set_stream(self.stream)
        return self.stream

    def __exit__(self, *_: object) -> None:
        set_stream(self._before.pop())


def stream(wanted: Stream | None) -> StreamContext:
    return StreamContext(wanted)


class Event:
    """A mark in a stream."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._recorded_at: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._recorded_at = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing to wait for: work is done."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        capture.refuse_sync("Event.synchronize()")
        operations.syncs += 1

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds of this machine, which say nothing about a device."""
        if self._recorded_at is None or end_event._recorded_at is None:
            raise SimulationError("Event.elapsed_time: both events must be recorded")
        return (end_event._recorded_at - self._recorded_at) * 1000


class ExternalEvent:
    """An event that a captured graph waits for, and that is recorded from outside before each replay."""

    def __init__(self) -> None:
        self._recorded = threading.Event()

    def record(self, stream: Stream | None = None) -> None:
        capture.refuse_sync("ExternalEvent.record()")
        self._recorded.set()

    def wait(self, stream: Stream | None = None) -> None:
        if not capture.add_step(self._wait_now):
            self._wait_now()

    def reset(self, stream: Stream | None = None) -> None:
        if not capture.add_step(self._recorded.clear):
            self._recorded.clear()

    def _wait_now(self) -> None:
        if not self._recorded.wait(HANG_SECONDS):
            raise SimulationError(
                "the stream waits for an ExternalEvent that nobody records: on a device this hangs "
                "(update the captured task and record its event before, or while, the graph is replayed)"
            )
