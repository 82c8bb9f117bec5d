"""What the cpu backend makes of a stored tensor: its packed kind, and the bytes of that and of KV pages.

Owns the decision, for the backend and for who only asks. Never packs: that is `CpuBackend`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import mooli._native as _native
from mooli.backends.base import Activation, CacheSpec, PagedLayer
from mooli.backends.latent import LatentLayer, LatentSpec
from mooli.backends.sizes import ITEM_BYTES, Sizes
from mooli.tensor import RawTensor, TensorType, row_bytes

TILE = 32
"""Tokens of a KV tile; a page is a whole number of tiles."""

MAX_RUNNING_REQUESTS = 48
"""Decode rows share one pass over the weights; the gain of more rows is small from here on."""


class Kind(IntEnum):
    """Packed weight kinds, numbered as in native/kernels.h."""

    Q8 = 0
    Q4 = 1
    Q4M = 2
    IQ4 = 3
    FP4 = 4
    Q6 = 5
    BF16 = 6
    F16 = 7
    F32 = 8


FLOAT_KINDS = {"float32": Kind.F32, "float16": Kind.F16, "bfloat16": Kind.BF16}
_FOUR_BIT_KINDS = {
    TensorType.Q4_0: Kind.Q4,
    TensorType.Q4_1: Kind.Q4M,
    TensorType.Q4_K: Kind.Q4M,
    TensorType.IQ4_NL: Kind.IQ4,
    TensorType.IQ4_XS: Kind.IQ4,
    TensorType.MXFP4: Kind.FP4,
}
_BLOCK_KINDS = {**_FOUR_BIT_KINDS, TensorType.Q6_K: Kind.Q6}
_EXACT_TYPES = {
    Kind.Q8: {TensorType.Q8_0, TensorType.Q5_0, TensorType.Q4_0, TensorType.IQ4_NL},
    Kind.Q4: {TensorType.Q4_0},
    Kind.Q4M: {TensorType.Q4_1},
    Kind.IQ4: {TensorType.IQ4_NL},
    Kind.FP4: set(),
    Kind.Q6: set(),
    Kind.BF16: {TensorType.BF16},
    Kind.F16: {TensorType.F16},
    Kind.F32: {TensorType.F32},
}
"""What each kind packs without changing a value or the sign of a zero, whatever its scales."""

_FLOAT_TYPES = {TensorType.F32: "float32", TensorType.F16: "float16", TensorType.BF16: "bfloat16"}


@dataclass(frozen=True, slots=True)
class Packing:
    """The settings that decide. dtype: of weights that are not quantised; auto keeps the file's.

    has_bf16_dot: the processor multiplies bfloat16, which float32 weights then become under auto.
    """

    dtype: str
    quantization: str | None
    has_bf16_dot: bool

    def kind(self, tensors: Sequence[RawTensor], *, head: bool) -> Kind:
        """The packed kind of tensors stacked in one weight: the finest any of them needs."""
        if self.quantization is not None:
            # The head decides between near-equal logits and is kept at 8 bits.
            if head or self.quantization == "int8":
                return Kind.Q8
            # What already has four bits keeps them: quantising again would only add error.
            kinds = {_FOUR_BIT_KINDS.get(t.type, Kind.Q4) for t in tensors}
            return kinds.pop() if len(kinds) == 1 else Kind.Q4
        kinds = {self._native_kind(t) for t in tensors}
        if len(kinds) == 1:
            return kinds.pop()
        floats = [k for k in kinds if k >= Kind.BF16]
        return max(floats) if floats else Kind.Q8

    def _native_kind(self, tensor: RawTensor) -> Kind:
        if tensor.type not in _FLOAT_TYPES:
            return _BLOCK_KINDS.get(tensor.type, Kind.Q8)
        if self.dtype != "auto":
            return FLOAT_KINDS[self.dtype]
        kind = FLOAT_KINDS[_FLOAT_TYPES[tensor.type]]
        return Kind.BF16 if kind == Kind.F32 and self.has_bf16_dot else kind


def is_exact(table: RawTensor, kind: Kind) -> bool:
    """Whether this kind packs the tensor without changing a value, so that an embedding can be read from the head."""
    return table.scales is None and table.type in _EXACT_TYPES[kind]


def page_bytes(spec: CacheSpec) -> int:
    """Bytes of one KV page, all layers."""
    return spec.page_size // TILE * sum(_layer_bytes(layer, spec.dtype) for layer in spec.paged_layers())


def kept_shapes(layers: Sequence[PagedLayer | LatentLayer]) -> tuple[list[int], list[int]]:
    """Of each layer its kv heads and their length, as the native module wants them: no heads where latents are kept."""
    shapes = [
        (0, layer.width) if isinstance(layer, LatentLayer) else (layer.num_kv_heads, layer.head_dim) for layer in layers
    ]
    return [heads for heads, _ in shapes], [width for _, width in shapes]


def _layer_bytes(layer: PagedLayer | LatentLayer, dtype: str) -> int:
    """Of a tile."""
    if isinstance(layer, LatentLayer):
        return TILE * layer.width * ITEM_BYTES[dtype]
    return layer.num_kv_heads * _tile_bytes(layer.head_dim, dtype)


def _tile_bytes(head_dim: int, dtype: str) -> int:
    """Keys and values of a tile of one kv head."""
    if dtype == "int8":  # values, a scale for each token, and a base of the keys in whole cache lines
        return 2 * TILE * (head_dim + 4) + -(-(head_dim + 4) // 64) * 64
    return 2 * head_dim * TILE * (4 if dtype == "float32" else 2)


class CpuSizes(Sizes):
    """What a model takes on this machine's processor: only that decides what float32 weights become."""

    default_page_size = TILE
    default_max_running_requests = MAX_RUNNING_REQUESTS
    auto_dtype = None

    def __init__(self, dtype: str, quantization: str | None) -> None:
        super().__init__()
        has_bf16_dot = bool(_native.Device(1, [], os.environ.get("MOOLI_ISA", "")).has_bf16_dot)
        self._packing = Packing(dtype, quantization, has_bf16_dot)

    def load_linear(
        self, tensors: Sequence[RawTensor], biases: Sequence[RawTensor] = (), *, head: bool = False
    ) -> None:
        self._add(tensors, biases, head=head)

    def load_gated(
        self, gate: RawTensor, up: RawTensor, biases: Sequence[RawTensor] = (), *, activation: Activation = "silu"
    ) -> None:
        kind = self._packing.kind([gate, up], head=False)
        self.num_bytes += _native.linear_bytes(int(kind), gate.num_rows, gate.num_columns, True, bool(biases))

    def load_latent(self, keys: RawTensor, values: RawTensor, spec: LatentSpec) -> None:
        for tensor in (keys, values):
            kind, rows = self._packing.kind([tensor], head=True), tensor.num_rows // spec.num_heads
            each = _native.linear_bytes(int(kind), rows, tensor.num_columns, False, False)
            self.num_bytes += spec.num_heads * each

    def load_router(
        self, weight: RawTensor, bias: RawTensor | None = None, correction: RawTensor | None = None
    ) -> None:
        rows, columns = weight.num_rows, weight.num_columns
        self.num_bytes += _native.linear_bytes(int(Kind.F32), rows, columns, False, bias is not None)
        self.num_bytes += 0 if correction is None else 4 * correction.num_columns

    def load_embedding(self, table: RawTensor) -> None:
        self.num_bytes += table.num_rows * row_bytes(table.type, table.num_columns)

    def load_tied(self, table: RawTensor) -> tuple[None, None]:
        if not is_exact(table, self._add([table], (), head=True)):
            self.load_embedding(table)
        return None, None

    def kv_bytes_per_page(self, spec: CacheSpec) -> int:
        return page_bytes(spec)

    def _add(self, tensors: Sequence[RawTensor], biases: Sequence[RawTensor], *, head: bool) -> Kind:
        kind = self._packing.kind(tensors, head=head)
        rows = sum(tensor.num_rows for tensor in tensors)
        self.num_bytes += _native.linear_bytes(int(kind), rows, tensors[0].num_columns, False, bool(biases))
        return kind
