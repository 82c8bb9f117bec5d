"""Multi-head latent attention of the reference backend, from its definition.

Owns keys and values of all heads, which are made anew of the latents whenever a row looks back. Never stores anything.
Source: DeepSeek-V2, arXiv 2405.04434, equations 9 to 19.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mooli.backends.latent import LatentSpec

Floats = NDArray[np.float32]

QUERY_BLOCK = 64
"""Query tokens whose scores exist at one time: bounds memory for long prompts."""


@dataclass(frozen=True, slots=True)
class LatentWeight:
    """keys (heads, rank, nope_dim), values (heads, value_dim, rank)."""

    keys: Floats
    values: Floats


def attend_row(q: Floats, kept: Floats, weight: LatentWeight, spec: LatentSpec) -> Floats:
    """Causal attention of the last rows of a sequence: rotated queries q (Q, heads, nope_dim + rope_dim), and what is
    kept of all its tokens (N, rank + rope_dim), to (Q, heads, value_dim)."""
    num_queries, num_tokens = len(q), len(kept)
    latents, rotated = kept[:, : spec.rank], kept[:, spec.rank :]
    keys = np.einsum("tr,hrd->htd", latents, weight.keys, optimize=True)
    shared = np.broadcast_to(rotated, (spec.num_heads, *rotated.shape))
    keys = np.concatenate([keys, shared], axis=2)
    values = np.einsum("tr,hvr->htv", latents, weight.values, optimize=True)
    out = np.empty((num_queries, spec.num_heads, spec.value_dim), np.float32)
    for begin in range(0, num_queries, QUERY_BLOCK):
        block = q[begin : begin + QUERY_BLOCK].transpose(1, 0, 2)
        scores = block @ keys.transpose(0, 2, 1) * np.float32(spec.scale)
        last = num_tokens - num_queries + begin + np.arange(block.shape[1])
        scores = np.where(np.arange(num_tokens) > last[:, None], np.float32(-np.inf), scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[begin : begin + block.shape[1]] = (weights @ values).transpose(1, 0, 2)
    return out
