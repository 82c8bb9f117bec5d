"""How an operation is simulated: all checks that need no data first, then a task that computes into given memory.

Owns the registry of simulated operations and the ways to run a task. A task that is captured runs again with the same
memory at every replay, with the host's lists and lengths as they were when it was made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from mooli_simulate_ascend.profiles import Profile


@dataclass
class Task:
    """A checked call. `run` gets the new tensors, in the order of `new`, and fills them.

    new: shape and dtype of each new tensor. result: tensors to be returned instead of the new ones (those that were
    changed in place). out_form: it writes only into tensors that the caller gave, so that it may be updated in a graph.
    """

    run: Callable[[Sequence[Tensor]], None]
    new: Sequence[tuple[tuple[int, ...], torch.dtype]] = ()
    result: Sequence[Tensor] | None = None
    returns_one: bool = False
    out_form: bool = False


Prepare = Callable[..., Task]
AnyPrepare = TypeVar("AnyPrepare", bound=Prepare)


@dataclass(frozen=True)
class Operation:
    """One simulated operation. `host_tensors` are the arguments that must be CPU tensors."""

    name: str
    prepare: Prepare
    host_tensors: frozenset[str] = field(default_factory=frozenset)


OPERATIONS: dict[str, Operation] = {}
"""By qualified name, such as `npu_rms_norm.default`. Filled by the modules that simulate them."""


def operation(*names: str, host: Sequence[str] = ()) -> Callable[[AnyPrepare], AnyPrepare]:
    """Register a function of (profile, **arguments by the schema's names) as the simulation of `names`."""

    def register(prepare: AnyPrepare) -> AnyPrepare:
        for name in names:
            qualified = name if "." in name else f"{name}.default"
            OPERATIONS[qualified] = Operation(qualified, prepare, frozenset(host))
        return prepare

    return register


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory as an allocator gives it: with nothing in it that anyone may count on."""
    return poison(torch.empty(tuple(shape), dtype=dtype))


def poison(values: Tensor) -> Tensor:
    """Fill with NaN, or with what an integer would be least expected to be."""
    if values.dtype.is_floating_point or values.dtype.is_complex:
        return values.fill_(float("nan"))
    if values.dtype == torch.bool:
        return values.fill_(True)
    return values.fill_(torch.iinfo(values.dtype).min)


def harmless(values: Tensor) -> Tensor:
    """Fill what a graph will compute: NaN, and indices that are at least inside of anything."""
    if values.dtype.is_floating_point or values.dtype.is_complex:
        return values.fill_(float("nan"))
    return values.zero_()


def arguments_of(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults included."""
    named: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(args):
            named[argument.name] = args[index]
        elif argument.name in kwargs:
            named[argument.name] = kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value
    # `input` and `self` are keywords or built-ins of Python.
    if "input" in named:
        named["x"] = named.pop("input")
    return named


def prepare_call(profile: Profile, known: Operation, named: dict[str, Any]) -> Task:
    return known.prepare(profile, **named)


def run_now(task: Task) -> list[Tensor]:
    """Run on fresh memory: the new tensors."""
    new = [poisoned(shape, dtype) for shape, dtype in task.new]
    task.run(new)
    return new


def results_of(task: Task, new: Sequence[Tensor]) -> Any:
    """What the call returns: tensors as the schema says."""
    given = new if task.result is None else task.result
    if not given:
        return None
    return given[0] if task.returns_one else tuple(given)
