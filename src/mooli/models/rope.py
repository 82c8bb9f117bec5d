"""Rotary frequencies, with the scaling that a model's files ask for.

Owns how a scaling is read and checked, and the formulas that turn a base and a scaling into radians per position. Never
rotates anything; backends do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mooli.backends.base import RopeSpec
from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models.fields import Fields, check_range, number, short

HF_KEYS = frozenset(("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"))
"""What `hf_rope` reads of a config.json."""

_HAVE_FACTORS = ("freq_factors", "longrope")
"""Types with a factor for each frequency."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed for long contexts.

    type "linear": divided by `factor`. "llama3": long wavelengths divided by `factor`, short ones kept, a ramp between
    (Llama 3.1). "freq_factors": each divided by its own entry of `freq_factors`, head_dim / 2 of them (GGUF). "yarn":
    divided by `factor` where fewer than `beta_slow` turns fit into the trained context, kept where more than
    `beta_fast` do, a ramp over the frequencies between, whose ends are whole numbers where `truncate` says so.
    "longrope": as "freq_factors", but with an attention factor (`mooli.models.longrope`).

    attention_factor: of "yarn" and "longrope", what cosines and sines are multiplied by. all_dim: DeepSeek's
    `mscale_all_dim`, from which its models compute the scale of scores too (`mscale`); 0 where nothing is said.
    """

    type: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    freq_factors: tuple[float, ...] = ()
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    all_dim: float = 0.0

    def check(self, head_dim: int) -> None:
        """Raise UnsupportedModelError for another type, CheckpointError for a number out of its bounds."""
        check_range("rope scaling factor", self.factor, 1e-6, 1e6)
        if self.type == "llama3":
            check_range("low_freq_factor", self.low_freq_factor, 1e-6, 1e6)
            check_range("high_freq_factor", self.high_freq_factor, self.low_freq_factor * (1 + 1e-9), 1e9)
            check_range("original_max_position_embeddings", self.original_max_position_embeddings, 1, 2**28)
        elif self.type == "yarn":
            check_range("beta_slow", self.beta_slow, 1e-6, 1e6)
            check_range("beta_fast", self.beta_fast, self.beta_slow, 1e6)
            check_range("attention_factor", self.attention_factor, 1e-6, 1e6)
            check_range("mscale_all_dim", self.all_dim, 0.0, 1e6)
            check_range("original_max_position_embeddings", self.original_max_position_embeddings, 1, 2**28)
        elif self.type in _HAVE_FACTORS:
            check_range("attention_factor", self.attention_factor, 1e-6, 1e6)
            if len(self.freq_factors) != head_dim // 2:
                raise CheckpointError(f"{len(self.freq_factors)} rope frequency factors for head_dim {head_dim}")
            for factor in self.freq_factors:
                check_range("rope frequency factor", factor, 1e-6, 1e9)
        elif self.type != "linear":
            raise _unknown_scaling(self.type)


def inv_freq(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> NDArray[np.float64]:
    """float64 (head_dim / 2,), radians per position; entry i turns the pair (i, i + head_dim / 2).

    Source: RoFormer, arXiv 2104.09864; linear scaling: arXiv 2306.15595; llama3: the Llama 3.1 model card's code; yarn:
    arXiv 2309.00071.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = theta**-exponents
    if scaling is None:
        return frequencies
    if scaling.type in _HAVE_FACTORS:
        return frequencies / np.asarray(scaling.freq_factors, np.float64)
    if scaling.type == "linear":
        return frequencies / scaling.factor
    if scaling.type == "yarn":
        return _yarn(frequencies, theta, scaling)
    return _llama3(frequencies, scaling)


