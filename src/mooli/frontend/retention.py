"""How long a request wants its prompt kept: the words for it, checked.

Owns durations, marks, and the argument `pin`, which dialects make of theirs. A wish is advice: what becomes of it is
the cache's affair (`mooli.cache.eviction`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mooli.errors import RequestError
from mooli.types import Pin

MAX_SECONDS = 24 * 3600
MAX_WEIGHT = 100
MAX_PINS = 8
MAX_SESSION_CHARS = 256

_DURATION = re.compile(r"(\d{1,6})([smh])", re.ASCII)
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, slots=True)
class Place:
    """The end of a tool or a message, by its index as it is told to the template. Tools come before messages."""

    kind: Literal["tool", "message"]
    index: int

    @property
    def order(self) -> tuple[bool, int]:
        return self.kind == "message", self.index


@dataclass(frozen=True, slots=True)
class Mark:
    """Keep all of a conversation's prompt up to there for so long. place: None for the whole prompt."""

    seconds: float
    place: Place | None = None


def parse_seconds(value: Any, name: str) -> float:
    """Of a number of seconds, or of a text such as "5m". Raises RequestError, whose argument is that before a dot or
    bracket in `name`."""
    found = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if found is not None:
        seconds = float(found[1]) * _UNITS[found[2]]
    else:
        seconds = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not 0 < seconds <= MAX_SECONDS:
        raise _wrong(name, value, f"a time such as '90s', '5m' or '1h', of {MAX_SECONDS // 3600} hours at most")
    return float(seconds)


def parse_pins(given: Any, priority: int = 0) -> tuple[Pin, ...]:
    """Of the argument `pin`: {"seconds" or "ttl", "weight", "tokens"}, or a list of those. Without a weight a request's
    priority counts, from 1 on. Raises RequestError."""
    if given is None:
        return ()
    items = [given] if isinstance(given, Mapping) else given
    if not isinstance(items, Sequence) or isinstance(items, (str, bytes)):
        raise _wrong("pin", given, "an object with seconds or ttl, or a list of those")
    if len(items) > MAX_PINS:
        raise RequestError(f"pin has {len(items)} entries; at most {MAX_PINS} are possible", argument="pin")
    return tuple(_pin(item, "pin" if items is not given else f"pin[{i}]", priority) for i, item in enumerate(items))


def _pin(given: Any, name: str, priority: int) -> Pin:
    if not isinstance(given, Mapping):
        raise _wrong(name, given, "an object with seconds or ttl")
    unknown = [key for key in given if key not in ("seconds", "ttl", "weight", "tokens")]
    if unknown:
        raise RequestError(
            f"{name} has {str(unknown[0])[:80]!r}; it takes seconds or ttl, weight and tokens", argument="pin"
        )
    times = [key for key in ("seconds", "ttl") if given.get(key) is not None]
    if len(times) != 1:
        raise RequestError(f"{name} needs one of seconds and ttl: for how long", argument="pin")
    weight, tokens = given.get("weight"), given.get("tokens")
    if weight is None:
        weight = min(max(1, priority), MAX_WEIGHT)
    elif not _is_whole(weight) or not 1 <= weight <= MAX_WEIGHT:
        raise _wrong(f"{name}.weight", weight, f"a whole number of 1 … {MAX_WEIGHT}")
    if tokens is not None and (not _is_whole(tokens) or tokens < 1):
        raise _wrong(f"{name}.tokens", tokens, "a number of tokens from the prompt's first on, 1 or more")
    return Pin(parse_seconds(given[times[0]], f"{name}.{times[0]}"), weight, tokens)


def parse_sessions(given: Any, size: int, n: int) -> list[str]:
    """Of the argument `session_id`: a name for each of `size` prompts; "" for none. n: answers to each. Raises
    RequestError."""
    if given is None or given == "":
        return [""] * size
    names = list(given) if isinstance(given, (list, tuple)) else [given]
    for name in names:
        if not isinstance(name, str) or len(name) > MAX_SESSION_CHARS:
            raise _wrong("session_id", name, f"a text of at most {MAX_SESSION_CHARS} characters")
    if len(names) != size or n != 1:
        raise RequestError(
            f"session_id names {len(names)} conversations, and the call has {size * n} sequences: give one for each,"
            " and n=1",
            argument="session_id",
        )
    return names


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(name: str, value: Any, wanted: str) -> RequestError:
    argument = re.split(r"[.\[]", name)[0]
    return RequestError(f"{name} must be {wanted}, not {str(value)[:80]!r}", argument=argument)
