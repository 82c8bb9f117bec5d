"""Which model is served, in SGLang's words.

Owns the answer of `Engine.get_model_info` and of the route of the same name. Never looks at anything but what it is
given.
"""

from __future__ import annotations

from typing import Any

from mooli.config import EngineConfig
from mooli.engine.facts import EngineFacts
from mooli.frontend.native_answer import WEIGHT_VERSION


def model_info(config: EngineConfig, facts: EngineFacts) -> dict[str, Any]:
    """None and False stand for what this engine does not have."""
    return {
        "model_path": config.model_path,
        "tokenizer_path": config.tokenizer_path or config.model_path,
        "served_model_name": config.served_model_name or config.model_path,
        "is_generation": True,
        "preferred_sampling_params": config.preferred_sampling_params,
        "weight_version": WEIGHT_VERSION,
        "load_format": config.load_format,
        "reasoning_parser": None,
        "tool_call_parser": None,
        "disaggregation_mode": "null",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "architectures": [facts.architecture],
        "max_model_len": facts.context_length,
    }
