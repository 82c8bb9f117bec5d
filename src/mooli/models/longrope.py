"""Rotary frequencies of LongRoPE, which have a factor each: one list for short sequences, one for long ones.

Owns how both lists are read and which one an engine takes. Transformers takes the one that fits the sequence as it is
now, so that keys of one sequence are rotated in two ways and a cached prefix is of one kind only. Here it is decided
once, by the longest sequence that the engine will have.

Source: LongRoPE, arXiv 2402.13753; the Phi-3 models' configuration and code in Transformers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mooli.errors import CheckpointError
from mooli.models.fields import Fields, GGUFSource, HFSource, check_range, number, short
from mooli.models.rope import RopeScaling, hf_parameters

NAMES = ("longrope", "su", "yarn")
"""What Phi-3's files call it; the last two are older."""


def hf_longrope(
    rope: Mapping[str, Any], values: Mapping[str, Any], *, default_context: int, context: int | None
) -> RopeScaling:
    """Of the rope parameters of a config.json, `values`. default_context: where that does not say how long sequences
    may be. context: the longest sequence there will be; None: as long as they may be."""
    fields = Fields({key: value for key, value in values.items() if value is not None}, "config.json")
    given = Fields({key: value for key, value in rope.items() if value is not None}, "rope parameters")
    longest = fields.integer("max_position_embeddings", default_context)
    trained = fields.integer(
        "original_max_position_embeddings", given.integer("original_max_position_embeddings", longest)
    )
    check_range("original_max_position_embeddings", trained, 2, 2**28)
    factor = given.number("factor", longest / trained)
    usual = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1.0 else 1.0
    kind = "long_factor" if (context or longest) > trained else "short_factor"
    factors = rope.get(kind)
    if not isinstance(factors, list):
        raise CheckpointError(f"rope parameters: {kind} must be a list of numbers, got {short(factors)}")
    return RopeScaling(
        type="longrope",
        freq_factors=tuple(number(value, f"rope parameters: {kind}") for value in factors),
        attention_factor=given.number("attention_factor", usual),
    )


def without_longrope(source: HFSource, default_context: int) -> tuple[HFSource, RopeScaling | None]:
    """A config.json without this scaling, and the scaling, which is None where it has another or none."""
    parameters = hf_parameters(source.values)
    if "longrope" not in (parameters.get("rope_type"), parameters.get("type")):
        return source, None
    scaling = hf_longrope(parameters, source.values, default_context=default_context, context=source.context)
    theta = parameters.get("rope_theta") or source.values.get("rope_theta")
    values = {**source.values, "rope_parameters": None, "rope_scaling": None, "rope_theta": theta}
    return dataclasses.replace(source, values=values), scaling


def gguf_longrope(source: GGUFSource) -> tuple[GGUFSource, RopeScaling | None]:
    """Of a GGUF file that has both lists as tensors, and its metadata without this scaling; None without them."""
    short_factors, long_factors = (source.vectors.get(f"rope_factors_{kind}.weight", ()) for kind in ("short", "long"))
    if not short_factors and not long_factors:
        return source, None
    fields = source.fields
    longest = fields.integer("context_length")
    trained = fields.integer("rope.scaling.original_context_length", longest)
    scaling = RopeScaling(
        type="longrope",
        freq_factors=long_factors if (source.context or longest) > trained else short_factors,
        attention_factor=fields.number("rope.scaling.attn_factor", 1.0),
    )
    rest = {key: value for key, value in source.metadata.items() if key != f"{source.name}.rope.scaling.type"}
    return dataclasses.replace(source, metadata=rest), scaling
