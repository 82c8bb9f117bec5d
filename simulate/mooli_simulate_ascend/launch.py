"""Starting one simulated operation: at once, into the graph that is captured, or as a patch of a captured task.

Takes CPU tensors; whoever wraps them, wraps the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from mooli_simulate_ascend import capture, streams
from mooli_simulate_ascend.capture import CapturedTask, Recording, TaskGroup, Updatable
from mooli_simulate_ascend.counters import operations
from mooli_simulate_ascend.errors import SimulationError
from mooli_simulate_ascend.profiles import FUSED, Profile
from mooli_simulate_ascend.tasks import Operation, Task, arguments_of, harmless, poisoned, results_of, run_now

Address = tuple[int, tuple[int, ...], tuple[int, ...]]


def addresses(values: Any, host: frozenset[str] = frozenset()) -> tuple[Address, ...]:
    """Where the tensors among named arguments lie; those of the host, which a call reads at once, aside."""
    leaves = [leaf for name, value in values.items() if name not in host for leaf in tree_leaves(value)]
    return tuple(
        (leaf.data_ptr(), tuple(leaf.shape), tuple(leaf.stride())) for leaf in leaves if isinstance(leaf, Tensor)
    )


def launch(
    profile: Profile,
    known: Operation,
    schema: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    call: Callable[..., Any] | None = None,
    original: tuple[Sequence[Any], dict[str, Any]] | None = None,
) -> tuple[Any, Sequence[Tensor]]:
    """Check and run, capture or patch. Returns what the call returns, and the tensors that are new.

    `call` and `original` are the operation and its arguments as they were given: a graph's update calls it again.
    """
    named = arguments_of(schema, args, kwargs)
    for argument in schema.arguments:
        # The dispatcher lets None pass for a tensor.
        if str(argument.type) == "Tensor" and named.get(argument.name, args) is None:
            raise SimulationError(f"{known.name}: {argument.name} is None")
    task = known.prepare(profile, **named)
    underway = capture.update()
    if underway is not None:
        return _patch(underway, known, task, named)
    recording = capture.current()
    if recording is None:
        operations.count(known.name)
        fresh = run_now(task)
        return results_of(task, fresh), fresh
    if streams.current_stream() is not recording.stream:
        raise SimulationError(f"{known.name}: launched on another stream than the one that is captured")
    automatic = recording.auto_dispatch and recording.group is None and known.name in profile.updated_by_graph
    if automatic:
        event = streams.ExternalEvent()
        event.wait()
        event.reset()
        group = recording.group = TaskGroup()
        new = _capture(recording, known, task, named)
        recording.group = None
        positional, keywords = original or (args, kwargs)
        assert call is not None
        recording.updatable.append(Updatable(group, event, call, tuple(positional), dict(keywords)))
    else:
        if recording.group is not None:
            _check_in_group(known, task, named)
        new = _capture(recording, known, task, named)
    return results_of(task, new), new


def _capture(recording: Recording, known: Operation, task: Task, named: dict[str, Any]) -> Sequence[Tensor]:
    new = [harmless(poisoned(shape, dtype)) for shape, dtype in task.new]
    captured = CapturedTask(known.name, task, new, addresses(named, known.host_tensors))
    recording.steps.append(captured.replay)
    recording.num_operations += 1
    if recording.group is not None:
        recording.group.tasks.append(captured)
    return new


def _check_in_group(known: Operation, task: Task, named: dict[str, Any]) -> None:
    if not task.out_form:
        raise SimulationError(
            f"{known.name} in a task group: call the form that writes to out, so that it can be updated"
        )
    if known.name.startswith(FUSED) and named.get("workspace") is None:
        raise SimulationError(f"{known.name} in a task group: give it a workspace, which lives as long as the graph")


def _patch(
    underway: capture.Update, known: Operation, task: Task, named: dict[str, Any]
) -> tuple[Any, Sequence[Tensor]]:
    if streams.current_stream() is not underway.stream:
        raise SimulationError(f"{known.name}: launched on another stream than the one of graph_task_update_begin")
    captured = capture.patch(underway, known.name, task, addresses(named, known.host_tensors))
    operations.count(f"update of {known.name}")
    operations.updates += 1
    return results_of(task, captured.new), captured.new
