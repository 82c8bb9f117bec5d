"""Tensors of the device "npu" that hold a CPU tensor, and every operator of PyTorch on them.

Owns the wrapper, allocations, copies between host and device, and what a captured operator is replayed as. Operators
run on the CPU at once, or, while a graph is captured, leave no trace but their shapes. What PyTorch would get wrong
without a word (sizes changed in place, storages exchanged) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mooli_simulate_ascend import capture, streams
from mooli_simulate_ascend.counters import operations
from mooli_simulate_ascend.errors import SimulationError
from mooli_simulate_ascend.formats import FRACTAL_NZ, format_of, mark
from mooli_simulate_ascend.launch import launch
from mooli_simulate_ascend.memory import Allocation, memory
from mooli_simulate_ascend.profiles import Profile
from mooli_simulate_ascend.tasks import OPERATIONS, harmless, poison

DEVICE = "npu:0"

READS = {
    "item", "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "masked_select", "unique",
    "_unique", "_unique2", "unique_consecutive", "unique_dim", "unique_dim_consecutive", "bincount", "allclose",
    "argwhere", "histc", "nonzero_static",
}  # fmt: skip
"""Operators whose result the host waits for."""

SCALARS = {"item", "_local_scalar_dense", "is_nonzero", "equal"}
"""Those that copy one value back and start nothing."""

REFUSED = {
    "set_", "resize_", "resize_as_", "t_", "transpose_", "squeeze_", "unsqueeze_", "as_strided_", "swapdims_",
    "swapaxes_", "_resize_output_",
}  # fmt: skip
"""Operators that change a tensor's own sizes, which wrappers do not follow."""

EMPTY = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "empty_permuted"}
COPIES = {"copy_", "_to_copy", "to", "_copy_from", "_copy_from_and_resize"}


class NpuTensor(torch.Tensor):
    """A tensor of the simulated device."""

    held: Tensor
    allocation: Allocation

    @staticmethod
    def __new__(cls, inner: Tensor) -> NpuTensor:
        made: NpuTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(DEVICE),
        )
        return made

    def __init__(self, inner: Tensor) -> None:
        if inner.dtype in (torch.float64, torch.complex128):
            raise SimulationError(f"{inner.dtype} is not supported by the device: use float32")
        self.held = inner
        self.allocation = memory.of(inner)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"npu:{self.held!r}"

    def tolist(self) -> Any:
        capture.refuse_sync("tolist()")
        _count_copy_back(self.held)
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(
                "can't convert npu:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory first."
            )
        return self.cpu().numpy()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def pin_memory(self, device: Any = None) -> Tensor:
        raise SimulationError("pin_memory: only CPU tensors can be pinned")


class Simulation:
    """What is installed."""

    profile: Profile | None = None
    has_device = False


simulation = Simulation()


def is_npu(device: Any) -> bool:
    if isinstance(device, str):
        return device.split(":")[0] == "npu"
    return isinstance(device, torch.device) and device.type == "npu"


def unwrap(value: Any) -> Any:
    if isinstance(value, NpuTensor):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "npu" else value