def rope_spec(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> RopeSpec:
    """The rotation of heads of `head_dim` values, or of as many values at the beginning of longer ones."""
    return RopeSpec(inv_freq(head_dim, theta, scaling), 1.0 if scaling is None else scaling.attention_factor)


def mscale(factor: float, multiplier: float = 1.0) -> float:
    """By how much attention is sharpened where a context is longer by `factor`. Source: YaRN, arXiv 2309.00071, and
    DeepSeek-V2's configuration for the multiplier."""
    return 1.0 if factor <= 1.0 else 0.1 * multiplier * math.log(factor) + 1.0


def _llama3(frequencies: NDArray[np.float64], scaling: RopeScaling) -> NDArray[np.float64]:
    """Wavelengths longer than original / low are divided by the factor, shorter than original / high kept, and
    between the two ends the frequency is interpolated."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(ramp, 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _yarn(frequencies: NDArray[np.float64], theta: float, scaling: RopeScaling) -> NDArray[np.float64]:
    """Frequencies that turn often within the trained context are kept, those that turn rarely divided by the factor."""
    count = len(frequencies)
    check_range("rope_theta of yarn", theta, 1.0 + 1e-9, 1e15)

    def index_of(turns: float) -> float:
        """Which frequency turns so often."""
        trained = scaling.original_max_position_embeddings
        return count * math.log(trained / (turns * 2 * math.pi)) / math.log(theta)

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * count - 1)
    width = high - low if high != low else 0.001
    divided = np.clip((np.arange(count) - low) / width, 0.0, 1.0)
    stretched: NDArray[np.float64] = frequencies * (divided / scaling.factor + 1 - divided)
    return stretched


def hf_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of a config.json; `rope_parameters` is what `rope_scaling` and `rope_theta` became."""
    rope = hf_parameters(config)
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    partial = number(partial, "config.json: partial_rotary_factor")
    scaling = read_scaling(rope, config.get("max_position_embeddings", 2048))
    if partial != 1.0:
        raise UnsupportedModelError(f"partial_rotary_factor {partial} is not implemented: whole heads are rotated")
    return number(theta, "config.json: rope_theta"), scaling


def hf_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Both objects of a config.json as one."""
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        part = config.get(key) or {}
        if not isinstance(part, Mapping):
            raise CheckpointError(f"config.json: {key} must be an object, got {short(part)}")
        rope.update(part)
    return rope


def without_partial(config: Mapping[str, Any], default: float = 1.0) -> tuple[float, dict[str, Any]]:
    """Which part of a head is rotated, and the config.json without it, for a family that rotates parts."""
    rope = hf_parameters(config)
    partial = rope.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or default
    partial = number(partial, "config.json: partial_rotary_factor")
    check_range("partial_rotary_factor", partial, 0.0, 1.0)
    return partial, {**config, "rope_parameters": rope, "rope_scaling": None, "partial_rotary_factor": None}


def rotary_dim(head_dim: int, partial: float) -> int:
    """How many first values of a head are rotated; 0 for all. CheckpointError if there are none."""
    count = int(head_dim * partial)
    check_range("rotary values of a head", count, 2, head_dim)
    return count % head_dim


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
    if kind == "yarn":
        return _hf_yarn(rope, max_position_embeddings)
    raise _unknown_scaling(kind)


def _hf_yarn(rope: Mapping[str, Any], max_position_embeddings: Any) -> RopeScaling:
    trained = rope.get("original_max_position_embeddings") or max_position_embeddings
    original = Fields({"original": trained}, "rope parameters").integer("original")
    check_range("original_max_position_embeddings", original, 1, 2**28)
    given = {key: value for key, value in rope.items() if value is not None}
    fields = Fields(given, "rope parameters")
    factor = fields.number("factor", number(max_position_embeddings, "max_position_embeddings") / original)
    own, all_dim = fields.number("mscale", 0.0), fields.number("mscale_all_dim", 0.0)
    usual = mscale(factor, own) / mscale(factor, all_dim) if own and all_dim else mscale(factor)
    return RopeScaling(
        type="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=fields.number("beta_fast", 32.0) or 32.0,
        beta_slow=fields.number("beta_slow", 1.0) or 1.0,
        truncate=fields.flag("truncate", True),
        attention_factor=fields.number("attention_factor", usual),
        all_dim=all_dim,
    )


def gguf_scaling(fields: Fields, freq_factors: tuple[float, ...]) -> RopeScaling | None:
    """The scaling of a GGUF file, whose `rope_freqs.weight` has these factors, if any."""
    kind = fields.values.get(fields.prefix + "rope.scaling.type", "linear")
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return RopeScaling(type="freq_factors", freq_factors=freq_factors) if freq_factors else None
    if freq_factors:
        raise UnsupportedModelError(f"rope_freqs.weight together with rope scaling {short(kind)} is not implemented")
    if kind == "yarn":
        return _gguf_yarn(fields, factor)
    if kind != "linear":
        raise _unknown_scaling(kind)
    return RopeScaling(type="linear", factor=factor)


def _gguf_yarn(fields: Fields, factor: float) -> RopeScaling:
    """Files do not say whether the ramp's ends are whole numbers: they are in what made the format.

    The logarithm's multiplier, where there is one, is that of all dimensions; DeepSeek's has been multiplied by 0.1,
    and its models multiply neither cosines nor sines.
    """
    all_dim = fields.number("rope.scaling.yarn_log_multiplier", 0.0)
    if fields.prefix == "deepseek2.":
        all_dim, usual = 10 * all_dim, 1.0
    else:
        usual = mscale(factor) / mscale(factor, all_dim) if all_dim else mscale(factor)
    return RopeScaling(
        type="yarn",
        factor=factor,
        original_max_position_embeddings=fields.integer(
            "rope.scaling.original_context_length", fields.integer("context_length")
        ),
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=usual * fields.number("rope.scaling.yarn_attn_factor", 1.0),
        all_dim=all_dim,
    )


def _unknown_scaling(kind: Any) -> UnsupportedModelError:
    return UnsupportedModelError(f"rope scaling {short(kind)} is not implemented; implemented: linear, llama3, yarn")
