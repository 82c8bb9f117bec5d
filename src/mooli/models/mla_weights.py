"""The projection from latents, as files have it, in the two parts that backends take.

Owns the cut between keys and values of each head, and the transposition of the former. Never reads a file.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from mooli.backends.dequant import dequantize
from mooli.backends.latent import LatentSpec
from mooli.tensor import BLOCK, RawTensor, TensorType


def keys_and_values(raw: RawTensor, spec: LatentSpec) -> tuple[RawTensor, RawTensor]:
    """Of (heads * (nope_dim + value_dim), rank), of each head [keys | values]: keys (heads * rank, nope_dim) and values
    (heads * value_dim, rank). Values keep their type; keys of a quantised type become float32, as their blocks lie
    across what is summed."""
    rows = np.arange(raw.num_rows, dtype=np.int64).reshape(spec.num_heads, -1)
    values = raw.take_rows(rows[:, spec.nope_dim :].reshape(-1))
    keys = raw.take_rows(rows[:, : spec.nope_dim].reshape(-1))
    kind, data = keys.type, keys.data
    if BLOCK[kind][0] > 1 or kind == TensorType.I8:
        kind, data = TensorType.F32, dequantize(keys).reshape(keys.num_rows, -1).view(np.uint8)
    items: NDArray[np.uint8] = np.ascontiguousarray(data).reshape(spec.num_heads, spec.nope_dim, spec.rank, -1)
    turned = np.ascontiguousarray(items.transpose(0, 2, 1, 3)).reshape(spec.num_heads * spec.rank, -1)
    shape = (spec.num_heads * spec.rank, spec.nope_dim)
    return dataclasses.replace(keys, type=kind, shape=shape, data=turned, scales=None), values
