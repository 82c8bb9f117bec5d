"""Multi-head latent attention as the seam describes it: what a layer keeps, the shape of an attention, and its parts.

Owns the two declarations and the check of one against the other. Never computes.
Source: DeepSeek-V2, arXiv 2405.04434.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mooli.errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class LatentLayer:
    """Keeps one latent of `rank` numbers of every token, and one rotated key of `rope_dim`, in pages. Keys and values
    of all heads are made of them."""

    rank: int
    rope_dim: int

    @property
    def width(self) -> int:
        """Numbers of a token."""
        return self.rank + self.rope_dim


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """A latent attention. `num_heads` heads of queries, of nope_dim numbers that are not rotated and rope_dim that are;
    value_dim of what a head gives. scale: of scores."""

    num_heads: int
    rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float

    @property
    def query_width(self) -> int:
        """Numbers of a row of queries: of each head [nope_dim | rope_dim]."""
        return self.num_heads * (self.nope_dim + self.rope_dim)

    @property
    def width(self) -> int:
        """Numbers that are kept of a token."""
        return self.rank + self.rope_dim


def check_latent(layers: Sequence[Any], layer: int, spec: LatentSpec) -> None:
    """Raise ConfigError if layer `layer` does not keep what `spec` attends to."""
    kept = layers[layer] if 0 <= layer < len(layers) else None
    if kept != LatentLayer(spec.rank, spec.rope_dim):
        raise ConfigError(
            f"attention to latents of {spec.rank} and {spec.rope_dim} numbers in layer {layer}, which keeps {kept}:"
            " declare it to keep them"
        )


def check_rows(spec: LatentSpec, query_width: int, latent_width: int) -> None:
    """Raise ConfigError for rows of queries or of latents that are not those of `spec`."""
    if (query_width, latent_width) != (spec.query_width, spec.width):
        raise ConfigError(f"queries of {query_width} values and latents of {latent_width} are not those of {spec}")


def refuse_int8(layers: Sequence[Any], dtype: str) -> None:
    """Raise UnsupportedModelError for latents that are to be kept in eight bits: no backend does that yet."""
    if dtype == "int8" and any(isinstance(layer, LatentLayer) for layer in layers):
        raise UnsupportedModelError(
            "kv_cache_dtype='int8' is not implemented for models with multi-head latent attention, whose cache is"
            " small: use float32, float16 or bfloat16"
        )
