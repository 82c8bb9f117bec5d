"""The modules torch.npu and torch_npu of the simulation: names and answers, nothing that computes."""

from __future__ import annotations

import importlib.machinery
import types
from typing import Any

import torch

from mooli_simulate_ascend import capture, graphs, streams
from mooli_simulate_ascend.counters import operations
from mooli_simulate_ascend.device import DEVICE, simulation
from mooli_simulate_ascend.errors import NotSimulatedError, SimulationError
from mooli_simulate_ascend.formats import config
from mooli_simulate_ascend.memory import TOTAL_BYTES, free_bytes, memory

DEVICE_NAME = "Ascend910B3"


def new_module(name: str, doc: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name, doc)
    # importlib.util.find_spec refuses modules that have none.
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
    module.__dict__.update(members)
    return module


def set_device(device: Any) -> None:
    """Raises SimulationError for any but the one device there is."""
    index = torch.device(device).index or 0 if not isinstance(device, int) else device
    if index != 0:
        raise SimulationError(f"set_device: there is one simulated device, npu:0, and no npu:{index}")


def synchronize(device: Any = None) -> None:
    capture.refuse_sync("synchronize()")
    operations.syncs += 1


def mem_get_info(device: Any = None) -> tuple[int, int]:
    return free_bytes(), TOTAL_BYTES


def reset_peak_memory_stats(device: Any = None) -> None:
    memory.most = memory.allocated


def memory_stats(device: Any = None) -> dict[str, int]:
    return {"allocated_bytes.all.current": memory.allocated, "allocated_bytes.all.peak": memory.most}


def get_device_properties(device: Any = None) -> types.SimpleNamespace:
    return types.SimpleNamespace(name=DEVICE_NAME, total_memory=TOTAL_BYTES, L2_cache_size=192 * 2**20)


def get_cann_version(module: str = "CANN") -> str:
    return simulation.profile.cann if simulation.profile is not None else ""


class DeviceContext:
    """`with torch.npu.device(0):`."""

    def __init__(self, device: Any) -> None:
        set_device(device)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _nothing(*_: Any, **__: Any) -> None:
    """What a real device would do here cannot be seen from outside."""


def npu_module() -> types.ModuleType:
    """torch.npu."""
    utils = new_module("torch_npu.npu.utils", "Versions.", get_cann_version=get_cann_version)
    return new_module(
        "torch.npu",
        "A simulated Ascend device.",
        is_available=lambda: True,
        is_initialized=lambda: True,
        init=_nothing,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=set_device,
        device=DeviceContext,
        get_device_name=lambda device=None: DEVICE_NAME,
        get_device_properties=get_device_properties,
        get_device_capability=lambda device=None: None,
        get_soc_version=lambda: 224,
        mem_get_info=mem_get_info,
        memory_allocated=lambda device=None: memory.allocated,
        max_memory_allocated=lambda device=None: memory.most,
        memory_reserved=lambda device=None: memory.allocated,
        max_memory_reserved=lambda device=None: memory.most,
        memory_stats=memory_stats,
        reset_peak_memory_stats=reset_peak_memory_stats,
        empty_cache=_nothing,
        set_per_process_memory_fraction=_nothing,
        synchronize=synchronize,
        set_compile_mode=_nothing,
        set_option=_nothing,
        config=config,
        is_bf16_supported=lambda: True,
        manual_seed=_nothing,
        manual_seed_all=_nothing,
        utils=utils,
        Stream=streams.Stream,
        Event=streams.Event,
        ExternalEvent=streams.ExternalEvent,
        StreamContext=streams.StreamContext,
        stream=streams.stream,
        current_stream=streams.current_stream,
        default_stream=streams.default_stream,
        set_stream=streams.set_stream,
        NPUGraph=graphs.NPUGraph,
        graph=graphs.graph,
        graph_pool_handle=graphs.graph_pool_handle,
        is_current_stream_capturing=graphs.is_current_stream_capturing,
        graph_task_group_begin=graphs.graph_task_group_begin,
        graph_task_group_end=graphs.graph_task_group_end,
        graph_task_update_begin=graphs.graph_task_update_begin,
        graph_task_update_end=graphs.graph_task_update_end,
        _is_in_bad_fork=lambda: False,
        _lazy_init=_nothing,
        __device__=DEVICE,
    )


def torch_npu_module(npu: types.ModuleType) -> types.ModuleType:
    """torch_npu: every operation of both namespaces by its name."""

    def operation(name: str) -> Any:
        for namespace in (torch.ops.npu, torch.ops.atb):
            if not name.startswith("__") and hasattr(namespace, name):
                return getattr(namespace, name)
        raise AttributeError(f"module 'torch_npu' has no attribute {name!r}")

    def npu_fusion_attention(*_: Any, **__: Any) -> Any:
        raise NotSimulatedError("npu_fusion_attention is not simulated")

    atb_ops = new_module("torch_npu.op_plugin.atb._atb_ops", "ATB.", _register_atb_extensions=_nothing)
    atb = new_module("torch_npu.op_plugin.atb", "ATB.", _atb_ops=atb_ops)
    profile = simulation.profile
    return new_module(
        "torch_npu",
        "A simulated torch_npu: see mooli_simulate_ascend.",
        __simulated__=True,
        __version__=profile.torch_npu if profile is not None else "",
        __path__=[],
        __getattr__=operation,
        # Transformers imports it wherever there is a torch_npu.
        npu_fusion_attention=npu_fusion_attention,
        npu=npu,
        atb=new_module("torch_npu.atb", "ATB."),
        op_plugin=new_module("torch_npu.op_plugin", "Operations.", atb=atb),
    )
