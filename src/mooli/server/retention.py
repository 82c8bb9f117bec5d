"""How long a request wants its prompt kept, in the words of each dialect.

Owns what of a body says so, as marks: Anthropic's `cache_control`, OpenAI's `prompt_cache_options`,
`prompt_cache_breakpoint` and `prompt_cache_retention`. Never decides what is kept.

A mark inside a message counts to the end of that message.

Source: the API references: Anthropic's Messages, prompt caching; OpenAI's chat and Responses, prompt caching.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mooli.errors import RequestError
from mooli.frontend.retention import Mark, Place, parse_seconds
from mooli.server.routing import HttpError

ANTHROPIC_TTL = "5m"
OPENAI_TTL = "30m"
RETENTIONS = {"in_memory": None, "in-memory": None, "24h": "24h"}
"""Of `prompt_cache_retention`: None keeps nothing longer than it is kept anyway."""


# -- Anthropic ---------------------------------------------------------------------------------------------------------
def cache_control(given: Any, where: str) -> float | None:
    """Seconds of a `cache_control`; None where there is none. Raises HttpError (400) that names it."""
    if given is None:
        return None
    if not isinstance(given, dict) or given.get("type") != "ephemeral":
        raise HttpError(400, f"{where} must be {{'type': 'ephemeral'}}, with a ttl if need be.", param=where)
    return _seconds(given.get("ttl") or ANTHROPIC_TTL, f"{where}.ttl", where)


def marked_blocks(content: Any, where: str) -> float | None:
    """The longest time that a block in a message's content is marked for, or one in a tool's result."""
    found: list[float | None] = []
    for index, block in enumerate(content if isinstance(content, list) else ()):
        if isinstance(block, dict):
            at = f"{where}[{index}]"
            found.append(cache_control(block.get("cache_control"), f"{at}.cache_control"))
            found.append(marked_blocks(block.get("content"), f"{at}.content"))
    return max((seconds for seconds in found if seconds is not None), default=None)


# -- OpenAI ------------------------------------------------------------------------------------------------------------
def openai_marks(
    retention: str | None, options: Mapping[str, Any] | None, contents: Iterable[tuple[Place, Any]] = ()
) -> list[Mark]:
    """retention, options: `prompt_cache_retention` and `prompt_cache_options`. contents: of messages, which may have
    parts with a `prompt_cache_breakpoint`. Raises HttpError (400) that names what is wrong."""
    marks = []
    if retention is not None:
        if retention not in RETENTIONS:
            raise HttpError(
                400, f"prompt_cache_retention={retention[:80]!r} is none of {', '.join(RETENTIONS)}",
                param="prompt_cache_retention",
            )  # fmt: skip
        ttl = RETENTIONS[retention]
        if ttl is not None:
            marks.append(Mark(_seconds(ttl, "prompt_cache_retention")))
    options = options or {}
    mode, ttl = options.get("mode") or "implicit", options.get("ttl")
    if mode not in ("implicit", "explicit"):
        raise HttpError(
            400, f"prompt_cache_options.mode={str(mode)[:80]!r} is none of implicit, explicit",
            param="prompt_cache_options",
        )  # fmt: skip
    seconds = None if ttl is None else _seconds(ttl, "prompt_cache_options.ttl")
    if seconds is not None and mode == "implicit":
        marks.append(Mark(seconds))
    for place, content in contents:
        for part in content if isinstance(content, list) else ():
            given = part.get("prompt_cache_breakpoint") if isinstance(part, dict) else None
            if given is None:
                continue
            if not isinstance(given, dict):
                message = "prompt_cache_breakpoint must be {'mode': 'explicit'}, with a ttl if need be"
                raise HttpError(400, message, param="prompt_cache_breakpoint")
            default = _seconds(OPENAI_TTL, "") if seconds is None else seconds
            own = given.get("ttl")
            marks.append(Mark(default if own is None else _seconds(own, "prompt_cache_breakpoint.ttl"), place))
    return marks


def _seconds(ttl: Any, name: str, param: str = "") -> float:
    try:
        return parse_seconds(ttl, name)
    except RequestError as exc:
        raise HttpError(400, str(exc), param=param or name.partition(".")[0]) from exc
