"""What became of an earlier prompt, in the words of Anthropic's and OpenAI's diagnostics.

Owns the names of reasons in both APIs and the shapes around them, and Anthropic's account of what was cached. Both tell
of the form of two requests, whatever the cache had of them. `mooli.frontend.prompt_changes` compares these.

Source: the API references: Anthropic's Messages, `diagnostics`; OpenAI's Responses, `prompt_cache_diagnostics`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from mooli.frontend.cache_report import Inquiry
from mooli.frontend.generation import Generation
from mooli.frontend.prompt_changes import ChangeKind


class Diagnostics(msgspec.Struct, kw_only=True):
    """previous_message_id: of the message that this one goes on, or null for a first one."""

    previous_message_id: str | None = None


def has_cache_control(given: Any, lists: Iterable[Any]) -> bool:
    """Whether anything in a request to Anthropic's API is marked to be cached: all of it, or one of its blocks."""
    return given is not None or any(
        block.get("cache_control") for blocks in lists if isinstance(blocks, list) for block in blocks
    )


def anthropic_usage(generation: Generation, *, counts_writes: bool) -> dict[str, int]:
    """counts_writes: what was computed and kept is told apart from `input_tokens`; their sum is the same."""
    written = generation.written_tokens if counts_writes else 0
    return {
        "input_tokens": generation.prompt_tokens - generation.cached_tokens - written,
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": generation.cached_tokens,
        "output_tokens": len(generation.output_ids),
    }


_ANTHROPIC: Mapping[ChangeKind, str] = {
    "model": "model_changed",
    "system": "system_changed",
    "tools": "tools_changed",
    "messages": "messages_changed",
    "compacted": "messages_changed",
    "reasoning": "messages_changed",
}
"""What is not here is `unavailable`: other parameters of the prompt, such as thinking."""

_OPENAI: Mapping[ChangeKind, str] = {
    "model": "model_changed",
    "arguments": "reasoning_effort_changed",
    "system": "input_changed",
    "tools": "tools_changed",
    "messages": "input_changed",
    "compacted": "context_compacted",
    "reasoning": "input_changed",
}


def anthropic_diagnostics(inquiry: Inquiry, generation: Generation) -> dict[str, Any] | None:
    """`diagnostics` of a message; None where nothing differs, or no earlier message was named."""
    if inquiry.asked.previous_id is None:
        return None
    if inquiry.is_missing:
        return {"cache_miss_reason": {"type": "previous_message_not_found"}}
    change = inquiry.missed(generation)
    if change is None:
        return None
    kind = _ANTHROPIC.get(change.kind)
    if kind is None:
        return {"cache_miss_reason": {"type": "unavailable"}}
    missed = inquiry.num_missed(generation)
    return {"cache_miss_reason": {"type": kind, "cache_missed_input_tokens": missed}}


def openai_diagnostics(inquiry: Inquiry, generation: Generation) -> dict[str, Any] | None:
    """`prompt_cache_diagnostics` of a response; None where no earlier response was named. Another `cache_salt` is what
    that API calls another prompt_cache_key."""
    if inquiry.asked.previous_id is None:
        return None
    if inquiry.is_missing or inquiry.previous is None:
        return {"type": "comparison_response_not_found"}
    change = inquiry.missed(generation)
    if change is not None:
        reason = _OPENAI[change.kind]
    elif inquiry.previous.namespace != inquiry.asked.namespace:
        reason = "prompt_cache_key_changed"
    else:
        return {"type": "cache_hit"}
    return {
        "type": "cache_miss",
        "reason": reason,
        "cache_missed_tokens": inquiry.num_missed(generation),
        "comparison_reusable_tokens": generation.cached_tokens,
    }
