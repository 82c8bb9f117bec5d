"""Arguments of SGLang's `generate` for what Mooli does not have.

Owns their names, the values that ask for nothing, and the refusal of all others: an argument that would be left aside
in silence would change the answer. Never looks at arguments that exist here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mooli.errors import RequestError

ENGINE_ARGUMENTS: dict[str, Any] = {
    "image_data": None,
    "audio_data": None,
    "video_data": None,
    "mm_hashes": None,
    "mm_content_hashes": None,
    "lora_path": None,
    "custom_logit_processor": None,
    "require_reasoning": False,
    "return_hidden_states": False,
    "return_routed_experts": False,
    "routed_experts_start_len": 0,
    "bootstrap_host": None,
    "bootstrap_port": None,
    "bootstrap_room": None,
    "routed_dp_rank": None,
    "disagg_prefill_dp_rank": None,
    "kv_hints": None,
    "data_parallel_rank": None,
    "external_trace_header": None,
    "session_params": None,
    "session_id": None,
}
"""Arguments of `Engine.generate`, each with the one value besides None that asks for nothing."""

BODY_FIELDS: dict[str, Any] = {
    **ENGINE_ARGUMENTS,
    "input_embeds": None,
    "lora_id": None,
    "max_thinking_tokens": None,
    "return_entropy": False,
}
"""Fields of a /generate body, likewise."""


def refuse_unsupported(given: Mapping[str, Any], names: Mapping[str, Any]) -> None:
    """Raise RequestError for the first of `names` that `given` asks something of. Empty values ask for nothing."""
    for name in _asked(given, names):
        raise RequestError(f"{name} is not supported by Mooli yet: leave it out", argument=name)


def _asked(given: Mapping[str, Any], names: Mapping[str, Any]) -> Iterable[str]:
    for name, neutral in names.items():
        value = given.get(name)
        # The type is compared too: 0 == False, and neither stands for the other here.
        is_neutral = value is None or (type(value) is type(neutral) and value == neutral)
        if not is_neutral and value not in ("", [], {}):
            yield name
