"""Values that a model writes as raw text between markers: what they are in JSON.

Owns the reading of one value by the types that its schema allows. Strings are written as they are and all else as JSON,
as chat templates write a history. Knows no format's markers, and never checks a value: a text that is no JSON of its
types becomes a string, for who called to judge. What a grammar lets a value be is in `mooli.raw_rules`.
"""

from __future__ import annotations

import json
import re

from mooli.frontend.wire_formats.json_text import JsonScanner
from mooli.schemas import ANY_TYPES, STRING

_BEGUN_NUMBER = re.compile(r"-?\d*\.?\d*(?:[eE][-+]?\d*)?\s*")


# -- from raw text to JSON ---------------------------------------------------------------------------------------------
class RawValue:
    """One value as it comes. A string is told piece by piece, as soon as nothing else can become of it; all other
    values when they are over."""

    def __init__(self, types: frozenset[str]) -> None:
        self._types = types
        self._others = types - STRING
        self._pieces: list[str] = []
        self._is_told = False
        """That it is a string: its first quote."""
        self._waits = bool(self._others)

    def push(self, text: str) -> str:
        """The JSON that is certain now."""
        self._pieces.append(text)
        if self._waits and not ("string" in self._types and self._is_string()):
            return ""
        self._waits = False
        return self._string()

    def end(self) -> str:
        """The rest: nothing follows."""
        text = "".join(self._pieces)
        if self._waits:
            told = as_json(text.strip(), self._others if "string" in self._types else ANY_TYPES)
            if told is not None:
                return told
        return self._string() + ('"' if self._is_told else '""')

    def rest(self) -> str:
        """What was held of a value that is cut short."""
        text = "".join(self._pieces)
        self._pieces.clear()
        return text

    def _string(self) -> str:
        text = "".join(self._pieces)
        self._pieces.clear()
        if not text:
            return ""
        quote = "" if self._is_told else '"'
        self._is_told = True
        return quote + json.dumps(text, ensure_ascii=False)[1:-1]

    def _is_string(self) -> bool:
        """Whether what has come can become no JSON of another type."""
        if len(self._pieces) > 1 and self._pieces[0][:1] in ("{", "["):
            return False  # for ever: it is not looked through again
        text = "".join(self._pieces).lstrip()
        self._pieces = [text] if text[:1] in ("{", "[") else self._pieces
        if not text:
            return False
        others = self._others
        if (text[0] == "{" and "object" in others) or (text[0] == "[" and "array" in others):
            return False
        word = text.rstrip()
        words = [*(("true", "false", "True", "False") if "boolean" in others else ())]
        words += ["null", "None"] if "null" in others else []
        if any(known.startswith(word) for known in words):
            return False
        return not (others & {"integer", "number"} and _BEGUN_NUMBER.fullmatch(text))


def as_json(text: str, allowed: frozenset[str]) -> str | None:
    """`text` as JSON, if it is a value of the types `allowed`, with its digits as they are."""
    scanner = JsonScanner()
    told, end = scanner.feed(text, is_last=True)
    if not scanner.is_over or scanner.is_broken or text[end:].strip():
        return None
    kinds = {"{": "object", "[": "array", '"': "string", "n": "null", "t": "boolean", "f": "boolean"}
    kind = kinds.get(told[0]) or ("number" if set(told) & set(".eE") else "integer")
    return told if kind in allowed or (kind == "integer" and "number" in allowed) else None
