"""Rotary frequencies of a model, with the scaling its configuration asks for.

Owns the formulas that turn a base and a scaling into radians per position. Never rotates anything; backends do.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mooli.models.config import ModelConfig, RopeScaling


def inv_freq(config: ModelConfig) -> NDArray[np.float64]:
    """float64 (head_dim / 2,), radians per position; entry i turns the pair (i, i + head_dim / 2).

    Source: RoFormer, arXiv 2104.09864; linear scaling: arXiv 2306.15595; llama3: the Llama 3.1 model card's code.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.type == "freq_factors":
        return frequencies / np.asarray(scaling.freq_factors, np.float64)
    if scaling.type == "linear":
        return frequencies / scaling.factor
    return _llama3(frequencies, scaling)


def _llama3(frequencies: NDArray[np.float64], scaling: RopeScaling) -> NDArray[np.float64]:
    """Wavelengths longer than original / low are divided by the factor, shorter than original / high kept, and
    between the two ends the frequency is interpolated."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(ramp, 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor
