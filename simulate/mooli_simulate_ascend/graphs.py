"""torch.npu.NPUGraph and torch.npu.graph: capturing, replaying and updating, as torch_npu spells them."""

from __future__ import annotations

from typing import Any

from mooli_simulate_ascend import capture, streams
from mooli_simulate_ascend.capture import Recording
from mooli_simulate_ascend.counters import operations
from mooli_simulate_ascend.device import simulation
from mooli_simulate_ascend.errors import SimulationError


class PoolHandle:
    """A memory pool that graphs share."""


def graph_pool_handle() -> PoolHandle:
    return PoolHandle()


def is_current_stream_capturing() -> bool:
    recording = capture.current()
    return recording is not None and streams.current_stream() is recording.stream


class NPUGraph:
    """One captured graph."""

    def __init__(self) -> None:
        self.auto_dispatch_capture = False
        self._recording: Recording | None = None
        self._is_complete = False
        self._pool = PoolHandle()
        self._update_stream = streams.Stream()

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if simulation.profile is None:
            raise SimulationError("capture_begin: the simulator is not installed")
        if not simulation.has_device:
            raise SimulationError("capture_begin: graphs are simulated on the device npu, which needs torch 2.13")
        if self._recording is not None:
            raise SimulationError("capture_begin: this NPUGraph holds a graph already: one graph per object")
        if capture_error_mode not in ("global", "thread_local", "relaxed"):
            raise SimulationError(f"capture_begin: capture_error_mode {capture_error_mode!r}")
        self._pool = pool if pool is not None else self._pool
        self._recording = capture.begin(
            simulation.profile, streams.current_stream(), streams.DEFAULT, auto_dispatch=self.auto_dispatch_capture
        )

    def capture_end(self) -> None:
        if self._recording is None or self._is_complete:
            raise SimulationError("capture_end: no capture was begun")
        capture.end(self._recording, streams.current_stream())
        self._is_complete = True

    def abandon(self) -> None:
        """End a capture that failed; the graph cannot be replayed."""
        if self._recording is not None:
            self._recording.group = None
            capture.end(self._recording, self._recording.stream)

    def replay(self) -> None:
        """Run the captured operations again, in their own memory."""
        if self._recording is None or not self._is_complete:
            raise SimulationError("replay: no graph was captured")
        capture.refuse_sync("NPUGraph.replay()")
        operations.count("graph replay")
        operations.replays += 1
        self._recording.replay()

    def reset(self) -> None:
        """Let go of the graph and its memory."""
        self._recording, self._is_complete = None, False

    def pool(self) -> PoolHandle:
        return self._pool

    def update(self, cpu_update_input: list[dict[str, Any]]) -> None:
        """Give captured attention new host arguments: one dict for all operations, or one for each."""
        if not self.auto_dispatch_capture:
            raise SimulationError("update: capture with auto_dispatch_capture=True")
        if self._recording is None or not self._is_complete:
            raise SimulationError("update: no graph was captured")
        records = self._recording.updatable
        if not records:
            raise SimulationError("update: the graph has no operation that this version of torch_npu records")
        given = cpu_update_input * len(records) if len(cpu_update_input) == 1 else cpu_update_input
        if len(given) != len(records):
            raise SimulationError(
                f"update: {len(given)} elements for {len(records)} operations: the others would wait forever"
            )
        for record, values in zip(records, given, strict=True):
            names = [argument.name for argument in record.call._schema.arguments]  # type: ignore[attr-defined]
            unknown = set(values) - set(names)
            if unknown:
                raise SimulationError(f"update: {record.call} has no argument {sorted(unknown)}")
            args = [values.get(name, value) for name, value in zip(names, record.args, strict=False)]
            kwargs = {**record.kwargs, **{name: value for name, value in values.items() if name in names[len(args) :]}}
            with streams.stream(self._update_stream):
                capture.update_begin(self._update_stream, record.group)
                try:
                    record.call(*args, **kwargs)
                except BaseException:
                    capture.abandon_update()
                    raise
                capture.update_end(self._update_stream)
                record.event.record(self._update_stream)


class graph:  # noqa: N801 - torch.npu's name
    """`with torch.npu.graph(g):` captures what is launched inside."""

    default_capture_stream: streams.Stream | None = None

    def __init__(
        self,
        npu_graph: NPUGraph,
        pool: Any = None,
        stream: streams.Stream | None = None,
        auto_dispatch_capture: bool = False,
        capture_error_mode: str = "global",
    ) -> None:
        if graph.default_capture_stream is None:
            graph.default_capture_stream = streams.Stream()
        self._pool = pool
        self._context = streams.stream(stream or graph.default_capture_stream)
        self._graph = npu_graph
        self._mode = capture_error_mode
        npu_graph.auto_dispatch_capture = auto_dispatch_capture

    def __enter__(self) -> None:
        self._context.__enter__()
        try:
            self._graph.capture_begin(self._pool, self._mode)
        except BaseException:
            self._context.__exit__(None, None, None)
            raise

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        try:
            if exc_type is None:
                self._graph.capture_end()
            else:
                self._graph.abandon()
        finally:
            self._context.__exit__(None, None, None)


def graph_task_group_begin(stream: streams.Stream) -> None:
    capture.group_begin(stream)


def graph_task_group_end(stream: streams.Stream) -> capture.TaskGroup:
    return capture.group_end(stream)


def graph_task_update_begin(stream: streams.Stream, handle: capture.TaskGroup) -> None:
    capture.update_begin(stream, handle)


def graph_task_update_end(stream: streams.Stream) -> None:
    capture.update_end(stream)
