"""Multi-head latent attention on the cpu backend: the weights of its heads, and the limits of its kernels.

Owns what the native module wants of shapes. Never computes and never records: that is the tape.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mooli.backends.latent import LatentLayer, LatentSpec
from mooli.errors import UnsupportedModelError
from mooli.tensor import RawTensor


@dataclass(frozen=True, slots=True)
class LatentWeight:
    """native: of all heads; spec: what it was loaded for."""

    native: Any
    spec: LatentSpec


def heads_of(tensor: RawTensor, num_heads: int) -> list[RawTensor]:
    """The rows of each head, as views."""
    rows = tensor.num_rows // num_heads
    return [
        dataclasses.replace(
            tensor,
            name=f"{tensor.name} of head {head}",
            shape=(rows, tensor.num_columns),
            data=tensor.data[head * rows : (head + 1) * rows],
            scales=None if tensor.scales is None else tensor.scales[head * rows : (head + 1) * rows],
        )
        for head in range(num_heads)
    ]


def check_layer(layer: LatentLayer) -> None:
    """Raise UnsupportedModelError for latents that the kernels cannot read."""
    if layer.rank % 16 or layer.rope_dim % 16:
        raise UnsupportedModelError(
            f"latents of {layer.rank} and {layer.rope_dim} numbers: the cpu kernels need multiples of 16"
        )
