"""What all that write grammars of llguidance have in common: literals, and JSON of a schema.

Owns how much white space JSON may have. Between tokens of a user's JSON at most MAX_SPACES are allowed, as models else
write nothing but spaces for ever. Arguments of calls have what chat templates give them in the next turn: it is then
the same text, which the cache has. Never compiles a grammar.

Source: llguidance's syntax document.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MAX_SPACES = 24

JSON_OPTIONS: Any = {"whitespace_pattern": rf"[\x20\x0A\x0D\x09]{{1,{MAX_SPACES}}}"}


AS_TEMPLATES_WRITE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Jinja's `tojson` as transformers has it."""


def quoted(text: str) -> str:
    """A literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def without_options(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A user's schema. What it says to the library is left out: leniency for one, which would enforce nothing."""
    return {name: value for name, value in schema.items() if name != "x-guidance"}


def json_of(schema: Mapping[str, Any], options: Any = AS_TEMPLATES_WRITE) -> str:
    """The body of a rule: JSON that `schema` allows."""
    return f"%json {json.dumps({**without_options(schema), 'x-guidance': options})}"
