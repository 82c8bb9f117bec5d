"""Captured graphs: capturing computes nothing, replays use the captured memory, lengths stay until they are updated."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from paged import PAGE, Requests, close, make_requests, scale_of

import mooli_simulate_ascend as sim
from mooli_simulate_ascend import streams
from mooli_simulate_ascend.capture import abandon_update


def capture(run: Callable[[], Any], **options: Any) -> tuple[Any, Any]:
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, **options):
        result = run()
    return graph, result


def test_a_replay_computes_from_what_is_in_the_buffers() -> None:
    x, w = torch.zeros(2, 3).npu(), torch.randn(3, 3).npu()
    graph, y = capture(lambda: (x @ w).relu_() + torch.arange(3, device="npu"))
    assert y.cpu().isnan().all()
    for values in (torch.ones(2, 3), torch.randn(2, 3)):
        x.copy_(values)
        graph.replay()
        assert close(y, (values @ w.cpu()).relu() + torch.arange(3), 1e-5)


def test_the_vendor_s_operations_are_replayed() -> None:
    x, gamma = torch.zeros(2, 32, dtype=torch.bfloat16).npu(), torch.ones(32, dtype=torch.bfloat16).npu()
    graph, y = capture(lambda: torch.ops.npu.npu_swiglu(torch.ops.npu.npu_rms_norm(x, gamma, 1e-5)[0]))
    values = torch.randn(2, 32).to(torch.bfloat16)
    x.copy_(values)
    graph.replay()
    assert torch.equal(
        y.cpu(), torch.ops.npu.npu_swiglu(torch.ops.npu.npu_rms_norm(values.npu(), gamma, 1e-5)[0]).cpu()
    )


def test_stores_do_not_happen_while_capturing() -> None:
    x = torch.zeros(3).npu()
    cache = torch.zeros(2, 128, 1, 16, dtype=torch.float16).npu()
    rows = torch.ones(1, 1, 16, dtype=torch.float16).npu()
    slots = torch.tensor([130], dtype=torch.int32).npu()

    def run() -> None:
        x.add_(1)
        torch.ops.atb._npu_reshape_and_cache(rows, rows, cache, cache, slots)

    graph, _ = capture(run)
    assert not x.cpu().any()
    assert not cache.cpu().any()
    slots.fill_(5)
    graph.replay()
    graph.replay()
    assert x.tolist() == [2, 2, 2]
    assert cache.cpu().view(-1, 16).any(dim=1).nonzero().tolist() == [[5]]


def test_a_replay_is_one_launch() -> None:
    x = torch.ones(3).npu()
    graph, y = capture(lambda: ((x + 1) * 2).exp())
    sim.operations.reset()
    graph.replay()
    y.cpu()
    assert sim.operations.as_dict() | {"copied_bytes": 0} == {
        "launched": 1,
        "replays": 1,
        "updates": 0,
        "host_to_device": 0,
        "device_to_host": 1,
        "copied_bytes": 0,
        "syncs": 1,
    }


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: bool(x[0] > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.ones(3).npu(),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.tensor([1.0], device="npu"),
        lambda x: torch.npu.synchronize(),
        lambda x: torch.npu.current_stream().synchronize(),
    ],
)
def test_waiting_while_capturing_is_an_error(wrong: Callable[[torch.Tensor], Any]) -> None:
    x = torch.ones(3).npu()
    wrong(x)
    with pytest.raises(sim.SimulationError, match="while a graph is captured"):
        capture(lambda: wrong(x))
    # The failed capture is over.
    x.cpu()


@pytest.mark.parametrize("wrong", [lambda x: torch.rand(3, device="npu"), lambda x: x.multinomial(1)])
def test_random_numbers_while_capturing_are_an_error(wrong: Callable[[torch.Tensor], Any]) -> None:
    weights = torch.ones(2, 3).npu()
    wrong(weights)
    with pytest.raises(sim.SimulationError, match="Not support Generator"):
        capture(lambda: wrong(weights))


def test_a_buffer_that_was_freed_is_an_error() -> None:
    buffers = [torch.ones(3).npu(), torch.ones(3).npu()]
    graph, _ = capture(lambda: buffers[0] + buffers[1])
    graph.replay()
    buffers.pop()
    gc.collect()
    with pytest.raises(sim.SimulationError, match="freed after the capture"):
        graph.replay()


def test_memory_of_the_graph_itself_lives_with_it() -> None:
    x = torch.ones(3).npu()
    graph, y = capture(lambda: (x + 1) + (x + 2))
    gc.collect()
    graph.replay()
    assert y.tolist() == [5, 5, 5]


def test_host_numbers_are_frozen() -> None:
    x, factor = torch.ones(3).npu(), torch.tensor(2.0)
    graph, y = capture(lambda: x * factor)
    factor.fill_(9)
    graph.replay()
    assert y.tolist() == [2, 2, 2]


def test_a_size_that_depends_on_values_cannot_be_replayed() -> None:
    x = torch.tensor([1, 1]).npu()
    graph, _ = capture(lambda: torch.repeat_interleave(x, x, output_size=2))
    graph.replay()
    x.fill_(2)
    with pytest.raises(RuntimeError, match="size"):
        graph.replay()


def begin_twice() -> None:
    graph, _ = capture(lambda: torch.zeros(1, device="npu"))
    with torch.npu.graph(graph):
        pass


def capture_inside() -> None:
    capture(lambda: capture(lambda: None))


def on_the_default_stream() -> None:
    torch.npu.NPUGraph().capture_begin()


def on_another_stream() -> None:
    def run() -> None:
        with torch.npu.stream(torch.npu.Stream()):
            torch.zeros(1, device="npu")

    capture(run)


def replay_of_nothing() -> None:
    torch.npu.NPUGraph().replay()


def replay_inside() -> None:
    graph, _ = capture(lambda: torch.zeros(1, device="npu"))
    capture(graph.replay)


def end_of_nothing() -> None:
    torch.npu.NPUGraph().capture_end()


def update_without_dispatch() -> None:
    graph, _ = capture(lambda: torch.zeros(1, device="npu"))
    graph.update(cpu_update_input=[{}])


def group_outside() -> None:
    torch.npu.graph_task_group_begin(torch.npu.current_stream())


def empty_group() -> None:
    def run() -> None:
        stream = torch.npu.current_stream()
        torch.npu.graph_task_group_begin(stream)
        torch.npu.graph_task_group_end(stream)

    capture(run)


def open_group() -> None:
    capture(lambda: torch.npu.graph_task_group_begin(torch.npu.current_stream()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (begin_twice, "one graph per object"),
        (capture_inside, "another capture is under way"),
        (on_the_default_stream, "default stream"),
        (on_another_stream, "another stream"),
        (replay_of_nothing, "no graph was captured"),
        (replay_inside, "while a graph is captured"),
        (end_of_nothing, "no capture was begun"),
        (update_without_dispatch, "auto_dispatch_capture=True"),
        (group_outside, "no graph is captured"),
        (empty_group, "no operations"),
        (open_group, "without graph_task_group_end"),
    ],
)
def test_the_order_of_calls_is_checked(wrong: Callable[[], None], message: str) -> None:
    with pytest.raises(sim.SimulationError, match=message):
        wrong()
    capture(lambda: torch.zeros(1, device="npu"))


def test_settings_that_graphs_do_not_go_with_are_refused(monkeypatch: pytest.MonkeyPatch, cann: Any) -> None:
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    with pytest.raises(sim.SimulationError, match="TASK_QUEUE_ENABLE"):
        capture(lambda: None)
    cann("8.3")
    capture(lambda: None)
    monkeypatch.setenv("ASCEND_LAUNCH_BLOCKING", "1")
    with pytest.raises(sim.SimulationError, match="ASCEND_LAUNCH_BLOCKING"):
        capture(lambda: None)


# ---------------------------------------------------------------------- lengths


class Decode:
    """A decode step on static buffers, of requests that grow."""

    def __init__(self, totals: list[int]) -> None:
        self.requests: Requests = make_requests([1] * len(totals), totals)
        queries = self.requests.queries
        self.call = {
            "query": queries.view(len(totals), 1, -1).npu(),
            "key": self.requests.key_cache.flatten(2).npu(),
            "value": self.requests.value_cache.flatten(2).npu(),
            "block_table": self.requests.table.npu(),
            "num_heads": queries.shape[1],
            "num_key_value_heads": self.requests.key_cache.shape[2],
            "scale": scale_of(queries),
            "input_layout": "BSH",
            "block_size": PAGE,
        }
        self.out = [torch.empty_like(self.call["query"]), torch.empty(1, device="npu")]
        ask = torch.ops.npu._npu_fused_infer_attention_score_get_max_workspace
        self.workspace = ask(**self.call, actual_seq_lengths_kv=totals)

    def launch(self, lengths: list[int]) -> torch.Tensor:
        torch.ops.npu.npu_fused_infer_attention_score.out(
            **self.call, actual_seq_lengths_kv=lengths, workspace=self.workspace, out=self.out
        )
        return self.out[0]

    def eager(self, lengths: list[int]) -> torch.Tensor:
        return torch.ops.npu.npu_fused_infer_attention_score(**self.call, actual_seq_lengths_kv=lengths)[0].cpu()


def test_lengths_are_frozen_until_they_are_updated() -> None:
    step = Decode([200, 300])
    lengths = [100, 129]
    graph, out = capture(lambda: step.launch(lengths))
    lengths[0] = 1
    graph.replay()
    assert torch.equal(out.cpu(), step.eager([100, 129]))


def test_update_gives_new_lengths_to_the_next_replay() -> None:
    step = Decode([200, 300])
    graph, out = capture(lambda: step.launch([1, 1]), auto_dispatch_capture=True)
    for lengths in ([1, 127], [128, 129], [200, 300]):
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": lengths}])
        graph.replay()
        assert torch.equal(out.cpu(), step.eager(lengths))


def test_each_layer_may_have_its_own_lengths() -> None:
    steps = [Decode([200]), Decode([200])]
    graph, out = capture(lambda: [step.launch([1]) for step in steps], auto_dispatch_capture=True)
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [10]}, {"actual_seq_lengths_kv": [20]}])
    graph.replay()
    assert torch.equal(out[0].cpu(), steps[0].eager([10]))
    assert torch.equal(out[1].cpu(), steps[1].eager([20]))
    with pytest.raises(sim.SimulationError, match="3 elements for 2 operations"):
        graph.update(cpu_update_input=[{}, {}, {}])
    with pytest.raises(sim.SimulationError, match="no argument"):
        graph.update(cpu_update_input=[{"actual_seq_kvlen": [1]}])
    with pytest.raises(sim.SimulationError, match="columns"):
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [9999]}])


def test_a_replay_without_its_update_would_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "HANG_SECONDS", 0.0)
    step = Decode([200])
    graph, _ = capture(lambda: step.launch([1]), auto_dispatch_capture=True)
    with pytest.raises(sim.SimulationError, match="nobody records"):
        graph.replay()
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [9]}])
    graph.replay()
    with pytest.raises(sim.SimulationError, match="nobody records"):
        graph.replay()


def test_a_replay_waits_for_an_update_in_another_thread() -> None:
    step = Decode([200])
    graph, out = capture(lambda: step.launch([1]), auto_dispatch_capture=True)
    worker = threading.Thread(target=graph.update, args=([{"actual_seq_lengths_kv": [50]}],))
    with torch.no_grad():
        worker.start()
        graph.replay()
    worker.join()
    assert torch.equal(out.cpu(), step.eager([50]))


@pytest.mark.parametrize(("version", "is_known"), [("8.2", False), ("8.3", True)])
def test_the_plain_form_is_updated_only_by_newer_versions(version: str, is_known: bool, cann: Any) -> None:
    cann(version)
    step = Decode([200])
    plain = torch.ops.npu.npu_fused_infer_attention_score
    run = lambda: plain(**step.call, actual_seq_lengths_kv=[1])[0]  # noqa: E731
    graph, out = capture(run, auto_dispatch_capture=True)
    if not is_known:
        with pytest.raises(sim.SimulationError, match="no operation"):
            graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [50]}])
        return
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [50]}])
    graph.replay()
    assert torch.equal(out.cpu(), step.eager([50]))


class PagedDecode:
    """The same with the operation of atb, whose lengths are a tensor of the host."""

    def __init__(self, totals: list[int]) -> None:
        self.requests = make_requests([1] * len(totals), totals)
        self.call = {
            "query": self.requests.queries.npu(),
            "key_cache": self.requests.key_cache.npu(),
            "value_cache": self.requests.value_cache.npu(),
            "block_table": self.requests.table.npu(),
            "num_heads": 4,
            "num_kv_heads": 2,
            "scale_value": scale_of(self.requests.queries),
        }
        self.out = torch.empty_like(self.call["query"])

    def launch(self, lengths: torch.Tensor) -> torch.Tensor:
        torch.ops.atb._npu_paged_attention(**self.call, context_lens=lengths, out=self.out)
        return self.out


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def capture_group(step: PagedDecode, lengths: torch.Tensor) -> tuple[Any, Any, Any]:
    """The manual protocol: an event, and a group around the operation."""
    event, handles = torch.npu.ExternalEvent(), []

    def run() -> None:
        stream = torch.npu.current_stream()
        event.wait(stream)
        event.reset(stream)
        torch.npu.graph_task_group_begin(stream)
        step.launch(lengths)
        handles.append(torch.npu.graph_task_group_end(stream))

    graph, _ = capture(run)
    return graph, event, handles[0]


def test_a_group_is_updated_by_hand() -> None:
    step = PagedDecode([200, 300])
    frozen = int32([1, 1])
    graph, event, handle = capture_group(step, frozen)
    frozen.fill_(9999)
    stream = torch.npu.Stream()
    for lengths in ([100, 129], [200, 300]):
        with torch.npu.stream(stream):
            torch.npu.graph_task_update_begin(stream, handle)
            step.launch(int32(lengths))
            torch.npu.graph_task_update_end(stream)
            event.record(stream)
        graph.replay()
        replayed = step.out.cpu()
        assert torch.equal(replayed, step.launch(int32(lengths)).cpu())


@dataclass
class Spare:
    """Made before an update, in which nothing may be copied."""

    step: PagedDecode
    lengths: torch.Tensor
    values: torch.Tensor


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda step, spare: None, "0 of 1 operations"),
        (lambda step, spare: [step.launch(spare.lengths) for _ in range(2)], "more operations"),
        (lambda step, spare: spare.step.launch(spare.lengths), "not the tensors"),
        (lambda step, spare: torch.ops.npu.npu_swiglu(spare.values), "the captured operation is"),
        (lambda step, spare: step.out.add_(1), "between graph_task_update_begin and end"),
        (lambda step, spare: step.out.cpu(), "between graph_task_update_begin and end"),
        (lambda step, spare: torch.npu.graph_task_update_begin(torch.npu.current_stream(), None), "handle"),
    ],
)
def test_a_wrong_update_is_refused(body: Callable[[PagedDecode, Spare], Any], message: str) -> None:
    step = PagedDecode([200, 300])
    spare = Spare(PagedDecode([200, 300]), int32([1, 1]), torch.ones(4).npu())
    _, _, handle = capture_group(step, int32([1, 1]))
    stream = torch.npu.Stream()
    with torch.npu.stream(stream):
        torch.npu.graph_task_update_begin(stream, handle)
        with pytest.raises(sim.SimulationError, match=message):
            body(step, spare)
            torch.npu.graph_task_update_end(stream)
        abandon_update()


@pytest.mark.parametrize("with_workspace", [True, False])
def test_an_operation_in_a_group_writes_to_out_and_has_a_workspace(with_workspace: bool) -> None:
    step = Decode([200])

    def run() -> None:
        stream = torch.npu.current_stream()
        torch.npu.graph_task_group_begin(stream)
        if with_workspace:
            torch.ops.npu.npu_fused_infer_attention_score(**step.call, actual_seq_lengths_kv=[1])
        else:
            torch.ops.npu.npu_fused_infer_attention_score.out(**step.call, actual_seq_lengths_kv=[1], out=step.out)
        torch.npu.graph_task_group_end(stream)

    with pytest.raises(sim.SimulationError, match="writes to out" if with_workspace else "workspace"):
        capture(run)
