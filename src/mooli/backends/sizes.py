"""What a model's weights and KV pages take on each backend, without its device and without its libraries.

Owns the counting, and the defaults of backends that depend on nothing. A model is built on `Sizes` as on a backend
(`mooli.models.registry.create_model`), so that it is the model that says which tensors become which weights. Never
imports torch; the backends take from here what is theirs, and tests hold both to the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from mooli.backends.ascend.defaults import MAX_RUNNING_REQUESTS
from mooli.backends.ascend.paths import PAGE_SIZE
from mooli.backends.base import Activation, CacheSpec
from mooli.backends.latent import LatentLayer, LatentSpec
from mooli.errors import ConfigError
from mooli.tensor import RawTensor

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

INT8_GROUP = 32
"""Weights of a row that share a scale under int8."""

WIDEST_W8A8 = 65535
"""Most rows and columns that the quantised product of NPUs takes."""


class Sizes:
    """The part of `Backend` that loading a model uses. A weight is None, and counted."""

    ops: Any = None
    default_page_size: ClassVar[int]
    default_max_running_requests: ClassVar[int] = 48
    auto_dtype: ClassVar[str | None]
    """The type of the computation under dtype="auto"; None where it is always float32, and weights keep theirs."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def weight_bytes(self) -> int:
        return self.num_bytes

    def unread_loads(self, at_most: int) -> int:
        return 0

    def load_vector(self, vector: RawTensor) -> None:
        """Gains of norms come in float32, everywhere."""
        self.num_bytes += 4 * vector.num_columns

    def load_conv(self, weight: RawTensor, bias: RawTensor | None = None) -> None:
        """In float32, everywhere; with zeros where there is no bias."""
        self.num_bytes += 4 * weight.num_rows * (weight.num_columns + 1)

    def load_scan(self, decay: RawTensor, dt_bias: RawTensor, skip: RawTensor) -> None:
        self.num_bytes += 4 * sum(vector.num_columns for vector in (decay, dt_bias, skip))

    def load_delta(self, decay: RawTensor, dt_bias: RawTensor) -> None:
        self.num_bytes += 4 * (decay.num_columns + dt_bias.num_columns)

    def load_latent(self, keys: RawTensor, values: RawTensor, spec: LatentSpec) -> None:
        raise NotImplementedError

    def load_router(
        self, weight: RawTensor, bias: RawTensor | None = None, correction: RawTensor | None = None
    ) -> None:
        """In float32, everywhere."""
        vectors = [tensor for tensor in (bias, correction) if tensor is not None]
        self.num_bytes += 4 * (weight.num_rows * weight.num_columns + sum(vector.num_columns for vector in vectors))

    def load_experts(self, gated: Sequence[None], down: Sequence[None]) -> None:
        """Counted already, one by one."""

    def load_linear(
        self, tensors: Sequence[RawTensor], biases: Sequence[RawTensor] = (), *, head: bool = False
    ) -> None:
        raise NotImplementedError

    def load_gated(
        self, gate: RawTensor, up: RawTensor, biases: Sequence[RawTensor] = (), *, activation: Activation = "silu"
    ) -> None:
        raise NotImplementedError

    def load_embedding(self, table: RawTensor) -> None:
        raise NotImplementedError

    def load_tied(self, table: RawTensor) -> tuple[None, None]:
        raise NotImplementedError

    def kv_bytes_per_page(self, spec: CacheSpec) -> int:
        raise NotImplementedError