def dispatch(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operator that has a tensor of the device among its arguments, or makes one."""
    if func.namespace in ("npu", "atb"):
        return _simulated(func, args, kwargs)
    return _aten(func, args, kwargs)


# ---------------------------------------------------------------------- simulated operations


def _simulated(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    schema, name = func._schema, f"{func._opname}.{func._overloadname}"
    profile = simulation.profile
    if profile is None:
        raise SimulationError(f"{name}: the simulator is not installed")
    wrappers = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, NpuTensor)]
    if func._opname == "get_npu_format":
        return format_of(wrappers[0].held)
    known = OPERATIONS[name]
    for argument, value in _named(schema, args, kwargs):
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and not isinstance(leaf, NpuTensor) and argument not in known.host_tensors:
                raise SimulationError(
                    f"{name}: Expected all tensors to be on the same device, but {argument} is on {leaf.device}"
                )
            if isinstance(leaf, NpuTensor) and argument in known.host_tensors:
                raise SimulationError(
                    f"{name}: {argument} is on npu: tensor.hostData is null (a CPU int32 tensor is wanted)"
                )
    inner_args, inner_kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs)
    _use(wrappers, name)
    result, _new = launch(profile, known, schema, inner_args, inner_kwargs, func, (args, kwargs))
    return _wrapped(result, wrappers)


def _named(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    return [*zip((argument.name for argument in schema.arguments), args, strict=False), *kwargs.items()]


def _use(wrappers: Sequence[NpuTensor], name: str) -> None:
    recording = capture.current()
    if recording is not None:
        recording.uses((wrapper.allocation for wrapper in wrappers), name)


def _wrapped(result: Any, wrappers: Sequence[NpuTensor]) -> Any:
    known = {id(wrapper.held): wrapper for wrapper in wrappers}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, NpuTensor):
            return value
        return known[id(value)] if id(value) in known else NpuTensor(value)

    return tree_map(wrap, result)


# ---------------------------------------------------------------------- PyTorch's own operators


def _aten(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    name = func._opname
    leaves = tree_leaves((args, kwargs))
    wrappers = [leaf for leaf in leaves if isinstance(leaf, NpuTensor)]
    if name in REFUSED:
        raise SimulationError(f"{func}: changing a tensor's sizes in place is not simulated")
    if name in COPIES:
        copied = _copy(func, name, args, kwargs, wrappers)
        if copied is not None:
            return copied
    if wrappers:
        for leaf in leaves:
            if isinstance(leaf, Tensor) and not isinstance(leaf, NpuTensor) and leaf.dim() > 0:
                raise SimulationError(
                    f"{func}: Expected all tensors to be on the same device, but found at least two devices, "
                    "npu:0 and cpu!"
                )
    if _waits(func, name, args, kwargs, leaves):
        capture.refuse_sync(str(func))
        operations.syncs += 1
        if name in SCALARS:
            operations.device_to_host += 1
    if capture.current() is not None:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise SimulationError(f"{func}: Not support Generator while in capture mode")
        return _capture(func, name, args, kwargs, wrappers)
    result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if name in EMPTY:
        poison(result)
    else:
        _account(func, result, wrappers)
    _check_sizes(func, wrappers)
    _check_formats(func, result, wrappers)
    return _wrapped(result, wrappers)


def _waits(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], leaves: Sequence[Any]) -> bool:
    """Whether the host waits for the result, or for its size."""
    if name == "repeat_interleave":
        by_tensor = sum(isinstance(leaf, Tensor) for leaf in leaves) > 1 or func._overloadname == "Tensor"
        return by_tensor and kwargs.get("output_size") is None
    return name in READS or _has_mask_index(func, args)


def _has_mask_index(func: Any, args: Sequence[Any]) -> bool:
    if func._opname not in ("index", "index_put", "index_put_", "_index_put_impl_") or len(args) < 2:
        return False
    return any(isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1]))


def _copy(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], wrappers: Sequence[NpuTensor]) -> Any:
    """A copy between host and device; None for any other."""
    if name in ("copy_", "_copy_from", "_copy_from_and_resize"):
        target, source = (args[0], args[1]) if name == "copy_" else (args[1], args[0])
        if isinstance(target, NpuTensor) == isinstance(source, NpuTensor):
            return None
        capture.refuse_sync("a copy between host and device")
        _refuse_in_update(func)
        inner_target, inner_source = unwrap(target), unwrap(source)
        inner_target.copy_(inner_source)
        if isinstance(target, NpuTensor):
            operations.host_to_device += 1
            operations.copied_bytes += source.numel() * source.element_size()
        else:
            _count_copy_back(inner_source)
        return target
    device = kwargs.get("device")
    for value in args[1:]:
        if isinstance(value, torch.device):
            device = value
        elif isinstance(value, Tensor):
            device = value.device
    if device is None or is_npu(device) == isinstance(args[0], NpuTensor):
        return None
    if is_npu(device):
        capture.refuse_sync("a copy between host and device")
        _refuse_in_update(func)
        operations.host_to_device += 1
        operations.copied_bytes += args[0].numel() * args[0].element_size()
        return NpuTensor(torch.ops.aten._to_copy.default(args[0], dtype=kwargs.get("dtype")))
    capture.refuse_sync("a copy between host and device")
    _refuse_in_update(func)
    _count_copy_back(args[0].held)
    copied = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    return copied.clone() if copied.data_ptr() == args[0].held.data_ptr() else copied


def _count_copy_back(inner: Tensor) -> None:
    operations.device_to_host += 1
    operations.syncs += 1
    operations.copied_bytes += inner.numel() * inner.element_size()


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _is_view(func: Any, result: Any, wrappers: Sequence[NpuTensor]) -> bool:
    """Whether an operator only gave other shapes to what was there."""
    if func._schema.is_mutable:
        return False
    made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return bool(made) and _storages(made) <= _storages([wrapper.held for wrapper in wrappers])


def _account(func: Any, result: Any, wrappers: Sequence[NpuTensor]) -> None:
    if not _is_view(func, result, wrappers):
        _refuse_in_update(func)
        if func._opname not in SCALARS:
            operations.count(str(func))


def _refuse_in_update(func: Any) -> None:
    if capture.update() is not None:
        raise SimulationError(f"{func} between graph_task_update_begin and end: only captured operations go there")


def _check_sizes(func: Any, wrappers: Sequence[NpuTensor]) -> None:
    if func._schema.is_mutable:
        for wrapper in wrappers:
            if wrapper.shape != wrapper.held.shape:
                raise SimulationError(f"{func}: an output of shape {tuple(wrapper.shape)} was resized")


def _check_formats(func: Any, result: Any, wrappers: Sequence[NpuTensor]) -> None:
    """Tensors as FRACTAL_NZ have no views: their elements are not where strides say."""
    blocked = [wrapper.held for wrapper in wrappers if format_of(wrapper.held) == FRACTAL_NZ]
    if not blocked:
        return
    for leaf in tree_leaves(result):
        if not isinstance(leaf, Tensor) or any(leaf is inner for inner in blocked):
            continue
        if _storages([leaf]) <= _storages(blocked):
            same = any(leaf.shape == inner.shape and leaf.stride() == inner.stride() for inner in blocked)
            if not same:
                raise SimulationError(f"{func} of a FRACTAL_NZ tensor: no views and slices after npu_format_cast")
            mark(leaf, FRACTAL_NZ)


def _capture(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], wrappers: Sequence[NpuTensor]) -> Any:
    """Find the shapes of the results; compute nothing now, and the values at each replay."""
    recording = capture.current()
    assert recording is not None
    if streams.current_stream() is not recording.stream:
        raise SimulationError(f"{func}: launched on another stream than the one that is captured")
    frozen_args, frozen_kwargs = (
        tree_map(lambda x: x.clone() if isinstance(x, Tensor) and not isinstance(x, NpuTensor) else unwrap(x), values)
        for values in (args, kwargs)
    )
    written = _written(func, args, kwargs)
    before = [tensor.clone() for tensor in written]
    result = func(*frozen_args, **frozen_kwargs)
    for tensor, values in zip(written, before, strict=True):
        tensor.copy_(values)
    _check_sizes(func, wrappers)
    _check_formats(func, result, wrappers)
    _use(wrappers, str(func))
    if name in EMPTY:
        poison(result)
    elif not _is_view(func, result, wrappers):
        given = _storages([leaf for leaf in tree_leaves((frozen_args, frozen_kwargs)) if isinstance(leaf, Tensor)])
        new = [
            leaf if isinstance(leaf, Tensor) and not _storages([leaf]) <= given else None
            for leaf in tree_leaves(result)
        ]
        for leaf in new:
            if leaf is not None:
                harmless(leaf)
        recording.num_operations += 1
        recording.steps.append(_replayed(func, frozen_args, frozen_kwargs, new))
    return _wrapped(result, wrappers)


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """What an operator writes to, by its schema."""
    names = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    values = [value for name, value in _named(func._schema, args, kwargs) if name in names]
    return [leaf.held for leaf in tree_leaves(values) if isinstance(leaf, NpuTensor)]


def _replayed(func: Any, args: Any, kwargs: Any, new: Sequence[Tensor | None]) -> Callable[[], None]:
    def step() -> None:
        again = tree_leaves(func(*args, **kwargs))
        for target, values in zip(new, again, strict=True):
            if target is None:
                continue
            if target.shape != values.shape:
                raise SimulationError(
                    f"{func}: {tuple(values.shape)} at a replay, {tuple(target.shape)} when captured: "
                    "a replay allocates nothing"
                )
            target.copy_(values)

    return step


# ---------------------------------------------------------------------- registration


def register_operators() -> list[torch.library.Library]:
    """Send every operator that makes a tensor of the device here. Keep what is returned."""
    everything = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
    everything.fallback(lambda func, *args, **kwargs: dispatch(func, args, kwargs), "PrivateUse1")  # type: ignore[no-untyped-call]
    aten = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    # PyTorch makes these by resizing an empty tensor, which wrappers do not follow.
    for overload in ("default", "start", "start_step"):
        func = getattr(torch.ops.aten.arange, overload)
        name = "arange" if overload == "default" else f"arange.{overload}"
        aten.impl(name, _factory(func), "PrivateUse1")  # type: ignore[no-untyped-call]
    # torch.tensor(..., device="npu") hides the wrapper's own way of dispatching.
    for operator in ("copy_", "_to_copy", "lift_fresh", "detach", "_copy_from"):
        aten.impl(operator, _factory(getattr(torch.ops.aten, operator).default), "PrivateUse1")  # type: ignore[no-untyped-call]
    for operator in ("eye", "eye.m", "linspace", "randperm"):
        packet, _, overload = operator.partition(".")
        aten.impl(operator, _factory(getattr(getattr(torch.ops.aten, packet), overload or "default")), "PrivateUse1")  # type: ignore[no-untyped-call]
    return [everything, aten]


def _factory(func: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: dispatch(func, args, kwargs)
