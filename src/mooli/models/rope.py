"""Rotary frequencies, with the scaling that a model's files ask for.

Owns how a scaling is read and checked, and the formulas that turn a base and a scaling into radians per position. Never
rotates anything; backends do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models.fields import Fields, check_range, number, short

HF_KEYS = frozenset(("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"))
"""What `hf_rope` reads of a config.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed for long contexts.

    type "linear": divided by `factor`. "llama3": long wavelengths divided by `factor`, short ones kept, a ramp between
    (Llama 3.1). "freq_factors": each divided by its own entry of `freq_factors`, head_dim / 2 of them (GGUF).
    """

    type: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    freq_factors: tuple[float, ...] = ()

    def check(self, head_dim: int) -> None:
        """Raise UnsupportedModelError for another type, CheckpointError for a number out of its bounds."""
        check_range("rope scaling factor", self.factor, 1e-6, 1e6)
        if self.type == "llama3":
            check_range("low_freq_factor", self.low_freq_factor, 1e-6, 1e6)
            check_range("high_freq_factor", self.high_freq_factor, self.low_freq_factor * (1 + 1e-9), 1e9)
            check_range("original_max_position_embeddings", self.original_max_position_embeddings, 1, 2**28)
        elif self.type == "freq_factors":
            if len(self.freq_factors) != head_dim // 2:
                raise CheckpointError(f"{len(self.freq_factors)} rope frequency factors for head_dim {head_dim}")
            for factor in self.freq_factors:
                check_range("rope frequency factor", factor, 1e-6, 1e9)
        elif self.type != "linear":
            raise _unknown_scaling(self.type)


def inv_freq(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> NDArray[np.float64]:
    """float64 (head_dim / 2,), radians per position; entry i turns the pair (i, i + head_dim / 2).

    Source: RoFormer, arXiv 2104.09864; linear scaling: arXiv 2306.15595; llama3: the Llama 3.1 model card's code.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = theta**-exponents
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


def hf_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of a config.json; `rope_parameters` is what `rope_scaling` and `rope_theta` became."""
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        part = config.get(key) or {}
        if not isinstance(part, Mapping):
            raise CheckpointError(f"config.json: {key} must be an object, got {short(part)}")
        rope.update(part)
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    partial = number(partial, "config.json: partial_rotary_factor")
    scaling = read_scaling(rope, config.get("max_position_embeddings", 2048))
    if partial != 1.0:
        raise UnsupportedModelError(f"partial_rotary_factor {partial} is not implemented: whole heads are rotated")
    return number(theta, "config.json: rope_theta"), scaling


def read_scaling(rope: Any, max_position_embeddings: Any) -> RopeScaling | None:
    """The scaling of an object as Transformers writes it, or None."""
    if rope is not None and not isinstance(rope, Mapping):
        raise CheckpointError(f"rope_scaling must be an object, got {short(rope)}")
    kind = (rope or {}).get("rope_type") or (rope or {}).get("type") or "default"
    if not rope or kind == "default":
        return None
    fields = Fields(rope, "rope parameters")
    if kind == "linear":
        return RopeScaling(type="linear", factor=fields.number("factor"))
    if kind == "llama3":
        trained = rope.get("original_max_position_embeddings") or max_position_embeddings
        return RopeScaling(
            type="llama3",
            factor=fields.number("factor"),
            low_freq_factor=fields.number("low_freq_factor"),
            high_freq_factor=fields.number("high_freq_factor"),
            original_max_position_embeddings=Fields({"original": trained}, "rope parameters").integer("original"),
        )
    raise _unknown_scaling(kind)


def gguf_scaling(fields: Fields, freq_factors: tuple[float, ...]) -> RopeScaling | None:
    """The scaling of a GGUF file, whose `rope_freqs.weight` has these factors, if any."""
    kind = fields.values.get(fields.prefix + "rope.scaling.type", "linear")
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return RopeScaling(type="freq_factors", freq_factors=freq_factors) if freq_factors else None
    if freq_factors:
        raise UnsupportedModelError(f"rope_freqs.weight together with rope scaling {short(kind)} is not implemented")
    if kind != "linear":
        raise _unknown_scaling(kind)
    return RopeScaling(type="linear", factor=factor)


def _unknown_scaling(kind: Any) -> UnsupportedModelError:
    return UnsupportedModelError(f"rope scaling {short(kind)} is not implemented; implemented: linear, llama3")