class TorchSizes(Sizes):
    """Floats of one type, or int8 with a scale for each group of a row."""

    name = "torch"
    default_page_size = 16
    auto_dtype: ClassVar[str] = "float32"

    def __init__(self, dtype: str, quantization: str | None) -> None:
        """Raises ConfigError, as the backend does, for what it cannot quantise to."""
        super().__init__()
        if quantization not in (None, "int8"):
            raise cannot_quantise(self.name, quantization)
        self.dtype = self.auto_dtype if dtype == "auto" else dtype
        self.quantization = quantization

    def load_linear(
        self, tensors: Sequence[RawTensor], biases: Sequence[RawTensor] = (), *, head: bool = False
    ) -> None:
        self._add(tensors, biases, head=head, is_tied=False)

    def load_gated(
        self, gate: RawTensor, up: RawTensor, biases: Sequence[RawTensor] = (), *, activation: Activation = "silu"
    ) -> None:
        self.load_linear([gate, up], biases)

    def load_latent(self, keys: RawTensor, values: RawTensor, spec: LatentSpec) -> None:
        """In floats, whatever the linear weights are quantised to."""
        self.num_bytes += self.float_bytes([keys]) + self.float_bytes([values])

    def load_embedding(self, table: RawTensor) -> None:
        self.num_bytes += self.float_bytes([table])

    def load_tied(self, table: RawTensor) -> tuple[None, None]:
        self.load_embedding(table)
        self._add([table], (), head=True, is_tied=True)
        return None, None

    def kv_bytes_per_page(self, spec: CacheSpec) -> int:
        return page_bytes(spec)

    def _add(self, tensors: Sequence[RawTensor], biases: Sequence[RawTensor], *, head: bool, is_tied: bool) -> None:
        item_bytes = ITEM_BYTES[self.dtype]
        packed = self.int8_bytes(tensors, head=head)
        if packed is None:  # a tied head is the embedding itself
            packed = 0 if is_tied else self.float_bytes(tensors)
        self.num_bytes += packed + item_bytes * sum(bias.num_columns for bias in biases)

    def float_bytes(self, tensors: Sequence[RawTensor]) -> int:
        return ITEM_BYTES[self.dtype] * sum(tensor.num_rows * tensor.num_columns for tensor in tensors)

    def int8_bytes(self, tensors: Sequence[RawTensor], *, head: bool) -> int | None:
        """Bytes of a linear weight in int8; None where it is kept in floats."""
        if self.quantization is None:
            return None
        rows, groups = sum(tensor.num_rows for tensor in tensors), -(-tensors[0].num_columns // INT8_GROUP)
        return rows * groups * (INT8_GROUP + 4)


class CudaSizes(TorchSizes):
    """As `TorchSizes`. bfloat16 is for processors since Ampere; on older ones it is float16, of the same size."""

    name = "cuda"
    auto_dtype = "bfloat16"


class AscendSizes(TorchSizes):
    """Floats of one type, or int8 with a scale for each row (W8A8)."""

    name = "ascend"
    default_page_size = PAGE_SIZE
    default_max_running_requests = MAX_RUNNING_REQUESTS
    auto_dtype = "bfloat16"

    def __init__(self, dtype: str, quantization: str | None) -> None:
        super().__init__(dtype, quantization)
        if quantization == "int8" and self.dtype == "float32":
            raise no_w8a8_in_float32()

    def int8_bytes(self, tensors: Sequence[RawTensor], *, head: bool) -> int | None:
        if not is_w8a8(tensors, self.dtype, self.quantization, head=head):
            return None
        rows = sum(tensor.num_rows for tensor in tensors)
        return rows * tensors[0].num_columns + 4 * rows


def is_w8a8(tensors: Sequence[RawTensor], dtype: str, quantization: str | None, *, head: bool) -> bool:
    """Whether a linear weight of these tensors, stacked along rows, is multiplied in int8 on an NPU.

    Not the head, unless the checkpoint has it so: it is the part of a model that suffers most.
    """
    is_stored = all(tensor.scales is not None for tensor in tensors) and dtype != "float32"
    if not (is_stored or quantization == "int8") or (head and not is_stored):
        return False
    return sum(tensor.num_rows for tensor in tensors) <= WIDEST_W8A8 and tensors[0].num_columns <= WIDEST_W8A8


def page_bytes(spec: CacheSpec) -> int:
    """Bytes of one KV page of the backends of PyTorch, all layers. Raises ConfigError for an unknown KV type, and as
    `CacheSpec.paged_layers`."""
    if spec.dtype not in ITEM_BYTES:
        others = ", ".join(ITEM_BYTES)
        raise ConfigError(f"kv_cache_dtype={spec.dtype!r} is possible only on a CPU; here it is one of {others}")
    values = sum(
        layer.width if isinstance(layer, LatentLayer) else 2 * layer.num_kv_heads * layer.head_dim
        for layer in spec.paged_layers()
    )
    return spec.page_size * values * ITEM_BYTES[spec.dtype]


def cannot_quantise(name: str, quantization: str | None) -> ConfigError:
    return ConfigError(
        f"the {name} backend cannot quantise to {quantization}: use quantization='int8', or backend 'cpu'"
    )


def no_w8a8_in_float32() -> ConfigError:
    return ConfigError("quantization='int8' computes in float16 or bfloat16 on an NPU: leave dtype='float32' out")
