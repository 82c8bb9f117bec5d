"""A model's tensors on their way to the backend, one after the other.

Owns which tensors are in use: each is read by name, packed by the backend, and let go of when the backend has read it,
so that no more of a file is in memory than keeps the backend busy. Never converts a value and knows no family.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mooli.backends.base import Activation, Backend, Weight
from mooli.backends.latent import LatentSpec
from mooli.models.checkpoint import Checkpoint
from mooli.models.config import ModelConfig
from mooli.models.mla_weights import keys_and_values
from mooli.tensor import RawTensor

MOST_UNREAD_BYTES = 256 << 20
"""Of tensors that a backend has been given and not read yet, those that are copies of what the file holds included. So
much keeps it busy while the interpreter is somebody else's for a while: a tokenizer's library keeps it for 0.4 s."""


class Packer:
    """Reads tensors by name and has the backend pack them. A module has a `.weight`, and may have a `.bias`."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        backend: Backend,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """`progress(done, total)` is called at once, and whenever tensors have been packed."""
        self._tensors = config.tensors()
        self._checkpoint = checkpoint
        self._backend = backend
        self._progress = progress
        self._unread: deque[tuple[RawTensor, ...]] = deque()
        """The tensors of each call of the backend that may still read them."""
        self._unread_bytes = self._num_read = 0
        self._report()

    def embedding(self, module: str) -> Weight:
        table = self._checkpoint.tensor(f"{module}.weight")
        return self._packed(self._backend.load_embedding(table), table)

    def head(self, module: str) -> Weight:
        table = self._checkpoint.tensor(f"{module}.weight")
        return self._packed(self._backend.load_linear([table], head=True), table)

    def tied(self, module: str) -> tuple[Weight, Weight]:
        """The embedding and the head that are one table."""
        table = self._checkpoint.tensor(f"{module}.weight")
        both: tuple[Weight, Weight] = self._packed(self._backend.load_tied(table), table)
        return both

    def vector(self, name: str) -> Weight:
        vector = self._checkpoint.tensor(name)
        return self._packed(self._backend.load_vector(vector), vector)

    def linear(self, *modules: str) -> Weight:
        """Linear layers stacked along their outputs. All have a bias among the model's tensors, or none has."""
        tensors, biases = self._weights(modules), self._biases(modules)
        return self._packed(self._backend.load_linear(tensors, biases), *tensors, *biases)

    def gated(self, gate: str, up: str, activation: Activation = "silu") -> Weight:
        """The weight of `Ops.gated_linear`; biases as in `linear`."""
        (first, second), biases = self._weights((gate, up)), self._biases((gate, up))
        return self._packed(
            self._backend.load_gated(first, second, biases, activation=activation), first, second, *biases
        )

    def queries_and_gates(self, q: str, k: str, v: str, *, num_heads: int) -> tuple[Weight, Weight]:
        """Of a layer whose heads of queries have the rows of a gate behind their own: the weight of queries, keys and
        values, and that of all gates."""
        both, *others = self._weights((q, k, v))
        rows = np.arange(both.num_rows, dtype=np.int64).reshape(num_heads, 2, -1)
        queries, gates = (both.take_rows(rows[:, part].reshape(-1)) for part in (0, 1))
        qkv = self._packed(self._backend.load_linear([queries, *others]), *others)
        return qkv, self._packed(self._backend.load_linear([gates]), both)

    def latent(self, *modules: str, spec: LatentSpec) -> Weight:
        """The weight of `Ops.attend_latent`: of one module, with the rows of keys and of values of each head one after
        the other, or of one for keys (transposed in each head) and one for values."""
        tensors = self._weights(modules)
        keys, values = keys_and_values(tensors[0], spec) if len(tensors) == 1 else tensors
        return self._packed(self._backend.load_latent(keys, values, spec), *tensors)

    def linears_of(self, module: str, *rows: NDArray[np.int64]) -> tuple[Weight, ...]:
        """A linear layer whose rows are several layers' in turn, as those: of each its rows, in their order."""
        (whole,) = self._weights((module,))
        made = [self._packed(self._backend.load_linear([whole.take_rows(part)])) for part in rows[:-1]]
        last = self._packed(self._backend.load_linear([whole.take_rows(rows[-1])]), whole)
        return (*made, last)

    def conv(self, *modules: str) -> Weight:
        """The weight of `Ops.short_conv` and `Ops.causal_conv`: of several, the channels of one after the other's."""
        weights, biases = self._weights(modules), self._biases(modules)
        both = (_joined(weights), _joined(biases)) if biases else (_joined(weights),)
        return self._packed(self._backend.load_conv(*both), *weights, *biases)

    def delta(self, decay: str, dt_bias: str) -> Weight:
        """The weight of `Ops.delta_rule`, of two vectors."""
        vectors = self._checkpoint.tensor(decay), self._checkpoint.tensor(dt_bias)
        return self._packed(self._backend.load_delta(*vectors), *vectors)

    def scan(self, decay: str, dt_bias: str, skip: str) -> Weight:
        """The weight of `Ops.scan`, of three vectors."""
        vectors = [self._checkpoint.tensor(name) for name in (decay, dt_bias, skip)]
        return self._packed(self._backend.load_scan(*vectors), *vectors)

    def router(self, module: str, correction: str | None = None) -> Weight:
        """The weight of `Ops.route`; correction: the name of a vector, where the choice has one."""
        (weight,), biases = self._weights((module,)), self._biases((module,))
        added = None if correction is None else self._checkpoint.tensor(correction)
        loaded = self._backend.load_router(weight, biases[0] if biases else None, added)
        return self._packed(loaded, weight, *biases, *([] if added is None else [added]))

    def experts(self, modules: Sequence[tuple[str, str, str]], activation: Activation = "silu") -> Weight:
        """The weight of `Ops.experts`: of each expert the names of its gate, up and down projection."""
        gated, down = [], []
        for gate, up, out in modules:
            gated.append(self.gated(gate, up, activation))
            down.append(self.linear(out))
        return self._backend.load_experts(gated, down)

    def finish(self) -> None:
        """Returns when all is packed."""
        while self._unread:
            self._release(at_most=len(self._unread) - 1)

    def _weights(self, modules: tuple[str, ...]) -> list[RawTensor]:
        return [self._checkpoint.tensor(f"{module}.weight") for module in modules]

    def _biases(self, modules: tuple[str, ...]) -> list[RawTensor]:
        names = [f"{module}.bias" for module in modules]
        return [self._checkpoint.tensor(name) for name in names if name in self._tensors]

    def _packed(self, weight: Weight, *tensors: RawTensor) -> Weight:
        self._unread.append(tensors)
        self._unread_bytes += sum(tensor.data.nbytes for tensor in tensors)
        self._release(at_most=len(self._unread))
        while self._unread_bytes > MOST_UNREAD_BYTES:
            self._release(at_most=len(self._unread) - 1)
        return weight

    def _release(self, at_most: int) -> None:
        """Let go of what has been read, when it is all but `at_most` of the backend's calls."""
        num_unread = self._backend.unread_loads(at_most)
        if num_unread == len(self._unread):
            return
        while len(self._unread) > num_unread:
            for tensor in self._unread.popleft():
                self._unread_bytes -= tensor.data.nbytes
                self._num_read += 1
                self._checkpoint.release(tensor.name)
        self._report()

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._num_read, len(self._tensors))


def _joined(tensors: Sequence[RawTensor]) -> RawTensor:
    """Matrices or vectors of one type, one after the other."""
    if len(tensors) == 1:
        return tensors[0]
    first = tensors[0]
    is_vector = len(first.shape) == 1
    data = np.concatenate([tensor.data for tensor in tensors], axis=1 if is_vector else 0)
    return dataclasses.replace(first, shape=(sum(tensor.shape[0] for tensor in tensors), *first.shape[1:]), data=data)
