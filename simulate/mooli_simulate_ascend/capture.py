"""Capturing and replaying: what a graph holds, and what may not happen while one is captured.

Owns the one capture that may be under way, the steps of a graph, and tasks whose arguments are patched between replays.
A graph keeps the memory that was allocated while it was captured. Other tensors it only knows by address: if one is
freed, the next replay is an error here, and garbage on a device.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mooli_simulate_ascend.errors import SimulationError
from mooli_simulate_ascend.profiles import Profile
from mooli_simulate_ascend.tasks import Task

Step = Callable[[], None]


@dataclass
class CapturedTask:
    """An operation in a graph. Its task is exchanged by an update."""

    name: str
    task: Task
    new: Sequence[Tensor]
    tensors: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]
    """Address, shape and strides of every tensor among the arguments."""

    def replay(self) -> None:
        self.task.run(self.new)


@dataclass
class TaskGroup:
    """What graph_task_group_end returns: the tasks between begin and end."""

    tasks: list[CapturedTask] = field(default_factory=list)


@dataclass
class Updatable:
    """A task that `NPUGraph.update` patches: the call's own arguments, and the event the graph waits for."""

    group: TaskGroup
    event: Any
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Recording:
    """All that one graph holds."""

    stream: Any
    thread: int
    auto_dispatch: bool = False
    steps: list[Step] = field(default_factory=list)
    owned: list[Any] = field(default_factory=list)
    """Allocations of the graph's own pool."""
    seen: dict[int, tuple[weakref.ref[Any], str]] = field(default_factory=dict)
    """Allocations from elsewhere, and the operation that uses each."""
    group: TaskGroup | None = None
    updatable: list[Updatable] = field(default_factory=list)
    num_operations: int = 0

    def uses(self, allocations: Iterable[Any], name: str) -> None:
        mine = {id(allocation) for allocation in self.owned}
        for allocation in allocations:
            if id(allocation) not in mine:
                self.seen.setdefault(id(allocation), (weakref.ref(allocation), name))

    def replay(self) -> None:
        for reference, name in self.seen.values():
            if reference() is None:
                raise SimulationError(
                    f"{name} in this graph uses a tensor that was freed after the capture: keep static buffers"
                )
        for step in self.steps:
            step()


@dataclass
class Update:
    """Between graph_task_update_begin and end."""

    group: TaskGroup
    stream: Any
    index: int = 0


_underway: list[Recording] = []
_local = threading.local()


def current() -> Recording | None:
    """The capture that this thread's launches belong to."""
    if _underway and _underway[0].thread == threading.get_ident():
        return _underway[0]
    return None


def begin(profile: Profile, stream: Any, default_stream: Any, *, auto_dispatch: bool) -> Recording:
    """Start a capture on `stream`. Raises SimulationError for what the device refuses."""
    if _underway:
        raise SimulationError("capture_begin: another capture is under way")
    if stream is default_stream:
        raise SimulationError("capture_begin: capture on a stream of its own, not on the default stream")
    if profile.rejects_task_queue_2 and os.environ.get("TASK_QUEUE_ENABLE") == "2":
        raise SimulationError(f"capture_begin: TASK_QUEUE_ENABLE=2 (CANN {profile.cann}): set it to 1")
    if os.environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
        raise SimulationError("capture_begin: ASCEND_LAUNCH_BLOCKING=1: unset it")
    recording = Recording(stream, threading.get_ident(), auto_dispatch)
    _underway.append(recording)
    return recording


def end(recording: Recording, stream: Any) -> None:
    if recording in _underway:
        _underway.remove(recording)
    if stream is not recording.stream:
        raise SimulationError("capture_end: on another stream than capture_begin")
    if recording.group is not None:
        raise SimulationError("capture_end: graph_task_group_begin without graph_task_group_end")


def refuse_sync(what: str) -> None:
    """Raise if this thread captures: the host cannot wait for what is not yet computed."""
    if current() is not None:
        raise SimulationError(f"{what} while a graph is captured: the host would wait for what only a replay computes")


def add_step(step: Step) -> bool:
    """Add to the graph that is captured. False if none is."""
    recording = current()
    if recording is None:
        return False
    recording.steps.append(step)
    return True


# ---------------------------------------------------------------------- groups and updates


def group_begin(stream: Any) -> None:
    recording = current()
    if recording is None:
        raise SimulationError("graph_task_group_begin: no graph is captured")
    if recording.group is not None:
        raise SimulationError("graph_task_group_begin: the group before has not ended")
    if stream is not recording.stream:
        raise SimulationError("graph_task_group_begin: not the stream that is captured")
    recording.group = TaskGroup()


def group_end(stream: Any) -> TaskGroup:
    recording = current()
    if recording is None or recording.group is None:
        raise SimulationError("graph_task_group_end: no group was begun")
    group, recording.group = recording.group, None
    if not group.tasks:
        raise SimulationError("graph_task_group_end: the group has no operations")
    return group


def update() -> Update | None:
    """The update that this thread is in."""
    found: Update | None = getattr(_local, "update", None)
    return found


def update_begin(stream: Any, group: TaskGroup) -> None:
    if not isinstance(group, TaskGroup):
        raise SimulationError("graph_task_update_begin: the handle is not of graph_task_group_end")
    if current() is not None:
        raise SimulationError("graph_task_update_begin: a graph is captured")
    if update() is not None:
        raise SimulationError("graph_task_update_begin: the update before has not ended")
    _local.update = Update(group, stream)


def update_end(stream: Any) -> None:
    underway = update()
    if underway is None:
        raise SimulationError("graph_task_update_end: no update was begun")
    _local.update = None
    if underway.index != len(underway.group.tasks):
        raise SimulationError(
            f"graph_task_update_end: {underway.index} of {len(underway.group.tasks)} operations were called again"
        )


def abandon_update() -> None:
    _local.update = None


def patch(underway: Update, name: str, task: Task, tensors: Any) -> CapturedTask:
    """Give the next captured task of the group new arguments: the same operation, on the same tensors."""
    if underway.index >= len(underway.group.tasks):
        raise SimulationError(f"{name}: more operations in this update than were captured in the group")
    captured = underway.group.tasks[underway.index]
    if captured.name != name:
        raise SimulationError(f"{name}: the captured operation is {captured.name}")
    if captured.tensors != tensors:
        raise SimulationError(f"{name}: not the tensors that were captured: only lengths and numbers may change")
    captured.task = task
    underway.index += 1
    return captured
